"""The sessions of a replay as one manager keeps them: applying requests, and the cursor.

Exactly once, although the process may be killed at any moment, rests on two facts kept in the
engine itself:

1. Each session's ``position`` is the index of the last request applied to it, written by the very
   commit that applied it. Requests of one session are applied in the order of the log (the next one
   is only begun once the one before is acknowledged), so whatever is at or below that position has
   been applied, and nothing else.
2. The cursor session holds a low watermark: every request below it has been acknowledged. It only
   saves work: a resumed replay starts there and skips, session by session, what fact 1 shows to
   be done.

The watermark is saved after the acknowledgements that it speaks of, so in every ``fsync`` mode the
log on disk never holds a watermark without the updates below it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from persistence import StateConfig, StateManager
from persistence.cli.accesslog import Request
from persistence.cli.failure import CommandError
from persistence.cli.replay_model import ReplayOptions
from persistence.cli.workload import (
    NOT_STARTED,
    TTL_SECONDS,
    apply_request,
    clean,
    metadata_of,
)

CURSOR_ID: Final = "replay-cursor"
"""Id of the session that holds the watermark. No client's: theirs contain a space."""

Sections = dict[str, dict[str, Any]]
Cursor = dict[str, Any]


def sections_of(options: ReplayOptions, directory: Path) -> Sections:
    """Return the sections of a worker's configuration, without the shared tier."""
    return {
        "session": {"ttl_seconds": TTL_SECONDS},
        "memory": {"max_bytes": options.memory_bytes, "policy": options.policy},
        "disk": {
            "path": str(directory),
            "fsync": options.fsync,
            "segment_bytes": options.segment_bytes,
        },
        "shutdown": {"checkpoint": False},
    }


def config_of(sections: Sections) -> StateConfig:
    """Return the configuration, which checks what the command line was given.

    Raises:
        ConfigError: a setting is wrong.
    """
    return StateConfig.model_validate(sections)


def cursor_of(options: ReplayOptions, namespace: str | None) -> Cursor:
    """Return what the cursor says of a replay before its first request.

    Raises:
        CommandError: a log is not there.
    """
    try:
        logs = [[clean(log.name), log.stat().st_size] for log in options.logs]
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from error
    cursor: Cursor = {"input": {"logs": logs, "limit": options.limit}, "watermark": 0}
    return cursor if namespace is None else {**cursor, "namespace": namespace}


def check_cursor(found: Mapping[str, Any], wanted: Cursor, where: object, *, resume: bool) -> None:
    """Check that a replay may go on where another one stopped.

    Raises:
        CommandError: it may not.
    """
    if not resume:
        raise CommandError(
            f"{where} holds a replay already; go on with --resume or name another directory"
            " or --namespace"
        )
    if found.get("input") != wanted["input"]:
        raise CommandError(
            f"{where} holds a replay of {_described(found.get('input'))}, "
            f"not of {_described(wanted['input'])}; --resume needs the same log"
        )
    if found.get("namespace") != wanted.get("namespace"):
        raise CommandError(
            f"{where} holds a replay {_shared(found)}, not one {_shared(wanted)}; --resume needs "
            "the same --redis and --namespace"
        )


def _described(identity: Any) -> str:
    try:
        logs = ", ".join(f"{name} ({size} bytes)" for name, size in identity["logs"])
        limit = identity["limit"]
    except (TypeError, KeyError, ValueError):
        return "something else"
    return logs if limit is None else f"{logs}, limit {limit}"


def _shared(cursor: Mapping[str, Any]) -> str:
    namespace = cursor.get("namespace")
    return "without Redis" if namespace is None else f"in the Redis namespace {namespace!a}"


async def check_no_strangers(state: StateManager, where: object) -> None:
    """Check that there is no session at all.

    Raises:
        CommandError: there is one, and it is of something else.
    """
    async for _ in state.iter_sessions():
        raise CommandError(f"{where} holds sessions of something else; name another directory")


async def begin(state: StateManager, wanted: Cursor, where: object, *, resume: bool) -> int:
    """Return the position to start at: the cursor's watermark, or 0 with a new cursor.

    Raises:
        CommandError: the sessions are not those that this replay may go on with.
    """
    cursor = await state.get_session(CURSOR_ID)
    if cursor is None:
        await check_no_strangers(state, where)
        await state.create_session(session_id=CURSOR_ID, ttl_seconds=TTL_SECONDS, data=wanted)
        return 0
    check_cursor(cursor.data, wanted, where, resume=resume)
    watermark: int = cursor["watermark"]
    return watermark


class ManagerApplier:
    """Applies requests to the sessions of a manager.

    Args:
        state: the manager.

    Attributes:
        retried: updates that were done again because another worker's came first.
    """

    def __init__(self, state: StateManager) -> None:
        self._state = state
        self.retried = 0

    async def apply(self, position: int, sid: str, request: Request) -> bool:
        """Apply a request; return once that is acknowledged. False: it had been applied."""
        session = await self._state.get_or_create_session(
            sid, ttl_seconds=TTL_SECONDS, metadata=metadata_of(request)
        )
        if position <= session.get("position", NOT_STARTED):
            return False
        await self._update(sid, partial(apply_request, position=position, request=request))
        return True

    async def save_watermark(self, low: int) -> None:
        """Note in the cursor that every request below `low` is acknowledged."""

        def advance(data: Any) -> None:
            # Two tasks may save at once, in either order: the mark never goes back.
            data["watermark"] = max(data["watermark"], low)

        await self._update(CURSOR_ID, advance)

    async def _update(self, sid: str, change: Callable[[Any], None]) -> None:
        calls = 0

        def counted(data: Any) -> None:
            nonlocal calls
            calls += 1
            change(data)

        await self._state.update_session(sid, counted)
        self.retried += calls - 1
