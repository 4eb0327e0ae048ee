"""A journal: a small append-only file beside the log, for what is about the log's sessions.

Layout: a header, then entries. Header: `MAGIC`, then the directory's id. Entry: the length of its
data and a CRC-32C over directory id, length and data (both 4 bytes, little-endian), then the data.

What comes behind the first entry that is not intact is cut away: a journal has no footer, so a
torn end cannot be told from damage. Its users survive the loss of entries (see `sharing.outbox`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from struct import Struct
from typing import Final

from crc32c import crc32c

from persistence.disk.filenames import temporary_name
from persistence.disk.files import NO_SPACE, Files, read_all, replace_file, write_exactly
from persistence.errors import DiskFull, WriteOutcomeUnknown

_log = logging.getLogger("persistence.disk")

MAGIC: Final = b"PERSJRN1"
ENTRY: Final = Struct("<II")
_HEADER_BYTES: Final = len(MAGIC) + 16


def encode_entry(directory_id: bytes, data: bytes) -> bytes:
    """Encode one entry."""
    size = len(data).to_bytes(4, "little")
    return ENTRY.pack(len(data), crc32c(data, crc32c(directory_id + size))) + data


def decode_entries(directory_id: bytes, content: bytes) -> tuple[list[bytes], int]:
    """Return the entries before the first defect, and the offset where they end.

    Never raises for any input. Content that does not start with this directory's header has none.
    """
    entries: list[bytes] = []
    if content[:_HEADER_BYTES] != MAGIC + directory_id:
        return entries, 0
    at = _HEADER_BYTES
    while at + ENTRY.size <= len(content):
        size, checksum = ENTRY.unpack_from(content, at)
        end = at + ENTRY.size + size
        if end > len(content):
            break
        data = content[at + ENTRY.size : end]
        if crc32c(data, crc32c(directory_id + content[at : at + 4])) != checksum:
            break
        entries.append(data)
        at = end
    return entries, at


def entries_in(content: bytes) -> list[bytes]:
    """Return the intact entries of a journal, whichever directory it is of."""
    return decode_entries(content[len(MAGIC) : _HEADER_BYTES], content)[0]


class Journal:
    """One such file. Every method blocks: call it in the writer thread.

    Args:
        files: the system calls.
        directory: where it is.
        name: its name.
        directory_id: the directory's id.
    """

    def __init__(self, files: Files, directory: str, name: str, directory_id: bytes) -> None:
        self._files = files
        self._directory = directory
        self._name = name
        self._path = f"{directory}/{name}"
        self._directory_id = directory_id
        self._fd = -1
        self._end = 0
        self._poisoned: str | None = None

    @property
    def size_bytes(self) -> int:
        """Length of the file, bytes."""
        return self._end

    def load(self) -> list[bytes]:
        """Return the entries, and cut what is behind the last intact one.

        Raises:
            OSError: it cannot be read or cut.
        """
        if not self._files.exists(self._path):
            return []
        content = read_all(self._files, self._path)
        entries, end = decode_entries(self._directory_id, content)
        if end == 0:
            if content:
                _log.warning("%s is not a journal of this directory; it is replaced", self._path)
            self.rewrite([])
            return []
        self._fd = self._files.open_write(self._path)
        if end < len(content):
            _log.warning(
                "%s: %d bytes behind its last intact entry are cut",
                self._path,
                len(content) - end,
            )
            self._files.truncate(self._fd, end)
            self._files.sync(self._fd)
        self._end = end
        return entries

    def append(self, entries: Iterable[bytes], *, sync: bool) -> None:
        """Append entries and, if asked, sync them.

        Raises:
            DiskFull: nothing of it was written.
            WriteOutcomeUnknown: a sync failed now or earlier.
        """
        if self._poisoned is not None:
            raise WriteOutcomeUnknown(
                f"{self._path} takes no more entries because an earlier write failed "
                f"({self._poisoned}); check the disk, then open the directory again"
            )
        if self._fd < 0:
            self.rewrite([])
        data = b"".join(encode_entry(self._directory_id, entry) for entry in entries)
        try:
            write_exactly(self._files, self._fd, data, self._end)
        except OSError as error:
            self._cut_back(error)
        if sync:
            try:
                self._files.sync_data(self._fd)
            except OSError as error:
                self._poison(error)
        self._end += len(data)

    def _cut_back(self, error: OSError) -> None:
        try:
            self._files.truncate(self._fd, self._end)
        except OSError as second:
            self._poison(second)
        if error.errno not in NO_SPACE:
            self._poison(error)
        raise DiskFull(f"{self._path}: no space left ({error.strerror}); free some") from error

    def _poison(self, error: OSError) -> None:
        self._poisoned = error.strerror or str(error)
        raise WriteOutcomeUnknown(
            f"{self._path}: {self._poisoned}: what was written may or may not be durable; check "
            "the disk, then open the directory again"
        ) from error

    def rewrite(self, entries: Iterable[bytes]) -> None:
        """Replace the whole content, atomically and durably.

        Raises:
            DiskFull: there is no room; it is as it was.
            WriteOutcomeUnknown: it may or may not have been replaced.
        """
        parts = [MAGIC + self._directory_id]
        parts += [encode_entry(self._directory_id, entry) for entry in entries]
        data = b"".join(parts)
        try:
            replace_file(self._files, self._directory, self._name, temporary_name(self._name), data)
            fd = self._files.open_write(self._path)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise DiskFull(f"{self._path}: no space left ({error.strerror})") from error
            self._poison(error)
            raise
        self.close()
        self._fd = fd
        self._end = len(data)

    def remove(self) -> None:
        """Remove the file, durably; that takes no space.

        Raises:
            OSError: it may still be there.
        """
        self.close()
        self._files.remove(self._path)
        self._files.sync_directory(self._directory)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            self._files.close(self._fd)
            self._fd = -1
