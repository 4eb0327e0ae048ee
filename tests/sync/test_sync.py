"""Sessions kept by threads: everything that the asynchronous manager does, and what threads add."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from persistence import ManualClock, SessionChange, SessionDraft, StateManager, sync
from persistence.errors import (
    ConflictError,
    InvalidArgument,
    InvalidSessionId,
    ManagerClosed,
    SessionNotFound,
    ValueNotSerializable,
    WrongEventLoop,
)
from persistence.sync import loop as loops
from tests.engine import ScriptedFiles, config_for
from tests.full_size import full_or
from tests.sync.conftest import Opened

PATIENCE_SECONDS = 20


def add_one(data: SessionDraft) -> None:
    data["n"] += 1


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    for _ in range(int(PATIENCE_SECONDS / 0.002)):
        if condition():
            return
        time.sleep(0.002)
    raise AssertionError("it did not come about")


# --- as the asynchronous manager ----------------------------------------------------------------


def test_a_session_lives_through_every_kind_of_call(opened: Opened, tmp_path: Path) -> None:
    state = opened(checkpoint={"store": str(tmp_path / "store")})
    sid = state.create_session(user_id="ada", data={"cart": []})
    state.update_session_data(sid, "page", "/")
    state.update_session(sid, lambda data: data["cart"].append("Dune"))
    with state.edit(sid) as draft:
        draft["cart"].append("Ubik")
        del draft["page"]
    session = state.get_session(sid)
    assert session is not None
    assert (session.version, session.data) == (4, {"cart": ["Dune", "Ubik"]})
    assert state.has_session(sid)
    assert state.set_ttl(sid, 100)
    assert state.replace_session(sid, {"a": 1}).data == {"a": 1}
    assert state.update_session_metadata(sid, source="web").metadata.source == "web"
    assert state.find_sessions(user_id="ada") == [sid]
    assert state.get_active_sessions() == [sid]
    assert state.spill_session(sid)
    assert state.restore_session(sid)
    state.flush()
    info = state.create_checkpoint()
    assert state.terminate_session(sid)
    assert state.get_session(sid) is None
    assert state.restore_checkpoint(info.id).sessions == 1
    assert state.get_or_create_session(sid)["a"] == 1
    state.delete_checkpoint(info.id)
    assert state.list_checkpoints() == []
    assert state.stats().sessions == 1
    assert state.cleanup_expired() == 0


def test_what_was_acknowledged_is_there_for_the_next_manager(opened: Opened) -> None:
    first = opened()
    sid = first.create_session(data={"n": 0})
    first.update_session(sid, add_one)
    first.close()
    session = opened().get_session(sid)
    assert session is not None
    assert session["n"] == 1


def test_errors_are_those_of_the_asynchronous_manager(state: sync.StateManager) -> None:
    sid = state.create_session(data={"n": 0})
    with pytest.raises(SessionNotFound):
        state.update_session("nobody", add_one)
    with pytest.raises(SessionNotFound), state.edit("nobody"):
        raise AssertionError("nobody was edited")
    with pytest.raises(InvalidSessionId):
        state.get_session("")
    for wrong in (["s"], None, 7):
        with pytest.raises(InvalidSessionId):
            state.get_session(wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidSessionId):
            state.update_session(wrong, add_one)  # type: ignore[arg-type]
    with pytest.raises(ValueNotSerializable):
        state.update_session(sid, lambda data: data.update(n=object()))
    with pytest.raises(InvalidArgument, match="function"):
        state.update_session(sid, "no function")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="awaitable"):
        state.update_session(sid, lambda data: asyncio.sleep(0))
    with pytest.raises(TypeError):
        state.create_session(nonsense=1)  # type: ignore[call-arg]
    with pytest.raises(ZeroDivisionError):
        state.update_session(sid, lambda data: 1 / 0)
    session = state.get_session(sid)
    assert session is not None
    assert (session.version, session["n"]) == (1, 0)


def test_an_update_that_changes_nothing_makes_no_version(state: sync.StateManager) -> None:
    sid = state.create_session(data={"n": 0})
    assert state.update_session(sid, lambda data: data["n"]).version == 1
    with state.edit(sid) as draft:
        draft["n"] = 0
    session = state.get_session(sid)
    assert session is not None
    assert session.version == 1


def test_a_block_that_is_left_twice_or_was_never_entered_says_so(state: sync.StateManager) -> None:
    sid = state.create_session(data={"n": 0})
    block = state.edit(sid)
    for _ in range(2):  # it may be entered again
        with pytest.raises(InvalidArgument, match="never entered"):
            block.__exit__(None, None, None)
        with block as draft:
            draft["n"] += 1
    session = state.get_session(sid)
    assert session is not None
    assert session["n"] == 2


def test_an_exception_in_a_block_leaves_no_trace(state: sync.StateManager) -> None:
    sid = state.create_session(data={"n": 0})
    with pytest.raises(ZeroDivisionError), state.edit(sid) as draft:
        draft["n"] = 1 / 0
    assert state.update_session(sid, add_one)["n"] == 1


def test_a_function_runs_in_the_callers_thread(state: sync.StateManager) -> None:
    """Where its database connection, its request and its locks are."""
    sid = state.create_session(data={"n": 0})
    threads = []
    state.update_session(sid, lambda data: threads.append(threading.current_thread()))
    assert threads == [threading.current_thread()]


def test_an_update_of_a_cold_session_works_too(state: sync.StateManager) -> None:
    sid = state.create_session(data={"n": 0})
    state.spill_session(sid)
    assert state.update_session(sid, add_one)["n"] == 1
    state.spill_session(sid)
    assert state.update_session(sid, lambda data: None)["n"] == 1


# --- many threads -------------------------------------------------------------------------------


@pytest.mark.parametrize("sessions", [1, 3, 8])
def test_no_update_of_eight_threads_is_lost(state: sync.StateManager, sessions: int) -> None:
    ids = [state.create_session(data={"n": 0}) for _ in range(sessions)]
    each = full_or(10_000, 60)
    returned: list[list[tuple[str, int]]] = [[] for _ in range(8)]

    def work(number: int) -> None:
        for count in range(each):
            session = state.update_session(ids[(number + count) % sessions], add_one)
            returned[number].append((session.id, session["n"]))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    counted = [each for some in returned for each in some]
    assert len(counted) == len(set(counted)) == 8 * each, "each got a number of its own"
    total = 0
    for sid in ids:
        session = state.get_session(sid)
        assert session is not None
        assert session["n"] == session.version - 1
        total += session["n"]
    assert total == 8 * each


def test_edits_and_updates_of_many_threads_exclude_each_other(state: sync.StateManager) -> None:
    sid = state.create_session(data={"n": 0, "m": 0})

    def work(number: int) -> None:
        for _ in range(15):
            if number % 2:
                with state.edit(sid) as draft:
                    draft["n"] += 1
                    draft["m"] += 1
            else:
                state.update_session(sid, lambda data: data.update(n=data["n"] + 1))

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))
    session = state.get_session(sid)
    assert session is not None
    assert session.data == {"n": 90, "m": 45}


def test_readers_see_whole_versions_while_others_write(state: sync.StateManager) -> None:
    sid = state.create_session(data={"a": 0, "b": 0})
    done = threading.Event()
    wrong: list[dict[str, Any]] = []

    def read() -> None:
        last = 0
        while not done.wait(0.0005):  # whoever never waits keeps the others from the lock
            session = state.get_session(sid)
            assert session is not None
            data = session.data
            if data["a"] != data["b"] or data["a"] < last:
                wrong.append(data)
            last = data["a"]

    readers = [in_thread(read) for _ in range(3)]
    for count in range(1, 60):
        state.update_session(sid, lambda data, count=count: data.update(a=count, b=count))  # type: ignore[misc]
        if count % 20 == 0:
            state.spill_session(sid)
    done.set()
    for thread in readers:
        thread.join(PATIENCE_SECONDS)
    assert wrong == []


def test_a_thread_is_refused_what_it_holds_itself(state: sync.StateManager) -> None:
    sid = state.create_session(data={"n": 0})
    with state.edit(sid) as draft:
        draft["n"] = 1
        with pytest.raises(ConflictError, match="thread"):
            state.update_session(sid, add_one)
        with pytest.raises(ConflictError, match="thread"), state.edit(sid):
            raise AssertionError("edited twice")
    assert state.update_session(sid, add_one)["n"] == 2


def test_another_thread_waits_for_the_edit(state: sync.StateManager) -> None:
    sid = state.create_session(data={"n": 0})
    results: list[int] = []
    with state.edit(sid) as draft:
        waiting = in_thread(lambda: results.append(state.update_session(sid, add_one)["n"]))
        until(lambda: bool(state._manager._updates.locks.holders[sid].waiters))
        draft["n"] = 10
    waiting.join(PATIENCE_SECONDS)
    assert results == [11]


# --- hot reads ----------------------------------------------------------------------------------


def test_a_hot_read_needs_no_other_thread(
    state: sync.StateManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    sid = state.create_session(data={"n": 1})
    monkeypatch.setattr(loops.LoopThread, "ask", None)
    session = state.get_session(sid)
    assert session is not None
    assert session["n"] == 1
    monkeypatch.undo()


def test_a_hot_read_renews(state: sync.StateManager, clock: ManualClock) -> None:
    sid = state.create_session(ttl_seconds=100)
    for _ in range(5):
        clock.advance(60)
        session = state.get_session(sid)
        assert session is not None
        assert session.expires_at is not None
        assert session.expires_at.timestamp() == pytest.approx(clock.wall() + 100)
        looked = state.get_session(sid, renew=False)
        assert looked is not None
        assert looked.last_accessed == session.last_accessed
    clock.advance(101)
    assert state.get_session(sid) is None


def test_a_read_near_the_deadline_renews_at_once(
    state: sync.StateManager, clock: ManualClock
) -> None:
    sid = state.create_session(ttl_seconds=100)
    for _ in range(3):
        clock.advance(99)
        assert state.get_session(sid) is not None
        deadline = state._manager._memory.deadline(sid)
        assert deadline == pytest.approx(state._manager._time.now() + 100)


def test_a_fixed_deadline_holds(state: sync.StateManager, clock: ManualClock) -> None:
    sid = state.create_session(ttl_seconds=100, auto_renew=False)
    clock.advance(60)
    assert state.get_session(sid) is not None
    clock.advance(41)
    assert state.get_session(sid) is None


def test_hot_reads_are_counted_and_keep_a_session_in_memory(
    state: sync.StateManager, clock: ManualClock
) -> None:
    old, new = state.create_session(), state.create_session()
    clock.advance(1)
    for _ in range(7):
        state.get_session(old)
    assert state.stats().hits == 7
    assert state._manager._memory.victims(0, 1) == [new]


def test_what_ended_is_absent_for_hot_reads_at_once(state: sync.StateManager) -> None:
    sid = state.create_session()
    assert state.get_session(sid) is not None
    state.terminate_session(sid)
    assert state.get_session(sid) is None
    state.close()
    with pytest.raises(ManagerClosed):
        state.get_session(sid)


# --- streams ------------------------------------------------------------------------------------


def test_sessions_are_iterated_while_they_come_and_go(state: sync.StateManager) -> None:
    ids = [state.create_session(session_id=f"s {number}") for number in range(600)]
    seen = []
    for number, sid in enumerate(state.iter_sessions("s ")):
        seen.append(sid)
        if number % 50 == 0:
            state.create_session()
    assert sorted(seen) == sorted(ids)
    with state.iter_sessions() as some:
        assert next(some)
    assert list(some) == []


def test_changes_are_watched_from_a_thread(state: sync.StateManager) -> None:
    sid = state.create_session(data={"n": 0})
    changes: list[SessionChange] = []
    stream = state.watch(sid)
    watching = in_thread(lambda: changes.extend(stream))
    for _ in range(5):
        state.update_session(sid, add_one)
    state.terminate_session(sid)
    watching.join(PATIENCE_SECONDS)
    assert [change.version for change in changes] == [2, 3, 4, 5, 6, 6]
    assert changes[-1].is_end
    assert list(stream) == []


def test_a_waiting_watcher_is_ended_by_close_of_either(opened: Opened) -> None:
    state = opened()
    sid = state.create_session()
    one, two = state.watch(sid), state.watch()
    threads = [in_thread(lambda: list(one)), in_thread(lambda: list(two))]
    until(lambda: state._manager._watching.is_on)
    one.close()
    threads[0].join(PATIENCE_SECONDS)
    state.close()
    threads[1].join(PATIENCE_SECONDS)
    assert not any(thread.is_alive() for thread in threads)


def test_a_signal_handler_begins_the_grace_period_whatever_it_interrupts(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here, a call of its own thread that has not been handed over yet."""
    state = opened()
    thread = state._thread
    assert thread is not None
    stream = state.watch()
    post = thread._post

    def interrupted(callback: Callable[[], Any]) -> None:
        monkeypatch.setattr(thread, "_post", post)
        state.start_grace()
        post(callback)

    monkeypatch.setattr(thread, "_post", interrupted)
    found: list[bool] = []
    calling = in_thread(lambda: found.append(state.has_session("s")))
    calling.join(PATIENCE_SECONDS)
    assert found == [False]
    assert list(stream) == []
    other = sync.StateManager(config=config_for(tmp_path / "other"))
    other.start_grace()  # of one that is not open: nothing
    with other:
        other.watch().close()
    other.start_grace()


def test_wrong_arguments_of_a_watch_are_refused_by_the_call(state: sync.StateManager) -> None:
    with pytest.raises(InvalidSessionId):
        state.watch("")
    with pytest.raises(SessionNotFound):
        next(state.watch("nobody"))


# --- event loops --------------------------------------------------------------------------------


async def test_a_call_from_a_running_event_loop_is_refused(tmp_path: Path) -> None:
    state = sync.StateManager(config=config_for(tmp_path / "state"))
    with pytest.raises(WrongEventLoop, match="to_thread"):
        state.open()
    await asyncio.to_thread(state.open)
    sid = await asyncio.to_thread(state.create_session)
    for call in (
        lambda: state.get_session(sid),
        lambda: state.get_session("cold"),
        lambda: state.update_session(sid, add_one),
        lambda: state.edit(sid).__enter__(),
        state.iter_sessions,
        lambda: state.watch(sid),
        lambda: state.as_mapping()[sid],
    ):
        with pytest.raises(WrongEventLoop, match="to_thread"):
            call()
    state.close()  # this one waits for nobody's loop but its own


async def test_threads_of_an_application_that_runs_a_loop_may_call(tmp_path: Path) -> None:
    state = sync.StateManager(config=config_for(tmp_path / "state"))
    await asyncio.to_thread(state.open)
    sid = await asyncio.to_thread(state.create_session, data={"n": 0})

    def handle() -> int:
        with state.edit(sid) as draft:
            draft["n"] += 1
        session = state.get_session(sid)
        assert session is not None
        return int(session["n"])

    numbers = await asyncio.gather(*(asyncio.to_thread(handle) for _ in range(20)))
    assert max(numbers) == 20
    await asyncio.to_thread(state.close)


def test_a_callback_on_the_engines_own_thread_is_refused_and_not_stuck(
    opened: Opened, tmp_path: Path
) -> None:
    state = opened(checkpoint={"store": str(tmp_path / "store")})
    sid = state.create_session(data={"n": 0})
    errors: list[BaseException] = []

    def progress(*_: object) -> None:
        try:
            state.get_session(sid, renew=False)
        except WrongEventLoop as error:
            errors.append(error)

    state.create_checkpoint(on_progress=progress)
    assert errors
    assert "own thread" in str(errors[0])


@pytest.mark.parametrize("name", ["persistence-api", "persistence-loop"])
def test_a_thread_of_the_application_may_have_any_name(state: sync.StateManager, name: str) -> None:
    with ThreadPoolExecutor(1, thread_name_prefix=name) as threads:
        sid = threads.submit(state.create_session).result(PATIENCE_SECONDS)
    named = threading.Thread(target=lambda: state.terminate_session(sid), name=name)
    named.start()
    named.join(PATIENCE_SECONDS)
    assert not state.has_session(sid)


def test_an_asynchronous_manager_in_another_loop_names_the_way_out(tmp_path: Path) -> None:
    state = StateManager(config=config_for(tmp_path / "state"))
    theirs = asyncio.new_event_loop()
    serving = in_thread(theirs.run_forever)
    asyncio.run_coroutine_threadsafe(state.open(), theirs).result()

    async def handle() -> None:
        await state.create_session()

    try:
        with pytest.raises(WrongEventLoop, match=r"persistence\.sync\.StateManager"):
            asyncio.run(handle())
    finally:
        asyncio.run_coroutine_threadsafe(state.close(), theirs).result()
        theirs.call_soon_threadsafe(theirs.stop)
        serving.join()
        theirs.close()


# --- opening, closing, letting go ---------------------------------------------------------------


def test_before_and_after_it_is_open_every_call_is_refused(tmp_path: Path) -> None:
    state = sync.StateManager(config=config_for(tmp_path / "state"))
    for _ in range(2):
        with pytest.raises(ManagerClosed):
            state.get_session("s")
        with pytest.raises(ManagerClosed):
            state.update_session("s", add_one)
        with pytest.raises(ManagerClosed), state.edit("s"):
            raise AssertionError("edited")
        with pytest.raises(ManagerClosed):
            state.watch()
        if state._thread is None:
            state.close()  # of what was never opened: nothing
            state.open()
            state.close()
            state.close()
    with pytest.raises(ManagerClosed, match="once"):
        state.open()


def test_a_directory_that_is_taken_leaves_no_thread(opened: Opened, tmp_path: Path) -> None:
    opened()
    before = threading.active_count()
    other = sync.StateManager(config=config_for(tmp_path / "state"))
    with pytest.raises(Exception, match="another"):
        other.open()
    assert threading.active_count() == before
    with pytest.raises(ManagerClosed):
        other.get_session("s")


def test_closing_waits_for_what_is_under_way(opened: Opened, files: ScriptedFiles) -> None:
    state = opened()
    sid = state.create_session(data={"n": 0})
    files.writes.hold()
    results: list[int] = []
    updating = in_thread(lambda: results.append(state.update_session(sid, add_one)["n"]))
    until(lambda: sid in state._manager._commits.tails)
    closing = in_thread(state.close)
    until(lambda: not state._manager._is_open)
    files.writes.let_pass()
    updating.join(PATIENCE_SECONDS)
    closing.join(PATIENCE_SECONDS)
    assert results == [1]


def test_a_close_with_a_wrong_duration_is_refused_and_closes_nothing(opened: Opened) -> None:
    state = opened()
    sid = state.create_session()
    with pytest.raises(InvalidArgument, match="grace_seconds = 'soon'"):
        state.close(grace_seconds="soon")  # type: ignore[arg-type]
    assert state.has_session(sid)


def test_an_open_edit_is_waited_for_and_then_given_up(opened: Opened) -> None:
    state = opened()
    sid = state.create_session(data={"n": 0})
    block = state.edit(sid)
    draft = block.__enter__()
    closing = in_thread(state.close)
    until(lambda: not state._manager._is_open)
    state.close(grace_seconds=0)
    closing.join(PATIENCE_SECONDS)
    assert not closing.is_alive()
    draft["n"] = 1
    with pytest.raises(ManagerClosed):
        block.__exit__(None, None, None)


@pytest.mark.parametrize("where", ["loop", "writer", "reader"])
def test_a_garbage_collection_on_the_engines_threads_may_close_it(
    opened: Opened, where: str
) -> None:
    """A holder whose finalizer closes the manager, collected where the engine is at work."""
    state = opened()
    sid = state.create_session(data={"n": 0})
    thread = state._thread
    assert thread is not None
    threads = state._manager._disk.threads
    closed_in: list[str] = []
    refused: list[BaseException] = []

    class Holder:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            try:
                state.update_session(sid, add_one)
            except WrongEventLoop as error:
                refused.append(error)
            state.close()
            closed_in.append(threading.current_thread().name)

    collect: Callable[[], object] = gc.collect
    if where == "writer":
        collect = partial(threads.write, gc.collect)
    elif where == "reader":
        collect = partial(threads.read, gc.collect)
    gc.collect()
    gc.disable()
    try:
        Holder()
        thread.post(collect)
        until(lambda: bool(closed_in))
    finally:
        gc.enable()
    assert closed_in[0].startswith(f"persistence-{where}")
    assert len(refused) == 1
    thread._thread.join(PATIENCE_SECONDS)
    assert not thread._thread.is_alive()
    session = opened().get_session(sid)
    assert session is not None
    assert session["n"] == 0


def test_one_that_nobody_closes_says_so_and_is_closed(tmp_path: Path) -> None:
    state = sync.StateManager(config=config_for(tmp_path / "state"))
    state.open()
    assert state._thread is not None
    thread = state._thread._thread
    managers = [state]
    del state
    with pytest.warns(ResourceWarning, match="not closed"):
        managers.clear()
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()


def test_calls_that_come_while_it_closes_are_all_answered(opened: Opened) -> None:
    state = opened()
    sid = state.create_session(data={"n": 0})
    outcomes: list[str] = []

    def work() -> None:
        while True:
            try:
                state.update_session(sid, add_one)
                state.has_session(sid)
            except ManagerClosed:
                outcomes.append("closed")
                return

    threads = [in_thread(work) for _ in range(6)]
    until(lambda: (state.get_session(sid) or {"n": 0})["n"] > 20)
    state.close()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert outcomes == ["closed"] * 6


# --- interruptions ------------------------------------------------------------------------------


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Interrupt this (the main) thread, as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_interrupted_update_is_decided_all_the_same(
    state: sync.StateManager, files: ScriptedFiles
) -> None:
    sid = state.create_session(data={"n": 0})
    files.writes.hold()
    with pytest.raises(KeyboardInterrupt), interrupted_after(0.1):
        state.update_session(sid, add_one)
    files.writes.let_pass()
    state.flush()
    session = state.get_session(sid)
    assert session is not None
    assert session["n"] == 1


def test_an_interrupted_wait_for_an_edit_leaves_no_lock(state: sync.StateManager) -> None:
    sid = state.create_session(data={"n": 0})
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with state.edit(sid) as draft:
            inside.set()
            leave.wait(PATIENCE_SECONDS)
            draft["n"] = 5

    holding = in_thread(hold)
    inside.wait(PATIENCE_SECONDS)
    with pytest.raises(KeyboardInterrupt), interrupted_after(0.1), state.edit(sid):
        raise AssertionError("edited")
    leave.set()
    holding.join(PATIENCE_SECONDS)
    assert state.update_session(sid, add_one)["n"] == 6
    assert len(state._manager._updates.locks) == 0


def test_a_block_that_was_entered_while_its_wait_was_interrupted_is_left(
    state: sync.StateManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes when the answer is there already: whatever its handler raises."""
    sid = state.create_session(data={"n": 0})
    thread = state._thread
    assert thread is not None
    run = thread.run

    def interrupted(begin: Callable[[], Any]) -> Any:
        run(begin)
        raise TimeoutError("of a framework")

    monkeypatch.setattr(thread, "run", interrupted)
    with pytest.raises(TimeoutError), state.edit(sid) as draft:
        draft["n"] = 1
    monkeypatch.undo()
    assert state.update_session(sid, add_one)["n"] == 1
    assert len(state._manager._updates.locks) == 0
