"""Opening and closing: before, after, in between, cancelled, twice, and in a forked child."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from persistence import StateManager
from persistence.errors import DirectoryLocked, DirectoryNotUsable, ManagerClosed
from tests.engine import (
    KIB,
    Crash,
    ScriptedFiles,
    Start,
    config_for,
    contents,
    data_of,
    directory_of,
    loop_steps,
    names_in,
    outcomes,
)

# Python 3.12 warns of forks; that they do no harm is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

Call = Callable[[StateManager], Awaitable[Any]]


async def iterated(state: StateManager) -> list[str]:
    return [session_id async for session_id in state.iter_sessions()]


async def edited(state: StateManager, session_id: str = "a") -> None:
    async with state.edit(session_id) as draft:
        draft["edited"] = True


CALLS: dict[str, Call] = {
    "create_session": lambda state: state.create_session(),
    "get_session": lambda state: state.get_session("a"),
    "get_session without renewing": lambda state: state.get_session("a", renew=False),
    "get_or_create_session": lambda state: state.get_or_create_session("a"),
    "has_session": lambda state: state.has_session("a"),
    "update_session_data": lambda state: state.update_session_data("a", "x", 1),
    "update_session": lambda state: state.update_session("a", lambda data: data.update(x=1)),
    "update_session_metadata": lambda state: state.update_session_metadata("a", source="x"),
    "replace_session": lambda state: state.replace_session("a", {}),
    "set_ttl": lambda state: state.set_ttl("a", 1),
    "edit": edited,
    "terminate_session": lambda state: state.terminate_session("a"),
    "get_active_sessions": lambda state: state.get_active_sessions(),
    "iter_sessions": iterated,
    "find_sessions": lambda state: state.find_sessions(user_id="ada"),
    "cleanup_expired": lambda state: state.cleanup_expired(),
    "cleanup_old_sessions": lambda state: state.cleanup_old_sessions(1e6),
    "spill_session": lambda state: state.spill_session("a"),
    "restore_session": lambda state: state.restore_session("a"),
    "flush": lambda state: state.flush(),
    "compact": lambda state: state.compact(),
    "stats": lambda state: state.stats(),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


# Before and after


@every_call
async def test_nothing_can_be_asked_before_opening(tmp_path: Path, call: Call) -> None:
    state = StateManager(config=config_for(tmp_path / "state"))
    with pytest.raises(ManagerClosed, match=r"is not open; use it with 'async with'"):
        await call(state)
    assert names_in(tmp_path) == set()
    await state.close()  # there is nothing to close


@every_call
async def test_nothing_can_be_asked_after_closing(state: StateManager, call: Call) -> None:
    await state.create_session(session_id="a")
    await state.close()
    with pytest.raises(ManagerClosed, match="the manager is closed"):
        await call(state)


async def test_a_view_stays_readable_after_closing(state: StateManager) -> None:
    session = await state.get_or_create_session("a", data={"x": [1]})
    await state.close()
    assert session["x"] == [1]
    assert session.expires_at is not None


async def test_a_manager_is_opened_once(state: StateManager) -> None:
    with pytest.raises(ManagerClosed, match="opened once"):
        await state.open()
    await state.close()
    with pytest.raises(ManagerClosed, match="opened once"):
        await state.open()


async def test_a_manager_whose_opening_failed_may_be_opened_later(
    start: Start, tmp_path: Path
) -> None:
    first = await start()
    second = StateManager(config=config_for(tmp_path / "state"))
    with pytest.raises(DirectoryLocked):
        await second.open()
    with pytest.raises(ManagerClosed):
        await second.get_session("a")
    await first.close()
    async with second:
        assert await second.get_active_sessions() == []


async def test_an_opening_that_fails_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "somebody's thesis.doc").write_text("do not touch")
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(DirectoryNotUsable):
            await StateManager(config=config_for(tmp_path / "state")).open()
    assert set(os.listdir("/proc/self/fd")) == before


async def test_an_exception_in_the_block_closes_and_is_passed_on(tmp_path: Path) -> None:
    config = config_for(tmp_path / "state")
    with pytest.raises(ZeroDivisionError):
        async with StateManager(config=config) as state:
            await state.create_session(session_id=str(1 // 0))
    async with StateManager(config=config) as state:
        assert await state.get_active_sessions() == []


async def test_closing_leaves_no_task_no_thread_and_no_file_open(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    tasks = asyncio.all_tasks()
    threads = set(threading.enumerate())  # another test may have left some behind
    async with StateManager(config=config_for(tmp_path / "state")) as state:
        for number in range(50):
            await state.create_session(session_id=str(number))
            await state.spill_session(str(number))
        assert len(await contents(state)) == 50
        assert [each for each in threading.enumerate() if _is_ours(each, threads)]
    assert asyncio.all_tasks() == tasks
    assert set(os.listdir("/proc/self/fd")) == before
    assert not [each for each in threading.enumerate() if _is_ours(each, threads)]


def _is_ours(thread: threading.Thread, before: set[threading.Thread]) -> bool:
    return thread not in before and thread.name.startswith("persistence")


# Opening, cancelled


@pytest.mark.parametrize("steps", [*range(12), 15, 20, 30, 50])
async def test_a_cancelled_opening_lets_go_of_the_directory(tmp_path: Path, steps: int) -> None:
    config = config_for(tmp_path / "state")
    before = set(os.listdir("/proc/self/fd"))
    opening = asyncio.create_task(StateManager(config=config).open())
    await loop_steps(steps)
    opening.cancel()
    (result,) = await outcomes([opening])
    assert isinstance(result, asyncio.CancelledError), "opening needs more steps than that"
    async with StateManager(config=config) as state:
        assert await state.get_active_sessions() == []
    assert set(os.listdir("/proc/self/fd")) == before


# Closing


async def test_closing_twice_is_fine(state: StateManager) -> None:
    await state.close()
    await state.close()


async def test_all_who_close_wait_for_the_same_end(start: Start, files: ScriptedFiles) -> None:
    state = await start()
    files.syncs.hold()
    creating = asyncio.create_task(state.create_session(session_id="a"))
    await files.syncs.reached()
    closings = [asyncio.create_task(state.close()) for _ in range(3)]
    await loop_steps(10)
    assert not any(task.done() for task in closings)
    files.open_gates()
    await asyncio.gather(*closings)
    assert creating.done()
    assert await creating == "a"
    assert await (await start()).has_session("a")


async def test_cancelling_who_closes_does_not_cut_the_closing_short(
    start: Start, files: ScriptedFiles
) -> None:
    state = await start()
    files.syncs.hold()
    creating = asyncio.create_task(state.create_session(session_id="a"))
    await files.syncs.reached()
    closing = asyncio.create_task(state.close())
    await loop_steps(5)
    closing.cancel()
    assert isinstance((await outcomes([closing]))[0], asyncio.CancelledError)
    files.open_gates()
    await state.close()
    assert await creating == "a"
    assert await (await start()).has_session("a")


async def test_what_is_in_flight_at_the_closing_is_decided(
    start: Start, files: ScriptedFiles
) -> None:
    state = await start()
    await state.create_session(session_id="a", data={"x": 0})
    files.syncs.hold()
    updates = [
        asyncio.create_task(state.update_session_data("a", "x", number)) for number in range(1, 9)
    ]
    await files.syncs.reached()
    closing = asyncio.create_task(state.close())
    await loop_steps(5)
    files.open_gates()
    await closing
    assert [session.version for session in await asyncio.gather(*updates)] == list(range(2, 10))
    assert await data_of(await start(), "a") == {"x": 8}


async def test_closing_lets_running_edits_finish_and_no_new_ones_begin(start: Start) -> None:
    state = await start()
    await state.create_session(session_id="a", data={"x": 0})
    edit = state.edit("a")
    draft = await edit.__aenter__()
    waiting = asyncio.create_task(edited(state))
    await loop_steps(3)
    closing = asyncio.create_task(state.close())
    await loop_steps(5)
    with pytest.raises(ManagerClosed):
        await edited(state)
    assert not closing.done()
    draft["x"] = 1
    await edit.__aexit__(None, None, None)
    await closing
    assert isinstance((await outcomes([waiting]))[0], ManagerClosed)
    assert await data_of(await start(), "a") == {"x": 1}


@pytest.mark.parametrize("cold", [False, True], ids=["hot", "cold"])
async def test_an_edit_that_takes_longer_than_the_grace_period_is_refused(
    start: Start, files: ScriptedFiles, cold: bool
) -> None:
    files.tells_cached = not cold
    state = await start(shutdown={"grace_seconds": 0.01})
    await state.create_session(session_id="a", data={"x": 0})
    edit = state.edit("a")
    draft = await edit.__aenter__()
    draft["x"] = 1
    if cold:
        await state.spill_session("a")
    await state.close()
    with pytest.raises(ManagerClosed):
        await edit.__aexit__(None, None, None)
    assert await data_of(await start(), "a") == {"x": 0}


async def test_closing_on_a_full_disk_loses_nothing_that_was_acknowledged(
    start: Start, files: ScriptedFiles
) -> None:
    state = await start()
    await state.create_session(session_id="a", data={"x": 1})
    files.full = True
    await state.close()
    files.full = False
    assert await contents(await start()) == {"a": {"x": 1}}


async def test_closing_after_a_failed_sync_loses_nothing_that_was_acknowledged(
    start: Start, files: ScriptedFiles
) -> None:
    state = await start()
    await state.create_session(session_id="a", data={"x": 1})
    files.sync_error = OSError(5, "Input/output error")
    await outcomes([state.update_session_data("a", "x", 2)])
    await state.close()
    files.sync_error = None
    again = await start()
    assert (await data_of(again, "a"))["x"] in (1, 2)  # that one's outcome is unknown


@pytest.mark.parametrize("steps", [0, 3, 6, 12, 18])
@every_call
async def test_a_call_during_the_closing_ends_well_or_is_refused(
    start: Start, files: ScriptedFiles, call: Call, steps: int
) -> None:
    files.tells_cached = False
    state = await start(memory={"max_bytes": 2 * KIB})
    for name in "abcdef":
        await state.create_session("ada", session_id=name, data={"filler": "x" * 300})
    calls = [asyncio.ensure_future(call(state)) for _ in range(5)]
    await loop_steps(steps)
    closing = asyncio.create_task(state.close())
    async with asyncio.timeout(10):
        results = await outcomes([closing, *calls])
    assert results[0] is None
    refused = [result for result in results if isinstance(result, BaseException)]
    assert [error for error in refused if not isinstance(error, ManagerClosed)] == []
    assert set("bcdef") <= set(await (await start()).get_active_sessions())


@pytest.mark.parametrize("steps", range(0, 40, 4))
async def test_updates_during_the_closing_are_there_if_and_only_if_they_were_acknowledged(
    start: Start, steps: int
) -> None:
    state = await start()
    for number in range(20):
        await state.create_session(session_id=str(number), data={"x": 0})
    updates = [
        asyncio.create_task(state.update_session_data(str(number), "x", 1)) for number in range(20)
    ]
    await loop_steps(steps)
    await state.close()
    results = await outcomes(updates)
    again = await start()
    for number, result in enumerate(results):
        acknowledged = not isinstance(result, BaseException)
        assert acknowledged or isinstance(result, ManagerClosed)
        assert await data_of(again, str(number)) == {"x": int(acknowledged)}


# Forked children


def run_in_child(check: Callable[[], None]) -> int:
    """Fork, run `check` in the child and return its exit code: 0 if it passed."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        signal.alarm(30)
        check()
        code = 0
    finally:
        os._exit(code)


def refusal(call: Call, state: StateManager) -> ManagerClosed | None:
    """Return the refusal that a call raises at once: in the child there is no loop to wait with."""
    coroutine: Any = call(state)
    try:
        coroutine.send(None)
    except ManagerClosed as error:
        return error
    return None


async def test_in_a_forked_child_every_call_is_refused(state: StateManager) -> None:
    await state.create_session(session_id="a")

    def check() -> None:
        for name, call in CALLS.items():
            error = refusal(call, state)
            assert error is not None, name
            assert "another process" in str(error)

    assert run_in_child(check) == 0
    assert await state.has_session("a")


async def test_a_forked_child_takes_nothing_from_its_parent(start: Start, tmp_path: Path) -> None:
    state = await start()
    await state.create_session(session_id="a", data={"x": 1})
    await state.spill_session("a")
    assert run_in_child(lambda: None) == 0  # its end must not unlock, close or write anything

    with pytest.raises(DirectoryLocked):
        await StateManager(config=config_for(tmp_path / "state")).open()
    assert await data_of(state, "a") == {"x": 1}
    await state.update_session_data("a", "x", 2)
    await state.close()
    assert await data_of(await start(), "a") == {"x": 2}


async def test_a_forked_child_does_not_keep_the_directory_locked(
    start: Start, tmp_path: Path
) -> None:
    state = await start()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.read(read, 1)  # lives until it is told to go
        os._exit(0)
    try:
        await state.close()
        await start()
    finally:
        os.write(write, b"x")
        await asyncio.to_thread(os.waitpid, child, 0)
        os.close(read)
        os.close(write)


async def test_a_forked_child_may_open_a_manager_of_its_own(
    state: StateManager, tmp_path: Path
) -> None:
    await state.create_session(session_id="a", data={"of": "the parent"})

    def check() -> None:
        asyncio._set_running_loop(None)
        asyncio.run(own())

    async def own() -> None:
        async with StateManager(config=config_for(tmp_path / "child")) as mine:
            await mine.create_session(session_id="a", data={"of": "the child"})
            assert await contents(mine) == {"a": {"of": "the child"}}
        with pytest.raises(DirectoryLocked):
            await StateManager(config=config_for(directory_of(state))).open()

    assert run_in_child(check) == 0
    assert await contents(state) == {"a": {"of": "the parent"}}


async def test_a_fork_in_the_middle_of_a_commit_harms_nobody(
    start: Start, files: ScriptedFiles, crash: Crash
) -> None:
    state = await start()
    await state.create_session(session_id="a", data={"x": 0})
    files.syncs.hold()
    updates = [
        asyncio.create_task(state.update_session_data("a", "x", number)) for number in (1, 2, 3)
    ]
    await files.syncs.reached()
    assert run_in_child(lambda: None) == 0
    files.open_gates()
    await asyncio.gather(*updates)
    assert await data_of(await start(path=crash(state)), "a") == {"x": 3}
