"""Payloads that are sealed: what opens, what does not, and that nothing else ever raises."""

from __future__ import annotations

from typing import Any

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from persistence.disk.format import (
    COMPRESSED,
    FRAME_HEADER_BYTES,
    PUT,
    SEALED,
    TOUCH,
    Frame,
    compress,
    decode_frame,
    encode_frame,
    is_intact,
)
from persistence.disk.sealed import RecordCodec
from persistence.sealer import SEAL_BYTES
from persistence.security.keyring import KeyRing
from persistence.security.sealing import RECORDS, Sealing

SALT, OTHER_SALT = crc32c(b"salt of one "), crc32c(b"salt of two ")
DIRECTORY = bytes(range(16))
OLD_KEY, NEW_KEY = bytes(32), bytes(range(32))
CODEC = RecordCodec(Sealing(KeyRing([OLD_KEY, NEW_KEY]), RECORDS), DIRECTORY)
IDS = b"i" * 16 + b"c" * 16 + b"b" * 16
PAYLOAD = b"the rest of a record " * 100

PARTS: dict[str, Any] = {
    "key": b"a",
    "sequence": 7,
    "ids": IDS,
    "flags": 0,
    "raw_bytes": len(PAYLOAD),
}


def frame_of(payload: bytes, *, salt: int = SALT, kind: int = PUT, **parts: Any) -> bytes:
    """Return a frame with a payload that is what it is, under the parts of `PARTS`."""
    given = {**PARTS, **parts}
    return encode_frame(
        salt,
        kind,
        given["key"],
        payload,
        given["sequence"],
        0,
        given["ids"],
        1.0,
        2.0,
        3.0,
        4,
        given["flags"] | SEALED,
        given["raw_bytes"],
    )


def sealed_frame(codec: RecordCodec = CODEC, payload: bytes = PAYLOAD, **parts: Any) -> bytes:
    given = {**PARTS, "raw_bytes": len(payload), **parts}
    return frame_of(codec.seal(payload, **given), **given)


def decoded(data: bytes, salt: int = SALT) -> Frame:
    frame = decode_frame(data, 0, salt)
    assert isinstance(frame, Frame)
    return frame


@given(st.binary(max_size=3000), st.binary(min_size=1, max_size=512))
def test_a_record_that_is_sealed_is_read_as_it_was(raw: bytes, key: bytes) -> None:
    flags, payload = compress(raw)
    data = sealed_frame(payload=payload, key=key, flags=flags, raw_bytes=len(raw))
    assert len(data) == FRAME_HEADER_BYTES + 4 + len(key) + len(payload) + SEAL_BYTES
    assert CODEC.read_put(data, key, SALT) == IDS[:32] + raw
    assert CODEC.record_of(decoded(data)) == IDS[:32] + raw
    plain = CODEC.opened(decoded(data))
    assert plain is not None
    assert (plain.payload, plain.flags, plain.raw_bytes) == (payload, flags, len(raw))


@pytest.mark.parametrize(
    "other",
    [
        {"key": b"b"},
        {"key": b"ab"},
        {"sequence": 8},
        {"ids": b"I" + IDS[1:]},
        {"ids": b"i" + b"I" + IDS[2:]},
        {"ids": IDS[:16] + b"C" * 16 + IDS[32:]},
        {"ids": IDS[:32] + b"B" * 16},
        {"flags": COMPRESSED},
        {"raw_bytes": len(PAYLOAD) + 1},
    ],
    ids=str,
)
def test_a_payload_opens_where_it_was_sealed_for_and_nowhere_else(other: dict[str, Any]) -> None:
    # Moved there by somebody who can make every checksum right.
    moved = frame_of(CODEC.seal(PAYLOAD, **PARTS), **other)
    assert is_intact(moved, SALT)
    assert CODEC.read_put(moved, {**PARTS, **other}["key"], SALT) is None
    assert CODEC.record_of(decoded(moved)) is None
    assert CODEC.opened(decoded(moved)) is None


def test_a_payload_of_another_directory_or_key_does_not_open() -> None:
    data = sealed_frame()
    others = [
        RecordCodec(CODEC.sealer, bytes(16)),
        RecordCodec(Sealing(KeyRing([OLD_KEY]), RECORDS), DIRECTORY),
    ]
    assert all(other.read_put(data, b"a", SALT) is None for other in others)


def test_a_plain_put_is_refused_where_everything_is_sealed() -> None:
    plain = encode_frame(SALT, PUT, b"a", PAYLOAD, 7, 0, IDS)
    assert CODEC.read_put(plain, b"a", SALT) is None
    assert CODEC.record_of(decoded(plain)) is None


def test_what_is_no_put_of_that_session_is_refused() -> None:
    assert CODEC.read_put(sealed_frame(), b"b", SALT) is None
    assert CODEC.read_put(sealed_frame(), b"", SALT) is None
    assert CODEC.read_put(sealed_frame(), b"a", OTHER_SALT) is None
    touch = frame_of(CODEC.seal(PAYLOAD, **PARTS), kind=TOUCH)
    assert CODEC.read_put(touch, b"a", SALT) is None


def test_every_flipped_bit_of_a_payload_is_noticed_whatever_the_checksum_says() -> None:
    sealed = CODEC.seal(b"a short payload", **PARTS)
    for bit in range(8 * len(sealed)):
        flipped = bytearray(sealed)
        flipped[bit // 8] ^= 1 << bit % 8
        assert CODEC.read_put(frame_of(bytes(flipped)), b"a", SALT) is None


@given(st.binary(max_size=200))
def test_no_bytes_make_a_reader_raise(data: bytes) -> None:
    assert CODEC.read_put(data, b"a", SALT) is None
    assert CODEC.reseal(data, SALT, OTHER_SALT) is None
    assert CODEC.read_put(frame_of(data), b"a", SALT) is None
    assert CODEC.read_put(frame_of(CODEC.sealer.newest + data), b"a", SALT) is None


def test_a_lying_length_in_an_lz4_block_is_no_record() -> None:
    flags, payload = compress(b"x" * 2000)
    parts = {**PARTS, "flags": flags, "raw_bytes": 1999}
    assert CODEC.read_put(frame_of(CODEC.seal(payload, **parts), **parts), b"a", SALT) is None


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_frame_that_is_sealed_anew_is_as_long_and_says_the_same(size: int) -> None:
    old = RecordCodec(Sealing(KeyRing([OLD_KEY]), RECORDS), DIRECTORY)
    data = sealed_frame(old, bytes(size))
    moved = CODEC.reseal(data, SALT, OTHER_SALT)
    assert moved is not None
    assert len(moved) == len(data)
    assert old.read_put(moved, b"a", OTHER_SALT) is None
    assert CODEC.read_put(moved, b"a", OTHER_SALT) == IDS[:32] + bytes(size)
    before, after = decoded(data), decoded(moved, OTHER_SALT)
    assert after._replace(payload=b"") == before._replace(payload=b"")
    assert after.payload[:4] == CODEC.sealer.newest


def test_a_frame_without_a_payload_is_moved_as_it_is_and_a_damaged_one_not_at_all() -> None:
    touch = encode_frame(SALT, TOUCH, b"a", b"", 7, 0, IDS)
    moved = CODEC.reseal(touch, SALT, OTHER_SALT)
    assert moved == encode_frame(OTHER_SALT, TOUCH, b"a", b"", 7, 0, IDS)
    data = bytearray(sealed_frame())
    data[200] ^= 1
    assert CODEC.reseal(bytes(data), SALT, OTHER_SALT) is None
    assert CODEC.reseal(frame_of(b"not sealed " * 10), SALT, OTHER_SALT) is None
