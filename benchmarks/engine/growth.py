"""All that depends on the number of sessions, at one number of them."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import random
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path

from benchmarks import payloads
from benchmarks.amplification import WRITTEN, occupied_bytes, written_bytes
from benchmarks.contender import ENGINE, Metric, Metrics, Stopwatch, check
from benchmarks.engine.opened import DURABILITY, Engine, every, fill, wrong_sessions
from benchmarks.grown import Taken, growth_metrics
from benchmarks.resident import rss_bytes
from benchmarks.tasks import in_tasks

OPEN = Metric("open", " s")
RATES = tuple(
    Metric(name, "/s", higher_is_better=True) for name in ("create", "update", "restore", "scan")
)
METRICS = (*RATES, OPEN, Metric("rss", " B/session"), *((WRITTEN, Metric("occupied", " ×"))))

_MEMORY_SHARE = 10  # memory holds a tenth of the sessions
_SESSION_RSS_BYTES = 1000


@dataclass
class _AtOneSize(Engine):
    """A measurement at one number of sessions, in a process of its own."""

    session_count: int
    operation_count: int = 0
    fresh_process: bool = True
    series: str = ENGINE
    durability: str = DURABILITY["never"]

    def __post_init__(self) -> None:
        self.name = f"{self.series}, {self.session_count:,}"
        self.size = float(self.session_count)

    async def open(self, directory: Path) -> None:
        self._directory = directory
        await self._open()

    @property
    @abstractmethod
    def _memory_bytes(self) -> int:
        """The budget."""

    async def _open(self) -> None:
        await self.open_state(self._directory, memory_bytes=self._memory_bytes, fsync="never")


@dataclass
class Growth(_AtOneSize):
    """Create sessions, update and read random ones, list them, close, and open again.

    Not synced, so that the disk does not set the pace; memory holds a tenth of the sessions, so
    that nearly every access goes to the log.
    """

    @property
    def _memory_bytes(self) -> int:
        return self.session_count * _SESSION_RSS_BYTES // _MEMORY_SHARE

    async def measure(self) -> Metrics:
        before_bytes, chance = rss_bytes(), random.Random(2)
        with Stopwatch() as creating:
            await fill(self.state, self.session_count)
        grown = (rss_bytes() - before_bytes) / self.session_count
        drawn = chance.choices(range(self.session_count), k=self.operation_count)
        ids = [payloads.session_id(index) for index in drawn]
        with Stopwatch() as restoring:
            await self._read(ids)
        with Stopwatch() as updating:
            await in_tasks(ids, self._update)
        written = written_bytes()
        with Stopwatch() as scanning:
            found = [each async for each in self.state.iter_sessions()]
        check(len(found) == self.session_count, f"{len(found)} sessions were listed")
        await self.state.close()
        with Stopwatch() as opening:
            await self._open()
        touched = set(drawn)
        sampled = [each for each in every(self.session_count, 100) if each not in touched]
        check(not await wrong_sessions(self.state, sampled), "sessions are not as created")
        return growth_metrics(
            self.session_count,
            len(ids),
            Taken(
                creating.seconds,
                updating.seconds,
                restoring.seconds,
                scanning.seconds,
                opening.seconds,
            ),
            rss_bytes=grown,
            written_bytes=written,
            occupied_bytes=occupied_bytes(self._directory),
        )

    async def _read(self, ids: list[str]) -> None:
        get_session = self.state.get_session
        for session_id in ids:
            (await get_session(session_id))["prefs"]

    async def _update(self, session_id: str) -> None:
        await self.state.update_session(session_id, payloads.count_visit)


@dataclass
class IndexGrowth(_AtOneSize):
    """Only the index: many sessions of a few bytes, on disk, what they cost, and opening them."""

    @property
    def _memory_bytes(self) -> int:
        return 1

    async def measure(self) -> Metrics:
        before_bytes = rss_bytes()
        with Stopwatch() as creating:
            await in_tasks(range(self.session_count), self._create, 64)
        grown = (rss_bytes() - before_bytes) / self.session_count
        await self.state.close()
        with Stopwatch() as opening:
            await self._open()
        last = await self.state.get_session(payloads.session_id(self.session_count - 1))
        check(last is not None and last["n"] == self.session_count - 1, "a session went missing")
        return {
            "create": self.session_count / creating.seconds,
            "open": opening.seconds,
            "rss": grown,
        }

    async def _create(self, index: int) -> None:
        session_id = payloads.session_id(index)
        await self.state.create_session(session_id=session_id, data={"n": index})
