"""The shared tier stops, hangs, forgets, goes back in time: what happens to sessions meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from persistence import StateManager
from persistence.checkpoint.restore import StagedRestore
from persistence.disk.reader import FrameReader
from persistence.errors import DiskFull, PersistenceError, RemoteUnavailable
from persistence.remote.contract import CommitResult, Put, Request
from tests.redis_servers import Proxy, RedisServer
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


async def test_work_goes_on_while_the_server_is_away_and_arrives_when_it_is_back(
    worker: Worker, own_server: RedisServer
) -> None:
    a, b = [await worker(own_server.url, timeout_seconds=1) for _ in range(2)]
    await until_up(a, b)
    ids = [await a.create_session(data={"n": 0}) for _ in range(20)]
    own_server.kill()
    for sid in ids:
        await a.update_session(sid, add_one)
        assert await value(a, sid) == 1
    during = await a.create_session(data={"n": 5})
    await a.terminate_session(ids[0])
    own_server.start()  # without data
    await until_up(a, b)
    await until_delivered(a)
    assert await b.get_session(ids[0], fresh=True) is None
    for sid in ids[1:]:
        assert await value(b, sid) == 1
    assert await value(b, during) == 5
    assert sharing_of(a).conflicts.count == 0


async def test_a_worker_that_hangs_on_a_server_goes_on_alone_within_the_timeout(
    worker: Worker, own_server: RedisServer
) -> None:
    a = await worker(own_server.url, timeout_seconds=0.3)
    await until_up(a)
    sid = await a.create_session(data={"n": 0})
    own_server.hang()
    async with asyncio.timeout(5):
        for _ in range(100):  # only the first one waits for the timeout
            await a.update_session(sid, add_one)
    assert await value(a, sid) == 100
    own_server.go_on()
    await until_up(a)
    await until_delivered(a)
    session = await a.get_session(sid, fresh=True)
    assert session is not None
    assert (session["n"], session.version) == (100, 101)
    assert sharing_of(a).conflicts.count == 0


async def test_what_the_server_has_not_seen_survives_a_restart_of_the_worker(
    worker: Worker, own_server: RedisServer
) -> None:
    a = await worker(own_server.url, timeout_seconds=1)
    await until_up(a)
    kept, ended = [await a.create_session(data={"n": 0}) for _ in range(2)]
    own_server.hang()
    await a.update_session(kept, add_one)
    await a.terminate_session(ended)
    made = await a.create_session(data={"n": 7})
    await a.close()
    own_server.go_on()
    a = await worker(own_server.url, path=a.config.disk.path)
    b = await worker(own_server.url)
    await until_up(a, b)
    await until_delivered(a)
    assert await value(b, kept) == 1
    assert await value(b, made) == 7
    assert await value(b, ended) is None
    assert sharing_of(a).conflicts.count == 0


async def test_a_worker_starts_without_the_server_and_finds_it_later(
    worker: Worker, own_server: RedisServer
) -> None:
    own_server.kill()
    a = await worker(own_server.url)
    sid = await a.create_session(data={"n": 1})
    assert await value(a, sid) == 1
    own_server.start()
    b = await worker(own_server.url)
    await until_up(a, b)

    async def arrived() -> bool:
        return bool(await value(b, sid) == 1)

    await until(arrived)


async def test_an_update_right_behind_a_delivered_branch_is_agreed_to_and_begins_no_other(
    worker: Worker, shared_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.sharing.sharing._PROBE_SECONDS", 3600.0)
    a, b = await worker(shared_server.url), await worker(shared_server.url)
    await until_up(a, b)
    sid = await a.create_session(data={"n": 0})
    sharing, outbox = sharing_of(a), sharing_of(a).outbox
    sharing._down()
    await a.update_session_data(sid, "n", 1)
    removing, may_go_on = asyncio.Event(), asyncio.Event()
    append = outbox._append

    async def held(entries: list[bytes], *, sync: bool) -> None:
        removing.set()
        await may_go_on.wait()
        await append(entries, sync=sync)

    monkeypatch.setattr(outbox, "_append", held)
    sharing._up()
    async with asyncio.timeout(5):
        await removing.wait()  # the shared tier has it; that is not noted yet
        assert sid in sharing.agreement.delivering
        await a.update_session_data(sid, "n", 2)
        session = await b.get_session(sid, fresh=True)
    assert session is not None
    assert session["n"] == 2
    assert not outbox.branches
    may_go_on.set()


async def test_of_two_branches_the_first_wins_and_the_other_is_kept_as_a_conflict_record(
    worker: Worker, own_server: RedisServer, proxy: Proxy
) -> None:
    a, b = await worker(own_server.url), await worker(proxy.url)
    await until_up(a, b)
    sid = await a.create_session(data={"n": 0})
    assert await value(b, sid) == 0
    proxy.refuse()
    proxy.cut()
    await until_down(b)
    await b.update_session_data(sid, "n", 100)
    await b.update_session(sid, add_one)
    await a.update_session_data(sid, "n", 7)
    await proxy.start()
    await until_up(b)
    await until_delivered(b)
    assert await value(b, sid) == 7
    assert await value(a, sid) == 7
    assert sharing_of(b).conflicts.count == 1
    again = await worker(own_server.url, path=(await closed(b)).config.disk.path)
    assert sharing_of(again).conflicts.count == 1


async def test_a_branch_that_has_lost_ends_also_while_its_session_is_written_to_all_the_time(
    worker: Worker, own_server: RedisServer, proxy: Proxy
) -> None:
    a, b = await worker(own_server.url), await worker(proxy.url)
    await until_up(a, b)
    sid = await a.create_session(data={"n": 0})
    assert await value(b, sid) == 0
    proxy.refuse()
    proxy.cut()
    await until_down(b)
    await b.update_session_data(sid, "n", 100)
    await a.update_session_data(sid, "n", 7)
    stop = asyncio.Event()

    async def write() -> None:
        while not stop.is_set():
            await b.update_session(sid, add_one)

    writers = [asyncio.create_task(write()) for _ in range(3)]

    async def is_kept() -> bool:
        return sharing_of(b).conflicts.count > 0 and sid not in sharing_of(b).outbox

    await proxy.start()
    await until(is_kept)
    stop.set()
    async with asyncio.timeout(5):
        await asyncio.gather(*writers)
    await until_delivered(b)
    assert await value(b, sid) == await value(a, sid) < 100


async def test_what_the_server_lost_and_another_worker_made_anew_is_kept_as_a_conflict_record(
    worker: Worker, own_server: RedisServer, proxy: Proxy
) -> None:
    """It came back older or empty, and the other worker was there first."""
    a, b = await worker(proxy.url), await worker(own_server.url)
    await until_up(a, b)
    sid = await a.create_session(session_id="a", data={"n": 1})
    proxy.refuse()
    proxy.cut()
    await until_down(a)
    own_server.ask("DEL", "persistence:session:{a}")
    await b.create_session(session_id=sid, data={"n": 2})
    await proxy.start()
    await until_up(a)
    assert await value(a, sid) == 2
    assert sharing_of(a).conflicts.count == 1
    assert await value(a, sid) == 2
    assert sharing_of(a).conflicts.count == 1


async def test_a_session_that_ended_and_was_made_anew_elsewhere_is_no_conflict(
    worker: Worker, own_server: RedisServer, proxy: Proxy
) -> None:
    a, b = await worker(proxy.url), await worker(own_server.url)
    await until_up(a, b)
    sid = await a.create_session(session_id="a", data={"n": 1})
    proxy.refuse()
    proxy.cut()
    await until_down(a)
    await b.terminate_session(sid)
    await b.create_session(session_id=sid, data={"n": 2})
    await proxy.start()
    await until_up(a)
    assert await value(a, sid) == 2
    assert sharing_of(a).conflicts.count == 0


@pytest.mark.parametrize("on_outage", ["local", "fail"])
async def test_a_worker_that_has_become_deaf_asks_and_goes_on_with_the_others(
    worker: Worker, own_server: RedisServer, proxy: Proxy, on_outage: str
) -> None:
    """No message gets through, everything else does: that is no outage, and makes no conflict."""
    a, b = await worker(own_server.url), await worker(proxy.url, on_outage=on_outage)
    await until_up(a, b)
    sid = await a.create_session(data={"n": 0})
    assert await value(b, sid) == 0
    proxy.drops_reply = lambda data: b"message" in data

    async def deaf() -> bool:
        return not sharing_of(b).copies.is_listening

    await until(deaf)
    for count in range(1, 20, 2):
        await a.update_session(sid, add_one)
        assert await value(b, sid) == count
        assert (await b.update_session(sid, add_one))["n"] == count + 1
        assert await value(b, sid) == count + 1
    await a.terminate_session(sid)
    assert await b.get_session(sid) is None
    assert sharing_of(b).is_up
    assert not sharing_of(b).copies.is_listening
    assert sharing_of(b).conflicts.count == 0
    proxy.drops_reply = lambda _: False
    await until_up(b)


async def closed(state: StateManager) -> StateManager:
    await state.close()
    return state


async def test_while_the_server_is_away_a_worker_that_must_not_go_alone_refuses(
    worker: Worker, own_server: RedisServer
) -> None:
    a = await worker(own_server.url, on_outage="fail")
    await until_up(a)
    sid = await a.create_session(data={"n": 0})
    own_server.kill()
    await until_down(a)
    with pytest.raises(RemoteUnavailable):
        await a.update_session(sid, add_one)
    with pytest.raises(RemoteUnavailable):
        await a.get_session(sid)
    with pytest.raises(RemoteUnavailable):
        await a.create_session(data={"n": 0})
    own_server.start()
    await until_up(a)
    assert (await a.update_session(sid, add_one))["n"] == 1


async def test_a_worker_that_must_not_go_alone_does_not_start_alone(
    worker: Worker, own_server: RedisServer
) -> None:
    own_server.kill()
    with pytest.raises(RemoteUnavailable):
        await worker(own_server.url, on_outage="fail")


async def test_a_server_that_forgot_everything_is_filled_again(
    worker: Worker, own_server: RedisServer
) -> None:
    a = await worker(own_server.url)
    await until_up(a)
    ids = [await a.create_session(data={"n": number}) for number in range(300)]
    for sid in ids[:100]:
        await a.spill_session(sid)
    own_server.restart_empty()
    b = await worker(own_server.url)
    for number, sid in enumerate(ids):

        async def arrived(sid: str = sid, number: int = number) -> bool:
            return bool(await value(b, sid) == number)

        await until(arrived)


@pytest.mark.parametrize("is_large", [True, False], ids=["large", "on a disk that cannot tell"])
async def test_a_session_in_the_log_that_takes_a_thread_to_read_is_delivered_once(
    worker: Worker, own_server: RedisServer, monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    if not is_large:
        monkeypatch.setattr(FrameReader, "cached", lambda *_: None)  # as on tmpfs
    a = await worker(own_server.url, timeout_seconds=1, flush_interval_seconds=0.02)
    await until_up(a)
    own_server.kill()
    data = {"n": 1, "bytes": random.Random(1).randbytes(300_000 if is_large else 300)}
    sid = await a.create_session(data=data)
    await a.spill_session(sid)
    own_server.start()
    await until_up(a)
    await until_delivered(a)
    assert sharing_of(a).stats().delivered == 1
    b = await worker(own_server.url)
    session = await b.get_session(sid)
    assert session is not None
    assert session.data == data


async def test_large_sessions_are_brought_to_a_server_a_few_at_a_time(
    worker: Worker, own_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = await worker(own_server.url, timeout_seconds=1)
    await until_up(a)
    large = {"bytes": random.Random(1).randbytes(2**20)}
    ids = [await a.create_session(data=large) for _ in range(12)]  # to be brought back
    own_server.kill()
    ids += [await a.create_session(data=large) for _ in range(12)]  # to be delivered
    remote = sharing_of(a)._remote
    commit = remote.commit
    brought: list[int] = []

    async def counted(requests: Sequence[Request]) -> list[CommitResult]:
        brought.append(sum(len(each.record) for each in requests if isinstance(each, Put)))
        return await commit(requests)

    monkeypatch.setattr(remote, "commit", counted)
    own_server.start()
    await until_up(a)
    await until_delivered(a)
    b = await worker(own_server.url)
    for sid in ids:
        assert await value(b, sid, "bytes") == large["bytes"]
    assert sum(brought) > 24 * 2**20
    assert max(brought) < 6 * 2**20


async def test_a_session_that_the_server_never_takes_holds_up_no_other(
    worker: Worker, own_server: RedisServer
) -> None:
    own_server.ask("CONFIG", "SET", "proto-max-bulk-len", str(2**20))  # the least there is
    a = await worker(own_server.url, timeout_seconds=0.5, flush_interval_seconds=0.02)
    await until_up(a)
    own_server.hang()
    too_large = await a.create_session(data={"bytes": random.Random(1).randbytes(2**23)})
    others = [await a.create_session(data={"n": number}) for number in range(20)]
    own_server.go_on()

    async def only_one_is_left() -> bool:
        return list(sharing_of(a).outbox.branches) == [too_large]

    await until(only_one_is_left)
    b = await worker(own_server.url)
    assert [await value(b, sid) for sid in others] == list(range(20))
    own_server.ask("CONFIG", "SET", "proto-max-bulk-len", str(2**29))
    await until_delivered(a)
    assert await b.get_session(too_large, fresh=True) is not None


async def test_a_large_session_in_the_log_loses_a_conflict_once(
    worker: Worker, own_server: RedisServer, proxy: Proxy
) -> None:
    a = await worker(proxy.url, flush_interval_seconds=0.02)
    b = await worker(own_server.url)
    await until_up(a, b)
    sid = await a.create_session(data={"n": 0, "bytes": random.Random(1).randbytes(300_000)})
    proxy.refuse()
    proxy.cut()
    await until_down(a)
    await a.update_session_data(sid, "n", 10)
    await a.spill_session(sid)
    await b.update_session(sid, add_one)
    await proxy.start()
    await until_up(a)
    await until_delivered(a)
    assert sharing_of(a).conflicts.count == 1
    assert await value(a, sid) == 1


async def test_a_server_that_is_emptied_while_nobody_disconnects_is_filled_again(
    worker: Worker, own_server: RedisServer
) -> None:
    a = await worker(own_server.url, heartbeat_seconds=0.05)
    await until_up(a)
    ids = [await a.create_session(data={"n": number}) for number in range(20)]
    ended = await a.create_session(data={"n": 0})
    await a.terminate_session(ended)
    own_server.ask("FLUSHALL")
    b = await worker(own_server.url)  # a itself asks for nothing more

    async def all_arrived() -> bool:
        return [await value(b, sid) for sid in ids] == list(range(20))

    await until(all_arrived)
    assert await b.get_session(ended, fresh=True) is None


async def test_a_server_that_went_back_in_time_gets_what_it_lost(
    worker: Worker, own_server: RedisServer
) -> None:
    """As after a failover to a replica that was behind."""
    a, b = await worker(own_server.url), await worker(own_server.url)
    await until_up(a, b)
    updated, read, cold = [await a.create_session(data={"n": 0}) for _ in range(3)]
    before = [dump(own_server, sid) for sid in (updated, read, cold)]
    for sid in (updated, read, cold):
        for _ in range(3):
            await a.update_session(sid, add_one)
    await a.spill_session(cold)
    for key, content in before:
        restore(own_server, key, content)
    assert (await a.get_session(cold, fresh=True))["n"] == 3  # type: ignore[index]
    assert (await a.update_session(updated, add_one))["n"] == 4
    assert (await a.get_session(read, fresh=True))["n"] == 3  # type: ignore[index]
    await until_delivered(a)
    assert (await b.get_session(updated, fresh=True))["n"] == 4  # type: ignore[index]
    assert (await b.get_session(read, fresh=True))["n"] == 3  # type: ignore[index]
    assert (await b.get_session(cold, fresh=True))["n"] == 3  # type: ignore[index]


async def test_a_worker_that_restored_a_checkpoint_during_an_outage_comes_back(
    worker: Worker, own_server: RedisServer, tmp_path: Path
) -> None:
    a = await worker(own_server.url, checkpoint={"store": str(tmp_path / "checkpoints")})
    await until_up(a)
    sid = await a.create_session(data={"n": 0})
    await a.create_checkpoint()
    own_server.kill()
    await until_down(a)
    await a.restore_checkpoint("latest")
    own_server.start()
    await until_up(a)
    await until_delivered(a)
    assert await value(a, sid) == 0


def dump(server: RedisServer, session_id: str) -> tuple[bytes, bytes]:
    [key] = [key for key in server.ask("KEYS", "*") if session_id.encode() in key]
    return key, server.ask("DUMP", key)


def restore(server: RedisServer, key: bytes, content: bytes) -> None:
    server.ask("RESTORE", key, 0, content, "REPLACE")


async def test_a_lost_reply_never_applies_an_update_twice(
    worker: Worker, own_server: RedisServer, proxy: Proxy
) -> None:
    a = await worker(proxy.url)
    await until_up(a)
    ids = [await a.create_session(data={"n": 0}) for _ in range(20)]
    dice = random.Random(7)
    rounds = 12
    for _ in range(rounds):  # the worker notices, and goes on alone until it is connected again
        proxy.drops_reply = lambda _: dice.random() < 0.3
        for _ in range(2):
            await asyncio.gather(*(a.update_session(sid, add_one) for sid in ids))
        proxy.drops_reply = lambda _: False
        await until_up(a)
    await until_delivered(a)
    assert proxy.dropped > rounds / 2
    b = await worker(own_server.url)
    await until_up(b)
    for sid in ids:
        session = await b.get_session(sid)
        assert session is not None
        assert (session["n"], session.version) == (2 * rounds, 2 * rounds + 1)
    assert sharing_of(a).conflicts.count == 0


async def test_a_cancelled_update_leaves_no_reply_to_another(
    worker: Worker, own_server: RedisServer
) -> None:
    a = await worker(own_server.url)
    await until_up(a)
    ids = [await a.create_session(data={"n": 0, "me": number}) for number in range(20)]
    dice = random.Random(8)
    for _ in range(100):
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(a.update_session(sid, add_one)) for sid in ids
        ]
        tasks += [asyncio.create_task(a.get_session(sid, fresh=True)) for sid in ids]
        for _ in range(dice.randrange(4)):
            await asyncio.sleep(0)
        for task in dice.sample(tasks, 10):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for number, sid in enumerate(ids):
        session = await a.get_session(sid, fresh=True)
        assert session is not None
        assert session["me"] == number
        assert session.version == session["n"] + 1


async def test_a_foreign_key_fails_only_its_own_session(
    worker: Worker, own_server: RedisServer
) -> None:
    a = await worker(own_server.url)
    await until_up(a)
    sid = await a.create_session(session_id="mine", data={"n": 0})
    other = await a.create_session(session_id="other", data={"n": 0})
    key, _ = dump(own_server, "mine")
    own_server.ask("DEL", key)
    own_server.ask("SET", key, "something else")
    with pytest.raises(PersistenceError, match="mine"):
        await a.update_session(sid, add_one)
    assert own_server.ask("GET", key) == b"something else"
    assert (await a.update_session(other, add_one))["n"] == 1


async def test_a_foreign_key_does_not_keep_a_server_that_forgot_from_being_filled_again(
    worker: Worker, own_server: RedisServer, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = await worker(proxy.url), await worker(own_server.url)
    await until_up(a, b)
    for sid in ("mine", "other"):
        await a.create_session(session_id=sid, data={"n": 5})
    key, _ = dump(own_server, "mine")
    proxy.refuse()
    proxy.cut()
    await until_down(a)
    own_server.restart_empty()
    own_server.ask("SET", key, "something else")
    before = sharing_of(a).outbox.epoch
    caplog.clear()
    await proxy.start()
    await until_up(a, b)

    async def filled() -> bool:
        return sharing_of(a).outbox.epoch != before

    await until(filled)
    assert await value(b, "other") == 5
    assert own_server.ask("GET", key) == b"something else"
    assert sharing_of(a).is_up
    assert "away" not in caplog.text


async def test_a_worker_that_must_not_go_alone_comes_back_after_a_restore_during_an_outage(
    worker: Worker, own_server: RedisServer, tmp_path: Path
) -> None:
    store = {"store": str(tmp_path / "checkpoints")}
    a = await worker(own_server.url, checkpoint=store, on_outage="fail")
    sid = await a.create_session(data={"n": 0})
    await a.create_checkpoint()
    own_server.kill()
    await until_down(a)
    await a.restore_checkpoint("latest")
    own_server.start()
    await until_up(a)
    await until_delivered(a)
    assert await value(a, sid) == 0
    assert (await a.update_session(sid, add_one))["n"] == 1


async def test_a_worker_whose_restore_failed_goes_on_sharing(
    worker: Worker, shared_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = await worker(shared_server.url, checkpoint={"store": str(tmp_path / "checkpoints")})
    b = await worker(shared_server.url)
    await until_up(a, b)
    sid = await a.create_session(data={"n": 0})
    await a.create_checkpoint()
    await a.update_session(sid, add_one)

    async def install(_: StagedRestore) -> None:
        raise DiskFull("no space for the restored state")

    with monkeypatch.context() as patch:
        patch.setattr(StagedRestore, "install", install)
        with pytest.raises(DiskFull):
            await a.restore_checkpoint("latest")
    await until_up(a)
    assert (await b.update_session(sid, add_one))["n"] == 2
    assert (await a.get_session(sid, fresh=True))["n"] == 2  # type: ignore[index]
    assert (await a.update_session(sid, add_one))["n"] == 3
    assert (await b.get_session(sid, fresh=True))["n"] == 3  # type: ignore[index]
    assert len(sharing_of(a).outbox) == 0


@pytest.mark.parametrize("ended", ["before the server died", "during the outage"])
async def test_an_end_that_another_worker_missed_holds_on_a_server_that_forgot_it(
    worker: Worker, own_server: RedisServer, proxy: Proxy, ended: str
) -> None:
    a, b = await worker(own_server.url), await worker(proxy.url)
    await until_up(a, b)
    sid, other = [await a.create_session(data={"n": 0}) for _ in range(2)]
    for each in (sid, other):
        assert await value(b, each) == 0
    proxy.refuse()
    proxy.cut()
    await until_down(b)
    if ended == "during the outage":
        own_server.kill()
        await until_down(a)
        await a.terminate_session(sid)
    else:
        await a.terminate_session(sid)
        own_server.kill()
        await until_down(a)
    own_server.start()
    await proxy.start()
    await until_up(a, b)

    async def filled() -> bool:
        sides = [sharing_of(state) for state in (a, b)]
        return all(each._delivery._refill_epoch is None and not len(each.outbox) for each in sides)

    await until(filled)
    assert await b.get_session(sid, fresh=True) is None
    assert await a.get_session(sid, fresh=True) is None
    assert await value(a, other) == await value(b, other) == 0
