"""zict: the LRU and spilling mappings under dask.distributed. Synchronous, no crash safety."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import random
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import payloads
from benchmarks.access import Accesses
from benchmarks.contender import Contender, Metrics, Stopwatch, check
from benchmarks.optional import load
from benchmarks.pagecache import drop, warm
from benchmarks.payloads import Data
from benchmarks.peers.mapping import MappingRead
from benchmarks.peers.store import MappingStore

LRU_OF_BYTES = "zict.LRU of packed bytes"
GET_ALONE = "zict.LRU, get alone"
BUFFER_OVER_FILE = "zict.Buffer over File"


@dataclass
class Lru(MappingRead):
    """`zict.LRU`, large enough for all sessions."""

    def __post_init__(self) -> None:
        self.name = LRU_OF_BYTES if self.packed else "zict.LRU of live dicts"

    def make(self) -> MutableMapping[str, Any]:
        lru: MutableMapping[str, Any] = load("zict").LRU(self.session_count, {})
        return lru


@dataclass
class GetAlone(Lru):
    """Only the get: what it costs to read a field of it is told as a share of that."""

    is_limit: bool = True

    def __post_init__(self) -> None:
        self.name = GET_ALONE


@dataclass
class BufferOverFile(Contender):
    """`Buffer(fast={}, slow=Func(pack, unpack, File(dir)), n)`: live dicts, files when full.

    Attributes:
        resident_count: how many sessions fit in `fast`.
        with_room: True empties `fast` before each repetition, so that a restore pushes nobody
            out. False is the steady state of a full memory: each restore also writes a file.
        dropped: the page cache is dropped before each repetition, not warmed.
    """

    accesses: Accesses
    resident_count: int
    with_room: bool = False
    dropped: bool = False
    request_tasks: int = 32

    def __post_init__(self) -> None:
        self.name = BUFFER_OVER_FILE + (", memory empty" if self.with_room else "")

    async def open(self, directory: Path) -> None:
        zict, msgpack = load("zict"), load("msgpack")
        slow = zict.Func(msgpack.packb, msgpack.unpackb, zict.File(directory))
        self._buffer = zict.Buffer({}, slow, n=self.resident_count)
        for index in range(self.accesses.session_count):
            self._buffer[payloads.session_id(index)] = payloads.session(index)
        self._directory = directory
        self._seed = 0
        self._random = random.Random(2)

    async def request(self) -> None:
        key = payloads.session_id(self._random.randrange(self.accesses.session_count))
        data = self._buffer[key]
        if self._random.random() < self.accesses.update_share:
            data["prefs"]["visits"] += 1
            self._buffer[key] = data
        else:
            data["prefs"]

    async def measure(self) -> Metrics:
        keys = self._next_keys()
        (drop if self.dropped else warm)(self._directory)
        buffer = self._buffer
        with Stopwatch() as watch:
            for key, update in keys:
                data = buffer[key]
                if update:
                    data["prefs"]["visits"] += 1
                    buffer[key] = data
                else:
                    data["prefs"]
        check(len(buffer) == self.accesses.session_count, "sessions went missing")
        return watch.rate(len(keys))

    def _next_keys(self) -> list[tuple[str, bool]]:
        self._seed += 1
        drawn = self.accesses.draw(self._seed)
        if self.with_room:
            self._buffer.evict_until_below_target(0)
            drawn = list(dict(drawn).items())  # each session once: the second time it is hot
        return [(payloads.session_id(index), update) for index, update in drawn]


@dataclass
class BufferSpill(Contender):
    """Push sessions out of `fast` that have no file yet."""

    session_count: int
    name: str = BUFFER_OVER_FILE

    async def open(self, directory: Path) -> None:
        zict, msgpack = load("zict"), load("msgpack")
        slow = zict.Func(msgpack.packb, msgpack.unpackb, zict.File(directory))
        self._buffer = zict.Buffer({}, slow, n=self.session_count + 1)

    async def measure(self) -> Metrics:
        self._buffer.clear()
        for index in range(self.session_count):
            self._buffer[payloads.session_id(index)] = payloads.session(index)
        with Stopwatch() as watch:
            self._buffer.evict_until_below_target(0)
        check(not self._buffer.fast, "sessions are still in memory")
        return watch.rate(self.session_count)


@dataclass
class Buffer(MappingStore):
    """`Buffer` over `File` as a store; `resident_count` live dicts, the rest in files."""

    resident_count: int
    name: str = BUFFER_OVER_FILE

    def connect(self, directory: Path) -> None:
        """See `SyncStore`."""
        zict = load("zict")
        slow = zict.Func(self._pack, self._unpack, zict.File(directory))
        self.mapping: MutableMapping[str, Data] = zict.Buffer({}, slow, n=self.resident_count)
