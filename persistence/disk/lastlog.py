"""The end of the last log segment, which a crash may have torn.

At its first bad frame: when a later intact frame says (by its durable sequence) that more than
what lies before the bad one had been synced, or when the bad one is what was written but for one
bit, which no torn write is, it is damage: it is reported and the segment is kept as it is.
Otherwise it is a torn tail: nobody was told that what it holds is durable, and it is cut, the cut
bytes kept in the quarantine directory. Then, in this order: truncate, fsync, what nothing proves to
have been synced is written again, footer, fsync; the next segment is created only after that.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from typing import Final

from persistence.disk.filenames import QUARANTINE, TEMPORARY_SUFFIX, quarantine_name, segment_name
from persistence.disk.files import NO_SPACE, Files, read_exactly, replace_file, write_exactly
from persistence.disk.format import SEGMENT_HEADER_BYTES, Corrupt, Frame, FrameType, Torn
from persistence.disk.mending import MAX_SEARCHED_BYTES, is_one_bit_off
from persistence.disk.reader import scan_frames
from persistence.disk.segments import Segment
from persistence.disk.writer import encode_footer

_log = logging.getLogger("persistence.recovery")

_REWRITE_BYTES: Final = 2**20


class Tail:
    """What a scan of the last segment has found so far.

    Attributes:
        end: behind the last frame that is kept.
        frames: how many good ones there are, the footer not counted.
        last_sequence: the highest there is.
        proven_sequence: a frame says that everything up to here had been synced.
        has_footer: whether the last frame that is kept is a footer.
    """

    def __init__(self, base_sequence: int) -> None:
        self.end = SEGMENT_HEADER_BYTES
        self.frames = 0
        self.last_sequence = base_sequence
        self.proven_sequence = base_sequence
        self.has_footer = False
        self._unproven: deque[tuple[int, int]] = deque()

    @property
    def unproven_from(self) -> int:
        """Offset of the first frame that nothing proves to have been synced."""
        return self._unproven[0][1] if self._unproven else self.end

    def take(self, offset: int, frame: Frame) -> None:
        """Take in the next good frame."""
        self.has_footer = frame.type == FrameType.FOOTER
        self.frames += not self.has_footer
        self.proven_sequence = max(self.proven_sequence, frame.durable_sequence)
        self._keep(offset, frame.length, frame.sequence)

    def keep(self, offset: int, damaged: Corrupt) -> None:
        """Keep a damaged frame that was whole once."""
        self.has_footer = False
        self._keep(offset, damaged.length or 0, damaged.sequence or 0)

    def _keep(self, offset: int, length: int, sequence: int) -> None:
        self.end = offset + length
        self.last_sequence = max(self.last_sequence, sequence)
        self._unproven.append((sequence, offset))
        while self._unproven and self._unproven[0][0] <= self.proven_sequence:
            self._unproven.popleft()


def scan_last(
    files: Files, fd: int, segment: Segment, tail: Tail
) -> Iterator[tuple[int, Frame | Corrupt | Torn]]:
    """Yield (offset, frame or damage) of the last segment, up to its torn tail if it has one.

    `tail` knows everything before the frame that is yielded, and at the end where the tail begins.
    """
    size, salt_checksum = segment.length, segment.salt_checksum
    for offset, found in scan_frames(files, fd, size, salt_checksum):
        if isinstance(found, Frame):
            yield offset, found
            tail.take(offset, found)
        elif _was_whole(files, fd, segment, offset, found):
            assert isinstance(found, Corrupt)
            yield offset, found
            tail.keep(offset, found)
        elif _acknowledged_behind(files, fd, segment, offset, tail.last_sequence):
            yield offset, found
        else:
            return


def _was_whole(files: Files, fd: int, segment: Segment, offset: int, found: Corrupt | Torn) -> bool:
    """Whether a defective frame was written as a whole: no torn write flips a single bit.

    A footer is no loss: it is cut and made anew.
    """
    if isinstance(found, Torn) or found.length is None or found.type == FrameType.FOOTER:
        return False
    if offset + found.length > segment.length:
        return False
    if found.is_mended:
        return True
    if found.length > MAX_SEARCHED_BYTES:
        return False
    frame = read_exactly(files, fd, found.length, offset)
    return is_one_bit_off(frame, segment.salt_checksum)


def _acknowledged_behind(
    files: Files, fd: int, segment: Segment, offset: int, last_sequence: int
) -> bool:
    """Whether a frame behind the defect at `offset` proves that synced data was there.

    Its durable sequence is higher than that of the last good frame before the defect: then
    something in between had been synced, hence acknowledged.
    """
    scan = scan_frames(files, fd, segment.length, segment.salt_checksum, offset)
    return any(
        isinstance(found, Frame) and found.durable_sequence > last_sequence for _, found in scan
    )


def cut(files: Files, directory: str, fd: int, segment: Segment, end: int) -> int:
    """Cut the segment to `end`, keeping what is cut; return how many bytes that is."""
    cut_bytes = segment.length - end
    if cut_bytes:
        tail = read_exactly(files, fd, cut_bytes, end)
        if tail.strip(b"\0"):
            quarantine(files, directory, segment.number, end, tail)
        _log.warning(
            "%s/%s: cut a torn tail of %d bytes at offset %d",
            directory,
            segment_name(segment.number),
            cut_bytes,
            end,
        )
        files.truncate(fd, end)
        files.sync(fd)
    segment.length = end
    return cut_bytes


def write_again(files: Files, fd: int, tail: Tail) -> Iterator[None]:
    """Write again what nothing proves to have been synced.

    The page cache may show what a failed sync never brought to the disk. To be synced by `seal`.
    """
    for start in range(tail.unproven_from, tail.end, _REWRITE_BYTES):
        size = min(_REWRITE_BYTES, tail.end - start)
        write_exactly(files, fd, read_exactly(files, fd, size, start), start)
        yield


def seal(files: Files, fd: int, segment: Segment, tail: Tail) -> None:
    """Write the footer, unless it is there, and sync it with what was written again."""
    if not tail.has_footer:
        footer = encode_footer(
            segment.salt_checksum,
            tail.frames,
            segment.lowest_sequence,
            tail.last_sequence,
            durable_sequence=tail.proven_sequence,
        )
        write_exactly(files, fd, footer, tail.end)
        segment.length = tail.end + len(footer)
    files.sync(fd)


def seal_if_room(files: Files, fd: int, segment: Segment, tail: Tail) -> bool:
    """Seal the segment, or, on a full disk, sync it and leave it without its footer."""
    try:
        seal(files, fd, segment, tail)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        files.truncate(fd, tail.end)
        files.sync(fd)
        segment.length = tail.end
        _log.warning("%s: no space to seal it", segment_name(segment.number))
        return False
    return True


def quarantine(files: Files, directory: str, number: int, offset: int, data: bytes) -> None:
    """Keep bytes that recovery takes out of the log. A full disk must not stop recovery."""
    kept_in = f"{directory}/{QUARANTINE}"
    name = quarantine_name(number, offset, len(data))
    try:
        files.make_directory(kept_in)
        replace_file(files, kept_in, name, name + TEMPORARY_SUFFIX, data)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        _log.warning("%s/%s: no space to keep the cut bytes", kept_in, name)
