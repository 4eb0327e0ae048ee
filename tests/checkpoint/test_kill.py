"""kill -9 of a worker while it makes checkpoints in Redis: the ones before stay, nothing else does.

A real process and a real server, at random moments.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from persistence import StateConfig, StateManager
from persistence.checkpoint.catalogue import list_checkpoints
from persistence.checkpoint.manifest import decode_manifest
from persistence.checkpoint.redis_store import RedisStore
from persistence.checkpoint.restore import RestoredInfo, restore_into
from persistence.checkpoint.stores import ChunkKey
from persistence.clock import SystemClock
from tests.engine import ScriptedFiles, config_for, contents
from tests.nurseries import NurseryProcess
from tests.redis_servers import RedisServer

NURSERY = Path(__file__).with_name("nursery.py")
KILLS = 15
BRIEF_SECONDS = 0.03  # about as long as one checkpoint takes
LONG_SECONDS = 0.15

Raise = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture
def raise_worker() -> Iterator[Raise]:
    """Run a worker until it is killed."""
    with NurseryProcess(NURSERY) as nursery:
        yield nursery.answer


async def listed_keys(store: RedisStore) -> set[str]:
    """Return the keys of all chunks that some manifest lists."""
    return {
        store.chunk_key(ChunkKey(chunk.checkpoint, chunk.number))
        for one, data in (await store.manifests()).items()
        for chunk in decode_manifest(data, one).chunks
    }


async def chunk_keys(redis: Any, namespace: str) -> set[str]:
    return {key.decode() for key in await redis.keys(f"{namespace}:checkpoint:*")}


def config_of(directory: Path, url: str, namespace: str) -> StateConfig:
    return config_for(
        directory,
        redis={"url": url, "namespace": namespace, "write": "checkpoint"},
        checkpoint={"keep": 3},
        shutdown={"checkpoint": False},
    )


@pytest.mark.timeout(300)
async def test_a_killed_worker_leaves_the_checkpoints_before_and_no_orphan_after_the_next(
    raise_worker: Raise, redis: Any, namespace: str, shared_server: RedisServer, tmp_path: Path
) -> None:
    store = RedisStore(redis, namespace)
    here = tmp_path / "worker"
    dice = random.Random(7)
    orphans = 0
    last = ""
    for number in range(4 * KILLS):
        if number >= KILLS and orphans:
            break
        end = raise_worker(
            {
                "directory": str(here),
                "url": shared_server.url,
                "namespace": namespace,
                "seconds": dice.random() * (BRIEF_SECONDS, LONG_SECONDS)[number % 2],
            }
        )
        assert end["code"] == -9
        last = max([last, *end["made"]])
        infos = {info.id: info for info in await list_checkpoints(store)}
        assert last in infos or not last
        # It may have been killed after one was published, and before it could say so.
        assert len([one for one in infos if one > last]) <= 1
        assert all(info.problem is None for info in infos.values())
        assert await listed_keys(store) <= await chunk_keys(redis, namespace)
        if number % 3 == 0:
            for one in sorted(infos)[-2:]:
                await assert_restorable(store, one, infos[one].reason, tmp_path / f"{number} {one}")
        orphans += len(await chunk_keys(redis, namespace) - await listed_keys(store))
        if number % 2:  # else the next worker's first one does it
            config = config_of(here, shared_server.url, namespace)
            async with StateManager(config=config, files=ScriptedFiles()) as state:
                last = (await state.create_checkpoint("tidy")).id
                found = await contents(state)
            assert await chunk_keys(redis, namespace) == await listed_keys(store)
            started = await redis.hgetall(f"{namespace}:checkpoints:started")
            assert {one.decode() for one in started} <= {
                key.rpartition("{")[2].rpartition("-")[0] for key in await listed_keys(store)
            } | set(await store.manifests())
            info = await restored_into(store, tmp_path / f"tidy {number}", last)
            assert (info.id, info.skipped) == (last, ())
            assert await contents_of(tmp_path / f"tidy {number}") == found
    assert orphans  # or no kill was of interest


async def contents_of(directory: Path) -> dict[str, dict[str, Any]]:
    async with StateManager(config=config_for(directory), files=ScriptedFiles()) as state:
        return await contents(state)


async def restored_into(
    store: RedisStore, directory: Path, one: str, **options: Any
) -> RestoredInfo:
    files = ScriptedFiles()  # nobody looks at it after a power loss
    return await restore_into(store, str(directory), SystemClock(), one, files=files, **options)


async def assert_restorable(store: RedisStore, one: str, reason: str, directory: Path) -> None:
    info = await restored_into(store, directory, one, fall_back=False)
    assert info.id == one
    found = await contents_of(directory)
    assert len(found) == info.sessions
    if reason != "tidy":  # that one is made of an unfinished round
        assert {data["n"] for data in found.values()} == {int(reason)}
