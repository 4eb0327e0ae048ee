"""A file per session: written beside, synced, renamed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contender import INLINE
from benchmarks.peers.store import Step, SyncStore


@dataclass
class FilePerSession(SyncStore):
    """Temp file, fsync, rename, fsync of the directory."""

    called: str = INLINE
    name: str = "file per session"
    per_transaction: int = 1  # nothing is shared by two files' syncs

    def connect(self, directory: Path) -> None:
        """See `SyncStore`."""
        self._files = directory / "sessions"
        self._files.mkdir(exist_ok=True)
        self._directory = os.open(self._files, os.O_RDONLY | os.O_DIRECTORY)

    def disconnect(self) -> None:
        """See `SyncStore`."""
        os.close(self._directory)

    def load(self, key: str) -> bytes | None:
        """See `SyncStore`."""
        try:
            with open(self._files / key, "rb", buffering=0) as file:
                return file.read()
        except FileNotFoundError:
            return None

    async def fill(self, session_count: int) -> None:
        """See `Store`; not synced, as nothing is measured."""
        self._synced = False
        await super().fill(session_count)
        self._synced = True

    _synced = True

    def modify(self, steps: Sequence[Step]) -> None:
        """See `SyncStore`."""
        for key, change in steps:
            self._replace(key, self.modified(self.load(key), change))
        self._sync(self._directory)

    def _replace(self, key: str, packed: bytes) -> None:
        temporary = self._files / f"{key}.tmp"
        with open(temporary, "wb", buffering=0) as file:
            file.write(packed)
            self._sync(file.fileno())
        temporary.rename(self._files / key)

    def _sync(self, descriptor: int) -> None:
        if self._synced:
            os.fsync(descriptor)

    def delete(self, keys: Sequence[str]) -> None:
        """See `SyncStore`."""
        for key in keys:
            (self._files / key).unlink()
        self._sync(self._directory)

    def keys(self) -> int:
        """See `SyncStore`."""
        with os.scandir(self._files) as entries:
            return sum(1 for _ in entries)
