"""The conformance kit, run on the tiers of this library."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from persistence.clock import SystemClock
from persistence.config import RedisConfig
from persistence.remote.contract import RemoteTier
from persistence.remote.opening import tier_of
from persistence.testing.remote_tier_contract import OpenTier, RemoteTierContract
from tests.postgres_servers import PostgresServer, new_namespace
from tests.redis_servers import RedisServer


async def opener(url: str) -> AsyncIterator[OpenTier]:
    """Yield what opens tiers in one fresh namespace, and close them."""
    namespace = new_namespace()
    opened: list[RemoteTier] = []

    async def open_tier(*, tombstone_seconds: float = 86_400.0) -> RemoteTier:
        settings: dict[str, Any] = {"namespace": namespace, "timeout_seconds": 10}
        config = RedisConfig(url=url, tombstone_seconds=tombstone_seconds, **settings)
        tier = tier_of(config, SystemClock())
        opened.append(tier)
        await tier.open()
        return tier

    yield open_tier
    for tier in opened:
        await tier.close()


class TestRedisTier(RemoteTierContract):
    @pytest.fixture
    async def open_tier(self, shared_server: RedisServer) -> AsyncIterator[OpenTier]:
        async for each in opener(shared_server.url):
            yield each


class TestPostgresTier(RemoteTierContract):
    @pytest.fixture
    async def open_tier(self, postgres: PostgresServer) -> AsyncIterator[OpenTier]:
        async for each in opener(postgres.url):
            yield each
