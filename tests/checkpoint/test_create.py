from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from persistence import ManualClock, StateManager
from persistence.checkpoint.catalogue import delete_checkpoint, list_checkpoints
from persistence.checkpoint.create import Plan, Progress, create_checkpoint
from persistence.checkpoint.manifest import decode_manifest
from persistence.checkpoint.redis_store import RedisStore
from persistence.checkpoint.restore import restore_into
from persistence.checkpoint.stores import CheckpointStore, ChunkKey
from persistence.disk.cut import take_cut
from persistence.disk.filenames import SHIPPED, parse_segment
from persistence.disk.segments import Segment
from persistence.errors import CheckpointDamaged, CheckpointNotFound
from tests.checkpoint.support import (
    Died,
    MemoryStore,
    checkpoint,
    data_in,
    records_in,
    restored,
)
from tests.engine import KIB, Start, directory_of, disk_of, eventually, names_in, residency_of


async def make(state: StateManager, count: int, start: int = 0) -> dict[str, dict[str, Any]]:
    expected = {
        f"s{n}": {"n": n, "text": f"session {n} " * 60} for n in range(start, start + count)
    }
    await asyncio.gather(
        *(state.create_session(session_id=sid, data=data) for sid, data in expected.items())
    )
    return expected


async def test_everything_comes_back_byte_for_byte(
    start: Start, store: CheckpointStore, tmp_path: Path, clock: ManualClock
) -> None:
    state = await start(disk={"segment_bytes": 64 * KIB})
    await make(state, 500)
    clock.advance(600)  # more than an eighth of the TTL, so that renewals are recorded
    for n in range(100):
        await state.update_session_data(f"s{n}", "n", n + 1000)
        await state.terminate_session(f"s{n + 100}")
        await state.get_session(f"s{n + 200}")
    info = await checkpoint(state, store)
    assert (info.kind, info.sessions, info.parent) == ("full", 400, None)
    expected = await records_in(state)
    restored_info = await restore_into(store, str(tmp_path / "new"), clock)
    assert (restored_info.id, restored_info.sessions) == (info.id, 400)
    other = await start(path=tmp_path / "new")
    assert await records_in(other) == expected
    assert disk_of(other).damages == []


async def test_what_was_acknowledged_without_a_sync_is_shipped(
    start: Start, tmp_path: Path, clock: ManualClock
) -> None:
    store = MemoryStore()
    state = await start(disk={"fsync": "never"})
    expected = await make(state, 10)
    info = await create_checkpoint(disk_of(state), store, Plan(), clock)
    assert info.sessions == 10
    assert (await restored(store, tmp_path / "new"))[1] == expected


async def test_a_renewal_does_not_outlive_the_version_that_it_renewed(
    start: Start, tmp_path: Path, clock: ManualClock
) -> None:
    store = MemoryStore()
    state = await start()
    await make(state, 50)
    clock.advance(600)  # more than an eighth of the TTL, so that renewals are recorded
    await state.get_session("s0")
    await residency_of(state).record_renewals()
    await state.flush()
    clock.advance(600)
    await state.update_session_data("s0", "n", "newest")
    await checkpoint(state, store)
    expected = await records_in(state)
    await restore_into(store, str(tmp_path / "new"), clock)
    assert await records_in(await start(path=tmp_path / "new")) == expected


async def test_an_id_that_cannot_be_followed_keeps_none_from_being_made(
    start: Start, store: CheckpointStore
) -> None:
    state = await start()
    foreign = "99999999-20270101T000000Z-0badcafe-01234567"
    await store.publish(foreign, b"of somebody else")
    made = [await checkpoint(state, store, keep=1) for _ in range(3)]
    assert [info.id[:8] for info in made] == ["00000001", "00000002", "00000003"]
    assert set(await store.manifests()) == {foreign, made[-1].id}


async def test_the_next_one_ships_only_what_has_changed(
    start: Start, store: CheckpointStore, tmp_path: Path
) -> None:
    state = await start(disk={"segment_bytes": 256 * KIB})
    expected = await make(state, 2000)
    first = await checkpoint(state, store)
    for n in range(20):
        for _ in range(5):
            await state.update_session_data(f"s{n}", "n", -n)
        expected[f"s{n}"]["n"] = -n
    second = await checkpoint(state, store)
    assert (second.kind, second.parent) == ("incremental", first.id)
    assert second.bytes <= 0.03 * first.bytes
    assert (await restored(store, tmp_path / "new"))[1] == expected
    third = await checkpoint(state, store)
    assert (third.chunks, third.bytes) == (0, 0)
    assert (await restored(store, tmp_path / "again"))[1] == expected


async def test_deletions_are_shipped_even_when_compaction_has_no_more_use_for_them(
    start: Start, tmp_path: Path
) -> None:
    store = MemoryStore()
    state = await start(disk={"segment_bytes": 64 * KIB})
    expected = await make(state, 200)
    await checkpoint(state, store)
    for n in range(150):
        await state.terminate_session(f"s{n}")
        del expected[f"s{n}"]
    expected |= await make(state, 40, start=500)
    await disk_of(state).compactor.settle()
    assert disk_of(state).compactor.stats.merges
    assert (await checkpoint(state, store)).kind == "incremental"
    assert (await restored(store, tmp_path / "new"))[1] == expected


async def churn(state: StateManager, until: Callable[[], bool]) -> None:
    """Make and delete sessions, and let compaction go through them, until something is so."""
    for start in range(10_000, 20_000, 100):
        sids = list(await make(state, 100, start=start))
        for sid in sids:
            await state.terminate_session(sid)
        await disk_of(state).compactor.settle()
        if until():
            return
    raise AssertionError("it never came to that")


async def test_tombstones_go_as_ever_without_checkpoints_and_once_they_are_shipped(
    start: Start,
) -> None:
    state = await start(disk={"segment_bytes": 64 * KIB})
    stats = disk_of(state).compactor.stats
    await churn(state, lambda: stats.tombstones_dropped > 0)
    store = MemoryStore()
    await checkpoint(state, store)
    await disk_of(state).compactor.settle()
    merges = stats.merges
    # Tombstones up to the cut may still go, those behind it stay.
    behind = 100 * await rounds(state, lambda: stats.merges > merges + 4)
    kept = sum(item.tombstone_bytes for item in disk_of(state).segments.values())
    assert kept >= 120 * behind
    before = stats.tombstones_dropped
    await checkpoint(state, store)
    await churn(state, lambda: stats.tombstones_dropped > before)


async def rounds(state: StateManager, until: Callable[[], bool]) -> int:
    """Churn, and return how many rounds it took."""
    count = 0

    def counted() -> bool:
        nonlocal count
        count += 1
        return until()

    await churn(state, counted)
    return count


async def test_what_has_changed_is_known_after_a_restart(
    start: Start, tmp_path: Path, store: CheckpointStore
) -> None:
    state = await start()
    expected = await make(state, 300)
    first = await checkpoint(state, store)
    await state.terminate_session("s1")
    await state.update_session_data("s2", "n", "new")
    await state.close()
    del expected["s1"]
    expected["s2"]["n"] = "new"
    state = await start()
    second = await checkpoint(state, store)
    assert (second.kind, second.parent) == ("incremental", first.id)
    assert second.bytes < 0.1 * first.bytes
    assert (await restored(store, tmp_path / "new"))[1] == expected


async def test_a_full_one_is_made_when_the_increments_weigh_as_much(start: Start) -> None:
    store = MemoryStore()
    state = await start()
    await make(state, 50)
    kinds = []
    for n in range(9):
        for one in range(20):
            await state.update_session_data(f"s{one}", "n", n)
        kinds.append((await checkpoint(state, store, keep=100)).kind)
    assert kinds[0] == "full"
    assert kinds.count("full") == 3
    assert kinds[1] == kinds[2] == "incremental"


async def test_another_store_gets_a_full_one(start: Start) -> None:
    state = await start()
    await make(state, 10)
    await checkpoint(state, MemoryStore("one"))
    assert (await checkpoint(state, MemoryStore("two"))).kind == "full"


async def test_a_damaged_record_of_what_was_shipped_makes_the_next_one_full(
    start: Start, tmp_path: Path
) -> None:
    store = MemoryStore()
    state = await start()
    await make(state, 10)
    await checkpoint(state, store)
    await state.close()
    path = tmp_path / "state" / SHIPPED
    path.write_bytes(path.read_bytes().replace(b"memory", b"nemory"))
    assert (await checkpoint(await start(), store)).kind == "full"


async def test_a_parent_that_lost_a_chunk_is_not_gone_on_from(start: Start, tmp_path: Path) -> None:
    store = MemoryStore()
    state = await start()
    expected = await make(state, 10)
    await checkpoint(state, store)
    store.kept_chunks.clear()
    assert (await checkpoint(state, store)).kind == "full"
    assert (await restored(store, tmp_path / "new"))[1] == expected


@pytest.mark.parametrize("is_over", [True, False], ids=["deleted", "being deleted"])
async def test_a_parent_that_is_deleted_meanwhile_is_not_gone_on_from(
    start: Start,
    store: CheckpointStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_over: bool,
) -> None:
    state = await start()
    expected = await make(state, 10)
    first = await checkpoint(state, store)
    put = store.put_chunk

    async def beside_a_deletion(key: ChunkKey, data: bytes) -> None:
        """Another process deletes the first one; or has not got beyond its manifest yet."""
        await put(key, data)
        with suppress(CheckpointNotFound):
            await (delete_checkpoint(store, first.id) if is_over else store.withdraw(first.id))

    monkeypatch.setattr(store, "put_chunk", beside_a_deletion)
    expected |= await make(state, 1, start=10)
    info = await checkpoint(state, store)
    assert info.kind == "full"
    assert [each.id for each in await list_checkpoints(store)] == [info.id]
    assert {key.checkpoint for key in await store.chunks()} == {info.id}
    assert (await restored(store, tmp_path / "new"))[1] == expected
    assert (await checkpoint(state, store)).parent == info.id


async def test_deleting_an_older_one_leaves_alone_what_is_being_made(
    start: Start, store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = await start()
    expected = await make(state, 10)
    first = await checkpoint(state, store)
    expected |= await make(state, 1, start=10)
    parent = await checkpoint(state, store)
    put = store.put_chunk

    async def before_a_deletion(key: ChunkKey, data: bytes) -> None:
        await put(key, data)
        with suppress(CheckpointNotFound):
            await delete_checkpoint(store, first.id)

    monkeypatch.setattr(store, "put_chunk", before_a_deletion)
    expected |= await make(state, 1, start=11)
    info = await checkpoint(state, store)
    assert info.parent == parent.id
    assert (await restored(store, tmp_path / "new", info.id))[0].skipped == ()
    assert await data_in(tmp_path / "new") == expected


async def test_what_loses_its_chunks_while_it_is_made_is_withdrawn(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a Redis that evicts keys."""
    store = MemoryStore()
    state = await start()
    expected = await make(state, 10)
    first = await checkpoint(state, store)
    put = store.put_chunk

    async def put_and_lose(key: ChunkKey, data: bytes) -> None:
        await put(key, data)
        del store.kept_chunks[key]

    monkeypatch.setattr(store, "put_chunk", put_and_lose)
    await make(state, 1, start=10)
    with pytest.raises(CheckpointDamaged, match="were removed while it was made"):
        await checkpoint(state, store)
    assert [each.id for each in await list_checkpoints(store)] == [first.id]
    assert (await restored(store, tmp_path / "new"))[1] == expected


async def test_commits_go_on_and_what_comes_behind_the_cut_is_left_out(
    start: Start, tmp_path: Path
) -> None:
    state = await start(disk={"segment_bytes": 64 * KIB})
    expected = {sid: dict(data) for sid, data in (await make(state, 200)).items()}

    class Busy(MemoryStore):
        async def put_chunk(self, key: Any, data: bytes) -> None:
            for n in range(0, 200, 2):
                await state.update_session_data(f"s{n}", "n", "later")
            await state.terminate_session("s1")
            await super().put_chunk(key, data)

    store = Busy()
    await checkpoint(state, store)
    assert (await restored(store, tmp_path / "new"))[1] == expected
    later = {sid: await data(state, sid) for sid in expected if sid != "s1"}
    assert (await checkpoint(state, store)).kind == "incremental"
    assert (await restored(store, tmp_path / "second"))[1] == later


async def data(state: StateManager, sid: str) -> dict[str, Any]:
    session = await state.get_session(sid, renew=False)
    assert session is not None
    return session.data


async def test_segments_that_are_still_to_be_read_are_not_compacted(start: Start) -> None:
    state = await start(disk={"segment_bytes": 64 * KIB})
    await make(state, 200)
    disk = disk_of(state)
    cut = await take_cut(disk)
    before = {part.segment.number for part in cut.parts}
    for n in range(200):
        await state.update_session_data(f"s{n}", "n", "new")
    async with asyncio.timeout(20):
        await disk.compactor.settle()  # it has nothing to do, and waits for nothing
    assert before <= set(disk.segments)
    cut.close()
    await disk.compactor.settle()
    assert not before <= set(disk.segments)


async def test_a_merge_that_ends_under_a_cut_leaves_its_inputs_until_they_are_read(
    start: Start,
) -> None:
    state = await start(disk={"segment_bytes": 64 * KIB})
    await make(state, 300)
    disk = disk_of(state)
    around = disk.compactor._around
    publish = around.publish
    inputs: set[int] = set()
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def held(outputs: list[Segment], merged: list[Segment]) -> None:
        inputs.update(item.number for item in merged)
        reached.set()
        await go_on.wait()
        await publish(outputs, merged)

    around.publish = held
    for n in range(250):
        await state.update_session_data(f"s{n}", "n", "new")
    await reached.wait()
    cut = await take_cut(disk)
    assert inputs <= {part.segment.number for part in cut.parts}
    go_on.set()
    await eventually(lambda: inputs <= disk._manifest.dropped)
    assert inputs <= {
        number for number in map(parse_segment, names_in(directory_of(state))) if number
    }
    # A cut from now on reads what they were merged to.
    second = await take_cut(disk)
    assert inputs.isdisjoint(part.segment.number for part in second.parts)
    second.close()
    cut.close()
    await eventually(lambda: inputs.isdisjoint(disk.segments))
    await disk.compactor.settle()


async def test_progress_is_told_up_to_the_end(start: Start) -> None:
    state = await start()
    await make(state, 100)
    told: list[Progress] = []
    await create_checkpoint(
        disk_of(state), MemoryStore(), Plan(), ManualClock(), on_progress=told.append
    )
    assert told
    assert 0.9 < told[-1].done_bytes / told[-1].total_bytes <= 1


async def test_uncompressed_chunks_restore_as_well(start: Start, tmp_path: Path) -> None:
    state = await start()
    expected = await make(state, 100)
    store = MemoryStore()
    await checkpoint(state, store, compress=False)
    assert (await restored(store, tmp_path / "new"))[1] == expected


async def test_an_empty_worker_has_a_checkpoint_too(start: Start, tmp_path: Path) -> None:
    store = MemoryStore()
    info = await checkpoint(await start(), store)
    assert (info.sessions, info.chunks) == (0, 0)
    assert (await restored(store, tmp_path / "new"))[1] == {}


async def test_dying_anywhere_leaves_the_one_before_and_no_orphan_after_the_next(
    start: Start, tmp_path: Path
) -> None:
    state = await start(disk={"segment_bytes": 64 * KIB})
    store = MemoryStore()
    old = await make(state, 100)
    first = await checkpoint(state, store, keep=2)
    new = dict(old)
    for step in range(1, 6):
        new |= await make(state, 20, start=step * 1000)
        store.steps, store.dies_at = 0, step
        died = False
        try:
            await checkpoint(state, store, keep=2)
        except Died:
            died = True
        published = max(store.kept_manifests)
        found = (await restored(store, tmp_path / f"{step}"))[1]
        assert found == (old if published == first.id else new)
        assert not died or published == first.id
        store.dies_at = 0
        first = await checkpoint(state, store, keep=2)
        old = dict(new)
        listed = {chunk for one in store.kept_manifests for chunk in await chunks_of(store, one)}
        assert set(store.kept_chunks) == listed


async def chunks_of(store: MemoryStore, checkpoint_id: str) -> set[tuple[str, int]]:
    manifest = decode_manifest(store.kept_manifests[checkpoint_id], checkpoint_id)
    return {(chunk.checkpoint, chunk.number) for chunk in manifest.chunks}


async def test_orphans_are_swept_before_anything_is_shipped(start: Start) -> None:
    state = await start()
    await make(state, 50)

    class Tidy(MemoryStore):
        async def put_chunk(self, key: ChunkKey, data: bytes) -> None:
            assert all(other.checkpoint == key.checkpoint for other in self.kept_chunks)
            await super().put_chunk(key, data)

    store = Tidy()
    store.dies_at = 2
    with pytest.raises(Died):
        await checkpoint(state, store)
    store.dies_at = 0
    assert store.kept_chunks
    await checkpoint(state, store)


async def test_a_cancelled_creation_releases_everything(start: Start) -> None:
    state = await start()
    await make(state, 100)
    reached = asyncio.Event()

    class Slow(MemoryStore):
        async def put_chunk(self, key: Any, data: bytes) -> None:
            reached.set()
            await asyncio.Event().wait()

    making = asyncio.create_task(checkpoint(state, Slow()))
    await reached.wait()
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    disk = disk_of(state)
    assert all(number not in disk.pins for number in disk.segments)
    assert disk.shipped.newest is None


async def test_a_killed_creation_in_redis_leaves_nothing_after_the_next(
    start: Start, redis: Any, namespace: str
) -> None:
    state = await start()
    await make(state, 100)

    class Killed(RedisStore):
        async def publish(self, checkpoint_id: str, manifest: bytes) -> None:
            raise Died

    with pytest.raises(Died):
        await checkpoint(state, Killed(redis, namespace))
    assert await redis.keys(f"{namespace}:checkpoint:*")
    store = RedisStore(redis, namespace)
    info = await checkpoint(state, store)
    keys = {key.decode() for key in await redis.keys(f"{namespace}:checkpoint:*")}
    assert len(keys) == info.chunks
    assert all(info.id in key for key in keys)
    assert [one.id for one in await list_checkpoints(store)] == [info.id]


async def test_a_damaged_session_is_left_out_and_not_replaced_by_its_past(
    start: Start, tmp_path: Path
) -> None:
    store = MemoryStore()
    state = await start()
    expected = await make(state, 20)
    await state.update_session_data("s3", "n", "newest")
    row = disk_of(state).index.get(disk_of(state).fingerprint(b"s3"))
    assert row is not None
    await state.close()
    path = tmp_path / "state" / f"{row.segment:010d}.seg"
    data = bytearray(path.read_bytes())
    data[row.offset + row.length - 10] ^= 1
    path.write_bytes(data)
    state = await start()
    await checkpoint(state, store)
    del expected["s3"]
    info, found = await restored(store, tmp_path / "new")
    assert found == expected
    assert info.damaged == ("'s3'",)
    # Known as damaged, it is a tombstone from the start.
    await state.close()
    (tmp_path / "state" / "INDEX").unlink()
    (tmp_path / "state" / f"{row.segment:010d}.hint").unlink()
    state = await start()
    assert disk_of(state).damages
    other = MemoryStore("other")
    await checkpoint(state, other)
    info, found = await restored(other, tmp_path / "again")
    assert (found, info.damaged) == (expected, ())
    assert await data_in(tmp_path / "again") == expected
