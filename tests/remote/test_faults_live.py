"""Lost replies, cancelled calls, servers that hang, refuse, or come back empty."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from persistence import record as rec
from persistence.errors import (
    PersistenceError,
    RemoteDamaged,
    RemoteUnavailable,
    WriteOutcomeUnknown,
)
from persistence.remote.contract import APPLIED, Outcome, RemoteSession, Request
from persistence.remote.exchanges import Lost
from persistence.remote.redis import RedisTier
from tests.engine import eventually
from tests.faults.redisfaults import cancel_calls
from tests.redis_servers import Proxy, RedisServer, need_binary
from tests.remote.conftest import Open
from tests.remote.sessions import create, end, new_id, new_record, next_record, update


async def stored_version(tier: RedisTier, session_id: str) -> int:
    [stored] = await tier.stored([session_id])
    assert stored is not None
    return stored.version


# --- lost replies ---------------------------------------------------------------------------------


async def test_a_thousand_lost_replies_apply_nothing_twice_and_lose_nothing(
    open_tier: Open, proxy: Proxy, shared_server: RedisServer
) -> None:
    chance = random.Random(7)

    async def work(tier: RedisTier, names: list[str]) -> dict[str, tuple[bytes, int]]:
        records = {name: new_record({"n": 0}) for name in names}
        await tier.commit([create(name, record) for name, record in records.items()])
        updates = 0
        while proxy.dropped < 1000:
            updates += 1
            new = {name: next_record(old, {"n": updates}) for name, old in records.items()}
            batch = [update(name, old, new[name]) for name, old in records.items()]
            for result in await tier.commit(batch):
                assert result.is_stored, result
            records = new
        return {name: (record, updates) for name, record in records.items()}

    tiers = [await open_tier(proxy.url, timeout_seconds=30) for _ in range(8)]
    # Results of the script come as arrays; now and then it hits the handshake of a connection.
    proxy.drops_reply = lambda data: chance.random() < (0.5 if data[:1] == b"*" else 0.02)
    names = [[f"worker{worker}:{n}" for n in range(5)] for worker in range(8)]
    done = await asyncio.gather(*map(work, tiers, names))
    direct = await open_tier(shared_server.url)
    for name, (record, updates) in [item for each in done for item in each.items()]:
        assert await stored_version(direct, name) == updates + 1 == rec.version_of(record)
        found = await direct.load(name)
        assert isinstance(found, RemoteSession)
        assert found.record == record
    assert sum(tier.repeated for tier in tiers) >= 900


async def test_an_end_whose_reply_is_lost_is_told_apart_from_one_by_somebody_else(
    open_tier: Open, proxy: Proxy
) -> None:
    tier = await open_tier(proxy.url)
    await tier.commit([create("a", new_record({}))])
    drops = iter([True])
    proxy.drops_reply = lambda _: next(drops, False)
    assert [result.outcome for result in await tier.commit([end("a")])] == [Outcome.ALREADY_APPLIED]
    assert [result.outcome for result in await tier.commit([end("a")])] == [Outcome.TERMINATED]


async def test_what_stays_without_a_reply_is_unknown_and_not_refused(
    open_tier: Open, proxy: Proxy, shared_server: RedisServer
) -> None:
    tier = await open_tier(proxy.url, timeout_seconds=0.5)
    first = new_record({"n": 0})
    second = next_record(first, {"n": 1})
    await tier.commit([create("a", first)])
    proxy.drops_reply = lambda _: True
    [result] = await tier.commit([update("a", first, second)])
    assert result.outcome is Outcome.UNKNOWN
    assert isinstance(result.error, WriteOutcomeUnknown)
    assert "safe to send again" in str(result.error)
    proxy.drops_reply = lambda _: False
    # It was applied, and sending it again tells so.
    [result] = await tier.commit([update("a", first, second)])
    assert result.outcome is Outcome.ALREADY_APPLIED


async def test_a_part_of_a_batch_that_was_answered_is_known_when_the_rest_is_not(
    open_tier: Open, proxy: Proxy
) -> None:
    tier = await open_tier(proxy.url, timeout_seconds=0.5)
    await tier.commit([create("warm", new_record({}))])
    seen = 0

    def drop_after_the_first(data: bytes) -> bool:
        nonlocal seen
        seen += 1
        return seen > 1

    proxy.drops_reply = drop_after_the_first
    batch = [create(f"s{n}", new_record({"blob": bytes(2**19)})) for n in range(6)]
    outcomes = [result.outcome for result in await tier.commit(batch)]
    assert set(outcomes) <= {Outcome.APPLIED, Outcome.ALREADY_APPLIED, Outcome.UNKNOWN}
    assert outcomes[-1] is Outcome.UNKNOWN
    proxy.drops_reply = lambda _: False
    assert all(result.is_stored for result in await tier.commit(batch))


async def test_reads_survive_a_lost_reply(open_tier: Open, proxy: Proxy) -> None:
    tier = await open_tier(proxy.url)
    record = new_record({"n": 0})
    await tier.commit([create("a", record)])
    drops = iter([True, False, True, False])
    proxy.drops_reply = lambda _: next(drops, False)
    found = await tier.load("a")
    assert isinstance(found, RemoteSession)
    assert await stored_version(tier, "a") == 1


@pytest.mark.parametrize(
    ("is_sent", "commits", "expected"),
    [
        (True, 5, Outcome.ALREADY_APPLIED),
        (True, 31, Outcome.ALREADY_APPLIED),
        (True, 40, Outcome.UNKNOWN),
        (False, 5, Outcome.CONFLICT),
        (False, 31, Outcome.CONFLICT),
        (False, 40, Outcome.UNKNOWN),
    ],
)
@pytest.mark.parametrize("changes", ["data", "metadata"])
async def test_a_lost_reply_that_too_many_commits_have_followed_leaves_the_outcome_unknown(
    open_tier: Open,
    shared_server: RedisServer,
    is_sent: bool,
    commits: int,
    expected: Outcome,
    changes: str,
) -> None:
    """A worker that was stopped meets what others have done meanwhile: its own id may be gone.

    Commits of metadata make no new version, so no version tells how many there were.
    """
    tier, other = [await open_tier(shared_server.url) for _ in range(2)]
    first = new_record({"n": 0})
    await tier.commit([create("a", first)])
    mine = next_record(first, {"n": 1})
    router = tier._committer._router
    send = router._send

    async def lose(calls: list[Any]) -> list[Any]:
        router._send = send  # type: ignore[method-assign]
        found = await send(calls) if is_sent else calls
        record = mine if is_sent else first
        for n in range(commits):
            if changes == "data":
                after = next_record(record, {"n": n})
            else:
                after = rec.with_meta(record, new_id(), rec.pack_meta({"n": n}))
            assert (await other.commit([update("a", record, after)]))[0].is_stored
            record = after
        return [Lost("the worker stood still")] * len(found)

    router._send = lose  # type: ignore[method-assign]
    [result] = await tier.commit([update("a", first, mine)])
    assert result.outcome is expected


# --- cancelled calls ------------------------------------------------------------------------------


async def test_after_a_thousand_cancelled_calls_no_reply_reached_another_caller() -> None:
    assert await cancel_calls(1000, 11, lambda: True) >= 1000


async def test_a_cancelled_commit_is_undecided_and_may_be_sent_again(
    open_tier: Open, proxy: Proxy
) -> None:
    tier = await open_tier(proxy.url)
    first = new_record({"n": 0})
    await tier.commit([create("a", first)])
    proxy.hold()
    request = update("a", first, next_record(first, {"n": 1}))
    call = asyncio.create_task(tier.commit([request]))
    for _ in range(20):
        await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    proxy.release()
    [result] = await tier.commit([request])
    assert result.is_stored
    assert await stored_version(tier, "a") == 2


# --- servers that do not work ---------------------------------------------------------------------


async def test_a_server_that_hangs_makes_the_outcome_unknown_until_it_goes_on(
    open_tier: Open, own_server: RedisServer
) -> None:
    tier = await open_tier(own_server.url, timeout_seconds=0.3)
    first = new_record({"n": 0})
    await tier.commit([create("a", first)])
    own_server.hang()
    request = update("a", first, next_record(first, {"n": 1}))
    started = time.monotonic()
    [result] = await tier.commit([request])
    assert result.outcome is Outcome.UNKNOWN
    with pytest.raises(RemoteUnavailable, match="load session 'a'"):
        await tier.load("a")
    assert time.monotonic() - started < 3
    own_server.go_on()
    [result] = await tier.commit([request])
    assert result.outcome is Outcome.ALREADY_APPLIED  # its first sending was executed late
    assert await stored_version(tier, "a") == 2


async def test_a_server_that_is_gone_refuses_and_says_where(
    open_tier: Open, own_server: RedisServer
) -> None:
    tier = await open_tier(own_server.url)
    own_server.kill()
    with pytest.raises(RemoteUnavailable):
        await tier.ping()
    [result] = await tier.commit([create("a", new_record({}))])
    assert result.outcome is Outcome.REFUSED
    assert isinstance(result.error, RemoteUnavailable)
    assert f"127.0.0.1:{own_server.port} cannot be reached" in str(result.error)
    for call in (tier.load("a"), tier.stored(["a"]), tier.ping(), tier.epoch()):
        with pytest.raises(RemoteUnavailable, match="cannot be reached"):
            await call
    with pytest.raises(RemoteUnavailable):
        [page async for page in tier.scan()]


async def test_a_server_that_came_back_empty_is_seen_by_its_epoch(
    open_tier: Open, own_server: RedisServer
) -> None:
    tier = await open_tier(own_server.url)
    first = new_record({"n": 0})
    await tier.commit([create("a", first)])
    epoch = await tier.epoch()
    own_server.restart_empty()
    second = next_record(first, {"n": 1})
    [result] = await tier.commit([update("a", first, second)])
    assert result.outcome is Outcome.MISSING
    assert await tier.epoch() != epoch
    # Seeded again as it is here: a creation with all of the record.
    assert await tier.commit([create("a", second)]) == [APPLIED]
    found = await tier.load("a")
    assert isinstance(found, RemoteSession)
    assert found.record == second


async def test_scripts_that_were_flushed_are_loaded_again(
    open_tier: Open, each_server: RedisServer
) -> None:
    tier = await open_tier(each_server.url)
    chain = [new_record({"n": 0})]
    for n in range(1, 300):
        chain.append(next_record(chain[-1], {"n": n}))
    await tier.commit([create("a", chain[0])])
    each_server.ask("SCRIPT", "FLUSH")
    results = await tier.commit([update("a", old, new) for old, new in pairwise(chain)])
    assert all(result.is_stored for result in results)
    each_server.ask("SCRIPT", "FLUSH")
    assert await stored_version(tier, "a") == 300


@pytest.mark.parametrize("command", ["publish", "pexpireat"])
async def test_a_script_that_stops_behind_a_write_leaves_it_open_what_was_done(
    open_tier: Open, each_server: RedisServer, command: str
) -> None:
    """An administrator takes a command away from a user whose worker runs."""
    each_server.ask("ACL", "SETUSER", "limited", "on", ">secret", "~*", "&*", "+@all")
    try:
        tier = await open_tier(each_server.url.replace("://", "://limited:secret@"))
        first = new_record({"n": 0})
        await tier.commit([create("a", first)])
        each_server.ask("ACL", "SETUSER", "limited", f"-{command}")
        second = next_record(first, {"n": 1})
        [result] = await tier.commit([update("a", first, second)])
        assert await stored_version(tier, "a") == 2, "it was applied"
        assert result.outcome is Outcome.UNKNOWN
        assert isinstance(result.error, WriteOutcomeUnknown)
        assert "the script stopped" in str(result.error)
        each_server.ask("ACL", "SETUSER", "limited", f"+{command}")
        [result] = await tier.commit([update("a", first, second)])
        assert result.outcome is Outcome.ALREADY_APPLIED
    finally:
        each_server.ask("ACL", "DELUSER", "limited")


async def test_a_replica_certainly_ends_nothing(open_tier: Open, each_server: RedisServer) -> None:
    """What is taken away first there is done by a call that stops the script."""
    tier = await open_tier(each_server.url)
    await tier.commit([create("a", new_record({}))])
    each_server.ask("REPLICAOF", "127.0.0.1", "1")
    try:
        [result] = await tier.commit([end("a")])
    finally:
        each_server.ask("REPLICAOF", "NO", "ONE")
    assert result.outcome is Outcome.REFUSED
    assert "takes no writes" in str(result.error)
    assert await stored_version(tier, "a") == 1


@pytest.mark.parametrize("existing", [False, True])
async def test_a_server_without_memory_refuses_and_keeps_what_it_has(
    open_tier: Open, own_server: RedisServer, existing: bool
) -> None:
    tier = await open_tier(own_server.url)
    first = new_record({"n": 0})
    if existing:
        await tier.commit([create("a", first)])
    own_server.ask("CONFIG", "SET", "maxmemory", "1")
    second = next_record(first, {"n": 1})
    request = update("a", first, second) if existing else create("a", first)
    [result] = await tier.commit([request])
    assert result.outcome is Outcome.REFUSED
    assert isinstance(result.error, RemoteUnavailable)
    assert "maxmemory" in str(result.error)
    own_server.ask("CONFIG", "SET", "maxmemory", "0")
    found = await tier.load("a")
    assert (found is not None) == existing
    assert await tier.commit([request]) == [APPLIED]


async def test_a_replica_takes_nothing_and_says_so(
    open_tier: Open, own_server: RedisServer
) -> None:
    tier = await open_tier(own_server.url)
    own_server.ask("REPLICAOF", "127.0.0.1", "1")
    [result] = await tier.commit([create("a", new_record({}))])
    assert result.outcome is Outcome.REFUSED
    assert "takes no writes" in str(result.error)
    with pytest.raises(RemoteUnavailable, match="is a replica"):
        await open_tier(own_server.url)


async def test_a_busy_server_is_told_apart(open_tier: Open, own_server: RedisServer) -> None:
    tier = await open_tier(own_server.url, timeout_seconds=2)
    own_server.ask("CONFIG", "SET", "lua-time-limit", "1")
    endless = asyncio.create_task(asyncio.to_thread(own_server.ask, "EVAL", "while true do end", 0))
    error: PersistenceError | None = None
    async with asyncio.timeout(10):
        while error is None or "BUSY" not in str(error):
            [result] = await tier.commit([create("a", new_record({}))])
            error = result.error
            if result.is_stored:
                await tier.commit([end("a")])
    assert isinstance(error, RemoteUnavailable)
    assert result.outcome is Outcome.REFUSED
    with pytest.raises(RemoteUnavailable, match="busy with a script"):
        await tier.load("a")
    await eventually(lambda: own_server.ask("SCRIPT", "KILL") in (True, b"OK", "OK"))
    await asyncio.gather(endless, return_exceptions=True)


async def test_a_loading_server_is_told_apart(open_tier: Open) -> None:
    binary = need_binary()
    options = {"enable-debug-command": "yes"} if binary.version >= (7,) else {}
    server = RedisServer(binary, options).start()
    try:
        tier = await open_tier(server.url)
        with server.client() as client:
            client.mset({f"x{n}": b"x" * 100 for n in range(2000)})
        server.ask("CONFIG", "SET", "loading-process-events-interval-bytes", "1024")
        server.ask("CONFIG", "SET", "key-load-delay", "500")
        reload = asyncio.create_task(asyncio.to_thread(server.ask, "DEBUG", "RELOAD"))
        messages: set[str] = set()
        while not reload.done():
            try:
                await tier.load("a")
            except RemoteUnavailable as error:
                messages.add(str(error))
        await reload
    finally:
        server.close()
    assert any("is loading its data" in message for message in messages), messages


# --- keys of others -------------------------------------------------------------------------------

FOREIGN: list[tuple[str, Callable[[RedisServer, str], object]]] = [
    ("string", lambda server, key: server.ask("SET", key, "x")),
    ("list", lambda server, key: server.ask("RPUSH", key, "x")),
    ("hash", lambda server, key: server.ask("HSET", key, "cart", "x")),
    ("state", lambda server, key: server.ask("HSET", key, b"\xffstate", "nonsense")),
]


@pytest.mark.parametrize(("kind", "write"), FOREIGN, ids=[kind for kind, _ in FOREIGN])
async def test_a_key_of_somebody_else_is_told_and_left_alone(
    open_tier: Open,
    each_server: RedisServer,
    kind: str,
    write: Callable[[RedisServer, str], object],
) -> None:
    tier = await open_tier(each_server.url)
    key = "test:session:{a}"
    write(each_server, key)
    before = each_server.ask("DUMP", key)
    with pytest.raises(RemoteDamaged) as caught:
        await tier.load("a")
    assert (caught.value.key, caught.value.session_id) == (key, "a")
    assert await tier.stored(["a"]) == [None]
    requests: list[Request] = [create("a", new_record({})), create("b", new_record({})), end("a")]
    results = await tier.commit(requests)
    assert results[1] == APPLIED, "others are not affected"
    for result in (results[0], results[2]):
        assert not result.is_stored
        if kind != "state":
            assert isinstance(result.error, RemoteDamaged)
    assert each_server.ask("DUMP", key) == before


@pytest.mark.parametrize("field", [b"\xffhead", b"\xfforder", b"n", b"m"])
@pytest.mark.parametrize("how", ["cut", "changed", "removed"])
async def test_damage_in_a_session_is_never_returned_as_data(
    open_tier: Open, shared_server: RedisServer, field: bytes, how: str
) -> None:
    tier = await open_tier(shared_server.url)
    await tier.commit([create("a", new_record({"n": "one", "m": "two"}))])
    key = "test:session:{a}"
    value = shared_server.ask("HGET", key, field)
    if how == "removed":
        shared_server.ask("HDEL", key, field)
    elif how == "cut":
        shared_server.ask("HSET", key, field, value[:-1])
    else:
        shared_server.ask("HSET", key, field, value[:-1] + bytes([value[-1] ^ 1]))
    with pytest.raises(RemoteDamaged, match="test:session:"):
        await tier.load("a")


# --- the pool -------------------------------------------------------------------------------------


async def test_when_all_connections_are_busy_calls_wait_and_not_for_ever(
    open_tier: Open, proxy: Proxy
) -> None:
    patient = await open_tier(proxy.url, max_connections=2, timeout_seconds=20)
    await patient.commit([create("a", new_record({}))])
    found = await asyncio.gather(*(patient.load("a") for _ in range(50)))
    assert all(isinstance(session, RemoteSession) for session in found)
    assert proxy.connections <= 3
    tier = await open_tier(proxy.url, max_connections=2, timeout_seconds=0.3)
    proxy.hold()
    started = time.monotonic()
    failed = await asyncio.gather(*(tier.load("a") for _ in range(6)), return_exceptions=True)
    assert all(isinstance(error, RemoteUnavailable) for error in failed)
    assert time.monotonic() - started < 3
    proxy.release()
    assert isinstance(await tier.load("a"), RemoteSession)
