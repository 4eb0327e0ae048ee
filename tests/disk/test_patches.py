"""Patches: what has changed since a session's whole record, and what must never come of them."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persistence import ManualClock, StateManager
from persistence import record as rec
from persistence.disk import patches
from persistence.disk.format import (
    FORMAT_VERSION,
    NO_IDS,
    PATCH,
    PATCH_BASE,
    PATCHES_VERSION,
    PUT,
    ROW_IS_PATCH,
    Frame,
    FrameType,
    OtherFormat,
    check_version,
    decode_frame,
    decode_segment_header,
    encode_frame,
)
from persistence.disk.index import Fingerprints
from persistence.disk.inspect import inspect_directory, scan_directory
from persistence.disk.manifest import decode_manifest
from persistence.disk.patches import Base, Bases, Patched, PlainRecords, patch_on, patched_record
from persistence.disk.sealed import RecordCodec
from persistence.errors import CorruptionError, DirectoryNotUsable
from persistence.security.keyring import KeyRing
from persistence.security.sealing import RECORDS, Sealing
from tests.disk.history import Placed, recover, scan
from tests.disk.memoryfiles import MemoryFiles
from tests.disk.readonly import StoredRecord, newest_records
from tests.faults.simulation import stepped
from tests.support import PATH, abandon, config, everything, opened, patching

SALT: Final = 77
LOG: Final = f"{PATH}/0000000001.seg"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def _of_records_of_1_kib() -> Iterator[None]:
    with patching(1024, 1.0):
        yield


def large(number: int, size: int = 1500) -> dict[str, Any]:
    return {"n": number, "text": random.Random(number).randbytes(size), "last": None}


def log_of(files: MemoryFiles, path: str = LOG) -> list[Placed]:
    data = files.data(path)
    header = decode_segment_header(data)
    assert header is not None
    found = scan(data, header.salt_checksum)
    return [Placed(offset, frame) for offset, frame in found if isinstance(frame, Frame)]


def types_in(files: MemoryFiles) -> set[FrameType]:
    paths = [path for path in files.contents() if path.endswith(".seg")]
    return {placed.frame.type for path in paths for placed in log_of(files, path)}


def disk_of(state: StateManager) -> Any:
    return state._disk


def row_of(state: StateManager, sid: str) -> Any:
    return disk_of(state).index.get(disk_of(state).fingerprint(sid.encode()))


async def patched_session(state: StateManager, sid: str, number: int = 1) -> None:
    """Create a session whose newest frame is a patch."""
    await state.create_session(session_id=sid, data=large(number))
    for last in range(3):  # the first of a directory is still written whole
        await state.update_session_data(sid, "last", last)
    assert row_of(state, sid).length >= ROW_IS_PATCH


# Pure


def record_of(fields: dict[str, bytes], *, meta: bytes = b"", commit: bytes = b"c" * 16) -> bytes:
    return rec.assemble(
        incarnation=b"i" * 16,
        commit=commit,
        version=3,
        created=1.0,
        ttl_seconds=60.0,
        flags=rec.RENEWS,
        user=7,
        meta=meta,
        fields=fields,
    )


FIELDS: Final = st.dictionaries(
    st.text(max_size=5), st.binary(max_size=30) | st.just(b"x" * 70_000), min_size=1, max_size=5
)


@settings(max_examples=40)
@given(FIELDS, st.data(), st.sampled_from([b"", rec.pack_meta({"user_id": "ada"})]))
def test_a_base_and_what_has_changed_are_the_later_record_byte_for_byte(
    fields: dict[str, bytes], data: st.DataObject, meta: bytes
) -> None:
    before = now = record_of(fields, meta=meta)
    base = Base(0, 10**9, 1, b"c" * 16)
    for step in range(data.draw(st.integers(1, 4))):
        names = data.draw(st.sets(st.sampled_from(sorted(fields)), min_size=1))
        changed = {name: data.draw(st.binary(max_size=30)) for name in sorted(names)}
        commit = bytes([step]) * 16
        now = rec.patched(now, commit, changed, rec.layout_of(now))
        made = patch_on(base, now, commit, changed)
        assert made is not None
        base, payload = made
        assert base.commit == commit
        assert patched_record(before, now[:32], payload) == now


def test_a_patch_on_another_record_makes_none() -> None:
    one = record_of({"a": b"\x01", "b": b"x" * 50})
    changed = {"a": b"\x02"}
    now = rec.patched(one, b"d" * 16, changed, rec.layout_of(one))
    made = patch_on(Base(0, 10**9, 1, b"c" * 16), now, b"d" * 16, changed)
    assert made is not None
    for other in ({"a": b"\x01", "b": b"y" * 50}, {"b": b"x" * 50}, {"a": b"\x01"}, {}):
        assert patched_record(record_of(other), now[:32], made[1]) is None
    for end in range(len(made[1])):
        assert patched_record(one, now[:32], made[1][:end]) is None


@given(st.binary(max_size=200))
def test_any_bytes_for_a_patch_make_a_record_or_none(data: bytes) -> None:
    assert patched_record(record_of({"a": b"\x01"}), b"i" * 32, data) is None


def test_only_what_is_in_the_log_is_a_base_and_only_for_its_newest_commit() -> None:
    bases = Bases()
    bases.note(b"f", Base(64, 100, 1, b"one"))
    assert bases.of(b"f", b"one") is not None, "a batch may update a session twice"
    assert bases.of(b"f", b"other") is None
    bases.begin()  # the batch was not written
    assert bases.of(b"f", b"one") is None
    bases.note(b"f", Base(64, 100, 1, b"one"))
    bases.written()
    bases.begin()
    assert bases.of(b"f", b"one") is not None


def test_the_table_of_bases_is_bounded() -> None:
    bases = Bases()
    for number in range(patches._MAX_BASES + 10):
        bases.note(number.to_bytes(4, "little"), Base(64, 100, number, b"c"))
    bases.written()
    assert len(bases._written) == patches._MAX_BASES
    assert bases.of(bytes(4), b"c") is None, "the oldest went"


def put_and_patch(*, base: bytes = b"", **of_patch: Any) -> tuple[bytes, int]:
    """Return a segment's bytes with a put and a patch on it, and where the patch is."""
    record = record_of({"a": b"\x01", "b": b"x" * 50})
    changed = {"a": b"\x02"}
    now = rec.patched(record, b"d" * 16, changed, rec.layout_of(record))
    made = patch_on(Base(64, 10**9, 5, b"c" * 16), now, b"d" * 16, changed)
    assert made is not None
    put = base or encode_frame(SALT, PUT, b"k", record[32:], 5, 4, record[:32] + bytes(16))
    where = Base(64, len(put), 5, b"").packed
    given = {"key": b"k", "ids": now[:32] + record[16:32], "where": where, **of_patch}
    patch = encode_frame(
        *(SALT, PATCH, given["key"], given["where"] + made[1], 6, 5, given["ids"]),
        raw_bytes=len(made[1]),
    )
    return bytes(64) + put + patch, 64 + len(put)


def read_from(data: bytes, at: int) -> Patched | str | None:
    return patches.read_patched(
        lambda offset, size: data[offset : offset + size], at, SALT, PlainRecords(), b"k"
    )


def test_a_patch_is_only_read_with_the_base_that_it_names() -> None:
    data, at = put_and_patch()
    assert isinstance(read_from(data, at), Patched)
    record = record_of({"a": b"\x01", "b": b"x" * 50})
    ids = record[:32] + bytes(16)
    others = {
        "of another session": encode_frame(SALT, PUT, b"l", record[32:], 5, 4, ids),
        "with another number": encode_frame(SALT, PUT, b"k", record[32:], 4, 4, ids),
        "of another life": encode_frame(SALT, PUT, b"k", record[32:], 5, 4, b"o" + ids[1:]),
        "of another segment": encode_frame(SALT + 1, PUT, b"k", record[32:], 5, 4, ids),
        "no put": encode_frame(SALT, PATCH, b"k", record[32:], 5, 4, ids),
    }
    for what, other in others.items():
        found = read_from(*put_and_patch(base=other))
        assert found == "the record that its patch is built on is damaged", what
    assert isinstance(read_from(*put_and_patch(key=b"l")), str)
    assert isinstance(read_from(*put_and_patch(ids=NO_IDS)), str)
    for place in ((64, 2**31, 5), (2**32 - 1, 200, 5), (0, 0, 5), (at, 200, 5)):
        where = PATCH_BASE.pack(*place)
        assert isinstance(read_from(*put_and_patch(where=where)), str), place
    assert read_from(data, at - 1) == "the stored bytes fail their checksum"


def test_no_flipped_bit_in_a_patch_or_its_base_gives_a_record() -> None:
    data, at = put_and_patch()
    damaged = bytearray(data)
    for bit in range(8 * 64, 8 * len(data)):
        damaged[bit // 8] ^= 1 << bit % 8
        assert isinstance(read_from(bytes(damaged), at), str), bit
        damaged[bit // 8] ^= 1 << bit % 8
    for end in range(at, len(data)):
        assert isinstance(read_from(data[:end], at), str)


def test_a_sealed_patch_opens_where_it_was_sealed_for_and_nowhere_else() -> None:
    codec = RecordCodec(Sealing(KeyRing([bytes(range(32))]), RECORDS), b"d" * 16)
    ids, where = b"i" * 16 + b"c" * 16 + b"b" * 16, Base(64, 200, 5, b"").packed
    sealed = codec.seal_patch(b"what has changed", b"k", 6, ids, 0, 16, where)

    def frame(**other: Any) -> Frame:
        made = encode_frame(SALT, PATCH, b"k", where + sealed, 6, 5, ids, flags=2, raw_bytes=16)
        found = decode_frame(made, 0, SALT)
        assert isinstance(found, Frame)
        return found._replace(**other)

    assert codec.patch_of(frame()) == b"what has changed"
    elsewhere = Base(64, 200, 4, b"").packed
    for other in (
        {"key": b"l"},
        {"sequence": 7},
        {"commit": b"x" * 16},
        {"base": b"x" * 16},
        {"incarnation": b"i" * 15 + b"x"},
        {"flags": 0},
        {"payload": elsewhere + sealed},
    ):
        assert codec.patch_of(frame(**other)) is None, other
    assert PlainRecords.patch_of(frame()) is None
    assert codec.open(frame(payload=sealed)) is None, "nor for a whole record"


# In a log


async def test_an_update_of_a_large_session_writes_what_has_changed() -> None:
    files = MemoryFiles()
    async with opened(files) as state:
        await patched_session(state, "s")
        await state.create_session(session_id="small", data={"n": 1})
        await state.update_session_data("small", "n", 2)
        before = disk_of(state).writer.bytes_written
        await state.update_session_data("s", "last", "x" * 10)
        assert disk_of(state).writer.bytes_written - before < 300
        await state.spill_session("s")
        await state.spill_session("small")
        expected = {**large(1), "last": "x" * 10}
        assert await everything(state) == {"s": expected, "small": {"n": 2}}
        await abandon(state)
    for _ in range(2):
        files = files.after_kill()
        async with opened(files) as state:
            assert await everything(state) == {"s": expected, "small": {"n": 2}}
            assert disk_of(state).damages == []


async def test_a_patch_takes_the_place_of_the_one_before_and_what_is_dead_is_counted() -> None:
    files = MemoryFiles()
    async with opened(files, config(compression="none")) as state:
        await patched_session(state, "s")
        for name, value in (("last", 7), ("n", 8), ("last", 9)):
            await state.update_session_data("s", name, value)
        segment = disk_of(state).segments[1]
        [base, *newer] = [item for item in log_of(files) if item.frame.type == FrameType.PUT][-1:]
        last = log_of(files)[-1]
        assert not newer
        assert last.frame.type == FrameType.PATCH
        assert segment.live_bytes == base.frame.length + last.frame.length
        assert row_of(state, "s").live_bytes == segment.live_bytes
        assert await state.terminate_session("s")
        assert segment.live_bytes == 0
        await abandon(state)


async def test_a_patch_that_has_grown_is_written_as_a_whole_record() -> None:
    files = MemoryFiles()
    async with opened(files, config(compression="none")) as state:
        data = {f"f{number}": "x" * 300 for number in range(10)}
        await state.create_session(session_id="s", data=data)
        for number in (0, *range(10)):
            await state.update_session_data("s", f"f{number}", "y" * 300)
        await abandon(state)
    kinds = [item.frame.type for item in log_of(files)]
    with patching(1024, 1 / 4):
        files = MemoryFiles()
        async with opened(files, config(compression="none")) as state:
            await state.create_session(session_id="s", data=data)
            for number in (0, *range(10)):
                await state.update_session_data("s", f"f{number}", "y" * 300)
            lengths = [i.frame.length for i in log_of(files) if i.frame.type == FrameType.PATCH]
            await abandon(state)
    assert max(lengths) <= 3200 / 4 + 200
    assert [item.frame.type for item in log_of(files)].count(FrameType.PUT) > kinds.count(
        FrameType.PUT
    )


@pytest.mark.parametrize("how", ["metadata", "ttl", "replaced", "new field", "removed field"])
async def test_what_is_no_change_of_values_writes_the_whole_record(how: str) -> None:
    files = MemoryFiles()
    async with opened(files) as state:
        await patched_session(state, "s")
        if how == "metadata":
            await state.update_session_metadata("s", source="web")
        elif how == "ttl":
            await state.set_ttl("s", 77)
        elif how == "replaced":
            await state.replace_session("s", large(2))
        else:
            async with state.edit("s") as draft:
                if how == "new field":
                    draft["new"] = 1
                else:
                    del draft["last"]
        assert row_of(state, "s").length < ROW_IS_PATCH
        expected = await everything(state)
        await state.update_session_data("s", "n", 5)
        expected["s"]["n"] = 5
        assert row_of(state, "s").length >= ROW_IS_PATCH
        await abandon(state)
    async with opened(files.after_kill()) as state:
        assert await everything(state) == expected


async def test_the_first_update_in_a_new_segment_is_whole() -> None:
    files = MemoryFiles()
    async with opened(files, config(segment_bytes=64 * 1024)) as state:
        await patched_session(state, "s")
        await disk_of(state)._rotate()
        await state.update_session_data("s", "last", 8)
        assert row_of(state, "s").length < ROW_IS_PATCH
        await state.update_session_data("s", "last", 9)
        assert row_of(state, "s").length >= ROW_IS_PATCH
        await state.compact()
        await state.spill_session("s")
        assert (await everything(state))["s"]["last"] == 9


async def test_compaction_writes_the_whole_record_and_the_base_does_not_die_before() -> None:
    files = MemoryFiles()
    async with opened(files, config(segment_bytes=64 * 1024)) as state:
        for number in range(10):
            await patched_session(state, f"s{number}", number)
        for number in range(30):
            await state.create_session(session_id=f"gone{number}", data=large(number))
            await state.terminate_session(f"gone{number}")
        expected = await everything(state)
        await disk_of(state)._rotate()
        await state.compact()
        assert (await state.stats()).disk.compactions >= 1
        for sid in expected:
            await state.spill_session(sid)
            assert row_of(state, sid).length < ROW_IS_PATCH
        assert await everything(state) == expected
        assert FrameType.PATCH not in types_in(files)
        await abandon(state)
    for _ in range(2):
        files = files.after_kill()
        async with opened(files) as state:
            assert await everything(state) == expected


async def test_every_kind_of_opening_finds_patched_sessions() -> None:
    files = MemoryFiles()
    clock = ManualClock()
    async with opened(files, clock=clock) as state:
        for number in range(5):
            await patched_session(state, f"s{number}", number)
        expected = await everything(state)
    live = None
    for without in ("nothing", "INDEX", "hint"):  # snapshot, hints, a scan
        left = files.after_kill()
        for path in list(left.contents()):
            if without != "nothing" and (path.endswith(("INDEX", f".{without}"))):
                left.remove(path)
        async with opened(left, clock=clock) as state:
            lengths = {row_of(state, sid).length for sid in expected}
            assert live in {None, *[frozenset(lengths)]}
            live = frozenset(lengths)
            assert min(lengths) >= ROW_IS_PATCH
            assert disk_of(state).segments[1].live_bytes == sum(
                row_of(state, sid).live_bytes for sid in expected
            )
            assert await everything(state) == expected
            await abandon(state)


async def test_an_ended_session_with_a_patch_stays_ended() -> None:
    files = MemoryFiles()
    async with opened(files) as state:
        await patched_session(state, "s")
        assert await state.terminate_session("s")
        await state.create_session(session_id="s", data=large(5))
        await state.update_session_data("s", "last", "again")
        expected = await everything(state)
        assert expected["s"]["n"] == 5
        await patched_session(state, "t")
        assert await state.terminate_session("t")
        await abandon(state)
    async with opened(files.after_kill()) as state:
        assert await everything(state) == expected


# Every prefix, every bit


async def history() -> tuple[MemoryFiles, dict[bytes, tuple[str, dict[str, Any]]]]:
    """A log with patches, and what each commit in it is."""
    files = MemoryFiles()
    told: dict[bytes, tuple[str, dict[str, Any]]] = {}
    async with opened(files, config(ttl_seconds=0)) as state:

        async def tell(sid: str) -> None:
            session = await state.get_session(sid)
            assert session is not None
            told[session._record[16:32]] = sid, session.data

        for sid in ("a", "b"):
            await state.create_session(session_id=sid, data=large(ord(sid), 1100))
            await tell(sid)
        for number in range(3):
            for sid, name in (("a", "last"), ("b", "n")):
                await state.update_session_data(sid, name, number)
                await tell(sid)
        await state.terminate_session("b")
        await state.update_session_data("a", "n", "end")
        await tell("a")
        await abandon(state)
    return files.after_kill(), told


def records_in(files: MemoryFiles) -> dict[str, dict[str, Any] | str]:
    """Recover, and return the data of each session, or why it cannot be read."""
    recovered = recover(files)
    found: dict[str, dict[str, Any] | str] = {}
    for key in (b"a", b"b"):
        manifest = decode_manifest(files.data(f"{PATH}/MANIFEST"))
        row = recovered.index.get(patches_fingerprint(manifest.fingerprint_key, key))
        if row is None:
            continue
        data = files.data(LOG)
        salt = recovered.segments[row.segment].salt_checksum
        record: bytes | str | None = "the stored bytes fail their checksum"
        if row.length >= ROW_IS_PATCH:
            made = patches.read_patched(
                lambda offset, size, data=data: data[offset : offset + size],  # type: ignore[misc]
                row.offset,
                salt,
                PlainRecords(),
                key,
            )
            record = made.record if isinstance(made, Patched) else made
        else:
            frame = decode_frame(data[row.offset : row.offset + row.length], 0, salt)
            if isinstance(frame, Frame) and frame.type == FrameType.PUT:
                record = PlainRecords.record_of(frame)
        assert record is not None
        if isinstance(record, str):
            found[key.decode()] = record
        else:
            fields = rec.packed_fields(record)
            found[key.decode()] = {name: rec.unpack_value(value) for name, value in fields.items()}
    return found


def patches_fingerprint(secret: bytes, key: bytes) -> bytes:
    return Fingerprints(secret).of(key)


def expected_of(
    frames: list[Placed], told: dict[bytes, tuple[str, dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    state: dict[str, dict[str, Any]] = {}
    for placed in frames:
        if placed.frame.type == FrameType.DELETE:
            del state[placed.frame.key.decode()]
        elif placed.frame.type in (FrameType.PUT, FrameType.PATCH):
            sid, data = told[placed.frame.commit]
            state[sid] = data
    return state


async def test_every_prefix_of_a_log_with_patches_is_what_was_acknowledged() -> None:
    files, told = await history()
    frames, log = log_of(files), files.data(LOG)
    assert [item.frame.type for item in frames].count(FrameType.PATCH) >= 5
    interesting = {cut for item in frames for cut in (item.end - 1, item.end, item.end + 1)}
    interesting |= set(range(64, len(log), 97))
    with stepped():
        for cut in sorted(interesting):
            left = files.after_kill()
            left.set_data(LOG, log[:cut])
            before = [placed for placed in frames if placed.end <= cut]
            assert records_in(left) == expected_of(before, told), cut


async def test_no_flipped_bit_in_a_log_with_patches_gives_a_wrong_value() -> None:
    files, told = await history()
    frames, log = log_of(files), files.data(LOG)
    expected = expected_of(frames, told)
    chance = random.Random(3)
    bits = {chance.randrange(8 * 64, 8 * len(log)) for _ in range(60)}
    for placed in frames:  # all of the headers of some
        bits |= {chance.randrange(8 * placed.offset, 8 * placed.end) for _ in range(5)}
    errors = 0
    for bit in sorted(bits):
        damaged = bytearray(log)
        damaged[bit // 8] ^= 1 << bit % 8
        left = files.after_kill()
        left.set_data(LOG, bytes(damaged))
        found = records_in(left)
        assert found.keys() == expected.keys(), bit
        for sid, value in found.items():
            assert isinstance(value, str) or value == expected[sid], bit
            errors += isinstance(value, str)
    assert errors > 10


async def test_a_damaged_base_is_reported_by_every_way_to_read() -> None:
    files = MemoryFiles()
    async with opened(files) as state:
        await patched_session(state, "s")
        await patched_session(state, "other", 2)
        await abandon(state)
    files = files.after_kill()
    frames = log_of(files)
    base = [item for item in frames if item.frame.key == b"s" and item.frame.type == FrameType.PUT]
    damaged = bytearray(files.data(LOG))
    damaged[base[-1].end - 20] ^= 1
    files.set_data(LOG, bytes(damaged))
    async with opened(files) as state:
        with pytest.raises(CorruptionError, match="built on is damaged"):
            await state.get_session("s")
        with pytest.raises(CorruptionError, match="built on is damaged"):
            disk_of(state).reading.waiting(row_of(state, "s"), b"s")
        session = await state.get_session("other")
        assert session is not None
        assert session["n"] == 2
        await state.compact()
        with pytest.raises(CorruptionError):
            await state.get_session("s")
        await abandon(state)


# The format


async def test_a_directory_is_of_the_newer_version_from_its_first_patch_on() -> None:
    files = MemoryFiles()
    async with opened(files) as state:
        await state.create_session(session_id="s", data=large(1))
        await state.update_session_data("s", "last", 1)

        def version() -> int:
            return int(json.loads(files.data(f"{PATH}/MANIFEST").split(b"\n")[0])["format_version"])

        assert version() == FORMAT_VERSION
        assert FrameType.PATCH not in types_in(files)
        await state.update_session_data("s", "last", 2)
        assert version() == PATCHES_VERSION
        assert FrameType.PATCH in types_in(files)
        await disk_of(state)._rotate()
        assert version() == PATCHES_VERSION
    with pytest.raises(OtherFormat, match="use a newer version"):  # as it was before patches
        check_version(version(), FORMAT_VERSION)
    async with opened(files) as state:
        assert version() == PATCHES_VERSION
        await state.create_session(session_id="t", data=large(2))
        await state.update_session_data("t", "last", 1)
        assert row_of(state, "t").length >= ROW_IS_PATCH, "at once"


async def test_a_directory_of_small_sessions_stays_of_the_older_version() -> None:
    files = MemoryFiles()
    async with opened(files) as state:
        await state.create_session(session_id="s", data={"n": 0, "text": "x" * 500})
        for number in range(5):
            await state.update_session_data("s", "n", number)
    manifest = decode_manifest(files.data(f"{PATH}/MANIFEST"))
    assert manifest.format_version == FORMAT_VERSION


async def test_where_the_manifest_cannot_be_replaced_records_are_written_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = MemoryFiles()
    async with opened(files) as state:
        await state.create_session(session_id="s", data=large(1))

        async def fails(**_: object) -> None:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patched:
            patched.setattr(disk_of(state), "_write_manifest", fails)
            for number in range(3):
                await state.update_session_data("s", "last", number)
        assert FrameType.PATCH not in types_in(files)
        await state.update_session_data("s", "last", 4)
        await state.update_session_data("s", "last", 5)
        assert FrameType.PATCH in types_in(files)
        assert (await everything(state))["s"]["last"] == 5


# Looking at real files


async def test_looking_at_a_directory_with_patches(tmp_path: Path) -> None:
    path = str(tmp_path / "state")
    async with StateManager(config=config(path), clock=ManualClock()) as state:
        for number in range(3):
            await patched_session(state, f"s{number}", number)
        expected = await everything(state)
    [report] = inspect_directory(path)
    assert report.patches >= 3
    assert report.live_sessions == 3
    assert report.damages == []
    stored = list(newest_records(path))
    found = {}
    for item in stored:
        assert isinstance(item, StoredRecord)
        fields = rec.packed_fields(item.record)
        found[item.session_id] = {name: rec.unpack_value(value) for name, value in fields.items()}
    assert found == expected
    log = tmp_path / "state" / "0000000001.seg"
    damaged = bytearray(log.read_bytes())
    damaged[damaged.index(large(1)["text"])] ^= 1
    log.write_bytes(bytes(damaged))
    reasons = [item.reason for report, _ in scan_directory(path) for item in report.damages]
    assert "the record that its patch is built on is damaged" in reasons
    damages = [item for item in newest_records(path) if not isinstance(item, StoredRecord)]
    assert {damage.session_id for damage in damages} == {"s1"}
    with pytest.raises(DirectoryNotUsable):
        list(newest_records(str(tmp_path)))
