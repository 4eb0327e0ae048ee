from __future__ import annotations

import random

import pytest
from crc32c import crc32c

from persistence.disk.format import (
    FRAME_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    FrameType,
    SegmentHeader,
    SegmentKind,
    encode_frame,
    encode_segment_header,
)
from persistence.disk.mending import (
    MENDABLE_BYTES,
    flipped_bit,
    is_one_bit_off,
    mend_frame_header,
    mend_segment_header,
    salt_checksum_of,
    start_of,
)

SALT = crc32c(b"salt of one ")
CHANCE = random.Random(5)


def frame_of(key: bytes, payload: bytes, kind: FrameType = FrameType.PUT) -> bytes:
    ids = CHANCE.randbytes(48)
    return encode_frame(SALT, kind, key, payload, 77, 70, ids, 1.5, 2.5, 3.5, 9)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("key", [b"k", b"session 17", b"x" * 512, b""])
@pytest.mark.parametrize("kind", [FrameType.PUT, FrameType.DELETE, FrameType.FOOTER])
def test_any_flipped_bit_of_header_and_key_is_turned_back(key: bytes, kind: FrameType) -> None:
    frame = frame_of(key, CHANCE.randbytes(900), kind)
    for bit in range(8 * (FRAME_HEADER_BYTES + len(key))):
        found = mend_frame_header(flipped(frame, bit)[:MENDABLE_BYTES], SALT)
        assert found is not None
        assert (found.key, found.length, found.sequence) == (key, len(frame), 77)
        assert (found.type, found.times, found.is_mended) == (kind, (1.5, 2.5, 3.5), True)


def test_two_flipped_bits_and_noise_are_not_mended() -> None:
    frame = frame_of(b"session 17", bytes(100))
    for _ in range(3000):
        one, other = CHANCE.sample(range(8 * (FRAME_HEADER_BYTES + 10)), 2)
        assert mend_frame_header(flipped(flipped(frame, one), other), SALT) is None
        assert mend_frame_header(CHANCE.randbytes(MENDABLE_BYTES), SALT) is None
    assert mend_frame_header(frame, SALT ^ 1) is None
    for size in range(FRAME_HEADER_BYTES + 10):
        assert mend_frame_header(frame[:size], SALT) is None


def test_a_frame_with_one_flipped_bit_is_told_from_a_torn_one() -> None:
    frame = frame_of(b"session 17", CHANCE.randbytes(3000))
    for bit in CHANCE.sample(range(8 * len(frame)), 500):
        assert is_one_bit_off(flipped(frame, bit), SALT)
    for size in range(1, len(frame), 97):
        assert not is_one_bit_off(frame[:size] + bytes(len(frame) - size), SALT)
        assert not is_one_bit_off(frame[:size], SALT)
    large = frame_of(b"k", CHANCE.randbytes(2**20))
    assert not is_one_bit_off(flipped(large, 99), SALT), "too long to be searched"


def test_the_flipped_bit_is_found() -> None:
    data = CHANCE.randbytes(300)
    for bit in range(8 * len(data)):
        syndrome = crc32c(data, SALT) ^ crc32c(flipped(data, bit), SALT)
        assert flipped_bit(syndrome, len(data)) == (bit // 8, bit % 8)


def test_a_frame_tells_what_its_checksums_started_from() -> None:
    for size in (0, 1, 100):
        data = CHANCE.randbytes(size)
        assert start_of(data, crc32c(data, SALT)) == SALT
    frame = frame_of(b"session 17", b"payload")
    assert salt_checksum_of(frame) == SALT
    for bit in range(8 * (FRAME_HEADER_BYTES - 4)):
        assert salt_checksum_of(flipped(frame, bit)) != SALT, "two frames will not agree"
    for bit in range(8 * FRAME_HEADER_BYTES, 8 * len(frame)):
        assert salt_checksum_of(flipped(frame, bit)) is None
    assert salt_checksum_of(b"") is None


def test_any_flipped_bit_of_a_segments_header_is_turned_back_and_more_in_what_is_known() -> None:
    header = SegmentHeader(SegmentKind.MERGED, 7, 1234, CHANCE.randbytes(16), CHANCE.randbytes(12))
    good = encode_segment_header(header)
    for bit in range(8 * SEGMENT_HEADER_BYTES):
        assert mend_segment_header(flipped(good, bit), 7, header.directory_id) == header
    destroyed = bytes(12) + good[12:16] + bytes(8) + good[24:32] + bytes(16) + good[48:]
    assert mend_segment_header(destroyed, 7, header.directory_id) == header
    assert mend_segment_header(good, 8, header.directory_id) is None
    assert mend_segment_header(bytes(64), 7, header.directory_id) is None
    assert mend_segment_header(good[:-1], 7, header.directory_id) is None
