"""Which segments a directory has, and in which state, before any frame is looked at.

Recovery acts on it and `verify` reports it, so that both say the same. Read-only.

A damaged segment header is mended where that is possible: from what is known about it, if one bit
of the rest is flipped; else from the frames, whose checksums tell the salt (see `mending`). It is
damage all the same. The header on disk stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from crc32c import crc32c

from persistence.disk.caches import covers, read_guard
from persistence.disk.filenames import parse_hint, parse_segment, segment_name
from persistence.disk.files import Files, read_exactly
from persistence.disk.format import (
    FOOTER_BYTES,
    FRAME_MAGIC,
    FRAME_OVERHEAD_BYTES,
    MAX_KEY_BYTES,
    MAX_PAYLOAD_BYTES,
    SALT_BYTES,
    SEGMENT_HEADER_BYTES,
    Frame,
    FrameType,
    OtherFormat,
    SegmentKind,
    decode_frame,
    decode_segment_header,
    frame_length,
)
from persistence.disk.manifest import Manifest
from persistence.disk.mending import MENDABLE_BYTES, mend_segment_header, salt_checksum_of
from persistence.disk.segments import Segment
from persistence.errors import DirectoryNotUsable

MISSING = "the segment is missing"
HEADER_MENDED = "the segment's header is damaged; what is in it stays readable"
HEADER_LOST = "the segment's header is damaged"

_WINDOW_BYTES = 2**20
_WITNESSES = 2
_MAX_FRAME_BYTES = FRAME_OVERHEAD_BYTES + MAX_KEY_BYTES + MAX_PAYLOAD_BYTES


@dataclass(slots=True)
class Survey:
    """What is there.

    Attributes:
        segments: live ones by number; where nothing can be read, they are damaged and empty.
        damages: what is wrong with a segment as a whole, by number.
        last_log: number of the last log segment that can be read, 0: there is none.
        is_last_sealed: whether that one must end with its footer.
        torn_creations: segments that a crash left half made, or that were given up as soon as
            they were made; and what there is of them.
        last_number: the highest segment number that was ever used.
    """

    segments: dict[int, Segment] = field(default_factory=dict)
    damages: dict[int, str] = field(default_factory=dict)
    last_log: int = 0
    is_last_sealed: bool = False
    torn_creations: dict[int, bytes] = field(default_factory=dict)
    last_number: int = 0

    def is_unreadable(self, number: int) -> bool:
        """Whether nothing can be read from a segment."""
        return self.damages.get(number, HEADER_MENDED) != HEADER_MENDED


def survey(files: Files, directory: str, manifest: Manifest, names: list[str]) -> Survey:
    """Look at the segments of a directory.

    Raises:
        DirectoryNotUsable: a segment is of a other format version, or of another directory.
        OSError: a segment cannot be read.
    """
    found = Survey()
    numbers = {number for name in names if (number := parse_segment(name)) is not None}
    hinted = {number for name in names if (number := parse_hint(name)) is not None}
    headless = {}
    for number in sorted(live_numbers(manifest, numbers)):
        data = _take(files, directory, manifest, number, found)
        if data is not None:
            headless[number] = data
    for number in sorted(missing_numbers(files, directory, manifest, numbers, hinted)):
        _set_aside(found, number, MISSING)
    _judge_headless(files, directory, manifest, headless, found)
    _judge_unused(files, directory, manifest, hinted, headless, found)
    known = [*numbers, *found.segments, *manifest.sealed, *manifest.dropped]
    found.last_number = max([manifest.next_number - 1, *known])
    found.last_log = _last_log(found)
    found.is_last_sealed = found.last_log in manifest.sealed or (
        # Hints are written for what has been sealed, even if its end is not there any more.
        found.last_log in hinted
        and read_guard(files, directory, manifest.directory_id, found.last_log) is not None
    )
    for number, segment in found.segments.items():
        segment.sealed = number != found.last_log or found.is_last_sealed
    return found


def live_numbers(manifest: Manifest, numbers: set[int]) -> set[int]:
    """Return which of the segments that are there count."""
    return {
        number
        for number in numbers - manifest.dropped
        if number in manifest.sealed or number >= manifest.next_number
    }


def missing_numbers(
    files: Files, directory: str, manifest: Manifest, numbers: set[int], hinted: set[int]
) -> set[int]:
    """Return which segments should be there and are not.

    A segment that no manifest knew yet is known by its hint.
    """
    orphans = {
        number
        for number in hinted - numbers - manifest.dropped
        if number >= manifest.next_number
        and read_guard(files, directory, manifest.directory_id, number) is not None
    }
    return set(manifest.sealed - numbers) | orphans


def _take(
    files: Files, directory: str, manifest: Manifest, number: int, found: Survey
) -> bytes | None:
    """Take in one segment; where its header is damaged, return the bytes in its place."""
    path = f"{directory}/{segment_name(number)}"
    fd = files.open_read(path)
    try:
        size = files.size(fd)
        data = read_exactly(files, fd, SEGMENT_HEADER_BYTES, 0)
    finally:
        files.close(fd)
    try:
        header = decode_segment_header(data)
    except OtherFormat as error:
        raise DirectoryNotUsable(f"{path}: {error}; nothing was changed") from None
    if header is None:
        header = mend_segment_header(data, number, manifest.directory_id)
        if header is None:
            return data
        found.damages[number] = HEADER_MENDED
    if header.number != number:
        _set_aside(found, number, f"it is segment {header.number} under another's name", size)
        return None
    if header.directory_id != manifest.directory_id:
        raise DirectoryNotUsable(
            f"{path} belongs to another directory; nothing was changed; move it away"
        )
    segment = found.segments[number] = Segment.of(header)
    segment.length = size
    segment.damaged = number in found.damages
    return None


def _judge_headless(
    files: Files,
    directory: str,
    manifest: Manifest,
    headless: dict[int, bytes],
    found: Survey,
) -> None:
    """Tell segments that were being made from damaged ones.

    Log segments are made one after the other, so only the newest can be half made, and nothing
    was acknowledged into it.
    """
    last = _last_log(found)
    for number, data in headless.items():
        fd = files.open_read(f"{directory}/{segment_name(number)}")
        try:
            size = files.size(fd)
            may_be_torn = number > last and number not in manifest.sealed
            if may_be_torn and size <= SEGMENT_HEADER_BYTES:
                found.torn_creations[number] = data
                continue
            salvaged = _salvage(files, directory, manifest, fd, size, number, data)
        finally:
            files.close(fd)
        if salvaged is None:
            _set_aside(found, number, HEADER_LOST, size)
        else:
            found.segments[number] = salvaged
            found.damages[number] = HEADER_MENDED


def _judge_unused(
    files: Files,
    directory: str,
    manifest: Manifest,
    hinted: set[int],
    headless: dict[int, bytes],
    found: Survey,
) -> None:
    """Tell segments that were made and given up at once from sealed ones that lost their content.

    Where a header or the directory could not be synced, the segment was removed again, and a power
    loss may undo that. Nothing was written into it if what is behind it goes on at the sequence
    number where what is before it ends.
    """
    known = manifest.sealed | hinted
    before: Segment | None = None  # the last one in front that is not in question
    unused: list[int] = []
    for number, segment in sorted(found.segments.items()):
        if segment.kind != SegmentKind.LOG:
            continue
        is_empty = segment.length <= SEGMENT_HEADER_BYTES and number not in known
        if is_empty and (number in headless or segment.damaged):
            unused.append(number)
            continue
        if segment.damaged:
            unused, before = [], None
            continue
        if unused and before is not None:
            end = _end_of(files, directory, before)
            for given_up in unused if end == segment.lowest_sequence - 1 else ():
                _give_up(found, given_up)
        unused = [number] if is_empty else []
        before = segment
    # Behind the last one that is whole, the next was being made: its header, of which enough is
    # there to tell what it would say, was never synced.
    for number in unused:
        if found.segments[number].damaged:
            _give_up(found, number)


def _give_up(found: Survey, number: int) -> None:
    """Take a segment into which nothing was written for one that was never made."""
    del found.segments[number]
    found.damages.pop(number, None)
    found.torn_creations[number] = b""


def _end_of(files: Files, directory: str, segment: Segment) -> int:
    """Return the last sequence number of a log segment, -1 where its footer does not tell."""
    if segment.length <= SEGMENT_HEADER_BYTES:
        return segment.lowest_sequence - 1  # it holds nothing
    at = segment.length - FOOTER_BYTES
    if at < SEGMENT_HEADER_BYTES:
        return -1
    fd = files.open_read(f"{directory}/{segment_name(segment.number)}")
    try:
        data = read_exactly(files, fd, FOOTER_BYTES, at)
    finally:
        files.close(fd)
    footer = decode_frame(data, 0, segment.salt_checksum)
    is_footer = isinstance(footer, Frame) and footer.type == FrameType.FOOTER
    return footer.sequence if is_footer and isinstance(footer, Frame) else -1


def _last_log(found: Survey) -> int:
    return max(
        (
            number
            for number, segment in found.segments.items()
            if segment.kind == SegmentKind.LOG and not found.is_unreadable(number)
        ),
        default=0,
    )


def _set_aside(found: Survey, number: int, reason: str, size: int = 0) -> None:
    """Keep the place of a segment that nothing can be read from.

    It may hold frames of any session and any age, so no tombstone may be dropped because of it.
    """
    found.segments[number] = Segment(number, SegmentKind.LOG, 0, length=size, damaged=True)
    found.damages[number] = reason


def _salvage(
    files: Files, directory: str, manifest: Manifest, fd: int, size: int, number: int, data: bytes
) -> Segment | None:
    """Return the entry of a segment whose header is lost, from its frames; None: no two agree."""
    kind = SegmentKind.LOG
    if data[12:16] == SegmentKind.MERGED.to_bytes(4, "little"):
        kind = SegmentKind.MERGED
    said = crc32c(data[48 : 48 + SALT_BYTES])
    guard = read_guard(files, directory, manifest.directory_id, number)
    witnesses: Counter[int] = Counter({said: 1})
    for salt_checksum in _salt_checksums(files, fd, size):
        witnesses[salt_checksum] += 1
        segment = Segment(number, kind, salt_checksum, length=size, damaged=True)
        is_covered = guard is not None and guard.covered == covers([segment])
        if is_covered or witnesses[salt_checksum] >= _WITNESSES:
            return segment
    return None


def _salt_checksums(files: Files, fd: int, size: int) -> Iterator[int]:
    """Yield what each intact frame says of the salt; frames inside of one are not seen."""
    at = SEGMENT_HEADER_BYTES
    while at < size:
        window = read_exactly(files, fd, min(_WINDOW_BYTES, size - at), at)
        place = window.find(FRAME_MAGIC)
        if place < 0:
            at += max(1, len(window) - len(FRAME_MAGIC) + 1)
            continue
        at += place
        head = read_exactly(files, fd, min(MENDABLE_BYTES, size - at), at)
        length = frame_length(head, 0) or 0
        found = None
        if FRAME_OVERHEAD_BYTES <= length <= min(size - at, _MAX_FRAME_BYTES):
            found = salt_checksum_of(read_exactly(files, fd, length, at))
        if found is None:
            at += 1
        else:
            yield found
            at += length
