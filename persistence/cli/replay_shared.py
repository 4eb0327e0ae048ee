"""A replay's sessions in Redis: which namespace, what is there already, and is it right at the end.

A fresh replay gets a namespace of its own, so it can neither meet data of somebody else nor change
it. A resumed one goes on in the namespace that its cursor names.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from persistence import StateManager
from persistence.cli.failure import CommandError
from persistence.cli.replay_model import ReplayOptions
from persistence.cli.replay_sessions import (
    CURSOR_ID,
    Sections,
    check_cursor,
    check_no_strangers,
    config_of,
    cursor_of,
    sections_of,
)
from persistence.cli.replay_verify import Expected, Wrong, compare_patiently
from persistence.clock import SystemClock
from persistence.config import RedisConfig
from persistence.errors import RemoteUnavailable
from persistence.remote.opening import tier_of

_AGAIN_SECONDS: Final = 0.25
_WRITES: Final = ("through", "behind")


def check_options(options: ReplayOptions) -> None:
    """Check what the command line says of Redis and workers.

    Raises:
        CommandError: the options do not go together.
    """
    if options.redis_url is None:
        if options.workers > 1:
            raise CommandError("--workers needs --redis, through which they share the sessions")
        if options.namespace is not None:
            raise CommandError("--namespace needs --redis")
        if options.redis_write != "through":
            raise CommandError("--redis-write needs --redis")
        return
    if options.redis_write not in _WRITES:
        raise CommandError(f"--redis-write {options.redis_write}: must be through or behind")
    if options.workers > 1 and options.redis_write != "through":
        raise CommandError(
            "--workers needs --redis-write through: a worker must see what another one has written"
        )


def with_redis(
    sections: Sections, options: ReplayOptions, namespace: str, on_outage: str
) -> Sections:
    """Return the sections with those of the shared tier.

    Args:
        sections: the others.
        options: where Redis is, and when it learns of an update.
        namespace: of the replay.
        on_outage: "local" or "fail".
    """
    redis = {
        "url": options.redis_url,
        "namespace": namespace,
        "write": options.redis_write,
        "on_outage": on_outage,
    }
    return {**sections, "redis": redis}


# --- beginning --------------------------------------------------------------------------------


def holds_something(directory: Path) -> bool:
    """Return whether `directory` is there and not empty."""
    return directory.exists() and any(directory.iterdir())


async def choose_namespace(options: ReplayOptions, directory: Path) -> str:
    """Return the namespace for a replay: the given one, the one to resume, or a fresh one.

    The directory is looked at without Redis: opened with another namespace than before, it would
    bring everything it holds there.

    Args:
        options: what to replay.
        directory: of the worker that keeps the cursor.

    Raises:
        CommandError: the directory's sessions are not those that this replay may go on with.
    """
    given = options.namespace
    fresh = f"replay-{secrets.token_hex(8)}" if given is None else given
    if not holds_something(directory):
        return fresh
    async with StateManager(config=config_of(sections_of(options, directory))) as state:
        cursor = await state.get_session(CURSOR_ID, renew=False)
        if cursor is None:
            await check_no_strangers(state, directory)
            return fresh
        namespace = cursor.get("namespace") if given is None else given
        wanted = cursor_of(options, namespace or fresh)
        check_cursor(cursor.data, wanted, directory, resume=options.resume)
        return str(wanted["namespace"])


async def check_redis(config: RedisConfig) -> None:
    """Check that Redis is there, and that the namespace holds a replay or nothing.

    Raises:
        ConfigError: it can never work like this.
        RemoteUnavailable: it cannot be reached, or refuses to work now.
        CommandError: the namespace holds sessions of something else.
    """
    tier = tier_of(config, SystemClock())
    try:
        await tier.open()
        if await tier.load(CURSOR_ID) is not None:
            return  # whose it is, is checked where it is read
        async for _ in tier.scan():
            raise CommandError(
                f"the namespace {config.namespace!a} in Redis holds sessions of something else; "
                "name another one"
            )
    finally:
        await tier.close()


# --- verifying --------------------------------------------------------------------------------


async def verify_in_redis(
    options: ReplayOptions, namespace: str, expected: Expected, step: Callable[[], None]
) -> tuple[Wrong, int]:
    """Read every session as a worker does that has never seen any; return what differs.

    While Redis is away or still being filled, this waits for it.

    Returns:
        What differs, and how many sessions were compared.

    Raises:
        RemoteUnavailable: Redis did not come back within ``options.patience_seconds``.
    """
    clock = SystemClock()
    given_up = clock.monotonic() + options.patience_seconds
    while True:
        try:
            return await _verified(options, namespace, expected, step)
        except RemoteUnavailable:
            if clock.monotonic() >= given_up:
                raise
            await asyncio.sleep(_AGAIN_SECONDS)


async def _verified(
    options: ReplayOptions, namespace: str, expected: Expected, step: Callable[[], None]
) -> tuple[Wrong, int]:
    with TemporaryDirectory(prefix="persistence-replay-check-") as empty:
        sections = sections_of(options, Path(empty))
        sections["disk"]["fsync"] = "never"
        config = config_of(with_redis(sections, options, namespace, "fail"))
        async with StateManager(config=config) as stranger:

            async def read(sid: str) -> Mapping[str, Any] | None:
                session = await stranger.get_session(sid, fresh=True, renew=False)
                return None if session is None else session.data

            ids = expected.ids() | await _ids_in(config.redis) | {CURSOR_ID}
            wrong = await compare_patiently(expected, ids, read, step, options.patience_seconds)
            return wrong, len(ids) - 1


async def _ids_in(config: RedisConfig) -> set[str]:
    """Return the ids of all sessions in a namespace."""
    tier = tier_of(config, SystemClock())
    try:
        await tier.open()
        return {sid async for page in tier.scan() for sid in page}
    finally:
        await tier.close()
