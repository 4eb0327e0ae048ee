"""Recovery: from the files of a directory to the index, whatever happened before.

Order within it: sealed segments first (from their hints, else scanned to their footer), then the
last log segment, which a crash may have torn. What is newest is decided by sequence numbers, never
by the order of the segments, because a compaction puts old frames into segments with high numbers.

What is live, missing or has a damaged header is found out by `survey`; what to do about the end
of the last segment is in `lastlog`.

Nothing that is lost may look like something older: where a segment cannot be read, the rows of its
hint still say which sessions were in it. Reads of these meet the damage, and what had ended stays
ended.

Recovering twice equals recovering once, at every crash point of recovery itself: each step leaves
a directory that the same rules read the same way.

It runs in a thread in short steps (it is a generator), so that the event loop keeps turning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from persistence.disk.caches import read_guard, read_hint, read_snapshot, write_hint
from persistence.disk.filenames import (
    INDEX_SNAPSHOT,
    MAX_SEGMENT_NUMBER,
    TEMPORARY_SUFFIX,
    hint_name,
    is_cache,
    is_ours,
    parse_hint,
    parse_segment,
    segment_name,
)
from persistence.disk.files import Files, read_exactly
from persistence.disk.format import (
    FOOTER_PAYLOAD,
    FRAME_OVERHEAD_BYTES,
    INDEX_ROW,
    INDEX_ROW_BYTES,
    ROW_IS_DELETE,
    ROW_IS_TOUCH,
    Corrupt,
    Frame,
    FrameType,
    SegmentKind,
    Torn,
    patch_row_length,
)
from persistence.disk.index import SHARDS, Fingerprints, Index
from persistence.disk.lastlog import Tail, cut, quarantine, scan_last, seal_if_room, write_again
from persistence.disk.manifest import Manifest
from persistence.disk.reader import scan_frames
from persistence.disk.reserve import Reserve
from persistence.disk.segments import Damage, Segment
from persistence.disk.survey import Survey, survey
from persistence.disk.suspects import SUSPECT_BYTES, Suspect, lead_to_damage
from persistence.errors import DirectoryNotUsable
from persistence.record import NEVER

_log = logging.getLogger("persistence.recovery")

_ROWS_PER_STEP: Final = 2_000
_FRAMES_PER_STEP: Final = 200
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
        segments: by number; all sealed but one at most (`unsealed`). Also those that are missing
            or cannot be read: they are damaged, and the manifest goes on naming them, so that each
            opening reports them and none removes what is left of them.
        last_sequence: the highest sequence number in use.
        last_number: the highest segment number that was ever used.
        damages: defects; sessions that they do not concern stay readable.
        clean: whether the directory had been closed cleanly.
        cut_bytes: length of the torn tail.
        unsealed: the last segment, if there was no room for its footer: to be sealed before the
            next one is made, and not known to the manifest before that.
    """

    index: Index = field(default_factory=Index)
    segments: dict[int, Segment] = field(default_factory=dict)
    last_sequence: int = 0
    last_number: int = 0
    damages: list[Damage] = field(default_factory=list)
    clean: bool = False
    cut_bytes: int = 0
    unsealed: tuple[Segment, Tail] | None = None


class Recovery:
    """One recovery. Call `steps` and exhaust it, in a thread; then `result` holds the outcome."""

    def __init__(
        self,
        files: Files,
        directory: str,
        manifest: Manifest,
        fingerprints: Fingerprints,
        reserve: Reserve | None = None,
    ) -> None:
        self._files = files
        self._directory = directory
        self._manifest = manifest
        self._fingerprints = fingerprints
        self.reserve = reserve or Reserve(files, directory)
        self._touches: dict[bytes, tuple[int, float, float]] = {}
        self._deletes: dict[bytes, int] = {}
        self._suspects: list[Suspect] = []
        self.result = Recovered()

    def steps(self) -> Iterator[None]:
        """Recover; yields often, so that the caller can let others run."""
        result = self.result
        found = self._survey()
        yield
        if self._take_snapshot(found.last_log):
            return
        result.index.reserve(self._rows_at_most())
        for number, segment in sorted(result.segments.items()):
            if found.is_unreadable(number):
                yield from self._apply_guard(segment)
            elif segment.sealed:
                yield from self._load_sealed(segment)
            else:
                yield from self._recover_last(segment)
        yield from self._settle()
        unsealed = [item.number for item in result.segments.values() if not item.sealed]
        assert len(unsealed) == (result.unsealed is not None), unsealed

    # --- which segments there are -------------------------------------------------------------

    def _path(self, number: int) -> str:
        return f"{self._directory}/{segment_name(number)}"

    def _survey(self) -> Survey:
        """Find out what is there; remove what is dead."""
        names = self._files.list_directory(self._directory)
        found = survey(self._files, self._directory, self._manifest, names)
        result = self.result
        result.last_number = found.last_number
        if found.last_number >= MAX_SEGMENT_NUMBER:
            raise DirectoryNotUsable(f"{self._directory} has used up all segment numbers")
        result.segments = found.segments
        for number, reason in sorted(found.damages.items()):
            self._damage(number, 0, None, reason)
        for number, data in found.torn_creations.items():
            if data.strip(b"\0"):
                quarantine(self._files, self._directory, number, 0, data)
            self._files.remove(self._path(number))
            self._files.sync_directory(self._directory)
        self._remove_dead(names, set(found.segments))
        for segment in found.segments.values():
            result.last_sequence = max(result.last_sequence, segment.lowest_sequence - 1)
        return found

    def _remove_dead(self, names: list[str], live: set[int]) -> None:
        """Unlink what a crash left behind: temporaries, replaced segments, hints of neither."""
        dead = []
        for name in names:
            number = parse_segment(name)
            hint = parse_hint(name)
            if (
                (name.endswith(TEMPORARY_SUFFIX) and is_ours(name))
                or (number is not None and number not in live)
                or (hint is not None and hint not in live)
            ):
                dead.append(name)
        if dead:
            # A crash may have come before the manifest that dropped them was durable.
            self._files.sync_directory(self._directory)
        for name in dead:
            self._removed(name)

    def _removed(self, name: str) -> bool:
        """Remove a file that is dead; False: it is a cache, and a directory is in its place."""
        try:
            self._files.remove(f"{self._directory}/{name}")
        except IsADirectoryError:
            if not is_cache(name):
                raise
            _log.warning(
                "%s/%s: a directory is in the place of this file, which is only a cache; move it "
                "away",
                self._directory,
                name,
            )
            return False
        return True

    # --- the caches ---------------------------------------------------------------------------

    def _take_snapshot(self, last_log: int) -> bool:
        """Use the snapshot of a clean close, and use it up.

        A crash from now on is not a clean close, even if nothing is written before it, and even
        if the snapshot was not used.
        """
        taken = self._load_snapshot(last_log)
        path = f"{self._directory}/{INDEX_SNAPSHOT}"
        if self._files.exists(path) and self._removed(INDEX_SNAPSHOT):
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

    def _rows_at_most(self) -> int:
        """Return about how many rows the hints hold; segments without a hint do not count."""
        total = 0
        for number in self.result.segments:
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

    def _load_sealed(self, segment: Segment) -> Iterator[None]:
        hint = self._read_hint(segment)
        if hint is not None:
            skew, rows = hint
            yield from self._apply_rows(rows, skew, segment)
            return
        rows_found = bytearray()
        yield from self._scan_sealed(segment, rows_found)
        yield from self._apply_rows(memoryview(rows_found), 0.0, segment)
        if segment.damaged:
            yield from self._apply_guard(segment)
        else:
            self._write_hint(segment, bytes(rows_found))

    def _apply_guard(self, segment: Segment) -> Iterator[None]:
        """Apply what the hint says was in a segment that is damaged or gone, as far as it is new.

        Rows then point to where nothing can be read, and reads of these sessions say so.
        """
        guard = read_guard(
            self._files, self._directory, self._manifest.directory_id, segment.number
        )
        if guard is not None:
            yield from self._apply_rows(guard.rows, guard.skew, segment)

    def _scan_sealed(self, segment: Segment, rows: bytearray) -> Iterator[None]:
        """Scan a segment that must verify to its footer; any defect in it is corruption."""
        footer_seen = False
        sequence = segment.lowest_sequence - 1
        fd = self._files.open_read(self._path(segment.number))
        try:
            scan = scan_frames(self._files, fd, segment.length, segment.salt_checksum)
            for count, (offset, found) in enumerate(scan):
                footer_seen = found.type == FrameType.FOOTER
                if isinstance(found, Frame):
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

    def _recover_last(self, segment: Segment) -> Iterator[None]:
        """The last log segment, as a crash left it."""
        rows = bytearray()
        tail = Tail(segment.lowest_sequence - 1)
        fd = self._files.open_write(self._path(segment.number))
        try:
            scan = scan_last(self._files, fd, segment, tail)
            for count, (offset, found) in enumerate(scan):
                if count % _FRAMES_PER_STEP == 0:
                    yield
                if isinstance(found, Frame):
                    self._add_row(rows, segment, offset, found)
                else:
                    self._report(segment, offset, found, rows)
                    self._suspect(fd, segment, offset, found, tail.last_sequence)
            yield from self._apply_rows(memoryview(rows), 0.0, segment)
            self.result.cut_bytes = cut(self._files, self._directory, fd, segment, tail.end)
            yield from write_again(self._files, fd, tail)
            self._seal(fd, segment, tail)
        finally:
            self._files.close(fd)
        if segment.sealed and not segment.damaged:
            self._write_hint(segment, bytes(rows))

    def _seal(self, fd: int, segment: Segment, tail: Tail) -> None:
        """Seal the last segment. On a full disk that may have to wait: reading needs no footer."""
        segment.sealed = is_sealed = seal_if_room(self._files, fd, segment, tail)
        if not is_sealed and self.reserve.release():
            segment.sealed = seal_if_room(self._files, fd, segment, tail)
        if not segment.sealed:
            self.result.unsealed = segment, tail

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
        elif frame.type == FrameType.PATCH:
            length = patch_row_length(frame)
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
        """Report a defect. Where the key is known, let reads of that session meet the damage.

        Its older versions must not come back: that would be a wrong value. For the same reason a
        damaged tombstone still is one, and a renewal too: all that they say is in their header,
        which is intact.
        """
        key, sequence = found.key, found.sequence
        reason = "the frame is cut off" if isinstance(found, Torn) else found.reason
        self._damage(segment.number, offset, _text(key) if key else None, reason)
        if not key or sequence is None or found.type is None:
            return
        self.result.last_sequence = max(self.result.last_sequence, sequence)
        rows += _row_of_damage(self._fingerprints.of(key), sequence, segment.number, offset, found)

    def _suspect(
        self, fd: int, segment: Segment, offset: int, found: Corrupt | Torn, sequence: int
    ) -> None:
        """Remember a frame that nobody can tell whose it was, until all others are known."""
        if segment.kind == SegmentKind.LOG and found.key is None:
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
                live[row.segment] -= row.live_bytes
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


def _row_of_damage(
    fingerprint: bytes, sequence: int, number: int, offset: int, found: Corrupt | Torn
) -> bytes:
    """Return the index row of a damaged frame whose header is known; b"" for a torn renewal."""
    times = (0.0, NEVER, NEVER)
    if found.type == FrameType.DELETE:
        length = ROW_IS_DELETE
    elif found.type in (FrameType.PUT, FrameType.PATCH):
        length = FRAME_OVERHEAD_BYTES  # at least
        if isinstance(found, Corrupt) and found.length is not None:
            length = found.length
    elif isinstance(found, Corrupt) and found.times is not None:
        length, times = ROW_IS_TOUCH, found.times
    else:
        return b""
    return INDEX_ROW.pack(fingerprint, sequence, *times, number, offset, length, 0)
