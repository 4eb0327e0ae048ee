"""What a checksum can give back: the one flipped bit, and the salt that it started from.

CRC-32C is linear. A single flipped bit changes it by a value that depends only on how far from the
end the bit is, and different bits by different values, up to 2**31 bits. So where exactly one bit
is flipped, the checksum says which. And it is a bijection of the value that it started from: an
intact frame tells the salt of its segment, should the segment's header be lost.

Nothing that was mended is ever returned as a value: it tells whose frame it was, how long, and
that it was no torn write. Random bytes pass for a frame with one flipped bit once in 4 million
times. Pure: no IO.
"""

from __future__ import annotations

from functools import cache
from typing import Final

from crc32c import crc32c

from persistence.disk.format import (
    FRAME_HEADER_BYTES,
    FRAME_OVERHEAD_BYTES,
    MAX_KEY_BYTES,
    SEGMENT_HEADER_BYTES,
    Corrupt,
    SegmentHeader,
    SegmentKind,
    corrupt_behind_header,
    decode_segment_header,
    encode_segment_header,
    is_intact,
)

MENDABLE_BYTES: Final = FRAME_HEADER_BYTES + MAX_KEY_BYTES
MAX_SEARCHED_BYTES: Final = 2**20
"""A frame longer than this is not searched for its one flipped bit: that takes 0.25 s a MiB."""

_CHECKSUM_AT: Final = FRAME_HEADER_BYTES - 4
_KEY_BYTES_AT: Final = 6
_KIND: Final = slice(12, 16)  # what cannot be known of a segment's header
_BASE: Final = slice(24, 32)
_SALT: Final = slice(48, 60)
_FROM_SALT: Final = slice(48, 64)
_ALL: Final = 0xFFFFFFFF


def _tables() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the byte table of CRC-32C, and which entry has a certain highest byte."""
    table = tuple(crc32c(bytes([byte]), _ALL) ^ _ALL for byte in range(256))
    by_highest = [0] * 256
    for byte, entry in enumerate(table):
        by_highest[entry >> 24] = byte
    return table, tuple(by_highest)


_TABLE, _BY_HIGHEST = _tables()
_OF_ONE_BIT: Final = {_TABLE[1 << bit]: bit for bit in range(8)}


def start_of(data: bytes, checksum: int) -> int:
    """Return the value from which the CRC-32C of `data` becomes `checksum`."""
    register = checksum ^ _ALL
    for byte in reversed(data):
        index = _BY_HIGHEST[register >> 24]
        register = ((register ^ _TABLE[index]) << 8 & _ALL) | index ^ byte
    return register ^ _ALL


def flipped_bit(syndrome: int, nbytes: int) -> tuple[int, int] | None:
    """Return (byte, bit) of the flipped bit in `nbytes` whose checksum is off by `syndrome`."""
    register = syndrome
    for at in range(nbytes - 1, -1, -1):
        if register in _OF_ONE_BIT:
            return at, _OF_ONE_BIT[register]
        index = _BY_HIGHEST[register >> 24]
        register = ((register ^ _TABLE[index]) << 8 & _ALL) | index
    return None


@cache
def _near_the_end() -> dict[int, tuple[int, int]]:
    """Return what a flipped bit changes a checksum by -> (bytes behind it, bit)."""
    found = {}
    registers = [_TABLE[1 << bit] for bit in range(8)]
    for behind in range(MENDABLE_BYTES):
        for bit, register in enumerate(registers):
            found[register] = behind, bit
        registers = [register >> 8 ^ _TABLE[register & 255] for register in registers]
    return found


def is_one_bit_off(frame: bytes, salt_checksum: int) -> bool:
    """Whether `frame`, whose checksum fails, is as it was written but for one bit."""
    if not FRAME_OVERHEAD_BYTES <= len(frame) <= MAX_SEARCHED_BYTES:
        return False
    body = memoryview(frame)[:-4]
    syndrome = crc32c(body, salt_checksum) ^ int.from_bytes(frame[-4:], "little")
    return syndrome.bit_count() == 1 or flipped_bit(syndrome, len(body)) is not None


def mend_frame_header(data: bytes, salt_checksum: int) -> Corrupt | None:
    """Return whose frame begins with `data`, if one bit of its header or key is flipped.

    Args:
        data: the first `MENDABLE_BYTES` where the frame begins, fewer at the end of the file.
        salt_checksum: of the segment.
    """
    if len(data) < FRAME_HEADER_BYTES:
        return None
    mended = _mended_content(data, salt_checksum) or _mended_key_length(data, salt_checksum)
    if mended is None:
        return None
    return corrupt_behind_header(mended, "a bit of its header is flipped")


def _key_end(data: bytes) -> int | None:
    key_bytes = int.from_bytes(data[_KEY_BYTES_AT : _KEY_BYTES_AT + 2], "little")
    end = FRAME_HEADER_BYTES + key_bytes
    return end if key_bytes <= MAX_KEY_BYTES and end <= len(data) else None


def _syndrome(data: bytes, key_end: int, salt_checksum: int) -> int:
    key = data[FRAME_HEADER_BYTES:key_end]
    said = int.from_bytes(data[_CHECKSUM_AT:FRAME_HEADER_BYTES], "little")
    return said ^ crc32c(key, crc32c(data[:_CHECKSUM_AT], salt_checksum))


def _mended_content(data: bytes, salt_checksum: int) -> bytes | None:
    """Undo a flipped bit anywhere but in the key's length, or in the checksum itself."""
    end = _key_end(data)
    if end is None:
        return None
    syndrome = _syndrome(data, end, salt_checksum)
    if syndrome.bit_count() == 1:
        return data[:end]
    behind, bit = _near_the_end().get(syndrome, (end, 0))
    at = end - 4 - 1 - behind  # in header and key, without the checksum between them
    if at < 0 or at in (_KEY_BYTES_AT, _KEY_BYTES_AT + 1):
        return None
    mended = bytearray(data[:end])
    mended[at if at < _CHECKSUM_AT else at + 4] ^= 1 << bit
    return bytes(mended)


def _mended_key_length(data: bytes, salt_checksum: int) -> bytes | None:
    for bit in range(16):
        changed = bytearray(data)
        changed[_KEY_BYTES_AT + bit // 8] ^= 1 << bit % 8
        mended = bytes(changed)
        end = _key_end(mended)
        if end is not None and _syndrome(mended, end, salt_checksum) == 0:
            return mended[:end]
    return None


# --- the header of a segment ------------------------------------------------------------------


def mend_segment_header(data: bytes, number: int, directory_id: bytes) -> SegmentHeader | None:
    """Return a segment's header whose checksum fails, if what is unknown in it is but a bit off.

    Magic, version, number and directory are known, whatever has become of them.
    """
    if len(data) < SEGMENT_HEADER_BYTES:
        return None
    known = SegmentHeader(SegmentKind.LOG, number, 0, directory_id, data[_SALT])
    candidate = bytearray(encode_segment_header(known))
    for unknown in (_KIND, _BASE, _FROM_SALT):
        candidate[unknown] = data[unknown]
    for bit in range(-1, 8 * SEGMENT_HEADER_BYTES):
        if bit >= 0:
            candidate[bit // 8] ^= 1 << bit % 8
        header = decode_segment_header(bytes(candidate))
        if header is not None and (header.number, header.directory_id) == (number, directory_id):
            return header
        if bit >= 0:
            candidate[bit // 8] ^= 1 << bit % 8
    return None


def salt_checksum_of(frame: bytes) -> int | None:
    """Return the checksum of the salt of the segment that `frame` was written to.

    None if it is not intact behind its header: the header's checksum tells the salt, the frame's
    must agree. A damaged header tells a wrong one, so a second witness is needed.
    """
    end = _key_end(frame)
    if end is None or end + 4 > len(frame):
        return None
    checked = frame[:_CHECKSUM_AT] + frame[FRAME_HEADER_BYTES:end]
    said = int.from_bytes(frame[_CHECKSUM_AT:FRAME_HEADER_BYTES], "little")
    start = start_of(checked, said)
    return start if is_intact(frame, start) else None
