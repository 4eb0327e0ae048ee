from __future__ import annotations

import pytest

from benchmarks.compare import (
    BETTER,
    GONE,
    SAME,
    WORSE,
    Change,
    NotComparableError,
    compare,
    different_machine,
)
from benchmarks.results import RowResult
from tests.benchmarks.runs import row, run, workload

OLD = row("persistence", 98.0, 100.0, 102.0, 101.0, 99.0, role="engine")


def _engine(*samples: float) -> RowResult:
    return row("persistence", *samples, role="engine")


def _compared(new: RowResult, *, old: RowResult = OLD, better: str = "more") -> Change:
    (change,) = compare(run(workload(old, better=better)), run(workload(new, better=better)))
    return change


def test_equal_runs_are_the_same() -> None:
    assert _compared(OLD).kind == SAME


def test_a_loss_beyond_the_tolerance_is_a_regression() -> None:
    assert _compared(_engine(79.0, 80.0, 81.0, 82.0, 78.0)).kind == WORSE


def test_a_loss_within_the_tolerance_is_none() -> None:
    assert _compared(_engine(91.0, 92.0, 93.0, 92.0, 91.0)).kind == SAME


def test_a_loss_within_the_noise_is_none() -> None:
    assert _compared(_engine(60.0, 80.0, 110.0, 120.0, 70.0)).kind == SAME


def test_a_gain_is_told_as_such() -> None:
    assert _compared(_engine(130.0, 131.0, 132.0, 129.0, 130.0)).kind == BETTER


def test_where_less_is_better_more_is_a_regression() -> None:
    slower = _engine(129.0, 130.0, 131.0, 132.0, 130.0)
    assert _compared(slower, better="less").kind == WORSE


def test_a_few_samples_prove_little() -> None:
    assert _compared(_engine(80.0), old=_engine(100.0)).kind == SAME
    assert _compared(_engine(60.0), old=_engine(100.0)).kind == WORSE


def test_a_row_without_a_number_any_more_is_a_regression() -> None:
    assert _compared(_engine()).kind == GONE


@pytest.mark.parametrize("better", ["more", "less"])
def test_what_the_whole_machine_has_lost_is_no_regression(better: str) -> None:
    half = 0.5 if better == "more" else 2.0
    peer = row("LMDB", 50.0, 50.0, 50.0)
    slow_peer = row("LMDB", 50.0 * half, 50.0 * half, 50.0 * half)
    slow = _engine(*(half * sample for sample in OLD.samples("rate")))
    before = run(workload(OLD, peer, better=better))
    (change,) = compare(before, run(workload(slow, slow_peer, better=better)))
    assert (change.kind, change.factor, change.drift) == (SAME, 0.5, 0.5)
    (change,) = compare(before, run(workload(slow, peer, better=better)))
    assert change.kind == WORSE
    (change,) = compare(before, run(workload(OLD, slow_peer, better=better)))
    assert change.kind == BETTER


def test_runs_of_different_sizes_are_not_compared() -> None:
    with pytest.raises(NotComparableError, match="updates"):
        compare(run(workload(OLD), updates=1), run(workload(OLD), updates=2))


def test_runs_without_a_common_workload_are_not_compared() -> None:
    with pytest.raises(NotComparableError, match="no workload in common"):
        compare(run(workload(OLD, name="update")), run(workload(OLD, name="open")))


def test_another_machine_is_told() -> None:
    old, new = run(workload(OLD)), run(workload(OLD))
    assert different_machine(old, new) == []
    new.environment.update(processor="another", python="CPython 3, an empty call 9 ns")
    assert [text.partition(":")[0] for text in different_machine(old, new)] == ["processor"]
