"""Checkpoints of encrypted directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from persistence import ManualClock, errors
from persistence.checkpoint.manifest import (
    Locked,
    MalformedCheckpoint,
    Manifest,
    PackedRun,
    checksum_of,
    chunk_name,
    decode_chunk,
    decode_manifest,
    encode_chunk,
    encode_manifest,
    ref_of,
)
from persistence.disk.compactor import Compactor
from persistence.security.keyring import KeyRing
from persistence.security.sealing import CHECKPOINTS, RECORDS, Sealing
from tests.engine import Start

ID, OTHER_ID = (
    "00000001-20260131T120000Z-0123abcd-89ef0123",
    "00000002-20260131T120000Z-0123abcd-89ef0123",
)
KEY = bytes(range(32))
SEALER = Sealing(KeyRing([KEY]), CHECKPOINTS)
OTHERS = [Sealing(KeyRing([bytes(32)]), CHECKPOINTS), None]
RUNS = [PackedRun(1, b"frames " * 50), PackedRun(2, b"more")]
MANIFEST = Manifest(ID, "", ID, 0, 9, 1.0, "because", 3, "space", "ab" * 16, ())


@pytest.mark.parametrize("compress", [True, False])
def test_a_sealed_chunk_opens_to_the_runs_that_were_sealed(compress: bool) -> None:
    chunk = encode_chunk(RUNS, 5, compress=compress, sealer=SEALER, name=chunk_name(ID, 3))
    assert b"frames" not in chunk
    found = decode_chunk(chunk, ref_of(chunk, ID, 3), SEALER)
    assert [(run.salt_checksum, bytes(run.frames)) for run in found] == [tuple(r) for r in RUNS]


@pytest.mark.parametrize(("checkpoint", "number"), [(OTHER_ID, 3), (ID, 4)])
def test_a_chunk_of_another_place_does_not_open(checkpoint: str, number: int) -> None:
    chunk = encode_chunk(RUNS, 5, compress=True, sealer=SEALER, name=chunk_name(ID, 3))
    with pytest.raises(MalformedCheckpoint, match="not what was sealed"):
        decode_chunk(chunk, ref_of(chunk, checkpoint, number), SEALER)


def test_a_changed_table_or_body_does_not_open_whatever_the_checksum_says() -> None:
    from crc32c import crc32c

    chunk = encode_chunk(RUNS, 5, compress=True, sealer=SEALER, name=chunk_name(ID, 3))
    for at in range(28, len(chunk) - 4):
        changed = bytearray(chunk[:-4])
        changed[at] ^= 1
        forged = bytes(changed) + crc32c(bytes(changed)).to_bytes(4, "little")
        with pytest.raises((MalformedCheckpoint, Locked)):
            decode_chunk(forged, ref_of(forged, ID, 3), SEALER)


def test_a_plain_chunk_or_a_key_that_is_lacking_is_told_apart_from_damage() -> None:
    plain = encode_chunk(RUNS, 5, compress=True)
    with pytest.raises(MalformedCheckpoint, match="not sealed"):
        decode_chunk(plain, ref_of(plain, ID, 0), SEALER)
    sealed = encode_chunk(RUNS, 5, compress=True, sealer=SEALER, name=chunk_name(ID, 0))
    for other in OTHERS:
        with pytest.raises(Locked, match=SEALER.newest.hex()):
            decode_chunk(sealed, ref_of(sealed, ID, 0), other)
    purpose = Sealing(KeyRing([KEY]), RECORDS)
    with pytest.raises(MalformedCheckpoint):
        decode_chunk(sealed, ref_of(sealed, ID, 0), purpose)


def test_a_sealed_manifest_says_what_it_said_and_shows_nothing() -> None:
    data = encode_manifest(MANIFEST, SEALER)
    assert b"because" not in data
    found = decode_manifest(data, ID, SEALER)
    assert found.is_sealed
    assert encode_manifest(found) == encode_manifest(MANIFEST)
    assert not decode_manifest(encode_manifest(MANIFEST), ID, SEALER).is_sealed
    for other in OTHERS:
        with pytest.raises(Locked, match="--key-file"):
            decode_manifest(data, ID, other)
    with pytest.raises(MalformedCheckpoint):
        decode_manifest(data, OTHER_ID, SEALER)
    assert checksum_of(data)


# With managers

KEYS = {"old": "0b" * 32, "new": "5e" * 32}


def security(*names: str) -> dict[str, Any]:
    return {"encrypt": True, "secret_keys": ",".join(KEYS[name] for name in names)}


async def test_a_checkpoint_of_an_encrypted_directory_restores_with_its_keys_only(
    start: Start, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    there = {"checkpoint": {"store": str(store)}, "shutdown": {"checkpoint": False}}
    one = await start(path=tmp_path / "one", security=security("old"), **there)
    await one.create_session(session_id="a", data={"text": "nobody may read this"})
    full = await one.create_checkpoint("a reason")
    await one.update_session_data("a", "n", 1)
    second = await one.create_checkpoint()
    assert second.kind == "incremental"
    content = b"".join(file.read_bytes() for file in store.iterdir())
    assert b"nobody may" not in content
    assert b"a reason" not in content

    two = await start(path=tmp_path / "two", security=security("old", "new"), **there)
    assert [info.reason for info in await two.list_checkpoints()] == ["a reason", "manual"]
    assert (await two.restore_checkpoint("latest")).id == second.id
    session = await two.get_session("a")
    assert session is not None
    assert session.data == {"text": "nobody may read this", "n": 1}
    assert (await two.restore_checkpoint(full.id)).damaged == ()

    for name, other in (("three", {"security": security("new")}), ("four", {})):
        stranger = await start(path=tmp_path / name, **other, **there)
        with pytest.raises(errors.CheckpointDamaged, match="encrypted with key"):
            await stranger.restore_checkpoint("latest")
        assert await stranger.get_active_sessions() == []
        assert {info.kind for info in await stranger.list_checkpoints()} == {"damaged"}


async def test_a_worker_that_opened_before_a_rotation_reads_what_is_sealed_with_the_new_key(
    start: Start, tmp_path: Path, clock: ManualClock
) -> None:
    file = tmp_path / "keys"
    file.write_text(KEYS["old"])
    file.chmod(0o600)
    there: dict[str, Any] = {"checkpoint": {"store": str(tmp_path / "store"), "keep": 1}}
    there |= {"shutdown": {"checkpoint": False}}
    there |= {"security": {"encrypt": True, "key_file": str(file)}}
    old = await start(path=tmp_path / "one", **there)
    await old.create_session(session_id="a", data={})
    first = await old.create_checkpoint()
    file.write_text(f"{KEYS['old']} {KEYS['new']}")
    clock.advance(5.0)
    new = await start(path=tmp_path / "two", **there)
    await new.create_session(session_id="b", data={})
    made = await new.create_checkpoint()

    assert [each.kind for each in await old.list_checkpoints()] == ["full", "full"]
    assert (await old.restore_checkpoint("latest")).id == made.id
    assert await old.get_active_sessions() == ["b"]
    assert [each.id for each in await new.list_checkpoints()] == [first.id, made.id]


async def test_a_plain_checkpoint_is_not_restored_where_everything_is_encrypted(
    start: Start, tmp_path: Path
) -> None:
    there = {"checkpoint": {"store": str(tmp_path / "store")}, "shutdown": {"checkpoint": False}}
    plain = await start(path=tmp_path / "plain", **there)
    await plain.create_session(session_id="planted", data={})
    sealed = await start(path=tmp_path / "sealed", security=security("new"), **there)
    await sealed.create_session(session_id="a", data={})
    mine = await sealed.create_checkpoint()
    await plain.create_checkpoint()
    restored = await sealed.restore_checkpoint("latest")
    assert restored.id == mine.id
    assert "not encrypted" in restored.skipped[0][1]
    assert await sealed.get_active_sessions() == ["a"]


async def nothing_to_merge(_: Compactor) -> bool:
    return False


async def test_behind_a_rotation_no_checkpoint_needs_the_older_key(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"checkpoint": {"store": str(tmp_path / "store"), "keep": 2}}
    there["shutdown"] = {"checkpoint": False}
    before = await start(path=tmp_path / "one", security=security("old"), **there)
    for number in range(50):
        await before.create_session(session_id=f"s {number}", data={"text": "x" * 100})
    assert (await before.create_checkpoint()).kind == "full"
    await before.close()

    with monkeypatch.context() as context:  # else everything may be encrypted anew too early
        context.setattr(Compactor, "_merge_once", nothing_to_merge)
        after = await start(path=tmp_path / "one", security=security("old", "new"), **there)
        await after.update_session_data("s 1", "n", 0)
        mixed = await after.create_checkpoint()
        stranger = await start(path=tmp_path / "stranger", security=security("new"), **there)
        with pytest.raises(errors.CheckpointDamaged, match="encrypted with key"):  # without some
            await stranger.restore_checkpoint(mixed.id)
    await after.compact()
    kinds = []
    for number in range(3):
        await after.update_session_data("s 1", "n", number)
        kinds.append((await after.create_checkpoint()).kind)
    assert kinds == ["full", "incremental", "incremental"]

    # As keep says, those of before the rotation are gone: the older key may go, too.
    fresh = await start(path=tmp_path / "two", security=security("new"), **there)
    restored = await fresh.restore_checkpoint("latest")
    assert (restored.sessions, restored.skipped) == (50, ())
