"""What a request does to its session, and the independent computation of the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persistence.cli.accesslog import Request, parse_line
from persistence.cli.fold import Fold, differences, same
from persistence.cli.workload import HISTORY_ENTRIES, apply_request, clean, session_id, status_class


def request(
    client: str = "10.0.0.1",
    agent: str | None = "A",
    url: str | None = "/",
    status: int | None = 200,
) -> Request:
    return Request(client, None, "t", "GET", url, "HTTP/1.1", status, 7, None, agent)


def fold(log: list[Request]) -> dict[str, dict[str, Any]]:
    folded = Fold()
    for item in log:
        folded.add(item)
    return {sid: folded.data(sid) or {} for sid in folded.ids()}


requests = st.lists(
    st.builds(
        request,
        client=st.sampled_from(["1", "2", "3\udce4"]),
        agent=st.sampled_from([None, "A", "\udcff"]),
        url=st.sampled_from([None, "/a", "/\udce4"]),
        status=st.sampled_from([None, 200, 204, 404, 999]),
    ),
    max_size=120,
)


@settings(deadline=None)
@given(requests)
def test_the_fold_equals_the_updates_one_by_one(log: list[Request]) -> None:
    sessions: dict[str, dict[str, Any]] = {}
    for position, item in enumerate(log):
        apply_request(sessions.setdefault(session_id(item), {}), position, item)
    expected = fold(log)
    assert sessions.keys() == expected.keys()
    for sid, data in sessions.items():
        assert list(differences(expected[sid], data)) == []


@settings(deadline=None)
@given(requests, st.data())
def test_applying_requests_again_changes_nothing(log: list[Request], draw: st.DataObject) -> None:
    sessions: dict[str, dict[str, Any]] = {}
    for position, item in enumerate(log):
        data = sessions.setdefault(session_id(item), {})
        apply_request(data, position, item)
        again = draw.draw(st.integers(0, position))
        apply_request(sessions.get(session_id(log[again]), {}), again, log[again])
    assert sessions == fold(log)


def test_the_history_is_bounded() -> None:
    data: dict[str, Any] = {}
    for position in range(100):
        apply_request(data, position, request(url=f"/{position}"))
    assert [url for _, url, _ in data["history"]] == [
        f"/{number}" for number in range(100 - HISTORY_ENTRIES, 100)
    ]
    assert (data["requests"], data["bytes"], data["position"]) == (100, 700, 99)


def test_a_session_is_a_client_with_an_agent() -> None:
    ids = {
        session_id(request(client, agent))
        for client in ("a", "b", "\udce4", "\udce5")
        for agent in (None, "A", "B", "\udce4")
    }
    assert len(ids) == 16


def test_long_host_names_are_shortened_but_not_mixed_up() -> None:
    ids = [session_id(request("\U0001f600" * 3000 + end)) for end in "ab"]
    assert ids[0] != ids[1]
    assert all(len(sid.encode()) <= 512 for sid in ids)


def test_nothing_that_is_stored_has_surrogates() -> None:
    item = parse_line('\udcff - - [\udce4] "GET /\udce4 HTTP/1.1" 200 5 "-" "\udce4"')
    assert item is not None
    data: dict[str, Any] = {}
    apply_request(data, 0, item)
    repr(data).encode()
    session_id(item).encode()
    assert data["last_url"] == "/�"


@pytest.mark.parametrize("text", ["plain", "größe", "日本"])
def test_what_is_utf8_stays_as_it_is(text: str) -> None:
    assert clean(text) == text


def test_status_classes() -> None:
    assert [status_class(status) for status in (200, 299, 404, None)] == [
        "2xx",
        "2xx",
        "4xx",
        "none",
    ]


@pytest.mark.parametrize(
    ("expected", "found", "words"),
    [
        (None, {}, "no request in the log belongs"),
        ({}, None, "is missing"),
        ({"a": 1}, {}, "field a is missing"),
        ({}, {"a": 1}, "field a should not be there"),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, "field a is"),
        ({"a": 1}, {"a": True}, "field a is True, expected 1"),
        ({"a": [1]}, {"a": [1, 2]}, "field a is"),
    ],
)
def test_differences_are_told_in_words(
    expected: dict[str, Any] | None, found: dict[str, Any] | None, words: str
) -> None:
    (difference,) = differences(expected, found)
    assert words in difference


def test_sameness_looks_at_types() -> None:
    assert same({"a": [1, None, "x"]}, {"a": [1, None, "x"]})
    assert not same({"a": [1]}, {"a": [1.0]})
