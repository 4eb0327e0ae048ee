"""Reading frames: on the event loop when the page cache has them, else in a thread.

A hop to a thread costs about 90 µs and a cached read 1 µs, so it is worth asking the kernel
first: ``preadv(..., RWF_NOWAIT)`` reads what is cached and refuses to wait for the rest. Where a
file system cannot tell (tmpfs), every read goes to a thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

from persistence.disk.files import Files, read_exactly
from persistence.disk.format import (
    FRAME_MAGIC,
    FRAME_OVERHEAD_BYTES,
    SEGMENT_HEADER_BYTES,
    Corrupt,
    Frame,
    Torn,
    decode_frame,
)
from persistence.disk.mending import MENDABLE_BYTES, mend_frame_header
from persistence.disk.patches import Patched, Records, read_patched
from persistence.disk.segments import OpenSegments
from persistence.disk.threads import Threads

_INLINE_BYTES: Final = 256 * 1024  # larger reads copy long enough to be worth a thread
_WINDOW_BYTES: Final = 1024 * 1024


class FrameReader:
    """Reads the bytes of single frames."""

    def __init__(self, files: Files, segments: OpenSegments, threads: Threads) -> None:
        self._files = files
        self._segments = segments
        self._threads = threads
        self._read_cached = files.read_cached
        self._fd = segments.fd
        self._buffer = memoryview(bytearray(64 * 1024))
        self._can_ask = True
        self.cached_reads = 0
        self.thread_reads = 0

    def cached(self, segment: int, offset: int, length: int) -> bytes | None:
        """Return a frame's bytes if that needs no waiting, else None."""
        if not self._can_ask or length > _INLINE_BYTES:
            return None
        if length > len(self._buffer):
            self._buffer = memoryview(bytearray(length))
        buffer = self._buffer[:length]
        try:
            got = self._read_cached(self._fd(segment), buffer, offset)
        except NotImplementedError:
            self._can_ask = False
            return None
        except OSError:  # not cached; any real fault shows again in the thread, with its error
            return None
        if got != length:  # partly cached, or cut short: the thread finds out
            return None
        self.cached_reads += 1
        return buffer.tobytes()  # slicing bytes takes half the time of slicing a view

    def cached_at_most(self, segment: int, offset: int, size: int) -> bytes | None:
        """Return up to `size` bytes, fewer at the end of what is cached, if there is no waiting."""
        if not self._can_ask or size > _INLINE_BYTES:
            return None
        if size > len(self._buffer):
            self._buffer = memoryview(bytearray(size))
        try:
            got = self._read_cached(self._fd(segment), self._buffer[:size], offset)
        except NotImplementedError:
            self._can_ask = False
            return None
        except OSError:  # as above
            return None
        return self._buffer[:got].tobytes()

    def patched_now(
        self, segment: int, offset: int, salt_checksum: int, records: Records, key: bytes
    ) -> bytes | None:
        """Return the record that a patch makes of its base if that needs no waiting, else None."""
        read = partial(self.cached_at_most, segment)
        found = read_patched(read, offset, salt_checksum, records, key)
        if not isinstance(found, Patched):
            return None
        self.cached_reads += 1
        return found.record

    async def patched(
        self,
        segment: int,
        offset: int,
        salt_checksum: int,
        records: Records,
        key: bytes | None = None,
    ) -> Patched | str:
        """Read a patch and its base in a thread; return why that is not to be had, if it is not."""
        self.thread_reads += 1
        with self._segments.pinned(segment) as fd:
            return await self._threads.read(
                read_patched_at, self._files, fd, offset, salt_checksum, records, key
            )

    async def waiting(self, segment: int, offset: int, length: int) -> bytes:
        """Read a frame's bytes in a thread; fewer when the file ends before."""
        self.thread_reads += 1
        with self._segments.pinned(segment) as fd:
            return await self._threads.read(read_exactly, self._files, fd, length, offset)


def read_patched_at(
    files: Files,
    fd: int,
    offset: int,
    salt_checksum: int,
    records: Records,
    key: bytes | None = None,
) -> Patched | str:
    """Read a patch and its base from an open segment; see `patches.read_patched`."""

    def read(offset: int, size: int) -> bytes:
        return read_exactly(files, fd, size, offset)

    found = read_patched(read, offset, salt_checksum, records, key)
    assert found is not None, "nothing that may not wait"
    return found


def scan_frames(
    files: Files, fd: int, size: int, salt_checksum: int, start: int = SEGMENT_HEADER_BYTES
) -> Iterator[tuple[int, Frame | Corrupt | Torn]]:
    """Yield (offset, frame or defect) for a whole segment, in order.

    Behind a defect the scan goes on: at the next frame if the defective one's length is known,
    else at the next bytes that are a frame. `Torn` is only yielded at the end of the file. Where
    one bit of a frame's header is flipped, the defect says whose frame it is all the same.
    """
    window = b""
    base = at = start
    while at < size:
        result = decode_frame(window, at - base, salt_checksum)
        if isinstance(result, Torn) and base + len(window) < size:
            base = at
            wanted = max(_WINDOW_BYTES, result.needed_bytes)
            window = read_exactly(files, fd, min(wanted, size - at), at)
            if len(window) < min(result.needed_bytes, size - at):
                return  # the file became shorter while it was read
            continue
        if not isinstance(result, Frame) and result.key is None:
            head = read_exactly(files, fd, min(MENDABLE_BYTES, size - at), at)
            result = mend_frame_header(head, salt_checksum) or result
        yield at, result
        length = None if isinstance(result, Torn) else result.length
        if length is not None:
            at += length
        else:
            following = find_frame(files, fd, at + 1, size, salt_checksum)
            if following is None:
                return
            at = following


def find_frame(files: Files, fd: int, start: int, size: int, salt_checksum: int) -> int | None:
    """Return the offset of the next intact frame at or behind `start`, or None."""
    at = start
    while at < size:
        window = read_exactly(files, fd, min(_WINDOW_BYTES, size - at), at)
        found = window.find(FRAME_MAGIC)
        while found >= 0:
            if _is_frame(files, fd, at + found, size, salt_checksum):
                return at + found
            found = window.find(FRAME_MAGIC, found + 1)
        if len(window) <= len(FRAME_MAGIC):
            return None
        at += len(window) - len(FRAME_MAGIC) + 1
    return None


def _is_frame(files: Files, fd: int, offset: int, size: int, salt_checksum: int) -> bool:
    here = read_exactly(files, fd, min(FRAME_OVERHEAD_BYTES + 512, size - offset), offset)
    result = decode_frame(here, 0, salt_checksum)
    if isinstance(result, Torn) and len(here) < result.needed_bytes <= size - offset:
        here = read_exactly(files, fd, result.needed_bytes, offset)
        result = decode_frame(here, 0, salt_checksum)
    return isinstance(result, Frame)
