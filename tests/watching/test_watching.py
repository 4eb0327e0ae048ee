"""Watching one worker's sessions: every version, in order, nothing missed in silence."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from persistence import ManualClock, SessionChange, StateManager, SystemClock, Watch, worker
from persistence.errors import (
    DiskFull,
    InvalidArgument,
    InvalidSessionId,
    ManagerClosed,
    SessionNotFound,
    WrongEventLoop,
)
from tests.engine import ScriptedFiles, Start, commits_of, config_for, eventually, residency_of

PATIENCE_SECONDS = 10


async def following(watch: Watch, count: int) -> list[SessionChange]:
    """Return the next changes."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        return [await anext(watch) for _ in range(count)]


async def rest_of(watch: Watch) -> list[SessionChange]:
    """Return all changes until the stream ends."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        return [change async for change in watch]


async def shown(watch: Watch, count: int) -> list[tuple[int, str, set[str] | None]]:
    """Return version, kind and fields of the next changes."""
    return [
        (change.version, change.kind, None if change.fields is None else set(change.fields))
        for change in await following(watch, count)
    ]


async def begun(state: StateManager, session_id: str, **options: Any) -> Watch:
    """Return a watch whose first change has been asked for: it has looked at the session."""
    watch = state.watch(session_id, **options)
    first = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    for _ in range(10):
        await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    return watch


# --- one session --------------------------------------------------------------------------------


async def test_every_way_of_changing_a_session_is_told_with_its_fields(state: StateManager) -> None:
    sid = await state.create_session(data={"a": 1, "b": [], "c": 0})
    watch = state.watch(sid)
    await state.update_session_data(sid, "a", 2)
    await state.update_session(sid, lambda data: data["b"].append(1))
    async with state.edit(sid) as draft:
        draft["a"] = 3
        draft["new"] = 1
        del draft["c"]
    await state.replace_session(sid, {"a": 3, "z": 1})
    await state.replace_session(sid, {"a": 3, "z": 2}, ttl_seconds=60)
    await state.update_session_metadata(sid, source="web")
    assert await shown(watch, 6) == [
        (2, "updated", {"a"}),
        (3, "updated", {"b"}),
        (4, "updated", {"a", "new", "c"}),
        (5, "updated", {"b", "new", "z"}),
        (6, "updated", {"z"}),
        (7, "updated", set()),
    ]


async def test_what_changes_nothing_is_not_told(state: StateManager) -> None:
    sid = await state.create_session(data={"a": 1})
    watch = state.watch(sid)
    await state.update_session(sid, lambda data: data.update(a=1))
    await state.set_ttl(sid, 1000)
    await state.get_session(sid)
    await state.spill_session(sid)
    await state.restore_session(sid)
    await state.flush()
    await state.update_session_data(sid, "a", 2)
    [change] = await following(watch, 1)
    assert change == SessionChange(sid, 2, "updated", frozenset({"a"}))


async def test_it_listens_from_the_call_on(state: StateManager) -> None:
    sid = await state.create_session(data={"a": 1})
    await state.update_session_data(sid, "a", 2)
    watch = state.watch(sid)
    await state.update_session_data(sid, "a", 3)
    assert [change.version for change in await following(watch, 1)] == [3]


async def test_a_cold_session_is_watched_from_the_call_on_too(state: StateManager) -> None:
    sid = await state.create_session(data={"a": 1, "b": 1})
    await state.spill_session(sid)
    watch = state.watch(sid)
    await state.update_session_data(sid, "b", 2)
    await state.spill_session(sid)
    await state.update_session_data(sid, "a", 2)
    assert await shown(watch, 2) == [(2, "updated", {"b"}), (3, "updated", {"a"})]


async def test_only_acknowledged_versions_are_told(
    state: StateManager, files: ScriptedFiles
) -> None:
    sid = await state.create_session(data={"n": 0})
    watch = state.watch(sid)
    files.writes.hold()
    updating = asyncio.create_task(state.update_session_data(sid, "n", 1))
    await files.writes.reached()
    waiting = asyncio.ensure_future(anext(watch))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    files.writes.let_pass()
    assert (await waiting).version == 2
    await updating


async def test_an_update_that_fails_is_not_told(state: StateManager, files: ScriptedFiles) -> None:
    sid = await state.create_session(data={"n": 0})
    watch = state.watch(sid)
    files.full = True
    with pytest.raises(DiskFull):
        await state.update_session_data(sid, "n", 1)
    files.full = False
    await state.update_session_data(sid, "n", 2)
    assert await shown(watch, 1) == [(2, "updated", {"n"})]


async def test_versions_of_many_writers_come_in_order_and_complete(state: StateManager) -> None:
    sid = await state.create_session(data={f"f{number}": 0 for number in range(8)})
    watch = state.watch(sid)

    async def write(field: str) -> None:
        for count in range(1, 26):
            await state.update_session_data(sid, field, count)

    await asyncio.gather(*(write(f"f{number}") for number in range(8)))
    changes = await following(watch, 200)
    assert [change.version for change in changes] == list(range(2, 202))
    assert {change.skipped for change in changes} == {0}
    counted = [next(iter(change.fields or ())) for change in changes]
    assert sorted(counted) == sorted(f"f{number}" for number in range(8) for _ in range(25))


async def test_a_slow_reader_is_told_what_it_missed(state: StateManager) -> None:
    sid = await state.create_session(data={"a": 0, "b": 0})
    watch = state.watch(sid, max_pending=2)
    for count in range(1, 6):
        await state.update_session_data(sid, "a" if count < 3 else "b", count)
    await state.terminate_session(sid)
    changes = await rest_of(watch)
    assert [(each.version, each.kind, each.skipped) for each in changes] == [
        (2, "updated", 0),
        (6, "updated", 3),
        (6, "terminated", 0),
    ]
    assert changes[1].fields == frozenset({"a", "b"})


async def test_several_watchers_get_the_same(state: StateManager) -> None:
    sid = await state.create_session(data={"a": 0})
    watches = [state.watch(sid) for _ in range(3)]
    await state.update_session_data(sid, "a", 1)
    await state.terminate_session(sid)
    one, two, three = [await rest_of(watch) for watch in watches]
    assert one == two == three
    assert [change.kind for change in one] == ["updated", "terminated"]


# --- the cursor ---------------------------------------------------------------------------------


async def test_a_cursor_tells_at_once_what_was_missed(state: StateManager) -> None:
    sid = await state.create_session(data={"a": 0})
    for count in range(1, 5):
        await state.update_session_data(sid, "a", count)
    watch = state.watch(sid, after=2)
    [missed] = await following(watch, 1)
    assert missed == SessionChange(sid, 5, "updated", None, skipped=2)
    await state.update_session_data(sid, "a", 9)
    assert await shown(watch, 1) == [(6, "updated", {"a"})]


async def test_a_cursor_at_the_newest_version_tells_nothing_twice(state: StateManager) -> None:
    sid = await state.create_session(data={"a": 0})
    watch = state.watch(sid, after=1)
    await state.update_session_data(sid, "a", 1)
    assert [(await anext(watch)).version] == [2]
    again = state.watch(sid, after=2)
    await asyncio.sleep(0)
    await state.update_session_data(sid, "a", 2)
    assert [change.version for change in await following(again, 1)] == [3]


async def test_a_cursor_of_what_is_no_more_is_a_reset(state: StateManager) -> None:
    sid = await state.create_session(data={"a": 0})
    assert await shown(state.watch(sid, after=7), 1) == [(1, "reset", None)]


async def test_reading_by_cursor_again_and_again_misses_nothing(state: StateManager) -> None:
    """Clients that drop and come back, while the session changes all the time."""
    chance = random.Random(7)
    sid = await state.create_session(data={"n": 0})
    last = 150

    async def write() -> None:
        for count in range(1, last):
            await state.update_session_data(sid, "n", count)
            if chance.random() < 0.3:
                await asyncio.sleep(0)

    writing = asyncio.create_task(write())
    seen = 1
    while seen < last:
        async with state.watch(sid, after=seen, max_pending=chance.randint(1, 5)) as watch:
            for change in await following(watch, chance.randint(1, min(4, last - seen))):
                assert change.version == seen + 1 + change.skipped
                seen = change.version
                if seen == last:
                    break
            else:
                await asyncio.sleep(0)
    await writing


# --- ends ---------------------------------------------------------------------------------------


async def test_the_stream_ends_with_the_session(state: StateManager) -> None:
    sid = await state.create_session(data={"a": 0})
    watch = state.watch(sid)
    await state.update_session_data(sid, "a", 1)
    assert await state.terminate_session(sid)
    await state.create_session(session_id=sid)
    assert [(change.version, change.kind) for change in await rest_of(watch)] == [
        (2, "updated"),
        (2, "terminated"),
    ]
    assert await rest_of(watch) == []


async def test_a_waiting_reader_hears_of_the_end(state: StateManager) -> None:
    sid = await state.create_session()
    reading = asyncio.create_task(rest_of(state.watch(sid)))
    await asyncio.sleep(0)
    await state.terminate_session(sid)
    assert [change.kind for change in await reading] == ["terminated"]


async def test_the_stream_ends_at_the_deadline_although_nobody_looks(start: Start) -> None:
    state = await start(clock=SystemClock())
    sid = await state.create_session(ttl_seconds=0.05)
    [change] = await rest_of(state.watch(sid))
    assert (change.kind, change.version, change.local) == ("expired", 1, True)
    assert not await state.has_session(sid)


async def test_a_renewed_session_is_not_ended(start: Start, clock: ManualClock) -> None:
    state = await start()
    sid = await state.create_session(ttl_seconds=100)
    watch = await begun(state, sid)
    clock.advance(60)
    await state.get_session(sid)
    clock.advance(60)
    await state.cleanup_expired()
    await state.update_session_data(sid, "a", 1)
    assert [change.kind for change in await following(watch, 1)] == ["updated"]
    clock.advance(101)
    assert [change.kind for change in await rest_of(watch)] == ["expired"]


async def test_a_shorter_ttl_ends_the_stream_sooner(start: Start) -> None:
    state = await start(clock=SystemClock())
    sid = await state.create_session(ttl_seconds=1000)
    watch = await begun(state, sid)
    await state.set_ttl(sid, 0.05)
    assert [change.kind for change in await rest_of(watch)] == ["expired"]


async def test_removing_idle_sessions_is_a_termination(start: Start, clock: ManualClock) -> None:
    state = await start()
    sid = await state.create_session(ttl_seconds=0)
    watch = await begun(state, sid)
    clock.advance(100)
    assert await state.cleanup_old_sessions(50) == 1
    assert [change.kind for change in await rest_of(watch)] == ["terminated"]


async def test_a_missing_session_cannot_be_watched(start: Start, clock: ManualClock) -> None:
    state = await start()
    watch = state.watch("nobody")
    with pytest.raises(SessionNotFound):
        await anext(watch)
    assert await rest_of(watch) == []
    sid = await state.create_session(ttl_seconds=10)
    clock.advance(11)
    with pytest.raises(SessionNotFound):
        await anext(state.watch(sid))
    assert not state._watching.is_on


async def test_wrong_arguments_are_named(state: StateManager) -> None:
    with pytest.raises(InvalidSessionId):
        state.watch("")
    with pytest.raises(InvalidArgument, match="after"):
        state.watch("s", after=-1)
    with pytest.raises(InvalidArgument, match="session_id"):
        state.watch(after=3)
    with pytest.raises(InvalidArgument, match="max_pending"):
        state.watch("s", max_pending=0)


# --- coming and going ---------------------------------------------------------------------------


async def test_closing_ends_the_streams_and_waits_for_no_reader(start: Start) -> None:
    state = await start()
    sid = await state.create_session(data={"a": 0})
    idle, reading = state.watch(sid), asyncio.create_task(rest_of(state.watch(sid)))
    everything = asyncio.create_task(rest_of(state.watch()))
    await asyncio.sleep(0)
    await state.update_session_data(sid, "a", 1)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await state.close()
    for changes in (await reading, await everything, await rest_of(idle)):
        assert [change.version for change in changes] == [2]
    with pytest.raises(ManagerClosed):
        state.watch(sid)


async def test_streams_end_when_the_grace_period_begins(state: StateManager) -> None:
    """A server waits for its handlers before it closes the manager; they wait for changes."""
    sid = await state.create_session()
    reading = asyncio.create_task(rest_of(state.watch(sid)))
    await asyncio.sleep(0)
    state.start_grace()
    assert await reading == []
    await state.update_session_data(sid, "a", 1)  # all else goes on until it is closed
    with pytest.raises(ManagerClosed, match="closing"):
        state.watch(sid)


async def test_the_grace_period_is_begun_in_the_managers_thread_only(state: StateManager) -> None:
    watch = state.watch(await state.create_session(session_id="s"))
    with pytest.raises(WrongEventLoop, match="another event loop"):
        await asyncio.to_thread(state.start_grace)
    await state.update_session_data("s", "n", 1)
    assert [change.version for change in await following(watch, 1)] == [2]


async def test_a_signal_handler_begins_the_grace_period(state: StateManager) -> None:
    sid = await state.create_session()
    reading = asyncio.create_task(rest_of(state.watch(sid)))
    before = signal.signal(signal.SIGUSR1, lambda *_: state.start_grace())
    try:
        for _ in range(2):  # a second signal does no harm
            signal.raise_signal(signal.SIGUSR1)
        assert await reading == []
        await state.close()
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


async def test_a_manager_that_is_not_open_has_no_grace_period(tmp_path: Path) -> None:
    state = StateManager(config=config_for(tmp_path / "state"))
    state.start_grace()
    async with state:
        assert state._grace._end is None
        sid = await state.create_session()
        watch = state.watch(sid)
        await state.update_session_data(sid, "n", 1)
        assert [change.version for change in await following(watch, 1)] == [2]
    state.start_grace()


def test_a_worker_is_not_held_up_by_its_streams(tmp_path: Path) -> None:
    """Its handlers are tasks of their own, which nobody cancels; main waits for them."""
    ended: list[list[SessionChange]] = []

    async def main(state: StateManager) -> None:
        sid = await state.create_session()
        handler = asyncio.create_task(rest_of(state.watch(sid)))
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(await handler)

    config = config_for(tmp_path / "state", shutdown={"grace_seconds": 60})
    began = SystemClock.monotonic()
    worker.run(main, config)
    assert ended == [[]]
    assert SystemClock.monotonic() - began < 10


async def on_another_loop(call: Callable[[], Awaitable[object]]) -> None:
    """Make a call in a thread that runs an event loop of its own."""

    async def made() -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await call()

    await asyncio.to_thread(asyncio.run, made())


@pytest.mark.parametrize("is_of_all", [False, True])
async def test_a_stream_is_read_on_its_managers_loop_only(
    state: StateManager, is_of_all: bool
) -> None:
    sid = await state.create_session()
    watch = state.watch(None if is_of_all else sid)

    async def take() -> None:
        watch.waiting()

    for call in (lambda: anext(watch), take, watch.aclose):
        with pytest.raises(WrongEventLoop, match="another event loop"):
            await on_another_loop(call)
    await state.update_session_data(sid, "n", 1)
    assert [change.version for change in await following(watch, 1)] == [2]


@pytest.mark.parametrize("is_of_all", [False, True])
async def test_a_reader_that_cannot_be_told_is_ended_and_hurts_nobody(
    state: StateManager, caplog: pytest.LogCaptureFixture, is_of_all: bool
) -> None:
    sid = await state.create_session()
    session_id = None if is_of_all else sid
    broken, healthy = state.watch(session_id), state.watch(session_id)

    class Full(deque[SessionChange]):
        def append(self, change: SessionChange) -> None:
            raise MemoryError

    broken._mailbox._pending = Full()
    await state.update_session_data(sid, "n", 1)
    await state.update_session_data(sid, "n", 2)
    assert [change.version for change in await following(healthy, 2)] == [2, 3]
    assert await rest_of(broken) == []
    assert "a stream of changes is ended" in caplog.text


async def test_a_change_that_cannot_be_worked_out_fails_no_update(
    state: StateManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await state.create_session(), await state.create_session()
    ended, everything, other = state.watch(one), state.watch(), state.watch(two)

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("persistence.watching.watching._fields", broken)
        await state.update_session_data(one, "n", 1)
    assert await rest_of(ended) == await rest_of(everything) == []
    assert "ZeroDivisionError" in caplog.text
    await state.update_session_data(one, "n", 2)
    await state.update_session_data(two, "n", 1)
    assert [change.version for change in await following(other, 1)] == [2]
    again = state.watch(one)
    await state.update_session_data(one, "n", 3)
    assert [change.version for change in await following(again, 1)] == [4]


async def test_who_lets_go_of_a_stream_costs_nothing_any_more(state: StateManager) -> None:
    sid = await state.create_session(data={"n": 0})
    await state.update_session_data(sid, "n", 1)
    async for _ in state.watch(sid, after=1):
        break
    async with state.watch():
        assert state._watching.is_on
    gc.collect()
    await eventually(lambda: not state._watching.is_on)
    assert state._watching.topics == {}


async def test_watching_and_leaving_all_the_time_leaves_nothing_behind(state: StateManager) -> None:
    for _ in range(700):
        sid = await state.create_session(ttl_seconds=3600)
        async with await begun(state, sid) if _ % 100 == 0 else state.watch(sid, after=0) as watch:
            await following(watch, 1) if _ % 100 else None
    assert len(state._watching._due) <= 300
    assert not state._watching.is_on


async def test_a_cancelled_reader_can_go_on(state: StateManager) -> None:
    sid = await state.create_session(data={"n": 0})
    watch = await begun(state, sid)
    await state.update_session_data(sid, "n", 1)
    assert [change.version for change in await following(watch, 1)] == [2]


async def test_an_exception_in_the_readers_loop_harms_nobody(state: StateManager) -> None:
    sid = await state.create_session(data={"n": 0})

    async def fail() -> None:
        async for _ in state.watch(sid):
            raise RuntimeError("reader")

    other = state.watch(sid)
    failing = asyncio.create_task(fail())
    await asyncio.sleep(0)
    await state.update_session_data(sid, "n", 1)
    with pytest.raises(RuntimeError, match="reader"):
        await failing
    await state.update_session_data(sid, "n", 2)
    assert [change.version for change in await following(other, 2)] == [2, 3]


# --- all sessions -------------------------------------------------------------------------------


async def test_all_sessions_are_told_from_beginning_to_end(
    start: Start, clock: ManualClock
) -> None:
    state = await start()
    before = await state.create_session(data={"x": 1})
    watch = state.watch()
    one = await state.create_session(data={"a": 1}, ttl_seconds=10)
    await state.update_session_data(before, "x", 2)
    await state.update_session_metadata(before, source="web")
    await state.set_ttl(before, 500)
    await state.terminate_session(before)
    clock.advance(11)
    await state.cleanup_expired()
    changes = await following(watch, 5)
    assert [(each.session_id, each.version, each.kind) for each in changes] == [
        (one, 1, "created"),
        (before, 2, "updated"),
        (before, 3, "updated"),
        (before, 3, "terminated"),
        (one, 1, "expired"),
    ]
    assert [set(each.fields or ()) for each in changes] == [{"a"}, {"x"}, set(), set(), set()]


async def test_a_reader_of_all_that_is_too_slow_is_told_where_and_how_much(
    state: StateManager,
) -> None:
    watch = state.watch(max_pending=3)
    ids = [await state.create_session() for _ in range(10)]
    changes = await following(watch, 4)
    assert [each.session_id for each in changes] == [*ids[:3], ""]
    assert (changes[-1].kind, changes[-1].skipped) == ("gap", 7)


# --- a restored checkpoint ----------------------------------------------------------------------


async def test_a_restored_checkpoint_resets_what_is_watched(state: StateManager) -> None:
    kept = await state.create_session(data={"n": 0})
    info = await state.create_checkpoint()
    later = await state.create_session(data={"n": 0})
    await state.update_session_data(kept, "n", 1)
    watch, gone, everything = state.watch(kept), state.watch(later), state.watch()
    await state.restore_checkpoint(info.id)
    await state.update_session_data(kept, "n", 7)
    assert await shown(watch, 2) == [(1, "reset", None), (2, "updated", {"n"})]
    assert [change.kind for change in await rest_of(gone)] == ["terminated"]
    assert [(each.session_id, each.kind) for each in await following(everything, 2)] == [
        ("", "reset"),
        (kept, "updated"),
    ]


# --- what it costs who does not watch -----------------------------------------------------------


async def test_who_does_not_watch_is_not_asked_about_each_commit(
    state: StateManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(state._watching, "acknowledged", lambda some: asked.append(len(some)))
    sid = await state.create_session(data={"n": 0})
    for count in range(10):
        await state.update_session_data(sid, "n", count)
    assert asked == []
    watch = state.watch(sid)
    await state.update_session_data(sid, "n", -1)
    assert asked == [1]
    await watch.aclose()


async def test_a_watched_session_can_leave_memory(state: StateManager) -> None:
    """Watching holds no data: the budget of the memory tier is all there is."""
    sid = await state.create_session(data={"n": 0, "filler": "x" * 1000})
    watch = await begun(state, sid)
    await state.spill_session(sid)
    assert residency_of(state).resident(sid) is None
    assert commits_of(state).tails == {}
    await state.update_session_data(sid, "n", 1)
    assert await shown(watch, 1) == [(2, "updated", {"n"})]
