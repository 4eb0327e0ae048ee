"""Cancelling a call at every step of it: the outcome is definite, and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from persistence import StateManager
from tests.engine import (
    KIB,
    Crash,
    ScriptedFiles,
    Start,
    commits_of,
    contents,
    data_of,
    loop_steps,
    memory_of,
    outcomes,
)

STEPS = range(24)
SYNCING = -1  # instead of a number of steps: until it waits for the disk, however long that takes
OLD: dict[str, Any] = {"x": 1, "cart": [1]}

Call = Callable[[StateManager, str], Awaitable[Any]]


async def edit(state: StateManager, session_id: str) -> None:
    async with state.edit(session_id) as draft:
        draft["cart"].append(2)
        await loop_steps(3)
        draft["x"] = 2


async def iterate(state: StateManager, session_id: str) -> list[str]:
    return [name async for name in state.iter_sessions(prefix=session_id)]


NEW: dict[str, Any] = {"x": 2, "cart": [1, 2]}

WRITES: dict[str, tuple[Call, Any]] = {
    "create": (lambda state, name: state.create_session(session_id=f"{name} new", data=NEW), NEW),
    "get or create": (
        lambda state, name: state.get_or_create_session(f"{name} new", data=NEW),
        NEW,
    ),
    "set a field": (
        lambda state, name: state.update_session_data(name, "x", 2),
        {"x": 2, "cart": [1]},
    ),
    "update": (lambda state, name: state.update_session(name, lambda data: data.update(NEW)), NEW),
    "replace": (lambda state, name: state.replace_session(name, NEW), NEW),
    "edit": (edit, NEW),
    "set the TTL": (lambda state, name: state.set_ttl(name, 50), OLD),
    "terminate": (lambda state, name: state.terminate_session(name), None),
}
"""Each write, and what the session is after it. The first two make a session of another name."""
READS: dict[str, Call] = {
    "get": lambda state, name: state.get_session(name),
    "restore": lambda state, name: state.restore_session(name),
    "spill": lambda state, name: state.spill_session(name),
    "has": lambda state, name: state.has_session(name),
    "list": iterate,
    "find": lambda state, name: state.find_sessions(user_id=name),
    "flush": lambda state, name: state.flush(),
    "clean up": lambda state, name: state.cleanup_expired(),
    "stats": lambda state, name: state.stats(),
}


async def assert_nothing_left_behind(state: StateManager) -> None:
    """No lock, no place in the queue, no account and no session is stuck."""
    async with asyncio.timeout(10):
        await state.flush()
        commits = commits_of(state)
        assert commits.tails == {}
        assert commits.pending_bytes == 0
        assert len(state._updates.locks) == 0
        memory_of(state).check()
        for name in await state.get_active_sessions():
            await state.update_session_data(name, "after", True)
            await edit_anything(state, name)


async def edit_anything(state: StateManager, session_id: str) -> None:
    async with state.edit(session_id) as draft:
        draft.pop("after")


async def cancelled_after(
    state: StateManager, files: ScriptedFiles, call: Call, name: str, steps: int, *, times: int = 1
) -> Any:
    """Run a call, cancel it after some steps with the disk held still; return what became of it."""
    files.syncs.hold()
    task = asyncio.ensure_future(call(state, name))
    if steps == SYNCING:
        await files.syncs.reached()
    else:
        await loop_steps(steps)
    for _ in range(times):
        task.cancel()
        await loop_steps(1)
    files.open_gates()
    (result,) = await outcomes([task])
    assert isinstance(result, asyncio.CancelledError) or not isinstance(result, BaseException)
    return result


@pytest.mark.parametrize("cold", [False, True], ids=["hot", "cold"])
@pytest.mark.parametrize("kind", WRITES)
async def test_a_write_cancelled_at_any_step_happens_whole_or_not_at_all(
    start: Start, files: ScriptedFiles, crash: Crash, kind: str, cold: bool
) -> None:
    files.tells_cached = False
    call, after = WRITES[kind]
    state = await start()
    results: list[Any] = []
    expected: dict[str, Any] = {}
    for steps in (*STEPS, SYNCING):
        name = str(steps)
        await state.create_session(session_id=name, data=OLD)
        if cold:
            await state.spill_session(name)
        result = await cancelled_after(state, files, call, name, steps, times=1 + steps % 2)
        await state.flush()
        now = await contents(state)
        creates = "create" in kind
        target, before = (f"{name} new", None) if creates else (name, OLD)
        assert now.get(target) in (before, after)
        if not isinstance(result, BaseException):
            assert now.get(target) == after
        results.append(now.get(target))
        expected |= {key: data for key, data in now.items() if key in (name, target)}
    assert await contents(state) == expected
    assert await contents(await start(path=crash(state))) == expected
    await assert_nothing_left_behind(state)
    assert before in results, "some were cancelled in time"
    assert after in results, "some came too late for that"


@pytest.mark.parametrize("call", READS.values(), ids=READS.keys())
async def test_a_read_cancelled_at_any_step_changes_nothing(
    start: Start, files: ScriptedFiles, call: Call
) -> None:
    files.tells_cached = False
    state = await start()
    for steps in STEPS:
        name = str(steps)
        await state.create_session(name, session_id=name, data=OLD)
        await state.spill_session(name)
        await cancelled_after(state, files, call, name, steps)
        assert await data_of(state, name) == OLD
    await assert_nothing_left_behind(state)
    assert len(await contents(state)) == len(STEPS)


@pytest.mark.parametrize("call", [call for call, _ in WRITES.values()], ids=WRITES.keys())
async def test_a_write_cancelled_while_the_queue_is_full_leaves_no_hole_in_it(
    start: Start, files: ScriptedFiles, crash: Crash, call: Call
) -> None:
    state = await start(disk={"queue_bytes": KIB})
    await state.create_session(session_id="full", data=OLD)
    for steps in range(0, 24, 2):
        name = str(steps)
        await state.create_session(session_id=name, data=OLD)
        files.syncs.hold()
        filling = [
            asyncio.create_task(state.update_session_data("full", "x", "x" * 500)) for _ in range(6)
        ]
        await files.syncs.reached()
        tasks = [asyncio.ensure_future(call(state, name)) for _ in range(3)]
        await loop_steps(steps)
        tasks[0].cancel()
        tasks[1].cancel()
        await loop_steps(steps % 3)
        files.open_gates()
        async with asyncio.timeout(10):
            await asyncio.gather(*filling)
            await outcomes(tasks)
    await assert_nothing_left_behind(state)
    assert await contents(await start(path=crash(state))) == await contents(state)


async def test_an_update_that_was_submitted_is_decided_although_nobody_waits_any_more(
    start: Start, files: ScriptedFiles, crash: Crash
) -> None:
    state = await start()
    await state.create_session(session_id="a", data={"x": 0})
    files.syncs.hold()
    tasks = [
        asyncio.create_task(state.update_session_data("a", "x", number)) for number in range(1, 6)
    ]
    await files.syncs.reached()
    for task in tasks:
        task.cancel()
    await outcomes(tasks)
    assert await data_of(state, "a") == {"x": 0}
    files.open_gates()
    await state.flush()
    assert await data_of(state, "a") == {"x": 5}
    assert await data_of(await start(path=crash(state)), "a") == {"x": 5}


async def test_cancelling_one_update_of_a_chain_does_not_touch_the_others(
    start: Start, files: ScriptedFiles
) -> None:
    state = await start()
    await state.create_session(session_id="a", data={})
    files.syncs.hold()
    tasks = [
        asyncio.create_task(state.update_session_data("a", str(number), number))
        for number in range(9)
    ]
    await files.syncs.reached()
    for number in (0, 4, 8):
        tasks[number].cancel()
    files.open_gates()
    results = await outcomes(tasks)
    for number, result in enumerate(results):
        assert isinstance(result, asyncio.CancelledError) is (number in (0, 4, 8))
    await state.flush()
    assert await data_of(state, "a") == {str(number): number for number in range(9)}


async def test_a_timeout_around_an_update_is_like_any_cancellation(
    start: Start, files: ScriptedFiles
) -> None:
    state = await start()
    await state.create_session(session_id="a", data={"x": 1})
    files.syncs.hold()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await state.update_session_data("a", "x", 2)
    files.open_gates()
    await state.flush()
    assert await data_of(state, "a") == {"x": 2}


async def test_10000_cancels_cross_no_replies_and_leak_nothing(
    start: Start, files: ScriptedFiles
) -> None:
    state = await start(memory={"max_bytes": 8 * KIB}, disk={"queue_bytes": 8 * KIB})
    names = [str(number) for number in range(50)]
    for name in names:
        await state.create_session(session_id=name, data={"name": name, "x": "x" * 100})

    async def check(name: str, number: int) -> None:
        if number % 3:
            session = await state.get_session(name)
        else:
            session = await state.update_session_data(name, "number", number)
        assert session is not None
        assert (session.id, session["name"]) == (name, name)

    for round_number in range(100):
        tasks = [
            asyncio.create_task(check(names[number % 50], number + round_number))
            for number in range(200)
        ]
        await loop_steps(round_number % 4)
        for task in tasks[:: 2 - round_number % 2]:
            task.cancel()
        results = await outcomes(tasks)
        assert not [result for result in results if isinstance(result, Exception)]
    await assert_nothing_left_behind(state)
    assert {name: data["name"] for name, data in (await contents(state)).items()} == {
        name: name for name in names
    }
