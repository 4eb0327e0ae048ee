"""Functions that may block: each in a thread of its own, and none in the way of another one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import pytest

from persistence import sync
from persistence.sync import offload
from persistence.sync.offload import Places, off_loop
from tests.engine import eventually, loop_steps

PATIENCE_SECONDS = 20
MANY = 40  # more than the threads of any default executor


class Held:
    """A function whose calls wait until they are let go."""

    def __init__(self) -> None:
        self.calls = 0
        self.let_go = threading.Event()

    def __call__(self, *_: object) -> int:
        self.calls += 1
        self.let_go.wait()
        return self.calls


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.let_go.set()


def test_factories_that_ask_for_other_resources_do_not_wait_for_each_other(
    state: sync.StateManager,
) -> None:
    ids = [state.create_session() for _ in range(MANY)]
    all_inside = threading.Barrier(MANY)

    def ask(sid: str) -> object:
        def page() -> object:
            all_inside.wait(PATIENCE_SECONDS)
            return state.resources(sid, "connection", lambda: f"connection of {sid}")

        return state.resources(sid, "page", page)

    with ThreadPoolExecutor(MANY) as threads:
        made = list(threads.map(ask, ids, timeout=PATIENCE_SECONDS))
    assert made == [f"connection of {sid}" for sid in ids]


def test_closes_that_hang_keep_nobody_from_making_a_resource(
    state: sync.StateManager, held: Held
) -> None:
    for _ in range(MANY):
        sid = state.create_session()
        state.resources(sid, "connection", object, held)
        state.terminate_session(sid)
    sid, made = state.create_session(), list[str]()
    asking = threading.Thread(
        target=lambda: made.append(state.resources(sid, "page", lambda: "made")), daemon=True
    )
    asking.start()
    asking.join(PATIENCE_SECONDS)
    assert made == ["made"]
    held.let_go.set()
    state.close()
    assert held.calls == MANY


def test_a_factory_that_exits_ends_its_own_thread_only(state: sync.StateManager) -> None:
    sid = state.create_session()

    def leave(error: BaseException) -> None:
        raise error

    for error in (SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), StopIteration()):
        with pytest.raises(RuntimeError, match=type(error).__name__) as raised:
            state.resources(sid, "page", lambda error=error: leave(error))  # type: ignore[misc]
        assert raised.value.__cause__ is error
    assert state.resources(sid, "page", lambda: "made") == "made"


async def test_a_function_is_called_in_another_thread_with_the_callers_context() -> None:
    variable = ContextVar("variable", default=0)
    variable.set(7)
    call = off_loop(lambda number: (threading.get_ident(), variable.get() + number))
    thread, result = await call(1)
    assert thread != threading.get_ident()
    assert result == 8
    with pytest.raises(ZeroDivisionError):
        await off_loop(lambda: 1 / 0)()
    assert await off_loop(lambda: asyncio.sleep(0, "awaited"))() == "awaited"


async def test_as_many_calls_run_at_a_time_as_there_are_places(held: Held) -> None:
    call = off_loop(held, Places(4))
    calls = [asyncio.ensure_future(call()) for _ in range(MANY)]
    await eventually(lambda: held.calls == 4)
    held.let_go.set()
    await asyncio.gather(*calls)
    assert held.calls == MANY


async def test_places_never_have_more_than_they_are(held: Held) -> None:
    places, begun = Places(2), 0

    def begin() -> None:
        nonlocal begun
        begun += 1

    for _ in range(5):
        places.take(begin)
    assert begun == 2
    places.give_back()
    assert begun == 3
    for _ in range(4):
        places.give_back()
    assert begun == 5


async def test_a_call_that_hangs_loses_its_place(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "_HELD_SECONDS", 0.01)
    call = off_loop(held, Places(1))
    calls = [asyncio.ensure_future(call()) for _ in range(3)]
    await eventually(lambda: held.calls == 3)
    held.let_go.set()
    await asyncio.gather(*calls)


async def test_a_call_that_is_given_up_before_its_turn_is_made_all_the_same(held: Held) -> None:
    call = off_loop(held, Places(1))
    first, given_up = asyncio.ensure_future(call()), asyncio.ensure_future(call())
    await eventually(lambda: held.calls == 1)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    held.let_go.set()
    await first
    await eventually(lambda: held.calls == 2)


async def test_where_the_system_has_no_thread_the_call_says_so_and_the_next_one_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    call = off_loop(lambda: "made", Places(1))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError, match="can't start"):
            await call()
    assert await call() == "made"


async def test_where_no_thread_can_be_started_closes_are_called_in_one_that_is_there(
    monkeypatch: pytest.MonkeyPatch, held: Held
) -> None:
    monkeypatch.setattr(offload, "_needs_spare", True)
    monkeypatch.setattr(offload, "_spare", offload._Spare())
    places = Places(4)
    call, hanging = off_loop(threading.get_ident, places), off_loop(held, places)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr("threading.main_thread", threading.Thread)  # as at exit: it is not alive
    spare = await call()
    assert spare != threading.get_ident()
    first = asyncio.create_task(hanging())
    await eventually(lambda: held.calls == 1)
    second = asyncio.create_task(call())
    await loop_steps(20)
    assert not first.done()
    assert not second.done()
    held.let_go.set()
    assert (await first, await second) == (1, spare)
