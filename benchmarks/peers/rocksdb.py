"""RocksDB through rocksdict: a log-structured merge tree in C++."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contender import INLINE, PROCESS_CRASH, SYNCED
from benchmarks.optional import load
from benchmarks.peers.store import Step, SyncStore


@dataclass
class RocksDb(SyncStore):
    """Default options; each batch is written with `sync` when `synced`."""

    synced: bool = True
    called: str = INLINE
    name: str = "RocksDB"

    def __post_init__(self) -> None:
        self.durability = SYNCED if self.synced else PROCESS_CRASH

    def connect(self, directory: Path) -> None:
        """See `SyncStore`."""
        rocksdict = load("rocksdict")
        self._batch = rocksdict.WriteBatch
        self._database = rocksdict.Rdict(str(directory / "rocks"), rocksdict.Options(raw_mode=True))
        self._get = self._database.get
        self._options = rocksdict.WriteOptions()
        self._options.sync = self.synced

    def disconnect(self) -> None:
        """See `SyncStore`."""
        self._database.close()

    def load(self, key: str) -> bytes | None:
        """See `SyncStore`."""
        packed: bytes | None = self._get(key.encode())
        return packed

    def modify(self, steps: Sequence[Step]) -> None:
        """See `SyncStore`."""
        batch = self._batch(raw_mode=True)
        changed: dict[str, bytes] = {}
        for key, change in steps:
            packed = changed[key] if key in changed else self.load(key)
            changed[key] = packed = self.modified(packed, change)
            batch.put(key.encode(), packed)
        self._database.write(batch, self._options)

    def delete(self, keys: Sequence[str]) -> None:
        """See `SyncStore`."""
        batch = self._batch(raw_mode=True)
        for key in keys:
            batch.delete(key.encode())
        self._database.write(batch, self._options)

    def keys(self) -> int:
        """See `SyncStore`."""
        return sum(1 for _ in self._database.keys())  # noqa: SIM118 - it is no dict
