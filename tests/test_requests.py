from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from persistence import ManualClock, StateManager
from persistence import record as rec
from persistence.admission import Waiting
from persistence.entries import Entry, Noted
from persistence.errors import (
    DiskFull,
    InvalidArgument,
    ManagerClosed,
    RequestLimitReached,
    SessionNotFound,
    ValueTooLarge,
    WrongEventLoop,
)
from persistence.requests import Requests
from persistence.turns import CALLS_PER_TURN
from tests.engine import (
    Crash,
    ScriptedFiles,
    Start,
    commits_of,
    eventually,
    loop_steps,
    residency_of,
)
from tests.test_turns import Ticks


def requests_of(state: StateManager) -> Requests:
    return state._requests


async def outcome(state: StateManager, session_id: str, name: str = "r") -> bool:
    """Make one request; return whether it was admitted."""
    try:
        async with state.request(session_id, name):
            return True
    except RequestLimitReached:
        return False


async def passed(state: StateManager, session_id: str, count: int) -> int:
    """Make requests at the same time; return how many were admitted."""
    return sum(await asyncio.gather(*(outcome(state, session_id) for _ in range(count))))


async def record_of(state: StateManager, session_id: str) -> bytes:
    record = await residency_of(state).newest(session_id, session_id.encode())
    assert record is not None
    return record


async def mark_of(state: StateManager, session_id: str) -> int:
    return Noted.of(rec.meta_of(await record_of(state, session_id))).mark


async def fail(state: StateManager, session_id: str, error: BaseException) -> None:
    with pytest.raises(type(error)):
        async with state.request(session_id, "bad"):
            raise error


# Counting


async def test_requests_are_counted_and_timed_by_the_clock(
    state: StateManager, clock: ManualClock
) -> None:
    sid = await state.create_session()
    for seconds in (1.0, 2.0, 6.0):
        async with state.request(sid, f"GET /{seconds}") as request:
            assert request.session.id == sid
            clock.advance(seconds)
    found = await state.session_metrics(sid)
    assert (found.requests, found.errors, found.running) == (3, 0, 0)
    assert (found.last_name, found.total_seconds, found.average_seconds) == ("GET /6.0", 9.0, 3.0)
    assert 1.0 <= found.p50_seconds <= found.p99_seconds <= 6.0
    assert found.last_at is not None
    assert found.last_at.timestamp() == pytest.approx(clock.wall())


async def test_an_exception_counts_as_an_error_and_goes_on(state: StateManager) -> None:
    sid = await state.create_session()
    await fail(state, sid, ValueError("no such page"))
    assert await outcome(state, sid)
    found = await state.session_metrics(sid)
    assert (found.requests, found.errors, found.error_rate) == (2, 1, 0.5)
    assert found.last_error == "ValueError: no such page"


async def test_what_a_clock_timed_that_is_set_back_is_not_the_newest_for_ever(
    state: StateManager, clock: ManualClock
) -> None:
    sid = await state.create_session()
    for _ in range(60):
        await fail(state, sid, ValueError("old"))
        clock.advance(1.0)
    await state.flush()
    clock.jump_wall(-86_400.0)
    assert (await state.session_metrics(sid)).requests_per_second == pytest.approx(0.0, abs=1e-6)
    for number in range(300):
        assert await outcome(state, sid, "new")
        clock.advance(1.0)
        if number % 30 == 0:
            await state.flush()
    await state.record_error(sid, "new error")
    for _ in range(2):  # in memory, then stored
        found = await state.session_metrics(sid)
        assert (found.last_name, found.last_error) == ("new", "new error")
        assert found.last_at is not None
        assert found.last_at.timestamp() == pytest.approx(clock.wall(), abs=1.0)
        assert found.requests_per_second == pytest.approx(1.0, rel=0.5)
        assert (await state.session_health(sid)).recent_error_rate < 0.1
        await state.flush()
    clock.advance(600.0)
    assert (await state.session_metrics(sid)).requests_per_second < 0.01


async def test_a_failure_that_nobody_raises_counts_too(state: StateManager) -> None:
    sid = await state.create_session()
    async with state.request(sid) as request:
        request.failed("status 500")
    found = await state.session_metrics(sid)
    assert (found.requests, found.errors, found.last_error) == (1, 1, "status 500")


async def test_a_request_that_is_entered_again_does_not_fail_again(state: StateManager) -> None:
    sid = await state.create_session()
    request = state.request(sid)
    with pytest.raises(ValueError, match="once"):
        async with request:
            raise ValueError("once")
    async with request:
        pass
    found = await state.session_metrics(sid)
    assert (found.requests, found.errors) == (2, 1)


class _Mute(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


async def test_an_error_that_cannot_be_shown_stays_the_error_of_the_request(
    state: StateManager,
) -> None:
    sid = await state.create_session()
    await fail(state, sid, _Mute())
    metrics = await state.session_metrics(sid)
    assert (metrics.requests, metrics.errors, metrics.running) == (1, 1, 0)
    assert metrics.last_error == "_Mute: (its message cannot be shown)"


async def test_a_cancelled_request_is_counted_and_no_error(state: StateManager) -> None:
    sid = await state.create_session()
    inside = asyncio.Event()

    async def hang() -> None:
        async with state.request(sid, "slow"):
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hang())
    await inside.wait()
    assert (await state.session_metrics(sid)).running == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    found = await state.session_metrics(sid)
    assert (found.requests, found.errors, found.running) == (1, 0, 0)


async def test_a_request_is_left_where_it_was_entered(state: StateManager) -> None:
    sid = await state.create_session()
    request = await state.request(sid).__aenter__()
    with pytest.raises(WrongEventLoop, match="another event loop"):
        await asyncio.to_thread(asyncio.run, request.__aexit__(None, None, None))
    metrics = await state.session_metrics(sid)
    assert (metrics.running, metrics.requests) == (1, 0)
    await request.__aexit__(None, None, None)
    metrics = await state.session_metrics(sid)
    assert (metrics.running, metrics.requests) == (0, 1)


async def test_requests_under_way_at_close_are_counted_as_if_they_ended_then(
    start: Start, clock: ManualClock, files: ScriptedFiles
) -> None:
    state = await start()
    sid = await state.create_session(max_requests=10)
    async with state.request(sid, "short"):
        clock.advance(1)
    async with state.request(sid, "long"):
        clock.advance(2)
        async with state.request(sid, "longer"):
            clock.advance(3)
            files.syncs.hold()
            closing = asyncio.create_task(state.close())
            await files.syncs.reached()
        # It ends while it is being stored as if it had ended before.
        files.syncs.let_pass()
        await closing
        clock.advance(10)
    state = await start()
    found = await state.session_metrics(sid)
    assert (found.requests, found.admitted, found.running) == (3, 3, 0)
    assert found.total_seconds == pytest.approx(1 + 5 + 3)


async def test_a_request_accesses_the_session(state: StateManager, clock: ManualClock) -> None:
    sid = await state.create_session(ttl_seconds=100)
    for _ in range(5):
        clock.advance(60)
        assert await outcome(state, sid)
    assert await state.has_session(sid)


async def test_looking_at_requests_renews_nothing(state: StateManager, clock: ManualClock) -> None:
    sid = await state.create_session(ttl_seconds=100)
    clock.advance(60)
    await state.session_metrics(sid)
    await state.is_request_limit_reached(sid)
    await state.session_health(sid)
    clock.advance(50)
    assert not await state.has_session(sid)


async def test_storing_requests_is_no_access_and_no_version(
    state: StateManager, clock: ManualClock
) -> None:
    sid = await state.create_session(ttl_seconds=100, data={"a": 1})
    assert await outcome(state, sid)
    clock.advance(60)
    await requests_of(state).look()
    assert not requests_of(state).entries
    session = await state.get_session(sid, renew=False)
    assert session is not None
    assert (session.version, session.data) == (1, {"a": 1})
    clock.advance(50)
    assert not await state.has_session(sid)


async def test_those_who_time_by_themselves_count_the_same(state: StateManager) -> None:
    sid = await state.create_session(max_requests=2)
    await state.record_request(sid, "GET /a", 0.25)
    await state.record_request(sid, "GET /b", 0.75, error=KeyError("x"))
    await state.record_error(sid, "connection lost")
    with pytest.raises(RequestLimitReached):
        await state.record_request(sid, "GET /c", 1.0)
    found = await state.session_metrics(sid)
    assert (found.requests, found.errors, found.total_seconds) == (2, 2, 1.0)
    assert (found.last_name, found.last_error) == ("GET /b", "connection lost")


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), "1", None, True])
async def test_what_is_no_duration_is_refused_and_not_counted(
    state: StateManager, seconds: Any
) -> None:
    sid = await state.create_session()
    with pytest.raises(InvalidArgument, match="seconds"):
        await state.record_request(sid, "r", seconds)
    assert (await state.session_metrics(sid)).requests == 0


async def test_a_name_is_text(state: StateManager) -> None:
    with pytest.raises(InvalidArgument, match="name"):
        state.request("any", 5)  # type: ignore[arg-type]


async def test_a_session_that_is_not_there_has_no_requests(state: StateManager) -> None:
    calls = [
        outcome(state, "nobody"),
        state.record_request("nobody"),
        state.record_error("nobody", "e"),
        state.session_metrics("nobody"),
        state.session_health("nobody"),
        state.is_request_limit_reached("nobody"),
    ]
    for call in calls:
        with pytest.raises(SessionNotFound):
            await call
    assert not requests_of(state).entries


async def test_a_closed_manager_admits_no_request(start: Start) -> None:
    state = await start()
    sid = await state.create_session()
    await state.close()
    with pytest.raises(ManagerClosed):
        await outcome(state, sid)


async def test_a_session_made_anew_under_the_same_id_starts_at_zero(state: StateManager) -> None:
    await state.create_session(session_id="s", max_requests=3)
    assert await passed(state, "s", 5) == 3
    await state.terminate_session("s")
    await state.create_session(session_id="s", max_requests=2)
    assert (await state.session_metrics("s")).requests == 0
    assert await passed(state, "s", 5) == 2


# Limits


async def test_exactly_the_limit_passes_under_concurrency(state: StateManager) -> None:
    sid = await state.create_session(max_requests=100)
    assert await passed(state, sid, 1000) == 100
    assert await state.is_request_limit_reached(sid)
    found = await state.session_metrics(sid)
    assert (found.requests, found.max_requests, found.admitted) == (100, 100, 100)
    assert (await state.stats()).requests.refused == 900


async def test_exactly_the_limit_passes_one_after_the_other_in_few_commits(
    state: StateManager,
) -> None:
    sid = await state.create_session(max_requests=200)
    before = (await state.stats()).commits
    assert sum([await outcome(state, sid) for _ in range(300)]) == 200
    assert (await state.stats()).commits - before < 30


async def test_the_configured_limit_holds_unless_the_session_has_its_own(start: Start) -> None:
    state = await start(session={"max_requests": 3})
    limits = {None: 3, 5: 5, 0: 20}  # 0: unlimited
    for own, expected in limits.items():
        sid = await state.create_session(user_id="ada", max_requests=own)
        assert await passed(state, sid, 20) == expected
        assert await state.is_request_limit_reached(sid) is (own != 0)


async def test_a_limit_holds_with_metrics_off(start: Start) -> None:
    state = await start(session={"track_metrics": False, "max_requests": 7})
    sid = await state.create_session()
    assert await passed(state, sid, 50) == 7
    found = await state.session_metrics(sid)
    assert (found.requests, found.admitted) == (0, 7)


async def test_metrics_off_keep_nothing(start: Start) -> None:
    state = await start(session={"track_metrics": False})
    sid = await state.create_session(user_id="ada")
    before = await record_of(state, sid)
    assert await passed(state, sid, 10) == 10
    await state.flush()
    assert not requests_of(state).entries
    assert await record_of(state, sid) == before


async def test_a_limit_survives_a_restart_exactly(start: Start) -> None:
    state = await start()
    sid = await state.create_session(max_requests=50)
    assert await passed(state, sid, 17) == 17
    await state.close()
    state = await start()
    assert await passed(state, sid, 100) == 33


async def test_a_kill_at_any_moment_admits_no_more_than_the_limit(
    start: Start, crash: Crash, tmp_path: Path
) -> None:
    rng = random.Random(3)
    state = await start()
    sid = await state.create_session(max_requests=60)
    admitted = 0
    for _ in range(6):
        admitted += await passed(state, sid, rng.randrange(1, 8))
        if rng.random() < 0.5:
            await requests_of(state).store_all()
        image = crash(state)
        state = await start(path=image)
    admitted += await passed(state, sid, 100)
    assert admitted <= 60
    assert admitted >= 60 - 6 * 8  # at most a block was lost with each kill
    assert await state.is_request_limit_reached(sid)


async def test_a_request_is_admitted_only_once_its_block_is_durable(
    state: StateManager, files: ScriptedFiles
) -> None:
    sid = await state.create_session(max_requests=10)
    files.syncs.hold()
    request = asyncio.create_task(outcome(state, sid))
    await files.syncs.reached()
    assert not request.done()
    files.syncs.let_pass()
    assert await request


async def test_whoever_gives_up_waiting_for_a_block_uses_nothing_up(
    state: StateManager, files: ScriptedFiles
) -> None:
    sid = await state.create_session(max_requests=10)
    files.syncs.hold()
    waiting = [asyncio.create_task(outcome(state, sid)) for _ in range(5)]
    await files.syncs.reached()
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    files.syncs.let_pass()
    assert await passed(state, sid, 50) == 10


@pytest.mark.timeout(20)  # a loop that spins is ended by nothing else
@pytest.mark.parametrize("limit", [1, 3])
async def test_requests_that_keep_arriving_at_a_limit_never_stop_the_loop(
    state: StateManager, limit: int
) -> None:
    """Some of them arrive just as the last block is used up, and its task has ended."""
    sid = await state.create_session(max_requests=limit)
    arrived: list[asyncio.Task[bool]] = []
    for _ in range(100):
        arrived += [asyncio.create_task(outcome(state, sid)) for _ in range(limit + 1)]
        await asyncio.sleep(0)
    assert sum(await asyncio.gather(*arrived)) == limit


async def test_whoever_comes_after_all_others_have_been_served_is_served(
    state: StateManager,
) -> None:
    sid = await state.create_session(max_requests=10)
    for expected in (4, 6, 0):
        async with asyncio.timeout(10):
            assert await passed(state, sid, 4 if expected == 4 else 20) == expected


async def test_whoever_is_cancelled_as_it_is_admitted_uses_nothing_up(
    state: StateManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    sid = await state.create_session(max_requests=10)
    waiting = [asyncio.create_task(outcome(state, sid)) for _ in range(5)]
    admit = Waiting.admit

    async def until_one_is_cancelled(queue: Waiting, count: int) -> int:
        left = await admit(queue, count)
        waiting[0].cancel()  # it has been admitted, and does not know it yet
        return left

    with monkeypatch.context() as patched:
        patched.setattr(Waiting, "admit", until_one_is_cancelled)
        found = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(each) for each in found] == [asyncio.CancelledError] + [bool] * 4
    assert await passed(state, sid, 50) == 6


async def test_a_full_disk_refuses_the_request_and_uses_nothing_up(
    state: StateManager, files: ScriptedFiles
) -> None:
    sid = await state.create_session(max_requests=10)
    files.full = True
    with pytest.raises(DiskFull):
        await outcome(state, sid)
    files.full = False
    assert await passed(state, sid, 50) == 10


async def test_what_an_idle_session_has_reserved_is_given_back(
    state: StateManager, clock: ManualClock
) -> None:
    sid = await state.create_session(max_requests=80)
    assert await outcome(state, sid)
    assert await mark_of(state, sid) == 10
    clock.advance(10)
    await requests_of(state).look()
    assert await mark_of(state, sid) == 1
    await requests_of(state).look()
    assert not requests_of(state).entries
    assert await passed(state, sid, 200) == 79


async def test_a_request_that_was_admitted_is_counted_whatever_looks_before_it_goes_on(
    state: StateManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that admits the last one, and the step in which that one goes on, are two."""
    requests = state._requests
    serve = requests._serve

    async def serve_and_look(entry: Entry, waiting: Waiting) -> None:
        await serve(entry, waiting)
        await requests.look()

    monkeypatch.setattr(requests, "_serve", serve_and_look)
    sid = await state.create_session(max_requests=1)
    async with state.request(sid):
        assert (await state.session_metrics(sid)).running == 1
    assert (await state.session_metrics(sid)).requests == 1


async def test_a_limit_is_not_reached_as_long_as_something_is_reserved(state: StateManager) -> None:
    sid = await state.create_session(max_requests=3)
    for _ in range(3):
        assert not await state.is_request_limit_reached(sid)
        assert await outcome(state, sid)
    assert await state.is_request_limit_reached(sid)


async def test_a_session_that_ends_while_a_block_is_reserved_admits_nobody(
    state: StateManager, files: ScriptedFiles
) -> None:
    sid = await state.create_session(max_requests=10)
    files.syncs.hold()
    ending = asyncio.create_task(state.terminate_session(sid))
    await files.syncs.reached()
    request = asyncio.create_task(outcome(state, sid))
    await asyncio.sleep(0)
    files.syncs.let_pass()
    with pytest.raises(SessionNotFound):
        await request
    assert await ending


# Beside edits


async def test_a_request_inside_an_edit_of_its_own_needs_no_lock(state: StateManager) -> None:
    sid = await state.create_session(data={"n": 1}, max_requests=100)
    async with state.edit(sid) as draft:
        assert await passed(state, sid, 30) == 30
        await requests_of(state).store_all()
        draft["n"] = 2
    session = await state.get_session(sid)
    assert session is not None
    assert (session["n"], session.version) == (2, 2)
    assert (await state.session_metrics(sid)).requests == 30
    assert await passed(state, sid, 100) == 70


async def test_an_edit_that_changes_fields_keeps_what_was_stored_meanwhile(
    state: StateManager,
) -> None:
    sid = await state.create_session(user_id="ada", data={"a": 1, "b": [1]})
    async with state.edit(sid) as draft:
        draft["b"].append(2)
        del draft["a"]
        draft["c"] = 3
        assert await outcome(state, sid)
        await requests_of(state).store_all()
    session = await state.get_session(sid)
    assert session is not None
    assert (session.data, session.user_id) == ({"b": [1, 2], "c": 3}, "ada")
    assert (await state.session_metrics(sid)).requests == 1


async def test_updates_and_metadata_keep_the_requests(state: StateManager) -> None:
    sid = await state.create_session(data={"n": 0}, max_requests=50)
    assert await passed(state, sid, 5) == 5
    await requests_of(state).store_all()
    await state.update_session_data(sid, "n", 1)
    await state.replace_session(sid, {"m": 2}, ttl_seconds=50)
    await state.update_session_metadata(sid, source="app", attributes={"k": 1})
    await state.set_ttl(sid, 500)
    session = await state.get_session(sid)
    assert session is not None
    assert (session.metadata.source, session.metadata.attributes) == ("app", {"k": 1})
    assert (await state.session_metrics(sid)).requests == 5
    assert await passed(state, sid, 100) == 45


async def test_a_session_of_the_largest_size_can_be_counted_and_updated(start: Start) -> None:
    state = await start(session={"max_bytes": 2000})
    sid = await state.create_session(data={"a": bytes(1980)})
    with pytest.raises(ValueTooLarge):
        await state.update_session_data(sid, "a", bytes(2000))
    for _ in range(3):
        async with state.request(sid, "GET /" + "x" * 500):
            pass
        await requests_of(state).store_all()
    await state.update_session_data(sid, "a", bytes(1979))
    with pytest.raises(ValueTooLarge, match="would have 20"):
        await state.update_session_data(sid, "a", bytes(2000))
    assert (await state.session_metrics(sid)).requests == 3


# Storing


async def test_requests_cost_no_commit_each(state: StateManager, clock: ManualClock) -> None:
    sid = await state.create_session()
    before = (await state.stats()).commits
    for _ in range(500):
        assert await outcome(state, sid)
    assert (await state.stats()).commits == before
    clock.advance(31)
    await requests_of(state).look()
    assert (await state.stats()).commits == before + 1


async def test_requests_survive_spill_and_restart(start: Start) -> None:
    state = await start()
    sid = await state.create_session(data={"a": 1})
    await state.record_request(sid, "GET /a", 0.5)
    await state.record_request(sid, "GET /b", 1.5, error="bad")
    await state.spill_session(sid)
    assert (await state.session_metrics(sid)).requests == 2
    await state.close()
    state = await start()
    found = await state.session_metrics(sid)
    assert (found.requests, found.errors, found.total_seconds) == (2, 1, 2.0)
    assert (found.last_name, found.last_error) == ("GET /b", "bad")
    assert found.p99_seconds == pytest.approx(1.5, rel=0.1)


async def test_flushed_requests_survive_a_kill(start: Start, crash: Crash) -> None:
    state = await start()
    sid = await state.create_session()
    await state.record_request(sid, "one", 1.0)
    await state.flush()
    await state.record_request(sid, "two", 1.0)
    state = await start(path=crash(state))
    found = await state.session_metrics(sid)
    assert (found.requests, found.last_name) == (1, "one")


async def test_a_checkpoint_has_the_requests(state: StateManager) -> None:
    sid = await state.create_session(max_requests=10)
    assert await passed(state, sid, 4) == 4
    await state.create_checkpoint()
    assert await passed(state, sid, 4) == 4
    await state.restore_checkpoint()
    assert (await state.session_metrics(sid)).requests == 4
    assert await passed(state, sid, 20) == 6


async def test_requests_that_cannot_be_stored_are_stored_later(
    state: StateManager, files: ScriptedFiles, caplog: pytest.LogCaptureFixture
) -> None:
    sid = await state.create_session()
    await state.record_request(sid, "one", 1.0)
    files.full = True
    await requests_of(state).store_all()
    assert "not stored" in caplog.text
    assert (await state.session_metrics(sid)).requests == 1
    files.full = False
    await state.record_request(sid, "two", 1.0)
    await requests_of(state).store_all()
    assert not requests_of(state).entries[sid].has_news
    assert (await state.session_metrics(sid)).requests == 2


async def test_an_entry_holds_a_tally_only_while_something_is_in_it(state: StateManager) -> None:
    sid = await state.create_session()
    await state.record_request(sid, "one", 1.0)
    assert not _holds_tally(state, sid)  # until it is folded
    assert (await state.session_metrics(sid)).requests == 1
    assert _holds_tally(state, sid)
    await requests_of(state).store_all()
    assert not _holds_tally(state, sid)
    await state.session_metrics(sid)
    await state.session_health(sid)
    assert not _holds_tally(state, sid)


def _holds_tally(state: StateManager, session_id: str) -> bool:
    return requests_of(state).entries[session_id]._tally is not None


async def test_requests_in_flight_are_counted_once(
    state: StateManager, files: ScriptedFiles
) -> None:
    sid = await state.create_session()
    await state.record_request(sid, "one", 1.0)
    files.syncs.hold()
    storing = asyncio.create_task(requests_of(state).store_all())
    await files.syncs.reached()
    await state.record_request(sid, "two", 1.0)
    assert (await state.session_metrics(sid)).requests == 2
    files.syncs.let_pass()
    await storing
    assert (await state.session_metrics(sid)).requests == 2


async def test_what_was_counted_of_a_session_that_ended_is_dropped(state: StateManager) -> None:
    sid = await state.create_session()
    await state.record_request(sid, "one", 1.0)
    await state.terminate_session(sid)
    assert not requests_of(state).entries
    await requests_of(state).store_all()
    assert not await state.has_session(sid)


async def test_what_was_counted_of_a_session_that_expired_is_dropped(
    state: StateManager, clock: ManualClock
) -> None:
    sid = await state.create_session(ttl_seconds=10)
    await state.record_request(sid, "one", 1.0)
    clock.advance(40)
    await requests_of(state).look()
    assert not requests_of(state).entries
    assert not await state.has_session(sid)


async def test_entries_are_bounded_and_nothing_is_lost(
    state: StateManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.requests._MAX_ENTRIES", 5)
    monkeypatch.setattr("persistence.requests._MOST_ENTRIES", 10)
    sids = [await state.create_session(max_requests=5) for _ in range(25)]
    for _ in range(2):
        for sid in sids:
            await state.record_request(sid, "one", 1.0)
            assert len(requests_of(state).entries) <= 10
    assert [(await state.session_metrics(sid)).requests for sid in sids] == [2] * 25
    assert [await passed(state, sid, 9) for sid in sids] == [3] * 25


async def test_a_session_that_ends_while_a_request_waits_for_room_admits_nobody(
    state: StateManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.requests._MOST_ENTRIES", 2)
    sids = [await state.create_session() for _ in range(3)]
    for sid in sids[:2]:
        await state.record_request(sid, "one", 1.0)
    requests, make_room = requests_of(state), requests_of(state).make_room

    async def meanwhile() -> None:
        await make_room()
        await state.terminate_session(sids[2])

    monkeypatch.setattr(requests, "make_room", meanwhile)
    for call in (outcome(state, sids[2]), state.record_error(sids[2], "bad")):
        with pytest.raises(SessionNotFound):
            await call
    assert sids[2] not in requests.entries


async def test_entries_are_bounded_on_a_full_disk_too(
    state: StateManager,
    files: ScriptedFiles,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("persistence.requests._MAX_ENTRIES", 5)
    monkeypatch.setattr("persistence.requests._MOST_ENTRIES", 10)
    sids = [await state.create_session() for _ in range(25)]
    files.full = True
    for sid in sids:
        await state.record_request(sid, "one", 1.0)
        assert len(requests_of(state).entries) <= 10
    assert "forgotten" in caplog.text


async def test_an_idle_worker_does_nothing_for_requests(state: StateManager) -> None:
    sid = await state.create_session()
    assert await outcome(state, sid)
    await requests_of(state).store_all()
    before = (await state.stats()).commits
    await requests_of(state).store_all()
    await state.flush()
    assert (await state.stats()).commits == before


@pytest.mark.parametrize(("fsync", "at_once"), [("interval", 2), ("never", 2), ("always", 30)])
async def test_updates_wait_for_few_of_the_requests_that_the_background_stores(
    start: Start, files: ScriptedFiles, monkeypatch: pytest.MonkeyPatch, fsync: str, at_once: int
) -> None:
    monkeypatch.setattr("persistence.requests._STORED_AFTER_SECONDS", 0)
    state = await start(disk={"fsync": fsync, "flush_interval_seconds": 3600})
    sids = [await state.create_session() for _ in range(30)]
    for sid in sids:
        assert await outcome(state, sid)
    requests = requests_of(state)
    files.writes.hold()
    storing = asyncio.create_task(requests.look(at_once=requests._beside))
    await files.writes.reached()
    await loop_steps(50)
    assert len(commits_of(state).tails) == at_once
    files.open_gates()
    await storing
    assert not any(entry.has_news for entry in requests.entries.values())


async def test_storing_is_spread_over_turns_of_the_loop(
    state: StateManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    sids = [await state.create_session(max_requests=50) for _ in range(200)]
    for sid in sids:
        await state.record_request(sid, "one", 1.0)
    ticks = Ticks()
    begun: Counter[int] = Counter()
    annotate = state._updates.annotate

    async def counted(*args: Any) -> bool:
        begun[ticks.now] += 1
        return await annotate(*args)

    monkeypatch.setattr(state._updates, "annotate", counted)
    await requests_of(state).store_all()
    ticks.stop()
    assert begun.total() == 200
    assert max(begun.values()) <= CALLS_PER_TURN


async def test_requests_are_stored_in_one_batch(state: StateManager, files: ScriptedFiles) -> None:
    sids = [await state.create_session() for _ in range(100)]
    for sid in sids:
        assert await outcome(state, sid)
    before = commits_of(state).batches
    await requests_of(state).store_all()
    assert commits_of(state).batches - before <= 4


# Health and numbers


async def test_health_says_how_a_session_is(start: Start, clock: ManualClock) -> None:
    state = await start(session={"max_bytes": 1000})
    sid = await state.create_session(ttl_seconds=100, data={"a": bytes(100)})
    clock.advance(20)
    await state.record_request(sid, "one", 1.0)
    await state.record_request(sid, "two", 1.0, error="bad")
    clock.advance(10)
    found = await state.session_health(sid)
    assert (found.tier, found.age_seconds, found.idle_seconds) == ("memory", 30.0, 10.0)
    assert (found.left_seconds, found.requests, found.errors) == (90.0, 2, 1)
    assert (found.error_rate, found.recent_error_rate) == (0.5, 0.5)
    assert found.bytes == len(await record_of(state, sid))
    assert found.score == 0.5
    await state.spill_session(sid)
    assert (await state.session_health(sid)).tier == "disk"
    clock.advance(80)  # 10 of 100 seconds are left
    assert (await state.session_health(sid)).score == pytest.approx(0.5 * 10 / 25)


async def test_a_deadline_that_no_access_moves_counts_from_the_creation(
    state: StateManager, clock: ManualClock
) -> None:
    sid = await state.create_session(ttl_seconds=100, auto_renew=False)
    assert (await state.session_health(sid)).score == 1.0
    clock.advance(90)
    assert (await state.session_health(sid)).score == pytest.approx(10 / 25)


@pytest.mark.parametrize("jump", [0.0, 864_000.0, -864_000.0])
@pytest.mark.parametrize("renews", [True, False])
async def test_the_score_tells_an_end_that_no_access_moves_wherever_the_clock_is_set(
    start: Start, clock: ManualClock, jump: float, renews: bool
) -> None:
    state = await start(session={"max_lifetime_seconds": 1000})
    sid = await state.create_session(ttl_seconds=800, auto_renew=renews)
    longer = await state.create_session(ttl_seconds=80_000, auto_renew=renews)
    clock.jump_wall(jump)
    assert (await state.session_health(sid)).score == 1.0
    assert (await state.session_health(longer)).score == 1.0
    clock.advance(700)
    await state.get_session(sid)
    found = await state.session_health(sid)
    assert found.left_seconds == pytest.approx(300 if renews else 100)
    assert found.score == (1.0 if renews else pytest.approx(100 / 200))
    clock.advance(75)
    found = await state.session_health(sid)
    assert found.score == pytest.approx(225 / 250 if renews else 25 / 200)


async def test_stats_add_up_the_requests_of_the_worker(
    state: StateManager, clock: ManualClock
) -> None:
    first, second = await state.create_session(), await state.create_session()
    await state.record_request(first, "a", 1.0)
    await state.record_request(second, "b", 3.0, error="bad")
    async with state.request(first):
        found = (await state.stats()).requests
        assert (found.requests, found.errors, found.running) == (2, 1, 1)
        assert (found.total_seconds, found.unstored_sessions) == (4.0, 2)
        assert 1.0 <= found.seconds.p50 <= found.seconds.p99 <= 3.0


async def test_the_background_stores_what_is_due(
    state: StateManager, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.requests._TICK_SECONDS", 0.01)
    sid = await state.create_session()
    await state.record_request(sid, "one", 1.0)
    clock.advance(60)
    await eventually(lambda: sid not in requests_of(state).entries)
    assert (await state.session_metrics(sid)).requests == 1


async def test_what_is_counted_and_what_is_left_go_with_a_session_that_gets_another_id(
    start: Start,
) -> None:
    state = await start()
    old = await state.create_session(max_requests=10)
    for _ in range(3):
        async with state.request(old, "GET /"):
            pass
    new = await state.rotate_session_id(old)
    assert (await state.session_metrics(new)).requests == 3
    passed = 0
    for _ in range(20):
        with contextlib.suppress(RequestLimitReached):
            async with state.request(new, "GET /"):
                passed += 1
    assert passed == 7


async def test_a_request_in_which_its_session_gets_another_id_is_counted(start: Start) -> None:
    """As at a login: it is the very request that rotates the id."""
    state = await start()
    sid = await state.create_session(max_requests=10)
    async with state.request(sid, "POST /login"):
        new = await state.rotate_session_id(sid)
        assert (await state.session_metrics(new)).running == 1
    metrics = await state.session_metrics(new)
    assert (metrics.requests, metrics.running, metrics.last_name) == (1, 0, "POST /login")
    assert await passed(state, new, 20) == 9
    await state.close()
    state = await start()
    assert (await state.session_metrics(new)).requests == 10


@pytest.mark.parametrize("steps", range(0, 60, 3))
async def test_requests_that_begin_while_the_id_is_rotated_are_counted(
    state: StateManager, steps: int
) -> None:
    old = await state.create_session(max_requests=10)
    may_end = asyncio.Event()
    admitted = 0

    async def request() -> None:
        nonlocal admitted
        await loop_steps(steps)
        with contextlib.suppress(SessionNotFound):
            async with state.request(old, "r"):
                admitted += 1
                await may_end.wait()

    requests = [asyncio.create_task(request()) for _ in range(3)]
    new = await state.rotate_session_id(old)
    assert (await state.session_metrics(new)).running == admitted
    may_end.set()
    await asyncio.gather(*requests)
    assert (await state.session_metrics(new)).requests == admitted
    assert await passed(state, new, 20) == 10 - admitted
    assert old not in requests_of(state).entries


async def test_requests_of_a_session_that_keeps_its_id_after_all_stay_with_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = await start()
    sid = await state.create_session(max_requests=10)
    follow = state._rotations.follow
    assert follow is not None

    async def until_it_is_about_to_end(old_id: str, new_id: str, incarnation: bytes) -> None:
        await follow(old_id, new_id, incarnation)
        raise DiskFull("no space left")

    monkeypatch.setattr(state._rotations, "follow", until_it_is_about_to_end)
    async with state.request(sid, "one"):
        with pytest.raises(DiskFull):
            await state.rotate_session_id(sid)
    assert (await state.session_metrics(sid)).requests == 1
    await state.terminate_session(sid)
    assert not requests_of(state).entries


async def test_a_session_whose_id_is_being_rotated_keeps_what_cannot_be_stored_meanwhile(
    state: StateManager, files: ScriptedFiles
) -> None:
    old = await state.create_session()
    await state.record_request(old, "one", 1.0)
    commits = commits_of(state)
    rotating = asyncio.create_task(state.rotate_session_id(old))
    tail = None
    while tail is None or tail.record is not None:  # until the end of the old id is submitted
        await asyncio.sleep(0)
        tail = commits.tails.get(old)
    await requests_of(state).store_all()
    assert (await state.session_metrics(await rotating)).requests == 1


async def test_resources_are_closed_after_a_request_in_which_the_session_got_another_id(
    state: StateManager,
) -> None:
    sid = await state.create_session()
    closed: list[str] = []
    async with state.request(sid, "POST /login"):
        new = await state.rotate_session_id(sid)
        await state.resources(new, "page", lambda: "page", closed.append)
        await state.spill_session(new)
        assert not closed
    await eventually(lambda: closed == ["page"])
