"""diskcache: a cache on SQLite and files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contender import INLINE, PROCESS_CRASH, SYNCED
from benchmarks.optional import load
from benchmarks.peers.store import Step, SyncStore

_FULL, _NORMAL = 2, 1
_LARGE_BYTES = 2**40


@dataclass
class DiskCache(SyncStore):
    """`Cache(directory)`, nothing evicted; `synchronous=FULL` when `synced`, else its default."""

    synced: bool = True
    called: str = INLINE
    name: str = "diskcache"

    def __post_init__(self) -> None:
        self.durability = SYNCED if self.synced else PROCESS_CRASH

    def connect(self, directory: Path) -> None:
        """See `SyncStore`."""
        self._cache = load("diskcache").Cache(
            str(directory / "diskcache"),
            timeout=60,
            eviction_policy="none",
            size_limit=_LARGE_BYTES,
            sqlite_synchronous=_FULL if self.synced else _NORMAL,
        )

    def disconnect(self) -> None:
        """See `SyncStore`."""
        self._cache.close()

    def load(self, key: str) -> bytes | None:
        """See `SyncStore`."""
        packed: bytes | None = self._cache.get(key)
        return packed

    def modify(self, steps: Sequence[Step]) -> None:
        """See `SyncStore`."""
        with self._cache.transact(retry=True):
            for key, change in steps:
                self._cache.set(key, self.modified(self.load(key), change))

    def delete(self, keys: Sequence[str]) -> None:
        """See `SyncStore`."""
        with self._cache.transact(retry=True):
            for key in keys:
                self._cache.delete(key)

    def keys(self) -> int:
        """See `SyncStore`."""
        return sum(1 for _ in self._cache.iterkeys())

    def let_expire(self, seconds: float) -> None:
        """Give all sessions a deadline."""
        with self._cache.transact(retry=True):
            for key in list(self._cache.iterkeys()):
                self._cache.touch(key, expire=seconds)

    def delete_expired(self, now: float) -> int:
        """Delete what has expired by `now`; return how many."""
        return int(self._cache.expire(now=now, retry=True))
