"""Edits: one editor at a time, all or nothing, and what may happen to the session meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from persistence import ManualClock, Session, SessionDraft, StateManager
from persistence import record as rec
from persistence.errors import (
    ConflictError,
    DiskFull,
    PersistenceError,
    SessionNotFound,
    ValueTooLarge,
)
from tests.engine import (
    KIB,
    Crash,
    ScriptedFiles,
    Start,
    data_of,
    loop_steps,
    outcomes,
)

hot_and_cold = pytest.mark.parametrize("cold", [False, True], ids=["hot", "cold"])

WRITES: dict[str, Callable[[StateManager], Awaitable[Any]]] = {
    "set a field": lambda state: state.update_session_data("a", "x", 9),
    "update": lambda state: state.update_session("a", lambda data: data.update(x=9)),
    "replace": lambda state: state.replace_session("a", {"x": 9}),
    "metadata": lambda state: state.update_session_metadata("a", source="app"),
    "TTL": lambda state: state.set_ttl("a", 9),
    "edit": lambda state: set_in_edit(state, "x", 9),
}
every_write = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())


async def set_in_edit(state: StateManager, name: str, value: Any) -> None:
    async with state.edit("a") as draft:
        draft[name] = value


async def version_of(state: StateManager) -> int:
    session = await state.get_session("a")
    assert session is not None
    return session.version


@pytest.fixture
async def state(start: Start) -> StateManager:
    """A manager with the session "a" in it."""
    state = await start()
    await state.create_session("ada", session_id="a", data={"cart": {"items": [1]}, "x": 1})
    return state


# All or nothing


@hot_and_cold
async def test_an_edit_commits_everything_that_was_changed_in_it(
    state: StateManager, cold: bool, clock: ManualClock
) -> None:
    if cold:
        await state.spill_session("a")
    clock.advance(5)
    async with state.edit("a") as draft:
        draft["cart"]["items"].append(2)
        draft["new"] = (1, {2})
        draft["seen"] = True
        del draft["seen"]
        del draft["x"]
    session = await state.get_session("a")
    assert session is not None
    assert session.data == {"cart": {"items": [1, 2]}, "new": (1, {2})}
    assert (session.version, session.user_id) == (2, "ada")
    assert session.last_accessed.timestamp() == clock.wall()


async def test_an_exception_in_an_edit_leaves_no_trace_and_is_passed_on(
    state: StateManager, files: ScriptedFiles
) -> None:
    writes = files.calls["write_at"]
    with pytest.raises(ZeroDivisionError):
        await in_edit(state, lambda draft: draft["cart"]["items"].append(1 // 0))
    assert await data_of(state, "a") == {"cart": {"items": [1]}, "x": 1}
    assert await version_of(state) == 1
    assert files.calls["write_at"] == writes
    await set_in_edit(state, "x", 2)
    assert await version_of(state) == 2


async def in_edit(state: StateManager, function: Callable[[SessionDraft], object]) -> None:
    async with state.edit("a") as draft:
        function(draft)


async def test_an_edit_that_changes_nothing_is_no_version(
    state: StateManager, files: ScriptedFiles
) -> None:
    writes = files.calls["write_at"]
    await in_edit(state, lambda draft: [draft[name] for name in draft])
    await in_edit(state, lambda draft: draft["cart"]["items"].append(draft["cart"]["items"].pop()))
    await in_edit(state, lambda draft: draft.update(x=1))
    assert await version_of(state) == 1
    assert files.calls["write_at"] == writes


async def test_nobody_sees_an_edit_before_it_is_durable(
    state: StateManager, files: ScriptedFiles
) -> None:
    files.syncs.hold()
    task = asyncio.create_task(set_in_edit(state, "x", 2))
    await files.syncs.reached()
    assert (await data_of(state, "a"))["x"] == 1
    assert not task.done()
    files.open_gates()
    await task
    assert (await data_of(state, "a"))["x"] == 2


async def test_an_edit_that_cannot_be_stored_leaves_no_trace(start: Start) -> None:
    state = await start(session={"max_bytes": 10 * KIB})
    await state.create_session(session_id="a", data={"x": 1})
    with pytest.raises(ValueTooLarge):
        await set_in_edit(state, "x", b"1" * (10 * KIB))
    await set_in_edit(state, "x", 2)
    assert await data_of(state, "a") == {"x": 2}
    assert await version_of(state) == 2


# The draft


async def test_a_draft_is_a_mutable_mapping(state: StateManager) -> None:
    async with state.edit("a") as draft:
        assert isinstance(draft, SessionDraft)
        assert list(draft) == ["cart", "x"]
        assert len(draft) == 2
        assert draft.get("missing", 7) == 7
        assert draft.setdefault("x", 5) == 1
        assert draft.setdefault("y", 5) == 5
        assert draft.pop("y") == 5
        assert draft.pop("y", None) is None
        assert "y" not in draft
        with pytest.raises(KeyError):
            draft["y"]
        with pytest.raises(KeyError):
            del draft["y"]
        draft.clear()
        assert dict(draft) == {}
        draft.update(b=2, a=1)
    assert list((await data_of(state, "a")).items()) == [("b", 2), ("a", 1)]


async def test_the_names_of_many_fields_are_not_worked_out_for_each_of_them(
    state: StateManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {f"field {number}": number for number in range(2000)}
    await state.create_session(session_id="large", data=data)
    decoded: list[bytes] = []
    decode = rec._decoded_shape

    def counted(packed: bytes, **options: bool) -> Any:
        decoded.append(packed)
        return decode(packed, **options)

    monkeypatch.setattr(rec, "_decoded_shape", counted)
    session = await state.get_session("large")
    assert session is not None
    assert {name: session[name] for name in session if name in session} == data
    assert [session.get(name) for name in session.keys()] == session.values()  # noqa: SIM118
    assert len(session) == 2000
    await state.update_session("large", lambda draft: draft.clear())
    assert await data_of(state, "large") == {}
    assert len(decoded) < 10


async def test_a_draft_can_be_cleared_and_filled_again(state: StateManager) -> None:
    async with state.edit("a") as draft:
        draft["new"] = 1
        del draft["cart"]
        draft.clear()
        assert (dict(draft), "x" in draft, len(draft)) == ({}, False, 0)
        draft["x"] = 5
        draft["other"] = 6
    assert await data_of(state, "a") == {"x": 5, "other": 6}
    with pytest.raises(ConflictError, match="has ended"):
        draft.clear()


async def test_what_is_read_in_a_draft_is_the_same_object_each_time(state: StateManager) -> None:
    async with state.edit("a") as draft:
        assert draft["cart"] is draft["cart"]


async def test_a_draft_is_of_no_use_after_its_edit(state: StateManager) -> None:
    async with state.edit("a") as draft:
        assert draft["x"] == 1
    uses: list[Callable[[], object]] = [
        lambda: draft["x"],
        lambda: draft["cart"],
        lambda: draft.get("x"),
        lambda: draft.update(x=5),
        draft.popitem,
        lambda: list(draft),
        lambda: len(draft),
    ]
    for use in uses:
        with pytest.raises(ConflictError, match="this edit has ended"):
            use()
    assert await version_of(state) == 1


async def test_a_draft_is_of_no_use_after_a_failed_edit_either(state: StateManager) -> None:
    kept: list[SessionDraft] = []

    def fail(draft: SessionDraft) -> None:
        kept.append(draft)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await in_edit(state, fail)
    with pytest.raises(ConflictError):
        kept[0]["x"] = 2


# One editor at a time


async def test_editors_come_one_after_the_other_in_the_order_in_which_they_asked(
    state: StateManager,
) -> None:
    order: list[str] = []

    async def edit(number: int) -> None:
        async with state.edit("a") as draft:
            order.append(f"{number} in")
            draft["x"] += 1
            await loop_steps(3)
            order.append(f"{number} out")

    await asyncio.gather(*(edit(number) for number in range(20)))
    assert order == [f"{number} {way}" for number in range(20) for way in ("in", "out")]
    assert (await data_of(state, "a"))["x"] == 21
    assert await version_of(state) == 21


async def test_the_next_editor_need_not_wait_for_the_disk(
    state: StateManager, files: ScriptedFiles
) -> None:
    files.syncs.hold()
    first = asyncio.create_task(set_in_edit(state, "x", 2))
    await files.syncs.reached()
    async with state.edit("a") as draft:
        assert draft["x"] == 2, "an editor builds on what is in flight"
        draft["x"] = 3
        files.open_gates()
    await first
    assert (await data_of(state, "a"))["x"] == 3
    assert await version_of(state) == 3


@every_write
async def test_other_writers_wait_for_the_editor(
    state: StateManager, write: Callable[[StateManager], Awaitable[Any]]
) -> None:
    async with state.edit("a") as draft:
        writing = asyncio.ensure_future(write(state))
        await loop_steps(10)
        assert not writing.done()
        draft["x"] = 2
        draft["edited"] = True
    await writing
    assert await version_of(state) == (2 if write is WRITES["TTL"] else 3)
    assert (await data_of(state, "a")).get("edited") is not (
        None if write is not WRITES["replace"] else True
    )


async def test_sessions_do_not_wait_for_each_others_editors(state: StateManager) -> None:
    await state.create_session(session_id="b", data={"x": 1})
    async with state.edit("a"):
        await state.update_session_data("b", "x", 2)
        async with state.edit("b") as draft:
            draft["x"] = 3
    assert await data_of(state, "b") == {"x": 3}


async def test_readers_do_not_wait_for_the_editor(state: StateManager) -> None:
    async with state.edit("a") as draft:
        draft["x"] = 2
        assert (await data_of(state, "a"))["x"] == 1
        assert await state.has_session("a")
        assert await state.get_active_sessions() == ["a"]
        assert await state.spill_session("a")
        assert await state.restore_session("a")
    assert (await data_of(state, "a"))["x"] == 2


@every_write
async def test_a_second_write_by_the_editing_task_is_a_conflict_and_does_not_wait(
    state: StateManager, write: Callable[[StateManager], Awaitable[Any]]
) -> None:
    async with state.edit("a") as draft:
        draft["x"] = 2
        with pytest.raises(ConflictError, match="by this very task"):
            await write(state)
    assert await data_of(state, "a") == {"cart": {"items": [1]}, "x": 2}
    assert await version_of(state) == 2


async def test_an_editor_that_is_cancelled_while_it_waits_leaves_the_line(
    state: StateManager,
) -> None:
    async with state.edit("a") as draft:
        tasks = [asyncio.create_task(set_in_edit(state, f"by {number}", 1)) for number in range(4)]
        await loop_steps(3)
        tasks[0].cancel()
        tasks[2].cancel()
        draft["x"] = 2
    await outcomes(tasks)
    assert set(await data_of(state, "a")) == {"cart", "x", "by 1", "by 3"}


async def test_waiting_for_a_session_that_ends_meanwhile_finds_nothing(
    state: StateManager,
) -> None:
    edit = state.edit("a")
    await edit.__aenter__()
    waiting = [asyncio.ensure_future(write(state)) for write in WRITES.values()]
    await loop_steps(3)
    assert await state.terminate_session("a")
    with pytest.raises(SessionNotFound):
        await edit.__aexit__(None, None, None)
    results = await outcomes(waiting)
    assert results.pop(list(WRITES).index("TTL")) is False
    assert all(isinstance(result, SessionNotFound) for result in results)


# The session ends during the edit


async def test_a_termination_does_not_wait_for_the_editor_whose_commit_then_fails(
    start: Start, state: StateManager, crash: Crash
) -> None:
    edit = state.edit("a")
    draft = await edit.__aenter__()
    draft["x"] = 2
    assert await state.terminate_session("a") is True
    assert await state.get_session("a") is None
    with pytest.raises(SessionNotFound):
        await edit.__aexit__(None, None, None)
    assert await state.get_session("a") is None
    again = await start(path=crash(state))
    assert await again.get_active_sessions() == []


@pytest.mark.parametrize("changes", [True, False])
async def test_a_new_session_of_the_same_name_is_not_touched_by_the_old_ones_edit(
    state: StateManager, changes: bool
) -> None:
    edit = state.edit("a")
    draft = await edit.__aenter__()
    if changes:
        draft["x"] = 2
    await state.terminate_session("a")
    await state.create_session(session_id="a", data={"fresh": True})
    with pytest.raises(SessionNotFound):
        await edit.__aexit__(None, None, None)
    assert await data_of(state, "a") == {"fresh": True}
    assert await version_of(state) == 1


async def test_the_same_holds_while_end_and_new_beginning_are_in_flight(
    state: StateManager, files: ScriptedFiles
) -> None:
    edit = state.edit("a")
    draft = await edit.__aenter__()
    draft["x"] = 2
    files.syncs.hold()
    ending = asyncio.create_task(state.terminate_session("a"))
    await files.syncs.reached()
    beginning = asyncio.create_task(state.create_session(session_id="a", data={"fresh": True}))
    await loop_steps(3)
    leaving = asyncio.create_task(edit.__aexit__(None, None, None))
    await loop_steps(5)
    files.open_gates()
    results = await outcomes([ending, beginning, leaving])
    assert results[:2] == [True, "a"]
    assert isinstance(results[2], SessionNotFound)
    assert await data_of(state, "a") == {"fresh": True}


async def test_an_edit_made_of_a_version_that_failed_does_not_commit_it(
    state: StateManager, files: ScriptedFiles
) -> None:
    await state.create_session(session_id="b")
    files.syncs.hold()
    other = asyncio.create_task(state.update_session_data("b", "x", 1))
    await files.syncs.reached()
    update = asyncio.create_task(state.update_session_data("a", "x", "failed"))
    await loop_steps(2)
    edit = state.edit("a")
    draft = await edit.__aenter__()
    assert draft["x"] == "failed"
    files.full = True
    files.open_gates()
    await other
    assert isinstance((await outcomes([update]))[0], DiskFull)
    files.full = False
    draft["y"] = 1
    with pytest.raises(PersistenceError):
        await edit.__aexit__(None, None, None)
    assert await data_of(state, "a") == {"cart": {"items": [1]}, "x": 1}
    assert await version_of(state) == 1
    await set_in_edit(state, "x", 2)
    assert await version_of(state) == 2


# Everything at once


async def test_concurrent_edits_and_updates_of_a_few_sessions_are_all_counted(
    start: Start,
) -> None:
    state = await start(memory={"max_bytes": 4 * KIB}, disk={"queue_bytes": 8 * KIB})
    for name in "abcd":
        await state.create_session(session_id=name, data={"count": 0, "filler": "x" * 500})

    def increment(draft: SessionDraft) -> None:
        draft["count"] += 1

    async def edit(name: str, steps: int) -> None:
        async with state.edit(name) as draft:
            count = draft["count"]
            await loop_steps(steps)
            draft["count"] = count + 1

    calls: list[Awaitable[Any]] = []
    for number in range(200):
        name = "abcd"[number % 4]
        calls.append(edit(name, number % 3) if number % 5 else state.spill_session(name))
        calls.append(state.update_session(name, increment))
    results = await outcomes(calls)
    assert [result for result in results if isinstance(result, BaseException)] == []
    sessions = [await state.get_session(name) for name in "abcd"]
    counts = [session["count"] for session in sessions if isinstance(session, Session)]
    assert counts == [90, 90, 90, 90]


WITHIN: dict[str, Callable[[StateManager], Coroutine[Any, Any, Any]]] = {
    "set a field": lambda state: state.update_session_data("a", "y", 9),
    "TTL": lambda state: state.set_ttl("a", 9),
    "terminate": lambda state: state.terminate_session("a"),
}


@pytest.mark.parametrize("within", WITHIN.values(), ids=WITHIN.keys())
@pytest.mark.parametrize("in_flight", [False, True], ids=["at rest", "in flight"])
async def test_what_an_update_starts_in_its_function_is_not_undone_by_it(
    state: StateManager,
    within: Callable[[StateManager], Coroutine[Any, Any, Any]],
    *,
    in_flight: bool,
) -> None:
    call = within(state)

    def function(draft: SessionDraft) -> None:
        draft["x"] = 2
        call.send(None)  # as far as it comes without waiting: what an eager task does

    before = [asyncio.ensure_future(set_in_edit(state, "z", 1))] if in_flight else []
    await loop_steps(2)
    with pytest.raises(ConflictError, match="while the function that changes it ran"):
        await state.update_session("a", function)
    await state.flush()
    await outcomes(before)
    with pytest.raises(StopIteration):
        call.send(None)
    session = await state.get_session("a", renew=False)
    if within is WITHIN["terminate"]:
        assert session is None
        return
    assert session is not None
    assert session["x"] == 1
    assert session.get("y") == (9 if within is WITHIN["set a field"] else None)
    assert session.ttl_seconds == (9 if within is WITHIN["TTL"] else 3600)
