"""The append side of the log: encode on the event loop, write and sync in threads.

Order of an append: encode the frames of a batch for the active segment; write them all behind the
last good frame, going on after short writes; on a full disk cut the file back to the last good
frame; take the end *before* the sync; sync; only then advance the end, which is what acknowledges.

A sync that acknowledges nothing (``disk.fsync = "interval"`` and ``"never"``) runs in a thread of
its own, and appends go on meanwhile, into the same file. Hence one rule more: one sync of the log
at a time, under a lock. The kernel tells each failure once per open file: of two syncs at the same
time one may hear of it and the other be told that all is well. Whoever has waited for the lock asks
first whether the sync before it failed. What a sync covers is read before it starts; what is
appended meanwhile is left to the next one. A file is closed under the lock, so that no sync meets a
descriptor that is somebody else's by then.

Order of a rotation: footer and fdatasync the old segment; create the new one (O_EXCL), write its
header, fsync it, fsync the directory; only then encode a frame for it.

A sync that failed is never tried again on that file, and nothing read back from it is trusted: the
kernel may have dropped the dirty pages and report success next time (Rebello et al., "Can
Applications Recover from fsync Failures?", USENIX ATC 2020). The writer is *poisoned*: no more
writes until the directory is opened anew; reads go on.

Invariants: every frame of the active segment lies before `end` or is not acknowledged; sequence
numbers grow with every frame and are never used twice, not even those of a failed batch.
"""

from __future__ import annotations

import errno
import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock
from typing import Final, Protocol, TypeVar

from persistence.disk import patches
from persistence.disk.filenames import segment_name
from persistence.disk.files import NO_SPACE, Files, write_exactly
from persistence.disk.format import (
    COMPRESSION_MIN_BYTES,
    DELETE,
    FOOTER_PAYLOAD,
    FRAME_OVERHEAD_BYTES,
    INDEX_ROW,
    PATCH,
    PUT,
    RECORD_IDS_BYTES,
    ROW_IS_DELETE,
    ROW_IS_PATCH,
    ROW_IS_TOUCH,
    SALT_BYTES,
    SEALED,
    SEGMENT_HEADER_BYTES,
    TOUCH,
    FrameType,
    SegmentHeader,
    SegmentKind,
    compress,
    encode_frame,
    encode_segment_header,
    frame_ends,
    with_length,
)
from persistence.disk.patches import Base, Bases, patch_on
from persistence.disk.reserve import Reserve
from persistence.disk.sealed import RecordCodec
from persistence.disk.segments import Segment
from persistence.errors import DirectoryNotUsable, DiskFull, WriteOutcomeUnknown

_T = TypeVar("_T")
_pack_row = INDEX_ROW.pack
_log = logging.getLogger("persistence.disk")
_ROW_MARKS: Final = {DELETE: ROW_IS_DELETE, TOUCH: ROW_IS_TOUCH, PATCH: ROW_IS_PATCH}
_COMMIT: Final = slice(16, 32)  # of the ids
_BUILT_ON: Final = slice(32, 48)


class Write(Protocol):
    """One frame to be written, as the commit queue hands it over.

    The frame stores `record` without its two leading ids, which are in its header; None: nothing.
    `changed` are the new packed values, if only values of fields that were there before changed;
    of a large record then only what has changed may be stored (see `patches`). `length` is what
    the segment has to keep for it. The index row and what follows are filled in when it has been
    encoded.
    """

    kind: int
    key: bytes
    fingerprint: bytes
    record: bytes | None
    changed: dict[str, bytes] | None
    ids: bytes
    accessed: float
    deadline: float
    cap: float
    user: int
    row: bytes
    segment: int
    length: int


@dataclass(slots=True)
class ActiveSegment:
    """The segment that is open for append."""

    segment: Segment
    path: str
    fd: int
    end: int
    frames: int = 0
    rows: bytearray = field(default_factory=bytearray)
    lowest_sequence: int = 0
    highest_sequence: int = 0
    bases: Bases = field(default_factory=Bases)


class LogWriter:
    """Appends frames to the log. Encoding is called on the loop, the rest in the writer thread.

    Only `sync` may be called in another thread as well, at any time.

    Args:
        files: the system calls.
        directory: where the segments are.
        directory_id: its id, for segment headers.
        segment_bytes: when a segment has reached this it is sealed.
        compression: whether payloads may be compressed.
        next_number: asked for the number of each new segment.
        last_sequence: the highest sequence number that was ever used.
        skew: wall time minus engine time, seconds (see `clock.EngineTime`).
        reserve: space for a full disk; None: there is none.
        codec: seals payloads; None: they are stored as they are.

    Attributes:
        poisoned: why no more writes are taken until the directory is opened anew.
        full: why the last write or rotation found no space; None again after the next write.
        may_patch: whether patches may be written: once the manifest says that there may be some.
        would_patch: a patch would have been written, if it might.
        may_use_reserve: whether what is written now may use the space that is kept in reserve.
    """

    def __init__(  # noqa: PLR0913 - named, and each is used
        self,
        files: Files,
        directory: str,
        *,
        directory_id: bytes,
        segment_bytes: int,
        compression: bool,
        next_number: Callable[[], int],
        last_sequence: int,
        skew: Callable[[], float],
        reserve: Reserve | None = None,
        codec: RecordCodec | None = None,
    ) -> None:
        self._files = files
        self._directory = directory
        self._directory_id = directory_id
        self._segment_bytes = segment_bytes
        self._compression = compression
        self._next_number = next_number
        self._skew = skew
        self._reserve = reserve
        self._codec = codec
        self._seal = None if codec is None else codec.seal
        self._patch_min_bytes = patches.MIN_RECORD_BYTES
        self._large_bytes = min(self._patch_min_bytes, COMPRESSION_MIN_BYTES)
        self.may_patch = False
        self.would_patch = False
        self.may_use_reserve = False
        self.sequence = last_sequence
        self.durable_sequence = last_sequence
        self.active: ActiveSegment | None = None
        self.poisoned: str | None = None
        self.full: str | None = None
        self._pending_end = 0
        self._one_sync = Lock()  # held by whoever syncs or closes the active segment
        self._pending_rows = bytearray()  # for the hint; kept once the batch is in the log
        self.bytes_written = 0
        self.syncs = 0

    # --- on the event loop --------------------------------------------------------------------

    def has_room(self, nbytes: int) -> bool:
        """Whether frames of about `nbytes` may still go into the active segment.

        A frame larger than a whole segment gets a segment of its own.
        """
        active = self.active
        if active is None:
            return False
        empty = self._pending_end == SEGMENT_HEADER_BYTES
        return empty or self._pending_end + nbytes <= self._segment_bytes

    def begin(self) -> None:
        """Start encoding a batch behind the last good frame."""
        assert self.active is not None
        self._pending_end = self.active.end
        self._pending_rows.clear()
        self.active.bases.begin()

    def encode(self, writes: Sequence[Write]) -> bytes:
        """Encode frames of the batch, one behind the other, and note in each where it will be."""
        active = self.active
        assert active is not None, "make room first"
        salt_checksum = active.segment.salt_checksum
        number = active.segment.number
        durable_sequence = self.durable_sequence
        skew = self._skew()  # frames carry wall time
        sequence = self.sequence
        end = self._pending_end
        rows = self._pending_rows
        seal = self._seal
        large_bytes = self._large_bytes
        pieces: list[bytes] = []
        for write in writes:
            kind = write.kind
            record = write.record
            payload = b"" if record is None else record[RECORD_IDS_BYTES:]
            raw_bytes = len(payload)
            flags = 0
            sequence += 1
            key = write.key
            base_bytes = -1  # of a patch or a put that may be its base
            if raw_bytes >= large_bytes:
                kind, base_bytes, flags, payload, raw_bytes = self._large(write, payload, sequence)
            if seal is not None and kind == PUT:
                payload = seal(payload, key, sequence, write.ids, flags, raw_bytes)
                flags |= SEALED
            accessed, deadline, cap = write.accessed, write.deadline, write.cap
            user = write.user
            front, checksum = frame_ends(
                salt_checksum,
                kind,
                key,
                payload,
                sequence,
                durable_sequence,
                write.ids,
                accessed + skew,
                deadline + skew,
                cap + skew,
                user,
                flags,
                raw_bytes,
            )
            length = FRAME_OVERHEAD_BYTES + len(key) + len(payload)
            write.segment = number
            write.length = length
            write.row = _pack_row(
                write.fingerprint,
                sequence,
                accessed,
                deadline,
                cap,
                number,
                end,
                length if kind == PUT else _ROW_MARKS[kind],
                user,
            )
            if base_bytes >= 0:
                self._keep_base(write, kind, sequence, end, base_bytes)
            rows += write.row
            pieces += (front, payload, checksum)
            end += length
        self.sequence, self._pending_end = sequence, end
        return b"".join(pieces)

    def _large(
        self, write: Write, payload: bytes, sequence: int
    ) -> tuple[int, int, int, bytes, int]:
        """Return how a large record is stored: compressed, or as a patch.

        As (kind, bytes of the base, flags, payload, `raw_bytes`). The bytes of the base are 0 for
        a put that may be one, and -1 for one that may not.
        """
        raw_bytes = len(payload)
        base_bytes = -1
        if raw_bytes >= self._patch_min_bytes:
            assert self.active is not None
            patch = self._patch(self.active.bases, write, sequence)
            if patch is not None:
                return PATCH, *patch
            base_bytes = 0
        flags = 0
        if raw_bytes >= COMPRESSION_MIN_BYTES and self._compression:
            flags, payload = compress(payload)
        return write.kind, base_bytes, flags, payload, raw_bytes

    def _keep_base(
        self, write: Write, kind: int, sequence: int, offset: int, base_bytes: int
    ) -> None:
        """Note a put as a base, and that of a patch in its row: the segment has to keep it."""
        if kind == PUT:
            assert self.active is not None
            base = Base(offset, write.length, sequence, write.ids[_COMMIT])
            self.active.bases.note(write.fingerprint, base)
            return
        write.length += base_bytes
        write.row = with_length(write.row, ROW_IS_PATCH | write.length)

    def _patch(
        self, bases: Bases, write: Write, sequence: int
    ) -> tuple[int, int, bytes, int] | None:
        """Return what a large record is stored as, if a patch will do; None: as a whole.

        As (bytes of the base, flags, payload as stored, `raw_bytes`). The patch is noted: the next
        one is built on it.
        """
        changed = write.changed
        if not changed or write.record is None:
            return None
        base = bases.of(write.fingerprint, write.ids[_BUILT_ON])
        made = None if base is None else patch_on(base, write.record, write.ids[_COMMIT], changed)
        if made is None:
            return None
        if not self.may_patch:
            self.would_patch = True
            return None
        base, payload = made
        raw_bytes = len(payload)
        flags = 0
        if self._compression:
            flags, payload = compress(payload)
        if self._codec is not None:
            payload = self._codec.seal_patch(
                payload, write.key, sequence, write.ids, flags, raw_bytes, base.packed
            )
            flags |= SEALED
        bases.note(write.fingerprint, base)
        return base.length, flags, base.packed + payload, raw_bytes

    # --- in the writer thread -----------------------------------------------------------------

    def check_usable(self) -> None:
        """Raise WriteOutcomeUnknown once the writer is poisoned."""
        if self.poisoned is not None:
            raise WriteOutcomeUnknown(
                f"{self._directory} takes no more writes because an earlier one failed "
                f"({self.poisoned}); reads go on; check the disk, then open the directory again"
            )

    def append(self, chunks: list[bytes], frames: int, *, sync: bool) -> None:
        """Write the batch behind the last good frame and, if asked, sync it.

        Raises:
            DiskFull: nothing of the batch is in the log.
            WriteOutcomeUnknown: the sync failed, or the write did for another reason.
        """
        self.check_usable()
        try:
            self._with_reserve(lambda: self._append(chunks, frames, sync=sync))
        finally:
            self._pending_rows.clear()

    def _with_reserve(self, work: Callable[[], _T]) -> _T:
        """Do `work`; once more with the reserve, if the disk is full and that may be used."""
        try:
            return work()
        except DiskFull:
            if not (self.may_use_reserve and self._reserve and self._reserve.release()):
                raise
        return work()

    @property
    def _is_reserve_spent(self) -> bool:
        return self._reserve is not None and self._reserve.is_spent

    def regain_reserve(self) -> None:
        """Make the reserve again if it was used: before that, updates would use it up.

        Raises:
            DiskFull: there is no room for it.
        """
        if self._reserve is not None and self._reserve.is_spent and not self._reserve.make():
            self.full = self.full or f"{self._directory}: no space left for new writes"
            raise DiskFull(self.full)

    def _append(self, chunks: list[bytes], frames: int, *, sync: bool) -> None:
        active = self.active
        assert active is not None, "make room first"
        # Nothing is encoded while a batch is being written, so this is the batch's last one.
        last_sequence = self.sequence
        end = active.end
        try:
            for chunk in chunks:
                write_exactly(self._files, active.fd, chunk, end)
                end += len(chunk)
        except OSError as error:
            self._cut_back(active, error)
        if not self._is_reserve_spent:
            self.full = None
        if sync:
            with self._one_sync:
                self.check_usable()  # the sync that it waited for may have failed
                self._sync(active.fd, active.path)
                self._advance(active, end, frames, last_sequence)
                self.durable_sequence = last_sequence
        else:
            self.check_usable()  # a sync beside it may have failed: this will never be durable
            self._advance(active, end, frames, last_sequence)

    def _advance(self, active: ActiveSegment, end: int, frames: int, last_sequence: int) -> None:
        """Take what has been written into the log."""
        self.bytes_written += end - active.end
        active.end = active.segment.length = end
        active.rows += self._pending_rows
        active.bases.written()
        active.frames += frames
        active.highest_sequence = last_sequence  # last: a sync beside it covers up to here

    def _cut_back(self, active: ActiveSegment, error: OSError) -> None:
        """Restore the segment to its last good frame after a failed write; always raises."""
        try:
            self._files.truncate(active.fd, active.end)
        except OSError as second:
            self._poison(active.path, second)
        if error.errno not in NO_SPACE:
            self._poison(active.path, error)
        self.full = (
            f"{active.path}: no space left for new writes ({error.strerror}); reads and memory "
            "go on; free some space, writes then resume by themselves"
        )
        raise DiskFull(self.full) from error

    def _sync(self, fd: int, path: str) -> None:
        try:
            self._files.sync_data(fd)
        except OSError as error:
            self._poison(path, error)
        self.syncs += 1

    def _poison(self, path: str, error: OSError) -> None:
        self.poisoned = f"{path}: {error.strerror}"
        _log.error("%s: %s: no more writes are taken", path, error.strerror)
        raise WriteOutcomeUnknown(
            f"{path}: {error.strerror}: the update may or may not be durable; no more writes are "
            "taken, reads go on; check the disk, then open the directory again"
        ) from error

    @property
    def is_synced(self) -> bool:
        """Whether no frame that has been appended lacks its sync. To be asked anywhere."""
        active = self.active
        return active is None or self.durable_sequence >= active.highest_sequence

    def sync(self) -> None:
        """Sync what has been appended since the last sync. In any thread, beside an append.

        Raises:
            WriteOutcomeUnknown: it failed, or one before it did.
        """
        with self._one_sync:
            self.check_usable()
            active = self.active
            if active is None or self.is_synced:
                return
            highest = active.highest_sequence  # not what comes meanwhile
            self._sync(active.fd, active.path)
            self.durable_sequence = highest

    def seal(self) -> Segment | None:
        """Write the footer of the active segment and sync it; return it, with rows for its hint.

        Raises:
            DiskFull: there is no room for the footer; the segment stays active.
        """
        self.check_usable()
        active = self.active
        if active is None:
            return None
        footer = encode_footer(
            active.segment.salt_checksum,
            active.frames,
            active.lowest_sequence,
            self.sequence,
            durable_sequence=self.durable_sequence,
        )
        self.append([footer], 0, sync=True)
        self.close()
        # The rows first: from the moment that it counts as sealed compaction may take it, on the
        # loop, beside this thread, and without rows and a hint it would never touch it again.
        active.segment.rows = active.rows
        active.segment.sealed = True
        return active.segment

    def create(self) -> Segment:
        """Create the next segment and make it the active one.

        Raises:
            DiskFull: there is no room for it; nothing is left behind.
        """
        self.check_usable()
        segment = self._with_reserve(self._create)
        if self._reserve is not None and not self.may_use_reserve:
            self._reserve.make()
        return segment

    def _create(self) -> Segment:
        number = self._next_number()
        header = SegmentHeader(
            SegmentKind.LOG,
            number,
            self.sequence,
            self._directory_id,
            secrets.token_bytes(SALT_BYTES),
        )
        path = f"{self._directory}/{segment_name(number)}"
        try:
            fd = create_segment(self._files, self._directory, path, header)
        except DiskFull as error:
            self.full = str(error)
            raise
        segment = Segment.of(header)
        self.active = ActiveSegment(
            segment,
            path,
            fd,
            SEGMENT_HEADER_BYTES,
            lowest_sequence=self.sequence + 1,
            highest_sequence=self.sequence,
        )
        self._pending_end = SEGMENT_HEADER_BYTES
        return segment

    def close(self) -> None:
        """Close the active segment's file."""
        with self._one_sync:
            if self.active is not None:
                self._files.close(self.active.fd)
                self.active = None


def encode_footer(
    salt_checksum: int, frames: int, lowest: int, highest: int, *, durable_sequence: int
) -> bytes:
    """Encode the last frame of a sealed segment.

    `durable_sequence` is what had been synced before, as in any other frame: a footer that reached
    the disk is no proof that what lies in front of it did.
    """
    return encode_frame(
        salt_checksum,
        FrameType.FOOTER,
        b"",
        FOOTER_PAYLOAD.pack(frames, lowest, highest),
        sequence=highest,
        durable_sequence=durable_sequence,
    )


def create_segment(files: Files, directory: str, path: str, header: SegmentHeader) -> int:
    """Create a segment durably and return its descriptor; on failure leave nothing behind.

    Raises:
        DiskFull: no room, or no inodes.
        DirectoryNotUsable: too many open files; nothing happened.
        WriteOutcomeUnknown: it may or may not be there after a crash; recovery copes with both.
    """
    fd = -1
    is_opening = True  # what fails for want of descriptors is the opening of something
    try:
        fd = files.create(path)
        is_opening = False
        write_exactly(files, fd, encode_segment_header(header), 0)
        files.sync(fd)
        is_opening = True
        files.sync_directory(directory)
    except OSError as error:
        with suppress(OSError):  # the first error is the one to report
            if fd >= 0:
                files.close(fd)
                files.remove(path)
        if error.errno in NO_SPACE:
            raise DiskFull(
                f"{path}: no space left for a new segment ({error.strerror}); reads and memory "
                "go on; free some space, writes then resume by themselves"
            ) from error
        if is_opening and error.errno in (errno.EMFILE, errno.ENFILE):
            raise DirectoryNotUsable(
                f"{path}: too many open files: the update did not happen; raise RLIMIT_NOFILE, or "
                "close some, writes then go on by themselves"
            ) from error
        raise WriteOutcomeUnknown(f"{path}: cannot be created: {error.strerror}") from error
    return fd
