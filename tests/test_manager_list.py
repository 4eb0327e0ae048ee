"""Listing, iterating and finding, while others write."""

from __future__ import annotations

import asyncio
import random

import pytest

from persistence import ManualClock, StateManager
from persistence.disk.index import SHARDS
from persistence.errors import CorruptionError, DiskFull
from tests.engine import (
    KIB,
    Crash,
    ScriptedFiles,
    Start,
    directory_of,
    disk_of,
    loop_steps,
)

SMALL = {
    "memory": {"max_bytes": 16 * KIB},
    "disk": {"segment_bytes": 64 * KIB, "compaction_bytes_per_second": 0},
}


async def listed(state: StateManager, prefix: str = "") -> list[str]:
    """Return what an iteration yields, having checked that nothing comes twice."""
    found = [session_id async for session_id in state.iter_sessions(prefix)]
    assert len(found) == len(set(found))
    return sorted(found)


# Listing


async def test_an_empty_directory_lists_nothing(state: StateManager) -> None:
    assert await state.get_active_sessions() == []
    assert await listed(state) == []
    assert await state.find_sessions(user_id="ada") == []


async def test_every_live_session_is_listed_wherever_it_is(
    start: Start, clock: ManualClock, crash: Crash
) -> None:
    state = await start(**SMALL)
    expected = []
    for number in range(300):
        name = f"session {number}"
        await state.create_session(
            session_id=name,
            data={"filler": "x" * 200},
            ttl_seconds=10 if number % 7 == 0 else 1000,
        )
        if number % 5 == 0:
            await state.terminate_session(name)
        elif number % 7:
            expected.append(name)
    clock.advance(20)
    expected.sort()
    assert 0 < (await state.stats()).in_memory < len(expected)
    assert sorted(await state.get_active_sessions()) == expected
    assert await listed(state) == expected
    again = await start(path=crash(state))
    assert await listed(again) == expected


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("", ["user:1", "user:2", "user:20", "ü:1", "*:1"]),
        ("user:", ["user:1", "user:2", "user:20"]),
        ("user:2", ["user:2", "user:20"]),
        ("ü", ["ü:1"]),
        ("*", ["*:1"]),
        ("nobody", []),
    ],
)
async def test_a_prefix_is_plain_text(
    state: StateManager, prefix: str, expected: list[str]
) -> None:
    for name in ("user:1", "user:2", "user:20", "ü:1", "*:1"):
        await state.create_session(session_id=name)
    await state.spill_session("user:2")
    assert await listed(state, prefix) == sorted(expected)


async def test_listing_brings_nothing_into_memory(state: StateManager) -> None:
    for number in range(20):
        await state.create_session(session_id=str(number))
        await state.spill_session(str(number))
    assert len(await listed(state)) == 20
    stats = await state.stats()
    assert (stats.in_memory, stats.restored) == (0, 0)


# While others write


@pytest.mark.parametrize("tells_cached", [True, False], ids=["cached reads", "reads in threads"])
@pytest.mark.parametrize("seed", range(3))
async def test_what_lives_all_the_while_comes_exactly_once(
    start: Start, files: ScriptedFiles, tells_cached: bool, seed: int
) -> None:
    rng = random.Random(seed)
    files.tells_cached = tells_cached
    state = await start(**SMALL)
    staying = [f"stays {number}" for number in range(200)]
    for name in staying:
        await state.create_session(session_id=name, data={"filler": "x" * 300})
    done = False
    turns = asyncio.Semaphore(0)  # so much is done for each id listed, whatever is slow here

    async def disturb(number: int) -> None:
        coming = f"comes and goes {number}"
        while not done:
            await turns.acquire()
            await state.update_session_data(rng.choice(staying), "y", rng.randbytes(300))
            await state.get_or_create_session(coming)
            await state.terminate_session(coming)
            await state.spill_session(rng.choice(staying))

    async def compact() -> None:
        while not done:
            await turns.acquire()
            await state.compact()

    tasks = [asyncio.create_task(disturb(number)) for number in range(8)]
    tasks.append(asyncio.create_task(compact()))
    try:
        for _ in range(3):
            found = []
            async for name in state.iter_sessions():
                found.append(name)
                turns.release()
                if len(found) % 20 == 0:
                    await loop_steps(5)
            assert len(found) == len(set(found))
            assert set(found) >= set(staying)
    finally:
        done = True
        for _ in tasks:
            turns.release()
        await asyncio.gather(*tasks)


def shard_of(state: StateManager, session_id: str) -> int:
    return int.from_bytes(disk_of(state).fingerprint(session_id.encode())[:6], "little") % SHARDS


async def test_a_session_that_moves_during_its_listing_is_not_passed_over(
    start: Start, files: ScriptedFiles
) -> None:
    """A compaction takes the segment away between looking at the index and reading the ids."""
    rng = random.Random(1)
    files.tells_cached = False
    state = await start(**SMALL)
    candidates = [str(number) for number in range(20_000)]
    shards = {name: shard_of(state, name) for name in candidates}
    names = [name for name in candidates if shards[name] == SHARDS // 2][:6]
    fillers = [name for name in candidates if shards[name] > SHARDS // 2][:6]
    for name, filler in zip(names, fillers, strict=True):  # two fillers do not fit in a segment
        await state.create_session(session_id=name)
        await state.create_session(session_id=filler, data={"x": rng.randbytes(40 * KIB)})
    files.reads.hold()
    listing = asyncio.create_task(listed(state))
    await files.reads.reached()  # it has looked at the index, and reads the first id
    files.reads.let_others_pass()
    for filler in fillers:
        await state.terminate_session(filler)
    await state.compact()
    assert (await state.stats()).disk.compactions > 0
    files.open_gates()
    assert await listing == sorted(names)


async def test_an_iteration_may_be_left_early(state: StateManager) -> None:
    for number in range(50):
        await state.create_session(session_id=str(number))
    async for _ in state.iter_sessions():
        break
    assert len(await listed(state)) == 50


async def test_what_is_yielded_may_be_terminated_at_once(state: StateManager) -> None:
    for number in range(100):
        await state.create_session(session_id=str(number))
    count = 0
    async for session_id in state.iter_sessions():
        assert await state.terminate_session(session_id)
        count += 1
    assert count == 100
    assert await listed(state) == []


# Finding by user


async def test_a_users_sessions_are_found_wherever_they_are(
    start: Start, clock: ManualClock, crash: Crash
) -> None:
    state = await start(**SMALL)
    users = ["ada", "bob", "ü", None]
    for number in range(200):
        await state.create_session(
            users[number % 4],
            session_id=str(number),
            data={"filler": "x" * 200},
            ttl_seconds=10 if number % 3 == 0 else 1000,
        )
    clock.advance(20)
    await state.terminate_session("1")
    expected = {
        user: sorted(
            str(number) for number in range(200) if number % 3 and users[number % 4] == user
        )
        for user in users
    }
    expected["bob"].remove("1")
    for manager in (state, await start(path=crash(state))):
        for user in ("ada", "bob", "ü"):
            assert sorted(await manager.find_sessions(user_id=user)) == expected[user]
        assert await manager.find_sessions(user_id="nobody") == []


async def test_updates_do_not_lose_the_user(state: StateManager) -> None:
    await state.create_session("ada", session_id="a")
    await state.update_session_data("a", "x", 1)
    await state.replace_session("a", {})
    await state.update_session_metadata("a", source="app")
    await state.set_ttl("a", 50)
    assert await state.find_sessions(user_id="ada") == ["a"]


async def test_users_with_the_same_tag_are_told_apart(
    state: StateManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.updates.user_tag", lambda _: 7)
    monkeypatch.setattr("persistence.listing.user_tag", lambda _: 7)
    await state.create_session("ada", session_id="a")
    await state.create_session("bob", session_id="b")
    assert await state.find_sessions(user_id="ada") == ["a"]
    assert await state.find_sessions(user_id="bob") == ["b"]
    assert await state.find_sessions(user_id="eve") == []


async def test_finding_puts_no_session_in_the_way_of_those_in_use(start: Start) -> None:
    """What a search looks at is not thereby the most recently used."""
    state = await start(memory={"max_bytes": 16 * KIB})
    for number in range(100):
        await state.create_session("ada", session_id=f"cold {number}", data={"x": "x" * 300})
    for number in range(5):
        await state.create_session("bob", session_id=f"hot {number}", data={"x": "x" * 300})
    hits = (await state.stats()).hits
    assert len(await state.find_sessions(user_id="ada")) == 100
    for number in range(5):
        await state.get_session(f"hot {number}")
    assert (await state.stats()).hits == hits + 5


async def test_a_damaged_session_hides_no_other_of_its_user(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    state = await start()
    for name in ("good", "damaged", "fine"):
        await state.create_session("ada", session_id=name, data={"x": f"the value of {name}"})
        await state.spill_session(name)
    segment = next(directory_of(state).glob("*.seg"))
    segment.write_bytes(segment.read_bytes().replace(b"value of damaged", b"VALUE of damaged"))
    for _ in range(2):
        assert sorted(await state.find_sessions(user_id="ada")) == ["fine", "good"]
    assert "left out while looking for a user's sessions" in caplog.text
    with pytest.raises(CorruptionError):
        await state.get_session("damaged")
    assert (await state.stats()).disk.damages == 1
    assert sum(item.name == "persistence.disk" for item in caplog.records) == 1


# What listings end


async def test_a_clean_up_counts_what_a_listing_has_ended_before_it(
    state: StateManager, clock: ManualClock
) -> None:
    for number in range(5):
        await state.create_session("ada", session_id=str(number), ttl_seconds=10)
    clock.advance(10)
    assert await state.get_active_sessions() == []
    assert (await state.stats()).expired == 5
    assert await state.cleanup_expired() == 5
    assert await state.cleanup_expired() == 0
    assert (await state.stats()).expired == 5


async def test_compacting_removes_what_has_expired(start: Start, clock: ManualClock) -> None:
    state = await start(**SMALL)
    for number in range(400):
        await state.create_session(session_id=str(number), ttl_seconds=10, data={"x": b"x" * 500})
    clock.advance(10)
    before = (await state.stats()).disk.total_bytes
    await state.compact()
    stats = await state.stats()
    assert (stats.sessions, stats.expired) == (0, 400)
    assert stats.disk.total_bytes < before / 2
    assert await state.cleanup_expired() == 400


async def test_a_removal_that_failed_is_not_counted(
    start: Start, clock: ManualClock, files: ScriptedFiles
) -> None:
    state = await start()
    for number in range(3):
        await state.create_session(session_id=str(number), ttl_seconds=10)
    clock.advance(10)
    files.full = True
    with pytest.raises(DiskFull):
        await state.cleanup_expired()
    with pytest.raises(DiskFull):
        await state.cleanup_old_sessions(5)
    assert await state.get_active_sessions() == []
    assert (await state.stats()).expired == 0
    files.full = False
    assert await state.cleanup_old_sessions(5) == 3
    assert (await state.stats()).expired == 3
