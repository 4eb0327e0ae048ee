"""THE disk format: constants and pure encoders and decoders. No IO, no clock, no asyncio.

All numbers are little-endian, nothing is padded. ``docs/format.md`` is checked against the tables
`SEGMENT_HEADER_FIELDS`, `FRAME_HEADER_FIELDS`, `INDEX_ROW_FIELDS` and the constants here.

A *segment* is a header followed by frames. A *frame* is header, header checksum, key, payload,
checksum. Both checksums are CRC-32C (Castagnoli; RFC 3720, appendix B.4) that start from the
segment's random *salt*, so that a stale frame of another file, or a frame inside a payload, never
passes for one of this segment. The header checksum covers header and key: a reader knows whose
frame it is, and how long, even when the payload is damaged.

What a reader does with what it does not know: a segment or manifest of another format version is
refused as a whole; a frame of an unknown type with valid checksums is corruption (nothing of this
version writes one); a hint or index snapshot it does not know is ignored, and the log is scanned.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final, NamedTuple

import lz4.block
from crc32c import crc32c

FORMAT_VERSION: Final = 2
PATCHES_VERSION: Final = 3
"""Of the manifest, once there may be patches: who does not know them must not open the directory,
or it would take them for damage. Segments and caches stay `FORMAT_VERSION`."""

# --- segment header ---------------------------------------------------------------------------

SEGMENT_MAGIC: Final = b"PERSSEG\x01"
SEGMENT_HEADER_FIELDS: Final = (
    ("magic", "8s", "`PERSSEG` and the byte 0x01"),
    ("format_version", "I", "2; any other is refused"),
    ("kind", "I", "1: log segment, 2: output of a compaction"),
    ("number", "Q", "the number in the file's name"),
    ("base_sequence", "Q", "every frame of a log segment has a higher sequence number"),
    ("directory_id", "16s", "the random id of the directory it belongs to"),
    ("salt", "12s", "random; both checksums of every frame start from it"),
    ("checksum", "I", "CRC-32C of everything before"),
)
_SEGMENT_HEADER: Final = Struct("<8sIIQQ16s12s")
SEGMENT_HEADER_BYTES: Final = _SEGMENT_HEADER.size + 4
SALT_BYTES: Final = 12
NO_IDS: Final = bytes(48)


class SegmentKind(IntEnum):
    """What a segment was written by."""

    LOG = 1
    MERGED = 2


class SegmentHeader(NamedTuple):
    """The decoded header of a segment."""

    kind: SegmentKind
    number: int
    base_sequence: int
    directory_id: bytes
    salt: bytes

    @property
    def salt_checksum(self) -> int:
        """The CRC-32C from which every checksum of the segment's frames goes on."""
        return crc32c(self.salt)


class OtherFormat(ValueError):
    """The bytes are of a format version that this code does not read."""


def check_version(version: int, known: int, newest: int = 0) -> None:
    """Refuse a format version other than `known`, and `newest` if there is such a one.

    Raises:
        OtherFormat: it says what to do.
    """
    reads = f"{known} and {newest}" if newest else str(known)
    if version > max(known, newest):
        raise OtherFormat(
            f"format version {version}; this library reads {reads}: use a newer version of the "
            "library"
        )
    if version < known:
        raise OtherFormat(
            f"format version {version}; this library reads {reads}: export with the version of "
            "the library that wrote it, and import here"
        )


def encode_segment_header(header: SegmentHeader) -> bytes:
    """Encode the header of a segment: `SEGMENT_HEADER_BYTES` bytes."""
    body = _SEGMENT_HEADER.pack(
        SEGMENT_MAGIC,
        FORMAT_VERSION,
        header.kind,
        header.number,
        header.base_sequence,
        header.directory_id,
        header.salt,
    )
    return body + _CHECKSUM.pack(crc32c(body))


def decode_segment_header(data: bytes) -> SegmentHeader | None:
    """Decode the start of a segment; None when it is torn or damaged.

    Raises:
        OtherFormat: intact, and of another format version.
    """
    if len(data) < SEGMENT_HEADER_BYTES:
        return None
    body = data[: _SEGMENT_HEADER.size]
    (checksum,) = _CHECKSUM.unpack_from(data, _SEGMENT_HEADER.size)
    magic, version, kind, number, base, directory_id, salt = _SEGMENT_HEADER.unpack(body)
    if magic != SEGMENT_MAGIC or checksum != crc32c(body):
        return None
    check_version(version, FORMAT_VERSION)
    if kind not in (SegmentKind.LOG, SegmentKind.MERGED):
        return None
    return SegmentHeader(SegmentKind(kind), number, base, directory_id, salt)


# --- frames -----------------------------------------------------------------------------------

# Not zero, because crc32c(b"") == 0 would let an all-zero header pass, and not UTF-8 text.
FRAME_MAGIC: Final = b"\xf5PF\xa1"
FRAME_HEADER_FIELDS: Final = (
    ("magic", "4s", "0xF5 `PF` 0xA1"),
    ("type", "B", "see the frame types"),
    ("flags", "B", "bit 0: the payload is an LZ4 block; bit 1: the payload is sealed"),
    ("key_bytes", "H", "length of the key: the session id as UTF-8, 1 to 512; 0 in a footer"),
    ("payload_bytes", "I", "length of the payload as stored"),
    ("raw_bytes", "I", "length of the payload once decompressed"),
    ("sequence", "Q", "order of all frames of a directory; never used twice"),
    ("durable_sequence", "Q", "everything up to here had been synced when this was written"),
    ("incarnation", "16s", "incarnation id of the session"),
    ("commit", "16s", "id of this commit"),
    ("base", "16s", "id of the commit it was built on; zeros at a creation"),
    ("accessed", "d", "last accessed, wall seconds"),
    ("deadline", "d", "deadline, wall seconds; infinity: never expires"),
    ("cap", "d", "deadline that no renewal moves, wall seconds; infinity: none"),
    ("user", "I", "bits 0-30: CRC-32C of the user id, 0: none; bit 31: an access renews"),
    ("header_checksum", "I", "CRC-32C of salt, header and key"),
)
_FRAME_HEADER: Final = Struct("<4sBBHIIQQ48sdddI")
_CHECKSUM: Final = Struct("<I")
_pack_header = _FRAME_HEADER.pack
_pack_checksum = _CHECKSUM.pack
_unpack_header = _FRAME_HEADER.unpack_from
_unpack_checksum = _CHECKSUM.unpack_from

FRAME_HEADER_BYTES: Final = _FRAME_HEADER.size + 4  # with the header checksum
FRAME_OVERHEAD_BYTES: Final = FRAME_HEADER_BYTES + 4
MAX_KEY_BYTES: Final = 512
MAX_PAYLOAD_BYTES: Final = 2**31
_HEADER_SIZE: Final = _FRAME_HEADER.size


class FrameType(IntEnum):
    """Frame types. An unknown type with valid checksums is corruption."""

    PUT = 1  # a whole record without its two leading ids, which are in the header
    DELETE = 2  # a tombstone; no payload, `accessed` in the header says when
    TOUCH = 3  # a renewal; no payload, its times are in the header
    PATCH = 4  # what has changed since a put of the same segment; see `patches`
    FOOTER = 5  # the last frame of a sealed segment; payload: FOOTER_PAYLOAD


# The same as plain ints, for the paths where an enum member's look-up is felt.
PUT: Final = int(FrameType.PUT)
DELETE: Final = int(FrameType.DELETE)
TOUCH: Final = int(FrameType.TOUCH)
PATCH: Final = int(FrameType.PATCH)

COMPRESSED: Final = 1
SEALED: Final = 2
_KNOWN_FLAGS: Final = COMPRESSED | SEALED
COMPRESSION_MIN_BYTES: Final = 1024
RECORD_IDS_BYTES: Final = 32

PATCH_BASE_FIELDS: Final = (
    ("offset", "I", "where the put starts on which it is built, in the same segment"),
    ("length", "I", "bytes of that put"),
    ("sequence", "Q", "sequence number of that put"),
)
PATCH_BASE: Final = Struct("<IIQ")  # how the payload of a patch starts, never sealed
PATCH_BASE_BYTES: Final = PATCH_BASE.size

FOOTER_PAYLOAD: Final = Struct("<QQQ")  # frames, lowest sequence, highest sequence
FOOTER_BYTES: Final = FRAME_OVERHEAD_BYTES + FOOTER_PAYLOAD.size


class Frame(NamedTuple):
    """One decoded frame; `payload` is as stored (compressed if `flags` says so)."""

    type: FrameType
    flags: int
    key: bytes
    payload: bytes
    raw_bytes: int
    sequence: int
    durable_sequence: int
    incarnation: bytes
    commit: bytes
    base: bytes
    accessed: float
    deadline: float
    cap: float
    user: int

    @property
    def length(self) -> int:
        """Bytes of the whole frame on disk."""
        return FRAME_OVERHEAD_BYTES + len(self.key) + len(self.payload)

    @property
    def ids(self) -> bytes:
        """Incarnation, commit and base, one behind the other."""
        return self.incarnation + self.commit + self.base


class Torn(NamedTuple):
    """The bytes end before the frame does: wait for more, or a torn tail.

    The rest is known when header and key are there and intact.
    """

    needed_bytes: int
    key: bytes | None = None
    sequence: int | None = None
    type: FrameType | None = None


class Corrupt(NamedTuple):
    """The bytes are not a frame of this segment.

    The rest is known when the header and the key are intact, or could be mended (see `mending`).
    `times` are accessed, deadline and cap.
    """

    reason: str
    key: bytes | None = None
    length: int | None = None
    sequence: int | None = None
    type: FrameType | None = None
    times: tuple[float, float, float] | None = None
    is_mended: bool = False


def encode_frame(  # noqa: PLR0913, PLR0917 - one parameter a field; keywords are felt here
    salt_checksum: int,
    frame_type: int,
    key: bytes,
    payload: bytes | memoryview,
    sequence: int,
    durable_sequence: int,
    ids: bytes = NO_IDS,
    accessed: float = 0.0,
    deadline: float = 0.0,
    cap: float = 0.0,
    user: int = 0,
    flags: int = 0,
    raw_bytes: int | None = None,
) -> bytes:
    """Encode one frame.

    `payload` is as it is to be stored (see `compress`); `ids` are incarnation, commit and base,
    one behind the other; times are wall seconds.
    """
    front, checksum = frame_ends(
        salt_checksum,
        frame_type,
        key,
        payload,
        sequence,
        durable_sequence,
        ids,
        accessed,
        deadline,
        cap,
        user,
        flags,
        len(payload) if raw_bytes is None else raw_bytes,
    )
    return b"".join((front, payload, checksum))


def encode_again(frame: Frame, salt_checksum: int) -> bytes:
    """Encode a frame, as it was read or with some of it replaced, for a segment with this salt."""
    return encode_frame(
        salt_checksum,
        frame.type,
        frame.key,
        frame.payload,
        frame.sequence,
        frame.durable_sequence,
        frame.ids,
        frame.accessed,
        frame.deadline,
        frame.cap,
        frame.user,
        frame.flags,
        frame.raw_bytes,
    )


def frame_ends(  # noqa: PLR0913, PLR0917 - as `encode_frame`
    salt_checksum: int,
    frame_type: int,
    key: bytes,
    payload: bytes | memoryview,
    sequence: int,
    durable_sequence: int,
    ids: bytes,
    accessed: float,
    deadline: float,
    cap: float,
    user: int,
    flags: int,
    raw_bytes: int,
) -> tuple[bytes, bytes]:
    """Return what a frame has in front of its payload, and the checksum behind it.

    So that a batch of frames is put together in one piece, without copying each payload twice.
    """
    header = _pack_header(
        FRAME_MAGIC,
        frame_type,
        flags,
        len(key),
        len(payload),
        raw_bytes,
        sequence,
        durable_sequence,
        ids,
        accessed,
        deadline,
        cap,
        user,
    )
    front = b"".join((header, _pack_checksum(crc32c(key, crc32c(header, salt_checksum))), key))
    return front, _pack_checksum(crc32c(payload, crc32c(front, salt_checksum)))


def decode_frame(
    data: bytes | bytearray | memoryview, offset: int, salt_checksum: int
) -> Frame | Torn | Corrupt:
    """Decode the frame at `offset`, checking both checksums.

    Never raises for any input, and never needs more memory than the frame itself.
    """
    here = len(data) - offset
    if here < FRAME_HEADER_BYTES:
        return Torn(FRAME_HEADER_BYTES)
    (magic, kind, flags, key_bytes, payload_bytes, raw_bytes, sequence, durable, ids, *rest) = (
        _unpack_header(data, offset)
    )
    if magic != FRAME_MAGIC:
        return Corrupt("no frame starts here")
    if key_bytes > MAX_KEY_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        return Corrupt("the frame header is damaged")
    key_end = offset + FRAME_HEADER_BYTES + key_bytes
    if len(data) < key_end:
        return Torn(FRAME_HEADER_BYTES + key_bytes)
    view = memoryview(data)
    key = bytes(view[offset + FRAME_HEADER_BYTES : key_end])
    header = view[offset : offset + _HEADER_SIZE]
    if _unpack_checksum(data, offset + _HEADER_SIZE)[0] != crc32c(
        key, crc32c(header, salt_checksum)
    ):
        return Corrupt("the frame header is damaged")
    length = FRAME_OVERHEAD_BYTES + key_bytes + payload_bytes
    if here < length:
        return Torn(length, key, sequence, FrameType(kind) if kind in _KNOWN_TYPES else None)
    if kind not in _KNOWN_TYPES or flags & ~_KNOWN_FLAGS:
        return Corrupt(f"frame type {kind} with flags {flags} is not known", key, length)
    end = offset + length - 4
    if _unpack_checksum(data, end)[0] != crc32c(view[offset:end], salt_checksum):
        times = (rest[0], rest[1], rest[2])
        return Corrupt("the payload is damaged", key, length, sequence, FrameType(kind), times)
    payload = bytes(view[key_end:end])
    return Frame(
        FrameType(kind),
        flags,
        key,
        payload,
        raw_bytes,
        sequence,
        durable,
        ids[:16],
        ids[16:32],
        ids[32:],
        *rest,
    )


_KNOWN_TYPES: Final = frozenset(
    {FrameType.PUT, FrameType.DELETE, FrameType.TOUCH, FrameType.PATCH, FrameType.FOOTER}
)


def corrupt_behind_header(head: bytes, reason: str) -> Corrupt | None:
    """Return what is known of a damaged frame by header and key; None if they make no sense."""
    magic, kind, flags, key_bytes, payload_bytes, _, sequence, _, _, *times, _ = _unpack_header(
        head, 0
    )
    if magic != FRAME_MAGIC or kind not in _KNOWN_TYPES or flags & ~_KNOWN_FLAGS:
        return None
    key = head[FRAME_HEADER_BYTES : FRAME_HEADER_BYTES + key_bytes]
    length = FRAME_OVERHEAD_BYTES + key_bytes + payload_bytes
    if payload_bytes > MAX_PAYLOAD_BYTES or len(key) != key_bytes:
        return None
    of = (times[0], times[1], times[2])
    return Corrupt(reason, key, length, sequence, FrameType(kind), of, is_mended=True)


def is_intact(frame: bytes, salt_checksum: int) -> bool:
    """Whether the checksum of a whole frame is right."""
    return crc32c(frame, salt_checksum) == _INTACT


def frame_length(data: bytes, offset: int) -> int | None:
    """Return the length that the frame header at `offset` says, unverified; None: no header."""
    if len(data) < offset + FRAME_HEADER_BYTES or data[offset : offset + 4] != FRAME_MAGIC:
        return None
    _, _, _, key_bytes, payload_bytes, *_ = _unpack_header(data, offset)
    return FRAME_OVERHEAD_BYTES + int(key_bytes) + int(payload_bytes)


def restamp(
    data: bytes | memoryview, old_salt_checksum: int, new_salt_checksum: int
) -> bytes | None:
    """Move one frame to a segment with another salt; None when its checksum is wrong."""
    view = memoryview(data)
    end = len(view) - 4
    if _unpack_checksum(view, end)[0] != crc32c(view[:end], old_salt_checksum):
        return None
    key_bytes = int.from_bytes(view[6:8], "little")
    key = view[FRAME_HEADER_BYTES : FRAME_HEADER_BYTES + key_bytes]
    header = view[:_HEADER_SIZE]
    header_checksum = _pack_checksum(crc32c(key, crc32c(header, new_salt_checksum)))
    body = b"".join((header, header_checksum, view[FRAME_HEADER_BYTES:end]))
    return body + _pack_checksum(crc32c(body, new_salt_checksum))


def compress(payload: bytes) -> tuple[int, bytes]:
    """Return (flags, payload as stored): LZ4 when that saves at least an eighth."""
    if len(payload) < COMPRESSION_MIN_BYTES:
        return 0, payload
    packed: bytes = lz4.block.compress(payload, store_size=False)
    if len(packed) > len(payload) - len(payload) // 8:
        return 0, payload
    return COMPRESSED, packed


def decompress(flags: int, payload: bytes, raw_bytes: int) -> bytes | None:
    """Undo `compress`; None when the block does not expand to exactly `raw_bytes`.

    Memory is bounded by `raw_bytes`, which the header's checksum vouches for; LZ4 expands at most
    255 times, which bounds it once more.
    """
    if not flags & COMPRESSED:
        return payload if len(payload) == raw_bytes else None
    if raw_bytes > 255 * len(payload) + 64:
        return None
    try:
        raw: bytes = lz4.block.decompress(payload, uncompressed_size=raw_bytes)
    except lz4.block.LZ4BlockError:
        return None
    return raw if len(raw) == raw_bytes else None


def record_of(frame: Frame) -> bytes | None:
    """Return the record of a put frame; None when its payload does not decompress, or is sealed."""
    if frame.flags & SEALED:
        return None
    raw = decompress(frame.flags, frame.payload, frame.raw_bytes)
    return None if raw is None else b"".join((frame.incarnation, frame.commit, raw))


_IDS_AT: Final = 32
_IDS_END: Final = _IDS_AT + RECORD_IDS_BYTES

_INTACT: Final = 0x48674BC7
"""CRC-32C of anything followed by its own CRC-32C: the residue of the polynomial. It does not
depend on the salt, so one pass over a whole frame checks it."""

_PLAIN_PUT, _COMPRESSED_PUT = (
    {
        Struct("<4sBBH").pack(FRAME_MAGIC, PUT, flags, key_bytes): key_bytes
        for key_bytes in range(MAX_KEY_BYTES + 1)
    }
    for flags in (0, COMPRESSED)
)
# How put frames start: the length of their key by their first 8 bytes. The payload's length and
# its length once decompressed follow, at 8 and 12.


def read_put(data: bytes, key: bytes, salt_checksum: int) -> bytes | None:
    """Return the record of a put frame of `key`, the short way: `data` is exactly the frame.

    None when anything is not as it should be; `decode_frame` then says what.
    """
    if crc32c(data, salt_checksum) != _INTACT:
        return None
    # From here on it is what was written: the frame ends where its header says.
    start = FRAME_HEADER_BYTES + len(key)
    if data[FRAME_HEADER_BYTES:start] != key:
        return None
    if _PLAIN_PUT.get(data[:8]) == len(key) and data[8:12] == data[12:16]:
        return data[_IDS_AT:_IDS_END] + data[start:-4]
    if _COMPRESSED_PUT.get(data[:8]) != len(key):
        return None
    raw_bytes = int.from_bytes(data[12:16], "little")
    raw = decompress(COMPRESSED, data[start:-4], raw_bytes)
    return None if raw is None else data[_IDS_AT:_IDS_END] + raw


def patch_row_length(frame: Frame) -> int:
    """Return the length in the index row of a patch: what has to stay for it, its base included."""
    base_bytes = 0
    if len(frame.payload) >= PATCH_BASE_BYTES:
        base_bytes = PATCH_BASE.unpack_from(frame.payload)[1]
    return ROW_IS_PATCH | (frame.length + base_bytes & ROW_LENGTH_BITS)


# --- index rows: entries of the in-memory index, of hints and of index snapshots --------------

INDEX_ROW_FIELDS: Final = (
    ("fingerprint", "16s", "keyed BLAKE2b-128 of the session id"),
    ("sequence", "Q", "sequence number of the frame"),
    ("accessed", "d", "last accessed, seconds"),
    ("deadline", "d", "deadline, seconds; infinity: never expires"),
    ("cap", "d", "deadline that no renewal moves, seconds; infinity: none"),
    ("segment", "I", "number of the segment"),
    ("offset", "I", "where the frame starts in it"),
    (
        "length",
        "I",
        "bits 0-30: bytes of the frame, with its base if it is a patch; bit 31: it is one; in "
        "hints 0 marks a tombstone, 1 a touch",
    ),
    ("user", "I", "bits 0-30: CRC-32C of the user id, 0: none; bit 31: an access renews"),
)
INDEX_ROW: Final = Struct("<16sQdddIIII")
INDEX_ROW_BYTES: Final = INDEX_ROW.size
USER_BITS: Final = (1 << 31) - 1
ROW_RENEWS: Final = 1 << 31
ROW_IS_DELETE: Final = 0
ROW_IS_TOUCH: Final = 1
ROW_IS_PATCH: Final = 1 << 31
ROW_LENGTH_BITS: Final = (1 << 31) - 1  # no frame is that long: a session has 1 GiB at most


_ROW_LENGTH_AT: Final = INDEX_ROW_BYTES - 8


def with_length(row: bytes, length: int) -> bytes:
    """Return an index row with another length."""
    return row[:_ROW_LENGTH_AT] + _pack_checksum(length) + row[_ROW_LENGTH_AT + 4 :]


def user_tag(user_id: str | None) -> int:
    """Return the 31 bits under which a user's sessions are found; 0: no user."""
    if not user_id:
        return 0
    return crc32c(user_id.encode("utf-8", "surrogatepass")) & USER_BITS or 1


CACHE_MAGIC: Final = b"PERSCACH"
CACHE_HEADER_FIELDS: Final = (
    ("magic", "8s", "`PERSCACH`"),
    ("format_version", "I", "2; any other is ignored"),
    ("body_checksum", "I", "CRC-32C of the body"),
    ("directory_id", "16s", "the directory it belongs to"),
    ("skew", "d", "seconds to add to the rows' times to get wall time"),
    ("body_bytes", "Q", "length of the body"),
    ("covers", "32s", "SHA-256 of number, length and salt of the segments it describes"),
    ("checksum", "I", "CRC-32C of everything before"),
)
_CACHE_HEADER: Final = Struct("<8sII16sdQ32s")
CACHE_HEADER_BYTES: Final = _CACHE_HEADER.size + 4


def encode_cache_header(
    directory_id: bytes, covers: bytes, skew: float, body: bytes | bytearray
) -> bytes:
    """Encode what is in front of the body of a hint or an index snapshot.

    Both are caches: when in doubt, scan. The body is not joined to it: it has megabytes, of which
    another copy would stay in the heap of the thread that made it.
    """
    header = _CACHE_HEADER.pack(
        CACHE_MAGIC, FORMAT_VERSION, crc32c(body), directory_id, skew, len(body), covers
    )
    return header + _pack_checksum(crc32c(header))


def decode_cache(
    data: bytes, directory_id: bytes, covers: bytes
) -> tuple[float, memoryview] | None:
    """Return (skew, body) of a cache that is intact and covers what is there; else None."""
    if len(data) < CACHE_HEADER_BYTES:
        return None
    header = data[: _CACHE_HEADER.size]
    magic, version, body_checksum, owner, skew, body_bytes, covered = _CACHE_HEADER.unpack(header)
    if magic != CACHE_MAGIC or version != FORMAT_VERSION:
        return None
    if _unpack_checksum(data, _CACHE_HEADER.size)[0] != crc32c(header):
        return None
    body = memoryview(data)[CACHE_HEADER_BYTES:]
    if owner != directory_id or covered != covers or len(body) != body_bytes:
        return None
    return (skew, body) if crc32c(body) == body_checksum else None


def covered_by(data: bytes) -> bytes | None:
    """Return the digest of what a cache describes, unverified; None: there is no header."""
    if len(data) < CACHE_HEADER_BYTES:
        return None
    covered: bytes = _CACHE_HEADER.unpack_from(data)[-1]
    return covered
