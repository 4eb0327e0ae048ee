"""Creating sessions at a steady rate, beside requests of other sessions that are in flight."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.arrivals import UPDATED_SHARE, arrivals, work_of_a_request
from benchmarks.contender import Metrics
from benchmarks.engine.opened import DURABILITY, MIB, Engine
from benchmarks.peers.bare import latency_metrics
from benchmarks.tasks import in_tasks

_MESSAGES = 20
_MESSAGE_BYTES = 1000


@dataclass
class SteadyCreation(Engine):
    """`create_session` of 20 KB, which come when they come, whatever the ones before take.

    Meanwhile `IN_FLIGHT` requests of other sessions are under way: each takes about a tenth of a
    second, reads its session, and a tenth of them change it. As many creations as the engine can
    take would measure its throughput: with 100 callers that wait, the median is what 100 of them
    take together.
    """

    resident_count: int
    creation_count: int
    fsync: str = "interval"

    def __post_init__(self) -> None:
        self.durability = DURABILITY[self.fsync]
        if self.fsync != "interval":
            self.name = f"{self.name}, {self.fsync}"

    async def open(self, directory: Path) -> None:
        await self.open_state(directory, memory_bytes=600 * MIB, fsync=self.fsync)
        self._random = random.Random(7)
        self._ids: list[str] = []
        await in_tasks(range(self.resident_count), self._add, 100)
        await self.state.flush()

    async def _add(self, _: int) -> None:
        self._ids.append(await self.state.create_session(data=self._data()))

    def _data(self) -> dict[str, list[str]]:
        half = _MESSAGE_BYTES // 2
        return {"messages": [self._random.randbytes(half).hex() for _ in range(_MESSAGES)]}

    async def measure(self) -> Metrics:
        seconds = await arrivals(self._random, self.creation_count, self._timed, self._request)
        return latency_metrics(seconds)

    async def _timed(self) -> float:
        data = self._data()
        started = time.perf_counter()
        session_id = await self.state.create_session(data=data)
        seconds = time.perf_counter() - started
        await self.state.terminate_session(session_id)  # so that each repetition has as many
        return seconds

    async def _request(self) -> None:
        session_id = self._random.choice(self._ids)
        async with self.state.request(session_id, "GET /"):
            await work_of_a_request(self._random)
            if self._random.random() < UPDATED_SHARE:
                await self.state.update_session_data(session_id, "seen", self._random.random())
            else:
                await self.state.get_session(session_id)
