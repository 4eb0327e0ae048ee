"""Watching what other workers do: in order, and nothing missed in silence, outages included."""

from __future__ import annotations

import asyncio

import pytest

from persistence import ClientInfo, SessionChange, StateManager, Watch
from persistence.errors import SessionNotFound, TokenInvalid
from tests.engine import eventually
from tests.redis_servers import Group, Proxy, RedisServer
from tests.sharing.conftest import Worker
from tests.sharing.support import add_one, until_delivered, until_down, until_up, value

PATIENCE_SECONDS = 20
CLIENT = ClientInfo("203.0.113.9", "Mozilla/5.0")

Pair = tuple[StateManager, StateManager]


@pytest.fixture
async def pair(worker: Worker, shared_server: RedisServer) -> Pair:
    """Two workers that are connected."""
    a, b = await worker(shared_server.url), await worker(shared_server.url)
    await until_up(a, b)
    return a, b


async def following(watch: Watch, count: int) -> list[SessionChange]:
    """Return the next changes."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        return [await anext(watch) for _ in range(count)]


async def until_version(watch: Watch, version: int) -> list[SessionChange]:
    """Return the changes up to a version."""
    changes: list[SessionChange] = []
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not changes or changes[-1].version < version:
            changes.append(await anext(watch))
    return changes


def is_complete(changes: list[SessionChange], first: int) -> bool:
    """Whether the changes, with what they say they skip, are all versions from `first` on."""
    expected = first
    for change in changes:
        if change.version != expected + change.skipped:
            return False
        expected = change.version + 1
    return True


# --- one session --------------------------------------------------------------------------------


async def test_another_workers_update_is_told_with_its_fields(pair: Pair) -> None:
    a, b = pair
    sid = await a.create_session(data={"n": 0, "m": 0})
    watch = b.watch(sid, after=1)
    assert await value(b, sid) == 0
    waiting = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    await a.update_session_data(sid, "n", 1)
    async with asyncio.timeout(PATIENCE_SECONDS):
        change = await waiting
    assert change == SessionChange(sid, 2, "updated", frozenset({"n"}), local=False)
    assert b._memory.peek(sid) is not None, "it is here before it is told"
    assert await value(b, sid) == 1


async def test_a_session_of_another_worker_is_fetched_to_be_watched(pair: Pair) -> None:
    a, b = pair
    sid = await a.create_session(data={"n": 0})
    watch = b.watch(sid, after=1)
    waiting = asyncio.ensure_future(anext(watch))
    await eventually(lambda: b._residency.has_copy(sid))
    await a.update_session_data(sid, "n", 1)
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert (await waiting).version == 2
    with pytest.raises(SessionNotFound):
        await anext(b.watch("nobody's"))


async def test_versions_of_several_workers_come_in_order_and_complete(
    worker: Worker, deployment: Group
) -> None:
    workers = [await worker(deployment.url) for _ in range(3)]
    await until_up(*workers)
    sid = await workers[0].create_session(data={"n": 0})
    for state in workers:
        assert await value(state, sid) == 0
    watches = [state.watch(sid, after=1) for state in workers]
    firsts = [asyncio.ensure_future(until_version(watch, 61)) for watch in watches]

    async def count_up(state: StateManager) -> None:
        for _ in range(20):
            await state.update_session(sid, add_one)

    await asyncio.gather(*map(count_up, workers))
    for changes in await asyncio.gather(*firsts):
        assert is_complete(changes, 2)
        assert {kind for _, _, kind, *_ in changes} == {"updated"}
        assert all(change.fields in (None, {"n"}) for change in changes)


async def test_an_end_elsewhere_ends_the_stream(pair: Pair) -> None:
    a, b = pair
    sid = await a.create_session(data={"n": 0})
    assert await value(b, sid) == 0
    watch = b.watch(sid)
    await a.terminate_session(sid)
    [change] = await following(watch, 1)
    assert (change.kind, change.version, change.local) == ("terminated", 1, False)
    with pytest.raises(StopAsyncIteration):
        await following(watch, 1)


async def test_a_session_that_was_restored_elsewhere_is_reset(pair: Pair) -> None:
    a, b = pair
    sid = await a.create_session(data={"n": 0})
    info = await a.create_checkpoint()
    await a.update_session_data(sid, "n", 1)
    watch = b.watch(sid, after=2)
    assert await value(b, sid) == 1
    waiting = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    await a.restore_checkpoint(info.id)
    async with asyncio.timeout(PATIENCE_SECONDS):
        change = await waiting
    assert (change.kind, change.version) == ("reset", 1)
    assert await value(b, sid) == 0


async def test_a_handle_hears_nothing_of_what_another_worker_has_put_in_its_place(
    pair: Pair,
) -> None:
    a, b = pair
    sid = await a.create_session(data={"n": 0})
    info = await a.create_checkpoint()
    assert await value(b, sid) == 0
    handle = await b.open_session(sid, b.issue_token(sid, CLIENT), CLIENT)
    watch = handle.watch()
    await a.update_session_data(sid, "n", 1)
    assert [change.version for change in await following(watch, 1)] == [2]
    waiting = asyncio.ensure_future(following(watch, 1))
    await asyncio.sleep(0)
    await a.restore_checkpoint(info.id)
    with pytest.raises(TokenInvalid):
        await waiting
    await a.update_session_data(sid, "n", 2)
    with pytest.raises(TokenInvalid):
        watch.waiting()


async def test_what_was_missed_while_the_connection_was_down_is_told_afterwards(
    worker: Worker, own_server: RedisServer, proxy: Proxy
) -> None:
    here = await worker(proxy.url, timeout_seconds=0.5, heartbeat_seconds=0.1)
    there = await worker(own_server.url)
    await until_up(here, there)
    sid = await there.create_session(data={"n": 0, "m": 0})
    assert await value(here, sid) == 0
    watch, everything = here.watch(sid), here.watch()
    await there.update_session_data(sid, "n", 1)
    assert [change.version for change in await following(watch, 1)] == [2]
    assert [change.version for change in await following(everything, 1)] == [2]
    proxy.refuse()
    proxy.cut()
    await until_down(here)
    for count in range(2, 6):
        await there.update_session_data(sid, "m", count)
    await proxy.start()
    [missed] = await following(watch, 1)
    assert missed == SessionChange(sid, 6, "updated", frozenset({"m"}), skipped=3, local=False)
    [told] = await following(everything, 1)
    assert (told.kind, told.session_id) == ("gap", "")


async def test_a_version_that_lost_a_conflict_is_taken_back(
    worker: Worker, own_server: RedisServer, proxy: Proxy
) -> None:
    here = await worker(proxy.url, timeout_seconds=0.5, heartbeat_seconds=0.1)
    there = await worker(own_server.url)
    await until_up(here, there)
    sid = await there.create_session(data={"n": 0})
    assert await value(here, sid) == 0
    watch = here.watch(sid)
    proxy.refuse()
    proxy.cut()
    await until_down(here)
    for count in (100, 101):
        await here.update_session_data(sid, "n", count)
    assert [change.version for change in await following(watch, 2)] == [2, 3]
    await there.update_session_data(sid, "n", 7)
    await proxy.start()
    [lost] = await following(watch, 1)
    assert (lost.version, lost.kind, lost.fields) == (2, "reset", None)
    assert await value(here, sid) == 7


# --- all sessions -------------------------------------------------------------------------------


async def test_what_others_do_to_all_sessions_is_told_without_fetching_them(pair: Pair) -> None:
    a, b = pair
    watch = b.watch()
    sid = await a.create_session(data={"n": 0})
    await a.update_session_data(sid, "n", 1)
    await a.terminate_session(sid)
    changes = await following(watch, 3)
    assert [(each.session_id, each.version, each.kind) for each in changes] == [
        (sid, 1, "created"),
        (sid, 2, "updated"),
        (sid, 2, "terminated"),
    ]
    assert [each.fields for each in changes] == [None, None, set()]
    assert not any(each.local for each in changes)
    assert not b._residency.has_copy(sid)


async def test_all_versions_of_all_workers_are_told_once_and_in_order(
    worker: Worker, shared_server: RedisServer
) -> None:
    workers = [await worker(shared_server.url) for _ in range(3)]
    await until_up(*workers)
    ids = [await workers[0].create_session(data={"n": 0}) for _ in range(4)]
    for state in workers:
        assert [await value(state, sid) for sid in ids] == [0] * 4
    watch = workers[1].watch()

    async def count_up(state: StateManager) -> None:
        for _ in range(10):
            for sid in ids:
                await state.update_session(sid, add_one)

    await asyncio.gather(*map(count_up, workers))
    told: dict[str, list[SessionChange]] = {sid: [] for sid in ids}
    async with asyncio.timeout(PATIENCE_SECONDS):
        while any(not each or each[-1].version < 31 for each in told.values()):
            change = await anext(watch)
            told[change.session_id].append(change)
    for changes in told.values():
        assert is_complete(changes, 2)
        assert {change.kind for change in changes} == {"updated"}


@pytest.mark.parametrize("write", ["through", "behind"])
async def test_a_server_that_comes_back_without_its_data_is_no_change_of_a_session(
    worker: Worker, own_server: RedisServer, write: str
) -> None:
    """Redis comes back empty: the sessions are brought back, and no version is made of that."""
    here = await worker(own_server.url, write=write, heartbeat_seconds=0.1)
    await until_up(here)
    sid = await here.create_session(data={"n": 0})
    await until_delivered(here)
    watch, everything = here.watch(sid, after=1), here.watch()
    own_server.restart_empty()
    [change] = await following(everything, 1)
    assert change.kind == "gap"
    await until_up(here)
    await until_delivered(here)
    await here.update_session(sid, add_one)
    [change] = await following(watch, 1)
    assert (change.version, change.kind, change.skipped) == (2, "updated", 0)
