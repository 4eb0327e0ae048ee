"""Whether the engine has become slower since an older run.

Two runs see two different hours of a machine. So each change of the engine is divided by how the
peers of the same workload have changed meanwhile: they run the same code as before. What is left
counts when it is larger than the tolerance and than the noise: the better quarter of the new
samples is then worse than the worse quarter of the old ones.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from benchmarks.contender import median, percentile
from benchmarks.results import RowResult, RunResult, Unit, WorkloadResult

TOLERANCE = 0.1
"""How much worse is no regression yet."""

_ENOUGH_SAMPLES = 3
_FEW_SAMPLES_FACTOR = 3  # with fewer the noise is not known: three times the tolerance
_MOST_TOLERANCE = 0.95
_NOT_COMPARED = {"max"}  # the longest of thousands of samples: it says what the machine did
_SAME_MACHINE = ("processor", "memory", "file system", "python")

BETTER, SAME, WORSE, GONE = "better", "same", "worse", "gone"


class NotComparableError(Exception):
    """The two runs did not do the same work; the message says what differs."""


@dataclass(frozen=True)
class Change:
    """One metric of one row of the engine.

    Attributes:
        factor: how many times as good it is now; above 1 is better.
        drift: the same of the peers; 1 when there are none.
        kind: BETTER, SAME, WORSE, or GONE: it has no number any more.
    """

    workload: str
    contender: str
    metric: str
    old: float
    new: float
    factor: float
    drift: float
    kind: str


def compare(old: RunResult, new: RunResult, tolerance: float = TOLERANCE) -> list[Change]:
    """Compare what both runs have measured of the engine, in the order of the new one.

    Raises:
        NotComparableError: they are of different sizes, or have no workload in common.
    """
    check_comparable(old, new.sizes, {workload.name for workload in new.workloads})
    before = {workload.name: workload for workload in old.workloads}
    return [
        change
        for workload in new.workloads
        if workload.name in before
        for change in _changes(before[workload.name], workload, tolerance)
    ]


def check_comparable(old: RunResult, sizes: dict[str, Any], names: Collection[str]) -> None:
    """Refuse to compare an older run with one of these sizes and workloads, be it still to come.

    Raises:
        NotComparableError: as `compare`.
    """
    if old.sizes != sizes:
        differing = sorted(
            name
            for name in old.sizes.keys() | sizes.keys()
            if old.sizes.get(name) != sizes.get(name)
        )
        raise NotComparableError(f"the sizes of the runs differ: {', '.join(differing)}")
    if not any(workload.name in names for workload in old.workloads):
        raise NotComparableError("the runs have no workload in common")


def different_machine(old: RunResult, new: RunResult) -> list[str]:
    """Return what is known to differ between the machines of two runs."""
    return [
        f"{name}: {old.environment.get(name)} before, {new.environment.get(name)} now"
        for name in _SAME_MACHINE
        if _stable(old.environment.get(name, "")) != _stable(new.environment.get(name, ""))
    ]


def _stable(text: str) -> str:
    return text.split(", an empty call", maxsplit=1)[0]  # which is measured anew each time


def _changes(old: WorkloadResult, new: WorkloadResult, tolerance: float) -> list[Change]:
    rows = {row.contender: row for row in new.rows}
    found: list[Change] = []
    for unit in old.units:
        if unit.name in _NOT_COMPARED:
            continue
        drift = _drift(old, rows, unit)
        found += [
            _change(new, row, rows[row.contender], unit, drift, tolerance)
            for row in old.rows
            if row.role == "engine" and row.samples(unit.name) and row.contender in rows
        ]
    return found


def _drift(old: WorkloadResult, rows: dict[str, RowResult], unit: Unit) -> float:
    factors = [
        _factor(row.samples(unit.name), rows[row.contender].samples(unit.name), unit)
        for row in old.rows
        if row.role != "engine"
        and row.contender in rows
        and row.samples(unit.name)
        and rows[row.contender].samples(unit.name)
    ]
    return median(factors) if factors else 1.0


def _factor(old: list[float], new: list[float], unit: Unit) -> float:
    before, after = median(old), median(new)
    if before <= 0 or after <= 0:
        return 1.0  # a count or difference around zero has no ratio
    return after / before if unit.higher_is_better else before / after


def _change(
    workload: WorkloadResult,
    old: RowResult,
    new: RowResult,
    unit: Unit,
    drift: float,
    tolerance: float,
) -> Change:
    before, after = old.samples(unit.name), new.samples(unit.name)
    told = (workload.name, old.contender, unit.name, median(before))
    if not after:
        return Change(*told, new=float("nan"), factor=0.0, drift=drift, kind=GONE)
    factor = _factor(before, after, unit)
    if min(len(before), len(after)) < _ENOUGH_SAMPLES:
        tolerance = min(tolerance * _FEW_SAMPLES_FACTOR, _MOST_TOLERANCE)
    kind = SAME
    if factor / drift < 1 - tolerance and _apart(after, before, unit, drift):
        kind = WORSE
    elif factor / drift > 1 / (1 - tolerance) and _apart(before, after, unit, 1 / drift):
        kind = BETTER
    return Change(*told, new=median(after), factor=factor, drift=drift, kind=kind)


def _apart(worse: list[float], better: list[float], unit: Unit, drift: float) -> bool:
    """Whether the better quarter of `worse`, its drift taken out, is below that of `better`."""
    sign = 1 if unit.higher_is_better else -1
    undo = 1 / drift if unit.higher_is_better else drift
    upper = percentile(sorted(sign * value * undo for value in worse), 0.75)
    lower = percentile(sorted(sign * value for value in better), 0.25)
    return upper < lower
