from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from functools import partial

import pytest

from persistence import ManualClock, StateManager
from persistence.census import MAX_SAMPLE
from persistence.slices import Slices
from persistence.stats import Distribution, PopulationStats
from tests.engine import Start


async def population(state: StateManager) -> PopulationStats:
    return (await state.stats()).population


async def test_without_sessions_there_is_nothing_to_say(state: StateManager) -> None:
    found = await population(state)
    assert (found.sampled, found.is_complete) == (0, True)
    assert (found.oldest_created_at, found.newest_created_at) == (None, None)
    assert found.age_seconds == Distribution()


async def test_of_few_sessions_everything_is_exact(state: StateManager, clock: ManualClock) -> None:
    started = clock.wall()
    sids = []
    for _ in range(4):
        sids.append(await state.create_session(data={"a": 1}))
        clock.advance(10)
    await state.get_session(sids[0])
    await state.spill_session(sids[1])
    found = await population(state)
    assert (found.sampled, found.is_complete) == (4, True)
    assert found.oldest_created_at == datetime.fromtimestamp(started, UTC)
    assert found.newest_created_at == datetime.fromtimestamp(started + 30, UTC)
    ages = found.age_seconds
    assert (ages.smallest, ages.average, ages.largest) == pytest.approx((10, 25, 40))
    assert (found.idle_seconds.smallest, found.idle_seconds.largest) == pytest.approx((0, 30))
    assert found.bytes.smallest == found.bytes.largest > 64


async def test_sessions_that_ended_do_not_count(state: StateManager, clock: ManualClock) -> None:
    first = await state.create_session()
    clock.advance(5)
    second = await state.create_session()
    clock.advance(5)
    third = await state.create_session(ttl_seconds=1)
    await state.terminate_session(first)
    clock.advance(5)
    found = await population(state)
    assert found.sampled == 1
    session = await state.get_session(second)
    assert session is not None
    assert found.oldest_created_at == found.newest_created_at == session.created_at
    assert not await state.has_session(third)


async def test_looks_at_the_same_time_see_all_sessions_each(
    state: StateManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(50):
        await state.create_session()
    monkeypatch.setattr("persistence.census.Slices", partial(Slices, seconds=0))  # all take turns
    found = await asyncio.gather(*(population(state) for _ in range(5)))
    assert {(each.sampled, each.is_complete) for each in found} == {(50, True)}


async def test_of_many_sessions_it_is_a_sample_that_meets_all_in_the_end(
    state: StateManager, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.census.MAX_SAMPLE", 20)
    started = clock.wall()
    oldest = await state.create_session()
    for _ in range(100):
        clock.advance(1)
        await state.create_session()
    seen = 0
    while seen < 101:
        found = await population(state)
        assert 0 < found.sampled <= 20 + 16  # and the rest of a bucket
        assert not found.is_complete
        seen += found.sampled
    found = await population(state)
    assert found.oldest_created_at == datetime.fromtimestamp(started, UTC)
    assert found.newest_created_at == datetime.fromtimestamp(started + 100, UTC)
    await state.terminate_session(oldest)
    for _ in range(8):
        found = await population(state)
    assert found.oldest_created_at == datetime.fromtimestamp(started + 1, UTC)


@pytest.mark.parametrize("spills", [False, True])
async def test_the_oldest_session_is_forgotten_when_its_id_is_taken_anew(
    state: StateManager, clock: ManualClock, spills: bool
) -> None:
    await state.create_session(session_id="taken")
    clock.advance(10)
    for _ in range(2 * MAX_SAMPLE):
        await state.create_session()
    first = clock.wall()
    for _ in range(4):
        met = (await population(state)).oldest_created_at
    assert met == datetime.fromtimestamp(first - 10, UTC)
    await state.terminate_session("taken")
    clock.advance(10)
    await state.create_session(session_id="taken")
    if spills:
        await state.spill_session("taken")
    found = await population(state)
    assert not found.is_complete
    assert found.oldest_created_at == datetime.fromtimestamp(first, UTC)


async def test_looking_renews_and_restores_nothing(state: StateManager, clock: ManualClock) -> None:
    sid = await state.create_session(ttl_seconds=100)
    await state.spill_session(sid)
    clock.advance(60)
    before = (await state.stats()).in_memory
    assert (await population(state)).sampled == 1
    assert (await state.stats()).in_memory == before == 0
    clock.advance(50)
    assert not await state.has_session(sid)


async def test_numbers_are_plain_for_json(state: StateManager) -> None:
    await state.create_session()
    found = (await state.stats()).as_dict()["population"]
    assert datetime.fromisoformat(found["oldest_created_at"]).tzinfo is not None


async def test_the_hit_rate_is_the_share_of_reads_from_memory(start: Start) -> None:
    state = await start()
    sid = await state.create_session()
    assert (await state.stats()).hit_rate == 0.0
    for _ in range(3):
        await state.get_session(sid)
    await state.spill_session(sid)
    await state.get_session(sid)
    assert (await state.stats()).hit_rate == 0.75
