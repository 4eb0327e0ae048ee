"""Sessions in Redis: updates agreed with it, checkpoints shipped to it."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from benchmarks import payloads
from benchmarks.contender import Metrics, Stopwatch, check
from benchmarks.engine.opened import TASK_COUNT, Engine, fill, in_tasks
from benchmarks.redis_server import RedisServer

THROUGH = "persistence, redis.write=through"


@dataclass
class ThroughUpdate(Engine):
    """`update_session(id, count_visit)` of random sessions by 1,000 tasks, agreed with Redis."""

    session_count: int
    update_count: int
    name: str = THROUGH

    async def open(self, directory: Path) -> None:
        self._server = RedisServer()
        self._server.start()
        await self.open_state(directory, url=self._server.url)
        await fill(self.state, self.session_count)
        self._random = random.Random(2)

    async def measure(self) -> Metrics:
        indexes = self._random.choices(range(self.session_count), k=self.update_count)
        ids = [payloads.session_id(index) for index in indexes]
        with Stopwatch() as watch:
            await in_tasks(ids, self._update, TASK_COUNT)
        check((await self.state.stats()).sharing.undelivered == 0, "Redis has not all of it")
        return watch.rate(len(ids))

    async def _update(self, session_id: str) -> None:
        await self.state.update_session(session_id, payloads.count_visit)

    async def close(self) -> None:
        await super().close()
        self._server.close()


@dataclass
class FullCheckpoint(Engine):
    """`create_checkpoint()` of all sessions to Redis; the one before is deleted each time."""

    session_count: int

    async def open(self, directory: Path) -> None:
        self._server = RedisServer()
        self._server.start()
        await self.open_state(directory, url=self._server.url, write="checkpoint")
        await fill(self.state, self.session_count)

    async def measure(self) -> Metrics:
        with Stopwatch() as watch:
            info = await self.state.create_checkpoint("benchmark")
        check(info.kind == "full" and info.sessions == self.session_count, "not all was shipped")
        await self.state.delete_checkpoint(info.id)  # so that the next one is full as well
        return watch.rate(self.session_count)

    async def close(self) -> None:
        await super().close()
        self._server.close()
