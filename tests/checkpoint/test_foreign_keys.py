"""A key of somebody else in the place of the lists of checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from persistence import ManualClock
from persistence.checkpoint.manifest import make_id
from persistence.checkpoint.redis_store import RedisStore
from persistence.checkpoint.stores import ChunkKey
from persistence.config import RedisConfig
from persistence.errors import ConfigError, RemoteDamaged, RemoteUnavailable
from persistence.remote.redis import RedisTier
from tests.engine import Start
from tests.redis_servers import RedisServer

ID = make_id(1, "20260101T000000Z", "0" * 8, bytes(4))
PLACES = ["checkpoints", "checkpoints:started"]
USES: list[Callable[[RedisStore], Awaitable[Any]]] = [
    lambda store: store.manifests(),
    lambda store: store.publish("0" * 8, b""),
    lambda store: store.withdraw("0" * 8),
]


@pytest.mark.parametrize("place", PLACES)
async def test_a_foreign_key_is_told_before_anything_is_kept(
    shared_server: RedisServer, redis: Any, namespace: str, place: str
) -> None:
    key = f"{namespace}:{place}"
    await redis.set(key, "mine")
    tier = RedisTier(RedisConfig(url=shared_server.url, namespace=namespace), ManualClock())
    with pytest.raises(ConfigError, match=f"redis.namespace: key '{key}'"):
        await tier.open()
    await tier.close()
    assert await redis.get(key) == b"mine"


@pytest.mark.parametrize("use", USES)
async def test_a_foreign_key_that_came_later_is_named_by_whoever_meets_it(
    redis: Any, namespace: str, use: Callable[[RedisStore], Awaitable[Any]]
) -> None:
    key = f"{namespace}:checkpoints"
    await redis.set(key, "mine")
    with pytest.raises(RemoteUnavailable, match=f"key '{key}' is a string .* delete that key"):
        await use(RedisStore(redis, namespace))
    assert await redis.get(key) == b"mine"


@pytest.mark.parametrize("place", PLACES)
async def test_nothing_is_written_into_a_hash_of_somebody_else(
    start: Start, shared_server: RedisServer, redis: Any, namespace: str, place: str
) -> None:
    key = f"{namespace}:{place}"
    shared = {"url": shared_server.url, "namespace": namespace, "write": "checkpoint"}
    state = await start(redis=shared)
    await state.create_session(session_id="a")
    await redis.hset(key, "f", "mine")
    for _ in range(2):
        with pytest.raises(RemoteDamaged, match=f"key '{key}': it is a hash of somebody else"):
            await state.create_checkpoint()
    assert (await state.stats()).checkpoints.failed == 2
    assert await redis.keys(f"{namespace}:checkpoint*") == [key.encode()]
    assert await redis.hgetall(key) == {b"f": b"mine"}
    await redis.delete(key)
    assert (await state.create_checkpoint()).sessions == 1


async def test_an_empty_checkpoint_is_not_written_into_a_hash_of_somebody_else_either(
    redis: Any, namespace: str
) -> None:
    await redis.hset(f"{namespace}:checkpoints", "f", "mine")
    with pytest.raises(RemoteDamaged):
        await RedisStore(redis, namespace).publish(ID, b"manifest")
    assert await redis.hkeys(f"{namespace}:checkpoints") == [b"f"]


@pytest.mark.parametrize("value", ["else", "", "-1", " 3", "1_0", "100000", "9" * 5000])
async def test_what_is_no_number_of_chunks_is_passed_over_and_left_as_it_is(
    redis: Any, namespace: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    started = f"{namespace}:checkpoints:started"
    store = RedisStore(redis, namespace)
    await redis.hset(started, ID, value)
    with caplog.at_level(logging.WARNING, "persistence.checkpoint"):
        assert await store.chunks() == []
    [told] = caplog.messages
    assert f"key '{started}', field {ID} holds" in told
    await store.remove_chunks([ChunkKey(ID, 0)])
    assert await redis.hget(started, ID) == value.encode()


async def test_checkpoints_are_made_beside_what_is_no_number_of_chunks(
    start: Start, shared_server: RedisServer, redis: Any, namespace: str
) -> None:
    await redis.hset(f"{namespace}:checkpoints:started", ID, "30000000")
    shared = {"url": shared_server.url, "namespace": namespace, "write": "checkpoint"}
    state = await start(redis=shared)
    info = await state.create_checkpoint()
    assert [each.id for each in await state.list_checkpoints()] == [info.id]
    assert await redis.hget(f"{namespace}:checkpoints:started", ID) == b"30000000"
