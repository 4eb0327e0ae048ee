"""Recovery: from the files of a directory to the index, whatever happened before.

Order within it: sealed segments first (from their hints, else scanned to their footer), then the
last log segment, which a crash may have torn. What is newest is decided by sequence numbers, never
by the order of the segments, because a compaction puts old frames into segments with high numbers.

The last segment, at its first bad frame: when a later intact frame says (by its durable sequence)
that more than what lies before the bad one had been synced, acknowledged data is damaged: it is
reported and the segment is kept as it is. Otherwise it is a torn tail: nobody was told that what
it holds is durable, and it is cut, the cut bytes kept in the quarantine directory. Then, in this
order: truncate, fsync, footer, fsync; the next segment is created only after that.

Recovering twice equals recovering once, at every crash point of recovery itself: each step leaves
a directory that the same rules read the same way.

It runs in a thread in short steps (it is a generator), so that the event loop keeps turning.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from persistence.disk.caches import read_hint, read_snapshot, write_hint
from persistence.disk.filenames import (
    INDEX_SNAPSHOT,
    MAX_SEGMENT_NUMBER,
    QUARANTINE,
    TEMPORARY_SUFFIX,
    hint_name,
    is_ours,
    parse_hint,
    parse_segment,
    quarantine_name,
    segment_name,
)
from persistence.disk.files import NO_SPACE, Files, read_exactly, replace_file, write_exactly
from persistence.disk.format import (
    FOOTER_PAYLOAD,
    INDEX_ROW,
    INDEX_ROW_BYTES,
    ROW_IS_DELETE,
    ROW_IS_TOUCH,
    SEGMENT_HEADER_BYTES,
    Corrupt,
    Frame,
    FrameType,
    NewerFormat,
    SegmentHeader,
    SegmentKind,
    Torn,
    decode_segment_header,
)
from persistence.disk.index import SHARDS, Fingerprints, Index
from persistence.disk.manifest import Manifest
from persistence.disk.reader import scan_frames
from persistence.disk.segments import Damage, Segment
from persistence.disk.suspects import SUSPECT_BYTES, Suspect, lead_to_damage
from persistence.disk.writer import encode_footer
from persistence.errors import DirectoryNotUsable
from persistence.record import NEVER

_log = logging.getLogger("persistence.recovery")

_ROWS_PER_STEP: Final = 2_000
_FRAMES_PER_STEP: Final = 200
_REWRITE_BYTES: Final = 2**20
_GRANT: Final = 8
_SEQUENCE_COLUMN: Final = slice(2, None, INDEX_ROW_BYTES // 8)  # in rows as 64-bit numbers
_LENGTH_COLUMN: Final = slice(14, None, INDEX_ROW_BYTES // 4)  # in rows as 32-bit numbers
_TOMBSTONE_BYTES: Final = 128  # about; a hint does not tell the length


@dataclass(slots=True)
class Recovered:
    """What recovery found.

    Attributes:
        index: the newest frame of every session; times are wall seconds, which at opening are
            engine seconds.
        segments: by number; all sealed.
        last_sequence: the highest sequence number in use.
        last_number: the highest segment number that was ever used.
        unusable: segments that are missing, or whose header is damaged. The manifest goes on
            naming them, so that each opening reports them and none removes what is left of them.
        damages: defects; sessions that they do not concern stay readable.
        clean: whether the directory had been closed cleanly.
        cut_bytes: length of the torn tail.
    """

    index: Index = field(default_factory=Index)
    segments: dict[int, Segment] = field(default_factory=dict)
    last_sequence: int = 0
    last_number: int = 0
    unusable: set[int] = field(default_factory=set)
    damages: list[Damage] = field(default_factory=list)
    clean: bool = False
    cut_bytes: int = 0


class _Tail:
    """What a scan of the last segment has found so far.

    Attributes:
        end: behind the last good frame.
        frames: how many there are, the footer not counted.
        last_sequence: the highest there is.
        proven_sequence: a frame says that everything up to here had been synced.
        has_footer: whether the last good frame is a footer.
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
        """Offset of the first good frame that nothing proves to have been synced."""
        return self._unproven[0][1] if self._unproven else self.end

    def take(self, offset: int, frame: Frame) -> None:
        """Take in the next good frame."""
        self.has_footer = frame.type == FrameType.FOOTER
        self.frames += not self.has_footer
        self.end = offset + frame.length
        self.last_sequence = max(self.last_sequence, frame.sequence)
        self.proven_sequence = max(self.proven_sequence, frame.durable_sequence)
        self._unproven.append((frame.sequence, offset))
        while self._unproven and self._unproven[0][0] <= self.proven_sequence:
            self._unproven.popleft()


class Recovery:
    """One recovery. Call `steps` and exhaust it, in a thread; then `result` holds the outcome."""

    def __init__(
        self, files: Files, directory: str, manifest: Manifest, fingerprints: Fingerprints
    ) -> None:
        self._files = files
        self._directory = directory
        self._manifest = manifest
        self._fingerprints = fingerprints
        self._touches: dict[bytes, tuple[int, float, float]] = {}
        self._deletes: dict[bytes, int] = {}
        self._suspects: list[Suspect] = []
        self.result = Recovered()

    def steps(self) -> Iterator[None]:
        """Recover; yields often, so that the caller can let others run."""
        result = self.result
        headers = self._live_segments()
        last_log = max(
            (number for number, header in headers.items() if header.kind == SegmentKind.LOG),
            default=0,
        )
        self._open_sealed(headers, last_log)
        yield
        if self._take_snapshot(last_log):
            return
        result.index.reserve(self._rows_at_most(headers))
        for number in sorted(headers):
            if number != last_log:
                yield from self._load_sealed(headers[number])
        if last_log:
            yield from self._load_last(headers[last_log])
        yield from self._settle()
        assert all(segment.sealed for segment in result.segments.values()), "all must be sealed"

    # --- which segments there are -------------------------------------------------------------

    def _path(self, number: int) -> str:
        return f"{self._directory}/{segment_name(number)}"

    def _live_segments(self) -> dict[int, SegmentHeader]:
        """Remove what is dead, read the headers of what is live."""
        manifest = self._manifest
        names = self._files.list_directory(self._directory)
        numbers = {number for name in names if (number := parse_segment(name)) is not None}
        live = {
            number
            for number in numbers - manifest.dropped
            if number in manifest.sealed or number >= manifest.next_number
        }
        self.result.last_number = max(
            [manifest.next_number - 1, *numbers, *manifest.sealed, *manifest.dropped]
        )
        if self.result.last_number >= MAX_SEGMENT_NUMBER:
            raise DirectoryNotUsable(f"{self._directory} has used up all segment numbers")
        headers = self._read_headers(sorted(live))
        for missing in sorted(manifest.sealed - numbers):
            self._set_aside(missing, "the segment is missing")
        self._remove_dead(names, live)
        return headers

    def _set_aside(self, number: int, reason: str) -> None:
        self._damage(number, 0, None, reason)
        self.result.unusable.add(number)

    def _read_headers(self, numbers: list[int]) -> dict[int, SegmentHeader]:
        headers = {}
        headless: dict[int, bytes] = {}
        for number in numbers:
            fd = self._files.open_read(self._path(number))
            try:
                data = read_exactly(self._files, fd, SEGMENT_HEADER_BYTES, 0)
            finally:
                self._files.close(fd)
            try:
                header = decode_segment_header(data)
            except NewerFormat as error:
                raise DirectoryNotUsable(
                    f"{self._path(number)}: {error}; nothing was changed; "
                    "use a newer version of the library"
                ) from None
            if header is not None and header.number == number:
                if header.directory_id != self._manifest.directory_id:
                    raise DirectoryNotUsable(
                        f"{self._path(number)} belongs to another directory; nothing was changed; "
                        "move it away"
                    )
                headers[number] = header
            else:
                headless[number] = data
        logs = [number for number, header in headers.items() if header.kind == SegmentKind.LOG]
        for number, data in headless.items():
            # Log segments are made one after the other, so only the newest can be half made.
            if number > max(logs, default=0) and number not in self._manifest.sealed:
                self._remove_torn_creation(number, data)
            else:
                self._set_aside(number, "the segment's header is damaged")
        return headers

    def _remove_torn_creation(self, number: int, data: bytes) -> None:
        """A crash while the newest segment was being created: nothing was acknowledged into it."""
        path = self._path(number)
        fd = self._files.open_read(path)
        try:
            size = self._files.size(fd)
        finally:
            self._files.close(fd)
        if size > SEGMENT_HEADER_BYTES:
            # More than a header: not a torn creation, whatever it is. It stays.
            self._set_aside(number, "the segment's header is damaged")
            return
        if data.strip(b"\0"):
            self._quarantine(number, 0, data)
        self._files.remove(path)
        self._files.sync_directory(self._directory)

    def _remove_dead(self, names: list[str], live: set[int]) -> None:
        """Unlink what a crash left behind: temporaries, replaced segments, hints of neither."""
        known = live | self._manifest.sealed
        dead = []
        for name in names:
            number = parse_segment(name)
            hint = parse_hint(name)
            if (
                (name.endswith(TEMPORARY_SUFFIX) and is_ours(name))
                or (number is not None and number not in known)
                or (hint is not None and hint not in known)
            ):
                dead.append(name)
        if dead:
            # A crash may have come before the manifest that dropped them was durable.
            self._files.sync_directory(self._directory)
        for name in dead:
            self._files.remove(f"{self._directory}/{name}")

    def _open_sealed(self, headers: dict[int, SegmentHeader], last_log: int) -> None:
        for number, header in headers.items():
            segment = self.result.segments[number] = Segment.of(header)
            self.result.last_sequence = max(self.result.last_sequence, header.base_sequence)
            fd = self._files.open_read(self._path(number))
            try:
                segment.length = self._files.size(fd)
            finally:
                self._files.close(fd)
            segment.sealed = number != last_log

    # --- the caches ---------------------------------------------------------------------------

    def _take_snapshot(self, last_log: int) -> bool:
        """Use the snapshot of a clean close, and use it up.

        A crash from now on is not a clean close, even if nothing is written before it, and even
        if the snapshot was not used.
        """
        taken = self._load_snapshot(last_log)
        path = f"{self._directory}/{INDEX_SNAPSHOT}"
        if self._files.exists(path):
            self._files.remove(path)
            self._files.sync_directory(self._directory)
        return taken

    def _load_snapshot(self, last_log: int) -> bool:
        """Load the snapshot if it describes exactly the segments that are here.

        And if each has its hint: it is wanted by compaction, and only recovery makes lost ones.
        """
        result = self.result
        hints = [f"{self._directory}/{hint_name(number)}" for number in result.segments]
        if result.damages or not all(map(self._files.exists, hints)):
            return False
        found = read_snapshot(
            self._files, self._directory, self._manifest.directory_id, result.segments.values()
        )
        if found is None:
            return False
        result.index, result.last_sequence, counts = found
        for segment, (live_bytes, tombstone_bytes, touch_bytes) in zip(
            sorted(result.segments.values(), key=lambda item: item.number), counts, strict=True
        ):
            segment.live_bytes, segment.tombstone_bytes = live_bytes, tombstone_bytes
            segment.touch_bytes = touch_bytes
        result.clean = True
        if last_log:
            result.segments[last_log].sealed = True  # a clean close seals before the snapshot
        return True

    def _rows_at_most(self, headers: dict[int, SegmentHeader]) -> int:
        """Return about how many rows the hints hold; segments without a hint do not count."""
        total = 0
        for number in headers:
            path = f"{self._directory}/{hint_name(number)}"
            if self._files.exists(path):
                fd = self._files.open_read(path)
                try:
                    total += self._files.size(fd) // INDEX_ROW_BYTES
                finally:
                    self._files.close(fd)
        return total

    def _read_hint(self, segment: Segment) -> tuple[float, memoryview] | None:
        try:
            return read_hint(self._files, self._directory, self._manifest.directory_id, segment)
        except OSError:
            return None  # whatever is wrong with it, the segment itself is there

    def _load_sealed(self, header: SegmentHeader) -> Iterator[None]:
        segment = self.result.segments[header.number]
        hint = self._read_hint(segment)
        if hint is not None:
            skew, rows = hint
            yield from self._apply_rows(rows, skew, segment)
            return
        rows_found = bytearray()
        yield from self._scan_sealed(segment, rows_found)
        yield from self._apply_rows(memoryview(rows_found), 0.0, segment)
        if not segment.damaged:
            self._write_hint(segment, bytes(rows_found))

    def _scan_sealed(self, segment: Segment, rows: bytearray) -> Iterator[None]:
        """Scan a segment that must verify to its footer; any defect in it is corruption."""
        footer_seen = False
        sequence = segment.lowest_sequence - 1
        fd = self._files.open_read(self._path(segment.number))
        try:
            scan = scan_frames(self._files, fd, segment.length, segment.salt_checksum)
            for count, (offset, found) in enumerate(scan):
                if isinstance(found, Frame):
                    footer_seen = found.type == FrameType.FOOTER
                    sequence = found.sequence
                    self._add_row(rows, segment, offset, found)
                else:
                    self._report(segment, offset, found, rows)
                    self._suspect(fd, segment, offset, found, sequence)
                if count % _FRAMES_PER_STEP == 0:
                    yield
        finally:
            self._files.close(fd)
        if not footer_seen:
            self._damage(segment.number, segment.length, None, "the sealed segment has no footer")

    def _load_last(self, header: SegmentHeader) -> Iterator[None]:
        """The last log segment: sealed if manifest or hint say so, else as a crash left it."""
        segment = self.result.segments[header.number]
        if header.number in self._manifest.sealed or self._read_hint(segment) is not None:
            segment.sealed = True
            yield from self._load_sealed(header)
        else:
            yield from self._recover_last(header)

    # --- the last segment ---------------------------------------------------------------------

    def _recover_last(self, header: SegmentHeader) -> Iterator[None]:
        segment = self.result.segments[header.number]
        rows = bytearray()
        tail = _Tail(header.base_sequence)
        fd = self._files.open_write(self._path(header.number))
        try:
            scan = scan_frames(self._files, fd, segment.length, segment.salt_checksum)
            for count, (offset, found) in enumerate(scan):
                if count % _FRAMES_PER_STEP == 0:
                    yield
                if isinstance(found, Frame):
                    self._add_row(rows, segment, offset, found)
                    tail.take(offset, found)
                elif self._acknowledged_behind(fd, segment, offset, tail.last_sequence):
                    self._report(segment, offset, found, rows)
                    self._suspect(fd, segment, offset, found, tail.last_sequence)
                else:
                    break
            yield from self._apply_rows(memoryview(rows), 0.0, segment)
            self._cut(fd, segment, tail.end)
            for start in range(tail.unproven_from, tail.end, _REWRITE_BYTES):
                size = min(_REWRITE_BYTES, tail.end - start)
                write_exactly(self._files, fd, read_exactly(self._files, fd, size, start), start)
                yield
            self._seal(fd, segment, tail)
        finally:
            self._files.close(fd)
        segment.sealed = True
        if not segment.damaged:
            self._write_hint(segment, bytes(rows))

    def _acknowledged_behind(
        self, fd: int, segment: Segment, offset: int, last_sequence: int
    ) -> bool:
        """Whether a frame behind the defect at `offset` proves that synced data was there.

        Its durable sequence is higher than that of the last good frame before the defect: then
        something in between had been synced, hence acknowledged.
        """
        scan = scan_frames(self._files, fd, segment.length, segment.salt_checksum, offset)
        return any(
            isinstance(found, Frame) and found.durable_sequence > last_sequence for _, found in scan
        )

    def _cut(self, fd: int, segment: Segment, good_end: int) -> None:
        size = segment.length
        if good_end < size:
            tail = read_exactly(self._files, fd, size - good_end, good_end)
            if tail.strip(b"\0"):
                self._quarantine(segment.number, good_end, tail)
            self.result.cut_bytes = size - good_end
            _log.warning(
                "%s: cut a torn tail of %d bytes at offset %d",
                self._path(segment.number),
                size - good_end,
                good_end,
            )
            self._files.truncate(fd, good_end)
            self._files.sync(fd)
        segment.length = good_end

    def _seal(self, fd: int, segment: Segment, tail: _Tail) -> None:
        """Write the footer, unless it is there, and sync it with what was written again."""
        if not tail.has_footer:
            footer = encode_footer(
                segment.salt_checksum,
                tail.frames,
                segment.lowest_sequence,
                tail.last_sequence,
                durable_sequence=tail.proven_sequence,
            )
            write_exactly(self._files, fd, footer, tail.end)
            segment.length = tail.end + len(footer)
        self._files.sync(fd)

    def _quarantine(self, number: int, offset: int, data: bytes) -> None:
        """Keep bytes that recovery takes out of the log. A full disk must not stop recovery."""
        directory = f"{self._directory}/{QUARANTINE}"
        name = quarantine_name(number, offset, len(data))
        try:
            self._files.make_directory(directory)
            replace_file(self._files, directory, name, name + TEMPORARY_SUFFIX, data)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            _log.warning("%s/%s: no space to keep the cut bytes", directory, name)

    # --- rows ---------------------------------------------------------------------------------

    def _add_row(self, rows: bytearray, segment: Segment, offset: int, frame: Frame) -> None:
        """Add the index row of a frame that was scanned."""
        self.result.last_sequence = max(self.result.last_sequence, frame.sequence)
        length = frame.length
        if frame.type == FrameType.FOOTER:
            if len(frame.payload) != FOOTER_PAYLOAD.size:
                self._damage(segment.number, offset, None, "the footer has a wrong size")
            return
        if frame.type == FrameType.TOUCH:
            length = ROW_IS_TOUCH
        elif frame.type == FrameType.DELETE:
            length = ROW_IS_DELETE
        rows += INDEX_ROW.pack(
            self._fingerprints.of(frame.key),
            frame.sequence,
            frame.accessed,
            frame.deadline,
            frame.cap,
            segment.number,
            offset,
            length,
            frame.user,
        )

    def _report(
        self, segment: Segment, offset: int, found: Corrupt | Torn, rows: bytearray
    ) -> None:
        """Report a defect. Where the key is intact, let reads of that session meet the damage.

        Its older versions must not come back: that would be a wrong value. For the same reason a
        damaged tombstone still is one: all that it says is in its header, which is intact.
        """
        if isinstance(found, Torn):
            self._damage(segment.number, offset, None, "the frame is cut off")
            return
        key, sequence = found.key, found.sequence
        self._damage(segment.number, offset, None if key is None else _text(key), found.reason)
        if key and sequence is not None and found.type in (FrameType.PUT, FrameType.DELETE):
            self.result.last_sequence = max(self.result.last_sequence, sequence)
            length = ROW_IS_DELETE if found.type == FrameType.DELETE else found.length or 0
            rows += INDEX_ROW.pack(
                self._fingerprints.of(key),
                sequence,
                0.0,
                NEVER,
                NEVER,
                segment.number,
                offset,
                length,
                0,
            )

    def _suspect(
        self, fd: int, segment: Segment, offset: int, found: Corrupt | Torn, sequence: int
    ) -> None:
        """Remember a frame that nobody can tell whose it was, until all others are known."""
        if segment.kind == SegmentKind.LOG and (isinstance(found, Torn) or found.key is None):
            data = read_exactly(self._files, fd, SUSPECT_BYTES, offset)
            self._suspects.append(Suspect(segment.number, offset, sequence + 1, data))

    def _resolve_suspects(self) -> None:
        result = self.result
        for suspect in self._suspects:
            key = lead_to_damage(suspect, result.index, self._fingerprints)
            if key is not None:
                place = (self._path(suspect.segment), suspect.offset)
                result.damages = [
                    item for item in result.damages if (item.path, item.offset) != place
                ]
                reason = "the frame header is damaged; by the id behind it, it was this session's"
                self._damage(suspect.segment, suspect.offset, _text(key), reason)

    def _damage(self, number: int, offset: int, session_id: str | None, reason: str) -> None:
        damage = Damage(self._path(number), offset, session_id, reason)
        self.result.damages.append(damage)
        if number in self.result.segments:
            self.result.segments[number].damaged = True
        _log.error(
            "%s at offset %d, session %s: %s",
            damage.path,
            offset,
            "unknown" if session_id is None else ascii(session_id),
            reason,
        )

    def _apply_rows(self, rows: memoryview, skew: float, segment: Segment) -> Iterator[None]:
        """Merge a segment's rows into the index; what is newest is decided by sequence."""
        if not rows:
            return
        result = self.result
        highest = max(rows.cast("Q")[_SEQUENCE_COLUMN])
        result.last_sequence = max(result.last_sequence, highest)
        only_puts = min(rows.cast("I")[_LENGTH_COLUMN]) > ROW_IS_TOUCH
        step = _ROWS_PER_STEP * INDEX_ROW_BYTES
        for at in range(0, len(rows), step):
            some = bytes(rows[at : at + step])
            if not only_puts or skew:
                some = self._puts_in_wall_time(some, skew, segment)
            result.index.load_newer(some)
            yield

    def _puts_in_wall_time(self, rows: bytes, skew: float, segment: Segment) -> bytes:
        """Return the puts among `rows`, in wall time; remember tombstones and touches."""
        puts = []
        for row in INDEX_ROW.iter_unpack(rows):
            fingerprint, sequence, accessed, deadline, cap, number, offset, length, user = row
            times = (accessed + skew, deadline + skew, cap + skew)
            if length > ROW_IS_TOUCH:
                puts.append(
                    INDEX_ROW.pack(fingerprint, sequence, *times, number, offset, length, user)
                )
            elif length == ROW_IS_DELETE:
                segment.tombstone_bytes += _TOMBSTONE_BYTES
                if sequence > self._deletes.get(fingerprint, 0):
                    self._deletes[fingerprint] = sequence
            else:
                if segment.kind == SegmentKind.MERGED:
                    segment.touch_bytes += _TOMBSTONE_BYTES
                if sequence > self._touches.get(fingerprint, (0,))[0]:
                    self._touches[fingerprint] = (sequence, *times[:2])
        return b"".join(puts)

    def _settle(self) -> Iterator[None]:
        """Apply tombstones and renewals, grant the renewals that nobody recorded, count bytes.

        Renewals are recorded once an eighth of the TTL is unrecorded, so after a crash a session
        may have been renewed by that much without a trace. Too long is better than too short.
        """
        index = self.result.index
        self._resolve_suspects()
        for count, (fingerprint, (sequence, accessed, deadline)) in enumerate(
            self._touches.items()
        ):
            put = index.sequence(fingerprint)
            if put is not None and put < sequence:
                index.touch(fingerprint, accessed, deadline)
            if count % _ROWS_PER_STEP == 0:
                yield
        live: dict[int, int] = {}
        for shard in range(SHARDS):
            index.settle(shard, _GRANT, live)
            if shard % 8 == 0:
                yield
        for count, (fingerprint, deleted) in enumerate(self._deletes.items()):
            row = index.get(fingerprint)
            if row is not None and row.sequence < deleted:
                index.remove(fingerprint)
                live[row.segment] -= row.length
            if count % _ROWS_PER_STEP == 0:
                yield
        for number, segment in self.result.segments.items():
            segment.live_bytes = live.get(number, 0)

    def _write_hint(self, segment: Segment, rows: bytes) -> None:
        """Write the hint of a segment that had none; it is only a cache, so failing is fine."""
        segment.rows = rows
        try:
            write_hint(
                self._files,
                self._directory,
                self._manifest.directory_id,
                segment=segment,
                skew=0.0,
                rows=rows,
            )
            segment.rows = None
        except OSError as error:
            _log.warning(
                "%s/%s: not written: %s", self._directory, hint_name(segment.number), error.strerror
            )


def _text(key: bytes) -> str:
    return key.decode("utf-8", "backslashreplace")
