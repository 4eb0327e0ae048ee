"""Requests of one session at several workers: the limit is one, and the counts come together."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from persistence import StateManager
from persistence.errors import Overtaken, RequestLimitReached
from tests.engine import eventually
from tests.redis_servers import RedisServer
from tests.sharing.conftest import Worker
from tests.sharing.support import sharing_of, until, until_delivered, until_up


async def workers(worker: Worker, server: RedisServer, count: int) -> list[StateManager]:
    states = [await worker(server.url) for _ in range(count)]
    await until_up(*states)
    return states


async def admitted(state: StateManager, session_id: str) -> bool:
    try:
        async with state.request(session_id, "r"):
            return True
    except RequestLimitReached:
        return False


async def passed(states: list[StateManager], session_id: str, count: int) -> int:
    """Make `count` requests at each worker at the same time; return how many were admitted."""
    calls = [admitted(state, session_id) for _ in range(count) for state in states]
    return sum(await asyncio.gather(*calls))


async def test_exactly_the_limit_passes_at_all_workers_together(
    worker: Worker, shared_server: RedisServer
) -> None:
    states = await workers(worker, shared_server, 3)
    sid = await states[0].create_session(max_requests=100)
    assert await passed(states, sid, 300) == 100
    for state in states:
        assert await state.is_request_limit_reached(sid)
        assert not await admitted(state, sid)


async def test_exactly_the_limit_passes_one_after_the_other_at_several_workers(
    worker: Worker, shared_server: RedisServer
) -> None:
    states = await workers(worker, shared_server, 2)
    sid = await states[0].create_session(max_requests=60)
    before = [(await state.stats()).commits for state in states]
    count = 0
    for number in range(120):
        count += await admitted(states[number % 2], sid)
    assert count == 60
    after = [(await state.stats()).commits for state in states]
    blocks = sum(after) - sum(before)
    assert blocks < 60  # not one round trip for each, though the copies go to and fro


async def test_a_worker_that_closes_gives_back_what_it_has_not_used(
    worker: Worker, shared_server: RedisServer
) -> None:
    a, b = await workers(worker, shared_server, 2)
    sid = await a.create_session(max_requests=80)
    assert await admitted(a, sid)  # and 9 more are reserved
    assert await passed([b], sid, 200) == 70
    await a.close()
    later = 0

    async def nine() -> bool:  # once the announcement is here
        nonlocal later
        later += await passed([b], sid, 20)
        return later >= 9

    await until(nine)
    assert later + await passed([b], sid, 20) == 9


async def test_counts_of_workers_come_together(worker: Worker, shared_server: RedisServer) -> None:
    a, b = await workers(worker, shared_server, 2)
    sid = await a.create_session(data={"n": 0})
    for state, name in ((a, "one"), (b, "two"), (a, "three")):
        await state.record_request(sid, name, 1.0, error="bad" if name == "two" else None)
    await asyncio.gather(a.flush(), b.flush())
    for state in (a, b):
        await state.get_session(sid, fresh=True)
        found = await state.session_metrics(sid)
        assert (found.requests, found.errors, found.total_seconds) == (3, 1, 3.0)
        assert found.last_name == "three"


@pytest.mark.parametrize("limit", [0, 200])
async def test_counts_of_an_outage_come_together_behind_it(
    worker: Worker, shared_server: RedisServer, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr("persistence.requests._STORED_AFTER_SECONDS", 0.0)
    monkeypatch.setattr("persistence.sharing.sharing._PROBE_SECONDS", 3600.0)
    a, b = states = await workers(worker, shared_server, 2)
    sid = await a.create_session(data={"n": 0}, max_requests=limit)
    await b.get_session(sid)
    for state in states:
        sharing_of(state)._down()  # it does not know that Redis is there
        for _ in range(30):
            assert await admitted(state, sid)
        await state._requests.look()
        assert bool(sharing_of(state).outbox.branches) == bool(limit)  # a limit has to be charged
    for state in states:
        sharing_of(state)._up()
        await until_delivered(state)
        await state._requests.look()
    for state in states:
        await state.get_session(sid, fresh=True)
        assert (await state.session_metrics(sid)).requests == 60
    assert sum(sharing_of(state).conflicts.count for state in states) == bool(limit)


async def test_counts_survive_a_take_over(worker: Worker, shared_server: RedisServer) -> None:
    a = await worker(shared_server.url)
    sid = await a.create_session(max_requests=10)
    assert await passed([a], sid, 4) == 4
    await a.close()
    b = await worker(shared_server.url)
    assert (await b.session_metrics(sid)).requests == 4
    assert await passed([b], sid, 50) == 6


async def test_an_edit_is_not_overtaken_by_counts_of_another_worker(
    worker: Worker, shared_server: RedisServer
) -> None:
    a, b = await workers(worker, shared_server, 2)
    sid = await a.create_session(data={"n": 0, "other": [1]}, max_requests=100)
    async with a.edit(sid) as draft:
        assert await passed([b], sid, 20) == 20
        await b.flush()
        draft["n"] = 1
        draft["other"].append(2)
    session = await b.get_session(sid, fresh=True)
    assert session is not None
    assert session.data == {"n": 1, "other": [1, 2]}
    assert session.version == 2
    assert (await b.session_metrics(sid)).requests == 20


async def test_an_edit_is_still_overtaken_by_data_of_another_worker(
    worker: Worker, shared_server: RedisServer
) -> None:
    a, b = await workers(worker, shared_server, 2)
    sid = await a.create_session(data={"n": 0})

    async def edit() -> None:
        async with a.edit(sid) as draft:
            await b.update_session_data(sid, "n", 5)
            assert await admitted(b, sid)
            await b.flush()
            draft["n"] = 1

    with pytest.raises(Overtaken):
        await edit()
    session = await b.get_session(sid, fresh=True)
    assert session is not None
    assert session["n"] == 5


async def test_resources_close_when_another_worker_ends_the_session(
    worker: Worker, shared_server: RedisServer
) -> None:
    a, b = await workers(worker, shared_server, 2)
    sid = await a.create_session()
    closed: list[str] = []
    for state, name in ((a, "of a"), (b, "of b")):
        await state.resources(sid, "x", partial(str, name), closed.append)
    await b.terminate_session(sid)
    await eventually(lambda: sorted(closed) == ["of a", "of b"])
