"""``redis.write = "behind"``: acknowledged here, delivered soon after."""

from __future__ import annotations

import asyncio
import os

import pytest

from persistence import StateManager
from persistence.disk.filenames import segment_name
from tests.engine import directory_of, disk_of
from tests.redis_servers import RedisServer
from tests.sharing.conftest import Worker
from tests.sharing.support import add_one, sharing_of, until, until_delivered, until_up, value


async def test_updates_arrive_coalesced_within_the_interval(
    worker: Worker, own_server: RedisServer
) -> None:
    a = await worker(own_server.url, write="behind", flush_interval_seconds=0.05)
    b = await worker(own_server.url, write="behind", flush_interval_seconds=0.05)
    await until_up(a, b)
    sid = await a.create_session(data={"n": 0})
    for _ in range(200):
        await a.update_session(sid, add_one)
    await until_delivered(a)

    async def arrived() -> bool:
        return bool(await value(b, sid) == 200)

    await until(arrived)
    assert own_server.ask("INFO", "commandstats")["cmdstat_evalsha"]["calls"] < 150


async def test_what_was_not_delivered_at_a_kill_is_delivered_by_the_next_worker(
    worker: Worker, own_server: RedisServer
) -> None:
    a = await worker(
        own_server.url, write="behind", flush_interval_seconds=1000.0, timeout_seconds=1
    )
    await until_up(a)
    kept = await a.create_session(data={"n": 0})
    await a.update_session(kept, add_one)
    own_server.hang()  # its closing delivers nothing
    await a.close()
    own_server.go_on()
    a = await worker(
        own_server.url, path=a.config.disk.path, write="behind", flush_interval_seconds=0.05
    )
    await until_up(a)
    await until_delivered(a)
    b = await worker(own_server.url)
    await until_up(b)
    assert await value(b, kept) == 1


@pytest.mark.parametrize("is_emptied", [False, True], ids=["fresh server", "emptied server"])
async def test_a_close_delivers_everything_however_soon_it_comes(
    worker: Worker, own_server: RedisServer, is_emptied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    a = await worker(own_server.url, write="behind", flush_interval_seconds=1000.0)
    early = await a.create_session(data={"n": 1})
    await a.close()
    if is_emptied:
        own_server.ask("FLUSHALL")
    again = {"path": a.config.disk.path, "write": "behind", "flush_interval_seconds": 1000.0}
    a = await worker(own_server.url, **again)
    late = await a.create_session(data={"n": 2})
    await a.close()
    assert "delivering" not in caplog.text
    b = await worker(own_server.url)
    await until_up(b)
    assert [await value(b, sid) for sid in (early, late)] == [1, 2]


async def test_a_terminated_session_ends_for_the_others(
    worker: Worker, own_server: RedisServer
) -> None:
    a = await worker(own_server.url, write="behind", flush_interval_seconds=0.05)
    b = await worker(own_server.url, write="behind", flush_interval_seconds=0.05)
    await until_up(a, b)
    sid = await a.create_session(data={"n": 0})
    await until_delivered(a)
    assert await value(b, sid) == 0
    await a.terminate_session(sid)
    await until_delivered(a)

    async def gone() -> bool:
        return await b.get_session(sid) is None

    await until(gone)


async def test_of_two_branches_one_wins_and_the_other_is_kept(
    worker: Worker, own_server: RedisServer
) -> None:
    a = await worker(own_server.url, write="behind", flush_interval_seconds=1000.0)
    b = await worker(own_server.url, write="behind", flush_interval_seconds=1000.0)
    await until_up(a, b)
    sid = await a.create_session(data={"n": 0})
    sharing_of(a)._delivery.wake()
    await until_delivered(a)
    assert await value(b, sid) == 0
    await a.update_session_data(sid, "n", 1)
    await b.update_session_data(sid, "n", 2)
    sharing_of(a)._delivery.wake()
    await until_delivered(a)
    sharing_of(b)._delivery.wake()
    await until_delivered(b)
    assert sharing_of(a).conflicts.count == 0
    assert sharing_of(b).conflicts.count == 1
    assert await value(b, sid) == await value(a, sid) == 1


async def test_a_session_updated_without_a_pause_is_delivered_too(
    worker: Worker, own_server: RedisServer
) -> None:
    a = await worker(own_server.url, write="behind", flush_interval_seconds=0.02)
    b = await worker(own_server.url, write="behind", flush_interval_seconds=0.02)
    await until_up(a, b)
    sid = await a.create_session(data={"n": 0})
    stop = asyncio.Event()

    async def count_up() -> None:
        while not stop.is_set():
            await a.update_session(sid, add_one)

    counting = [asyncio.create_task(count_up()) for _ in range(5)]

    async def far() -> bool:
        seen = await value(b, sid)
        return seen is not None and seen > 50

    await until(far)
    stop.set()
    await asyncio.gather(*counting)
    await until_delivered(a)
    assert sharing_of(a).conflicts.count == 0


async def test_an_end_of_what_only_one_worker_had_ends_nobody_elses_session(
    worker: Worker, own_server: RedisServer
) -> None:
    a = await worker(own_server.url, write="behind", flush_interval_seconds=1000.0)
    b = await worker(own_server.url, write="behind", flush_interval_seconds=0.05)
    await until_up(a, b)
    await a.create_session(session_id="one", data={"n": 1})
    await a.terminate_session("one")
    await b.create_session(session_id="one", data={"n": 2})
    await until_delivered(b)
    sharing_of(a)._delivery.wake()
    await until_delivered(a)
    session = await b.get_session("one", fresh=True)
    assert session is not None
    assert session["n"] == 2
    assert await value(a, "one") == 2
    assert sharing_of(a).conflicts.count == 0


async def test_a_damaged_session_does_not_hold_up_the_delivery_of_the_others(
    worker: Worker, own_server: RedisServer
) -> None:
    a = await worker(own_server.url, write="behind", flush_interval_seconds=1000.0)
    b = await worker(own_server.url)
    await until_up(a, b)
    for sid in ("damaged", "intact"):
        await a.create_session(session_id=sid, data={"n": 7})
    await a.spill_session("damaged")
    damage(a, "damaged")
    sharing_of(a)._delivery.wake()

    async def arrived() -> bool:
        return bool(await value(b, "intact") == 7)

    await until(arrived)
    assert await value(b, "damaged") is None
    assert list(sharing_of(a).outbox.branches) == ["damaged"]  # told, and tried again


def damage(state: StateManager, session_id: str) -> None:
    """Flip a bit of what is in the log of a session."""
    disk = disk_of(state)
    row = disk.index.get(disk.fingerprint(session_id.encode()))
    assert row is not None
    with (directory_of(state) / segment_name(row.segment)).open("r+b") as log:
        log.seek(row.offset + row.length - 8)
        byte = log.read(1)[0]
        log.seek(-1, os.SEEK_CUR)
        log.write(bytes([byte ^ 1]))
