"""persistence.sync has what the asynchronous manager has, under the same names and types."""

from __future__ import annotations

import inspect
from typing import Any, assert_type

import pytest

import persistence
from persistence import Session, SessionChange, SessionDraft, Stats, sync
from persistence.checkpoint.catalogue import CheckpointInfo

ASYNC_ONLY: set[str] = set()
"""What threads have no use for. Everything else that the asynchronous manager gets has to be here:
``name = _blocking(AsyncManager.name)`` in persistence/sync/manager.py will do for a coroutine."""
SYNC_ONLY = {"as_mapping"}


def public(manager: type) -> set[str]:
    return {name for name in dir(manager) if not name.startswith("_")}


def shape(function: Any) -> list[tuple[str, Any, Any]]:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return [(each.name, each.kind, each.default) for each in parameters]


def test_no_method_is_missing_and_none_is_made_up() -> None:
    wanted = public(persistence.StateManager) - ASYNC_ONLY
    assert public(sync.StateManager) - SYNC_ONLY == wanted


@pytest.mark.parametrize("name", sorted(public(persistence.StateManager) - ASYNC_ONLY))
def test_a_method_takes_the_same_and_is_documented(name: str) -> None:
    theirs, ours = getattr(persistence.StateManager, name), getattr(sync.StateManager, name)
    assert shape(ours) == shape(theirs)
    assert inspect.getdoc(ours)
    assert not inspect.iscoroutinefunction(ours)


def test_the_constructor_takes_the_same() -> None:
    assert shape(sync.StateManager.__init__) == shape(persistence.StateManager.__init__)


def test_what_methods_return_has_its_type(state: sync.StateManager) -> None:
    """Checked by mypy; here it only has to run."""
    sid = assert_type(state.create_session(user_id="ada", data={"n": 0}), str)
    assert_type(state.get_session(sid), Session | None)
    assert_type(state.get_or_create_session(sid), Session)
    assert_type(state.update_session_data(sid, "n", 1), Session)
    assert_type(state.update_session(sid, lambda data: data.update(n=2)), Session)
    assert_type(state.set_ttl(sid, 10), bool)
    assert_type(state.get_active_sessions(), list[str])
    assert_type(state.stats(), Stats)
    assert_type(state.create_checkpoint(), CheckpointInfo)
    with state.edit(sid) as draft:
        assert_type(draft, SessionDraft)
    for each in state.iter_sessions():
        assert_type(each, str)
    with state.watch(sid, after=1) as stream:
        assert_type(next(stream), SessionChange)
    assert_type(state.as_mapping()[sid], dict[str, Any])
    assert_type(state.terminate_session(sid), bool)


def test_the_rest_of_the_package_does_not_load_it() -> None:
    source = inspect.getsource(persistence)
    assert "sync" not in source
