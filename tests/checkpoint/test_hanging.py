"""A Redis that does not answer is given up soon; one that is slow is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from persistence.checkpoint.manifest import make_id
from persistence.checkpoint.opening import open_store
from persistence.checkpoint.stores import CheckpointStore, ChunkKey
from persistence.config import CheckpointConfig, RedisConfig
from persistence.disk.threads import Threads
from persistence.errors import RemoteUnavailable
from tests.redis_servers import Proxy, RedisServer

KEY = ChunkKey(make_id(1, "20260101T000000Z", "0123abcd", bytes(4)), 0)
TIMEOUT_SECONDS = 0.5
CALLS: list[Callable[[CheckpointStore], Awaitable[Any]]] = [
    lambda store: store.put_chunk(KEY, b"chunk"),
    lambda store: store.get_chunk(KEY),
    lambda store: store.chunk_bytes([KEY]),
    lambda store: store.publish(KEY.checkpoint, b"manifest"),
    lambda store: store.manifests(),
    lambda store: store.withdraw(KEY.checkpoint),
    lambda store: store.chunks(),
    lambda store: store.remove_chunks([KEY]),
]

OpenStoreAt = Callable[[str], CheckpointStore]


@pytest.fixture
async def open_at(threads: Threads) -> AsyncIterator[OpenStoreAt]:
    """Opens stores as a worker does."""
    opened = []

    def open_one(url: str) -> CheckpointStore:
        redis = RedisConfig(url=url, timeout_seconds=TIMEOUT_SECONDS)
        opened.append(open_store(CheckpointConfig(), redis, "/nowhere", threads))
        return opened[-1].store

    yield open_one
    for each in opened:
        await each.close()


@pytest.mark.parametrize("is_connected", [True, False])
async def test_every_call_ends_a_few_timeouts_after_the_server_hangs(
    open_at: OpenStoreAt, own_server: RedisServer, is_connected: bool
) -> None:
    store = open_at(own_server.url)
    if is_connected:
        await asyncio.gather(*(store.manifests() for _ in CALLS))
    own_server.hang()
    # With four sendings, each for five timeouts, it would take more than twice as long.
    async with asyncio.timeout(9 * TIMEOUT_SECONDS):
        ends = await asyncio.gather(*(call(store) for call in CALLS), return_exceptions=True)
    assert [type(end) for end in ends] == [RemoteUnavailable] * len(CALLS)
    assert {"no answer within 3 s (redis.timeout_seconds)" in str(end) for end in ends} == {True}
    own_server.go_on()
    assert await store.manifests() in ({}, {KEY.checkpoint: b"manifest"})


async def test_a_chunk_may_take_several_times_as_long_as_a_commit(
    open_at: OpenStoreAt, own_server: RedisServer
) -> None:
    proxy = await Proxy(own_server.port).start()
    try:
        store = open_at(proxy.url)
        await store.put_chunk(KEY, b"first")
        for call in (store.put_chunk(KEY, bytes(2**21)), store.get_chunk(KEY)):
            proxy.hold()
            asyncio.get_running_loop().call_later(3 * TIMEOUT_SECONDS, proxy.release)
            await call
        assert await store.chunk_bytes([KEY]) == [2**21]
    finally:
        await proxy.close()
