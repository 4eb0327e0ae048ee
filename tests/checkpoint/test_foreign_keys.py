"""A key of somebody else in the place of the lists of checkpoints."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from persistence import ManualClock
from persistence.checkpoint.redis_store import RedisStore
from persistence.config import RedisConfig
from persistence.errors import ConfigError, RemoteUnavailable
from persistence.remote.redis import RedisTier
from tests.redis_servers import RedisServer

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
