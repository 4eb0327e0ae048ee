"""Reading a directory as an opening would, without writing a byte to it.

After damage one mounts read-only, and then wants the sessions. `ReadOnlyFiles` keeps every change
in memory, so that recovery does what it always does; `newest_records` gives what it found.

No lock is taken: read a directory that nobody writes to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final, NamedTuple

from persistence.disk.directory import check_keys, read_manifest
from persistence.disk.filenames import MANIFEST, segment_name
from persistence.disk.files import Files, read_all, read_exactly
from persistence.disk.format import (
    FRAME_HEADER_BYTES,
    MAX_KEY_BYTES,
    ROW_IS_PATCH,
    Frame,
    FrameType,
    decode_frame,
)
from persistence.disk.index import SHARDS, Fingerprints, Row
from persistence.disk.patches import Patched, PlainRecords, Records
from persistence.disk.reader import read_patched_at
from persistence.disk.recovery import Recovery
from persistence.disk.sealed import NOT_SEALED_HERE, RecordCodec
from persistence.disk.segments import Damage
from persistence.sealer import Sealer

_FIRST_FD: Final = 2**30  # no real descriptor


class ReadOnlyFiles(Files):
    """The real files, under changes that stay in memory. What is written to is held as a whole."""

    def __init__(self) -> None:
        self._changed: dict[str, bytearray | None] = {}  # None: removed
        self._open: dict[int, bytearray] = {}
        self._next_fd = _FIRST_FD

    def _opened(self, data: bytearray) -> int:
        self._next_fd += 1
        self._open[self._next_fd] = data
        return self._next_fd

    def make_directory(self, path: str) -> None:
        """Do nothing: what is in it is in memory."""

    def list_directory(self, path: str) -> list[str]:
        """Return the names in `path` as they would be."""
        names = set(super().list_directory(path))
        for changed, data in self._changed.items():
            if os.path.dirname(changed) == path:
                (names.discard if data is None else names.add)(os.path.basename(changed))
        return sorted(names)

    def open_read(self, path: str) -> int:
        """Open `path`, as it would be."""
        if path not in self._changed:
            return super().open_read(path)
        data = self._changed[path]
        if data is None:
            raise FileNotFoundError(2, "No such file or directory", path)
        return self._opened(data)

    def open_write(self, path: str) -> int:
        """Take `path` into memory."""
        if self._changed.get(path) is None:
            self._changed[path] = bytearray(read_all(self, path))
        return self.open_read(path)

    def create(self, path: str) -> int:
        """Create `path` in memory."""
        if self.exists(path):
            raise FileExistsError(17, "File exists", path)
        self._changed[path] = bytearray()
        return self.open_read(path)

    def open_lock(self, path: str) -> int:
        """Open nothing."""
        return self._opened(bytearray())

    def lock(self, fd: int) -> None:
        """Take no lock."""

    def unlock(self, fd: int) -> None:
        """Give none back."""

    def close(self, fd: int) -> None:
        """Close `fd`."""
        if self._open.pop(fd, None) is None:
            super().close(fd)

    def size(self, fd: int) -> int:
        """Return the size of the open file, bytes."""
        return len(self._open[fd]) if fd in self._open else super().size(fd)

    def exists(self, path: str) -> bool:
        """Whether `path` would exist."""
        if path in self._changed:
            return self._changed[path] is not None
        return super().exists(path)

    def read_at(self, fd: int, size: int, offset: int) -> bytes:
        """Read at most `size` bytes at `offset`."""
        if fd in self._open:
            return bytes(self._open[fd][offset : offset + size])
        return super().read_at(fd, size, offset)

    def read_cached(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Read what needs no waiting."""
        if fd not in self._open:
            return super().read_cached(fd, buffer, offset)
        data = self.read_at(fd, len(buffer), offset)
        buffer[: len(data)] = data
        return len(data)

    def write_at(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        """Write to memory."""
        self._open[fd][offset : offset + len(data)] = data
        return len(data)

    def truncate(self, fd: int, size: int) -> None:
        """Cut the file in memory."""
        del self._open[fd][size:]

    def sync_data(self, fd: int) -> None:
        """Do nothing."""

    def sync(self, fd: int) -> None:
        """Do nothing."""

    def sync_directory(self, path: str) -> None:
        """Do nothing."""

    def rename(self, source: str, target: str) -> None:
        """Rename in memory."""
        fd = self.open_write(source)
        self._changed[target] = self._open.pop(fd)
        self._changed[source] = None

    def remove(self, path: str) -> None:
        """Remove `path` in memory."""
        self._changed[path] = None


class StoredRecord(NamedTuple):
    """The newest record of one session.

    Attributes:
        session_id: whose.
        record: its record, see `persistence.record`.
        accessed: when it was last accessed, wall seconds.
        deadline: when it ends or has ended, wall seconds; infinity: never.
    """

    session_id: str
    record: bytes
    accessed: float
    deadline: float


def newest_records(path: str, sealer: Sealer | None = None) -> Iterator[StoredRecord | Damage]:
    """Yield the newest record of each session at `path`, and each damage, writing nothing.

    Those whose deadline has passed are among them. A session whose newest record is damaged is a
    `Damage`; older versions are never yielded. Memory: the index, 90 bytes for each session.

    Args:
        path: the directory.
        sealer: opens what an encrypted one holds.

    Raises:
        DirectoryNotUsable: not a directory of this library, of another format, or with other keys.
        OSError: it cannot be read.
    """
    files = ReadOnlyFiles()
    directory = os.path.abspath(path)
    manifest, defect = read_manifest(files, directory)
    check_keys(directory, manifest, sealer)
    records: Records = PlainRecords()
    if sealer is not None:
        records = RecordCodec(sealer, manifest.directory_id)
    if defect is not None:
        yield Damage(f"{directory}/{MANIFEST}", 0, None, defect)
    recovery = Recovery(files, directory, manifest, Fingerprints(manifest.fingerprint_key))
    for _ in recovery.steps():
        pass
    found = recovery.result
    yield from found.damages
    told = {(damage.path, damage.offset) for damage in found.damages}
    for shard in range(SHARDS):
        for row in sorted(found.index.rows_of_shard(shard), key=lambda row: row.segment):
            segment = found.segments[row.segment]
            record = _read(files, directory, row, segment.salt_checksum, records)
            if isinstance(record, StoredRecord) or (record.path, record.offset) not in told:
                yield record


def _read(
    files: Files,
    directory: str,
    row: Row,
    salt_checksum: int,
    records: Records,
) -> StoredRecord | Damage:
    path = f"{directory}/{segment_name(row.segment)}"
    try:
        fd = files.open_read(path)
        try:
            if row.length >= ROW_IS_PATCH:
                patched = read_patched_at(files, fd, row.offset, salt_checksum, records)
                if isinstance(patched, Patched):
                    whose = patched.frame.key.decode()
                    return StoredRecord(whose, patched.record, row.accessed, row.deadline)
                head = read_exactly(files, fd, FRAME_HEADER_BYTES + MAX_KEY_BYTES, row.offset)
                return Damage(path, row.offset, _whose(head, salt_checksum), patched)
            data = read_exactly(files, fd, row.length, row.offset)
        finally:
            files.close(fd)
    except OSError as error:
        return Damage(path, row.offset, None, f"it cannot be read ({error.strerror})")
    frame = decode_frame(data, 0, salt_checksum)
    is_put = isinstance(frame, Frame) and frame.type == FrameType.PUT
    record = records.record_of(frame) if isinstance(frame, Frame) and is_put else None
    if record is None:
        intact = isinstance(frame, Frame) and isinstance(records, RecordCodec)
        reason = NOT_SEALED_HERE if intact else "the stored bytes fail their checksum"
        return Damage(path, row.offset, _whose(data, salt_checksum), reason)
    assert isinstance(frame, Frame)
    return StoredRecord(frame.key.decode(), record, row.accessed, row.deadline)


def _whose(frame: bytes, salt_checksum: int) -> str | None:
    """Return the session of a frame, of which the start will do, if its header is intact."""
    key = decode_frame(frame, 0, salt_checksum).key
    return key.decode("utf-8", "backslashreplace") if key else None
