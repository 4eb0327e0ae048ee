"""Opening a large directory, after everything that may have happened to it.

All rows share one directory: each repetition closes it cleanly again, and what it took away
(hints, index snapshot) is put back, so that the next one finds the same.
"""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import asyncio
import multiprocessing
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import payloads
from benchmarks.contender import Metrics, Stopwatch, WrongResultError, check
from benchmarks.engine.opened import DURABILITY, Engine, every, fill, opened, wrong_sessions
from benchmarks.resident import rss_bytes
from benchmarks.tasks import in_tasks

INDEX_SNAPSHOT = "INDEX*"
HINTS = "*.hint"

_SAMPLE_COUNT = 1000


@dataclass
class Build(Engine):
    """Creates the sessions, without fsync, and closes cleanly. Not measured."""

    session_count: int
    name: str = "build"
    durability: str = DURABILITY["never"]

    async def open(self, directory: Path) -> None:
        await self.open_state(directory, fsync="never")

    async def measure(self) -> Metrics:
        await fill(self.state, self.session_count)
        return {}


@dataclass
class Opening(Engine):
    """Open the directory, then check samples; what is measured is the opening alone.

    Attributes:
        occasion: what happened before; the row's name.
        removed: patterns of the cache files that are missing at the opening.
        killed: True when the previous owner updated sessions and then died by SIGKILL.
    """

    occasion: str
    session_count: int
    removed: tuple[str, ...] = ()
    killed: bool = False
    fresh_process: bool = True

    def __post_init__(self) -> None:
        self.name = self.occasion
        self._hidden: list[Path] = []

    async def open(self, directory: Path) -> None:
        self._directory = directory
        async with opened(directory / "empty"):
            pass  # else importing the engine would count as opening, in time and in memory
        self._token: str | None = None
        if self.killed:
            self._token = await _update_and_die(directory, self.session_count)
        self._hidden = _hide(directory, self.removed)

    async def measure(self) -> Metrics:
        before_bytes = rss_bytes()
        with Stopwatch() as watch:
            await self.open_state(self._directory)
        grown_bytes = rss_bytes() - before_bytes
        await self._verify()
        return {"seconds": watch.seconds, "rss": grown_bytes / self.session_count}

    async def _verify(self) -> None:
        marked_count = len(_marked_ids(self.session_count))
        sampled = every(self.session_count, _SAMPLE_COUNT)
        untouched = [index for index in sampled if index >= marked_count]
        check(not await wrong_sessions(self.state, untouched), "sessions are not as created")
        if self._token is not None:
            check(await self._all_marked(self._token), "an acknowledged update did not survive")

    async def _all_marked(self, token: str) -> bool:
        ids = _marked_ids(self.session_count)
        sessions = [await self.state.get_session(each) for each in ids]
        return all(session is not None and session.get("mark") == token for session in sessions)

    async def close(self) -> None:
        await super().close()
        _put_back(self._hidden)


def _marked_ids(session_count: int) -> list[str]:
    """The sessions that the killed owner updates: the first ones. All others stay as built."""
    return [payloads.session_id(index) for index in range(min(1000, session_count // 10))]


async def _update_and_die(directory: Path, session_count: int) -> str:
    """Let another process open the directory, mark sessions, and die while it writes on.

    Returns the mark, which was acknowledged for every one of `_marked_ids`.
    """
    token, ids = uuid.uuid4().hex, _marked_ids(session_count)
    context = multiprocessing.get_context("spawn")
    pipe, remote = context.Pipe()
    process = context.Process(target=_mark_until_killed, args=(remote, directory, token, ids))
    process.start()
    remote.close()
    try:
        await asyncio.to_thread(pipe.recv)
    except EOFError:
        raise WrongResultError("the previous owner ended before it was killed") from None
    finally:
        process.kill()
        await asyncio.to_thread(process.join)
    return token


def _mark_until_killed(pipe: Connection, directory: Path, token: str, ids: list[str]) -> None:
    asyncio.run(_mark(pipe, directory, token, ids))


async def _mark(pipe: Connection, directory: Path, token: str, ids: list[str]) -> None:
    async with opened(directory) as state:
        await in_tasks(ids, _setter(state, "mark", token))
        pipe.send("all are acknowledged")
        count = 0
        while True:
            count += 1
            await in_tasks(ids, _setter(state, "count", count))


def _setter(state: Any, field: str, value: object) -> Callable[[str], Awaitable[object]]:
    async def put(session_id: str) -> None:
        await state.update_session_data(session_id, field, value)

    return put


def _hide(directory: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Move the caches that match aside; returns where they belong."""
    found = [path for pattern in patterns for path in (directory / "engine").glob(pattern)]
    aside = directory / "hidden"
    aside.mkdir(exist_ok=True)
    for path in found:
        path.rename(aside / path.name)
    return found


def _put_back(hidden: list[Path]) -> None:
    """Undo `_hide`, but for what the engine has written anew or no longer needs."""
    for path in hidden:
        copy = path.parent.parent / "hidden" / path.name
        segment = path.with_suffix(".seg")
        if path.exists() or (path.suffix == ".hint" and not segment.exists()):
            copy.unlink()
        else:
            copy.rename(path)
