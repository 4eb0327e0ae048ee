from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from crc32c import crc32c

from persistence import ManualClock, StateManager, errors
from persistence.checkpoint.catalogue import delete_checkpoint, list_checkpoints
from persistence.checkpoint.manifest import FORMAT_VERSION
from persistence.checkpoint.restore import StagedRestore, restore_into, stage_restore
from persistence.checkpoint.stores import CheckpointStore, ChunkKey
from persistence.disk.format import Frame
from persistence.ids import CommitIds
from persistence.record import head
from tests.checkpoint.support import CLOCK, MemoryStore, checkpoint, data_in, records_in, restored
from tests.disk.memoryfiles import Killed, MemoryFiles, fail, kill_at
from tests.engine import KIB, Start, config_for, disk_of
from tests.support import Points

Expected = dict[str, dict[str, Any]]


async def make(state: StateManager, count: int, start: int = 0) -> Expected:
    expected = {
        f"s{n}": {"n": n, "text": f"session {n} " * 60} for n in range(start, start + count)
    }
    await asyncio.gather(
        *(state.create_session(session_id=sid, data=data) for sid, data in expected.items())
    )
    return expected


async def two_checkpoints(state: StateManager, store: CheckpointStore) -> tuple[Expected, Expected]:
    """Make a full and an incremental one; return the states at both."""
    first = await make(state, 100)
    await checkpoint(state, store)
    second = first | await make(state, 30, start=1000)
    await state.terminate_session("s5")
    del second["s5"]
    await checkpoint(state, store)
    return first, second


# --- damage ---------------------------------------------------------------------------------------


async def test_damage_of_any_own_chunk_is_found_and_the_one_before_restored(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.checkpoint.create.CHUNK_BYTES", 8 * KIB)
    monkeypatch.setattr("persistence.checkpoint.plan.CHUNK_BYTES", 8 * KIB)
    store = MemoryStore()
    first, _ = await two_checkpoints(await start(), store)
    older, newer = sorted(store.kept_manifests)
    own = [key for key in store.kept_chunks if key.checkpoint == newer]
    assert len(own) > 2
    for number, key in enumerate(own):
        intact = store.kept_chunks[key]
        for at in range(0, len(intact), max(1, len(intact) // 7)):
            damaged = bytearray(intact)
            damaged[at] ^= 1 << at % 8
            store.kept_chunks[key] = bytes(damaged)
            info, found = await restored(store, tmp_path / f"{number} {at}")
            assert (info.id, found) == (older, first)
            assert [skipped for skipped, _ in info.skipped] == [newer]
        store.kept_chunks[key] = intact


async def test_a_chunk_that_is_intact_but_another_one_is_found_out(
    start: Start, tmp_path: Path
) -> None:
    store = MemoryStore()
    first, _ = await two_checkpoints(await start(), store)
    older, newer = sorted(store.kept_manifests)
    store.kept_chunks[ChunkKey(newer, 0)] = store.kept_chunks[ChunkKey(older, 0)]
    info, found = await restored(store, tmp_path / "new")
    assert (info.id, found) == (older, first)


@pytest.mark.parametrize("what", ["chunk", "manifest"])
async def test_what_is_damaged_in_a_real_store_is_passed_over(
    start: Start, store: CheckpointStore, tmp_path: Path, what: str
) -> None:
    first, _ = await two_checkpoints(await start(), store)
    older, newer = sorted(await store.manifests())
    if what == "chunk":
        await store.remove_chunks([ChunkKey(newer, 0)])
    else:
        await store.publish(newer, (await store.manifests())[newer][:-3] + b"xyz")
    info, found = await restored(store, tmp_path / "new")
    assert (info.id, found) == (older, first)
    assert info.skipped[0][0] == newer
    kinds = [one.kind for one in await list_checkpoints(store)]
    assert kinds == ["full", "damaged" if what == "manifest" else "incremental"]


async def test_when_all_are_damaged_nothing_is_changed(start: Start, tmp_path: Path) -> None:
    store = MemoryStore()
    await two_checkpoints(await start(), store)
    for key in store.kept_chunks:
        store.kept_chunks[key] = b"nothing"
    with pytest.raises(errors.CheckpointDamaged):
        await restore_into(store, str(tmp_path / "new"), CLOCK)
    assert await data_in(tmp_path / "new") == {}


async def test_without_falling_back_a_damaged_one_is_refused(start: Start, tmp_path: Path) -> None:
    store = MemoryStore()
    await two_checkpoints(await start(), store)
    newer = max(store.kept_manifests)
    del store.kept_chunks[ChunkKey(newer, 0)]
    with pytest.raises(errors.CheckpointDamaged, match=newer):
        await restore_into(store, str(tmp_path / "new"), CLOCK, newer, fall_back=False)


async def test_one_that_was_asked_for_is_not_replaced_by_another_workers(
    start: Start, tmp_path: Path
) -> None:
    store = MemoryStore()
    other, state = await start(path=tmp_path / "other"), await start(path=tmp_path / "one")
    expected = await make(other, 5)
    await checkpoint(other, store)
    await make(state, 5, start=5)
    info = await checkpoint(state, store)
    del store.kept_chunks[ChunkKey(info.id, 0)]
    with pytest.raises(errors.CheckpointDamaged, match=info.id):
        await restore_into(store, str(tmp_path / "new"), CLOCK, info.id)
    # "latest" is whosever is the newest that is intact.
    assert (await restored(store, tmp_path / "new"))[1] == expected


async def test_a_newer_format_is_refused_and_nothing_is_swept(start: Start, tmp_path: Path) -> None:
    store = MemoryStore()
    state = await start()
    await two_checkpoints(state, store)
    newer = max(store.kept_manifests)
    data = store.kept_manifests[newer]
    data = data[:8] + bytes([FORMAT_VERSION + 1]) + data[9:-4]
    store.kept_manifests[newer] = data + crc32c(data).to_bytes(4, "little")
    with pytest.raises(errors.CheckpointDamaged, match="newer version"):
        await restore_into(store, str(tmp_path / "new"), CLOCK)
    store.kept_chunks[ChunkKey(newer, 500)] = b"of the newer version"
    await checkpoint(state, store)
    assert ChunkKey(newer, 500) in store.kept_chunks


# --- withdrawn meanwhile --------------------------------------------------------------------------


class MovingStore(MemoryStore):
    """A store whose chunks are asked for while something else happens to it."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: list[Callable[[], Awaitable[Any]]] = []

    async def get_chunk(self, key: ChunkKey) -> bytes:
        if self.meanwhile:
            await self.meanwhile.pop(0)()
        return await super().get_chunk(key)


def next_one(state: StateManager, store: MovingStore) -> Callable[[], Awaitable[Any]]:
    """Return what makes a full checkpoint and withdraws all others, with their chunks."""

    async def made() -> None:
        old, store.name = list(store.kept_manifests), store.name + "'"
        await checkpoint(state, store)
        for one in old:
            await delete_checkpoint(store, one)

    return made


@pytest.mark.parametrize("times", [1, 3])
async def test_the_latest_is_a_newer_one_when_it_is_pruned_meanwhile(
    start: Start, tmp_path: Path, times: int
) -> None:
    store = MovingStore()
    state = await start()
    await two_checkpoints(state, store)
    store.meanwhile = [next_one(state, store)] * times
    info, found = await restored(store, tmp_path / "new")
    assert not store.meanwhile
    assert (info.id, info.skipped) == (max(store.kept_manifests), ())
    assert len(found) == info.sessions == 129


@pytest.mark.parametrize("fall_back", [True, False])
async def test_one_that_is_deleted_meanwhile_is_not_found(
    start: Start, tmp_path: Path, fall_back: bool
) -> None:
    store = MovingStore()
    state = await start()
    await two_checkpoints(state, store)
    newer = max(store.kept_manifests)
    store.meanwhile = [next_one(state, store)]
    with pytest.raises(errors.CheckpointNotFound, match=newer):
        await restore_into(store, str(tmp_path / "new"), CLOCK, newer, fall_back=fall_back)
    assert await data_in(tmp_path / "new") == {}


async def test_a_restore_that_never_catches_up_is_given_up(start: Start, tmp_path: Path) -> None:
    store = MovingStore()
    state = await start()
    await two_checkpoints(state, store)
    store.meanwhile = [next_one(state, store)] * 1000
    with pytest.raises(errors.CheckpointNotFound, match=r"checkpoint\.keep"):
        await restore_into(store, str(tmp_path / "new"), CLOCK)


# --- which one ------------------------------------------------------------------------------------


async def test_an_older_one_is_restored_by_its_id(
    start: Start, store: CheckpointStore, tmp_path: Path
) -> None:
    first, _ = await two_checkpoints(await start(), store)
    older = min(await store.manifests())
    info, found = await restored(store, tmp_path / "new", older)
    assert (info.id, info.skipped, found) == (older, (), first)


@pytest.mark.parametrize("wanted", ["latest", "../../etc/passwd", "00000001", "*", ""])
async def test_what_is_not_there_is_not_found(
    store: CheckpointStore, tmp_path: Path, wanted: str
) -> None:
    with pytest.raises(errors.CheckpointNotFound):
        await restore_into(store, str(tmp_path / "new"), CLOCK, wanted)
    with pytest.raises(errors.CheckpointNotFound):
        await delete_checkpoint(store, wanted)


# --- into a fresh directory -----------------------------------------------------------------------


async def test_a_directory_with_sessions_is_refused(start: Start, tmp_path: Path) -> None:
    store = MemoryStore()
    state = await start()
    await two_checkpoints(state, store)
    with pytest.raises(errors.DirectoryLocked):
        await restore_into(store, str(tmp_path / "state"), CLOCK)
    await state.close()
    before = await data_in(tmp_path / "state")
    with pytest.raises(errors.DirectoryNotUsable):
        await restore_into(store, str(tmp_path / "state"), CLOCK)
    assert await data_in(tmp_path / "state") == before


async def test_killed_anywhere_a_restore_leaves_all_or_nothing_and_can_be_repeated(
    start: Start, points: Points
) -> None:
    store = MemoryStore()
    _, expected = await two_checkpoints(await start(), store)
    path = Path("/restored")
    outcomes = set()
    for nth in points(1):
        files = MemoryFiles()
        files.faults.append(kill_at(nth, part=0.5))
        with suppress(Killed, OSError, errors.PersistenceError):
            await restore_into(store, str(path), CLOCK, files=files, segment_bytes=64 * KIB)
        if not files.is_dead:
            break
        power_loss, kill = files.after_kill().after_power_loss(), files.after_kill()
        outcomes.add(len(await sessions_on(path, power_loss)))
        found = await sessions_on(path, kill)
        outcomes.add(len(found))
        if not found:
            again = files.after_kill()
            info = await restore_into(store, str(path), CLOCK, files=again)
            assert info.sessions == len(await sessions_on(path, again)) == len(expected)
    assert outcomes == {0, len(expected)}


async def test_a_full_disk_leaves_an_empty_directory(start: Start) -> None:
    store = MemoryStore()
    await two_checkpoints(await start(), store)
    files = MemoryFiles()
    files.faults.append(fail(errno.ENOSPC, "write_at", nth=5, times=None))
    with pytest.raises(errors.DiskFull):
        await restore_into(store, "/new", CLOCK, files=files)
    files.faults.clear()
    assert (await restore_into(store, "/new", CLOCK, files=files)).sessions == 129


# --- into the directory of a running worker -------------------------------------------------------


async def staged(state: StateManager, store: CheckpointStore, **options: Any) -> StagedRestore:
    ids = CommitIds()

    def new_ids(frame: Frame) -> bytes:
        return frame.incarnation + ids.next() + frame.commit

    disk = disk_of(state)
    return await stage_restore(
        disk, store, CLOCK, new_ids=new_ids, skew=0.0, segment_bytes=64 * KIB, **options
    )


async def test_a_running_worker_goes_back_and_on(start: Start, tmp_path: Path) -> None:
    store = MemoryStore()
    state = await start(disk={"segment_bytes": 64 * KIB})
    _, expected = await two_checkpoints(state, store)
    at_checkpoint = await records_in(state)
    restore = await staged(state, store)
    await make(state, 50, start=2000)
    await state.update_session_data("s1", "n", "later")
    await state.flush()
    await restore.install()
    now = await records_in(state)
    assert {sid: record[32:] for sid, (record, _) in now.items()} == {
        sid: record[32:] for sid, (record, _) in at_checkpoint.items()
    }
    assert {head(record).incarnation for record, _ in now.values()} == {
        head(record).incarnation for record, _ in at_checkpoint.values()
    }
    commits = {head(record).commit for record, _ in now.values()}
    assert commits.isdisjoint(head(record).commit for record, _ in at_checkpoint.values())
    state._memory.clear()  # what the manager does with the gate closed
    await state.create_session(session_id="after", data={"n": 1})
    expected |= {"after": {"n": 1}}
    info = await checkpoint(state, store)
    assert info.kind == "full"
    await state.close()
    assert await data_in(tmp_path / "state") == expected
    assert (await restored(store, tmp_path / "new"))[1] == expected


async def test_a_discarded_restore_leaves_no_trace(start: Start, tmp_path: Path) -> None:
    store = MemoryStore()
    state = await start()
    await two_checkpoints(state, store)
    before = set((tmp_path / "state").iterdir())
    await (await staged(state, store)).discard()
    assert set((tmp_path / "state").iterdir()) == before


async def test_a_restore_that_finds_only_damage_changes_nothing(start: Start) -> None:
    store = MemoryStore()
    state = await start()
    await two_checkpoints(state, store)
    before = await records_in(state)
    store.kept_chunks.clear()
    with pytest.raises(errors.CheckpointDamaged):
        await staged(state, store)
    assert await records_in(state) == before


@pytest.mark.parametrize("has_written", [True, False])
async def test_killed_while_it_is_installed_a_worker_has_the_old_state_or_the_new(
    clock: ManualClock, points: Points, has_written: bool
) -> None:
    path = Path("/live")
    outcomes: set[str] = set()
    config = config_for(path, disk={"segment_bytes": 64 * KIB})
    for nth in points(1):
        files = MemoryFiles()
        store = MemoryStore()
        state = StateManager(config=config, clock=clock, files=files)
        await state.open()
        new = await make(state, 110)
        await checkpoint(state, store)
        old = set(new | await make(state, 5, start=1000)) - {"s1", "s2"}
        for sid in ("s1", "s2"):
            await state.terminate_session(sid)
        if not has_written:  # no segment is open then, and none has to be sealed
            await state.close()
            state = StateManager(config=config, clock=clock, files=files)
            await state.open()
        restore = await staged(state, store)
        files.faults.append(kill_at(nth))
        with suppress(Killed, OSError, errors.PersistenceError):
            await restore.install()
        is_through = not files.is_dead
        files.kill()
        with suppress(Killed, OSError, errors.PersistenceError):
            await state.close()
        for after in (files.after_kill(), files.after_kill().after_power_loss()):
            found = await sessions_on(path, after)
            assert found in (old, set(new)), nth
            outcomes.add("old" if found == old else "new")
        if is_through:
            break
    assert outcomes == {"old", "new"}


async def sessions_on(path: Path, files: MemoryFiles) -> set[str]:
    """Return the ids of the sessions on a disk in memory."""
    state = StateManager(config=config_for(path), clock=CLOCK, files=files)
    await state.open()
    found = {sid async for sid in state.iter_sessions()}
    assert disk_of(state).damages == []
    await state.close()
    return found
