"""What every shared tier does: on each version of Redis, Sentinel and Cluster, and on PostgreSQL.

It is said in `persistence.testing.remote_tier_contract`, with which tiers of others are tested too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from persistence.clock import SystemClock
from persistence.config import RedisConfig
from persistence.remote.contract import Outcome, RemoteTier
from persistence.remote.opening import tier_of
from persistence.remote.redis import RedisTier
from persistence.testing.remote_tier_contract import (
    OpenTier,
    RemoteTierContract,
    created,
    listed,
    loaded,
    outcome,
)
from tests.postgres_servers import PostgresServer, new_namespace
from tests.redis_servers import Group
from tests.remote.conftest import Open
from tests.remote.sessions import create, end, new_record, next_record, update


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


class TestRedis(RemoteTierContract):
    @pytest.fixture
    async def open_tier(self, deployment: Group) -> AsyncIterator[OpenTier]:
        async for each in opener(deployment.url):
            yield each


class TestPostgres(RemoteTierContract):
    @pytest.fixture
    async def open_tier(self, postgres: PostgresServer) -> AsyncIterator[OpenTier]:
        async for each in opener(postgres.url):
            yield each


# --- what only Redis has, or is slow --------------------------------------------------------------


async def test_a_scan_finds_nothing_of_another_namespace(
    tier: RedisTier, open_tier: Open, deployment: Group
) -> None:
    names = [f"user{n % 7}:{n}" for n in range(300)]
    await tier.commit([create(name, new_record({"n": 0})) for name in names])
    await tier.commit([end(name) for name in names[::10]])
    other = await open_tier(deployment.url, namespace="test*")
    await created(other, "user1:other", {})
    assert set(await listed(tier)) == set(names) - set(names[::10])
    assert await listed(other) == ["user1:other"]


async def test_a_session_of_ten_thousand_fields_and_one_of_ten_megabytes(tier: RedisTier) -> None:
    wide = await created(tier, "wide", {f"field{n}": n for n in range(10_000)})
    narrow = next_record(wide, {f"field{n}": n + 1 for n in range(5_000, 10_000)})
    large = await created(tier, "large", {"blob": bytes(10 * 2**20), "n": 1})
    assert await outcome(tier, update("wide", wide, narrow)) is Outcome.APPLIED
    assert (await loaded(tier, "wide")).record == narrow
    assert (await loaded(tier, "large")).record == large


async def test_the_epoch_stays_until_the_content_is_lost(
    tier: RedisTier, deployment: Group
) -> None:
    epoch = await tier.epoch()
    assert await tier.epoch() == epoch
    deployment.empty()
    assert await tier.epoch() != epoch
