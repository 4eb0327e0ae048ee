"""All sessions as a mapping, next to a dict that is told the same."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from persistence import ManualClock, sync
from persistence.errors import InvalidArgument, InvalidSessionId, SessionNotFound

Data = dict[str, Any]


@pytest.fixture
def sessions(state: sync.StateManager) -> sync.SessionMapping:
    return state.as_mapping()


def test_it_is_a_mutable_mapping(sessions: sync.SessionMapping) -> None:
    assert isinstance(sessions, MutableMapping)
    assert not sessions
    assert len(sessions) == 0
    sessions["a"] = {"n": 1}
    assert sessions["a"] == {"n": 1}
    assert "a" in sessions
    assert sessions
    sessions["a"] = {"m": 2}
    assert sessions.get("a") == {"m": 2}
    assert sessions.get("b") is None
    assert sessions.get("b", {}) == {}
    del sessions["a"]
    assert "a" not in sessions


def test_what_it_returns_is_fresh(sessions: sync.SessionMapping) -> None:
    given: Data = {"cart": []}
    sessions["a"] = given
    given["cart"].append(1)
    sessions["a"]["cart"].append(2)
    assert sessions["a"] == {"cart": []}
    assert sessions["a"] is not sessions["a"]


@pytest.mark.parametrize("missing", ["nobody", "", "x" * 1000, "\udc80", 7, None, ("a",)])
def test_what_is_no_key_is_missing(sessions: sync.SessionMapping, missing: Any) -> None:
    with pytest.raises(KeyError):
        sessions[missing]
    with pytest.raises(KeyError):
        del sessions[missing]
    with pytest.raises(KeyError):
        sessions.pop(missing)
    assert sessions.pop(missing, {"d": 1}) == {"d": 1}
    assert sessions.get(missing) is None
    assert missing not in sessions


def test_what_has_no_hash_is_refused_as_by_any_mapping(sessions: sync.SessionMapping) -> None:
    wrong: Any = ["a"]
    for call in (
        lambda: sessions[wrong],
        lambda: wrong in sessions,
        lambda: sessions.pop(wrong),
    ):
        with pytest.raises(TypeError):
            call()


def test_wrong_items_are_refused_and_change_nothing(sessions: sync.SessionMapping) -> None:
    sessions["a"] = {"n": 1}
    with pytest.raises(InvalidArgument):
        sessions["a"] = 7  # type: ignore[assignment]
    with pytest.raises(InvalidSessionId):
        sessions[""] = {}
    assert dict(sessions) == {"a": {"n": 1}}


def test_it_does_what_a_dict_does(sessions: sync.SessionMapping) -> None:
    chance = random.Random(3)
    model: dict[str, Data] = {}
    keys = [f"k{number}" for number in range(12)]

    def both(call: Callable[[MutableMapping[str, Data]], object]) -> None:
        results: list[object] = []
        for mapping in (model, sessions):
            try:
                results.append(copy.deepcopy(call(mapping)))
            except KeyError:
                results.append(KeyError)
        assert results[0] == results[1]

    for _ in range(250):
        key = chance.choice(keys)
        data = {"n": chance.randrange(5)}
        calls: list[Callable[[MutableMapping[str, Data]], object]] = [
            lambda mapping, key=key, data=data: mapping.__setitem__(key, dict(data)),  # type: ignore[misc]
            lambda mapping, key=key: mapping.__delitem__(key),  # type: ignore[misc]
            lambda mapping, key=key: mapping[key],  # type: ignore[misc]
            lambda mapping, key=key: mapping.get(key),  # type: ignore[misc]
            lambda mapping, key=key: key in mapping,  # type: ignore[misc]
            lambda mapping, key=key: mapping.pop(key),  # type: ignore[misc]
            lambda mapping, key=key, data=data: mapping.pop(key, data),  # type: ignore[misc]
            lambda mapping, key=key, data=data: mapping.setdefault(key, dict(data)),  # type: ignore[misc]
            lambda mapping, key=key, data=data: mapping.update({key: dict(data)}),  # type: ignore[misc]
            lambda mapping: len(mapping),  # noqa: PLW0108 - of either kind
        ]
        both(chance.choice(calls))
        if chance.random() < 0.1:
            assert sorted(sessions) == sorted(model)
            assert dict(sessions.items()) == model
            assert sessions == model
            assert sorted(map(str, sessions.values())) == sorted(map(str, model.values()))
    both(lambda mapping: mapping.clear())
    with pytest.raises(KeyError):
        sessions.popitem()


def test_views_are_live_and_know_what_they_contain(sessions: sync.SessionMapping) -> None:
    keys, values, items = sessions.keys(), sessions.values(), sessions.items()
    sessions["a"] = {"n": 1}
    assert list(keys) == ["a"]
    assert list(values) == [{"n": 1}]
    assert list(items) == [("a", {"n": 1})]
    assert "a" in keys
    assert {"n": 1} in values
    assert {"n": 2} not in values
    assert ("a", {"n": 1}) in items
    assert (len(keys), len(values), len(items)) == (1, 1, 1)
    assert sessions.popitem() == ("a", {"n": 1})


def test_going_over_it_while_it_changes_skips_what_is_gone(sessions: sync.SessionMapping) -> None:
    for number in range(300):
        sessions[f"k{number}"] = {"n": number}
    seen = {}
    for number, (key, data) in enumerate(sessions.items()):
        seen[key] = data
        del sessions[key]
        sessions.pop(f"k{(number * 7) % 300}", None)
        sessions[f"new {number}"] = {}
    assert all(data == {"n": int(key[1:])} for key, data in seen.items() if key.startswith("k"))
    assert not any(key.startswith("k") for key in sessions)


def test_going_over_it_renews_nothing_and_reading_an_item_does(
    sessions: sync.SessionMapping, state: sync.StateManager, clock: ManualClock
) -> None:
    state.create_session(session_id="a", ttl_seconds=100)
    clock.advance(60)
    assert list(sessions.items()) == [("a", {})]
    assert "a" in sessions
    assert sessions == {"a": {}}
    before = state.get_session("a", renew=False)
    assert before is not None
    assert before.last_accessed.timestamp() == pytest.approx(clock.wall() - 60)
    assert sessions["a"] == {}
    clock.advance(60)
    assert "a" in sessions
    clock.advance(60)
    assert dict(sessions) == {}


@pytest.mark.parametrize("wrong", [None, 7, "", ("a",), ["a"]])
def test_a_default_under_what_is_no_id_is_refused_as_an_item_is(
    sessions: sync.SessionMapping, wrong: Any
) -> None:
    with pytest.raises(InvalidSessionId):
        sessions[wrong] = {}
    with pytest.raises(InvalidSessionId):
        sessions.setdefault(wrong, {"orphan": 1})
    assert dict(sessions) == {}


@pytest.mark.parametrize("way", ["pop", "popitem"])
def test_of_many_threads_that_pop_a_session_one_gets_it(
    sessions: sync.SessionMapping, way: str
) -> None:
    numbers = range(60)
    sessions.update({f"k{number}": {"n": number} for number in numbers})

    def pop_all(_: int) -> list[Data | None]:
        if way == "pop":
            return [sessions.pop(f"k{number}", None) for number in numbers]
        got: list[Data | None] = []
        while True:
            try:
                got.append(sessions.popitem()[1])
            except KeyError:
                return got

    with ThreadPoolExecutor(6) as threads:
        got = [data["n"] for some in threads.map(pop_all, range(6)) for data in some if data]
    assert sorted(got) == list(numbers)
    assert not sessions


def test_what_is_popped_has_every_update_in_it(
    sessions: sync.SessionMapping, state: sync.StateManager
) -> None:
    each = 60

    def count(_: int) -> int:
        """Count in the session, which others take away all the time; and take it away."""
        popped = 0
        for number in range(each):
            while True:
                sessions.setdefault("k", {"n": 0})
                try:
                    state.update_session("k", lambda data: data.update(n=data["n"] + 1))
                    break
                except SessionNotFound:
                    continue
            if number % 3 == 0:
                popped += sessions.pop("k", {"n": 0})["n"]
        return popped

    with ThreadPoolExecutor(4) as threads:
        popped = sum(threads.map(count, range(4)))
    assert popped + sessions.pop("k", {"n": 0})["n"] == 4 * each


def test_popping_takes_what_is_cold_and_not_what_has_expired(
    sessions: sync.SessionMapping, state: sync.StateManager, clock: ManualClock
) -> None:
    state.create_session(session_id="cold", data={"n": 1}, ttl_seconds=0)
    state.create_session(session_id="over", data={"n": 2}, ttl_seconds=10)
    state.spill_session("cold")
    clock.advance(11)
    assert sessions.pop("over", None) is None
    assert sessions.pop("cold") == {"n": 1}
    with pytest.raises(KeyError):
        sessions.pop("cold")


def test_one_of_many_threads_creates_a_default(sessions: sync.SessionMapping) -> None:
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda n: sessions.setdefault("a", {"n": n})["n"], range(16)))
    assert len(set(got)) == 1
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: sessions.__setitem__("b", {"n": n}), range(16)))
    assert sessions["b"]["n"] in range(16)
