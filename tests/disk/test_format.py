from __future__ import annotations

import random
import re
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from struct import Struct, calcsize
from typing import Any, NamedTuple

import lz4.block
import pytest
from crc32c import crc32c
from hypothesis import example, given, settings
from hypothesis import strategies as st

from persistence.disk import filenames, manifest
from persistence.disk import format as layouts
from persistence.disk.format import (
    CACHE_HEADER_BYTES,
    COMPRESSED,
    COMPRESSION_MIN_BYTES,
    FOOTER_PAYLOAD,
    FRAME_HEADER_BYTES,
    FRAME_MAGIC,
    FRAME_OVERHEAD_BYTES,
    INDEX_ROW,
    MAX_KEY_BYTES,
    SEALED,
    SEGMENT_HEADER_BYTES,
    Corrupt,
    Frame,
    FrameType,
    OtherFormat,
    SegmentHeader,
    SegmentKind,
    Torn,
    compress,
    decode_cache,
    decode_frame,
    decode_segment_header,
    decompress,
    encode_cache_header,
    encode_frame,
    encode_segment_header,
    frame_length,
    read_put,
    record_of,
    restamp,
    user_tag,
)

SALT = crc32c(b"salt of one ")
OTHER_SALT = crc32c(b"salt of two ")

IDS = st.binary(min_size=16, max_size=16)
TIMES = st.floats(allow_nan=False)
COUNTERS = st.integers(0, 2**64 - 1)


PAYLOADS = st.binary(max_size=200)


def frames(payloads: st.SearchStrategy[bytes] = PAYLOADS) -> st.SearchStrategy[Frame]:
    """Frames as this version writes them, except that the payload is not compressed."""
    return st.builds(
        Frame,
        type=st.sampled_from([FrameType.PUT, FrameType.DELETE, FrameType.TOUCH, FrameType.FOOTER]),
        flags=st.just(0),
        key=st.binary(min_size=1, max_size=40) | st.just(b"k" * MAX_KEY_BYTES),
        payload=payloads,
        raw_bytes=st.integers(0, 2**32 - 1),
        sequence=COUNTERS,
        durable_sequence=COUNTERS,
        incarnation=IDS,
        commit=IDS,
        base=IDS,
        accessed=TIMES,
        deadline=TIMES,
        cap=TIMES,
        user=st.integers(0, 2**32 - 1),
    )


def encode(frame: Frame, salt_checksum: int = SALT) -> bytes:
    """Encode `frame` as it is, whether or not that makes sense."""
    return encode_frame(
        salt_checksum,
        frame.type,
        frame.key,
        frame.payload,
        sequence=frame.sequence,
        durable_sequence=frame.durable_sequence,
        ids=frame.incarnation + frame.commit + frame.base,
        accessed=frame.accessed,
        deadline=frame.deadline,
        cap=frame.cap,
        user=frame.user,
        flags=frame.flags,
        raw_bytes=frame.raw_bytes,
    )


def put_of(key: bytes, record: bytes, **fields: Any) -> Frame:
    """Return the put frame of `record`, as the writer makes it."""
    payload = record[32:]  # all but the two ids, which are in the header
    flags, stored = compress(payload)
    values: dict[str, Any] = {
        "sequence": 2,
        "durable_sequence": 1,
        "base": bytes(16),
        "accessed": 1.0,
        "deadline": 2.0,
        "cap": 3.0,
        "user": 4,
    }
    return Frame(
        type=FrameType.PUT,
        flags=flags,
        key=key,
        payload=stored,
        raw_bytes=len(payload),
        incarnation=record[:16],
        commit=record[16:32],
        **{**values, **fields},
    )


# Frames


@settings(deadline=None)
@given(frames(), st.binary(max_size=20), st.binary(max_size=20))
def test_a_frame_comes_back_from_wherever_it_lies(
    frame: Frame, before: bytes, behind: bytes
) -> None:
    encoded = encode(frame)
    assert len(encoded) == frame.length
    for data in (before + encoded + behind, bytearray(before + encoded + behind)):
        for seen in (data, memoryview(data)):
            assert decode_frame(seen, len(before), SALT) == frame
    assert frame_length(before + encoded, len(before)) == frame.length


@settings(deadline=None)
@given(frames())
def test_every_truncation_of_a_frame_is_torn(frame: Frame) -> None:
    encoded = encode(frame)
    for end in range(len(encoded)):
        found = decode_frame(encoded[:end], 0, SALT)
        assert isinstance(found, Torn)
        assert end < found.needed_bytes <= len(encoded)


@settings(max_examples=25, deadline=None)
@given(frames(), st.binary(max_size=600))
def test_every_single_flipped_bit_is_noticed(frame: Frame, behind: bytes) -> None:
    encoded = bytearray(encode(frame) + behind)
    for bit in range(8 * frame.length):
        encoded[bit // 8] ^= 1 << bit % 8
        found = decode_frame(encoded, 0, SALT)
        encoded[bit // 8] ^= 1 << bit % 8
        assert isinstance(found, Corrupt | Torn)
        header_bits = 8 * (FRAME_HEADER_BYTES + len(frame.key))
        if bit >= header_bits:
            # The header vouches for whose frame it is, and for how long it is.
            assert isinstance(found, Corrupt)
            assert (found.key, found.length) == (frame.key, frame.length)
            assert (found.sequence, found.type) == (frame.sequence, frame.type)
        elif isinstance(found, Corrupt):
            assert (found.key, found.length, found.sequence) == (None, None, None)
    assert decode_frame(encoded, 0, SALT) == frame


@settings(deadline=None)
@given(frames(), st.randoms(use_true_random=False))
def test_damage_to_several_bytes_is_noticed(frame: Frame, chance: random.Random) -> None:
    encoded = encode(frame)
    for _ in range(50):
        damaged = bytearray(encoded)
        start = chance.randrange(len(damaged))
        end = min(len(damaged), start + chance.choice([1, 2, 4, 8, 64, 512]))
        damaged[start:end] = chance.choice([bytes(end - start), chance.randbytes(end - start)])
        if damaged != encoded:
            assert not isinstance(decode_frame(damaged, 0, SALT), Frame)


@settings(deadline=None)
@given(frames())
def test_a_frame_of_a_segment_with_another_salt_is_none_of_this_one(frame: Frame) -> None:
    assert isinstance(decode_frame(encode(frame, OTHER_SALT), 0, SALT), Corrupt)


@settings(deadline=None)
@given(frames())
def test_restamping_moves_a_frame_to_another_salt(frame: Frame) -> None:
    encoded = encode(frame)
    assert restamp(encoded, SALT, OTHER_SALT) == encode(frame, OTHER_SALT)
    assert restamp(memoryview(encoded), SALT, SALT) == encoded
    assert restamp(encoded, OTHER_SALT, SALT) is None


def test_a_damaged_frame_is_not_restamped() -> None:
    encoded = encode(put_of(b"key", bytes(200)))
    for bit in range(8 * len(encoded)):
        damaged = bytearray(encoded)
        damaged[bit // 8] ^= 1 << bit % 8
        assert restamp(bytes(damaged), SALT, OTHER_SALT) is None


@settings(deadline=None)
@given(st.binary(max_size=400), st.integers(-1, 410))
def test_decoding_takes_any_bytes(data: bytes, offset: int) -> None:
    offset = max(0, offset)
    assert not isinstance(decode_frame(data, offset, SALT), Frame)
    assert not isinstance(decode_frame(FRAME_MAGIC + data, 0, SALT), Frame)


@pytest.mark.parametrize("size", [0, 1, 200, 4096])
def test_zeros_are_no_frame(size: int) -> None:
    assert not isinstance(decode_frame(bytes(size), 0, SALT), Frame)
    assert not isinstance(decode_frame(bytes(size), 0, 0), Frame)


def test_the_magic_cannot_be_text_and_is_not_zero() -> None:
    assert FRAME_MAGIC[0]
    with pytest.raises(UnicodeDecodeError):
        FRAME_MAGIC.decode()


@pytest.mark.parametrize("frame_type", [0, 6, 255])
def test_an_intact_frame_of_an_unknown_type_is_corruption(frame_type: int) -> None:
    data = encode(put_of(b"key", bytes(100))._replace(type=frame_type))  # type: ignore[arg-type]
    found = decode_frame(data, 0, SALT)
    assert isinstance(found, Corrupt)
    assert (found.key, found.length) == (b"key", len(data))
    assert f"type {frame_type}" in found.reason


@pytest.mark.parametrize("flags", [4, 5, 7, 128])
def test_an_intact_frame_with_unknown_flags_is_corruption(flags: int) -> None:
    frame = put_of(b"key", bytes(100))._replace(flags=flags)
    assert isinstance(decode_frame(encode(frame), 0, SALT), Corrupt)
    assert read_put(encode(frame), b"key", SALT) is None


@pytest.mark.parametrize("flags", [SEALED, SEALED | COMPRESSED])
def test_a_sealed_frame_has_no_value_in_a_directory_that_is_not_encrypted(flags: int) -> None:
    frame = put_of(b"key", bytes(100))._replace(flags=flags)
    found = decode_frame(encode(frame), 0, SALT)
    assert isinstance(found, Frame)
    assert record_of(found) is None
    assert read_put(encode(frame), b"key", SALT) is None


@pytest.mark.parametrize(
    ("key_bytes", "payload_bytes"),
    [(MAX_KEY_BYTES + 1, 0), (0xFFFF, 0), (1, 2**31 + 1), (1, 2**32 - 1)],
)
def test_lengths_that_nobody_writes_are_damage_and_not_a_reason_to_wait(
    key_bytes: int, payload_bytes: int
) -> None:
    data = bytearray(encode(put_of(b"k", bytes(100))))
    data[6:8] = key_bytes.to_bytes(2, "little")
    data[8:12] = payload_bytes.to_bytes(4, "little")
    assert isinstance(decode_frame(data, 0, SALT), Corrupt)


def test_a_payload_that_holds_a_frame_is_not_taken_for_it() -> None:
    stale = encode(put_of(b"inner", bytes(100)), OTHER_SALT)
    outer = put_of(b"outer", bytes(32) + stale)
    data = encode(outer)
    assert decode_frame(data, 0, SALT) == outer
    assert isinstance(decode_frame(data, data.index(stale), SALT), Corrupt)


# Payloads

COMPRESSIBLE = st.builds(
    lambda piece, times, tail: piece * times + tail,
    st.binary(min_size=1, max_size=30),
    st.integers(1, 300),
    st.binary(max_size=50),
)


@settings(deadline=None)
@given(st.binary(max_size=3000) | COMPRESSIBLE)
@example(b"")
def test_a_payload_comes_back_from_compression(payload: bytes) -> None:
    flags, stored = compress(payload)
    assert decompress(flags, stored, len(payload)) == payload
    if flags & COMPRESSED:
        assert len(payload) >= COMPRESSION_MIN_BYTES
        assert len(stored) <= len(payload) * 7 / 8 + 1
    else:
        assert stored is payload


@settings(deadline=None)
@given(COMPRESSIBLE.filter(lambda payload: len(payload) > 1100), st.integers(0, 10_000))
def test_a_block_that_does_not_expand_to_exactly_its_length_is_refused(
    payload: bytes, raw_bytes: int
) -> None:
    flags, stored = compress(payload)
    if flags and raw_bytes != len(payload):
        assert decompress(flags, stored, raw_bytes) is None
    if not flags:
        assert decompress(flags, stored, len(stored) + 1) is None


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 100_000))
def test_bytes_that_are_no_block_are_refused_and_nothing_else_happens(
    stored: bytes, raw_bytes: int
) -> None:
    raw = decompress(COMPRESSED, stored, raw_bytes)
    assert raw is None or len(raw) == raw_bytes


def test_a_compressed_bomb_costs_no_more_memory_than_its_header_says() -> None:
    bomb = lz4.block.compress(bytes(200 * 2**20), store_size=False)
    tracemalloc.start()
    try:
        assert decompress(COMPRESSED, bomb, 2**20) is None
        assert decompress(COMPRESSED, bomb[:1000], 2**31) is None
        assert decompress(COMPRESSED, b"", 2**31) is None
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * 2**20


RECORDS = st.builds(
    lambda ids, rest: ids + rest, st.binary(min_size=32, max_size=32), st.binary() | COMPRESSIBLE
)


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=60), RECORDS)
def test_a_record_comes_back_from_its_put_frame(key: bytes, record: bytes) -> None:
    data = encode(put_of(key, record))
    frame = decode_frame(data, 0, SALT)
    assert isinstance(frame, Frame)
    assert record_of(frame) == record
    assert read_put(data, key, SALT) == record


def slow_read_put(data: bytes, key: bytes) -> bytes | None:
    """What `read_put` does, by way of `decode_frame`."""
    frame = decode_frame(data, 0, SALT)
    if not isinstance(frame, Frame) or frame.type != FrameType.PUT or frame.key != key:
        return None
    return record_of(frame) if frame.length == len(data) else None


@settings(deadline=None)
@given(
    frames(PAYLOADS | COMPRESSIBLE),
    st.sampled_from([0, 0, 0, 1, 1, 2, 255]),
    st.booleans(),
    st.data(),
)
def test_the_short_way_to_read_a_put_agrees_with_the_long_one(
    frame: Frame, flags: int, exact: bool, data: st.DataObject
) -> None:
    if exact:
        frame = frame._replace(raw_bytes=len(frame.payload))
    encoded = encode(frame._replace(flags=flags))
    other = data.draw(
        st.sampled_from(
            [frame.key, frame.key[:-1], frame.key + frame.payload[:1], frame.key + b"x", b"other"]
        )
    )
    assert read_put(encoded, other, SALT) == slow_read_put(encoded, other)


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=1, max_size=40), RECORDS, st.binary(max_size=8))
def test_the_short_way_refuses_whatever_the_long_one_does(
    key: bytes, record: bytes, behind: bytes
) -> None:
    encoded = encode(put_of(key, record))
    assert read_put(encode(put_of(key, record), OTHER_SALT), key, SALT) is None
    if behind:
        assert read_put(encoded + behind, key, SALT) is None
    for end in (*range(0, len(encoded), 7), len(encoded) - 1):
        assert read_put(encoded[:end], key, SALT) is None
    damaged = bytearray(encoded)
    for bit in range(0, 8 * len(encoded), 3):
        damaged[bit // 8] ^= 1 << bit % 8
        assert read_put(bytes(damaged), key, SALT) is None
        damaged[bit // 8] ^= 1 << bit % 8


# Segment headers

HEADERS = st.builds(
    SegmentHeader,
    kind=st.sampled_from(SegmentKind),
    number=COUNTERS,
    base_sequence=COUNTERS,
    directory_id=IDS,
    salt=st.binary(min_size=12, max_size=12),
)


@settings(deadline=None)
@given(HEADERS, st.binary(max_size=20))
def test_a_segment_header_comes_back(header: SegmentHeader, behind: bytes) -> None:
    encoded = encode_segment_header(header)
    assert len(encoded) == SEGMENT_HEADER_BYTES
    assert decode_segment_header(encoded + behind) == header
    assert header.salt_checksum == crc32c(header.salt)


@settings(max_examples=20, deadline=None)
@given(HEADERS)
def test_a_segment_header_that_is_cut_or_has_a_flipped_bit_is_none(header: SegmentHeader) -> None:
    encoded = encode_segment_header(header)
    for end in range(len(encoded)):
        assert decode_segment_header(encoded[:end]) is None
    for bit in range(8 * len(encoded)):
        damaged = bytearray(encoded)
        damaged[bit // 8] ^= 1 << bit % 8
        assert decode_segment_header(bytes(damaged)) is None


def stamped(body: bytes) -> bytes:
    return body + crc32c(body).to_bytes(4, "little")


def test_an_intact_segment_header_of_a_newer_version_is_refused_by_name() -> None:
    header = SegmentHeader(SegmentKind.LOG, 1, 0, bytes(16), bytes(12))
    body = bytearray(encode_segment_header(header)[:-4])
    body[8:12] = (layouts.FORMAT_VERSION + 1).to_bytes(4, "little")
    with pytest.raises(OtherFormat, match=f"format version {layouts.FORMAT_VERSION + 1}"):
        decode_segment_header(stamped(bytes(body)))


def test_a_segment_of_an_unknown_kind_is_damaged() -> None:
    header = SegmentHeader(SegmentKind.LOG, 1, 0, bytes(16), bytes(12))
    body = bytearray(encode_segment_header(header)[:-4])
    body[12:16] = (99).to_bytes(4, "little")
    assert decode_segment_header(stamped(bytes(body))) is None


# Hints and snapshots


@settings(deadline=None)
@given(IDS, st.binary(min_size=32, max_size=32), TIMES, st.binary(max_size=300))
def test_a_cache_comes_back(directory_id: bytes, covers: bytes, skew: float, body: bytes) -> None:
    encoded = encode_cache_header(directory_id, covers, skew, body) + body
    found = decode_cache(encoded, directory_id, covers)
    assert found is not None
    assert (found[0], bytes(found[1])) == (skew, body)


def test_a_cache_of_something_else_or_with_any_damage_is_none() -> None:
    directory_id, covers = bytes(range(16)), bytes(range(32))
    encoded = encode_cache_header(directory_id, covers, 0.5, b"some rows") + b"some rows"
    assert decode_cache(encoded, bytes(16), covers) is None
    assert decode_cache(encoded, directory_id, bytes(32)) is None
    assert decode_cache(encoded + b"\0", directory_id, covers) is None
    for end in range(len(encoded)):
        assert decode_cache(encoded[:end], directory_id, covers) is None
    for bit in range(8 * len(encoded)):
        damaged = bytearray(encoded)
        damaged[bit // 8] ^= 1 << bit % 8
        assert decode_cache(bytes(damaged), directory_id, covers) is None


def test_a_cache_of_any_other_version_is_none() -> None:
    for version in (0, layouts.FORMAT_VERSION + 1):
        header = bytearray(
            encode_cache_header(bytes(16), bytes(32), 0.0, b"")[: CACHE_HEADER_BYTES - 4]
        )
        header[8:12] = version.to_bytes(4, "little")
        assert decode_cache(stamped(bytes(header)), bytes(16), bytes(32)) is None


@settings(deadline=None)
@given(st.text())
def test_the_tag_of_a_user_has_31_bits_and_is_zero_for_nobody_only(user_id: str) -> None:
    assert 0 < user_tag("u" + user_id) <= layouts.USER_BITS
    assert user_tag("") == user_tag(None) == 0


# The layout that is written down is the layout that is used

DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"
TYPE_NAMES = {"B": "u8", "H": "u16", "I": "u32", "Q": "u64", "d": "f64"}


class Table(NamedTuple):
    heading: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def layout(heading: str, fields: tuple[tuple[str, str, str], ...]) -> Table:
    rows = []
    at = 0
    for name, code, meaning in fields:
        kind = TYPE_NAMES.get(code) or f"{code[:-1]} bytes"
        rows.append((str(at), str(calcsize(f"<{code}")), kind, name, meaning))
        at += calcsize(f"<{code}")
    return Table(heading, ("offset", "bytes", "type", "field", "meaning"), rows)


def tables() -> list[Table]:
    """Return every table of the document that the constants determine."""
    return [
        layout("Segment header", layouts.SEGMENT_HEADER_FIELDS),
        Table("Kinds of segments", ("kind", "name"), [(str(k.value), k.name) for k in SegmentKind]),
        layout("Frame header", layouts.FRAME_HEADER_FIELDS),
        Table("Frame types", ("type", "name"), [(str(t.value), t.name) for t in FrameType]),
        layout("Patches", layouts.PATCH_BASE_FIELDS),
        layout("Index row", layouts.INDEX_ROW_FIELDS),
        layout("Cache header", layouts.CACHE_HEADER_FIELDS),
        Table(
            "Sizes and limits",
            ("what", "bytes"),
            [
                ("segment header", str(SEGMENT_HEADER_BYTES)),
                ("frame header", str(FRAME_HEADER_BYTES)),
                ("frame without key and payload", str(FRAME_OVERHEAD_BYTES)),
                ("longest key", str(MAX_KEY_BYTES)),
                ("longest payload", str(layouts.MAX_PAYLOAD_BYTES)),
                ("shortest payload that is compressed", str(COMPRESSION_MIN_BYTES)),
                ("payload of a footer", str(FOOTER_PAYLOAD.size)),
                ("index row", str(INDEX_ROW.size)),
                ("cache header", str(CACHE_HEADER_BYTES)),
            ],
        ),
        Table(
            "File names",
            ("name", "what it is"),
            [
                (filenames.LOCK, "empty; its exclusive lock is the right to write here"),
                (filenames.MANIFEST, "which directory this is, and which segments belong to it"),
                (filenames.MANIFEST_COPY, "the same once more, for when the first is damaged"),
                (filenames.RESERVE, "random bytes: space for a full disk"),
                (filenames.segment_name(1), "a segment, by its number"),
                (filenames.hint_name(1), "the hint of that segment"),
                (filenames.INDEX_SNAPSHOT, "the whole index, written at a clean close"),
                (filenames.SHIPPED, "which checkpoint is the newest of this directory"),
                (
                    filenames.OUTBOX,
                    "a journal: the sessions whose newest version Redis has not seen",
                ),
                (filenames.CONFLICTS, "a journal: versions that Redis refused"),
                (filenames.ROTATIONS, "a journal: sessions whose id is being rotated"),
                (filenames.RESTORING, "a journal: a restore that Redis has not learned of yet"),
                (
                    filenames.SCRATCH,
                    f"a journal: which directory in `{filenames.SCRATCH_DIRECTORY}/` is whose",
                ),
                (
                    filenames.SCRATCH_DIRECTORY,
                    "a directory: the scratch directories of sessions, by 32 random hexadecimal "
                    "digits",
                ),
                (
                    filenames.temporary_name(filenames.STAGED),
                    "a checkpoint that is being restored",
                ),
                (
                    filenames.temporary_name(filenames.MANIFEST),
                    "a file being written, before it is renamed into place",
                ),
                (
                    f"{filenames.QUARANTINE}/{filenames.quarantine_name(1, 4096, 77)}",
                    "77 bytes that recovery cut from segment 1 at offset 4096",
                ),
            ],
        ),
        Table("Manifest", ("key",), [(key,) for key in manifest_keys()]),
    ]


def manifest_keys() -> list[str]:
    line = manifest.encode_manifest(manifest.Manifest.fresh(bytes(4))).split(b"\n")[0].decode()
    return re.findall(r'"(\w+)":', line)


def in_backticks(text: str) -> str:
    return f"`{text}`"


def rendered(table: Table) -> list[str]:
    """Return the rows of `table` as Markdown; names are set as code."""
    code = {"field", "name", "key"}
    return [
        "| "
        + " | ".join(
            in_backticks(cell) if column in code else cell
            for column, cell in zip(table.columns, row, strict=True)
        )
        + " |"
        for row in table.rows
    ]


def written(document: str, table: Table) -> list[str]:
    """Return the rows of the table under its heading, as far as the columns are determined."""
    section = re.search(
        rf"^##+ {re.escape(table.heading)}\n(.*?)(?=^##|\Z)", document, re.MULTILINE | re.DOTALL
    )
    if section is None:
        return []
    lines = re.findall(r"^\|.*\|$", section[1], re.MULTILINE)[2:]
    if table.heading == "Patches":  # the other table there is written by hand
        lines = lines[: len(table.rows)]
    return ["|".join(line.split("|")[: len(table.columns) + 1]) + "|" for line in lines]


@pytest.mark.parametrize("table", tables(), ids=lambda table: table.heading)
def test_the_document_says_what_the_constants_say(table: Table) -> None:
    expected = "\n".join(rendered(table))
    found = "\n".join(written(DOCUMENT.read_text(encoding="utf-8"), table))
    assert found == expected, f"docs/format.md, {table.heading!r}, should be:\n{expected}"


def test_the_document_names_every_constant_that_a_reader_needs() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert f"format version is {layouts.FORMAT_VERSION}" in text
    assert f"that of its manifest is {layouts.PATCHES_VERSION}" in text
    assert layouts.PATCH_BASE.format == "<" + "".join(f[1] for f in layouts.PATCH_BASE_FIELDS)
    assert manifest.MAGIC in text


@pytest.mark.parametrize(
    ("fields", "size", "covered"),
    [
        (layouts.SEGMENT_HEADER_FIELDS, SEGMENT_HEADER_BYTES, layouts._SEGMENT_HEADER),
        (layouts.FRAME_HEADER_FIELDS, FRAME_HEADER_BYTES, layouts._FRAME_HEADER),
        (layouts.INDEX_ROW_FIELDS, INDEX_ROW.size, INDEX_ROW),
        (layouts.CACHE_HEADER_FIELDS, CACHE_HEADER_BYTES, layouts._CACHE_HEADER),
    ],
    ids=["segment header", "frame header", "index row", "cache header"],
)
def test_the_fields_make_up_the_struct(
    fields: tuple[tuple[str, str, str], ...], size: int, covered: Struct
) -> None:
    def widths(codes: str) -> list[int]:
        """Return the sizes of the single values, with byte strings joined."""
        parts = re.findall(r"(\d*)([a-zA-Z])", codes)
        wide: list[int] = []
        previous = ""
        for count, code in parts:
            if code == "s" and previous == "s":
                wide[-1] += int(count)
            elif code == "s":
                wide.append(int(count))
            else:
                wide += [calcsize(f"<{code}")] * int(count or 1)
            previous = code
        return wide

    codes = "".join(code for _, code, _ in fields)
    assert calcsize(f"<{codes}") == size
    of_struct = widths(covered.format.removeprefix("<"))
    assert widths(codes)[: len(of_struct)] == of_struct
