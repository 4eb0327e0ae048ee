"""The event loop's lag while the engine does everything at once."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks import lag, payloads
from benchmarks.contender import Metric, Metrics, Stopwatch, check
from benchmarks.engine.opened import MIB, Engine
from benchmarks.tasks import in_tasks

METRICS = (
    *lag.METRICS,
    Metric("accesses", "/s", higher_is_better=True),
    Metric("spills", "/s", higher_is_better=True),
    Metric("restores", "/s", higher_is_better=True),
    Metric("compactions", "", higher_is_better=True),
)

_LARGEST_BYTES = 64 * 1024
_ENOUGH_SAMPLES = 2000  # about two seconds: a segment is sealed and compacted well within them


@dataclass
class BusyLoop(Engine):
    """Sample the lag while tasks update and read random sessions as fast as the engine allows.

    Memory holds a tenth of the data, so that most accesses restore and spill; segments are small
    and most updates make garbage, so that compaction runs. Values are documents up to 64 KiB.
    """

    sample_count: int
    session_count: int
    memory_bytes: int
    task_count: int = 32
    segment_bytes: int = MIB

    async def open(self, directory: Path) -> None:
        await self.open_state(
            directory, memory_bytes=self.memory_bytes, segment_bytes=self.segment_bytes
        )
        self._values = [_value(index) for index in range(1000)]
        await in_tasks(range(self.session_count), self._create, 100)

    async def _create(self, index: int) -> None:
        value = self._values[index % len(self._values)]
        await self.state.create_session(
            session_id=payloads.session_id(index), data={"document": value, "visits": 0}
        )

    async def measure(self) -> Metrics:
        self._stop = False
        self._operations = count()
        load = [asyncio.create_task(self._load(seed)) for seed in range(self.task_count)]
        before = await self.state.stats()
        with Stopwatch() as watch:
            metrics = lag.lag_metrics(await lag.sample_lag(self.sample_count))
        after = await self.state.stats()
        self._stop = True
        await asyncio.gather(*load)
        counts = {
            "accesses": next(self._operations) / watch.seconds,
            "spills": (after.spilled - before.spilled) / watch.seconds,
            "restores": (after.restored - before.restored) / watch.seconds,
            "compactions": float(after.disk.compactions - before.disk.compactions),
        }
        if self.sample_count >= _ENOUGH_SAMPLES:
            check(all(counts.values()), f"not everything was going on: {counts}")
        return metrics | counts

    async def _load(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self._stop:
            await asyncio.sleep(0)  # a request arrives through the loop, in its turn
            next(self._operations)
            await self._act(
                chance.random(), payloads.session_id(chance.randrange(self.session_count))
            )

    async def _act(self, chance: float, session_id: str) -> None:
        if chance < 0.25:
            value = self._values[int(chance * 4 * len(self._values))]
            await self.state.update_session_data(session_id, "document", value)
        elif chance < 0.5:
            await self.state.update_session(session_id, _count_visit)
        elif chance < 0.55:
            await self.state.spill_session(session_id)
        else:
            session = await self.state.get_session(session_id)
            check(session is not None and session["visits"] >= 0, "a session went missing")


def _count_visit(data: Any) -> None:
    data["visits"] += 1


def _value(index: int) -> payloads.Data:
    """A document; every fiftieth is 64 KiB, half of it incompressible."""
    if index % 50:
        return payloads.document(index)
    half = _LARGEST_BYTES // 2
    return {"photo": random.Random(index).randbytes(half), "text": "lorem ipsum " * (half // 12)}
