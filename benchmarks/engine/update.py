"""Durable updates: by many tasks at once, and by one alone."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import payloads
from benchmarks.contender import Metrics, Stopwatch, check
from benchmarks.engine.opened import DURABILITY, MIB, Engine, fill
from benchmarks.peers.bare import latency_metrics
from benchmarks.tasks import TASK_COUNT, in_tasks


@dataclass
class ConcurrentUpdate(Engine):
    """`update_session(id, count_visit)` of random sessions by `task_count` tasks."""

    session_count: int
    update_count: int
    task_count: int = TASK_COUNT
    fsync: str = "always"

    def __post_init__(self) -> None:
        self.durability = DURABILITY[self.fsync]
        self.request_tasks = self.task_count

    async def open(self, directory: Path) -> None:
        await self.open_state(directory, fsync=self.fsync)
        await fill(self.state, self.session_count)
        self._random = random.Random(2)
        self._visit_count = await self._count_visits()

    async def measure(self) -> Metrics:
        indexes = self._random.choices(range(self.session_count), k=self.update_count)
        ids = [payloads.session_id(index) for index in indexes]
        with Stopwatch() as watch:
            await in_tasks(ids, self._update, self.task_count)
        self._visit_count += len(ids)
        check(await self._count_visits() == self._visit_count, "updates were lost or doubled")
        return watch.rate(len(ids))

    async def _update(self, session_id: str) -> None:
        await self.state.update_session(session_id, payloads.count_visit)

    async def request(self) -> None:
        await self._update(payloads.session_id(self._random.randrange(self.session_count)))

    async def _count_visits(self) -> int:
        get_session = self.state.get_session
        ids = map(payloads.session_id, range(self.session_count))
        return sum([(await get_session(each))["prefs"]["visits"] for each in ids])


@dataclass
class LoneUpdate(Engine):
    """`update_session(id, count_visit)` one after the other, each waited for, each synced."""

    update_count: int
    session_count: int = 1000
    request_tasks: int = 1

    async def open(self, directory: Path) -> None:
        await self.open_state(directory, memory_bytes=100 * MIB)
        await fill(self.state, self.session_count)
        self._next = 0

    async def measure(self) -> Metrics:
        return latency_metrics([await self._update() for _ in range(self.update_count)])

    async def request(self) -> None:
        await self._update()

    async def _update(self) -> float:
        self._next = (self._next + 1) % self.session_count
        session_id = payloads.session_id(self._next)
        start = time.perf_counter()
        await self.state.update_session(session_id, payloads.count_visit)
        return time.perf_counter() - start


@dataclass
class LargeUpdate(Engine):
    """`update_session_data(id, "step", n)` of sessions of 40 KB; or all of them anew."""

    session_count: int
    update_count: int
    is_whole: bool = False
    task_count: int = 100

    def __post_init__(self) -> None:
        self.request_tasks = self.task_count
        if self.is_whole:
            self.name = f"{self.name} (replace_session)"

    async def open(self, directory: Path) -> None:
        await self.open_state(directory, memory_bytes=1024 * MIB)
        for index in range(self.session_count):
            await self.state.create_session(
                session_id=payloads.session_id(index), data=payloads.large_session(index)
            )
        self._random = random.Random(2)
        self._step = 0

    async def measure(self) -> Metrics:
        indexes = self._random.choices(range(self.session_count), k=self.update_count)
        with Stopwatch() as watch:
            await in_tasks(indexes, self._update, self.task_count)
        session = await self.state.get_session(payloads.session_id(indexes[-1]))
        check(session is not None and session["step"] > 0, "an update was lost")
        return watch.rate(len(indexes))

    async def request(self) -> None:
        await self._update(self._random.randrange(self.session_count))

    async def _update(self, index: int) -> None:
        self._step += 1
        session_id = payloads.session_id(index)
        if self.is_whole:
            data = {**payloads.large_session(index), "step": self._step}
            await self.state.replace_session(session_id, data)
        else:
            await self.state.update_session_data(session_id, "step", self._step)
