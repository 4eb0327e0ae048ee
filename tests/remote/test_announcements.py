"""Other workers' commits arrive, and it is noticed when they may not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise

import pytest

from persistence import record as rec
from persistence.remote.redis import RedisTier
from persistence.testing import remote_tier_contract as kit
from tests.engine import eventually
from tests.redis_servers import Group, Proxy, RedisServer
from tests.remote.conftest import Open
from tests.remote.sessions import create, end, new_record, next_record, touch, update


class Heard(kit.Heard):
    """The listener of the kit, for which one can wait."""

    async def hears(self, *events: str) -> None:
        await eventually(lambda: self.events == list(events))


async def listening(tier: RedisTier) -> Heard:
    heard = Heard()
    await tier.subscribe(heard)
    await heard.hears("connected")
    return heard


async def test_commits_of_another_worker_are_announced_in_order_and_own_ones_are_not(
    tier: RedisTier, open_tier: Open, deployment: Group
) -> None:
    heard, own = await listening(tier), await listening(await open_tier(deployment.url))
    chain = [new_record({"n": 0})]
    for n in range(1, 5):
        chain.append(next_record(chain[-1], {"n": n}))
    ending = end("ü")
    await tier.commit([create("ü", chain[0]), create("other", new_record({}))])
    for old, new in pairwise(chain):
        await tier.commit([update("ü", old, new)])
    await tier.commit([touch("ü", chain[-1], 9e9, 9e9), ending])
    await eventually(lambda: len(own.announcements) == 7)
    mine = [item for item in own.announcements if item.session_id == "ü"]
    expected = [(rec.version_of(record), rec.commit_of(record), False) for record in chain]
    expected.append((5, ending.commit, True))
    assert [(item.version, item.commit, item.ended) for item in mine] == expected
    assert {item.worker for item in own.announcements} == {tier.worker}
    assert heard.announcements == []


async def test_what_is_refused_or_repeated_is_not_announced(
    open_tier: Open, each_server: RedisServer
) -> None:
    tier = await open_tier(each_server.url)
    heard = await listening(await open_tier(each_server.url))
    first = new_record({"n": 0})
    second = next_record(first, {"n": 1})
    requests = [create("a", first), update("a", first, second)]
    await tier.commit(requests)
    await tier.commit([*requests, update("a", first, next_record(first, {}))])
    await tier.commit([create("last", new_record({}))])
    await eventually(lambda: bool(heard.announcements) and heard.announcements[-1][0] == "last")
    assert [item.session_id for item in heard.announcements] == ["a", "a", "last"]


async def test_namespaces_do_not_hear_each_other(
    open_tier: Open, shared_server: RedisServer
) -> None:
    heard = await listening(await open_tier(shared_server.url, namespace="one"))
    other = await open_tier(shared_server.url, namespace="one:two")
    await other.commit([create("a", new_record({}))])
    same = await open_tier(shared_server.url, namespace="one")
    await same.commit([create("b", new_record({}))])
    await eventually(lambda: len(heard.announcements) == 1)
    assert heard.announcements[0].session_id == "b"


@pytest.mark.parametrize("how", [Proxy.cut, Proxy.hold], ids=["cut", "silent"])
async def test_a_subscription_that_breaks_or_falls_silent_is_told_and_comes_back(
    open_tier: Open, proxy: Proxy, how: Callable[[Proxy], None]
) -> None:
    tier = await open_tier(proxy.url, heartbeat_seconds=0.05, timeout_seconds=0.5)
    heard = await listening(tier)
    assert tier.is_listening
    how(proxy)
    await eventually(lambda: heard.events[:2] == ["connected", "disconnected"])
    proxy.release()
    await eventually(lambda: len(heard.events) >= 3 and heard.events[-1] == "connected")
    assert heard.events[2::2] == ["connected"] * len(heard.events[2::2])
    assert len(set(heard.epochs)) == 1, "nothing was lost"


async def test_a_server_that_comes_back_empty_is_told_with_another_epoch(
    open_tier: Open, own_server: RedisServer
) -> None:
    tier = await open_tier(own_server.url, heartbeat_seconds=0.05, timeout_seconds=0.5)
    heard = await listening(tier)
    own_server.kill()
    await heard.hears("connected", "disconnected")
    assert not tier.is_listening
    own_server.start()
    await heard.hears("connected", "disconnected", "connected")
    assert len(set(heard.epochs)) == 2


async def test_a_server_that_is_emptied_while_all_connections_stay_open_is_told(
    open_tier: Open, own_server: RedisServer
) -> None:
    tier = await open_tier(own_server.url, heartbeat_seconds=0.05)
    heard = await listening(tier)
    own_server.ask("FLUSHALL")
    await heard.hears("connected", "connected")
    assert tier.is_listening
    assert len(set(heard.epochs)) == 2
    assert heard.epochs[-1] == await tier.epoch()


async def test_on_cluster_each_primary_proves_that_its_announcements_arrive(
    open_tier: Open, cluster: Group
) -> None:
    tier = await open_tier(cluster.url, heartbeat_seconds=0.05, timeout_seconds=0.5)
    heard = await listening(tier)
    cluster.servers[2].hang()
    await eventually(lambda: heard.events[:2] == ["connected", "disconnected"])
    cluster.servers[2].go_on()
    await eventually(lambda: heard.events[-1] == "connected")


async def test_messages_that_are_none_of_ours_are_ignored(
    open_tier: Open, shared_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    heard = await listening(await open_tier(shared_server.url))
    for nonsense in (b"", b"x", b"x" * 40, b"\xff" * 60):
        shared_server.ask("PUBLISH", "test:commits", nonsense)
    other = await open_tier(shared_server.url)
    await other.commit([create("a", new_record({}))])
    await eventually(lambda: bool(heard.announcements))
    assert [item.session_id for item in heard.announcements] == ["a"]
    assert heard.events == ["connected"]
    assert "is none of ours" in caplog.text


async def test_closing_ends_the_subscription_without_a_word(
    open_tier: Open, shared_server: RedisServer
) -> None:
    tier = await open_tier(shared_server.url)
    heard = await listening(tier)
    await tier.close()
    await tier.close()
    await asyncio.sleep(0)
    assert heard.events == ["connected"]
    assert not tier.is_listening
