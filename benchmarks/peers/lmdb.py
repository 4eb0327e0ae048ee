"""LMDB: a memory-mapped B-tree, the fastest durable embedded store that Python users reach for."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import payloads
from benchmarks.access import Accesses
from benchmarks.contender import (
    INLINE,
    PROCESS_CRASH,
    SYNCED,
    Contender,
    Metrics,
    Stopwatch,
    check,
    chunks,
)
from benchmarks.optional import load
from benchmarks.pagecache import drop, warm
from benchmarks.peers.store import PER_TRANSACTION, Step, SyncStore

READ_MODIFY_WRITE = "LMDB read-modify-write"
PUT_ONLY = "LMDB put only"
COMPRESSED_READ = "LMDB + LZ4 + msgpack"

_MAP_BYTES = 8 * 2**30  # address space, not memory: large enough for every size of workload


def open_environment(directory: Path, *, synced: bool = True) -> Any:
    """Open LMDB with its defaults (sync on), the map large enough never to fill up."""
    return load("lmdb").open(str(directory), map_size=_MAP_BYTES, sync=synced)


@dataclass
class Update(Contender):
    """Read the session, count a visit, write it back; `PER_TRANSACTION` per synced transaction.

    With `put_only` nothing is read: a value packed beforehand is put, LMDB's own speed alone.
    """

    session_count: int
    update_count: int
    put_only: bool = False
    durability: str = SYNCED
    request_tasks: int = 1

    def __post_init__(self) -> None:
        self.name = PUT_ONLY if self.put_only else READ_MODIFY_WRITE

    async def open(self, directory: Path) -> None:
        msgpack = load("msgpack")
        self._pack, self._unpack = msgpack.packb, msgpack.unpackb
        self._environment = open_environment(directory)
        with self._environment.begin(write=True) as transaction:
            for index in range(self.session_count):
                value = self._pack(payloads.session(index))
                transaction.put(payloads.session_id(index).encode(), value)
        self._value = self._pack(payloads.session(0))
        self._random = random.Random(2)

    async def measure(self) -> Metrics:
        indexes = self._random.choices(range(self.session_count), k=self.update_count)
        keys = [payloads.session_id(index) for index in indexes]
        apply = self._put if self.put_only else self._read_modify_write
        with Stopwatch() as watch:
            for chunk in chunks(keys, PER_TRANSACTION):
                with self._environment.begin(write=True) as transaction:
                    apply(transaction, chunk)
        return watch.rate(len(keys))

    async def request(self) -> None:
        indexes = self._random.choices(range(self.session_count), k=PER_TRANSACTION)
        with self._environment.begin(write=True) as transaction:
            apply = self._put if self.put_only else self._read_modify_write
            apply(transaction, [payloads.session_id(index) for index in indexes])

    def _put(self, transaction: Any, keys: list[str]) -> None:
        put, value = transaction.put, self._value
        for key in keys:
            put(key.encode(), value)

    def _read_modify_write(self, transaction: Any, keys: list[str]) -> None:
        get, put, pack, unpack = transaction.get, transaction.put, self._pack, self._unpack
        for key in keys:
            name = key.encode()
            data = unpack(get(name))
            data["prefs"]["visits"] += 1
            put(name, pack(data))

    async def close(self) -> None:
        self._environment.close()


@dataclass
class CompressedRead(Contender):
    """Get a session, LZ4-decompress and decode all of it, read one field; warm page cache.

    One read transaction per get, as a server does that must see others' writes; `one_snapshot`
    reads all of them in one transaction, which is faster and keeps old pages from being reused.
    """

    accesses: Accesses
    one_snapshot: bool = False
    dropped: bool = False
    durability: str = SYNCED
    request_tasks: int = 32

    def __post_init__(self) -> None:
        self.name = COMPRESSED_READ + (", one snapshot" if self.one_snapshot else "")

    async def open(self, directory: Path) -> None:
        block = load("lz4.block")
        msgpack = load("msgpack")
        self._expand, self._unpack = block.decompress, msgpack.unpackb
        self._environment = open_environment(directory)
        with self._environment.begin(write=True) as transaction:
            for index in range(self.accesses.session_count):
                value = block.compress(msgpack.packb(payloads.session(index)))
                transaction.put(payloads.session_id(index).encode(), value)
        self._directory = directory
        self._seed = 0
        self._random = random.Random(2)

    async def measure(self) -> Metrics:
        if self.dropped:
            self._environment.close()  # mapped pages would stay in the cache
            drop(self._directory)
            self._environment = open_environment(self._directory)
        else:
            warm(self._directory)
        self._seed += 1
        indexes = self.accesses.indexes(self._seed)
        keys = [payloads.session_id(index) for index in indexes]
        with Stopwatch() as watch:
            if self.one_snapshot:
                self._read_in_one_snapshot(keys)
            else:
                self._read_each(keys)
        last = self._read(indexes[-1])
        check(last == payloads.session(indexes[-1]), "a session came back changed")
        return watch.rate(len(keys))

    async def request(self) -> None:
        self._read(self._random.randrange(self.accesses.session_count))["prefs"]

    def _read_in_one_snapshot(self, keys: list[str]) -> None:
        expand, unpack = self._expand, self._unpack
        with self._environment.begin(buffers=True) as transaction:
            for key in keys:
                unpack(expand(transaction.get(key.encode())))["prefs"]

    def _read_each(self, keys: list[str]) -> None:
        begin, expand, unpack = self._environment.begin, self._expand, self._unpack
        for key in keys:
            with begin(buffers=True) as transaction:
                unpack(expand(transaction.get(key.encode())))["prefs"]

    def _read(self, index: int) -> Any:
        with self._environment.begin() as transaction:
            return self._unpack(self._expand(transaction.get(payloads.session_id(index).encode())))

    async def close(self) -> None:
        self._environment.close()


@dataclass
class Lmdb(SyncStore):
    """LMDB as a store: a transaction per read, `synced` or not (then after a while)."""

    synced: bool = True
    called: str = INLINE
    name: str = "LMDB"

    def __post_init__(self) -> None:
        self.durability = SYNCED if self.synced else PROCESS_CRASH

    def connect(self, directory: Path) -> None:
        """See `SyncStore`."""
        self._environment = open_environment(directory, synced=self.synced)
        self._begin = self._environment.begin

    def disconnect(self) -> None:
        """See `SyncStore`."""
        self._environment.close()

    def load(self, key: str) -> bytes | None:
        """See `SyncStore`."""
        with self._begin() as transaction:
            packed: bytes | None = transaction.get(key.encode())
        return packed

    def modify(self, steps: Sequence[Step]) -> None:
        """See `SyncStore`."""
        with self._begin(write=True) as transaction:
            for key, change in steps:
                name = key.encode()
                transaction.put(name, self.modified(transaction.get(name), change))

    def delete(self, keys: Sequence[str]) -> None:
        """See `SyncStore`."""
        with self._begin(write=True) as transaction:
            for key in keys:
                transaction.delete(key.encode())

    def keys(self) -> int:
        """See `SyncStore`."""
        with self._begin() as transaction:
            cursor = transaction.cursor()
            return sum(1 for _ in cursor.iternext(keys=True, values=False))
