"""Workers that share sessions through Redis."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import payloads
from benchmarks.contender import ASYNCIO, SYNCED
from benchmarks.engine.opened import fill, opened
from benchmarks.fleet import Member, RedisFleetUpdate
from benchmarks.tasks import in_tasks

SHARED = "persistence, redis.write=through, AOF always"

_TASKS = 100


class Worker(Member):
    """A process with a manager and a directory of its own."""

    def __init__(self) -> None:
        self.url = ""

    async def open(self, directory: Path, number: int, session_count: int) -> None:
        own = directory / f"worker-{number}"
        own.mkdir()
        self._opened = opened(own, url=self.url)
        self._state: Any = await self._opened.__aenter__()
        if number == 0:
            await fill(self._state, session_count)

    async def update(self, keys: list[str]) -> None:
        await in_tasks(keys, self._update, _TASKS)

    async def _update(self, key: str) -> None:
        await self._state.update_session(key, payloads.count_visit)

    async def visits(self, keys: list[str]) -> int:
        found = [await self._state.get_session(key, fresh=True) for key in keys]
        return sum(session["prefs"]["visits"] for session in found)

    async def close(self) -> None:
        await self._opened.__aexit__(None, None, None)


class Workers(RedisFleetUpdate):
    """The processes, and the Redis between them."""

    name = SHARED
    durability = SYNCED
    called = ASYNCIO
    ours = True

    def __init__(self, session_count: int, update_count: int, process_count: int) -> None:
        self._worker = Worker()
        super().__init__(self._worker, session_count, update_count, process_count)

    def take_url(self, url: str) -> None:
        self._worker.url = url
