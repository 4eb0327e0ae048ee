"""Several workers, one server: what one does, the others see; nothing is lost, nothing doubled."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from persistence import SessionMetadata, StateManager
from persistence.errors import (
    ConflictError,
    DiskFull,
    RemoteUnavailable,
    SessionExists,
    SessionNotFound,
)
from persistence.record import NO_ID
from persistence.remote.contract import CommitResult, Request
from tests.engine import ScriptedFiles, commits_of, eventually, residency_of
from tests.redis_servers import Group, Proxy, RedisServer
from tests.sharing.conftest import Worker
from tests.sharing.support import add_one, sharing_of, until, until_up, value


@pytest.fixture
async def pair(worker: Worker, shared_server: RedisServer) -> tuple[StateManager, StateManager]:
    """Two workers that are connected."""
    a, b = await worker(shared_server.url), await worker(shared_server.url)
    await until_up(a, b)
    return a, b


Pair = tuple[StateManager, StateManager]


async def test_a_session_is_the_same_everywhere(worker: Worker, deployment: Group) -> None:
    a, b = await worker(deployment.url), await worker(deployment.url)
    await until_up(a, b)
    meta = SessionMetadata(client_ip="203.0.113.9", attributes={"tenant": "acme"})
    sid = await a.create_session("ada", meta, ttl_seconds=600, data={"cart": {"items": [1]}})
    there = await b.get_session(sid)
    here = await a.get_session(sid)
    assert here is not None
    assert there is not None
    assert dict(there.data) == {"cart": {"items": [1]}}
    assert (there.user_id, there.metadata, there.version) == ("ada", meta, 1)
    assert there.created_at == here.created_at
    assert there.ttl_seconds == 600
    assert there.expires_at is not None
    assert here.expires_at is not None
    assert abs((there.expires_at - here.expires_at).total_seconds()) < 1
    assert await b.find_sessions(user_id="ada") == [sid]


async def test_an_update_is_seen_by_the_others(pair: Pair) -> None:
    a, b = pair
    sid = await a.create_session(data={"n": 0})
    assert await value(b, sid) == 0
    await a.update_session_data(sid, "n", 1)

    async def seen() -> bool:
        return bool(await value(b, sid) == 1)

    await until(seen)


async def test_a_fresh_read_sees_an_update_at_once(pair: Pair) -> None:
    a, b = pair
    sid = await a.create_session(data={"n": 0})
    assert await value(b, sid) == 0
    for count in range(1, 51):
        await a.update_session_data(sid, "n", count)
        session = await b.get_session(sid, fresh=True)
        assert session is not None
        assert session["n"] == count


async def test_no_increment_of_several_workers_is_lost(worker: Worker, deployment: Group) -> None:
    workers = [await worker(deployment.url) for _ in range(3)]
    await until_up(*workers)
    sid = await workers[0].create_session(data={"n": 0})

    async def count_up(state: StateManager) -> None:
        for _ in range(20):
            await state.update_session(sid, add_one)

    await asyncio.gather(*(count_up(state) for state in workers for _ in range(3)))
    for state in workers:
        session = await state.get_session(sid, fresh=True)
        assert session is not None
        assert (session["n"], session.version) == (180, 181)


async def test_nothing_built_on_a_refused_commit_is_accepted(pair: Pair) -> None:
    """B's version 2 wins; A's version 2 fails, and so does its version 3, built on it."""
    a, b = pair
    sid = await a.create_session(data={"n": 0, "by": "a"})
    assert await value(b, sid) == 0
    await b.update_session_data(sid, "by", "b")
    # A has not run since: it takes its own copy for current and pipelines two commits on it.
    first = asyncio.create_task(_edit_by(a, sid, "first"))
    second = asyncio.create_task(a.update_session(sid, add_one))
    with pytest.raises(ConflictError):
        await first
    await second
    session = await b.get_session(sid, fresh=True)
    assert session is not None
    assert (session["n"], session["by"], session.version) == (1, "b", 3)


async def _edit_by(state: StateManager, session_id: str, name: str) -> None:
    sharing = sharing_of(state)
    sharing.copies.validate(session_id)  # as before the announcement
    async with state.edit(session_id) as draft:
        draft["by"] = name


async def test_an_edit_that_another_worker_overtook_changes_nothing(pair: Pair) -> None:
    a, b = pair
    sid = await a.create_session(data={"n": 0})
    edit = a.edit(sid)
    draft = await edit.__aenter__()
    await b.update_session_data(sid, "n", 7)
    draft["n"] = 1
    with pytest.raises(ConflictError, match="edit again"):
        await edit.__aexit__(None, None, None)
    assert (await b.get_session(sid, fresh=True))["n"] == 7  # type: ignore[index]
    async with a.edit(sid) as draft:
        draft["n"] += 1
    assert (await b.get_session(sid, fresh=True))["n"] == 8  # type: ignore[index]


async def test_a_session_that_ended_elsewhere_is_absent_here(pair: Pair) -> None:
    a, b = pair
    sid = await a.create_session(data={"n": 0})
    assert await value(b, sid) == 0
    assert await a.terminate_session(sid) is True

    async def gone() -> bool:
        return not await b.has_session(sid) and await b.get_active_sessions() == []

    await until(gone)
    assert await b.get_session(sid) is None
    with pytest.raises(SessionNotFound):
        await b.update_session(sid, add_one)
    assert await b.terminate_session(sid) is False


async def test_of_two_creations_of_one_id_one_succeeds(pair: Pair) -> None:
    results = await asyncio.gather(
        *(state.create_session(session_id="one", data={"n": 0}) for state in pair * 3),
        return_exceptions=True,
    )
    assert results.count("one") == 1
    assert all(isinstance(each, SessionExists) for each in results if each != "one")


async def test_getting_or_creating_is_one_session_for_all(pair: Pair) -> None:
    sessions = await asyncio.gather(
        *(state.get_or_create_session("one", data={"n": 0}) for state in pair * 5)
    )
    assert {session.created_at for session in sessions} == {sessions[0].created_at}


async def test_an_id_can_be_used_again_after_its_end(pair: Pair) -> None:
    a, b = pair
    await a.create_session(session_id="one", data={"n": 1})
    assert await value(b, "one") == 1
    await b.terminate_session("one")
    await b.create_session(session_id="one", data={"n": 2})
    assert (await a.get_session("one", fresh=True))["n"] == 2  # type: ignore[index]


async def test_a_worker_elsewhere_takes_over_the_sessions_of_one_that_is_gone(
    worker: Worker, shared_server: RedisServer
) -> None:
    a = await worker(shared_server.url)
    await until_up(a)
    ids = [await a.create_session(data={"n": number}) for number in range(50)]
    await a.close()
    b = await worker(shared_server.url, memory={"max_bytes": 8192})
    await until_up(b)
    for number, sid in enumerate(ids):
        session = await b.update_session(sid, add_one)
        assert session["n"] == number + 1
    for number, sid in enumerate(ids):  # most of them have been spilled
        assert await value(b, sid) == number + 1


async def test_what_happened_while_a_worker_was_away_is_seen_when_it_is_back(
    worker: Worker, shared_server: RedisServer
) -> None:
    a, b = await worker(shared_server.url), await worker(shared_server.url)
    await until_up(a, b)
    changed, ended, kept = [await a.create_session(data={"n": 0}) for _ in range(3)]
    for sid in (changed, ended, kept):
        assert await value(b, sid) == 0
    await b.close()
    await a.update_session_data(changed, "n", 5)
    await a.terminate_session(ended)
    b = await worker(shared_server.url, path=b.config.disk.path)
    await until_up(b)
    assert await value(b, changed) == 5
    assert await b.get_session(ended) is None
    assert await value(b, kept) == 0


async def test_a_worker_is_listening_once_it_is_open(worker: Worker, deployment: Group) -> None:
    assert sharing_of(await worker(deployment.url)).is_up


async def test_a_worker_that_has_just_opened_builds_on_what_the_others_have_done(
    worker: Worker, shared_server: RedisServer
) -> None:
    """Neither its first read nor its first update may take its old copies for current."""
    a, b = await worker(shared_server.url), await worker(shared_server.url)
    sid = await a.create_session(data={"n": 0})
    assert await value(b, sid) == 0
    for count in (1, 3):
        await b.close()
        await a.update_session(sid, add_one)
        b = await worker(shared_server.url, path=b.config.disk.path)
        assert await value(b, sid) == count
        assert (await b.update_session(sid, add_one))["n"] == count + 1
    assert sharing_of(b).conflicts.count == 0


async def test_a_worker_that_hears_nothing_of_the_others_starts_all_the_same_or_refuses(
    worker: Worker, own_server: RedisServer, proxy: Proxy
) -> None:
    """A server that answers everything but subscribers."""
    proxy.drops_reply = lambda data: b"subscribe" in data
    a = await worker(proxy.url, timeout_seconds=1.0)
    assert not sharing_of(a).is_up
    with pytest.raises(RemoteUnavailable, match="announcements"):
        await worker(proxy.url, timeout_seconds=1.0, on_outage="fail")
    proxy.drops_reply = lambda _: False
    await until_up(a)


async def test_an_update_elsewhere_while_ours_is_being_logged_is_seen_here(pair: Pair) -> None:
    a, b = pair
    files = a._tiers._files
    assert isinstance(files, ScriptedFiles)
    sid = await a.create_session(data={"n": 0})
    assert await value(b, sid) == 0
    files.writes.hold()
    ours = asyncio.create_task(a.update_session(sid, add_one))
    await files.writes.reached()  # the shared tier has it
    assert (await b.update_session(sid, add_one))["n"] == 2

    async def announced() -> bool:
        return sharing_of(a).copies.is_stale(sid)

    await until(announced)
    files.open_gates()
    assert (await ours)["n"] == 1
    assert await value(a, sid) == 2


async def test_an_update_elsewhere_while_a_session_is_being_taken_over_is_seen_here(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    sid = await a.create_session(data={"n": 0})
    adopt = residency_of(b).adopt
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def adopt_later(*arguments: Any) -> None:
        begun.set()
        await go_on.wait()  # as it does for a commit queue that is full
        await adopt(*arguments)

    monkeypatch.setattr(residency_of(b), "adopt", adopt_later)
    reading = asyncio.create_task(b.get_session(sid))
    await begun.wait()
    await a.update_session(sid, add_one)

    async def announced() -> bool:
        return sharing_of(b).copies.is_stale(sid)

    await until(announced)
    go_on.set()
    await reading
    assert await value(b, sid) == 1


async def test_a_worker_that_is_back_knows_the_content_of_the_shared_tier_again(
    worker: Worker, deployment: Group, caplog: pytest.LogCaptureFixture
) -> None:
    a = await worker(deployment.url)

    async def noted() -> bool:
        return sharing_of(a).outbox.epoch != NO_ID

    await until(noted)
    epoch = sharing_of(a).outbox.epoch
    await a.close()
    a = await worker(deployment.url, path=a.config.disk.path)
    assert sharing_of(a).outbox.epoch == epoch
    assert "lost its content" not in caplog.text


async def test_a_ttl_set_elsewhere_holds_here(pair: Pair) -> None:
    a, b = pair
    sid = await a.create_session(data={"n": 0}, ttl_seconds=600)
    assert await value(b, sid) == 0
    assert await b.set_ttl(sid, 5000)
    session = await a.get_session(sid, fresh=True)
    assert session is not None
    assert (session.ttl_seconds, session.version) == (5000, 1)


async def test_a_session_that_another_worker_renewed_does_not_expire_here(
    worker: Worker, shared_server: RedisServer
) -> None:
    a, b = await worker(shared_server.url), await worker(shared_server.url)
    await until_up(a, b)
    sid = await a.create_session(data={"n": 0}, ttl_seconds=1.0)
    assert await value(b, sid) == 0
    loop = asyncio.get_running_loop()
    end = loop.time() + 2.0

    async def renewed_for_two_ttls() -> bool:
        assert await value(a, sid) == 0
        return loop.time() > end

    await until(renewed_for_two_ttls)
    assert await value(b, sid) == 0
    assert await b.has_session(sid)


async def test_an_expired_session_does_not_come_back_as_the_older_version_in_the_log(
    worker: Worker, shared_server: RedisServer
) -> None:
    """What was taken over is not in the log yet; what is there would live for longer."""
    a, b = await worker(shared_server.url), await worker(shared_server.url)
    await until_up(a, b)
    sid = await a.create_session(data={"n": 0}, ttl_seconds=600)
    await b.replace_session(sid, {"n": 1}, ttl_seconds=2)

    async def taken_over() -> bool:
        session = await a.get_session(sid, renew=False)
        assert session is not None, "two seconds have not passed"
        return bool(session["n"] == 1)

    await until(taken_over)

    async def expired() -> bool:
        return await b.get_session(sid, renew=False) is None

    await until(expired)
    assert await a.get_session(sid) is None
    with pytest.raises(SessionNotFound):
        await a.update_session(sid, add_one)
    assert await b.get_session(sid, fresh=True) is None


async def test_nothing_is_complained_of_when_a_worker_meets_a_new_server(
    worker: Worker, own_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Its sessions go there at once, though it has not finished opening."""
    a = await worker(own_server.url)
    await until_up(a)
    sid = await a.create_session(data={"n": 0})

    async def delivered() -> bool:
        return sharing_of(a).outbox.epoch != NO_ID

    await until(delivered)
    assert await value(await worker(own_server.url), sid) == 0
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


async def test_a_session_that_is_only_read_by_another_worker_lives_on(
    worker: Worker, deployment: Group
) -> None:
    """What a worker has taken over is not in its log, and yet its accesses count for all."""
    a, b = await worker(deployment.url), await worker(deployment.url)
    await until_up(a, b)
    sid = await a.create_session(data={"n": 0}, ttl_seconds=2.0)
    assert await value(b, sid) == 0
    loop = asyncio.get_running_loop()
    end = loop.time() + 3.0

    async def read_for_longer_than_the_ttl() -> bool:
        assert await value(b, sid) == 0
        await asyncio.sleep(0.05)
        return loop.time() > end

    await until(read_for_longer_than_the_ttl)
    assert residency_of(b).unlogged, "it has only been read"
    fresh = await worker(deployment.url)
    assert await value(fresh, sid) == 0
    assert await value(a, sid) == 0


async def test_the_sessions_of_all_workers_can_be_listed(worker: Worker, deployment: Group) -> None:
    a, b = await worker(deployment.url), await worker(deployment.url)
    await until_up(a, b)
    for number in range(30):
        await (a, b)[number % 2].create_session(session_id=f"{'ab'[number % 2]} {number}")
    await a.terminate_session("a 0")
    assert len(await a.get_active_sessions()) == 14
    assert len(await a.get_active_sessions(namespace=True)) == 29
    found = [sid async for sid in a.iter_sessions("b ", namespace=True)]
    assert sorted(found) == sorted(f"b {number}" for number in range(1, 30, 2))


async def test_however_many_are_pipelined_none_is_accepted_behind_a_refused_one(pair: Pair) -> None:
    a, b = pair
    sid = await a.create_session(data={"n": 0, "by": "a"})
    assert await value(b, sid) == 0
    for _ in range(5):
        await a.get_session(sid, fresh=True)
        await b.update_session(sid, add_one)
        sharing_of(a).copies.validate(sid)  # as before the announcement
        await asyncio.gather(*(a.update_session(sid, add_one) for _ in range(6)))
    session = await b.get_session(sid, fresh=True)
    assert session is not None
    assert (session["n"], session.version) == (35, 36)


async def test_what_one_worker_takes_has_every_update_of_the_others_in_it(pair: Pair) -> None:
    a, b = pair
    updates, taken = 60, 0

    async def count_up() -> None:
        for _ in range(updates):
            while True:
                await a.get_or_create_session("one", data={"n": 0})
                try:
                    await a.update_session("one", add_one)
                    break
                except SessionNotFound:
                    continue

    counting = asyncio.create_task(count_up())
    while not counting.done():
        session = await b._lives.take("one")
        if session is not None:
            taken += session["n"]
        await asyncio.sleep(0)
    await counting
    last = await b._lives.take("one")
    assert taken + (0 if last is None else last["n"]) == updates


async def test_terminating_an_id_that_has_begun_anew_elsewhere_ends_what_it_is_now(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    await a.create_session(session_id="one", data={"n": 1})
    assert await value(b, "one") == 1
    monkeypatch.setattr(sharing_of(a), "announced", lambda _: None)  # they are still on their way
    await b.terminate_session("one")
    await b.create_session(session_id="one", data={"n": 2})
    assert await a.terminate_session("one") is True
    assert await a.get_session("one", fresh=True) is None
    assert await b.get_session("one", fresh=True) is None


@pytest.mark.parametrize("cold", [False, True])
async def test_a_session_that_is_idle_here_and_used_elsewhere_is_not_old(
    pair: Pair, *, cold: bool
) -> None:
    a, b = pair
    used, old = [await a.create_session(data={"n": 0}) for _ in range(2)]
    assert await value(b, used) == 0
    if cold:
        await a.spill_session(used)
    loop = asyncio.get_running_loop()
    begun = loop.time()

    async def used_for_a_while() -> bool:
        await b.update_session(used, add_one)
        return loop.time() > begun + 1.6

    await until(used_for_a_while)
    count = await value(b, used)
    assert await a.cleanup_old_sessions(1.5) == 1
    assert await value(a, used) == count
    assert await value(b, used) == count
    assert await a.get_active_sessions() == [used]
    assert await b.get_session(old, fresh=True) is None


async def test_thousands_of_sessions_that_end_elsewhere_are_gone_here_too(
    worker: Worker, shared_server: RedisServer
) -> None:
    a = await worker(shared_server.url, max_connections=1, timeout_seconds=2)
    b = await worker(shared_server.url)
    await until_up(a, b)
    ids = [f"s{number}" for number in range(1500)]
    await asyncio.gather(*(a.create_session(session_id=sid) for sid in ids))
    await asyncio.gather(*(b.terminate_session(sid) for sid in ids))

    async def all_gone() -> bool:
        return not (await a.stats()).sessions

    await until(all_gone)
    assert await a.get_active_sessions() == []


@pytest.mark.parametrize("steps", range(6))
async def test_an_update_behind_a_creation_that_comes_too_late_is_made_on_the_session_there_is(
    pair: Pair, steps: int
) -> None:
    a, b = pair
    sid = await a.create_session(data={"n": 1})
    creating = asyncio.create_task(b.create_session(session_id=sid, data={"n": 100}))
    for _ in range(steps):
        await asyncio.sleep(0)
    updating = asyncio.create_task(b.update_session(sid, add_one))
    with pytest.raises(SessionExists):
        await creating
    assert (await updating)["n"] == 2
    assert await value(a, sid) == 2


async def test_a_session_whose_new_time_is_over_is_not_brought_back_by_who_did_not_look(
    pair: Pair, shared_server: RedisServer
) -> None:
    """The copy there has a longer time, but it is known that there was something newer."""
    a, b = pair
    sid = await a.create_session(session_id="a", data={"n": 1}, ttl_seconds=3600)
    assert await value(b, sid) == 1
    await a.set_ttl(sid, 0.2)

    async def is_over() -> bool:
        gone = not shared_server.ask("EXISTS", "persistence:session:{a}")
        return gone and sharing_of(b).copies.is_stale(sid)

    await until(is_over)
    assert await value(b, sid) is None
    assert await value(a, sid) is None
    await sharing_of(b).deliver()
    assert not shared_server.ask("EXISTS", "persistence:session:{a}")


async def test_a_clean_up_ends_what_got_less_time_elsewhere_and_nobody_has_read_since(
    pair: Pair, shared_server: RedisServer
) -> None:
    a, b = pair
    sid = await a.create_session(session_id="a", ttl_seconds=0)
    other = await a.create_session(data={"n": 1}, ttl_seconds=0)
    assert await value(b, other) == 1
    closed: list[object] = []
    connection = await b.resources(sid, "connection", object, closed.append)
    path = await b.scratch_dir(sid)
    await a.set_ttl(sid, 0.2)
    await a.update_session(other, add_one)

    async def is_over() -> bool:
        stale = {*sharing_of(b).copies.all_stale()}
        return stale == {sid, other} and not shared_server.ask("EXISTS", "persistence:session:{a}")

    await until(is_over)
    await b.cleanup_expired()
    await eventually(lambda: closed == [connection])
    await eventually(lambda: not path.exists())
    assert await b.get_active_sessions() == [other]
    assert await value(b, other) == 2


async def test_what_was_newer_is_remembered_while_the_subscription_is_broken(
    pair: Pair, shared_server: RedisServer
) -> None:
    """By then its time is over. It may also have been lost, so what is here is kept beside."""
    a, b = pair
    sid = await a.create_session(session_id="a", data={"n": 1}, ttl_seconds=3600)
    assert await value(b, sid) == 1
    await a.set_ttl(sid, 0.5)

    async def is_stale() -> bool:
        return sharing_of(b).copies.is_stale(sid)

    await until(is_stale)
    generation = sharing_of(b).copies.generation
    shared_server.ask("CLIENT", "KILL", "TYPE", "pubsub")

    async def is_over() -> bool:
        copies = sharing_of(b).copies
        listens_again = copies.is_listening and copies.generation > generation
        return listens_again and not shared_server.ask("EXISTS", "persistence:session:{a}")

    await until(is_over)
    assert await value(b, sid) is None
    assert sharing_of(b).conflicts.count == 1
    assert await value(a, sid) is None
    await sharing_of(b).deliver()
    assert not shared_server.ask("EXISTS", "persistence:session:{a}")


async def test_what_fails_while_the_server_is_asked_for_it_is_not_written(
    worker: Worker, shared_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = await worker(shared_server.url)
    await until_up(a)
    sid = await a.create_session(data={"n": 0})
    files = a._tiers._files
    assert isinstance(files, ScriptedFiles)
    files.writes.hold()
    first = asyncio.create_task(a.update_session(sid, add_one))
    await files.writes.reached()
    remote = sharing_of(a)._remote
    commit = remote.commit
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def held(requests: Sequence[Request]) -> list[CommitResult]:
        results = await commit(requests)
        asked.set()
        await go_on.wait()
        return results

    monkeypatch.setattr(remote, "commit", held)
    second = asyncio.create_task(a.update_session(sid, add_one))  # built on the first
    await asked.wait()
    files.full = True
    files.open_gates()
    for each in (first, second):
        with pytest.raises(DiskFull):
            await each
    files.full = False
    committed = commits_of(a).committed
    go_on.set()
    await a.flush()
    assert commits_of(a).committed == committed
    assert commits_of(a).pending_bytes == 0
