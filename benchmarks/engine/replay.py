"""The engine under recorded traffic."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from benchmarks import traces
from benchmarks.contender import Metric, Metrics, Stopwatch, check
from benchmarks.engine.opened import DURABILITY, MIB, Engine
from benchmarks.optional import UnavailableError
from benchmarks.peers.store import Step
from benchmarks.sizes import Sizes
from benchmarks.tasks import in_tasks
from benchmarks.traces import Trace


@dataclass
class Replay(Engine):
    """The requests of a trace by tasks, each session's begun when it is first asked for.

    Memory holds about a tenth of what the trace stores.
    """

    trace: Callable[[], Trace]
    memory_bytes: int
    fsync: str = "always"
    task_count: int = 100

    def __post_init__(self) -> None:
        self.name = f"persistence, fsync={self.fsync}"
        self.durability = DURABILITY[self.fsync]
        self.request_tasks = self.task_count

    async def open(self, directory: Path) -> None:
        await self.open_state(directory, memory_bytes=self.memory_bytes, fsync=self.fsync)
        self._trace = self.trace()
        self._steps = self._trace.steps("lag-")
        self._position = self._round = 0

    async def measure(self) -> Metrics:
        self._round += 1
        steps = self._trace.steps(f"{self._round}-")  # sessions of its own each time
        with Stopwatch() as watch:
            await in_tasks(steps, self._step, self.task_count)
        last = await self.state.get_session(steps[-1][0])
        check(last is not None, "a session went missing")
        return watch.rate(len(steps))

    async def request(self) -> None:
        step = self._steps[self._position % len(self._steps)]
        self._position += 1
        await self._step(step)

    async def _step(self, step: Step) -> None:
        session_id, change = step
        if await self.state.get_session(session_id) is None:
            await self.state.get_or_create_session(session_id)
        await self.state.update_session(session_id, change)


@dataclass
class HitRatio(Engine):
    """Which share of the accesses of a trace find their session in memory.

    The budget is what a share of all sessions takes, and is used to the last byte: sessions leave
    one by one, not from 80 % down to 70 %.
    """

    sizes: Sizes
    policy: str
    shares: tuple[float, ...]
    metrics: tuple[Metric, ...]
    fresh_process: bool = True  # it gives the same each time: nothing has to settle

    def __post_init__(self) -> None:
        self.name = f"persistence, {self.policy}"
        self.durability = DURABILITY["never"]

    async def open(self, directory: Path) -> None:
        self._directory = directory
        self._keys = traces.keys(self.sizes)[1]
        self._runs = count()

    async def measure(self) -> Metrics:
        ratios = [await self._ratio(share) for share in self.shares]
        return {metric.name: ratio for metric, ratio in zip(self.metrics, ratios, strict=True)}

    async def _ratio(self, share: float) -> float:
        ids = {key: f"key-{key:010d}" for key in self._keys}
        room = max(1, round(share * len(ids)))
        directory = self._directory / str(next(self._runs))
        directory.mkdir()
        memory = {"policy": self.policy, "spill_threshold": 1.0, "spill_target": 1.0}
        try:
            await self.open_state(directory, memory_bytes=MIB, memory=memory, fsync="never")
        except ValueError as error:
            raise UnavailableError(f"this version has no policy {self.policy!r}") from error
        size_bytes = await self._session_bytes()
        await self.state.close()
        await self.open_state(
            directory, memory_bytes=room * size_bytes, memory=memory, fsync="never"
        )
        before = await self.state.stats()
        with Stopwatch():
            for key in self._keys:
                if await self.state.get_session(ids[key]) is None:
                    await self.state.create_session(session_id=ids[key])
        after = await self.state.stats()
        await self.state.close()
        return 100.0 * int(after.hits - before.hits) / len(self._keys)

    async def _session_bytes(self) -> int:
        """Return what the engine counts for one of these sessions."""
        await self.state.create_session(session_id="key-0000000000")
        used = (await self.state.stats()).memory_used_bytes
        await self.state.terminate_session("key-0000000000")
        return int(used)
