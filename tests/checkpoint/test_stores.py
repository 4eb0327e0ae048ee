"""One contract, run over every store there is."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot

from persistence import errors
from persistence.checkpoint.directory_store import DirectoryStore, beside
from persistence.checkpoint.manifest import make_id
from persistence.checkpoint.postgres_store import PostgresStore
from persistence.checkpoint.redis_store import RedisStore
from persistence.checkpoint.stores import CheckpointStore, ChunkKey, ChunkMissing
from persistence.disk.threads import Threads
from persistence.remote.postgres_urls import PostgresTarget
from tests.disk.memoryfiles import MemoryFiles

IDS = [make_id(n, "20260101T000000Z", "0123abcd", bytes([n] * 4)) for n in range(1, 4)]


async def test_a_chunk_comes_back(store: CheckpointStore) -> None:
    data = bytes(range(256)) * 4096
    for number in (0, 1, 700):
        await store.put_chunk(ChunkKey(IDS[0], number), data + bytes([number % 256]))
    assert await store.get_chunk(ChunkKey(IDS[0], 700)) == data + bytes([700 % 256])
    keys = [ChunkKey(IDS[0], 0), ChunkKey(IDS[0], 2), ChunkKey(IDS[1], 0)]
    assert await store.chunk_bytes(keys) == [len(data) + 1, 0, 0]
    assert {ChunkKey(IDS[0], 0), ChunkKey(IDS[0], 700)} <= set(await store.chunks())


async def test_a_missing_chunk_is_missing(store: CheckpointStore) -> None:
    with pytest.raises(ChunkMissing):
        await store.get_chunk(ChunkKey(IDS[0], 0))
    assert await store.chunks() == []
    assert await store.chunk_bytes([]) == []


async def test_putting_and_removing_twice_does_no_harm(store: CheckpointStore) -> None:
    key = ChunkKey(IDS[0], 0)
    for _ in range(2):
        await store.put_chunk(key, b"same")
    assert await store.get_chunk(key) == b"same"
    for _ in range(2):
        await store.remove_chunks([key])
    with pytest.raises(ChunkMissing):
        await store.get_chunk(key)


async def test_manifests_are_published_listed_and_withdrawn(store: CheckpointStore) -> None:
    assert await store.manifests() == {}
    for one in IDS:
        await store.publish(one, one.encode())
    await store.publish(IDS[0], b"replaced")
    assert await store.withdraw(IDS[1])
    assert not await store.withdraw(IDS[1])
    assert await store.manifests() == {IDS[0]: b"replaced", IDS[2]: IDS[2].encode()}


async def test_removed_chunks_are_no_longer_listed(store: CheckpointStore) -> None:
    for one in IDS[:2]:
        for number in range(3):
            await store.put_chunk(ChunkKey(one, number), b"chunk")
    await store.remove_chunks([key for key in await store.chunks() if key.checkpoint == IDS[0]])
    left = await store.chunks()
    assert {key.checkpoint for key in left} == {IDS[1]}
    await store.remove_chunks([key for key in left if key.number > 1])
    assert await store.chunks() == [ChunkKey(IDS[1], 0), ChunkKey(IDS[1], 1)]


async def test_a_store_has_the_same_name_next_time(
    store: CheckpointStore, redis: Any, namespace: str, threads: Threads, tmp_path: Path
) -> None:
    again: CheckpointStore
    if isinstance(store, RedisStore):
        again = RedisStore(redis, namespace)
    elif isinstance(store, PostgresStore):
        again = PostgresStore(PostgresTarget((("elsewhere", 1),), "shop"), store.namespace, 1.0)
    else:
        again = DirectoryStore(str(tmp_path / "checkpoints"), threads)
    assert again.name == store.name


# --- a directory ----------------------------------------------------------------------------------


async def test_what_was_put_survives_a_power_loss(threads: Threads) -> None:
    files = MemoryFiles()
    store = DirectoryStore("/checkpoints", threads, files)
    await store.put_chunk(ChunkKey(IDS[0], 0), b"chunk")
    await store.publish(IDS[0], b"manifest")
    after = DirectoryStore("/checkpoints", threads, files.after_power_loss())
    assert await after.manifests() == {IDS[0]: b"manifest"}
    assert await after.get_chunk(ChunkKey(IDS[0], 0)) == b"chunk"


async def test_a_half_written_chunk_is_listed_so_that_it_can_be_removed(
    directory_store: DirectoryStore, tmp_path: Path
) -> None:
    await directory_store.put_chunk(ChunkKey(IDS[0], 0), b"chunk")
    half = tmp_path / "checkpoints" / f"{IDS[1]}.000003.chunk.tmp"
    half.write_bytes(b"ha")
    assert ChunkKey(IDS[1], 3) in await directory_store.chunks()
    await directory_store.remove_chunks([ChunkKey(IDS[1], 3)])
    assert not half.exists()


async def test_other_files_in_the_directory_are_none_of_ours(
    directory_store: DirectoryStore, tmp_path: Path
) -> None:
    await directory_store.publish(IDS[0], b"manifest")
    for name in ("notes.txt", "x.manifest", "x.000001.chunk", f"{IDS[1]}.chunk"):
        (tmp_path / "checkpoints" / name).write_bytes(b"")
    assert list(await directory_store.manifests()) == [IDS[0]]
    assert await directory_store.chunks() == []


async def test_a_full_disk_and_a_file_in_the_way_are_told(tmp_path: Path, threads: Threads) -> None:
    files = MemoryFiles()
    files.free_bytes = 10
    with pytest.raises(errors.DiskFull):
        await DirectoryStore("/full", threads, files).put_chunk(ChunkKey(IDS[0], 0), bytes(100))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(errors.DirectoryNotUsable):
        await DirectoryStore(str(tmp_path / "file"), threads).put_chunk(ChunkKey(IDS[0], 0), b"")


def test_the_default_directory_lies_beside_the_log() -> None:
    assert beside("/data/state/") == beside("/data/state") == "/data/state-checkpoints"


# --- Redis ----------------------------------------------------------------------------------------


def test_a_namespace_that_means_something_in_a_key_or_a_pattern_is_escaped() -> None:
    keys = {
        RedisStore(None, namespace).chunk_key(ChunkKey(IDS[0], 0))
        for namespace in ("a", "a:checkpoint", "a{b}", "a*", "a%2A")
    }
    assert len(keys) == 5
    assert all(key.count("{") == 1 and "*" not in key for key in keys)


def test_chunks_of_one_checkpoint_spread_over_a_cluster() -> None:
    store = RedisStore(None, "app")
    slots = {key_slot(store.chunk_key(ChunkKey(IDS[0], n)).encode()) for n in range(50)}
    assert len(slots) > 45
    assert len({slot * 3 // 16384 for slot in slots}) == 3


async def test_a_published_checkpoint_announces_no_chunks_that_it_has_not(
    redis: Any, namespace: str
) -> None:
    store = RedisStore(redis, namespace)
    keys = [ChunkKey(IDS[0], number) for number in range(21)]
    await asyncio.gather(*(store.put_chunk(key, b"chunk") for key in keys))
    assert set(keys) < set(await store.chunks()), "announced ahead, all of them"
    await store.publish(IDS[0], b"manifest")
    assert await store.chunks() == keys
    await store.put_chunk(ChunkKey(IDS[0], 21), b"late")
    assert ChunkKey(IDS[0], 21) in await store.chunks()


async def test_a_chunk_that_is_put_again_after_it_was_removed_is_announced_again(
    redis: Any, namespace: str
) -> None:
    store = RedisStore(redis, namespace)
    keys = [ChunkKey(IDS[0], number) for number in range(2)]
    for key in keys:
        await store.put_chunk(key, b"chunk")
    await store.remove_chunks(await store.chunks())
    assert await store.chunks() == []
    await store.put_chunk(keys[1], b"chunk")
    assert keys[1] in await store.chunks()


async def test_a_server_that_is_gone_is_told() -> None:
    client = Redis(port=1, retry=Retry(NoBackoff(), 0))  # nobody listens there
    store = RedisStore(client, "gone")
    with pytest.raises(errors.RemoteUnavailable):
        await store.put_chunk(ChunkKey(IDS[0], 0), b"")
    with pytest.raises(errors.RemoteUnavailable):
        await store.manifests()
    await client.aclose()


async def test_a_foreign_value_under_our_key_is_told(redis: Any, namespace: str) -> None:
    await redis.set(f"{namespace}:checkpoints", "foreign")
    with pytest.raises(errors.RemoteUnavailable, match="WRONGTYPE"):
        await RedisStore(redis, namespace).manifests()


async def test_foreign_fields_are_passed_over(redis: Any, namespace: str) -> None:
    store = RedisStore(redis, namespace)
    await redis.hset(f"{namespace}:checkpoints", "x", "y")
    await redis.hset(f"{namespace}:checkpoints:started", "x", "3")
    assert await store.manifests() == {}
    assert await store.chunks() == []
