"""A little space that is kept for a full disk: for what frees space, and for ending in order.

Ending a session takes a tombstone, sealing a segment a footer, a merge its output and a manifest.
On a disk with nothing left none of that could be written, and the disk would stay full for good. So
a file of random bytes (zeros may take no space) holds some; it is removed when the disk is full,
for tombstones, seals, manifests and merges, and made again before any update is written. Not
synced: it is worth nothing after a crash but its size.

Every method blocks: call it in a thread. Any method is safe in any thread.
"""

from __future__ import annotations

import logging
import secrets
from contextlib import suppress
from threading import Lock
from typing import Final

from persistence.disk.filenames import RESERVE
from persistence.disk.files import Files, write_exactly

RESERVE_BYTES: Final = 256 * 1024

_log = logging.getLogger("persistence.disk")


class Reserve:
    """The reserve of one directory.

    Attributes:
        is_spent: it was released and could not be made again since: no updates are to be written.

    Args:
        files: the system calls.
        directory: where it is.
        nbytes: how large it is.
    """

    def __init__(self, files: Files, directory: str, nbytes: int = RESERVE_BYTES) -> None:
        self._files = files
        self._path = f"{directory}/{RESERVE}"
        self._nbytes = nbytes
        self._is_held = False
        self._lock = Lock()
        self.is_spent = False

    def make(self) -> bool:
        """Make it where it is missing; return whether it is there."""
        with self._lock:
            if not self._is_held:
                self._is_held = self._is_there() or self._written()
            if self._is_held:
                self.is_spent = False
            return self._is_held

    def _is_there(self) -> bool:
        try:
            fd = self._files.open_read(self._path)
            try:
                return self._files.size(fd) == self._nbytes
            finally:
                self._files.close(fd)
        except OSError:
            return False

    def _written(self) -> bool:
        try:
            self._files.remove(self._path)
            fd = self._files.create(self._path)
            try:
                write_exactly(self._files, fd, secrets.token_bytes(self._nbytes), 0)
            finally:
                self._files.close(fd)
        except OSError:
            with suppress(OSError):
                self._files.remove(self._path)
            return False
        return True

    def release(self) -> bool:
        """Give its space back to the disk; return whether there was any."""
        with self._lock:
            is_held = self._is_held or self._is_there()
            if is_held:
                try:
                    self._files.remove(self._path)
                except OSError:
                    return False
                self._is_held = False
                self.is_spent = True
                _log.warning("%s: released, the disk is full", self._path)
            return is_held
