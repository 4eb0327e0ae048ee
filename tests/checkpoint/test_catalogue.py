from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from persistence import ManualClock, StateManager, errors
from persistence.checkpoint.catalogue import (
    Catalogue,
    delete_checkpoint,
    list_checkpoints,
    prune,
    sweep,
)
from persistence.checkpoint.manifest import FORMAT_VERSION, make_id, worker_of
from persistence.checkpoint.stores import CheckpointStore, ChunkKey
from tests.checkpoint.support import MemoryStore, checkpoint, restored
from tests.engine import Start

DAY = 86_400.0


async def history(
    state: StateManager, store: CheckpointStore, count: int, **plan: Any
) -> list[Any]:
    """Make `count` checkpoints; return what each of them must restore."""
    states = []
    data: dict[str, dict[str, Any]] = {}
    for n in range(count):
        for sid in (f"always{n % 2}", f"new{n}"):
            data[sid] = {"n": n, "text": f"{sid} " * 30}
            if await state.has_session(sid):
                await state.replace_session(sid, data[sid])
            else:
                await state.create_session(session_id=sid, data=data[sid])
        states.append(dict(data))
        await checkpoint(state, store, **plan)
    return states


async def test_the_last_ones_stay_restorable_and_unused_chunks_go(
    start: Start, store: CheckpointStore, tmp_path: Path
) -> None:
    states = await history(await start(), store, 8, keep=3)
    listed = await list_checkpoints(store)
    assert len(listed) == 3
    for info, expected in zip(listed, states[-3:], strict=True):
        found = await restored(store, tmp_path / info.id, info.id)
        assert (found[0].id, found[1]) == (info.id, expected)
    catalogue = await Catalogue.load(store)
    needed = {
        (chunk.checkpoint, chunk.number)
        for manifest in catalogue.manifests.values()
        for chunk in manifest.chunks
    }
    assert set(await store.chunks()) == needed


async def test_what_is_listed_tells_what_is_there(
    start: Start, store: CheckpointStore, clock: ManualClock
) -> None:
    state = await start()
    await history(state, store, 2, namespace="app")
    first, second = await list_checkpoints(store)
    assert (first.kind, second.kind, second.parent) == ("full", "incremental", first.id)
    assert (first.sessions, second.sessions) == (2, 4)
    assert (first.reason, first.namespace, first.problem) == ("manual", "app", None)
    assert first.created_at.timestamp() == clock.wall()
    assert second.total_bytes == first.bytes + second.bytes


async def test_deleting_one_leaves_the_others_whole(
    start: Start, store: CheckpointStore, tmp_path: Path
) -> None:
    states = await history(await start(), store, 3)
    first, second, third = await list_checkpoints(store)
    await delete_checkpoint(store, first.id)
    await delete_checkpoint(store, second.id)
    with pytest.raises(errors.CheckpointNotFound):
        await delete_checkpoint(store, second.id)
    assert [info.id for info in await list_checkpoints(store)] == [third.id]
    assert (await restored(store, tmp_path / "new"))[1] == states[-1]
    await delete_checkpoint(store, third.id)
    assert await store.chunks() == []


async def test_numbers_go_on_whatever_the_clock_does(start: Start, clock: ManualClock) -> None:
    store = MemoryStore()
    state = await start()
    await history(state, store, 1)
    newest = max(store.kept_manifests)
    clock.jump_wall(-10 * DAY)
    await checkpoint(state, store)
    assert max(store.kept_manifests) != newest


async def test_workers_share_a_store_and_leave_each_other_alone(
    start: Start, store: CheckpointStore, tmp_path: Path
) -> None:
    one, two = await start(path=tmp_path / "one"), await start(path=tmp_path / "two")
    expected = await history(one, store, 3, keep=2)
    (mine,) = {worker_of(info.id) for info in await list_checkpoints(store)}
    await two.create_session(session_id="other")
    for _ in range(3):
        await checkpoint(two, store, keep=1)
    ids = [info.id for info in await list_checkpoints(store)]
    assert [worker_of(one) == mine for one in ids] == [True, True, False]
    assert (await restored(store, tmp_path / "new", ids[1]))[1] == expected[-1]
    assert (await restored(store, tmp_path / "latest"))[1] == {"other": {}}


async def test_another_workers_orphans_go_when_they_are_old(store: CheckpointStore) -> None:
    clock = ManualClock()
    made = make_id(1, "20231114T000000Z", "aaaaaaaa", bytes(4))
    await store.put_chunk(ChunkKey(made, 0), b"under way")
    catalogue = await Catalogue.load(store)
    await sweep(store, catalogue, "bbbbbbbb", clock.wall())
    assert await store.chunk_bytes([ChunkKey(made, 0)]) == [9]
    clock.advance(2 * DAY)
    await sweep(store, catalogue, "bbbbbbbb", clock.wall())
    assert await store.chunks() == []


async def test_chunks_stay_while_a_manifest_cannot_be_read(start: Start) -> None:
    store = MemoryStore()
    state = await start()
    await history(state, store, 3)
    second = sorted(store.kept_manifests)[1]
    store.kept_manifests[second] = b"damaged"
    chunks = set(store.kept_chunks)
    await prune(store, worker_of(second), 5, 0.0)
    assert chunks <= set(store.kept_chunks)
    await prune(store, worker_of(second), 1, 0.0)  # now it is older than what is kept
    assert second not in store.kept_manifests


async def test_a_manifest_of_another_format_is_never_pruned(start: Start) -> None:
    store = MemoryStore()
    await history(await start(), store, 3)
    second = sorted(store.kept_manifests)[1]
    newer = store.kept_manifests[second]
    newer = newer[:8] + bytes([FORMAT_VERSION + 1]) + newer[9:-4] + b"other"
    store.kept_manifests[second] = newer
    chunks = set(store.kept_chunks)
    await prune(store, worker_of(second), 1, 0.0)
    assert store.kept_manifests[second] == newer
    assert chunks == set(store.kept_chunks)
