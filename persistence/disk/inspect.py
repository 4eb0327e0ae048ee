"""Looking at a directory without touching it: read-only, without the lock, frame by frame.

A directory that is open elsewhere may be inspected too. Its last segment is then still growing,
so an unfinished frame at its end is a torn tail and not damage; segments that a compaction removes
while they are being looked at are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from persistence.disk.caches import covers, is_intact_cache, read_guard
from persistence.disk.directory import check_keys, read_manifest
from persistence.disk.filenames import (
    INDEX_SNAPSHOT,
    MANIFEST,
    MANIFEST_COPY,
    hint_name,
    segment_name,
)
from persistence.disk.files import Files, read_all, read_exactly
from persistence.disk.format import (
    FOOTER_PAYLOAD,
    ROW_LENGTH_BITS,
    Corrupt,
    Frame,
    FrameType,
    Torn,
    patch_row_length,
)
from persistence.disk.lastlog import Tail, scan_last
from persistence.disk.manifest import Manifest, encode_manifest
from persistence.disk.patches import Patched, PlainRecords, Records, with_base
from persistence.disk.reader import scan_frames
from persistence.disk.sealed import NOT_SEALED_HERE, RecordCodec
from persistence.disk.segments import Damage, Segment
from persistence.disk.survey import MISSING, Survey, survey
from persistence.errors import DirectoryNotUsable
from persistence.record import MalformedValue, validate
from persistence.sealer import Sealer

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
    patches: int = 0
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
        DirectoryNotUsable: not a directory of this library, or of another format.
    """
    scanned = list(scan_directory(path))
    newest: dict[bytes, _Tally] = {}
    for _, tallies in scanned:
        for key, tally in tallies.items():
            if key not in newest or newest[key].sequence < tally.sequence:
                newest[key] = tally
    for report, _ in scanned:
        live = [item for item in newest.values() if item.segment == report.number and item.length]
        live_bytes = sum(item.length for item in live)
        yield replace(report, live_sessions=len(live), live_bytes=live_bytes)


def scan_directory(
    path: str, sealer: Sealer | None = None
) -> Iterator[tuple[SegmentReport, dict[bytes, _Tally]]]:
    """Yield, segment by segment, a report and the newest frame of each session in it.

    Args:
        path: the directory.
        sealer: opens the records of an encrypted one; None: of those only checksums are checked.

    Raises:
        DirectoryNotUsable: not a directory of this library, or of another format.
    """
    files = Files()
    found, defect, codec = _look(files, path, sealer)
    if defect is not None:
        damage = Damage(f"{path}/{MANIFEST}", 0, None, defect)
        yield SegmentReport(MANIFEST, 0, 0, damages=[damage]), {}
    for number, segment in sorted(found.segments.items()):
        name = segment_name(number)
        reason = found.damages.get(number)
        damages = [] if reason is None else [Damage(f"{path}/{name}", 0, None, reason)]
        if found.is_unreadable(number):
            yield SegmentReport(name, number, segment.length, damages=damages), {}
            continue
        with suppress(FileNotFoundError):  # compacted away meanwhile
            yield _scan_segment(files, path, segment, damages, codec)
    for number, data in found.torn_creations.items():
        yield SegmentReport(segment_name(number), number, len(data), torn_bytes=len(data)), {}


def manifest_of(path: str) -> Manifest:
    """Return the manifest of the directory at `path`.

    Raises:
        DirectoryNotUsable: not a directory of this library, or of another format.
    """
    try:
        return read_manifest(Files(), path)[0]
    except OSError as error:
        raise DirectoryNotUsable(f"{path} cannot be read: {error.strerror}") from error


def keys_of(path: str) -> list[bytes]:
    """Return the ids of the keys that the directory at `path` is encrypted with; none: it is not.

    Raises:
        DirectoryNotUsable: not a directory of this library, or of another format.
    """
    return manifest_of(path).keys_in_use


_Checked: TypeAlias = Records | None
"""How payloads are read; None: they cannot be."""


def _look(
    files: Files, path: str, sealer: Sealer | None = None
) -> tuple[Survey, str | None, _Checked]:
    """Return what segments there are, what is wrong with the manifest, and how records are read.

    A compaction may come between reading the manifest and looking at what it names; then segments
    seem to be missing, and all is looked at again.
    """
    found, defect = Survey(), None
    records: _Checked = PlainRecords()
    try:
        for _ in range(_LOOKS):
            with suppress(FileNotFoundError):
                manifest, defect = read_manifest(files, path)
                if sealer is not None:
                    check_keys(path, manifest, sealer)
                    records = RecordCodec(sealer, manifest.directory_id)
                elif manifest.keys:
                    records = None
                names = files.list_directory(path)
                found = survey(files, path, manifest, names)
                if MISSING not in found.damages.values():
                    break
        return found, defect, records
    except OSError as error:
        raise DirectoryNotUsable(f"{path} cannot be read: {error.strerror}") from error


def cache_warnings(path: str) -> Iterator[tuple[str, str]]:
    """Yield (path, reason) for each hint, index snapshot or copy of the manifest that is damaged.

    No data is lost by that: the log is read instead, and they are made again.

    Raises:
        DirectoryNotUsable: not a directory of this library, or of another format.
    """
    files = Files()
    found, *_ = _look(files, path)
    try:
        manifest, _ = read_manifest(files, path)
        names = set(files.list_directory(path))
    except OSError as error:
        raise DirectoryNotUsable(f"{path} cannot be read: {error.strerror}") from error
    for number, segment in sorted(found.segments.items()):
        if hint_name(number) not in names:
            continue
        guard = read_guard(files, path, manifest.directory_id, number)
        if guard is None:
            yield f"{path}/{hint_name(number)}", "the hint is damaged: the segment is read instead"
        elif guard.covered != covers([segment]) and not segment.damaged and segment.sealed:
            yield f"{path}/{hint_name(number)}", "the hint does not fit its segment"
    if INDEX_SNAPSHOT in names and not is_intact_cache(files, path, INDEX_SNAPSHOT):
        yield (
            f"{path}/{INDEX_SNAPSHOT}",
            "the index snapshot is damaged: the hints are read instead",
        )
    if MANIFEST_COPY in names:
        with suppress(OSError):
            if read_all(files, f"{path}/{MANIFEST_COPY}") != encode_manifest(manifest):
                yield f"{path}/{MANIFEST_COPY}", "the copy does not say what the manifest says"


def _scan_segment(
    files: Files, path: str, segment: Segment, damages: list[Damage], records: _Checked
) -> tuple[SegmentReport, dict[bytes, _Tally]]:
    name = segment_name(segment.number)
    where = f"{path}/{name}"
    size = segment.length
    tail = Tail(segment.lowest_sequence - 1)
    fd = files.open_read(where)
    try:
        scan = _Scan(segment.number, where, damages, records)
        if segment.sealed:
            frames = scan_frames(files, fd, size, segment.salt_checksum)
        else:
            frames = scan_last(files, fd, segment, tail)
        for offset, found in frames:
            scan.take(offset, found)
        scan.check_patches(files, fd, segment.salt_checksum)
    finally:
        files.close(fd)
    if segment.sealed:
        return scan.report(name, size, torn_bytes=0, must_be_sealed=True), scan.newest
    return scan.report(name, size, torn_bytes=size - tail.end, must_be_sealed=False), scan.newest


class _Scan:
    """Counts what is in a segment."""

    def __init__(self, number: int, where: str, damages: list[Damage], records: _Checked) -> None:
        self._records = records
        self._patched: dict[bytes, tuple[int, Frame]] = {}
        self._number = number
        self._where = where
        self._counts = dict.fromkeys(FrameType, 0)
        self._damages = list(damages)
        self._sealed = False
        self.newest: dict[bytes, _Tally] = {}

    def take(self, offset: int, found: Frame | Corrupt | Torn) -> None:
        """Count one frame or defect."""
        self._sealed = found.type == FrameType.FOOTER
        if isinstance(found, Frame):
            self._count(offset, found)
        else:
            reason = "the frame is cut off" if isinstance(found, Torn) else found.reason
            self._damage(offset, found.key, reason)

    def _count(self, offset: int, frame: Frame) -> None:
        self._counts[frame.type] += 1
        if frame.type == FrameType.FOOTER:
            frames = sum(self._counts.values()) - self._counts[FrameType.FOOTER]
            if len(frame.payload) != FOOTER_PAYLOAD.size:
                self._damage(offset, None, "the footer has a wrong size")
            elif FOOTER_PAYLOAD.unpack(frame.payload)[0] > frames and not self._damages:
                self._damage(offset, None, "the footer counts more frames than there are")
        elif frame.type == FrameType.PUT:
            self._check_record(offset, frame)
        if frame.type in (FrameType.PUT, FrameType.PATCH, FrameType.DELETE):
            self._patched.pop(frame.key, None)
            if frame.type == FrameType.PATCH:
                self._patched[frame.key] = offset, frame
            known = self.newest.get(frame.key)
            if known is None or known.sequence < frame.sequence:
                length = 0
                if frame.type == FrameType.PUT:
                    length = frame.length
                elif frame.type == FrameType.PATCH:
                    length = patch_row_length(frame) & ROW_LENGTH_BITS
                self.newest[frame.key] = _Tally(self._number, frame.sequence, length)

    def _check_record(self, offset: int, frame: Frame) -> None:
        if self._records is None:
            return
        record = self._records.record_of(frame)
        try:
            if record is None:
                is_plain = isinstance(self._records, PlainRecords)
                what = "the payload does not decompress" if is_plain else NOT_SEALED_HERE
                raise MalformedValue(what)  # noqa: TRY301 - one handler for both
            validate(record)
        except MalformedValue as error:
            self._damage(offset, frame.key, str(error))

    def check_patches(self, files: Files, fd: int, salt_checksum: int) -> None:
        """Check that the newest patch of each session makes a record of its base."""
        if self._records is None:
            return
        for offset, frame in self._patched.values():
            found = with_base(
                lambda at, size: read_exactly(files, fd, size, at),
                offset,
                frame,
                salt_checksum,
                self._records,
            )
            try:
                if not isinstance(found, Patched):
                    raise MalformedValue(found or "")  # noqa: TRY301 - one handler for both
                validate(found.record)
            except MalformedValue as error:
                self._damage(offset, frame.key, str(error))

    def _damage(self, offset: int, key: bytes | None, reason: str) -> None:
        whose = key.decode("utf-8", "backslashreplace") if key else None
        self._damages.append(Damage(self._where, offset, whose, reason))

    def report(
        self, name: str, size: int, *, torn_bytes: int, must_be_sealed: bool
    ) -> SegmentReport:
        """Return the report."""
        if must_be_sealed and not self._sealed:
            self._damage(size, None, "the sealed segment has no footer")
        return SegmentReport(
            name,
            self._number,
            size,
            frames=sum(self._counts.values()),
            puts=self._counts[FrameType.PUT],
            patches=self._counts[FrameType.PATCH],
            touches=self._counts[FrameType.TOUCH],
            deletes=self._counts[FrameType.DELETE],
            sealed=self._sealed,
            torn_bytes=torn_bytes,
            damages=sorted(self._damages, key=lambda item: item.offset),
        )
