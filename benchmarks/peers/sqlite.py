"""SQLite in WAL mode, the database that every Python has."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contender import INLINE, PROCESS_CRASH, SYNCED
from benchmarks.peers.store import Step, SyncStore

_BUSY_SECONDS = 60.0
_GET = "SELECT data FROM sessions WHERE id = ?"
_PUT = (
    "INSERT INTO sessions (id, data) VALUES (?, ?) "
    "ON CONFLICT (id) DO UPDATE SET data = excluded.data"
)


@dataclass
class Sqlite(SyncStore):
    """One table; `synchronous=FULL` when `synced`, else OFF (the kernel writes when it likes)."""

    synced: bool = True
    called: str = INLINE
    name: str = "SQLite (WAL)"

    def __post_init__(self) -> None:
        self.durability = SYNCED if self.synced else PROCESS_CRASH

    def connect(self, directory: Path) -> None:
        """See `SyncStore`."""
        self._connection = sqlite3.connect(
            directory / "sessions.db",
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        self._execute = self._connection.execute
        self._execute("PRAGMA journal_mode = WAL")
        self._execute(f"PRAGMA synchronous = {'FULL' if self.synced else 'OFF'}")
        self._execute(
            "CREATE TABLE IF NOT EXISTS sessions "
            "(id TEXT PRIMARY KEY, data BLOB NOT NULL, expires REAL) WITHOUT ROWID"
        )

    def disconnect(self) -> None:
        """See `SyncStore`."""
        self._connection.close()

    def load(self, key: str) -> bytes | None:
        """See `SyncStore`."""
        row = self._execute(_GET, (key,)).fetchone()
        return None if row is None else row[0]

    def modify(self, steps: Sequence[Step]) -> None:
        """See `SyncStore`."""
        self._execute("BEGIN IMMEDIATE")  # no other process changes between reading and writing
        try:
            for key, change in steps:
                self._execute(_PUT, (key, self.modified(self.load(key), change)))
        except BaseException:
            self._execute("ROLLBACK")
            raise
        self._execute("COMMIT")

    def delete(self, keys: Sequence[str]) -> None:
        """See `SyncStore`."""
        self._execute("BEGIN IMMEDIATE")
        for key in keys:
            self._execute("DELETE FROM sessions WHERE id = ?", (key,))
        self._execute("COMMIT")

    def keys(self) -> int:
        """See `SyncStore`."""
        return sum(1 for _ in self._execute("SELECT id FROM sessions"))

    def let_expire(self, seconds: float) -> None:
        """Give all sessions a deadline."""
        self._execute("UPDATE sessions SET expires = ?", (time.time() + seconds,))

    def delete_expired(self, now: float) -> int:
        """Delete, in one transaction, what has expired by `now`; return how many."""
        return self._execute("DELETE FROM sessions WHERE expires <= ?", (now,)).rowcount
