"""What is known of each segment, and the open files that reads go through."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter

from persistence.disk.filenames import segment_name
from persistence.disk.files import Files
from persistence.disk.format import (
    FOOTER_BYTES,
    SEGMENT_HEADER_BYTES,
    SegmentHeader,
    SegmentKind,
)
from persistence.errors import ManagerClosed


@dataclass(slots=True)
class Segment:
    """One segment of the directory.

    Attributes:
        number: as in its file name.
        kind: log or merged.
        salt_checksum: where its frames' checksums start.
        length: bytes up to the end of the last good frame.
        live_bytes: bytes of frames that the index points to.
        tombstone_bytes: bytes of delete frames.
        touch_bytes: bytes of touches that a merge found worth keeping, as far as they are still
            believed to be (see `compaction.fade_touches`). In a log segment touches count as dead:
            most of them are.
        kept_until: the tombstones in a merged segment were kept because older frames of their
            sessions may be in a segment that goes back to this sequence number. Merging it again
            is of use only when that has changed.
        lowest_sequence: no frame in it has a lower sequence number.
        highest_sequence: that of its newest frame; 0: not looked up yet (see `cut`).
        unapplied: frames that are in the file but not in the index yet; while there are any, a
            compaction would take them for dead.
        rows: its index rows, in engine time, as long as its hint has not been written.
        without_rows: its hint is gone; compaction leaves it alone until the next opening.
        sealed: it has its footer, nothing is appended any more.
        damaged: it has a defect: it stays as it is, and compaction leaves it alone.
        stale: it is sealed with a key that is not the newest: compaction seals it anew.
    """

    number: int
    kind: SegmentKind
    salt_checksum: int
    length: int = SEGMENT_HEADER_BYTES
    live_bytes: int = 0
    tombstone_bytes: int = 0
    touch_bytes: int = 0
    kept_until: int = 0
    lowest_sequence: int = 0
    highest_sequence: int = 0
    unapplied: int = 0
    rows: bytes | bytearray | None = None
    without_rows: bool = False
    sealed: bool = False
    damaged: bool = False
    stale: bool = False

    @staticmethod
    def of(header: SegmentHeader) -> Segment:
        """Return the entry of a segment with this header."""
        return Segment(
            header.number,
            header.kind,
            header.salt_checksum,
            lowest_sequence=header.base_sequence + 1,
        )

    @property
    def dead_bytes(self) -> int:
        """Bytes that a compaction would free for certain (tombstones are not counted)."""
        kept = self.live_bytes + self.tombstone_bytes + self.touch_bytes
        return max(0, self.length - SEGMENT_HEADER_BYTES - FOOTER_BYTES - kept)


def bytes_behind(segments: Iterable[Segment], sequence: int, last_sequence: int) -> int:
    """Return about how many bytes of frames that are needed lie behind a sequence number.

    A segment that the number lies in counts in proportion.

    Args:
        segments: the whole log, the open segment included.
        sequence: 0: everything counts.
        last_sequence: that of the newest frame.
    """
    nbytes = 0.0
    highest = last_sequence
    for segment in sorted(segments, key=attrgetter("lowest_sequence"), reverse=True):
        lowest = segment.lowest_sequence
        behind = (highest - sequence) / max(1, highest - lowest + 1)
        nbytes += max(0.0, min(1.0, behind)) * (segment.live_bytes + segment.tombstone_bytes)
        if segment.kind == SegmentKind.LOG:  # a merged one may go back anywhere
            highest = min(highest, lowest - 1)
    return int(nbytes)


@dataclass(frozen=True, slots=True)
class Damage:
    """A defect that was found.

    Attributes:
        path: the file.
        offset: where in it.
        session_id: whose frame, where that is known.
        reason: what is wrong.
    """

    path: str
    offset: int
    session_id: str | None
    reason: str


class Pins:
    """Which segments must stay as they are, because a checkpoint has still to read them.

    Compaction does not choose them, and a merge that chose them before leaves their files alone
    until they are given free.
    """

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._changed = asyncio.Event()

    def __contains__(self, number: object) -> bool:
        return number in self._counts

    def pin(self, number: int) -> None:
        """Keep segment `number`; one `unpin` for each call gives it free."""
        self._counts[number] += 1

    def unpin(self, number: int) -> None:
        """Take back one `pin`."""
        assert number in self._counts, number
        self._counts[number] -= 1
        if not self._counts[number]:
            del self._counts[number]
            self.wake()

    def wake(self) -> None:
        """Let whoever waits in `change` look again."""
        self._changed.set()

    async def change(self) -> None:
        """Wait until a segment is given free, or `wake` is called."""
        self._changed.clear()
        await self._changed.wait()


class _OpenFile:
    __slots__ = ("closing", "fd", "pins")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.pins = 0
        self.closing = False


class OpenSegments:
    """Open files of segments, least recently opened closed first, never while one is being read.

    Args:
        files: the system calls.
        directory: where the segments are.
        max_open: how many files are kept open.
    """

    def __init__(self, files: Files, directory: str, max_open: int = 128) -> None:
        self._files = files
        self._directory = directory
        self._max_open = max_open
        self._open: dict[int, _OpenFile] = {}
        self._closed = False

    def fd(self, number: int) -> int:
        """Return an open file of segment `number`, for use before the next await."""
        file = self._open.get(number)
        return self._file(number).fd if file is None else file.fd

    def _file(self, number: int) -> _OpenFile:
        file = self._open.get(number)
        if file is None:
            if self._closed:
                raise ManagerClosed("the manager is closed")
            path = f"{self._directory}/{segment_name(number)}"
            file = self._open[number] = _OpenFile(self._files.open_read(path))
            if len(self._open) > self._max_open:
                self.forget(next(iter(self._open)))
        return file

    @contextmanager
    def pinned(self, number: int) -> Iterator[int]:
        """Keep segment `number` open for a read in a thread."""
        file = self._file(number)
        file.pins += 1
        try:
            yield file.fd
        finally:
            file.pins -= 1
            self._close_if_unused(file)

    def forget(self, number: int) -> None:
        """Close segment `number`, once nobody reads it any more."""
        file = self._open.pop(number, None)
        if file is not None:
            file.closing = True
            self._close_if_unused(file)

    def _close_if_unused(self, file: _OpenFile) -> None:
        if file.closing and not file.pins and file.fd >= 0:
            self._files.close(file.fd)
            file.fd = -1

    def close(self) -> None:
        """Close all; nothing is opened any more."""
        self._closed = True
        for number in list(self._open):
            self.forget(number)
