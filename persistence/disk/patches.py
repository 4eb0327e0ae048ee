"""Patches: what has changed in a large session since its record was last written as a whole.

An update of one small field of a 40 KiB session would otherwise write all of it: joined, compressed
and checksummed. A patch frame holds the values of all fields that have changed since a put, its
*base*, with their newest values. So there are no chains: each patch takes the place of the one
before it, a session is its base and at most one patch, and a patch that has grown to a fraction of
its base is written as a whole record instead.

Invariants:
- The base is an earlier put of the same session in the same segment. So whatever keeps, seals,
  moves or loses the one does the same to the other, no prefix of a log holds a patch without its
  base, and compaction, which only touches sealed segments, always writes the whole record.
- In the index and in hints the length of a patch is that of both frames: what a segment has to keep
  is counted right, whatever takes the place of what.
- A patch is only written on the very commit that the table of bases knows as the newest here.
- A patch says which put is its base (place, length, sequence number), and how long the whole record
  is, with its checksum: what does not fit together never becomes a value.

Pure but for the reads that it is handed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from struct import Struct
from struct import error as struct_error
from typing import Final, NamedTuple, Protocol, TypeAlias

from crc32c import crc32c

from persistence.disk.format import (
    COMPRESSED,
    FRAME_OVERHEAD_BYTES,
    PATCH_BASE,
    PATCH_BASE_BYTES,
    RECORD_IDS_BYTES,
    SEALED,
    Frame,
    FrameType,
    Torn,
    compress,
    decode_frame,
    decompress,
    encode_again,
    record_of,
)
from persistence.disk.sealed import NOT_SEALED_HERE
from persistence.record import MalformedValue, changes_of, with_changes

MIN_RECORD_BYTES: Final = 8 * 1024
"""Smaller records are always written whole: there is little to win."""
MAX_BASE_FRACTION: Final = 1 / 4
"""A patch takes at most this much of what its base takes on disk."""
_MAX_BASES: Final = 4096
_FIRST_BYTES: Final = 4096  # most patches are shorter
_WHOLE: Final = Struct("<II")  # bytes of the whole record without its ids, and their CRC-32C
_DAMAGED: Final = "the stored bytes fail their checksum"
_NO_BASE: Final = "the record that its patch is built on is damaged"


# --- writing --------------------------------------------------------------------------------------


class Base(NamedTuple):
    """A put that patches may be built on.

    Attributes:
        offset: where it is in the segment.
        length: bytes of the frame.
        sequence: its sequence number.
        commit: the newest commit of the session here: that of the put, or of the last patch.
        names: the fields that have changed since the put.
    """

    offset: int
    length: int
    sequence: int
    commit: bytes
    names: tuple[str, ...] = ()

    @property
    def packed(self) -> bytes:
        """How the payload of a patch starts."""
        return PATCH_BASE.pack(self.offset, self.length, self.sequence)


class Bases:
    """The puts in the active segment that patches may be built on: some thousand at most.

    What is noted for a batch only counts once that is in the log.
    """

    def __init__(self) -> None:
        self._written: dict[bytes, Base] = {}
        self._pending: dict[bytes, Base] = {}

    def begin(self) -> None:
        """Forget what was noted for a batch that did not get into the log."""
        self._pending.clear()

    def written(self) -> None:
        """Take in what was noted for the batch, now that it is in the log."""
        known = self._written
        known.update(self._pending)
        self._pending.clear()
        while len(known) > _MAX_BASES:
            del known[next(iter(known))]

    def note(self, fingerprint: bytes, base: Base) -> None:
        """Note a put, or a patch on one."""
        self._pending[fingerprint] = base

    def of(self, fingerprint: bytes, commit: bytes) -> Base | None:
        """Return the base of a session, if `commit` is the newest that is here of it."""
        base = self._pending.get(fingerprint) or self._written.get(fingerprint)
        return base if base is not None and base.commit == commit else None


def patch_on(
    base: Base, record: bytes, commit: bytes, changed: Mapping[str, bytes]
) -> tuple[Base, bytes] | None:
    """Return the next base, and the payload of a patch (without where its base is).

    None: it would be too large.

    Args:
        base: what it is built on.
        record: the whole new record.
        commit: its commit id.
        changed: the values that have changed since `base.commit`.
    """
    names = (*base.names, *(name for name in changed if name not in base.names))
    changes = changes_of(record, names)
    if len(changes) > MAX_BASE_FRACTION * base.length:
        return None
    raw = memoryview(record)[RECORD_IDS_BYTES:]
    return base._replace(commit=commit, names=names), _WHOLE.pack(len(raw), crc32c(raw)) + changes


# --- reading --------------------------------------------------------------------------------------


class Records(Protocol):
    """How the payloads of a directory are read: sealed or not."""

    def record_of(self, frame: Frame) -> bytes | None:
        """Return the record of a put; None: there is none in it."""

    def patch_of(self, frame: Frame) -> bytes | None:
        """Return the payload of a patch behind where its base is; None: there is none in it."""


class PlainRecords:
    """Payloads of a directory that is not encrypted."""

    @staticmethod
    def record_of(frame: Frame) -> bytes | None:
        """Return the record of a put; None: there is none in it."""
        return record_of(frame)

    @staticmethod
    def patch_of(frame: Frame) -> bytes | None:
        """Return the payload of a patch behind where its base is; None: there is none in it."""
        if frame.flags & SEALED:
            return None
        return decompress(frame.flags, frame.payload[PATCH_BASE_BYTES:], frame.raw_bytes)


class Patched(NamedTuple):
    """A patch and the whole record that it makes of its base.

    `was_compressed`: its base was.
    """

    frame: Frame
    record: bytes
    was_compressed: bool


Read: TypeAlias = Callable[[int, int], bytes | None]
"""Returns at most so many bytes of the segment: (offset, bytes); None: they cannot be had now."""


def read_patched(
    read: Read, offset: int, salt_checksum: int, records: Records, key: bytes | None = None
) -> Patched | str | None:
    """Read a patch and its base.

    Args:
        read: reads in the segment.
        offset: where the patch is.
        salt_checksum: of the segment.
        records: how payloads are read.
        key: whose it must be; None: whosever it is.

    Returns:
        What they make, why they make nothing, or None where `read` gave none.
    """
    data = read(offset, _FIRST_BYTES)
    patch = None if data is None else decode_frame(data, 0, salt_checksum)
    if isinstance(patch, Torn):
        data = read(offset, patch.needed_bytes)
        patch = None if data is None else decode_frame(data, 0, salt_checksum)
    if patch is None:
        return None
    if not isinstance(patch, Frame) or patch.type != FrameType.PATCH:
        return _DAMAGED
    if key is not None and patch.key != key:
        return _DAMAGED
    return with_base(read, offset, patch, salt_checksum, records)


def with_base(
    read: Read, offset: int, patch: Frame, salt_checksum: int, records: Records
) -> Patched | str | None:
    """Read the base of a patch that has been read; see `read_patched`."""
    if len(patch.payload) < PATCH_BASE_BYTES:
        return _DAMAGED
    base_offset, base_bytes, sequence = PATCH_BASE.unpack_from(patch.payload)
    if base_bytes < FRAME_OVERHEAD_BYTES or base_offset + base_bytes > offset:
        return _DAMAGED
    data = read(base_offset, base_bytes)
    if data is None:
        return None
    base = decode_frame(data, 0, salt_checksum)
    if not isinstance(base, Frame) or not _is_base_of(patch, base, sequence):
        return _NO_BASE
    before, changes = records.record_of(base), records.patch_of(patch)
    if before is None or changes is None:
        return NOT_SEALED_HERE
    record = patched_record(before, patch.incarnation + patch.commit, changes)
    if record is None:
        return "the patch does not fit the record that it is built on"
    return Patched(patch, record, bool(base.flags & COMPRESSED))


def _is_base_of(patch: Frame, base: Frame, sequence: int) -> bool:
    return (
        base.type == FrameType.PUT
        and base.sequence == sequence
        and base.key == patch.key
        and base.incarnation == patch.incarnation
    )


def patched_record(base: bytes, ids: bytes, patch: bytes) -> bytes | None:
    """Return the record that a patch makes of its base; None: they do not fit together."""
    try:
        raw_bytes, checksum = _WHOLE.unpack_from(patch)
        record = with_changes(base, ids, patch[_WHOLE.size :])
    except (MalformedValue, struct_error):
        return None
    raw = memoryview(record)[RECORD_IDS_BYTES:]
    return record if (len(raw), crc32c(raw)) == (raw_bytes, checksum) else None


class Seal(Protocol):
    """Seals the payload of a put; see `sealed.RecordCodec.seal`."""

    def __call__(  # noqa: D102 - as there
        self,
        payload: bytes,
        key: bytes,
        sequence: int,
        ids: bytes,
        flags: int,
        raw_bytes: int,
        /,
    ) -> bytes: ...


def as_put(patched: Patched, salt_checksum: int, seal: Seal | None) -> bytes:
    """Return the frame of the whole record, for a segment with this salt: the same commit."""
    frame = patched.frame
    payload = patched.record[RECORD_IDS_BYTES:]
    raw_bytes = len(payload)
    flags = 0
    if patched.was_compressed:
        flags, payload = compress(payload)
    if seal is not None:
        payload = seal(payload, frame.key, frame.sequence, frame.ids, flags, raw_bytes)
        flags |= SEALED
    put = frame._replace(type=FrameType.PUT, payload=payload, flags=flags, raw_bytes=raw_bytes)
    return encode_again(put, salt_checksum)
