"""The conformance kit, run on the providers of this library."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from persistence import ManualClock
from persistence.providers import (
    MemoryProvider,
    PostgresProvider,
    RedisProvider,
    SessionProvider,
)
from persistence.testing.provider_contract import ProviderContract
from tests.postgres_servers import PostgresServer, new_namespace
from tests.redis_servers import RedisServer


class TestMemoryProvider(ProviderContract):
    clock: ManualClock

    @pytest.fixture
    def provider(self) -> SessionProvider:
        self.clock = ManualClock()
        return MemoryProvider(clock=self.clock)

    async def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)


class TestRedisProvider(ProviderContract):
    @pytest.fixture
    async def provider(self, shared_server: RedisServer) -> AsyncIterator[SessionProvider]:
        namespace = new_namespace()
        async with RedisProvider(shared_server.url, namespace=namespace, timeout_seconds=10) as it:
            yield it


class TestPostgresProvider(ProviderContract):
    @pytest.fixture
    async def provider(self, postgres: PostgresServer) -> AsyncIterator[SessionProvider]:
        namespace = new_namespace()
        async with PostgresProvider(postgres.url, namespace=namespace, timeout_seconds=10) as it:
            yield it
