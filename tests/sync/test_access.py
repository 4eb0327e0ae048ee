"""Tokens and handles, for threads."""

from __future__ import annotations

import inspect
import threading

import pytest

from persistence import ClientInfo, SessionDraft, sync
from persistence.access import SessionHandle
from persistence.errors import TokenInvalid
from tests.sync.test_surface import public, shape

ADA = ClientInfo(ip="203.0.113.9", user_agent="a")
BOB = ClientInfo(ip="203.0.113.10", user_agent="b")


def test_the_handle_has_what_the_asynchronous_one_has() -> None:
    assert public(sync.SessionHandle) == public(SessionHandle)
    for name in public(SessionHandle) - {"id"}:
        ours = getattr(sync.SessionHandle, name)
        assert shape(ours) == shape(getattr(SessionHandle, name))
        assert inspect.getdoc(ours)


def test_a_token_opens_its_session_for_its_client(state: sync.StateManager) -> None:
    sid = state.create_session(data={"n": 0})
    token = state.issue_token(sid, ADA)
    assert state.validate_token(token, ADA) == sid
    with pytest.raises(TokenInvalid):
        state.validate_token(token, BOB)
    with pytest.raises(TokenInvalid):
        state.open_session(sid, token, BOB)
    handle = state.open_session(sid, token, ADA)
    threads = []

    def add(data: SessionDraft) -> None:
        threads.append(threading.current_thread())
        data["n"] += 1

    assert handle.update(add)["n"] == 1
    assert threads == [threading.current_thread()]
    with handle.edit() as draft:
        draft["n"] += 1
    assert handle.update_data("m", 1)["n"] == 2
    assert handle.replace({"n": 5}).data == {"n": 5}
    handle.set_ttl(100)
    assert handle.get()["n"] == 5
    handle.terminate()
    with pytest.raises(TokenInvalid):
        handle.get()


def test_a_rotated_session_is_found_under_its_new_id_only(state: sync.StateManager) -> None:
    sid = state.create_session(data={"n": 7})
    token = state.issue_token(sid, ADA)
    new = state.rotate_session_id(sid)
    assert state.get_session(sid) is None
    session = state.get_session(new)
    assert session is not None
    assert session["n"] == 7
    with pytest.raises(TokenInvalid):
        state.validate_token(token, ADA)


def test_watchers_hear_of_a_rotation(state: sync.StateManager) -> None:
    sid = state.create_session(data={"n": 7})
    stream, everything = state.watch(sid), state.watch()
    new = state.rotate_session_id(sid)
    assert [change.kind for change in stream] == ["terminated"]
    told = [next(everything) for _ in range(2)]
    assert [(change.session_id, change.kind) for change in told] == [
        (new, "created"),
        (sid, "terminated"),
    ]
