"""What is PostgreSQL's own about its tier: tables, rights, lost answers, announcements, removal."""

from __future__ import annotations

import asyncio
import random
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from asyncpg import PostgresError, QueryCanceledError

from persistence import record as rec
from persistence.clock import SystemClock
from persistence.config import RedisConfig
from persistence.errors import (
    ConfigError,
    RemoteDamaged,
    RemoteUnavailable,
    WriteOutcomeUnknown,
)
from persistence.remote import postgres_link
from persistence.remote.contract import APPLIED, Outcome, RemoteSession, Request
from persistence.remote.exchanges import Lost
from persistence.remote.opening import tier_of
from persistence.remote.postgres import PostgresTier
from persistence.remote.postgres_schema import COMMIT, SESSIONS, schema_sql
from persistence.testing.remote_tier_contract import Heard, created, loaded, outcome
from persistence.testing.sessions import create, data_of, end, new_record, next_record, update
from tests.engine import eventually
from tests.postgres_servers import PostgresServer, new_namespace
from tests.redis_servers import HOST, Proxy, free_port
from tests.remote.test_postgres_rows import ToySealer

Open = Callable[..., Awaitable[PostgresTier]]


@pytest.fixture
def namespace() -> str:
    return new_namespace()


@pytest.fixture
async def open_tier(postgres: PostgresServer, namespace: str) -> AsyncIterator[Open]:
    """Open tiers that are closed at the end of the test. Called with settings."""
    opened: list[PostgresTier] = []

    async def open_tier(url: str = postgres.url, **settings: Any) -> PostgresTier:
        settings = {"namespace": namespace, "timeout_seconds": 5, **settings}
        tier = tier_of(RedisConfig(url=url, **settings), SystemClock())
        assert isinstance(tier, PostgresTier)
        opened.append(tier)
        await tier.open()
        return tier

    yield open_tier
    for tier in opened:
        await tier.close()


@pytest.fixture
async def database(postgres: PostgresServer) -> AsyncIterator[str]:
    """An empty database of the test's own: its name."""
    name = f"test_{secrets.token_hex(4)}"
    await postgres.run(f"CREATE DATABASE {name}")
    yield name
    await postgres.run(f"DROP DATABASE {name} WITH (FORCE)")


async def listening(tier: PostgresTier) -> Heard:
    heard = Heard()
    await tier.subscribe(heard)
    await eventually(lambda: heard.events == ["connected"])
    return heard


# --- tables and rights ----------------------------------------------------------------------------


async def test_workers_that_start_together_install_the_tables_once(
    postgres: PostgresServer, database: str, open_tier: Open
) -> None:
    url = postgres.url_of(database)
    tiers = await asyncio.gather(*(open_tier(url) for _ in range(4)))
    assert len({await tier.epoch() for tier in tiers}) == 1
    await created(tiers[0], "a", {"n": 1})
    assert data_of((await loaded(tiers[3], "a")).record) == {"n": 1}


async def test_tables_that_are_gone_are_installed_again_and_the_epoch_tells(
    postgres: PostgresServer, database: str, open_tier: Open
) -> None:
    tier = await open_tier(postgres.url_of(database))
    epoch = await tier.epoch()
    record = await created(tier, "a", {"n": 1})
    await postgres.run(f"DROP TABLE {SESSIONS}", database=database)
    await postgres.run(f"DROP FUNCTION {COMMIT}", database=database)
    assert await outcome(tier, update("a", record, next_record(record, {}))) is Outcome.MISSING
    assert await outcome(tier, create("a", record)) is Outcome.APPLIED
    assert await tier.epoch() != epoch


async def test_a_table_of_somebody_else_under_our_name_is_refused_and_left_alone(
    postgres: PostgresServer, database: str, open_tier: Open
) -> None:
    await postgres.run(f"CREATE TABLE {SESSIONS} (id integer)", database=database)
    with pytest.raises(ConfigError, match="was not made by this library"):
        await open_tier(postgres.url_of(database))
    assert await postgres.run(f"SELECT * FROM {SESSIONS}", database=database) == []


async def test_a_worker_without_the_right_to_create_works_once_all_is_installed(
    postgres: PostgresServer, database: str, open_tier: Open
) -> None:
    worker = f"worker_{database}"
    url = postgres.url_of(database, worker)
    await postgres.run(f"CREATE ROLE {worker} LOGIN")
    try:
        with pytest.raises(ConfigError, match="may not do that"):
            await open_tier(url)
        script = f"""
            {schema_sql()}
            GRANT SELECT, INSERT, UPDATE, DELETE ON persistence_sessions_1, persistence_chunks_1,
              persistence_checkpoints_1 TO {worker};
        """
        await postgres.run_script(script, database=database)
        tier, other = await open_tier(url), await open_tier(url)
        heard = await listening(other)
        record = await created(tier, "a", {"n": 1})
        assert (await loaded(tier, "a")).record == record
        await eventually(lambda: [item.session_id for item in heard.announcements] == ["a"])
        assert await tier.remove_expired() == 0
        for each in (tier, other):
            await each.close()
    finally:
        await postgres.run(f"DROP OWNED BY {worker}", database=database)
        await postgres.run(f"DROP ROLE {worker}")


@pytest.mark.parametrize(
    ("user", "database", "reason"),
    [("nobody_here", "postgres", "does not let this user in"), ("tester", "none", "create it")],
)
async def test_a_wrong_user_or_database_is_a_fault_of_the_configuration(
    postgres: PostgresServer, open_tier: Open, user: str, database: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        await open_tier(postgres.url_of(database, user))


async def test_a_server_that_is_not_there_is_unavailable(open_tier: Open) -> None:
    with pytest.raises(RemoteUnavailable, match="cannot be reached") as caught:
        await open_tier(f"postgresql://ada:secret@{HOST}:{free_port()}/shop")
    assert "secret" not in str(caught.value)


async def test_a_server_that_takes_no_writes_is_unavailable_and_says_so(
    postgres: PostgresServer, database: str, open_tier: Open
) -> None:
    tier = await open_tier(postgres.url_of(database))
    record = await created(tier, "a", {})
    await postgres.run(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    tier._link.drop_idle()
    [result] = await tier.commit([update("a", record, next_record(record, {}))])
    assert result.outcome is Outcome.REFUSED
    assert isinstance(result.error, RemoteUnavailable)
    assert "takes no writes" in str(result.error)
    assert (await loaded(tier, "a")).record == record


async def test_batches_over_the_same_sessions_in_opposite_orders_never_deadlock(
    open_tier: Open,
) -> None:
    tiers = [await open_tier(), await open_tier()]
    names = [f"s{n}" for n in range(60)]
    records = {name: new_record({"n": 0}) for name in names}
    await tiers[0].commit([create(name, record) for name, record in records.items()])
    for _ in range(6):
        batches = [
            [update(name, records[name], next_record(records[name], {})) for name in order]
            for order in (names, names[::-1])
        ]
        found = await asyncio.gather(*map(PostgresTier.commit, tiers, batches))
        for batch, results in zip(batches, found, strict=True):
            for put, result in zip(batch, results, strict=True):
                if result.is_stored:
                    records[put.session_id] = put.record
    # PostgreSQL would have ended one of the two after a second, which is then sent again.
    assert [tier.repeated for tier in tiers] == [0, 0]


# --- lost answers ---------------------------------------------------------------------------------


async def test_of_replies_that_are_lost_at_random_none_is_applied_twice(
    postgres: PostgresServer, postgres_proxy: Proxy, open_tier: Open
) -> None:
    tier = await open_tier(postgres.url_at(postgres_proxy.port))
    records = {f"s{n}": await created(tier, f"s{n}", {"n": 0}) for n in range(4)}
    dice = random.Random(7)
    postgres_proxy.drops_reply = lambda _: dice.random() < 0.12
    for n in range(25):
        batch = [
            (name, update(name, old, next_record(old, {"n": n}))) for name, old in records.items()
        ]
        todo = dict(batch)
        while todo:  # as whoever could not even be reached, or is not sure, does it
            results = await tier.commit(list(todo.values()))
            for name, result in zip(list(todo), results, strict=True):
                if result.is_stored:
                    records[name] = todo.pop(name).record
                else:
                    assert result.outcome in (Outcome.REFUSED, Outcome.UNKNOWN)
    postgres_proxy.drops_reply = lambda _: False
    assert postgres_proxy.dropped > 3
    assert tier.repeated > 0
    for name, record in records.items():
        found = (await loaded(tier, name)).record
        assert (found, rec.version_of(found)) == (record, 26)


async def test_a_commit_without_an_answer_is_unknown_and_decided_by_sending_it_again(
    postgres: PostgresServer, postgres_proxy: Proxy, open_tier: Open
) -> None:
    tier = await open_tier(postgres.url_at(postgres_proxy.port), timeout_seconds=0.2)
    record = new_record({"n": 1})
    request = create("a", record)
    behind = [create(f"b{n}", new_record({})) for n in range(300)]
    postgres_proxy.hold()
    first, *others = await tier.commit([request, *behind])
    assert first.outcome is Outcome.UNKNOWN
    assert isinstance(first.error, WriteOutcomeUnknown)
    # What was in the same transaction is as unknown; what would have come after it was not sent.
    found = {result.outcome for result in others}
    assert found == {Outcome.UNKNOWN, Outcome.REFUSED}
    postgres_proxy.release()
    again = await tier.commit([request])
    assert again[0].is_stored
    assert (await loaded(tier, "a")).record == record


async def test_a_server_that_restarts_is_found_again(
    postgres: PostgresServer, open_tier: Open
) -> None:
    tier = await open_tier(timeout_seconds=0.5)
    record = await created(tier, "a", {"n": 0})
    postgres.stop()
    new = next_record(record, {"n": 1})
    [result] = await tier.commit([update("a", record, new)])
    assert not result.is_stored
    with pytest.raises(RemoteUnavailable):
        await tier.load("a")
    postgres.start()  # with its data
    [again] = await tier.commit([update("a", record, new)])
    assert again.is_stored
    assert (await loaded(tier, "a")).record == new


async def test_connections_that_are_all_in_use_are_waited_for_and_then_given_up(
    open_tier: Open,
) -> None:
    tier = await open_tier(max_connections=2, timeout_seconds=0.2)
    found = await asyncio.gather(*(tier.load("a") for _ in range(30)))
    assert found == [None] * 30
    async with tier._link.lease(), tier._link.lease():
        with pytest.raises(RemoteUnavailable, match="all 2 connections are busy"):
            await tier.load("a")
    assert await tier.load("a") is None


async def test_a_large_session_has_more_time_than_a_small_one(
    postgres: PostgresServer, open_tier: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = await open_tier(timeout_seconds=0.3, max_connections=1)
    monkeypatch.setattr(postgres_link, "SMALL_BYTES", 1000)
    monkeypatch.setattr(postgres_link, "_SLOWEST_BYTES_PER_SECOND", 1000)

    async def outcome_of(statement: str, payload_bytes: int) -> str:
        try:
            answer = await tier._link.rows(statement, payload_bytes=payload_bytes)
        except Lost:  # the server wanted to give up as well, and was slower
            return "given up"
        if isinstance(answer, QueryCanceledError):
            return "given up"
        return "refused" if isinstance(answer, PostgresError) else "done"

    slow, wrong = "SELECT pg_sleep(0.5)", "SELECT 1 / 0"
    calls = [(slow, 0), (slow, 5000), (slow, 1000), (slow, 5000), (wrong, 5000), (slow, 0)]
    found = [await outcome_of(*call) for call in calls]
    assert found == ["given up", "done", "given up", "done", "refused", "given up"]


async def test_without_the_client_of_postgresql_a_url_is_refused_by_the_name_of_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(ConfigError, match=r"persistence-engine\[postgres\]"):
        tier_of(RedisConfig(url="postgresql://host/shop"), SystemClock())


# --- what is stored -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("record = set_byte(record, 70, 0)", "its checksum is wrong"),
        ("record = NULL", "it has no record"),
        ("commits = ARRAY[incarnation]", "its record is of another commit"),
        ("commits = '{}'", "its record is of another commit"),
    ],
)
async def test_a_damaged_row_is_reported_with_its_session_and_others_are_served(
    postgres: PostgresServer, open_tier: Open, namespace: str, change: str, reason: str
) -> None:
    tier = await open_tier()
    await created(tier, "a", {"n": 1})
    await created(tier, "b", {"n": 1})
    await postgres.run(
        f"UPDATE {SESSIONS} SET {change} WHERE namespace = $1 AND id = $2", namespace, b"a"
    )
    with pytest.raises(RemoteDamaged, match=reason) as caught:
        await tier.load("a")
    assert caught.value.session_id == "a"
    damaged, sound = await tier.load_many(["a", "b"])
    assert isinstance(damaged, RemoteDamaged)
    assert isinstance(sound, RemoteSession)
    assert [each is not None for each in await tier.stored(["a", "b"])] == [True, True]


async def test_namespaces_neither_see_nor_hear_each_other(open_tier: Open, namespace: str) -> None:
    names = [namespace, f"{namespace}:x", f"{namespace}%", f"{namespace}ü" + "x" * 100]
    tiers = [await open_tier(namespace=name) for name in names]
    heard = [await listening(await open_tier(namespace=name)) for name in names]
    records = [
        await created(tier, "a", {"in": name}) for tier, name in zip(tiers, names, strict=True)
    ]
    assert len({await tier.epoch() for tier in tiers}) == len(names)
    for tier, record in zip(tiers, records, strict=True):
        assert (await loaded(tier, "a")).record == record
        assert [page async for page in tier.scan()] == [["a"]]
    await tiers[0].commit([end("a")])
    assert (await loaded(tiers[1], "a")).record == records[1]
    await eventually(lambda: [len(each.announcements) for each in heard] == [2, 1, 1, 1])


async def test_a_content_that_is_lost_is_told_by_another_epoch(
    postgres: PostgresServer, open_tier: Open, namespace: str
) -> None:
    tier = await open_tier(heartbeat_seconds=0.05)
    heard = await listening(tier)
    epoch = await tier.epoch()
    await created(tier, "a", {})
    await postgres.run(f"DELETE FROM {SESSIONS} WHERE namespace = $1", namespace)
    assert await tier.epoch() != epoch
    assert await tier.load("a") is None
    await eventually(lambda: heard.events == ["connected", "connected"])
    assert heard.epochs == [epoch, await tier.epoch()]


async def count(postgres: PostgresServer, namespace: str) -> int:
    """Return how many rows a namespace has, beside its epoch."""
    query = f"SELECT count(*) FROM {SESSIONS} WHERE namespace = $1 AND kind <> 'E'"
    [row] = await postgres.run(query, namespace)
    return int(row[0])


async def test_rows_whose_time_is_over_are_removed_and_no_others(
    postgres: PostgresServer, open_tier: Open, namespace: str
) -> None:
    tier = await open_tier(tombstone_seconds=0.01)
    over = [create(f"over {n}", new_record({}), ttl_seconds=-1) for n in range(1200)]
    living = [
        create(f"living {n}", new_record({}), ttl_seconds=ttl) for n, ttl in ((0, 0), (1, 99))
    ]
    ended: list[Request] = [create("ended", new_record({})), end("ended")]
    assert await tier.commit([*over, *living, *ended]) == [APPLIED] * 1204
    while await tier.load("ended") is not None:  # noqa: ASYNC110 - the server's clock
        await asyncio.sleep(0.005)
    assert await count(postgres, namespace) == 1203
    assert [await tier.remove_expired() for _ in range(3)] == [1000, 201, 0]
    assert await count(postgres, namespace) == 2
    assert {name async for page in tier.scan() for name in page} == {"living 0", "living 1"}


async def test_who_listens_removes_what_has_expired(
    postgres: PostgresServer, open_tier: Open, namespace: str
) -> None:
    tier = await open_tier(heartbeat_seconds=0.02)
    await tier.commit([create(f"s{n}", new_record({}), ttl_seconds=-1) for n in range(5)])
    await listening(tier)
    async with asyncio.timeout(10):
        while await count(postgres, namespace):  # noqa: ASYNC110 - the server's rows
            await asyncio.sleep(0.01)


# --- announcements --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [Proxy.cut, Proxy.hold], ids=["cut", "silent"])
async def test_a_subscription_that_breaks_or_falls_silent_is_told_and_comes_back(
    postgres: PostgresServer,
    postgres_proxy: Proxy,
    open_tier: Open,
    how: Callable[[Proxy], None],
) -> None:
    url = postgres.url_at(postgres_proxy.port)
    tier = await open_tier(url, heartbeat_seconds=0.05, timeout_seconds=0.5)
    heard = await listening(tier)
    assert tier.is_listening
    how(postgres_proxy)
    await eventually(lambda: heard.events[:2] == ["connected", "disconnected"])
    postgres_proxy.release()
    await eventually(lambda: len(heard.events) >= 3 and heard.events[-1] == "connected")
    assert len(set(heard.epochs)) == 1, "nothing was lost"
    other = await open_tier()
    await created(other, "a", {})
    await eventually(lambda: [item.session_id for item in heard.announcements] == ["a"])


async def test_messages_that_are_none_of_ours_are_ignored(
    postgres: PostgresServer, open_tier: Open, caplog: pytest.LogCaptureFixture
) -> None:
    tier = await open_tier()
    heard = await listening(tier)
    worker = "00" * 16
    nonsense = ("x", f"{worker}\n", f"{worker}\nL 1 zz 61", f"{worker}\nQ 1 {worker} 61", "\n\n")
    for message in nonsense:
        await postgres.run("SELECT pg_notify($1, $2)", tier._channels.commits, message)
    other = await open_tier()
    await created(other, "a", {})
    await eventually(lambda: bool(heard.announcements))
    assert [item.session_id for item in heard.announcements] == ["a"]
    assert heard.events == ["connected"]
    assert caplog.text.count("is none of ours") == len(nonsense) - 1


async def test_closing_gives_all_connections_back(
    postgres: PostgresServer, postgres_proxy: Proxy, open_tier: Open
) -> None:
    tier = await open_tier(postgres.url_at(postgres_proxy.port))
    await listening(tier)
    await asyncio.gather(*(tier.load("a") for _ in range(5)))
    assert postgres_proxy.connections >= 2
    await tier.close()
    await eventually(lambda: not postgres_proxy._open)


# --- sealed ---------------------------------------------------------------------------------------


async def test_what_is_sealed_is_not_in_the_table_and_new_keys_are_looked_for(
    postgres: PostgresServer, namespace: str
) -> None:
    learned: list[str] = []
    old, new = ToySealer(b"old"), ToySealer(b"old", b"new")

    async def learn() -> None:
        learned.append("once")
        old.learn(b"new")

    config = RedisConfig(url=postgres.url, namespace=namespace)
    writer = PostgresTier(config, SystemClock(), new)
    reader = PostgresTier(config, SystemClock(), old, learn)
    try:
        await writer.open()
        record = await created(writer, "a", {"secret": "x" * 100})
        [row] = await postgres.run(
            f"SELECT record FROM {SESSIONS} WHERE namespace = $1 AND kind = 'L'", namespace
        )
        assert b"xxx" not in row[0]
        for _ in range(2):
            assert (await loaded(reader, "a")).record == record
        assert learned == ["once"]
        nobody = PostgresTier(config, SystemClock())
        with pytest.raises(RemoteDamaged):
            await nobody.load("a")
        await nobody.close()
    finally:
        await writer.close()
        await reader.close()
