"""Pushing sessions out of memory.

The public names create sessions through the log, so what is not in it yet can only be made with
the engine's seam for take-overs, `Residency.adopt`; the spill is what a crossed budget starts.
"""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import payloads
from benchmarks.contender import Metrics, Stopwatch, check
from benchmarks.engine.opened import MIB, Engine, every, fill, opened

_RECORD_COUNT = 1000
_TTL_SECONDS = 3600.0


@dataclass
class Spill(Engine):
    """Spill everything; it is synced when the measurement ends.

    Attributes:
        logged: True when the sessions are in the log already, so that they leave for free.
    """

    session_count: int
    logged: bool = False

    def __post_init__(self) -> None:
        self.name = "persistence, already in the log" if self.logged else "persistence"

    async def open(self, directory: Path) -> None:
        self._records = await _records(directory)
        memory_bytes = max(100 * MIB, self.session_count * 2000)
        await self.open_state(directory, memory_bytes=memory_bytes)
        self._first = 0

    async def measure(self) -> Metrics:
        if not self.logged or not self._first:
            self._ids = [payloads.session_id(self._first + n) for n in range(self.session_count)]
            self._first += self.session_count
            await self._adopt()
        if self.logged:
            await self._spill()
            for session_id in self._ids:
                await self.state.restore_session(session_id)
        with Stopwatch() as watch:
            await self._spill()
            await self.state.flush()  # else some would still be on their way into the log
        stats = await self.state.stats()
        check(stats.in_memory == 0, f"{stats.in_memory} sessions are still in memory")
        check(await self._samples_are_right(), "a spilled session came back changed")
        await self._spill()
        return watch.rate(self.session_count)

    async def _adopt(self) -> None:
        residency, now = self.state._residency, self.state._time.now()
        for number, session_id in enumerate(self._ids):
            record = self._records[number % _RECORD_COUNT]
            await residency.adopt(session_id, record, now, _TTL_SECONDS)

    async def _spill(self) -> None:
        await self.state._residency.spill_to(0)

    async def _samples_are_right(self) -> bool:
        for number in every(self.session_count, 100):
            session = await self.state.get_session(self._ids[number])
            if dict(session.data) != payloads.session(number % _RECORD_COUNT):
                return False
        return True


async def _records(directory: Path) -> list[Any]:
    """Return the packed records of the first sessions, as another worker would hand them over."""
    elsewhere = directory / "elsewhere"
    async with opened(elsewhere, fsync="never") as state:
        await fill(state, _RECORD_COUNT)
        ids = map(payloads.session_id, range(_RECORD_COUNT))
        return [state._memory.peek(session_id) for session_id in ids]
