from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistence import ManualClock, Session, StateManager, SystemClock
from persistence.errors import SessionExists, SessionNotFound
from persistence.expiry import (
    WINDOWS_PER_TTL,
    deadline_after,
    life_of,
    must_record,
    sweep_seconds,
)
from persistence.record import NEVER
from tests.disk.memoryfiles import MemoryFiles
from tests.engine import (
    DAY,
    KIB,
    Crash,
    ScriptedFiles,
    Start,
    data_of,
    disk_of,
    eventually,
    loop_steps,
    outcomes,
    residency_of,
)
from tests.support import config, opened

TTL = 160.0
"""Its windows are 10 seconds, the grant of an eighth 20."""

DURATIONS = st.floats(0.001, 1e9)


async def in_edit(state: StateManager, session_id: str) -> None:
    async with state.edit(session_id) as draft:
        draft["edited"] = True


Act = Callable[[StateManager], Awaitable[Any]]

ACCESSES: dict[str, Act] = {
    "get": lambda state: state.get_session("a"),
    "get or create": lambda state: state.get_or_create_session("a"),
    "update of a field": lambda state: state.update_session_data("a", "x", 1),
    "update": lambda state: state.update_session("a", lambda data: data.update(x=2)),
    "update without a change": lambda state: state.update_session("a", list),
    "edit": lambda state: in_edit(state, "a"),
    "replacement": lambda state: state.replace_session("a", {}),
    "update of the metadata": lambda state: state.update_session_metadata("a", source="app"),
}
LOOKS: dict[str, Act] = {
    "has": lambda state: state.has_session("a"),
    "list": lambda state: state.get_active_sessions(),
    "find": lambda state: state.find_sessions(user_id="ada"),
    "spill": lambda state: state.spill_session("a"),
    "restore": lambda state: state.restore_session("a"),
    "flush": lambda state: state.flush(),
    "clean up": lambda state: state.cleanup_expired(),
}

every_access = pytest.mark.parametrize("access", ACCESSES.values(), ids=ACCESSES.keys())
every_look = pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
hot_and_cold = pytest.mark.parametrize("cold", [False, True], ids=["hot", "cold"])
both_jumps = pytest.mark.parametrize("jump", [10 * DAY, -10 * DAY], ids=["ahead", "back"])


async def create(state: StateManager, session_id: str = "a", **options: Any) -> None:
    await state.create_session("ada", session_id=session_id, **{"ttl_seconds": TTL, **options})


async def deadline_of(state: StateManager, session_id: str = "a") -> float | None:
    """Return what `expires_at` says; this is an access."""
    session = await state.get_session(session_id)
    assert session is not None
    return None if session.expires_at is None else session.expires_at.timestamp()


# Arithmetic


@given(DURATIONS, DURATIONS)
def test_a_renewing_session_lives_its_ttl_from_the_last_access(now: float, ttl: float) -> None:
    assert life_of(ttl, True, now + ttl) == ttl
    assert deadline_after(now, ttl) == now + ttl


@given(DURATIONS, DURATIONS)
def test_a_fixed_session_lives_until_its_deadline(ttl: float, deadline: float) -> None:
    assert life_of(ttl, False, deadline) == -deadline


@pytest.mark.parametrize("renews", [True, False])
def test_without_a_ttl_a_session_lives_for_ever(renews: bool) -> None:
    assert life_of(0.0, renews, NEVER) == NEVER
    assert deadline_after(1000.0, 0.0) == NEVER


@given(st.floats(0.1, 1e6), st.lists(st.floats(0, 2), min_size=1, max_size=50))
def test_less_than_an_eighth_of_the_ttl_is_ever_unrecorded(ttl: float, steps: list[float]) -> None:
    recorded = now = 1_700_000_000.0
    for step in steps:
        now += step * ttl / WINDOWS_PER_TTL
        if must_record(recorded, now, ttl):
            recorded = now
        assert now - recorded < ttl / 8


def test_the_shortest_life_there_is_has_windows_too() -> None:
    assert not must_record(1600.0, 1601.0, 5e-324)


def test_accesses_within_one_window_are_not_recorded_again() -> None:
    assert not must_record(1600.0, 1609.9, TTL)
    assert must_record(1609.9, 1610.0, TTL)


@pytest.mark.parametrize("life", [NEVER, -5000.0])
def test_where_an_access_moves_no_deadline_it_is_recorded_once_an_hour(life: float) -> None:
    assert not must_record(7200.0, 10_799.0, life)
    assert must_record(7200.0, 10_800.0, life)


@given(st.floats(0.001, 1e9))
def test_renewals_are_looked_for_once_per_window_within_bounds(ttl: float) -> None:
    assert 0.05 <= sweep_seconds(ttl) <= 30
    if 0.8 <= ttl <= 480:
        assert sweep_seconds(ttl) == ttl / WINDOWS_PER_TTL


# Which TTL a session has


async def test_no_ttl_means_the_configured_one(start: Start, clock: ManualClock) -> None:
    state = await start(session={"ttl_seconds": 77})
    session = await state.get_or_create_session("a")
    assert session.ttl_seconds == 77
    assert session.expires_at == datetime.fromtimestamp(clock.wall() + 77, UTC)


async def test_a_ttl_of_zero_means_never(start: Start, clock: ManualClock) -> None:
    state = await start(session={"ttl_seconds": 77})
    await create(state, ttl_seconds=0)
    assert await deadline_of(state) is None
    clock.advance(50 * 365 * DAY)
    assert await state.has_session("a")


async def test_a_configured_ttl_of_zero_means_never_and_a_session_may_have_its_own(
    start: Start, clock: ManualClock
) -> None:
    state = await start(session={"ttl_seconds": 0})
    await state.create_session(session_id="never")
    await create(state, "own")
    clock.advance(TTL)
    assert await state.get_active_sessions() == ["never"]


async def test_a_session_is_there_until_just_before_its_deadline(
    state: StateManager, clock: ManualClock
) -> None:
    await create(state)
    clock.advance(TTL - 0.125)
    assert await state.has_session("a")
    clock.advance(0.125)
    assert not await state.has_session("a")


# Renewal


@hot_and_cold
@every_access
async def test_an_access_starts_the_ttl_anew(
    state: StateManager, clock: ManualClock, access: Act, cold: bool
) -> None:
    await create(state)
    clock.advance(TTL - 1)
    if cold:
        await state.spill_session("a")
    await access(state)
    clock.advance(TTL - 1)
    assert await state.has_session("a")
    clock.advance(1)
    assert not await state.has_session("a")


@hot_and_cold
@every_look
async def test_a_look_renews_nothing(
    state: StateManager, clock: ManualClock, look: Act, cold: bool
) -> None:
    await create(state)
    clock.advance(TTL - 1)
    if cold:
        await state.spill_session("a")
    await look(state)
    clock.advance(1)
    assert not await state.has_session("a")


@hot_and_cold
@every_access
async def test_without_auto_renew_no_access_moves_the_deadline(
    state: StateManager, clock: ManualClock, access: Act, cold: bool
) -> None:
    await create(state, auto_renew=False)
    deadline = clock.wall() + TTL
    clock.advance(TTL - 1)
    if cold:
        await state.spill_session("a")
    await access(state)
    assert await deadline_of(state) == deadline
    clock.advance(1)
    assert not await state.has_session("a")


@pytest.mark.parametrize("configured", [True, False])
async def test_a_session_may_say_itself_whether_it_renews(
    start: Start, clock: ManualClock, configured: bool
) -> None:
    state = await start(session={"auto_renew": configured, "ttl_seconds": TTL})
    await create(state, "as configured")
    await create(state, "renewing", auto_renew=True)
    await create(state, "fixed", auto_renew=False)
    clock.advance(TTL / 2)
    for name, renews in (("as configured", configured), ("renewing", True), ("fixed", False)):
        session = await state.get_session(name)
        assert session is not None
        assert session.auto_renew is renews
    clock.advance(TTL / 2)
    expected = {"renewing"} | ({"as configured"} if configured else set())
    assert set(await state.get_active_sessions()) == expected


@pytest.mark.parametrize("access", [ACCESSES["get"], ACCESSES["update without a change"]])
async def test_a_renewal_is_no_new_version(
    state: StateManager, clock: ManualClock, access: Act
) -> None:
    await create(state)
    clock.advance(TTL / 2)
    session = await access(state)
    assert isinstance(session, Session)
    assert session.version == 1
    assert session.last_accessed.timestamp() == clock.wall()
    assert session.created_at.timestamp() == clock.wall() - TTL / 2


# Setting the TTL


@hot_and_cold
@pytest.mark.parametrize("auto_renew", [True, False])
async def test_a_new_ttl_runs_from_now_and_leaves_data_and_version(
    state: StateManager, clock: ManualClock, auto_renew: bool, cold: bool
) -> None:
    await create(state, auto_renew=auto_renew, data={"x": [1]})
    clock.advance(TTL / 2)
    if cold:
        await state.spill_session("a")
    assert await state.set_ttl("a", 1000)
    clock.advance(999)
    session = await state.get_session("a")
    assert session is not None
    assert (session.version, session.data, session.ttl_seconds) == (1, {"x": [1]}, 1000)
    assert session.auto_renew is auto_renew
    clock.advance(1)
    assert await state.has_session("a") is auto_renew


@pytest.mark.parametrize("auto_renew", [True, False])
async def test_a_ttl_can_be_set_to_never_and_back(
    state: StateManager, clock: ManualClock, auto_renew: bool
) -> None:
    await create(state, auto_renew=auto_renew)
    assert await state.set_ttl("a", 0)
    assert await deadline_of(state) is None
    clock.advance(100 * TTL)
    assert await state.set_ttl("a", TTL)
    assert await deadline_of(state) == clock.wall() + TTL
    clock.advance(TTL)
    assert not await state.has_session("a")


@pytest.mark.parametrize("auto_renew", [True, False])
async def test_a_set_ttl_survives_a_crash(
    start: Start, crash: Crash, clock: ManualClock, auto_renew: bool
) -> None:
    state = await start()
    await create(state, auto_renew=auto_renew)
    clock.advance(10)
    await state.set_ttl("a", 1000)
    again = await start(path=crash(state))
    clock.advance(999)
    assert await again.has_session("a")
    clock.advance(1 + (1000 / 8 if auto_renew else 0))
    assert not await again.has_session("a")


async def test_a_replacement_keeps_the_ttl_unless_it_brings_one(
    state: StateManager, clock: ManualClock
) -> None:
    await create(state)
    kept = await state.replace_session("a", {"x": 1})
    assert kept.ttl_seconds == TTL
    changed = await state.replace_session("a", {"x": 1}, ttl_seconds=40)
    assert changed.ttl_seconds == 40
    never = await state.replace_session("a", {"x": 1}, ttl_seconds=0)
    assert never.expires_at is None
    clock.advance(TTL)
    assert await state.has_session("a")


async def test_a_replacement_with_a_ttl_moves_a_fixed_deadline(
    state: StateManager, clock: ManualClock
) -> None:
    await create(state, auto_renew=False)
    clock.advance(TTL / 2)
    session = await state.replace_session("a", {}, ttl_seconds=TTL)
    assert session.expires_at == datetime.fromtimestamp(clock.wall() + TTL, UTC)


@pytest.mark.parametrize("ttl", [-1, -0.001, float("nan"), float("inf"), 1e12])
async def test_a_ttl_that_is_no_duration_is_refused_and_nothing_is_written(
    state: StateManager, ttl: float
) -> None:
    await create(state)
    calls: list[Awaitable[Any]] = [
        state.create_session(session_id="b", ttl_seconds=ttl),
        state.replace_session("a", {"x": 1}, ttl_seconds=ttl),
        state.set_ttl("a", ttl),
    ]
    for error in await outcomes(calls):
        assert isinstance(error, ValueError)
        assert str(error).startswith("ttl_seconds = ")
    assert await state.get_active_sessions() == ["a"]
    session = await state.get_session("a")
    assert session is not None
    assert (session.version, session.ttl_seconds, session.data) == (1, TTL, {})


# An absolute lifetime


@hot_and_cold
@pytest.mark.parametrize("options", [{}, {"auto_renew": False}, {"ttl_seconds": 0}], ids=str)
async def test_no_renewal_outlives_the_maximal_lifetime(
    start: Start, clock: ManualClock, cold: bool, options: dict[str, Any]
) -> None:
    state = await start(session={"max_lifetime_seconds": TTL * 0.9})
    await create(state, **options)
    born = clock.wall()
    for _ in range(8):
        clock.advance(TTL / 10)
        if cold:
            await state.spill_session("a")
        await state.update_session_data("a", "x", 1)
        assert await deadline_of(state) == born + TTL * 0.9
    clock.advance(TTL / 10)
    assert not await state.has_session("a")
    assert await state.get_session("a") is None


async def test_the_lifetime_starts_anew_with_a_new_session_of_the_same_name(
    start: Start, clock: ManualClock
) -> None:
    state = await start(session={"max_lifetime_seconds": 100})
    await create(state)
    clock.advance(60)
    await state.terminate_session("a")
    await create(state)
    clock.advance(60)
    assert await state.has_session("a")
    clock.advance(40)
    assert not await state.has_session("a")


@pytest.mark.parametrize("clean", [True, False], ids=["closed", "killed"])
async def test_the_maximal_lifetime_holds_after_reopening(
    start: Start, crash: Crash, clock: ManualClock, clean: bool
) -> None:
    sections = {"session": {"max_lifetime_seconds": 100}}
    state = await start(**sections)
    await create(state, ttl_seconds=80)
    clock.advance(70)
    assert await state.get_session("a") is not None
    await state.flush()
    image = crash(state)
    if clean:
        await state.close()
        again = await start(**sections)
    else:
        again = await start(path=image, **sections)
    clock.advance(29)
    assert await again.has_session("a")
    clock.advance(1.5)
    assert not await again.has_session("a")
    assert await again.get_active_sessions() == []
    assert await again.get_session("a") is None
    with pytest.raises(SessionNotFound):
        await again.update_session_data("a", "x", 1)


async def test_the_maximal_lifetime_is_the_one_configured_when_the_session_was_created(
    start: Start, clock: ManualClock
) -> None:
    state = await start(session={"max_lifetime_seconds": 200})
    await create(state)
    await state.close()
    again = await start(session={"max_lifetime_seconds": 100})
    clock.advance(101)
    assert await again.has_session("a")
    await again.update_session_data("a", "x", 1)
    clock.advance(99)
    assert not await again.has_session("a")
    assert await again.get_session("a") is None


# The end


async def assert_absent(state: StateManager, session_id: str = "a") -> None:
    """Nothing that one can ask or do finds the session."""
    assert not await state.has_session(session_id)
    assert session_id not in await state.get_active_sessions()
    assert session_id not in [name async for name in state.iter_sessions(prefix=session_id)]
    assert await state.find_sessions(user_id="ada") == []
    assert await state.get_session(session_id) is None
    assert not await state.set_ttl(session_id, 10)
    assert not await state.spill_session(session_id)
    assert not await state.restore_session(session_id)
    assert not await state.terminate_session(session_id)
    changes: list[Awaitable[Any]] = [
        state.update_session_data(session_id, "x", 1),
        state.update_session(session_id, lambda data: data.update(x=1)),
        state.replace_session(session_id, {"x": 1}),
        state.update_session_metadata(session_id, source="app"),
        in_edit(state, session_id),
    ]
    for error in await outcomes(changes):
        assert isinstance(error, SessionNotFound)


@hot_and_cold
@pytest.mark.parametrize("auto_renew", [True, False])
async def test_an_expired_session_is_absent_everywhere_at_once(
    state: StateManager, clock: ManualClock, cold: bool, auto_renew: bool
) -> None:
    await create(state, auto_renew=auto_renew)
    if cold:
        await state.spill_session("a")
    clock.advance(TTL)
    await assert_absent(state)


FIRST_CALLS: dict[str, Act] = {
    **{name: look for name, look in LOOKS.items() if name != "flush"},
    "get": ACCESSES["get"],
    "update": lambda state: outcomes([state.update_session_data("a", "x", 1)]),
    "set the TTL": lambda state: state.set_ttl("a", 10),
    "terminate": lambda state: state.terminate_session("a"),
}


@hot_and_cold
@pytest.mark.parametrize("first", FIRST_CALLS.values(), ids=FIRST_CALLS.keys())
async def test_whoever_asks_first_finds_an_expired_session_absent(
    state: StateManager, clock: ManualClock, first: Act, cold: bool
) -> None:
    await create(state)
    if cold:
        await state.spill_session("a")
    clock.advance(TTL)
    await first(state)
    await assert_absent(state)


@hot_and_cold
async def test_an_expired_session_stays_absent_after_a_clean_reopening(
    start: Start, clock: ManualClock, cold: bool
) -> None:
    state = await start()
    await create(state)
    if cold:
        await state.spill_session("a")
    clock.advance(TTL)
    await state.close()
    await assert_absent(await start())


@hot_and_cold
@pytest.mark.parametrize("first", FIRST_CALLS.values(), ids=FIRST_CALLS.keys())
async def test_a_session_that_was_seen_to_be_absent_stays_absent_after_a_crash(
    start: Start, crash: Crash, clock: ManualClock, first: Act, cold: bool
) -> None:
    state = await start()
    await create(state)
    if cold:
        await state.spill_session("a")
    clock.advance(TTL)
    await first(state)
    await assert_absent(await start(path=crash(state)))


@pytest.mark.parametrize("cold", [False, True], ids=["hot", "cold"])
async def test_an_expired_id_is_free_for_a_new_session(
    state: StateManager, clock: ManualClock, cold: bool
) -> None:
    await create(state, data={"old": True})
    if cold:
        await state.spill_session("a")
    clock.advance(TTL)
    await create(state, data={"new": True})
    session = await state.get_session("a")
    assert session is not None
    assert (session.version, session.data) == (1, {"new": True})
    assert session.created_at.timestamp() == clock.wall()


async def test_a_session_that_expired_during_its_edit_is_not_brought_back(
    state: StateManager, clock: ManualClock
) -> None:
    await create(state)
    edit = state.edit("a")
    draft = await edit.__aenter__()
    draft["x"] = 1
    clock.advance(TTL)
    with pytest.raises(SessionNotFound):
        await edit.__aexit__(None, None, None)
    await assert_absent(state)


async def test_a_session_that_expired_while_its_update_was_in_flight_is_gone_for_writers_too(
    state: StateManager, files: ScriptedFiles, clock: ManualClock
) -> None:
    await create(state, data={"x": 1})
    files.syncs.hold()
    update = asyncio.create_task(state.update_session_data("a", "x", 2))
    await files.syncs.reached()
    clock.advance(TTL)
    seen = asyncio.create_task(state.has_session("a"))
    late = asyncio.create_task(state.update_session_data("a", "x", 3))
    again = asyncio.create_task(state.create_session(session_id="a", data={"new": True}))
    await loop_steps(5)
    files.open_gates()
    first, second, third, fourth = await outcomes([update, seen, late, again])
    assert isinstance(first, Session)
    assert second is False
    assert isinstance(third, SessionNotFound)
    assert fourth == "a"
    assert await data_of(state, "a") == {"new": True}


async def test_an_update_renews_when_it_is_made_and_not_when_the_disk_is_done(
    state: StateManager, files: ScriptedFiles, clock: ManualClock
) -> None:
    await create(state, data={"x": 1})
    clock.advance(TTL - 1)
    files.syncs.hold()
    update = asyncio.create_task(state.update_session_data("a", "x", 2))
    await files.syncs.reached()
    clock.advance(2)
    seen = [
        asyncio.create_task(state.has_session("a")),
        asyncio.create_task(state.get_active_sessions()),
        asyncio.create_task(state.get_session("a")),
    ]
    await loop_steps(5)
    files.open_gates()
    has, listed, session = await outcomes(seen)
    assert has is True
    assert listed == ["a"]
    assert isinstance(session, Session)
    assert (await update).version == 2
    assert await state.has_session("a")


async def test_a_read_renews_a_session_for_writers_too_while_an_update_is_in_flight(
    state: StateManager, files: ScriptedFiles, clock: ManualClock
) -> None:
    await create(state, data={"x": 1})
    files.syncs.hold()
    update = asyncio.create_task(state.update_session_data("a", "x", 2))
    await files.syncs.reached()
    clock.advance(TTL - 1)
    assert await state.get_session("a") is not None
    clock.advance(2)
    late = asyncio.create_task(state.update_session_data("a", "x", 3))
    await loop_steps(5)
    files.open_gates()
    await update
    assert (await late).version == 3
    assert await data_of(state, "a") == {"x": 3}


async def test_cleaning_up_removes_exactly_the_expired_ones(
    state: StateManager, clock: ManualClock
) -> None:
    for number in range(30):
        await create(state, f"short {number}", ttl_seconds=10 + number)
        await create(state, f"never {number}", ttl_seconds=0)
        if number % 3 == 0:
            await state.spill_session(f"short {number}")
    clock.advance(25)
    assert (await state.stats()).sessions == 60
    assert await state.cleanup_expired() == 16
    assert await state.cleanup_expired() == 0
    stats = await state.stats()
    assert (stats.sessions, stats.expired) == (44, 16)
    assert len(await state.get_active_sessions()) == 44


async def test_cleaning_up_spares_what_was_renewed_since_it_was_written(
    state: StateManager, clock: ManualClock
) -> None:
    await create(state, "a")
    await create(state, "b")
    clock.advance(TTL - 1)
    await state.get_session("a")
    clock.advance(1)
    assert await state.cleanup_expired() == 1
    assert await state.get_active_sessions() == ["a"]


async def test_expired_sessions_are_cleaned_up_in_the_background(start: Start) -> None:
    state = await start(clock=SystemClock(), session={"cleanup_interval_seconds": 0.02})
    for number in range(20):
        await state.create_session(session_id=str(number), ttl_seconds=0.02)
    await eventually(lambda: residency_of(state).expired == 20)
    assert len(disk_of(state).index) == 0


# Old sessions, by last access


@pytest.mark.parametrize("ttl", [0, 1e6])
async def test_old_sessions_are_those_that_nobody_accessed_for_so_long(
    start: Start, clock: ManualClock, ttl: float
) -> None:
    state = await start(session={"ttl_seconds": ttl})
    for name in ("hot unread", "hot read", "cold unread", "cold read", "cold updated"):
        await state.create_session(session_id=name)
    clock.advance(100)
    for name in ("hot read", "cold read"):
        await state.get_session(name)
    await state.update_session_data("cold updated", "x", 1)
    for name in ("cold unread", "cold read", "cold updated"):
        await state.spill_session(name)
    clock.advance(50)
    assert await state.cleanup_old_sessions(151) == 0
    assert await state.cleanup_old_sessions(100) == 2
    assert sorted(await state.get_active_sessions()) == ["cold read", "cold updated", "hot read"]
    clock.advance(1)
    assert await state.cleanup_old_sessions(0) == 3


async def test_last_accesses_are_known_after_a_clean_reopening(
    start: Start, clock: ManualClock
) -> None:
    state = await start(session={"ttl_seconds": 0})
    await state.create_session(session_id="read")
    await state.create_session(session_id="unread")
    clock.advance(100)
    await state.get_session("read")
    await state.close()
    again = await start(session={"ttl_seconds": 0})
    clock.advance(10)
    assert await again.cleanup_old_sessions(50) == 1
    assert await again.get_active_sessions() == ["read"]


@pytest.mark.parametrize("age", [-1, float("nan"), float("inf")])
async def test_an_age_that_is_no_duration_is_refused(state: StateManager, age: float) -> None:
    with pytest.raises(ValueError, match="max_age_seconds = "):
        await state.cleanup_old_sessions(age)


# Renewals and the disk


async def test_a_read_that_renews_writes_nothing(
    state: StateManager, files: ScriptedFiles, clock: ManualClock
) -> None:
    await create(state)
    await state.flush()
    before = files.calls.copy()
    for _ in range(1000):
        clock.advance(1)
        assert await state.get_session("a") is not None
    assert files.calls == before


async def test_renewals_are_recorded_once_per_window(
    state: StateManager, files: ScriptedFiles, clock: ManualClock
) -> None:
    await create(state)
    await state.flush()
    writes = files.calls["write_at"]
    for _ in range(1000):
        clock.advance(1)
        await state.get_session("a")
        await state.flush()  # records the renewals that are due
    touches = (await state.stats()).touches
    assert 95 <= touches <= 101
    assert files.calls["write_at"] - writes == touches


async def test_due_renewals_are_recorded_in_the_background(start: Start, crash: Crash) -> None:
    state = await start(clock=SystemClock())
    await create(state, ttl_seconds=0.8)  # looked for every 50 ms
    await eventually(
        lambda: residency_of(state).touches >= 3, meanwhile=lambda: state.get_session("a")
    )


@hot_and_cold
@pytest.mark.parametrize("seed", range(4))
async def test_a_crash_takes_nothing_of_a_lifetime_and_gives_at_most_an_eighth(
    start: Start, crash: Crash, clock: ManualClock, seed: int, cold: bool
) -> None:
    rng = random.Random(seed)
    state = await start(memory={"max_bytes": 64 * KIB})
    for name in "abc":
        await create(state, name)
    accessed = dict.fromkeys("abc", clock.wall())
    for _ in range(60):
        clock.advance(rng.uniform(0, 25))
        name = rng.choice("abc")
        if await state.get_session(name) is not None:
            accessed[name] = clock.wall()
        if cold:
            await state.spill_session(name)
        elif rng.random() < 0.3:
            await state.restore_session(rng.choice("abc"))
        await state.flush()
    image = crash(state)
    living = await state.get_active_sessions()
    assert living
    now = clock.wall()
    again = await start(path=image)
    for name, last in sorted(accessed.items(), key=lambda item: item[1]):
        if name in living:
            clock.advance(max(0.0, last + TTL - 0.25 - clock.wall()))
            assert await again.has_session(name), f"{name} lost some of its life"
    clock.advance(now + TTL * 9 / 8 + 0.25 - clock.wall())
    assert await again.get_active_sessions() == []


async def test_what_a_crash_grants_is_not_made_an_access_by_a_restore(
    start: Start, crash: Crash, clock: ManualClock
) -> None:
    state = await start()
    await create(state)
    again = await start(path=crash(state))
    clock.advance(TTL / 2)
    assert await again.restore_session("a")
    clock.advance(TTL * 5 / 8 - 0.25)
    assert await again.has_session("a")
    clock.advance(0.5)
    assert not await again.has_session("a")


async def test_a_renewal_is_recorded_before_a_session_leaves_memory(
    start: Start, crash: Crash, clock: ManualClock
) -> None:
    state = await start()
    await create(state)
    clock.advance(TTL - 1)
    await state.get_session("a")
    await state.spill_session("a")
    await state.flush()
    assert (await state.stats()).touches == 1
    again = await start(path=crash(state))
    clock.advance(TTL - 1)
    assert await again.has_session("a")


async def test_a_restored_neighbour_does_not_hide_a_renewal(
    start: Start, crash: Crash, clock: ManualClock
) -> None:
    state = await start(memory={"max_bytes": 64 * KIB})  # a single shard
    await create(state, "a")
    await create(state, "b")
    await state.spill_session("b")
    await state.flush()
    clock.advance(30)
    await state.get_session("a")
    await state.restore_session("b")
    await state.flush()
    again = await start(path=crash(state))
    clock.advance(TTL - 5)
    assert await again.has_session("a")


async def test_an_acknowledgement_that_comes_late_does_not_hide_a_renewal(
    start: Start, crash: Crash, files: ScriptedFiles, clock: ManualClock
) -> None:
    state = await start(memory={"max_bytes": 64 * KIB})
    await create(state, "a")
    await create(state, "b")
    files.syncs.hold()
    update = asyncio.create_task(state.update_session_data("b", "x", 1))
    await files.syncs.reached()
    clock.advance(30)
    await residency_of(state).record_renewals()
    await state.get_session("a")
    clock.advance(1)
    files.open_gates()
    await update
    await state.flush()
    again = await start(path=crash(state))
    clock.advance(TTL - 5)
    assert await again.has_session("a")


async def test_renewals_of_a_session_larger_than_the_budget_are_recorded_too(
    start: Start, crash: Crash, clock: ManualClock
) -> None:
    state = await start(memory={"max_bytes": 64 * KIB})
    await create(state, data={"large": random.Random(1).randbytes(100 * KIB)})
    for _ in range(40):
        clock.advance(10)
        assert await state.get_session("a") is not None
    await state.flush()
    again = await start(path=crash(state))
    clock.advance(TTL - 1)
    assert await again.has_session("a")


@pytest.mark.parametrize("auto_renew", [True, False])
async def test_a_crash_does_not_move_a_fixed_deadline(
    start: Start, crash: Crash, clock: ManualClock, auto_renew: bool
) -> None:
    state = await start()
    await create(state, auto_renew=auto_renew)
    again = await start(path=crash(state))
    clock.advance(TTL)
    assert await again.has_session("a") is auto_renew


# Wall clocks that jump


@hot_and_cold
@both_jumps
async def test_a_wall_clock_that_jumps_neither_ends_nor_prolongs_a_session(
    state: StateManager, clock: ManualClock, jump: float, cold: bool
) -> None:
    await create(state, "before")
    await create(state, "fixed", auto_renew=False)
    await create(state, "never", ttl_seconds=0)
    if cold:
        for name in ("before", "fixed", "never"):
            await state.spill_session(name)
    clock.advance(10)
    clock.jump_wall(jump)
    await create(state, "after")
    assert await state.cleanup_expired() == 0
    assert await state.cleanup_old_sessions(11) == 0
    clock.advance(TTL - 10 - 1)
    assert len(await state.get_active_sessions()) == 4
    clock.advance(1)
    assert set(await state.get_active_sessions()) == {"after", "never"}
    clock.advance(10)
    assert await state.get_active_sessions() == ["never"]


@both_jumps
async def test_what_a_session_shows_follows_the_wall_clock(
    state: StateManager, clock: ManualClock, jump: float
) -> None:
    await create(state, "before")
    clock.jump_wall(jump)
    await create(state, "after")
    clock.advance(1)
    for name in ("before", "after"):
        session = await state.get_session(name)
        assert session is not None
        assert session.expires_at is not None
        assert session.last_accessed.timestamp() == clock.wall()
        assert session.expires_at.timestamp() == clock.wall() + TTL
    after = await state.get_session("after")
    assert after is not None
    assert after.created_at.timestamp() == clock.wall() - 1


async def test_the_times_of_a_session_never_contradict_each_other(start: Start) -> None:
    state = await start(clock=SystemClock(), session={"max_lifetime_seconds": 10 * TTL})
    for number in range(300):
        name = str(number)
        await create(state, name)
        views = [await state.get_session(name), await state.update_session_data(name, "x", 1)]
        await state.spill_session(name)
        views += [await state.get_session(name), await state.get_session(name)]
        accesses = []
        for view in views:
            assert view is not None
            assert view.expires_at is not None
            assert view.created_at <= view.last_accessed
            assert view.expires_at - view.last_accessed == timedelta(seconds=TTL)
            assert (view.expires_at, view.last_accessed) == (view.expires_at, view.last_accessed)
            accesses.append(view.last_accessed)
        assert accesses == sorted(accesses)


async def test_what_a_view_shows_does_not_change_when_the_clock_is_set(
    state: StateManager, clock: ManualClock
) -> None:
    await create(state)
    view = await state.get_session("a")
    assert view is not None
    shown = view.last_accessed, view.expires_at
    clock.jump_wall(DAY)
    assert (view.last_accessed, view.expires_at) == shown


@hot_and_cold
async def test_a_deadline_is_exact_to_less_than_a_millisecond(
    state: StateManager, clock: ManualClock, cold: bool
) -> None:
    clock.advance(0.0004)
    await create(state, auto_renew=False)
    clock.advance(TTL - 0.0004)
    if cold:
        await state.spill_session("a")
    assert await state.has_session("a")
    assert await state.get_session("a") is not None
    clock.advance(0.0005)
    assert not await state.has_session("a")


@pytest.mark.parametrize("clean", [True, False], ids=["closed", "killed"])
@both_jumps
async def test_what_was_written_after_a_jump_keeps_its_lifetime_over_a_reopening(
    start: Start, crash: Crash, clock: ManualClock, jump: float, clean: bool
) -> None:
    sections: dict[str, Any] = {"session": {"max_lifetime_seconds": 2 * TTL}}
    state = await start(**sections)
    await create(state, "updated")
    clock.jump_wall(jump)
    await create(state, "created")
    await create(state, "fixed", auto_renew=False)
    await state.update_session_data("updated", "x", 1)
    if clean:
        await state.close()
    again = await start(**sections) if clean else await start(path=crash(state), **sections)
    clock.advance(TTL - 1)
    assert set(await again.get_active_sessions()) == {"updated", "created", "fixed"}
    clock.advance(1 + TTL / 8)
    assert await again.get_active_sessions() == []


@pytest.mark.parametrize("sealed", [False, True], ids=["same segment", "older segment"])
@both_jumps
async def test_what_was_written_before_a_jump_keeps_its_lifetime_over_a_clean_reopening(
    start: Start, clock: ManualClock, jump: float, sealed: bool
) -> None:
    state = await start()
    await create(state, "hot")
    await create(state, "cold")
    if sealed:
        await state.close()
        state = await start()
        await state.restore_session("hot")
    await state.spill_session("cold")
    clock.jump_wall(jump)
    await state.close()
    again = await start()
    clock.advance(TTL - 1)
    assert set(await again.get_active_sessions()) == {"hot", "cold"}
    clock.advance(1 + TTL / 8)
    assert await again.get_active_sessions() == []


@both_jumps
async def test_the_maximal_lifetime_is_not_moved_by_a_jump(
    start: Start, clock: ManualClock, jump: float
) -> None:
    state = await start(session={"max_lifetime_seconds": 100})
    await create(state, "before")
    clock.jump_wall(jump)
    await create(state, "after")
    clock.advance(60)
    assert len([name async for name in state.iter_sessions()]) == 2
    assert await state.get_session("before") is not None
    assert await state.get_session("after") is not None
    clock.advance(40)
    assert await state.get_active_sessions() == []


async def test_without_any_clock_trouble_lifetimes_pass_while_the_engine_is_closed(
    start: Start, clock: ManualClock
) -> None:
    state = await start()
    await create(state, "a")
    clock.advance(TTL / 2)
    await state.close()
    clock.advance(TTL / 2 - 1)
    again = await start()
    assert await again.has_session("a")
    await again.close()
    clock.advance(1)
    assert not await (await start()).has_session("a")


# While the shared tier is asked whether a session is over


Meanwhile = Callable[[], Awaitable[object]]


def asked(state: StateManager, meanwhile: Meanwhile) -> list[str]:
    """Let a shared tier be asked that agrees to every end, once `meanwhile` is done."""
    questions: list[str] = []

    async def confirm_end(session_id: str, key: bytes, idle_since: float) -> bool:
        questions.append(session_id)
        if len(questions) == 1:
            await meanwhile()
        return True

    state._residency.confirm_end = confirm_end
    return questions


@pytest.mark.parametrize("how", ["cleanup", "listing", "update", "another creation"])
async def test_a_session_that_begins_anew_while_the_end_of_the_old_one_is_confirmed_stays(
    how: str,
) -> None:
    clock = ManualClock()
    async with opened(MemoryFiles(), config(), clock=clock) as state:
        await state.create_session(session_id="s", ttl_seconds=10, data={"life": 1})
        clock.advance(11)
        questions = asked(state, lambda: state.create_session(session_id="s", data={"life": 2}))
        if how == "cleanup":
            assert await state.cleanup_expired() == 0
        elif how == "listing":
            assert await state.get_active_sessions() == ["s"]
        elif how == "update":
            await state.update_session_data("s", "more", 1)
        else:
            assert await state.terminate_session("s") is False, "what was there is over"
            with pytest.raises(SessionExists):
                await state.create_session(session_id="s")
        assert questions
        session = await state.get_session("s")
        assert session is not None
        assert session["life"] == 2


async def test_a_session_that_is_used_while_it_is_asked_whether_it_is_idle_stays() -> None:
    clock = ManualClock()
    async with opened(MemoryFiles(), config(), clock=clock) as state:
        await state.create_session(session_id="s", data={"life": 1})
        clock.advance(100)
        questions = asked(state, lambda: state.get_session("s"))
        assert await state.cleanup_old_sessions(50) == 0
        assert questions == ["s"]
        assert await state.has_session("s")
