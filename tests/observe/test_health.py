from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistence.observe.health import score

WELL = {"recent_error_rate": 0.0, "left_seconds": 60.0, "life_seconds": 60.0, "bytes_share": 0.1}
SHARES = st.floats(0, 1)


def score_with(**changes: float) -> float:
    return score(**{**WELL, **changes})


def test_a_session_without_trouble_scores_one() -> None:
    assert score_with() == 1.0
    assert score_with(left_seconds=inf, life_seconds=inf) == 1.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"recent_error_rate": 0.25}, 0.75),
        ({"recent_error_rate": 1.0}, 0.0),
        ({"left_seconds": 15.0}, 1.0),
        ({"left_seconds": 7.5}, 0.5),
        ({"left_seconds": 0.0}, 0.0),
        ({"lifetime_left_seconds": 100.0, "lifetime_seconds": 400.0}, 1.0),
        ({"lifetime_left_seconds": 60.0, "lifetime_seconds": 480.0}, 0.5),
        ({"lifetime_left_seconds": 60.0, "lifetime_seconds": 480.0, "left_seconds": 3.0}, 0.2),
        ({"bytes_share": 0.5}, 1.0),
        ({"bytes_share": 1.0}, 0.5),
        ({"bytes_share": 3.0}, 0.5),
        ({"recent_error_rate": 0.5, "left_seconds": 7.5, "bytes_share": 1.0}, 0.125),
    ],
)
def test_each_part_lowers_the_score_as_documented(
    changes: dict[str, float], expected: float
) -> None:
    assert score_with(**changes) == pytest.approx(expected)


@given(SHARES, st.floats(0, 1e9), st.floats(0, 1e9) | st.just(inf), st.floats(0, 10))
def test_a_score_is_from_zero_to_one(errors: float, left: float, life: float, size: float) -> None:
    found = score(recent_error_rate=errors, left_seconds=left, life_seconds=life, bytes_share=size)
    assert 0.0 <= found <= 1.0
