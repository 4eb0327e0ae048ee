"""Reading records by the rows of the index: without waiting, in a thread, or holding the loop up.

A row may be out of date by the time that its bytes have been read: the session was updated, or
compaction moved it. So whoever reads in a thread asks the index again before he calls it damage.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from typing import Final

from persistence.disk.filenames import segment_name
from persistence.disk.files import Files, read_exactly
from persistence.disk.format import (
    FRAME_HEADER_BYTES,
    MAX_KEY_BYTES,
    ROW_IS_PATCH,
    is_intact,
    read_put,
)
from persistence.disk.index import Index, Row
from persistence.disk.patches import Patched, PlainRecords, Records
from persistence.disk.reader import FrameReader, read_patched_at
from persistence.disk.sealed import NOT_SEALED_HERE, RecordCodec
from persistence.disk.segments import Damage, OpenSegments, Segment
from persistence.errors import CorruptionError, DirectoryNotUsable

_log = logging.getLogger("persistence.disk")
_OUT_OF_FILES: Final = (errno.EMFILE, errno.ENFILE)


class Reading:
    """Reads the records of one directory. Every method runs on the event loop.

    Args:
        files: the system calls.
        directory: where the segments are.
        index: where each session's newest record is.
        segments: by number.
        open_segments: their files.
        reader: reads frames.
        damages: takes a note of each damaged place.
        fingerprint: returns that of a key.
        codec: opens records; None: they are stored as they are.
    """

    def __init__(  # noqa: PLR0913 - named, and each is used
        self,
        files: Files,
        directory: str,
        *,
        index: Index,
        segments: dict[int, Segment],
        open_segments: OpenSegments,
        reader: FrameReader,
        damages: list[Damage],
        fingerprint: Callable[[bytes], bytes],
        codec: RecordCodec | None,
    ) -> None:
        self._files = files
        self._directory = directory
        self._index = index
        self._segments = segments
        self._open_segments = open_segments
        self._reader = reader
        self._cached = reader.cached
        self._damages = damages
        self._damaged_reads: set[tuple[str, int]] = set()
        self._fingerprint = fingerprint
        self._codec = codec
        self._records: Records = codec or PlainRecords()
        self._read_put = read_put if codec is None else codec.read_put

    def now(self, row: Row, key: bytes) -> bytes | None:
        """Return the record that `row` points to if that needs no waiting, else None."""
        return self.at(row.segment, row.offset, row.length, key)

    def at(self, number: int, offset: int, length: int, key: bytes) -> bytes | None:
        """Return the record at a place in the log if that needs no waiting, else None."""
        frame = self._cached(number, offset, length)
        if frame is None:  # as it is for a patch: its length is that of the largest frames
            return self._patched_now(number, offset, key) if length >= ROW_IS_PATCH else None
        segment = self._segments.get(number)
        return None if segment is None else self._read_put(frame, key, segment.salt_checksum)

    def _patched_now(self, number: int, offset: int, key: bytes) -> bytes | None:
        segment = self._segments.get(number)
        if segment is None:
            return None
        return self._reader.patched_now(number, offset, segment.salt_checksum, self._records, key)

    def waiting(self, row: Row, key: bytes) -> bytes:
        """Return the record that `row` points to; the event loop waits for the disk.

        Raises:
            CorruptionError: the stored bytes fail their checksum, or are gone.
            DirectoryNotUsable: the process may open no more files.
        """
        record = self.now(row, key)
        reason = "the stored bytes fail their checksum"
        if record is None:
            try:
                fd = self._open_segments.fd(row.segment)
                salt_checksum = self._segments[row.segment].salt_checksum
                if row.length >= ROW_IS_PATCH:
                    found = read_patched_at(
                        self._files, fd, row.offset, salt_checksum, self._records, key
                    )
                    if isinstance(found, Patched):
                        return found.record
                    reason = found
                else:
                    data = read_exactly(self._files, fd, row.length, row.offset)
                    record = self._read_put(data, key, salt_checksum)
            except KeyError:
                reason = "the segment is missing"
            except OSError as error:
                reason = _unreadable(error)
        if record is None:
            raise self._damaged(row, key.decode(), reason)
        return record

    def glimpse(self, row: Row) -> tuple[bytes, bytes] | None:
        """Return the session id and the record that `row` points to.

        None: they are damaged, or that would have to wait for the disk.
        """
        size = min(row.length, FRAME_HEADER_BYTES + MAX_KEY_BYTES)
        start = self._reader.cached_at_most(row.segment, row.offset, size)
        key = None if start is None else key_of(memoryview(start))
        record = None if key is None else self.now(row, key)
        return None if key is None or record is None else (key, record)

    async def newest(self, fingerprint: bytes, key: bytes) -> tuple[bytes, Row] | None:
        """Return the newest record of a session and its row, reading in a thread.

        Must not be cancelled while it reads (run it in a task of its own and shield that).

        Raises:
            CorruptionError: the stored bytes fail their checksum, or are gone.
            DirectoryNotUsable: the process may open no more files.
        """
        while (row := self._index.get(fingerprint)) is not None:
            segment = self._segments.get(row.segment)
            record = None
            reason = "the segment is missing"
            if segment is not None:
                try:
                    record, reason = await self._read_waiting(row, key, segment)
                except OSError as error:
                    reason = _unreadable(error)
            now = self._index.get(fingerprint)
            if now is None or (now.segment, now.offset) != (row.segment, row.offset):
                continue  # it was updated, or compaction moved it, while we read
            if record is None:
                raise self._damaged(row, key.decode(), reason)
            return record, now
        return None

    async def _read_waiting(
        self, row: Row, key: bytes, segment: Segment
    ) -> tuple[bytes | None, str]:
        """Read a record in a thread; return also why there is none, if there is none."""
        if row.length >= ROW_IS_PATCH:
            found = await self._reader.patched(
                row.segment, row.offset, segment.salt_checksum, self._records, key
            )
            return (None, found) if isinstance(found, str) else (found.record, "")
        data = await self._reader.waiting(row.segment, row.offset, row.length)
        record = self._read_put(data, key, segment.salt_checksum)
        if record is None and self._codec is not None and is_intact(data, segment.salt_checksum):
            return None, NOT_SEALED_HERE
        return record, "the stored bytes fail their checksum"

    def _damaged(self, row: Row, session_id: str | None, reason: str) -> CorruptionError:
        """Return the error for a session that cannot be read; note its place, once."""
        segment = self._segments.get(row.segment)
        path = f"{self._directory}/{segment_name(row.segment)}"
        if (path, row.offset) not in self._damaged_reads:
            self._damaged_reads.add((path, row.offset))
            if segment is not None:
                segment.damaged = True
            if all((item.path, item.offset) != (path, row.offset) for item in self._damages):
                self._damages.append(Damage(path, row.offset, session_id, reason))
            _log.error("%s at offset %d: %s", path, row.offset, reason)
        return CorruptionError(path, row.offset, session_id, reason)

    async def keys(self, rows: list[Row]) -> list[tuple[bytes, Row]]:
        """Return the session ids of `rows` that are still current, for listings.

        Damaged ones are passed over, and noted where the id itself cannot be read.

        Raises:
            DirectoryNotUsable: the process may open no more files.
        """
        found = []
        for wanted in rows:
            row: Row | None = wanted
            while row is not None:
                key = await self._read_key(row)
                now = self._index.get(row.fingerprint)
                if key or now == row:
                    break
                row = now  # it was updated, or compaction moved it, while we looked
            if row is None:
                continue
            if key and self._fingerprint(key) == row.fingerprint:
                found.append((key, row))
            elif self._index.get(row.fingerprint) == row:
                self._damaged(row, None, "the session's id cannot be read")
        return found

    async def _read_key(self, row: Row) -> bytes:
        """Return the key of the frame that `row` points to; empty: not there."""
        if row.segment not in self._segments:
            return b""
        size = min(row.length, FRAME_HEADER_BYTES + MAX_KEY_BYTES)
        frame = self._reader.cached(row.segment, row.offset, size)
        if frame is None:
            reading = asyncio.ensure_future(self._reader.waiting(row.segment, row.offset, size))
            try:
                frame = await asyncio.shield(reading)  # the thread must not lose its file
            except OSError as error:
                _unreadable(error)  # too many open files is no reason to leave a session out
                return b""
        return key_of(memoryview(frame)) or b""

    def note_damage(self, segment: Segment, offset: int, reason: str) -> None:
        """Note that a segment is damaged at a place that nobody has asked for."""
        segment.damaged = True
        path = f"{self._directory}/{segment_name(segment.number)}"
        self._damages.append(Damage(path, offset, None, reason))
        _log.error("%s at offset %d: %s", path, offset, reason)


def key_of(frame: memoryview) -> bytes | None:
    """Return the key of a frame whose header is intact enough to hold one."""
    if len(frame) < FRAME_HEADER_BYTES:
        return None
    size = int.from_bytes(frame[6:8], "little")
    key = bytes(frame[FRAME_HEADER_BYTES : FRAME_HEADER_BYTES + size])
    return key if len(key) == size else None


def _unreadable(error: OSError) -> str:
    """Return why the bytes of a session cannot be read.

    Raises:
        DirectoryNotUsable: it has nothing to do with them: the process may open no more files.
    """
    if error.errno in _OUT_OF_FILES:
        raise DirectoryNotUsable(
            "too many open files in this process: raise RLIMIT_NOFILE, nothing is lost"
        ) from error
    if error.errno == errno.ENOENT:
        return "the segment is missing"
    return f"it cannot be read ({error.strerror})"
