from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from persistence.checkpoint.manifest import (
    FORMAT_VERSION,
    ChunkRef,
    MalformedCheckpoint,
    Manifest,
    PackedRun,
    checksum_of,
    decode_chunk,
    decode_manifest,
    encode_chunk,
    encode_manifest,
    is_id,
    make_id,
    number_after,
    number_of,
    ref_of,
    worker_of,
)
from persistence.disk.format import OtherFormat

ID = make_id(7, "20260131T235959Z", "0123456789abcdef", b"\xff\x00\xff\x00")
MANIFEST = Manifest(
    id=ID,
    parent="",
    base=ID,
    since=0,
    sequence=12,
    created=1.5,
    reason="manual",
    sessions=3,
    namespace="app",
    worker="0123456789abcdef",
    chunks=(ChunkRef(ID, 0, 100, 5, 3, 200),),
)
RUNS = [PackedRun(7, b"frames " * 20), PackedRun(2**32 - 1, b"more")]


def signed(data: bytes) -> bytes:
    return data + crc32c(data).to_bytes(4, "little")


def test_an_id_says_its_number_and_its_worker_and_has_one_form() -> None:
    assert ID == "00000007-20260131T235959Z-01234567-ff00ff00"
    assert (number_of(ID), worker_of(ID)) == (7, "01234567")
    assert is_id(ID)
    for bad in ("", "latest", ID + "\n", ID + "/..", f"../{ID}", ID.upper(), ID.replace("7", "*")):
        assert not is_id(bad)


def test_ids_sort_in_the_order_in_which_they_were_made() -> None:
    ids = [make_id(n, "20260131T235959Z", "0" * 8, bytes(4)) for n in (1, 2, 9, 10, 99, 100)]
    assert sorted(ids) == ids


def test_the_next_number_is_one_more_than_any_that_was_counted_up_to() -> None:
    def after(*numbers: int) -> int:
        return number_after(f"{number:08d}{ID[8:]}" for number in numbers)

    assert (after(), after(3, 1), after(99_999_999), after(99_999_999, 7)) == (1, 4, 1, 8)
    assert after(89_999_999) == after(89_999_999, 90_000_000) == 90_000_000
    assert is_id(make_id(90_000_000, "20260131T235959Z", "0" * 8, bytes(4)))


def test_a_manifest_comes_back() -> None:
    assert decode_manifest(encode_manifest(MANIFEST), ID) == MANIFEST


def test_a_manifest_under_another_ones_id_is_refused() -> None:
    with pytest.raises(MalformedCheckpoint, match="that of"):
        decode_manifest(encode_manifest(MANIFEST), ID.replace("7", "8"))


def test_a_manifest_with_any_bit_flipped_or_cut_off_anywhere_is_refused() -> None:
    data = encode_manifest(MANIFEST)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(MalformedCheckpoint):
            decode_manifest(bytes(damaged), ID)
    for size in range(len(data)):
        with pytest.raises(MalformedCheckpoint):
            decode_manifest(data[:size], ID)


@pytest.mark.parametrize("header", [b"PERSMAN\x01\x03\x00", b"PERSMAN\x03\x02\x00"])
def test_a_manifest_of_another_format_is_told_whatever_it_ends_with(header: bytes) -> None:
    for rest in (encode_manifest(MANIFEST)[10:-1] + b"x", b"another body, no checksum", bytes(4)):
        with pytest.raises(OtherFormat, match="newer version"):
            decode_manifest(header + rest, ID)


def test_a_newer_manifest_is_told_from_a_damaged_one() -> None:
    data = bytearray(encode_manifest(MANIFEST)[:-4])
    data[8] = FORMAT_VERSION + 1
    with pytest.raises(OtherFormat, match="newer version"):
        decode_manifest(signed(bytes(data)), ID)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_whatever_is_no_manifest_raises_one_kind_of_error(data: bytes) -> None:
    with pytest.raises(MalformedCheckpoint):
        decode_manifest(data, ID)
    with pytest.raises(MalformedCheckpoint):
        decode_manifest(signed(encode_manifest(MANIFEST)[:10] + data), ID)


def test_a_chunk_listed_with_something_else_than_numbers_is_refused() -> None:
    for bad in (-1, 1.5, "1", None):
        chunk = MANIFEST.chunks[0]._replace(stored_bytes=bad)  # type: ignore[arg-type]
        data = encode_manifest(replace(MANIFEST, chunks=(chunk,)))
        with pytest.raises(MalformedCheckpoint):
            decode_manifest(data, ID)


@pytest.mark.parametrize("compress", [True, False])
def test_a_chunk_comes_back(compress: bool) -> None:
    for runs in (RUNS, RUNS[:1], []):
        chunk = encode_chunk(runs, 5, compress=compress)
        ref = ref_of(chunk, ID, 3)
        assert (ref.checkpoint, ref.number, ref.frames) == (ID, 3, 5)
        found = [(run.salt_checksum, bytes(run.frames)) for run in decode_chunk(chunk, ref)]
        assert found == [tuple(run) for run in runs]


@pytest.mark.parametrize("compress", [True, False])
def test_a_chunk_with_any_bit_flipped_or_cut_off_anywhere_is_refused(compress: bool) -> None:
    chunk = encode_chunk(RUNS, 2, compress=compress)
    ref = ref_of(chunk, ID, 0)
    for bit in range(8 * len(chunk)):
        damaged = bytearray(chunk)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(MalformedCheckpoint):
            decode_chunk(bytes(damaged), ref)
    for size in range(len(chunk)):
        with pytest.raises(MalformedCheckpoint):
            decode_chunk(chunk[:size], ref)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=3))
def test_a_chunk_whose_checksums_were_made_right_again_raises_nothing_else(
    at: int, patch: bytes
) -> None:
    chunk = bytearray(encode_chunk(RUNS, 2, compress=True)[:-4])
    at %= len(chunk)
    chunk[at : at + len(patch)] = patch
    forged = signed(bytes(chunk))
    ref = ref_of(encode_chunk(RUNS, 2, compress=True), ID, 0)
    ref = ref._replace(checksum=checksum_of(forged), stored_bytes=len(forged))
    with suppress(MalformedCheckpoint, OtherFormat):
        decode_chunk(forged, ref)


def test_a_chunk_that_claims_to_expand_beyond_reason_is_refused_before_it_does() -> None:
    bomb = bytearray(encode_chunk([PackedRun(0, bytes(2**20))], 1, compress=True)[:-4])
    bomb[20:28] = (2**40).to_bytes(8, "little")
    forged = signed(bytes(bomb))
    with pytest.raises(MalformedCheckpoint, match="impossible"):
        decode_chunk(forged, ref_of(forged, ID, 0))
