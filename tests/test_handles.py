"""What a handle reaches beside the data: requests, resources, a directory and the changes of one
session only."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from persistence import ClientInfo, ManualClock, SessionChange, StateManager, Watch, errors
from persistence.access import SessionHandle
from tests.engine import Start, eventually

CLIENT = ClientInfo("203.0.113.9", "Mozilla/5.0")


async def a_handle(state: StateManager, sid: str, **ttl: float) -> SessionHandle:
    return await state.open_session(sid, state.issue_token(sid, CLIENT, **ttl), CLIENT)


async def use_request(handle: SessionHandle) -> None:
    async with handle.request("GET /page"):
        pass


async def use_resources(handle: SessionHandle) -> None:
    await handle.resources("connection", object)


async def use_scratch_dir(handle: SessionHandle) -> None:
    await handle.scratch_dir()


async def use_watch(handle: SessionHandle) -> None:
    async with asyncio.timeout(5):
        await anext(handle.watch())


CALLS: dict[str, Callable[[SessionHandle], Coroutine[Any, Any, None]]] = {
    "request": use_request,
    "resources": use_resources,
    "scratch_dir": use_scratch_dir,
    "watch": use_watch,
}


async def test_a_request_through_a_handle_is_its_session_s(state: StateManager) -> None:
    sid = await state.create_session(data={"n": 1}, max_requests=1)
    handle = await a_handle(state, sid)
    async with handle.request("GET /page") as request:
        assert (request.session.id, request.session["n"]) == (sid, 1)
    metrics = await state.session_metrics(sid)
    assert (metrics.requests, metrics.last_name) == (1, "GET /page")
    with pytest.raises(errors.RequestLimitReached):
        await use_request(handle)


async def test_an_error_of_another_session_in_a_request_is_the_caller_s(
    state: StateManager,
) -> None:
    handle = await a_handle(state, await state.create_session())
    with pytest.raises(errors.SessionNotFound, match="another"):
        async with handle.request():
            await state.update_session_data("another", "n", 1)


async def test_resources_and_directory_of_a_handle_are_those_of_its_session(
    state: StateManager,
) -> None:
    one, two = await state.create_session(), await state.create_session()
    handle = await a_handle(state, one)
    made = await handle.resources("registry", dict)
    assert await state.resources(one, "registry", list) is made
    assert await state.resources(two, "registry", dict) is not made
    path = await handle.scratch_dir()
    assert path.is_dir()
    assert path == await state.scratch_dir(one) != await state.scratch_dir(two)


async def test_a_handle_hears_the_changes_of_its_session_until_it_ends(
    state: StateManager,
) -> None:
    one, two = await state.create_session(), await state.create_session()
    handle = await a_handle(state, one)
    watch = handle.watch(max_pending=8)
    await state.update_session_data(two, "n", 1)
    await handle.update_data("n", 1)
    await handle.terminate()
    changes = [change async for change in watch]
    assert [(change.session_id, change.version) for change in changes[:1]] == [(one, 2)]
    assert {change.session_id for change in changes} == {one}
    assert changes[-1].is_end


async def test_a_stream_ends_when_its_token_has_expired(start: Start, clock: ManualClock) -> None:
    state = await start()
    sid = await state.create_session(ttl_seconds=600)
    handle = await a_handle(state, sid, ttl_seconds=60)
    watch = handle.watch()
    await handle.update_data("n", 1)
    assert (await anext(watch)).version == 2
    await handle.update_data("n", 2)
    clock.advance(61)
    with pytest.raises(errors.TokenInvalid):
        await anext(watch)


async def by_reading(watch: Watch) -> list[SessionChange]:
    async with asyncio.timeout(5):
        return [change async for change in watch]


async def by_taking(watch: Watch) -> list[SessionChange]:
    return watch.waiting()


@pytest.mark.parametrize("read", [by_reading, by_taking])
@pytest.mark.parametrize("is_cold", [False, True])
async def test_a_handle_hears_nothing_of_another_session_under_its_id(
    state: StateManager, read: Callable[[Watch], Any], is_cold: bool
) -> None:
    sid = await state.create_session()
    handle = await a_handle(state, sid)
    await state.terminate_session(sid)
    await state.create_session(session_id=sid, user_id="bob")
    if is_cold:
        await state.spill_session(sid)
    watch = handle.watch()
    await state.update_session_data(sid, "diagnosis", 1)
    await state.terminate_session(sid)
    for _ in range(2):
        with pytest.raises(errors.TokenInvalid):
            await read(watch)


@pytest.mark.parametrize("read", [by_reading, by_taking])
async def test_of_a_cold_session_that_ends_unread_nobody_knows_whose_it_was(
    state: StateManager, read: Callable[[Watch], Any]
) -> None:
    sid = await state.create_session()
    handle = await a_handle(state, sid)
    await state.terminate_session(sid)
    await state.create_session(session_id=sid, user_id="bob")
    await state.spill_session(sid)
    watch = handle.watch()
    await state.terminate_session(sid)
    with pytest.raises(errors.TokenInvalid):
        await read(watch)


async def test_a_stream_of_a_handle_ends_where_another_session_takes_the_place(
    start: Start, tmp_path: Path
) -> None:
    """A restored session is another one: its tokens are over, and so are their streams."""
    state = await start(checkpoint={"store": str(tmp_path / "store")})
    sid = await state.create_session(data={"n": 0})
    info = await state.create_checkpoint()
    handle = await a_handle(state, sid)
    watch = handle.watch()
    await handle.update_data("n", 1)
    assert (await anext(watch)).version == 2
    await handle.update_data("n", 2)
    await state.restore_checkpoint(info.id)
    await state.update_session_data(sid, "diagnosis", 1)
    assert (await anext(watch)).version == 3
    for _ in range(2):
        with pytest.raises(errors.TokenInvalid):
            await anext(watch)
    assert [change.kind for change in watch._mailbox._pending] == []


async def test_a_stream_of_what_has_expired_tells_nothing(start: Start, clock: ManualClock) -> None:
    state = await start()
    sid = await state.create_session(ttl_seconds=60)
    handle = await a_handle(state, sid)
    clock.advance(61)
    watch = handle.watch()
    for _ in range(2):
        with pytest.raises(errors.TokenInvalid):
            await anext(watch)


async def test_a_refused_stream_is_no_burden_once_its_reader_lets_go(state: StateManager) -> None:
    sid = await state.create_session()
    handle = await a_handle(state, sid)
    await state.terminate_session(sid)
    await state.create_session(session_id=sid)
    with pytest.raises(errors.TokenInvalid):
        await anext(handle.watch())
    gc.collect()
    await eventually(lambda: not state._watching.is_on)


@pytest.mark.parametrize("is_read_before", [False, True])
async def test_what_waits_in_a_stream_is_not_taken_once_its_token_has_expired(
    start: Start, clock: ManualClock, is_read_before: bool
) -> None:
    state = await start()
    sid = await state.create_session(ttl_seconds=600)
    handle = await a_handle(state, sid, ttl_seconds=60)
    watch = handle.watch()
    if is_read_before:
        await handle.update_data("n", 1)
        assert (await anext(watch)).version == 2
    await handle.update_data("n", 2)
    clock.advance(61)
    for each in (watch, handle.watch()):
        with pytest.raises(errors.TokenInvalid):
            each.waiting()
        with pytest.raises(errors.TokenInvalid):
            await anext(each)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("is_created_anew", [False, True])
async def test_nothing_beside_the_data_outlives_its_session(
    state: StateManager, call: Any, is_created_anew: bool
) -> None:
    sid = await state.create_session()
    handle = await a_handle(state, sid)
    await state.terminate_session(sid)
    if is_created_anew:
        await state.create_session(session_id=sid)
    with pytest.raises(errors.TokenInvalid):
        await call(handle)
    if is_created_anew:
        assert (await state.session_metrics(sid)).requests == 0
    stats = await state.stats()
    assert (stats.resources, stats.scratch_directories) == (0, 0)
