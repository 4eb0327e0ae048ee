"""What a handle reaches beside the data, from any thread."""

from __future__ import annotations

import threading

import pytest

from persistence import ClientInfo, ManualClock, sync
from persistence.errors import TokenInvalid

ADA = ClientInfo(ip="203.0.113.9", user_agent="a")


def test_a_handle_has_requests_resources_directory_and_changes(state: sync.StateManager) -> None:
    sid = state.create_session()
    handle = state.open_session(sid, state.issue_token(sid, ADA), ADA)
    with handle.request("GET /page") as request:
        assert request.session.id == sid
    assert state.session_metrics(sid).requests == 1
    made_in = handle.resources("thread", threading.get_ident)
    assert state.resources(sid, "thread", object) == made_in
    assert handle.scratch_dir() == state.scratch_dir(sid)
    with handle.watch() as changes:
        handle.update_data("n", 1)
        assert next(changes).version == 2
    handle.terminate()
    with pytest.raises(TokenInvalid):
        handle.scratch_dir()


def test_what_a_stream_has_fetched_is_not_handed_out_once_its_token_has_expired(
    state: sync.StateManager, clock: ManualClock
) -> None:
    sid = state.create_session(ttl_seconds=600)
    handle = state.open_session(sid, state.issue_token(sid, ADA, ttl_seconds=60), ADA)
    changes = handle.watch()
    for count in range(3):
        handle.update_data("n", count)
    assert next(changes).version == 2
    clock.advance(61)
    for _ in range(2):
        with pytest.raises(TokenInvalid):
            next(changes)
