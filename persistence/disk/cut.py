"""A cut through the log: everything up to one sequence number, held still until it is read.

The log is ordered by sequence number, so all frames up to one number are a state that was: no
writer has to wait, whatever is committed meanwhile has higher numbers. What compaction could take
away is pinned (see `segments.Pins`), and given free part by part.

The cut is made in the writer thread, between two batches: it syncs what has been appended (what
is shipped must not be taken back by a power loss, after which its sequence numbers would be given
to other frames) and copies the rows of the open segment, which only that thread changes.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Final, NamedTuple

from persistence.disk.caches import read_hint
from persistence.disk.files import Files, read_exactly
from persistence.disk.format import (
    FOOTER_BYTES,
    FOOTER_PAYLOAD,
    INDEX_ROW_BYTES,
    Frame,
    SegmentKind,
    decode_frame,
)
from persistence.disk.segments import Segment
from persistence.disk.threads import undisturbed
from persistence.disk.tier import DiskTier
from persistence.disk.writer import LogWriter

_SEQUENCE_COLUMN: Final = slice(2, None, INDEX_ROW_BYTES // 8)  # in rows as 64-bit numbers
_UNKNOWN: Final = 2**64 - 1  # as a highest sequence number: look at every frame


@dataclass(frozen=True, slots=True)
class Part:
    """The frames of one segment that lie before the cut, and some that may not.

    Attributes:
        segment: which.
        end: where its frames end.
        rows: index rows of its frames behind `since`, for the segment that was open; else None.
    """

    segment: Segment
    end: int
    rows: bytes | None = None


class _OpenSegment(NamedTuple):
    """What the writer thread says of the cut; `number` 0: no segment was open."""

    sequence: int
    number: int = 0
    end: int = 0
    rows: bytes = b""


class Cut:
    """All frames with sequence numbers above `since` and up to `sequence`. Close it.

    Attributes:
        since: where it starts.
        sequence: where it ends.
        sessions: how many sessions there were.
    """

    def __init__(self, tier: DiskTier, since: int, sequence: int, parts: list[Part]) -> None:
        self._tier = tier
        self.since = since
        self.sequence = sequence
        self._parts = {part.segment.number: part for part in parts}
        self.sessions = len(tier.index)
        for number in self._parts:
            tier.pins.pin(number)

    @property
    def parts(self) -> list[Part]:
        """In which segments the frames are; those that have been released are left out."""
        return list(self._parts.values())

    def release(self, number: int) -> None:
        """Give a segment back to compaction."""
        del self._parts[number]
        self._tier.pins.unpin(number)

    def close(self) -> None:
        """Release everything; harmless when nothing is left."""
        for part in self.parts:
            self.release(part.segment.number)
        self._tier.compactor.wake()


async def take_cut(tier: DiskTier, since: int = 0) -> Cut:
    """Cut the log here. 0 for `since`: everything there is.

    Raises:
        WriteOutcomeUnknown: a sync failed, now or before.
    """
    async with tier.wholes.cut():
        while True:
            active = await undisturbed(tier.threads.write(_cut_open_segment, tier.writer, since))
            # From here to the pins nothing awaits. A segment that was created a moment ago, or a
            # damaged one that was open when the thread looked, is looked for again.
            if not active.number or active.number in tier.segments:
                break
        cut = Cut(tier, since, active.sequence, list(_parts(tier, active)))
    if since:
        try:
            await _leave_out_older(tier, cut)
        except BaseException:
            cut.close()
            raise
    return cut


def _cut_open_segment(writer: LogWriter, since: int) -> _OpenSegment:
    """In the writer thread, where nothing is appended meanwhile."""
    writer.sync()
    writer.check_usable()
    active = writer.active
    if active is None:
        return _OpenSegment(writer.durable_sequence)
    with memoryview(active.rows) as rows:
        first = bisect_right(rows.cast("Q")[_SEQUENCE_COLUMN], since)
        newer = bytes(rows[first * INDEX_ROW_BYTES :])
    return _OpenSegment(writer.durable_sequence, active.segment.number, active.end, newer)


def _parts(tier: DiskTier, active: _OpenSegment) -> list[Part]:
    parts = []
    for segment in tier.current_segments:
        if segment.number == active.number:
            parts.append(Part(segment, active.end, active.rows))
        elif segment.sealed:  # the only other one that is not was made behind the cut
            parts.append(Part(segment, segment.length - FOOTER_BYTES))
    return parts


async def _leave_out_older(tier: DiskTier, cut: Cut) -> None:
    """Release the segments that hold nothing behind `cut.since`; their footers say so."""
    for part in cut.parts:
        segment = part.segment
        if part.rows is None and not segment.highest_sequence:
            with tier.pinned_file(segment.number) as fd:
                segment.highest_sequence = await undisturbed(
                    tier.threads.read(_highest_sequence, tier.files, fd, segment)
                )
    for part in cut.parts:
        if part.rows is not None:
            is_older = not part.rows
        else:
            is_older = part.segment.highest_sequence <= cut.since
        if is_older:
            cut.release(part.segment.number)


def _highest_sequence(files: Files, fd: int, segment: Segment) -> int:
    at = segment.length - FOOTER_BYTES
    if segment.damaged or at < 0:
        return _UNKNOWN
    footer = decode_frame(read_exactly(files, fd, FOOTER_BYTES, at), 0, segment.salt_checksum)
    if not isinstance(footer, Frame) or len(footer.payload) != FOOTER_PAYLOAD.size:
        return _UNKNOWN
    highest: int = FOOTER_PAYLOAD.unpack(footer.payload)[2]
    return highest


async def rows_of(tier: DiskTier, part: Part) -> memoryview | None:
    """Return the index rows of a part, in the order of the file; None: they are not known.

    Their times are of no use: they may be in another time base. Behind the rows of a segment that
    is not damaged there are no gaps: each frame ends where the next one starts.
    """
    if part.rows is not None:
        return memoryview(part.rows)
    segment = part.segment
    if segment.damaged:
        return None
    if segment.rows is not None:
        return memoryview(segment.rows)
    hint = await undisturbed(
        tier.threads.read(read_hint, tier.files, tier.directory, tier.directory_id, segment)
    )
    return None if hint is None else hint[1]


def is_log(segment: Segment) -> bool:
    """Whether the frames of `segment` lie in the order of their sequence numbers."""
    return segment.kind == SegmentKind.LOG
