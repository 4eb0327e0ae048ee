"""Compaction: copies the live frames of some segments into new ones and drops the old ones.

What is live:
- a put or a patch that the index points to, at exactly this place; of a patch the whole record is
  written, which its base in the same segment gives, so that no output holds patches;
- a touch that is newer than its session's put (only the newest one);
- a tombstone, unless every segment that may hold an older frame of the session is part of this
  merge: then there is nothing left that it has to hide. A tombstone that the next incremental
  checkpoint has to ship is kept all the same (see `shipped`).

The order: write the outputs under temporary names, footer, fsync, rename, fsync the directory;
then the manifest names the outputs and drops the inputs, in one atomic replacement: the single
moment of truth; then the index moves; then the inputs are unlinked. A crash before the manifest
leaves inputs and perhaps outputs, which say the same things under the same sequence numbers; a
crash after it leaves files that the manifest has dropped.

What is live is decided by the rows of the inputs' hints, so dead frames are never even read.

It works on the loop in slices and reads, writes and syncs in threads; it is limited to
``disk.compaction_bytes_per_second``, so that it does not take the disk away from commits.
"""

from __future__ import annotations

import secrets
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from persistence.disk.filenames import segment_name, temporary_name
from persistence.disk.files import Files, write_exactly
from persistence.disk.format import (
    FOOTER_BYTES,
    INDEX_ROW,
    ROW_IS_DELETE,
    ROW_IS_PATCH,
    ROW_IS_TOUCH,
    SALT_BYTES,
    SEGMENT_HEADER_BYTES,
    SegmentHeader,
    SegmentKind,
    encode_segment_header,
)
from persistence.disk.index import Index
from persistence.disk.segments import Segment
from persistence.disk.writer import encode_footer

MIN_DEAD_FRACTION: Final = 0.32
_SMALL_FRACTION: Final = 1 / 8
_MIN_SMALL_SEGMENTS: Final = 8
_MAX_TOMBSTONE_FRACTION: Final = 1 / 8
_MAX_INPUTS: Final = 16
_LENGTH: Final = 7  # the column of an index row
NOTHING_TO_SHIP: Final = 2**64 - 1  # as the sequence up to which tombstones have been shipped


def choose_inputs(
    segments: Iterable[Segment],
    segment_bytes: int,
    pinned: Container[int] = (),
    room_bytes: int | None = None,
) -> list[Segment]:
    """Return the segments to merge next, or none; never one whose number is `pinned`. Pure.

    In this order: the oldest segments, when tombstones have piled up (only together with
    everything older can they go) and take more than the dead do; segments that are dead to
    `MIN_DEAD_FRACTION`, the deadest first, as many as fill one output (among them those that are
    sealed with an old key, dead or not); many small ones. Where dead
    ones are merged and there are many small ones, the smallest go along: under a load that never
    pauses there is always something dead, and each merge may leave a small one behind.

    A merge always makes progress, so merging comes to an end: its outputs hold nothing that counts
    as dead, and tombstones that had to be kept are looked at again only when what they wait for
    has changed.

    On a disk that is full only segments whose live frames take at most `room_bytes` are merged.
    """
    everything = list(segments)
    usable = [
        item
        for item in everything
        if item.sealed
        and not (item.damaged or item.unapplied or item.without_rows)
        and item.number not in pinned
    ]
    dead = sorted(
        (item for item in usable if _is_dead(item)),
        key=lambda item: item.dead_bytes / item.length,
        reverse=True,
    )
    buried = _oldest_with_tombstones(usable, everything, sum(item.dead_bytes for item in dead))
    if buried and room_bytes is None:
        return buried
    small = sorted(
        (
            item
            for item in usable
            if item.length < segment_bytes * _SMALL_FRACTION and not _is_dead(item)
        ),
        key=lambda item: item.length,
    )
    if len(small) < _MIN_SMALL_SEGMENTS:
        small = []
    elif dead:
        small = small[:_MIN_SMALL_SEGMENTS]
    if room_bytes is not None:
        small = []
        dead = [item for item in dead if item.live_bytes + item.tombstone_bytes <= room_bytes]
    most = segment_bytes if room_bytes is None else min(segment_bytes, room_bytes)
    return _as_many_as_fit([*small, *dead], most)


def _is_dead(item: Segment) -> bool:
    """Whether merging this segment alone would pay.

    It is empty, or much of it is dead, or it is sealed with an old key.
    """
    is_empty = item.length <= SEGMENT_HEADER_BYTES + FOOTER_BYTES
    return is_empty or item.stale or item.dead_bytes > MIN_DEAD_FRACTION * item.length


def fade_touches(segments: Iterable[Segment], frames: int, sessions: int) -> None:
    """Let a part of the kept touches count as dead, or they would pile up, merge after merge.

    Nobody knows which touches are superseded, but `frames` frames have been written since the last
    call, and each made the touch of one of `sessions` sessions superfluous.
    """
    for item in segments:
        faded = -(-item.touch_bytes * frames // max(1, sessions))
        item.touch_bytes -= min(item.touch_bytes, faded)


def _as_many_as_fit(segments: list[Segment], segment_bytes: int) -> list[Segment]:
    chosen: list[Segment] = []
    nbytes = 0
    for item in segments[:_MAX_INPUTS]:
        nbytes += item.live_bytes + item.tombstone_bytes
        if chosen and nbytes > segment_bytes:
            break
        chosen.append(item)
    return chosen


def _oldest_with_tombstones(
    usable: list[Segment], everything: list[Segment], dead_bytes: int
) -> list[Segment]:
    """Return the oldest segments up to the first with tombstones that can go, if it pays.

    It pays when tombstones take a good part of the log, and more than `dead_bytes`, which are
    freed at less expense.
    """
    total = sum(item.length for item in usable)
    buried = sum(item.tombstone_bytes for item in usable)
    if buried <= max(dead_bytes, _MAX_TOMBSTONE_FRACTION * total):
        return []
    ordered = sorted(usable, key=lambda item: item.lowest_sequence)
    for place, item in enumerate(ordered[:_MAX_INPUTS]):
        chosen = ordered[: place + 1]
        if item.tombstone_bytes and lowest_outside(everything, chosen) > item.kept_until:
            return chosen
    return []


def lowest_outside(segments: Iterable[Segment], inputs: Iterable[Segment]) -> int:
    """Return the lowest sequence number that any segment outside the merge may hold."""
    merged = {item.number for item in inputs}
    return min(
        (item.lowest_sequence for item in segments if item.number not in merged),
        default=2**64 - 1,
    )


@dataclass(slots=True)
class Output:
    """A segment that a merge writes.

    `moved` lists, for each put in it, (fingerprint, old place, new place).
    """

    segment: Segment
    path: str
    fd: int
    buffer: list[bytes] = field(default_factory=list)
    buffered_bytes: int = 0
    written: int = SEGMENT_HEADER_BYTES
    frames: int = 0
    highest_sequence: int = 0
    rows: bytearray = field(default_factory=bytearray)
    moved: list[tuple[bytes, tuple[int, int], tuple[int, int], int]] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Where the next frame goes."""
        return self.written + self.buffered_bytes


class Source(NamedTuple):
    """A frame that a merge copies: where it is, and what its row says.

    `length` is 0 where the row does not tell (touches, tombstones, patches): their headers do.
    """

    fingerprint: bytes
    sequence: int
    accessed: float
    deadline: float
    cap: float
    offset: int
    length: int
    mark: int
    user: int

    @property
    def is_patch(self) -> bool:
        """Whether it is a patch: its base goes with it."""
        return self.mark >= ROW_IS_PATCH


class Merge:
    """Decides what is copied. Synchronous.

    Args:
        index: what is live.
        lowest_outside: see the function of that name.
        shipped_sequence: tombstones behind it are kept for the next checkpoint.
    """

    def __init__(
        self, index: Index, lowest_outside: int, shipped_sequence: int = NOTHING_TO_SHIP
    ) -> None:
        self._place = index.place
        self._sequence = index.sequence
        self._droppable_below = min(lowest_outside, shipped_sequence + 1)
        self._newest_touch: dict[bytes, int] = {}
        self.dropped_tombstones = 0

    def note_touches(self, rows: Iterable[tuple[Any, ...]]) -> None:
        """Find each session's newest touch; to be called for all inputs before `wanted`."""
        newest = self._newest_touch
        for row in rows:
            if row[_LENGTH] == ROW_IS_TOUCH and row[1] > newest.get(row[0], 0):
                newest[row[0]] = row[1]

    def wanted(self, row: tuple[Any, ...], segment: int) -> Source | None:
        """Return what to copy for a row of `segment`'s hint; None: nothing."""
        fingerprint, sequence, accessed, deadline, cap, _, offset, length, user = row
        if length == ROW_IS_DELETE:
            if sequence < self._droppable_below:
                self.dropped_tombstones += 1
                return None
        elif length == ROW_IS_TOUCH:
            put = self._sequence(fingerprint)
            if put is None or put > sequence or self._newest_touch[fingerprint] != sequence:
                return None
        elif self._place(fingerprint) != (segment, offset):
            return None
        elif length < ROW_IS_PATCH:
            return Source(
                fingerprint, sequence, accessed, deadline, cap, offset, length, length, user
            )
        return Source(fingerprint, sequence, accessed, deadline, cap, offset, 0, length, user)

    def is_current(self, source: Source, segment: int) -> bool:
        """Whether a put is still its session's newest frame; others stay as they were."""
        if source.mark <= ROW_IS_TOUCH:
            return True
        return bool(self._place(source.fingerprint) == (segment, source.offset))


def add_frame(output: Output, source: Source, stamped: bytes, segment: int) -> None:
    """Append a copied frame to `output`."""
    number = output.segment.number
    offset = output.end
    length = source.mark
    if length > ROW_IS_TOUCH:
        length = len(stamped)  # of what was a patch, the whole record
        place = (segment, source.offset)
        output.moved.append((source.fingerprint, place, (number, offset), len(stamped)))
    elif length == ROW_IS_DELETE:
        output.segment.tombstone_bytes += len(stamped)
    else:
        output.segment.touch_bytes += len(stamped)
    output.rows += INDEX_ROW.pack(
        source.fingerprint,
        source.sequence,
        source.accessed,
        source.deadline,
        source.cap,
        number,
        offset,
        length,
        source.user,
    )
    output.buffer.append(stamped)
    output.buffered_bytes += len(stamped)
    output.frames += 1
    output.highest_sequence = max(output.highest_sequence, source.sequence)


def create_output(
    files: Files, directory: str, directory_id: bytes, number: int, lowest_sequence: int
) -> Output:
    """Create an output under its temporary name. `lowest_sequence` bounds what will be in it."""
    header = SegmentHeader(
        SegmentKind.MERGED,
        number,
        max(0, lowest_sequence - 1),
        directory_id,
        secrets.token_bytes(SALT_BYTES),
    )
    path = f"{directory}/{temporary_name(segment_name(number))}"
    files.remove(path)
    fd = files.create(path)
    try:
        write_exactly(files, fd, encode_segment_header(header), 0)
    except OSError:
        files.close(fd)
        files.remove(path)
        raise
    return Output(Segment.of(header), path, fd)


def flush_output(files: Files, output: Output, chunk: bytes) -> None:
    """Write `chunk` behind what has been written."""
    write_exactly(files, output.fd, chunk, output.written)


def finish_output(files: Files, directory: str, output: Output) -> None:
    """Footer, fsync, rename, fsync the directory."""
    seal_output(files, output)
    name_outputs(files, directory, [output])


def seal_output(files: Files, output: Output) -> None:
    """Footer and fsync; the output keeps its temporary name."""
    assert not output.buffer, "flushed before"
    footer = encode_footer(
        output.segment.salt_checksum,
        output.frames,
        output.segment.lowest_sequence,
        output.highest_sequence,
        durable_sequence=output.highest_sequence,  # it gets its name once it is synced
    )
    write_exactly(files, output.fd, footer, output.written)
    files.sync(output.fd)
    files.close(output.fd)
    output.fd = -1
    output.segment.length = output.written + len(footer)
    output.segment.highest_sequence = output.highest_sequence
    output.segment.sealed = True


def name_outputs(files: Files, directory: str, outputs: Iterable[Output]) -> None:
    """Give sealed outputs their names, durably."""
    for output in outputs:
        files.rename(output.path, f"{directory}/{segment_name(output.segment.number)}")
    files.sync_directory(directory)


def abandon_output(files: Files, directory: str, output: Output) -> None:
    """Remove an output that will not be used, under whichever name it has by now.

    Left behind, it would be a segment that nobody knows: after the next opening it could bring
    back what a tombstone, dropped by then, had hidden.
    """
    if output.fd >= 0:
        files.close(output.fd)
        output.fd = -1
    files.remove(output.path)
    files.remove(f"{directory}/{segment_name(output.segment.number)}")
    files.sync_directory(directory)
