"""Checkpoints of a log with patches: chunks hold whole records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from persistence import ManualClock, SecurityConfig, StateManager
from persistence.checkpoint import create
from persistence.checkpoint.manifest import ChunkRef, decode_chunk, decode_manifest
from persistence.checkpoint.restore import restore_into
from persistence.checkpoint.state import Walked, walk
from persistence.checkpoint.stores import ChunkKey
from persistence.disk.cut import take_cut
from persistence.disk.format import ROW_IS_PATCH, FrameType
from persistence.errors import CorruptionError
from persistence.keys import seals_for
from tests.checkpoint.support import MemoryStore, checkpoint, records_in
from tests.engine import KIB, Start, disk_of
from tests.support import everything, patching

KEYS: Final = ("0b" * 32, "5e" * 32)
SECURITY: Final[dict[str, Any]] = {"encrypt": True, "secret_keys": ",".join(KEYS)}


@pytest.fixture(autouse=True)
def _patches_of_small_records() -> Iterator[None]:
    with patching(200, 0.5):
        yield


async def update(state: StateManager, count: int, value: int) -> None:
    for n in range(count):
        for step in (1, 2):
            await state.update_session_data(f"s{n}", "n", value + step)


async def make(state: StateManager, count: int) -> None:
    for n in range(count):
        data = {"n": n, "text": f"session {n} " * 60}
        await state.create_session(session_id=f"s{n}", data=data)


def the_log(state: StateManager) -> Path:
    return next(Path(disk_of(state).directory).glob("*.seg"))


def patched_in(state: StateManager) -> int:
    disk = disk_of(state)
    rows = [disk.index.get(disk.fingerprint(f"s{n}".encode())) for n in range(100)]
    return sum(row is not None and row.length >= ROW_IS_PATCH for row in rows)


def frames_in(store: MemoryStore, checkpoint_id: str) -> list[Any]:
    manifest = decode_manifest(store.kept_manifests[checkpoint_id], checkpoint_id)
    found: list[Any] = []
    refs: tuple[ChunkRef, ...] = manifest.chunks
    for ref in refs:
        if ref.checkpoint == checkpoint_id:
            chunk = store.kept_chunks[ChunkKey(ref.checkpoint, ref.number)]
            found += walk(decode_chunk(chunk, ref), Walked())
    return found


async def test_full_and_incremental_ones_come_back_byte_for_byte(
    start: Start, tmp_path: Path, clock: ManualClock
) -> None:
    store = MemoryStore()
    state = await start(disk={"segment_bytes": 64 * KIB})
    await make(state, 60)
    await update(state, 40, 100)
    assert patched_in(state) >= 30
    first = await checkpoint(state, store)
    assert first.kind == "full"
    expected_first = await records_in(state)
    await update(state, 20, 200)  # on bases that only the first one has shipped
    assert await state.terminate_session("s1")
    second = await checkpoint(state, store)
    assert second.kind == "incremental"
    expected = await records_in(state)
    for info in (first, second):
        kinds = {frame.type for frame in frames_in(store, info.id)}
        assert kinds <= {FrameType.PUT, FrameType.DELETE, FrameType.TOUCH}
    for wanted, records in ((first, expected_first), (second, expected)):
        path = tmp_path / wanted.id
        await restore_into(store, str(path), clock, wanted.id)
        other = await start(path=path)
        assert await records_in(other) == records
        await other.close()


async def test_what_is_updated_behind_the_cut_is_shipped_as_it_was(
    start: Start, tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    state = await start(disk={"segment_bytes": 64 * KIB})
    await make(state, 20)
    await update(state, 20, 100)
    expected = await records_in(state)

    async def cut_and_go_on(*args: Any) -> Any:
        cut = await take_cut(*args)
        await update(state, 20, 500)
        return cut

    monkeypatch.setattr(create, "take_cut", cut_and_go_on)
    await checkpoint(state, store)
    await restore_into(store, str(tmp_path / "new"), clock)
    other = await start(path=tmp_path / "new")
    assert await records_in(other) == expected


@pytest.mark.parametrize("is_known", [False, True])
async def test_a_session_whose_base_is_damaged_is_left_out_and_named(
    start: Start, tmp_path: Path, clock: ManualClock, is_known: bool
) -> None:
    store = MemoryStore()
    state = await start(disk={"segment_bytes": 64 * KIB, "compression": "none"})
    await make(state, 3)
    await update(state, 3, 100)
    await checkpoint(state, store)  # an older state of it is there
    await update(state, 3, 200)
    log = the_log(state)
    data = bytearray(log.read_bytes())
    for at in [i for i in range(len(data)) if data.startswith(b"session 1 session", i)]:
        data[at] ^= 1
    with log.open("r+b") as file:
        file.write(data)
    if is_known:  # then every frame of the segment is looked at
        await state.spill_session("s1")
        with pytest.raises(CorruptionError):
            await state.get_session("s1")
    await checkpoint(state, store)
    info = await restore_into(store, str(tmp_path / "new"), clock)
    assert info.damaged == ("'s1'",)
    other = await start(path=tmp_path / "new")
    assert {sid: data["n"] for sid, data in (await everything(other)).items()} == {
        "s0": 202,
        "s2": 202,
    }


async def test_an_encrypted_log_with_patches_is_shipped_merged_and_opened_with_a_new_key(
    start: Start, tmp_path: Path, clock: ManualClock
) -> None:
    store, seals = MemoryStore(), seals_for(SecurityConfig(**SECURITY))
    older = {"encrypt": True, "secret_keys": KEYS[0]}
    state = await start(security=older, disk={"segment_bytes": 64 * KIB})
    await make(state, 30)
    await update(state, 30, 100)
    assert patched_in(state) >= 20
    await state.close()
    state = await start(security=SECURITY, disk={"segment_bytes": 64 * KIB})
    assert patched_in(state) >= 20
    expected = await records_in(state)
    await state.compact()  # everything is sealed with the older key
    assert patched_in(state) == 0
    for n in range(30):
        await state.spill_session(f"s{n}")
    assert await records_in(state) == expected
    await update(state, 30, 300)
    expected = await records_in(state)
    await checkpoint(state, store, seals=seals)
    path = tmp_path / "new"
    await restore_into(store, str(path), clock, seals=seals)
    other = await start(path=path, security=SECURITY)
    assert await records_in(other) == expected
