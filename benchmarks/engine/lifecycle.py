"""Sessions that come and go: creation and termination, expiry, listing."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from benchmarks import payloads
from benchmarks.contender import PROCESS_CRASH, Metrics, Stopwatch, check
from benchmarks.engine.opened import Engine, fill
from benchmarks.tasks import TASK_COUNT, in_tasks

_TTL_SECONDS = 3600.0  # the default; no session is renewed meanwhile


@dataclass
class Churn(Engine):
    """Create sessions and terminate them, on top of `session_count` that stay."""

    session_count: int
    churned_count: int
    request_tasks: int = TASK_COUNT

    async def open(self, directory: Path) -> None:
        await self.open_state(directory)
        await fill(self.state, self.session_count)
        self._next = count(self.session_count)

    async def measure(self) -> Metrics:
        indexes = [next(self._next) for _ in range(self.churned_count)]
        with Stopwatch() as watch:
            await in_tasks(indexes, self._create)
            await in_tasks(indexes, self._terminate)
        gone = not await self.state.has_session(payloads.session_id(indexes[0]))
        check(gone, "a terminated session came back")
        return watch.rate(len(indexes))

    async def request(self) -> None:
        index = next(self._next)
        await self._create(index)
        await self._terminate(index)

    async def _create(self, index: int) -> None:
        session_id = payloads.session_id(index)
        await self.state.create_session(session_id=session_id, data=payloads.session(index))

    async def _terminate(self, index: int) -> None:
        await self.state.terminate_session(payloads.session_id(index))


class _ForwardClock:
    """The machine's clocks, which can be put forward. They go on: the engine works by them."""

    def __init__(self) -> None:
        self.forward_seconds = 0.0

    def wall(self) -> float:
        return time.time() + self.forward_seconds

    def monotonic(self) -> float:
        return time.monotonic() + self.forward_seconds


@dataclass
class Expiry(Engine):
    """All sessions are over at the same moment: `cleanup_expired()`. The log is not synced."""

    session_count: int
    fresh_process: bool = True
    durability: str = PROCESS_CRASH

    async def open(self, directory: Path) -> None:
        self._clock = _ForwardClock()
        await self.open_state(directory, clock=self._clock, fsync="never")
        await fill(self.state, self.session_count)

    async def measure(self) -> Metrics:
        self._clock.forward_seconds += _TTL_SECONDS + 1
        with Stopwatch() as watch:
            removed = await self.state.cleanup_expired()
        check(removed == self.session_count, f"{removed} sessions were removed")
        return watch.rate(removed)


@dataclass
class Scan(Engine):
    """`async for session_id in iter_sessions()`."""

    session_count: int
    durability: str = PROCESS_CRASH

    async def open(self, directory: Path) -> None:
        await self.open_state(directory, fsync="never")
        await fill(self.state, self.session_count)

    async def measure(self) -> Metrics:
        found = 0
        with Stopwatch() as watch:
            async for _ in self.state.iter_sessions():
                found += 1
        check(found == self.session_count, f"{found} sessions were listed")
        return watch.rate(found)
