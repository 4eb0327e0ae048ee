from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistence import record as rec
from persistence.observe.metrics import (
    MAX_ERROR_CHARS,
    MAX_NAME_CHARS,
    RECENT_SECONDS,
    Tally,
    error_text,
    metrics_of,
    name_text,
)


def shown(wall: float) -> datetime:
    return datetime.fromtimestamp(wall, UTC)


def tally_of(*requests: tuple[float, float, str | None]) -> Tally:
    """Return the tally of requests: (ended at, seconds, error)."""
    tally = Tally()
    for at, seconds, error in requests:
        tally.ended([seconds], f"r{at}", at)
        if error is not None:
            tally.failed(error, at)
    return tally


def told(tally: Tally, now: float = 1000.0) -> Any:
    return metrics_of(tally, now, shown, running=0, max_requests=0, admitted=0)


REQUESTS = st.lists(
    st.tuples(st.floats(1, 1e6), st.floats(0, 1000), st.none() | st.sampled_from(["E: a", "E: b"])),
    max_size=20,
).map(lambda items: sorted(items, key=lambda each: each[0]))


@given(REQUESTS, REQUESTS)
def test_two_tallies_add_up_to_that_of_all_requests(
    first: list[tuple[float, float, str | None]], second: list[tuple[float, float, str | None]]
) -> None:
    added = tally_of(*first)
    added.add(tally_of(*second))
    whole = tally_of(*sorted([*first, *second], key=lambda each: each[0]))
    for name in ("requests", "errors", "first_at", "last_at", "last_error_at"):
        assert getattr(added, name) == getattr(whole, name), name
    for name in ("total_seconds", "recent_requests", "recent_errors"):
        assert getattr(added, name) == pytest.approx(getattr(whole, name), rel=1e-6, abs=1e-9), name


@given(REQUESTS)
def test_what_is_stored_comes_back(requests: list[tuple[float, float, str | None]]) -> None:
    tally = tally_of(*requests)
    stored = rec.unpack_value(rec.pack_value(tally.parts(), "requests"))
    again = Tally.of_parts(stored)
    assert again.parts()[:-1] == tally.parts()[:-1]
    assert told(again).p99_seconds == pytest.approx(told(tally).p99_seconds, rel=0.02, abs=1e-30)


def test_parts_of_a_later_version_are_read_as_far_as_they_are_known() -> None:
    assert Tally.of_parts([*tally_of((5, 1, None)).parts(), "new"]).requests == 1


@pytest.mark.parametrize("parts", [None, [], [1, 2], "text", {"a": 1}, [0] * 10 + ["x"], [0] * 11])
def test_parts_that_nobody_wrote_so_are_an_empty_tally(parts: Any) -> None:
    assert not Tally.of_parts(parts)


def test_a_rate_fades_with_time() -> None:
    tally = Tally()
    tally.ended([0.1] * 60, "r", 1000.0)
    assert told(tally, 1000.0).requests_per_second == pytest.approx(60 / RECENT_SECONDS)
    assert told(tally, 1000.0 + RECENT_SECONDS).requests_per_second == pytest.approx(
        60 / RECENT_SECONDS / 2.718281828, rel=1e-6
    )
    assert told(tally, 1e9).requests_per_second == pytest.approx(0)


def test_the_shown_numbers_are_those_of_the_requests() -> None:
    found = told(tally_of((10, 1.0, None), (20, 3.0, "KeyError: 'x'"), (30, 2.0, None)))
    assert (found.requests, found.errors, found.error_rate) == (3, 1, pytest.approx(1 / 3))
    assert (found.last_name, found.last_at) == ("r30", shown(30))
    assert (found.last_error, found.last_error_at) == ("KeyError: 'x'", shown(20))
    assert (found.total_seconds, found.average_seconds) == (6.0, 2.0)
    assert 1.0 <= found.p50_seconds <= found.p95_seconds <= found.p99_seconds <= 3.0


def test_without_requests_there_is_nothing_to_show() -> None:
    found = told(Tally())
    assert (found.requests, found.average_seconds, found.error_rate) == (0, 0.0, 0.0)
    assert (found.last_at, found.last_error_at, found.last_name) == (None, None, "")


def test_errors_beside_requests_make_no_more_than_all_of_them() -> None:
    tally = tally_of((1, 1.0, "E"))
    tally.failed("E", 2)
    tally.failed("E", 3)
    assert told(tally).error_rate == 1.0
    assert tally.recent_error_rate() == 1.0


def test_names_and_errors_are_kept_short_and_can_be_stored() -> None:
    assert len(name_text("x" * 1000)) == MAX_NAME_CHARS
    assert len(error_text(ValueError("x" * 1000))) == MAX_ERROR_CHARS
    assert error_text(ValueError("bad")) == "ValueError: bad"
    rec.pack_value([name_text("\udc80"), error_text("\udc80")], "texts")
