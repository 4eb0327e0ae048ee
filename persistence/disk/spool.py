"""A temporary file in the directory of the log: filled from one end, read anywhere, removed.

Its name is one that the next opening removes, should the process die.
"""

from __future__ import annotations

import errno

from persistence.disk.filenames import STAGED, temporary_name
from persistence.disk.files import Files, read_exactly, write_exactly


class Spool:
    """One at a time per directory. Every method blocks: call it in a thread.

    Raises:
        OSError: as the system calls do.
    """

    def __init__(self, files: Files, directory: str) -> None:
        self._files = files
        self._path = f"{directory}/{temporary_name(STAGED)}"
        self._fd = -1
        self._end = 0

    def append(self, data: bytes) -> int:
        """Write `data` behind what is there; return where it starts."""
        if self._fd < 0:
            self._files.remove(self._path)
            self._fd = self._files.create(self._path)
        start = self._end
        write_exactly(self._files, self._fd, data, start)
        self._end += len(data)
        return start

    def read(self, start: int, size: int) -> bytes:
        """Return `size` bytes from `start`, which must have been written."""
        data = read_exactly(self._files, self._fd, size, start)
        if len(data) != size:
            raise OSError(errno.EIO, f"{self._path} is shorter than what was written")
        return data

    def clear(self) -> None:
        """Forget what is there, and take new content from the start."""
        self._end = 0

    def close(self) -> None:
        """Remove the file."""
        if self._fd >= 0:
            self._files.close(self._fd)
            self._fd = -1
            self._files.remove(self._path)
