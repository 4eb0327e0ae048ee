"""Workers that share sessions through PostgreSQL: what holds for any shared tier holds here too."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from persistence import StateManager
from persistence.checkpoint.postgres_store import PostgresStore
from persistence.errors import ConfigError, ConflictError, RemoteUnavailable
from persistence.providers import PostgresProvider
from tests.engine import config_for
from tests.postgres_servers import PostgresServer, new_namespace
from tests.redis_servers import Proxy
from tests.sharing.conftest import Worker
from tests.sharing.support import (
    add_one,
    sharing_of,
    until,
    until_delivered,
    until_down,
    until_up,
    value,
)


@pytest.fixture
def namespace() -> str:
    return new_namespace()


@pytest.fixture
async def pair(
    worker: Worker, postgres: PostgresServer, namespace: str
) -> tuple[StateManager, StateManager]:
    """Two workers that are connected."""
    a, b = [await worker(postgres.url, namespace=namespace) for _ in range(2)]
    await until_up(a, b)
    return a, b


Pair = tuple[StateManager, StateManager]


async def test_no_increment_of_four_workers_is_lost(
    worker: Worker, postgres: PostgresServer, namespace: str
) -> None:
    workers = [await worker(postgres.url, namespace=namespace) for _ in range(4)]
    await until_up(*workers)
    sid = await workers[0].create_session(data={"n": 0})

    async def count_up(state: StateManager) -> None:
        for _ in range(20):
            await state.update_session(sid, add_one)

    await asyncio.gather(*(count_up(state) for state in workers for _ in range(2)))
    for state in workers:
        session = await state.get_session(sid, fresh=True)
        assert session is not None
        assert (session["n"], session.version) == (160, 161)


async def test_an_update_is_seen_by_the_others_and_at_once_by_a_fresh_read(pair: Pair) -> None:
    a, b = pair
    sid = await a.create_session(data={"n": 0})
    assert await value(b, sid) == 0
    for count in range(1, 21):
        await a.update_session_data(sid, "n", count)
        session = await b.get_session(sid, fresh=True)
        assert session is not None
        assert session["n"] == count
    await a.update_session_data(sid, "n", 99)

    async def seen() -> bool:
        return bool(await value(b, sid) == 99)

    await until(seen)


async def test_an_edit_that_another_worker_overtook_changes_nothing(pair: Pair) -> None:
    a, b = pair
    sid = await a.create_session(data={"n": 0})
    edit = a.edit(sid)
    draft = await edit.__aenter__()
    await b.update_session_data(sid, "n", 7)
    draft["n"] = 1
    with pytest.raises(ConflictError, match="edit again"):
        await edit.__aexit__(None, None, None)
    session = await a.get_session(sid, fresh=True)
    assert session is not None
    assert session["n"] == 7


async def test_a_session_that_ended_elsewhere_is_absent_here(pair: Pair) -> None:
    a, b = pair
    sid = await a.create_session(data={"n": 0})
    assert await value(b, sid) == 0
    assert await a.terminate_session(sid) is True

    async def gone() -> bool:
        return not await b.has_session(sid) and await b.get_active_sessions() == []

    await until(gone)


async def test_a_worker_elsewhere_takes_over_the_sessions_of_one_that_is_gone(
    worker: Worker, postgres: PostgresServer, namespace: str
) -> None:
    a = await worker(postgres.url, namespace=namespace)
    await until_up(a)
    ids = [
        await a.create_session("ada", data={"n": number}, ttl_seconds=600) for number in range(30)
    ]
    await a.close()
    b = await worker(postgres.url, namespace=namespace, memory={"max_bytes": 8192})
    await until_up(b)
    for number, sid in enumerate(ids):
        session = await b.update_session(sid, add_one)
        assert (session["n"], session.user_id, session.ttl_seconds) == (number + 1, "ada", 600)
    assert sorted(await b.get_active_sessions(namespace=True)) == sorted(ids)


async def test_work_goes_on_while_the_server_is_away_and_arrives_when_it_is_back(
    worker: Worker, postgres: PostgresServer, namespace: str
) -> None:
    settings = {"namespace": namespace, "timeout_seconds": 2}
    a, b = [await worker(postgres.url, **settings) for _ in range(2)]
    await until_up(a, b)
    ids = [await a.create_session(data={"n": 0}) for _ in range(10)]
    postgres.stop()
    await until_down(a)
    for sid in ids:
        await a.update_session(sid, add_one)
        assert await value(a, sid) == 1
    during = await a.create_session(data={"n": 5})
    await a.terminate_session(ids[0])
    postgres.start()
    await until_up(a, b)
    await until_delivered(a)
    assert await b.get_session(ids[0], fresh=True) is None
    for sid in ids[1:]:
        session = await b.get_session(sid, fresh=True)
        assert session is not None
        assert session["n"] == 1
    assert await value(b, during) == 5
    assert sharing_of(a).conflicts.count == 0


async def test_a_content_that_is_lost_is_brought_back_from_the_workers(
    worker: Worker, postgres: PostgresServer, postgres_proxy: Proxy, namespace: str
) -> None:
    a = await worker(postgres.url_at(postgres_proxy.port), namespace=namespace)
    await until_up(a)
    ids = [await a.create_session(data={"n": number}) for number in range(10)]
    query = "DELETE FROM persistence_sessions_1 WHERE namespace = $1"
    await postgres.run(query, namespace)
    postgres_proxy.cut()  # it looks at the epoch when it connects
    b = await worker(postgres.url, namespace=namespace)

    async def all_there() -> bool:
        return [await value(b, sid) for sid in ids] == list(range(10))

    await until(all_there)


async def test_of_two_branches_the_first_wins_and_the_other_is_kept_as_a_conflict_record(
    worker: Worker, postgres: PostgresServer, postgres_proxy: Proxy, namespace: str
) -> None:
    a = await worker(postgres.url, namespace=namespace)
    b = await worker(postgres.url_at(postgres_proxy.port), namespace=namespace)
    await until_up(a, b)
    sid = await a.create_session(data={"n": 0})
    assert await value(b, sid) == 0
    postgres_proxy.refuse()
    postgres_proxy.cut()
    await until_down(b)
    await b.update_session_data(sid, "n", 100)
    await a.update_session_data(sid, "n", 7)
    await postgres_proxy.start()
    await until_up(b)
    await until_delivered(b)
    assert await value(b, sid) == 7
    assert sharing_of(b).conflicts.count == 1


async def test_with_behind_the_server_learns_of_it_soon(
    worker: Worker, postgres: PostgresServer, namespace: str
) -> None:
    a = await worker(postgres.url, namespace=namespace, write="behind", flush_interval_seconds=0.02)
    b = await worker(postgres.url, namespace=namespace)
    await until_up(a, b)
    sid = await a.create_session(data={"n": 0})
    for _ in range(5):
        await a.update_session(sid, add_one)

    async def arrived() -> bool:
        session = await b.get_session(sid, fresh=True)
        return session is not None and session["n"] == 5

    await until(arrived)


async def test_without_the_server_a_worker_that_must_not_go_on_alone_does_not_start(
    worker: Worker, postgres: PostgresServer
) -> None:
    wrong = postgres.url.replace(f":{postgres.port}/", ":1/")
    with pytest.raises(RemoteUnavailable, match="cannot be reached"):
        await worker(wrong, on_outage="fail", timeout_seconds=0.5)
    with pytest.raises(ConfigError, match="create it"):
        await worker(postgres.url_of("nowhere"))


async def test_checkpoints_are_in_the_database_and_restore_elsewhere(
    worker: Worker, postgres: PostgresServer, namespace: str
) -> None:
    a = await worker(postgres.url, namespace=namespace, write="checkpoint")
    assert isinstance(a._tiers._store.store, PostgresStore)
    sid = await a.create_session(data={"blob": "x" * 10_000, "n": 0})
    info = await a.create_checkpoint()
    await a.update_session(sid, add_one)
    second = await a.create_checkpoint()
    await a.delete_checkpoint(info.id)
    await a.close()
    b = await worker(postgres.url, namespace=namespace, write="checkpoint")
    assert [each.id for each in await b.list_checkpoints()] == [second.id]
    restored = await b.restore_checkpoint("latest")
    assert restored.sessions == 1
    assert await value(b, sid) == 1


@pytest.mark.parametrize(
    ("store", "url"),
    [
        ("redis", "postgresql://ada@127.0.0.1:1/shop"),
        ("postgresql", "redis://127.0.0.1:1"),
        ("postgresql", None),
    ],
)
async def test_a_store_that_the_url_does_not_lead_to_is_refused(
    tmp_path: Path, store: str, url: str | None
) -> None:
    config = config_for(tmp_path / "state", checkpoint={"store": store})
    with pytest.raises(ConfigError, match=r"checkpoint\.store"):
        await StateManager(url, config).open()


async def test_a_provider_and_a_worker_see_the_same_sessions(
    pair: Pair, postgres: PostgresServer, namespace: str
) -> None:
    a, _ = pair
    sid = await a.create_session("ada", data={"n": 1}, ttl_seconds=600)
    async with PostgresProvider(postgres.url, namespace=namespace) as provider:
        assert await provider.get_session(sid) == {"n": 1}
        await provider.set_session(sid, {"n": 2, "m": 3})

        async def seen() -> bool:
            return bool(await value(a, sid) == 2)

        await until(seen)
        session = await a.update_session(sid, add_one)
        assert (dict(session.data), session.user_id) == ({"n": 3, "m": 3}, "ada")
        assert session.ttl_seconds == 600
        assert await provider.get_session(sid) == {"n": 3, "m": 3}
        await provider.delete_session(sid)

        async def gone() -> bool:
            return await a.get_session(sid) is None

        await until(gone)


async def test_workers_that_encrypt_share_what_nobody_else_can_read(
    postgres: PostgresServer, namespace: str, tmp_path: Path
) -> None:
    key_file = str(tmp_path / "keys")

    def state(name: str) -> StateManager:
        sections: dict[str, dict[str, object]] = {
            "redis": {"namespace": namespace, "timeout_seconds": 10},
            "security": {"encrypt": True, "key_file": key_file},
            "shutdown": {"checkpoint": False},
        }
        return StateManager(postgres.url, config_for(tmp_path / name, **sections))

    async with state("a") as a, state("b") as b:
        sid = await a.create_session("ada", data={"secret": "nobody may read this", "n": 0})
        assert await value(b, sid, "secret") == "nobody may read this"
        await b.update_session(sid, add_one)
        session = await a.get_session(sid, fresh=True)
        assert session is not None
        assert (session["n"], session.user_id) == (1, "ada")
        query = "SELECT record FROM persistence_sessions_1 WHERE namespace = $1 AND kind = 'L'"
        [row] = await postgres.run(query, namespace)
        assert b"nobody" not in row[0]
        assert b"ada" not in row[0]
