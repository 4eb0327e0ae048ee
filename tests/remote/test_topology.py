"""Failovers and moving slots, on real Sentinel and Cluster deployments."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise

import pytest

from persistence import record as rec
from persistence.errors import ConfigError, RemoteUnavailable
from persistence.remote.contract import APPLIED, RemoteSession
from persistence.remote.keys import slot_of
from tests.engine import eventually
from tests.redis_servers import HOST, Group, RedisServer, need_binary, start_sentinel, wait_until
from tests.remote.conftest import Open
from tests.remote.sessions import create, new_record, next_record, update
from tests.remote.test_announcements import listening


@pytest.fixture
def sentinels() -> Iterator[Group]:
    """A Sentinel deployment of the test's own, that it may fail over."""
    group = start_sentinel(need_binary())
    yield group
    group.close()


async def test_a_failover_is_followed_and_reported(open_tier: Open, sentinels: Group) -> None:
    tier = await open_tier(sentinels.url, heartbeat_seconds=0.1, timeout_seconds=0.5)
    heard = await listening(tier)
    chain = [new_record({"n": 0})]
    await tier.commit([create("a", chain[0])])
    primary = sentinels.servers[0]
    primary.ask("WAIT", 2, 2000)
    primary.kill()
    request = update("a", chain[0], next_record(chain[0], {"n": 1}))
    async with asyncio.timeout(20):
        while not (await tier.commit([request]))[0].is_stored:  # noqa: ASYNC110 - as callers do
            await asyncio.sleep(0.05)
    found = await tier.load("a")
    assert isinstance(found, RemoteSession)
    assert found.record == request.record
    await eventually(lambda: heard.events[-1] == "connected" and len(heard.events) >= 3)
    assert heard.events[1] == "disconnected"
    assert set(heard.epochs) == {heard.epochs[0]}


async def test_a_primary_that_was_demoted_is_left_for_the_new_one(
    open_tier: Open, sentinels: Group
) -> None:
    """The old one lives and answers READONLY: no connection breaks."""
    tier = await open_tier(sentinels.url)
    first = new_record({"n": 0})
    await tier.commit([create("a", first)])
    primary, *replicas = sentinels.servers[:3]
    primary.ask("WAIT", 2, 2000)
    wait_until(
        lambda: sentinels.servers[3].ask("SENTINEL", "FAILOVER", "shop"),
        "the sentinel starts a failover",
    )
    wait_until(
        lambda: any("role:master" in replica.told("INFO replication") for replica in replicas),
        "a replica is promoted",
    )
    wait_until(
        lambda: (
            b"%d" % primary.port
            not in sentinels.servers[3].ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "shop")
        ),
        "the sentinels say so",
    )
    # The sentinels would do that too, some seconds later.
    primary.ask("REPLICAOF", HOST, replicas[0].port)
    [result] = await tier.commit([update("a", first, next_record(first, {"n": 1}))])
    assert result.is_stored, result


async def test_a_service_that_no_sentinel_knows_is_an_error_of_the_configuration(
    open_tier: Open, sentinel: Group
) -> None:
    with pytest.raises(ConfigError, match="knows a service 'nothing'"):
        await open_tier(sentinel.url.replace("/shop", "/nothing"))


async def test_sentinels_that_are_all_gone_are_told(open_tier: Open) -> None:
    with pytest.raises(RemoteUnavailable, match="no sentinel names the primary of 'shop'"):
        await open_tier("redis+sentinel://127.0.0.1:1,127.0.0.1:2/shop")


# --- Cluster --------------------------------------------------------------------------------------


def node_of(cluster: Group, slot: int) -> RedisServer:
    """Return the node that serves a slot."""
    for node in cluster.servers:
        for line in node.told("CLUSTER NODES").splitlines():
            parts = line.split()
            if "myself" not in parts[2]:
                continue
            for span in parts[8:]:
                first, _, last = span.partition("-")
                if first.isdigit() and int(first) <= slot <= int(last or first):
                    return node
    raise AssertionError(f"nobody serves slot {slot}")


def id_of(node: RedisServer) -> str:
    return node.told("CLUSTER MYID")


async def test_a_slot_that_moves_is_followed_at_every_step(open_tier: Open, cluster: Group) -> None:
    """Before, while (ASK for what has left, the old node for what has not) and after (MOVED)."""
    tier = await open_tier(cluster.url)
    key = b"test:session:{a}"
    slot = slot_of(key)
    source = node_of(cluster, slot)
    target = next(node for node in cluster.servers if node is not source)
    chain = [new_record({"n": 0})]
    for n in range(1, 5):
        chain.append(next_record(chain[-1], {"n": n}))
    updates = [update("a", old, new) for old, new in pairwise(chain)]
    assert await tier.commit([create("a", chain[0])]) == [APPLIED]
    target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", id_of(source))
    source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", id_of(target))
    assert await tier.commit(updates[:1]) == [APPLIED]
    source.ask("MIGRATE", HOST, target.port, key, 0, 1000)
    assert await tier.commit(updates[1:3]) == [APPLIED] * 2
    found = await tier.load("a")
    assert isinstance(found, RemoteSession)
    assert found.record == chain[3]
    for node in cluster.servers:
        node.ask("CLUSTER", "SETSLOT", slot, "NODE", id_of(target))
    assert await tier.commit(updates[3:]) == [APPLIED]
    [stored] = await tier.stored(["a"])
    assert stored is not None
    assert stored.commit == rec.commit_of(chain[-1])
    assert tier.repeated > 0


async def test_a_batch_over_all_nodes_is_applied_though_one_of_them_is_gone(
    open_tier: Open, cluster: Group
) -> None:
    tier = await open_tier(cluster.url, timeout_seconds=0.6)
    names = [f"s{n}" for n in range(60)]
    lost = cluster.servers[2]
    theirs = {
        n for n in names if node_of(cluster, slot_of(b"test:session:{%b}" % n.encode())) is lost
    }
    assert 0 < len(theirs) < 60
    lost.hang()
    try:
        batch = [create(name, new_record({"n": 0})) for name in names]
        results = dict(zip(names, await tier.commit(batch), strict=True))
    finally:
        lost.go_on()
    assert {name for name, result in results.items() if not result.is_stored} == theirs


async def test_the_cluster_url_needs_only_one_node_that_lives(
    open_tier: Open, cluster: Group
) -> None:
    port = cluster.servers[1].port
    tier = await open_tier(f"redis+cluster://127.0.0.1:1,127.0.0.1:{port}")
    assert await tier.commit([create(f"s{n}", new_record({})) for n in range(50)]) == [APPLIED] * 50
