"""Which bytes of the log a checkpoint ships: ranges of whole frames, as they lie.

The cost of a session must be next to nothing, so what is mostly alive is shipped whole: a few
large ranges of a segment, dead frames included, found by bisection in the offsets of its index
rows. Restoring goes by the rule of recovery, *the newest sequence wins*, tombstones included, so
a dead frame costs bytes and nothing else.

Where much is dead, and in everything that an incremental checkpoint ships, frames are left out
that are superseded for certain:

- by a newer frame of the same session in the same segment, before the cut;
- by the session's newest put, if that lies before the cut. One behind the cut proves nothing:
  what it superseded may be the session's state at the cut.

So a session's newest tombstone always goes along: what it hides may be shipped as well.

Of a patch (see `disk.patches`) the whole record is shipped, in its place: what it is built on may
have been shipped long ago, or never. So a chunk holds no patches, but for those of which no record
can be made: they say whose newest version is damaged.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from itertools import islice
from typing import Final, NamedTuple

from persistence.disk.cut import Cut, Part, is_log, rows_of
from persistence.disk.format import (
    INDEX_ROW,
    INDEX_ROW_BYTES,
    ROW_IS_PATCH,
    ROW_IS_TOUCH,
    SEGMENT_HEADER_BYTES,
    Corrupt,
    Frame,
    FrameType,
    Torn,
    encode_frame,
)
from persistence.disk.index import Index
from persistence.disk.patches import as_put
from persistence.disk.reader import scan_frames
from persistence.disk.threads import undisturbed
from persistence.disk.tier import DiskTier
from persistence.slices import Slices

CHUNK_BYTES: Final = 2 * 2**20
"""About how much goes into one chunk, before compression; one frame at least."""

_MAX_DEAD_FRACTION: Final = 1 / 8  # of a segment that is shipped whole
_ROWS_PER_STEP: Final = 128
_FRAMES_PER_STEP: Final = 64
_SEQUENCES: Final = slice(2, None, INDEX_ROW_BYTES // 8)  # a column of rows as 64-bit numbers
_OFFSETS: Final = slice(13, None, INDEX_ROW_BYTES // 4)  # a column of rows as 32-bit numbers
_LENGTHS: Final = slice(14, None, INDEX_ROW_BYTES // 4)


class Run(NamedTuple):
    """Some frames of one segment that lie one behind the other.

    Attributes:
        start: where the first one starts.
        end: where the last one ends.
        frames: how many there are.
        literal: not in the segment, but these bytes; then `start` and `end` mean nothing.
    """

    start: int
    end: int
    frames: int
    literal: bytes = b""

    @property
    def nbytes(self) -> int:
        """How many bytes are shipped."""
        return len(self.literal) or self.end - self.start


async def runs_of(
    tier: DiskTier, cut: Cut, part: Part, slices: Slices
) -> AsyncGenerator[Run, None]:
    """Yield what is to be shipped of one part of a cut, in runs of about `CHUNK_BYTES`."""
    rows = await rows_of(tier, part)
    if rows is None:
        async with aclosing(_scanned(tier, cut, part, slices)) as scanned:
            async for run in scanned:
                yield run
        return
    wide = rows.cast("I")[_OFFSETS]
    patches = await _patches(rows, slices) if tier.has_patches else frozenset[int]()
    for first, last in await _wanted(tier.index, cut, part, rows, patches, slices):
        if first in patches:
            [run] = _split(wide, part.end, first, last)
            yield await _whole(tier, part, run)
            continue
        for run in _split(wide, part.end, first, last):
            yield run


async def _patches(rows: memoryview, slices: Slices) -> frozenset[int]:
    """Return which rows are those of patches."""
    lengths = rows.cast("I")[_LENGTHS]
    found: list[int] = []
    for start in range(0, len(lengths), _ROWS_PER_STEP):
        some = lengths[start : start + _ROWS_PER_STEP]
        found += [at for at, length in enumerate(some, start) if length >= ROW_IS_PATCH]
        await slices.give_way_if_due()
    return frozenset(found)


async def _whole(tier: DiskTier, part: Part, patch: Run) -> Run:
    """Return the whole record of a patch; the patch itself, if there is none to be had."""
    segment = part.segment
    patched = await undisturbed(
        tier.reader.patched(segment.number, patch.start, segment.salt_checksum, tier.records)
    )
    if isinstance(patched, str):
        return patch
    seal = None if tier.codec is None else tier.codec.seal
    put = await undisturbed(tier.threads.read(as_put, patched, segment.salt_checksum, seal))
    return Run(0, 0, 1, put)


async def _wanted(
    index: Index,
    cut: Cut,
    part: Part,
    rows: memoryview,
    patches: frozenset[int],
    slices: Slices,
) -> Iterable[tuple[int, int]]:
    """Return what to ship, as ranges of rows; each of the `patches` is a range of its own."""
    sequences = rows.cast("Q")[_SEQUENCES]
    if is_log(part.segment):
        behind = bisect_right(sequences, cut.since)
        before = bisect_right(sequences, cut.sequence)
        if not cut.since and not patches and _is_mostly_alive(part):
            return [(behind, before)] if behind < before else []
        chosen: Sequence[int] = range(behind, before)
    elif not cut.since and not patches and _is_mostly_alive(part):
        return [(0, len(sequences))] if len(sequences) else []
    else:
        chosen = await _between(sequences, cut, slices)
    return _ranges(await _not_superseded(index, cut, rows, chosen, slices), patches)


def _is_mostly_alive(part: Part) -> bool:
    """Whether leaving out what is dead would not be worth its time."""
    segment = part.segment
    # In a log segment touches count as dead, though most of them may have to be shipped.
    return segment.dead_bytes <= _MAX_DEAD_FRACTION * segment.length


async def _between(sequences: memoryview, cut: Cut, slices: Slices) -> list[int]:
    """Return the rows between the cut's ends, of a segment that is in no order."""
    chosen: list[int] = []
    for start in range(0, len(sequences), _ROWS_PER_STEP):
        some = sequences[start : start + _ROWS_PER_STEP]
        chosen += [at for at, one in enumerate(some, start) if cut.since < one <= cut.sequence]
        await slices.give_way_if_due()
    return chosen


async def _not_superseded(
    index: Index, cut: Cut, rows: memoryview, chosen: Sequence[int], slices: Slices
) -> list[int]:
    newest: dict[bytes, int] = {}  # session -> sequence of its newest put or tombstone here
    touched: dict[bytes, int] = {}  # session -> sequence of its newest touch here
    for step in _steps(chosen):
        for at in step:
            fingerprint, sequence, *_, length, _ = INDEX_ROW.unpack_from(rows, at * INDEX_ROW_BYTES)
            here = touched if length == ROW_IS_TOUCH else newest
            if sequence > here.get(fingerprint, 0):
                here[fingerprint] = sequence
        await slices.give_way_if_due()
    kept: list[int] = []
    for step in _steps(chosen):
        for at in step:
            fingerprint, sequence, *_, length, _ = INDEX_ROW.unpack_from(rows, at * INDEX_ROW_BYTES)
            if sequence < newest.get(fingerprint, 0):
                continue
            if length == ROW_IS_TOUCH and sequence < touched[fingerprint]:
                continue
            put = index.sequence(fingerprint)
            if put is None or not sequence < put <= cut.sequence:
                kept.append(at)
        await slices.give_way_if_due()
    return kept


def _steps(chosen: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(chosen), _ROWS_PER_STEP):
        yield chosen[start : start + _ROWS_PER_STEP]


def _ranges(rows: Iterable[int], alone: frozenset[int]) -> Iterator[tuple[int, int]]:
    """Join rows, in ascending order, to ranges of neighbours; those in `alone` stay alone."""
    first = last = -1
    for at in rows:
        if at != last or at in alone or first in alone:
            if first >= 0:
                yield first, last
            first = at
        last = at + 1
    if first >= 0:
        yield first, last


def _split(offsets: memoryview, end: int, first: int, last: int) -> Iterator[Run]:
    """Cut the frames of the rows from `first` up to `last` into runs of about `CHUNK_BYTES`."""
    behind = end if last == len(offsets) else offsets[last]
    while first < last:
        start = offsets[first]
        if behind - start <= CHUNK_BYTES:
            following = last
        else:
            following = max(first + 1, bisect_left(offsets, start + CHUNK_BYTES, first, last) - 1)
        stop = behind if following == last else offsets[following]
        yield Run(start, stop, following - first)
        first = following


# --- segments whose rows are not known ----------------------------------------------------------


async def _scanned(
    tier: DiskTier, cut: Cut, part: Part, slices: Slices
) -> AsyncGenerator[Run, None]:
    """Look at every frame of a segment that is damaged, or has lost its hint."""
    segment = part.segment
    with tier.pinned_file(segment.number) as fd:
        frames = scan_frames(
            tier.files, fd, segment.length, segment.salt_checksum, SEGMENT_HEADER_BYTES
        )
        open_run = Run(0, 0, 0)
        while some := await undisturbed(tier.threads.read(_some, frames)):
            for offset, found in some:
                run = _run_of(offset, found, cut, segment.salt_checksum)
                if run is not None and isinstance(found, Frame) and found.type == FrameType.PATCH:
                    newest = tier.index.sequence(tier.fingerprint(found.key))
                    is_dead = newest is not None and found.sequence < newest <= cut.sequence
                    run = None if is_dead else await _whole(tier, part, run)
                if run is None:
                    continue
                if run.literal or run.start != open_run.end or open_run.nbytes > CHUNK_BYTES:
                    if open_run.frames:
                        yield open_run
                    open_run = run
                else:
                    open_run = Run(open_run.start, run.end, open_run.frames + 1)
            await slices.give_way_if_due()
        if open_run.frames:
            yield open_run


_Found = tuple[int, Frame | Corrupt | Torn]


def _some(frames: Iterator[_Found]) -> list[_Found]:
    return list(islice(frames, _FRAMES_PER_STEP))


def _run_of(offset: int, found: Frame | Corrupt | Torn, cut: Cut, salt_checksum: int) -> Run | None:
    """Return the run of one frame.

    A damaged one whose header is intact becomes a tombstone: its session's state is lost, and an
    older one, shipped from elsewhere, would be a wrong value.
    """
    if isinstance(found, Torn) or found.sequence is None:
        return None
    if found.type not in _SHIPPED or not cut.since < found.sequence <= cut.sequence:
        return None
    if isinstance(found, Frame):
        return Run(offset, offset + found.length, 1)
    if not found.key or found.type == FrameType.TOUCH:
        return None
    tombstone = encode_frame(
        salt_checksum, FrameType.DELETE, found.key, b"", found.sequence, found.sequence
    )
    return Run(0, 0, 1, tombstone)


_SHIPPED: Final = frozenset({FrameType.PUT, FrameType.PATCH, FrameType.DELETE, FrameType.TOUCH})
