"""Reading sessions that are on disk, and working sets larger than memory."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks import payloads
from benchmarks.access import Accesses
from benchmarks.contender import Metrics, Stopwatch, check
from benchmarks.engine.opened import DURABILITY, Engine, fill, in_tasks, wrong_sessions
from benchmarks.pagecache import warm


@dataclass
class ColdRestore(Engine):
    """`(await get_session(id))["prefs"]` of random sessions, nearly none of them in memory."""

    accesses: Accesses
    memory_bytes: int

    async def open(self, directory: Path) -> None:
        await self.open_state(directory, memory_bytes=self.memory_bytes)
        await fill(self.state, self.accesses.session_count)
        self._directory = directory
        self._seed = 0

    async def measure(self) -> Metrics:
        warm(self._directory)
        self._seed += 1
        indexes = self.accesses.indexes(self._seed)
        ids = [payloads.session_id(index) for index in indexes]
        get_session = self.state.get_session
        with Stopwatch() as watch:
            for session_id in ids:
                (await get_session(session_id))["prefs"]
        check(not await wrong_sessions(self.state, indexes[:100]), "a session came back changed")
        return watch.rate(len(ids))


@dataclass
class Mixed(Engine):
    """Reads of one field, and updates that are waited for, of Zipf-popular sessions, by tasks."""

    accesses: Accesses
    memory_bytes: int
    fsync: str
    task_count: int = 100

    def __post_init__(self) -> None:
        self.name = f"persistence, fsync={self.fsync}"
        self.durability = DURABILITY[self.fsync]

    async def open(self, directory: Path) -> None:
        await self.open_state(directory, memory_bytes=self.memory_bytes, fsync=self.fsync)
        await fill(self.state, self.accesses.session_count)
        self._seed = 0

    async def measure(self) -> Metrics:
        self._seed += 1
        accesses = [
            (payloads.session_id(index), update) for index, update in self.accesses.draw(self._seed)
        ]
        with Stopwatch() as watch:
            await in_tasks(accesses, self._access, self.task_count)
        return watch.rate(len(accesses))

    async def _access(self, access: tuple[str, bool]) -> None:
        session_id, update = access
        if update:
            await self.state.update_session(session_id, payloads.count_visit)
        else:
            (await self.state.get_session(session_id))["prefs"]
