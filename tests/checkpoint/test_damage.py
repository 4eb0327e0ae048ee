"""Damage of any one chunk in Redis: it is found, the checkpoint before is restored, and said so."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from persistence import StateManager
from persistence.checkpoint.manifest import decode_manifest
from persistence.checkpoint.redis_store import RedisStore
from persistence.errors import CheckpointDamaged
from tests.engine import KIB, Start, contents
from tests.redis_servers import RedisServer


async def fill(state: StateManager, ids: range, text: str) -> None:
    for number in ids:
        async with state.edit((await state.get_or_create_session(f"s{number}")).id) as draft:
            draft["text"] = f"{text} {number} " * 20


@pytest.fixture
async def worker(
    start: Start, shared_server: RedisServer, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> StateManager:
    """A worker whose checkpoints have several chunks each."""
    monkeypatch.setattr("persistence.checkpoint.create.CHUNK_BYTES", 4 * KIB)
    monkeypatch.setattr("persistence.checkpoint.plan.CHUNK_BYTES", 4 * KIB)
    url = shared_server.url
    return await start(
        redis={"url": url, "namespace": namespace, "write": "checkpoint"},
        checkpoint={"compression": "none"},
        shutdown={"checkpoint": False},
    )


async def three_checkpoints(
    worker: StateManager, redis: Any, namespace: str
) -> tuple[list[str], list[dict[str, Any]]]:
    """Make a full one, another full one, and an incremental one; return ids and states."""
    infos, states = [], []
    for ids, text in ((range(60), "first"), (range(60, 120), "second"), (range(40), "third")):
        await fill(worker, ids, text)
        if text == "second":  # the directory forgets the first: the next one is full
            await worker.restore_checkpoint("latest")
            await fill(worker, ids, text)
        infos.append(await worker.create_checkpoint(text))
        states.append(await contents(worker))
    assert [info.kind for info in infos] == ["full", "full", "incremental"]
    return [info.id for info in infos], states


async def test_any_one_damaged_chunk_is_found_and_the_one_before_restored(
    worker: StateManager, redis: Any, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    ids, states = await three_checkpoints(worker, redis, namespace)
    store = RedisStore(redis, namespace)
    manifests = {one: decode_manifest(data, one) for one, data in (await store.manifests()).items()}
    needs = {
        one: {(chunk.checkpoint, chunk.number) for chunk in manifest.chunks}
        for one, manifest in manifests.items()
    }
    keys = await store.chunks()
    present = [key for key, size in zip(keys, await store.chunk_bytes(keys), strict=True) if size]
    assert len(present) == len(await redis.keys(f"{namespace}:checkpoint:*"))
    for one in ids:
        assert len([key for key in present if key.checkpoint == one]) > 2
    for number, key in enumerate(present):
        name = store.chunk_key(key)
        intact = await redis.get(name)
        damaged = bytearray(intact)
        damaged[number * 997 % len(damaged)] ^= 1 << number % 8
        await redis.set(name, bytes(damaged))
        # What does not need it is restored; in front of that, everything is passed over.
        expected = next(one for one in reversed(ids) if key not in needs[one])
        passed_over = [one for one in reversed(ids) if one > expected]
        caplog.clear()
        with caplog.at_level(logging.ERROR, "persistence.checkpoint"):
            restored = await worker.restore_checkpoint()
        assert restored.id == expected
        assert [one for one, _ in restored.skipped] == passed_over
        assert all(f"chunk {key.number} of {key.checkpoint}" in why for _, why in restored.skipped)
        assert len(caplog.messages) == len(passed_over)
        assert await contents(worker) == states[ids.index(expected)]
        await redis.set(name, intact)
    restored = await worker.restore_checkpoint()
    assert (restored.id, restored.skipped) == (ids[-1], ())
    assert await contents(worker) == states[-1]


async def test_a_damaged_chunk_of_all_there_are_changes_nothing(
    worker: StateManager, redis: Any, namespace: str
) -> None:
    await fill(worker, range(60), "first")
    info = await worker.create_checkpoint()
    await fill(worker, range(10), "later")
    before = await contents(worker)
    for name in await redis.keys(f"{namespace}:checkpoint:*"):
        intact = await redis.get(name)
        await redis.set(name, intact[:-1])
        with pytest.raises(CheckpointDamaged, match=info.id):
            await worker.restore_checkpoint()
        await redis.set(name, intact)
        assert await contents(worker) == before
