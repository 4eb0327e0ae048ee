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
from benchmarks.pagecache import warm

LRU_OF_BYTES = "zict.LRU of packed bytes"
BUFFER_OVER_FILE = "zict.Buffer over File"


@dataclass
class Lru(Contender):
    """`lru[key]` for every key, shuffled; then whatever `read` says about the value.

    Attributes:
        read: "get" stops there, "field" reads one small field, "whole" every field.
        packed: True when the LRU holds MessagePack that each reader decodes (every reader gets
            objects of his own, as with the engine); False when it holds the live objects, which
            all readers then share.
    """

    read: str
    packed: bool
    session_count: int
    read_count: int

    def __post_init__(self) -> None:
        self.name = LRU_OF_BYTES if self.packed else "zict.LRU of live dicts"

    async def open(self, directory: Path) -> None:
        msgpack = load("msgpack")
        self._unpack = msgpack.unpackb
        self._lru = load("zict").LRU(self.session_count, {})
        for index in range(self.session_count):
            data = payloads.session(index)
            self._lru[payloads.session_id(index)] = msgpack.packb(data) if self.packed else data
        self._keys = list(self._lru)
        random.Random(1).shuffle(self._keys)

    async def measure(self) -> Metrics:
        rounds = max(1, self.read_count // self.session_count)
        loop = {
            ("get", False): _get,
            ("get", True): _get,
            ("field", False): _get_field,
            ("field", True): self._unpack_field,
            ("whole", False): _get_whole,
            ("whole", True): self._unpack_whole,
        }[self.read, self.packed]
        loop(self._lru, self._keys)  # as for the engine: back into the CPU's caches
        with Stopwatch() as watch:
            for _ in range(rounds):
                loop(self._lru, self._keys)
        return watch.rate(rounds * len(self._keys))

    def _unpack_field(self, lru: MutableMapping[str, bytes], keys: list[str]) -> None:
        unpack = self._unpack
        for key in keys:
            unpack(lru[key])["prefs"]

    def _unpack_whole(self, lru: MutableMapping[str, bytes], keys: list[str]) -> None:
        unpack = self._unpack
        for key in keys:
            unpack(lru[key])


def _get(lru: MutableMapping[str, Any], keys: list[str]) -> None:
    for key in keys:
        lru[key]


def _get_field(lru: MutableMapping[str, Any], keys: list[str]) -> None:
    for key in keys:
        lru[key]["prefs"]


def _get_whole(lru: MutableMapping[str, Any], keys: list[str]) -> None:
    for key in keys:
        dict(lru[key])


@dataclass
class BufferOverFile(Contender):
    """`Buffer(fast={}, slow=Func(pack, unpack, File(dir)), n)`: live dicts, files when full.

    Attributes:
        resident_count: how many sessions fit in `fast`.
        with_room: True empties `fast` before each repetition, so that a restore pushes nobody
            out. False is the steady state of a full memory: each restore also writes a file.
    """

    accesses: Accesses
    resident_count: int
    with_room: bool = False

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

    async def measure(self) -> Metrics:
        keys = self._next_keys()
        warm(self._directory)
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
