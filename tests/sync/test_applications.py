"""Requests, live resources and typed data, for threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from persistence import ClientInfo, sync
from persistence.errors import (
    ConflictError,
    PersistenceError,
    RequestLimitReached,
    SessionNotFound,
)
from tests.engine import ScriptedFiles, config_for

ADA = ClientInfo(ip="203.0.113.9", user_agent="a")
PATIENCE_SECONDS = 10
TENANT = ContextVar("TENANT", default="nobody's")


@dataclass
class Cart:
    """What a session is."""

    items: list[str] = field(default_factory=list)


@pytest.fixture
def typed(tmp_path: Path) -> Iterator[sync.StateManager]:
    config = config_for(tmp_path / "state")
    with sync.StateManager(config=config, files=ScriptedFiles(), schema=Cart) as state:
        yield state


def test_of_many_threads_as_many_pass_as_the_limit_says(state: sync.StateManager) -> None:
    sid = state.create_session(max_requests=20)

    def ask(number: int) -> bool:
        try:
            with state.request(sid, f"GET /{number}") as request:
                assert request.session.id == sid
        except RequestLimitReached:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(ask, range(60))) == 20
    assert state.is_request_limit_reached(sid)
    assert state.session_metrics(sid).requests == 20


def test_what_a_request_raises_goes_on_and_is_counted(state: sync.StateManager) -> None:
    sid = state.create_session()
    with pytest.raises(ZeroDivisionError), state.request(sid, "GET /"):
        raise ZeroDivisionError("the page")
    state.record_request(sid, "GET /timed", 0.5)
    state.record_error(sid, "another")
    metrics = state.session_metrics(sid)
    assert (metrics.requests, metrics.errors, metrics.last_name) == (2, 2, "GET /timed")
    assert 0 <= state.session_health(sid).score <= 1
    with pytest.raises(SessionNotFound), state.request("nobody"):
        raise AssertionError("entered")


def test_a_request_may_update_its_session(state: sync.StateManager) -> None:
    sid = state.create_session(data={"n": 0})
    with state.request(sid), state.edit(sid) as draft:
        draft["n"] += 1
    with state.request(sid):
        state.update_session(sid, lambda data: data.update(n=data["n"] + 1))
    session = state.get_session(sid)
    assert session is not None
    assert session["n"] == 2


def test_a_resource_is_made_once_and_where_it_may_block(state: sync.StateManager) -> None:
    sid = state.create_session()
    made: list[threading.Thread] = []
    closed: list[object] = []

    def factory() -> object:
        made.append(threading.current_thread())
        assert state.has_session(sid), "a blocking call is allowed here"
        return object()

    with ThreadPoolExecutor(8) as threads:
        got = list(
            threads.map(lambda _: state.resources(sid, "db", factory, closed.append), range(16))
        )
    assert len(set(map(id, got))) == 1
    assert len(made) == 1
    state.terminate_session(sid)
    state.close()
    assert closed == [got[0]]


def test_a_resource_may_be_made_by_a_coroutine(state: sync.StateManager) -> None:
    sid = state.create_session()

    async def factory() -> str:
        return "made"

    assert state.resources(sid, "db", factory) == "made"
    with pytest.raises(ZeroDivisionError):
        state.resources(sid, "broken", lambda: 1 / 0)


def answer_of(call: Callable[[], object]) -> object:
    """Return what a thread gets, or the error that it is told; a hanging one fails the test."""
    got: list[object] = []

    def ask() -> None:
        try:
            got.append(call())
        except PersistenceError as error:
            got.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    assert got, "it hangs"
    return got[0]


def test_a_factory_that_writes_what_its_asker_edits_is_told_at_once(
    state: sync.StateManager,
) -> None:
    sid = state.create_session(data={"n": 0})

    def ask() -> object:
        with state.edit(sid):
            return state.resources(sid, "db", lambda: state.update_session_data(sid, "n", 1))

    error = answer_of(ask)
    assert isinstance(error, ConflictError)
    assert "whoever asked for this resource" in str(error)
    assert state.update_session_data(sid, "n", 2)["n"] == 2


def test_factories_that_wait_for_each_other_are_told_at_once(state: sync.StateManager) -> None:
    sid = state.create_session()
    handle = state.open_session(sid, state.issue_token(sid, ADA), ADA)

    def page() -> object:
        return state.resources(sid, "connection", lambda: handle.resources("page", object))

    error = answer_of(lambda: handle.resources("page", page))
    assert isinstance(error, ConflictError)
    assert "the factory of 'connection' asks for it" in str(error)


def test_a_factory_has_the_context_of_whoever_asks(state: sync.StateManager) -> None:
    sid = state.create_session()
    handle = state.open_session(sid, state.issue_token(sid, ADA), ADA)

    async def tenant() -> str:
        return TENANT.get()

    def ask() -> list[object]:
        TENANT.set("shop")
        return [
            state.resources(sid, "in a thread", TENANT.get),
            state.resources(sid, "on the loop", tenant),
            handle.resources("by a handle", TENANT.get),
        ]

    assert answer_of(ask) == ["shop"] * 3


def test_sessions_are_objects_of_the_schema(typed: sync.StateManager) -> None:
    sid = typed.create_session(data={"items": ["Dune"]})
    threads = []

    def add(cart: Cart) -> None:
        threads.append(threading.current_thread())
        cart.items.append("Ubik")

    assert typed.typed(typed.update_typed(sid, add)) == Cart(["Dune", "Ubik"])
    assert threads == [threading.current_thread()]
    with typed.edit_typed(sid) as cart:
        cart.items.append("Solaris")
    assert typed.get_typed(sid) == Cart(["Dune", "Ubik", "Solaris"])
    assert typed.get_typed("nobody") is None


def test_a_scratch_directory_is_the_sessions_own(state: sync.StateManager) -> None:
    one, two = state.create_session(), state.create_session()
    assert Path(state.scratch_dir(one)).is_dir()
    assert state.scratch_dir(one) != state.scratch_dir(two)
