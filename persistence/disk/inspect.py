"""Looking at a directory without touching it: read-only, without the lock, frame by frame.

A directory that is open elsewhere may be inspected too. Its last segment is then still growing,
so an unfinished frame at its end is a torn tail and not damage; segments that a compaction removes
while they are being looked at are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from persistence.disk.directory import read_manifest
from persistence.disk.filenames import parse_segment, segment_name
from persistence.disk.files import Files, read_exactly
from persistence.disk.format import (
    FOOTER_PAYLOAD,
    SEGMENT_HEADER_BYTES,
    Corrupt,
    Frame,
    FrameType,
    NewerFormat,
    SegmentHeader,
    SegmentKind,
    Torn,
    decode_segment_header,
    record_of,
)
from persistence.disk.manifest import Manifest
from persistence.disk.reader import scan_frames
from persistence.disk.segments import Damage
from persistence.errors import DirectoryNotUsable
from persistence.record import MalformedValue, validate

_LOOKS = 10


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """What is in one segment.

    `live_sessions` and `live_bytes` are known once all segments have been seen: see
    `inspect_directory`. Sizes in bytes.
    """

    name: str
    number: int
    bytes: int
    frames: int = 0
    puts: int = 0
    touches: int = 0
    deletes: int = 0
    sealed: bool = False
    torn_bytes: int = 0
    live_sessions: int = 0
    live_bytes: int = 0
    damages: list[Damage] = field(default_factory=list)


@dataclass(slots=True)
class _Tally:
    segment: int
    sequence: int
    length: int  # 0: the newest frame is a tombstone


def inspect_directory(path: str) -> Iterator[SegmentReport]:
    """Yield a report for each live segment of the directory at `path`, in order.

    Which frames are live is only known at the end, so all segments are read before the first
    report; progress is visible through `scan_directory`.

    Raises:
        DirectoryNotUsable: not a directory of this library, or of a newer format.
    """
    scanned = list(scan_directory(path))
    newest: dict[bytes, _Tally] = {}
    for _, tallies in scanned:
        for key, tally in tallies.items():
            if key not in newest or newest[key].sequence < tally.sequence:
                newest[key] = tally
    for report, _ in scanned:
        live = [item for item in newest.values() if item.segment == report.number and item.length]
        yield _with_live(report, len(live), sum(item.length for item in live))


def _with_live(report: SegmentReport, sessions: int, nbytes: int) -> SegmentReport:
    values = {name: getattr(report, name) for name in SegmentReport.__dataclass_fields__}
    return SegmentReport(**{**values, "live_sessions": sessions, "live_bytes": nbytes})


def scan_directory(path: str) -> Iterator[tuple[SegmentReport, dict[bytes, _Tally]]]:
    """Yield, segment by segment, a report and the newest frame of each session in it.

    Raises:
        DirectoryNotUsable: not a directory of this library, or of a newer format.
    """
    files = Files()
    manifest, names = _open(files, path)
    numbers = _live_numbers(manifest, names)
    for missing in sorted(manifest.sealed - set(numbers)):
        name = segment_name(missing)
        damage = Damage(f"{path}/{name}", 0, None, "the segment is missing")
        yield SegmentReport(name, missing, 0, damages=[damage]), {}
    headers = {number: _header(files, path, number) for number in numbers}
    last_log = max(
        (
            number
            for number, header in headers.items()
            if header is None or header.kind == SegmentKind.LOG
        ),
        default=0,
    )
    for number, header in headers.items():
        try:
            yield _scan_segment(files, path, number, header, is_last=number == last_log)
        except FileNotFoundError:
            continue  # compacted away meanwhile


def _open(files: Files, path: str) -> tuple[Manifest, list[str]]:
    """Return the manifest and the names that go with it.

    A compaction may come between reading the one and listing the others; then segments seem to be
    missing, and both are looked at again.
    """
    try:
        for _ in range(_LOOKS):
            manifest, names = read_manifest(files, path), files.list_directory(path)
            if manifest.sealed <= set(map(parse_segment, names)):
                break
        return manifest, names
    except OSError as error:
        raise DirectoryNotUsable(f"{path} cannot be read: {error.strerror}") from error


def _live_numbers(manifest: Manifest, names: list[str]) -> list[int]:
    numbers = {number for name in names if (number := parse_segment(name)) is not None}
    return sorted(
        number
        for number in numbers - manifest.dropped
        if number in manifest.sealed or number >= manifest.next_number
    )


def _header(files: Files, path: str, number: int) -> SegmentHeader | None:
    name = f"{path}/{segment_name(number)}"
    try:
        fd = files.open_read(name)
    except FileNotFoundError:
        return None  # compacted away meanwhile; found out again when it is to be scanned
    try:
        return decode_segment_header(read_exactly(files, fd, SEGMENT_HEADER_BYTES, 0))
    except NewerFormat as error:
        raise DirectoryNotUsable(f"{name}: {error}") from None
    finally:
        files.close(fd)


def _scan_segment(
    files: Files, path: str, number: int, header: SegmentHeader | None, *, is_last: bool
) -> tuple[SegmentReport, dict[bytes, _Tally]]:
    name = segment_name(number)
    where = f"{path}/{name}"
    fd = files.open_read(where)
    try:
        size = files.size(fd)
        if header is None:
            if is_last and size <= SEGMENT_HEADER_BYTES:
                return SegmentReport(name, number, size, torn_bytes=size), {}
            damage = Damage(where, 0, None, "the segment's header is damaged")
            return SegmentReport(name, number, size, damages=[damage]), {}
        scan = _Scan(number, where, size, is_last=is_last)
        for offset, found in scan_frames(files, fd, size, header.salt_checksum):
            scan.take(offset, found)
        return scan.report(name), scan.newest
    finally:
        files.close(fd)


class _Scan:
    """Counts what is in a segment."""

    def __init__(self, number: int, where: str, size: int, *, is_last: bool) -> None:
        self._number = number
        self._where = where
        self._size = size
        self._is_last = is_last
        self._counts = dict.fromkeys(FrameType, 0)
        self._damages: list[Damage] = []
        self._suspects: list[tuple[int, int, Damage]] = []
        self._last_sequence = 0
        self._proven_sequence = 0
        self._sealed = False
        self.newest: dict[bytes, _Tally] = {}

    def take(self, offset: int, found: Frame | Corrupt | Torn) -> None:
        """Count one frame or defect."""
        if isinstance(found, Torn):
            self._suspect(offset, None, "the frame is cut off")
        elif isinstance(found, Corrupt):
            self._suspect(offset, found.key, found.reason)
        else:
            self._count(offset, found)

    def _suspect(self, offset: int, key: bytes | None, reason: str) -> None:
        whose = None if key is None else key.decode("utf-8", "backslashreplace")
        damage = Damage(self._where, offset, whose, reason)
        self._suspects.append((offset, self._last_sequence, damage))

    def _count(self, offset: int, frame: Frame) -> None:
        self._counts[frame.type] += 1
        self._last_sequence = max(self._last_sequence, frame.sequence)
        self._proven_sequence = max(self._proven_sequence, frame.durable_sequence)
        self._sealed = frame.type == FrameType.FOOTER
        if frame.type == FrameType.FOOTER:
            frames = sum(self._counts.values()) - self._counts[FrameType.FOOTER]
            if len(frame.payload) != FOOTER_PAYLOAD.size:
                self._damage(offset, None, "the footer has a wrong size")
            elif FOOTER_PAYLOAD.unpack(frame.payload)[0] > frames + len(self._suspects):
                self._damage(offset, None, "the footer counts more frames than there are")
        elif frame.type == FrameType.PUT:
            self._check_record(offset, frame)
        if frame.type in (FrameType.PUT, FrameType.DELETE):
            known = self.newest.get(frame.key)
            if known is None or known.sequence < frame.sequence:
                length = frame.length if frame.type == FrameType.PUT else 0
                self.newest[frame.key] = _Tally(self._number, frame.sequence, length)

    def _check_record(self, offset: int, frame: Frame) -> None:
        record = record_of(frame)
        try:
            if record is None:
                raise MalformedValue("the payload does not decompress")  # noqa: TRY301 - one handler for both
            validate(record)
        except MalformedValue as error:
            self._damage(offset, frame.key, str(error))

    def _damage(self, offset: int, key: bytes | None, reason: str) -> None:
        whose = None if key is None else key.decode("utf-8", "backslashreplace")
        self._damages.append(Damage(self._where, offset, whose, reason))

    def report(self, name: str) -> SegmentReport:
        """Return the report; decides which defects are only a torn tail, as recovery does."""
        torn_from = self._size
        damages = list(self._damages)
        for offset, last_sequence, damage in self._suspects:
            tail = self._is_last and not self._sealed and self._proven_sequence <= last_sequence
            if tail:
                torn_from = min(torn_from, offset)
            else:
                damages.append(damage)
        if not self._sealed and not self._is_last:
            damages.append(
                Damage(self._where, self._size, None, "the sealed segment has no footer")
            )
        return SegmentReport(
            name,
            self._number,
            self._size,
            frames=sum(self._counts.values()),
            puts=self._counts[FrameType.PUT],
            touches=self._counts[FrameType.TOUCH],
            deletes=self._counts[FrameType.DELETE],
            sealed=self._sealed,
            torn_bytes=self._size - torn_from,
            damages=sorted(damages, key=lambda item: item.offset),
        )
