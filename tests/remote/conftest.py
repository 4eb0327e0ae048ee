"""What the tests of the shared tier have in common: tiers that are closed, a proxy, records."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from persistence.clock import SystemClock
from persistence.config import RedisConfig
from persistence.remote.redis import RedisTier
from tests.redis_servers import Group, Proxy, RedisServer

Open = Callable[..., Awaitable[RedisTier]]


@pytest.fixture
async def open_tier() -> AsyncIterator[Open]:
    """Open tiers that are closed at the end of the test. Called with a URL and settings."""
    opened: list[RedisTier] = []

    async def open_tier(url: str, **settings: Any) -> RedisTier:
        settings = {"namespace": "test", "timeout_seconds": 5, **settings}
        tier = RedisTier(RedisConfig(url=url, **settings), SystemClock())
        opened.append(tier)
        await tier.open()
        return tier

    yield open_tier
    for tier in opened:
        await tier.close()


@pytest.fixture
async def tier(open_tier: Open, deployment: Group) -> RedisTier:
    """A tier on every kind of deployment in turn."""
    return await open_tier(deployment.url)


@pytest.fixture
async def proxy(shared_server: RedisServer) -> AsyncIterator[Proxy]:
    """A proxy in front of the shared server."""
    running = await Proxy(shared_server.port).start()
    yield running
    await running.close()
