from __future__ import annotations

import pytest

from benchmarks.bars import Bar, Kind, judge
from benchmarks.contender import ENGINE, median, percentile

SAMPLES = {
    ENGINE: [{"rate": 150.0, "us": 320.0}],
    "peer": [{"rate": 100.0, "us": 130.0}],
}


@pytest.mark.parametrize(
    ("bar", "passed"),
    [
        (Bar("rate", Kind.RATIO_AT_LEAST, 1.5, "peer"), True),
        (Bar("rate", Kind.RATIO_AT_LEAST, 1.6, "peer"), False),
        (Bar("us", Kind.EXCESS_AT_MOST, 190, "peer"), True),
        (Bar("us", Kind.EXCESS_AT_MOST, 189, "peer"), False),
        (Bar("rate", Kind.AT_LEAST, 150), True),
        (Bar("rate", Kind.AT_LEAST, 151), False),
        (Bar("us", Kind.AT_MOST, 320), True),
        (Bar("us", Kind.AT_MOST, 319), False),
    ],
)
def test_a_bar_passes_exactly_when_its_claim_holds(bar: Bar, passed: bool) -> None:
    assert judge(bar, SAMPLES, "/s").passed is passed


@pytest.mark.parametrize(
    "bar",
    [
        Bar("rate", Kind.RATIO_AT_LEAST, 1.5, "a peer that is not installed"),
        Bar("gc", Kind.AT_MOST, 10),
        Bar("rate", Kind.AT_LEAST, 1, ours="nobody"),
    ],
)
def test_a_bar_without_its_numbers_is_open_not_passed(bar: Bar) -> None:
    assert judge(bar, SAMPLES, "").passed is None


def test_contenders_are_compared_within_a_repetition() -> None:
    # Twice as fast in two very different minutes out of three; the plain medians say 1 ×.
    ours = [{"rate": 20.0}, {"rate": 200.0}, {"rate": 100.0}]
    theirs = [{"rate": 10.0}, {"rate": 100.0}, {"rate": 100.0}]
    bar = Bar("rate", Kind.RATIO_AT_LEAST, 2.0, "peer")
    assert judge(bar, {ENGINE: ours, "peer": theirs}, "/s").measured == "2.00 ×"


def test_the_median_of_two_repetitions_is_not_the_better_one() -> None:
    ours = [{"rate": 10.0}, {"rate": 30.0}]
    theirs = [{"rate": 10.0}, {"rate": 10.0}]
    bar = Bar("rate", Kind.RATIO_AT_LEAST, 2.5, "peer")
    verdict = judge(bar, {ENGINE: ours, "peer": theirs}, "/s")
    assert (verdict.measured, verdict.passed) == ("2.00 ×", False)


def test_medians_of_odd_numbers_and_percentiles_are_samples() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert percentile([float(n) for n in range(1000)], 0.999) == 999.0
    assert percentile([5.0], 0.5) == 5.0
