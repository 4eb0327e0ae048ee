"""Reading sessions that are on disk, and working sets larger than memory."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from benchmarks import payloads
from benchmarks.access import Accesses
from benchmarks.amplification import amplification, occupied_bytes, written_bytes
from benchmarks.contender import ENGINE, Metrics, Stopwatch, check
from benchmarks.engine.opened import DURABILITY, Engine, fill, wrong_sessions
from benchmarks.pagecache import drop, warm
from benchmarks.tasks import in_tasks

RESTORE_ALONE = "persistence, restore alone"


@dataclass
class ColdRestore(Engine):
    """`(await get_session(id))["prefs"]` of random sessions, nearly none of them in memory.

    Attributes:
        alone: the session is restored, and no field of it is read.
        dropped: the page cache is dropped before each repetition, not warmed.
    """

    accesses: Accesses
    memory_bytes: int
    alone: bool = False
    dropped: bool = False
    request_tasks: int = 32

    def __post_init__(self) -> None:
        self.name = RESTORE_ALONE if self.alone else ENGINE

    async def open(self, directory: Path) -> None:
        await self.open_state(directory, memory_bytes=self.memory_bytes)
        await fill(self.state, self.accesses.session_count)
        self._directory = directory
        self._seed = 0
        self._random = random.Random(2)

    async def request(self) -> None:
        index = self._random.randrange(self.accesses.session_count)
        (await self.state.get_session(payloads.session_id(index)))["prefs"]

    async def measure(self) -> Metrics:
        (drop if self.dropped else warm)(self._directory)
        self._seed += 1
        indexes = self.accesses.indexes(self._seed)
        ids = [payloads.session_id(index) for index in indexes]
        with Stopwatch() as watch:
            await (self._restore(ids) if self.alone else self._read(ids))
        check(not await wrong_sessions(self.state, indexes[:100]), "a session came back changed")
        return watch.rate(len(ids))

    async def _restore(self, ids: list[str]) -> None:
        get_session = self.state.get_session
        for session_id in ids:
            await get_session(session_id)

    async def _read(self, ids: list[str]) -> None:
        get_session = self.state.get_session
        for session_id in ids:
            (await get_session(session_id))["prefs"]


@dataclass
class Mixed(Engine):
    """Reads of one field, and updates that are waited for, of Zipf-popular sessions, by tasks."""

    accesses: Accesses
    memory_bytes: int
    fsync: str
    segment_bytes: int
    task_count: int = 100

    def __post_init__(self) -> None:
        self.name = f"persistence, fsync={self.fsync}"
        self.durability = DURABILITY[self.fsync]
        self.request_tasks = self.task_count

    async def open(self, directory: Path) -> None:
        self._directory = directory
        await self.open_state(
            directory,
            memory_bytes=self.memory_bytes,
            fsync=self.fsync,
            segment_bytes=self.segment_bytes,
        )
        await fill(self.state, self.accesses.session_count)
        self._seed = self._updates = 0
        self._random = random.Random(2)
        self._written_before = written_bytes()

    async def measure(self) -> Metrics:
        self._seed += 1
        accesses = [
            (payloads.session_id(index), update) for index, update in self.accesses.draw(self._seed)
        ]
        with Stopwatch() as watch:
            await in_tasks(accesses, self._access, self.task_count)
        self._updates += sum(update for _, update in accesses)
        return watch.rate(len(accesses)) | amplification(
            written_bytes() - self._written_before,
            self._updates * payloads.SESSION_BYTES,
            occupied_bytes(self._directory),
            self.accesses.session_count * payloads.SESSION_BYTES,
        )

    async def request(self) -> None:
        index = self._random.randrange(self.accesses.session_count)
        update = self._random.random() < self.accesses.update_share
        await self._access((payloads.session_id(index), update))

    async def _access(self, access: tuple[str, bool]) -> None:
        session_id, update = access
        if update:
            await self.state.update_session(session_id, payloads.count_visit)
        else:
            (await self.state.get_session(session_id))["prefs"]
