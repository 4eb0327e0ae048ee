"""Bars: what a workload's result has to reach.

Compared is within a repetition, where both had the same machine a moment apart; the median of
these ratios (or differences) is judged. Medians taken first would compare a quiet minute of one
contender with a busy minute of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from benchmarks.contender import ENGINE, Metrics, median

Samples = Mapping[str, Sequence[Metrics]]
"""Contender's name -> what each of its repetitions measured."""


class Kind(Enum):
    """How a bar compares; the value is how the report writes it."""

    RATIO_AT_LEAST = "≥ {limit:g} × {against}"
    RATIO_AT_MOST = "≤ {limit:g} × {against}"
    EXCESS_AT_MOST = "≤ {against} + {limit:g}{unit}"
    AT_LEAST = "≥ {limit:,g}{unit}"
    AT_MOST = "≤ {limit:,g}{unit}"


@dataclass(frozen=True)
class Bar:
    """One claim: `metric` of `ours`, compared as `kind` says with `limit` or `against`.

    `limit` is a factor for RATIO_AT_LEAST and RATIO_AT_MOST, else in the metric's unit.
    """

    metric: str
    kind: Kind
    limit: float
    against: str | None = None
    ours: str = ENGINE


@dataclass(frozen=True)
class Verdict:
    """A bar, judged. `passed` is None when a number that it needs is missing."""

    claim: str
    measured: str
    passed: bool | None


def judge(bar: Bar, samples: Samples, unit: str) -> Verdict:
    """Judge `bar`; `unit` is that of its metric."""
    compared = bar.kind.value.format(limit=bar.limit, against=bar.against or "", unit=unit)
    claim = f"{bar.metric} of {bar.ours} {compared}"
    ours = values(samples.get(bar.ours, ()), bar.metric)
    theirs = values(samples.get(bar.against or "", ()), bar.metric)
    if not ours or (bar.against is not None and not theirs):
        return Verdict(claim, "not measured", None)
    if bar.kind in {Kind.RATIO_AT_LEAST, Kind.RATIO_AT_MOST}:
        measured = paired(ours, theirs, lambda our, their: our / their)
        at_least = bar.kind is Kind.RATIO_AT_LEAST
        passed = measured >= bar.limit if at_least else measured <= bar.limit
        return Verdict(claim, f"{measured:.2f} ×", passed)
    if bar.kind is Kind.EXCESS_AT_MOST:
        measured = paired(ours, theirs, lambda our, their: our - their)
        return Verdict(claim, f"{measured:+,.0f}{unit}", measured <= bar.limit)
    measured = median(ours)
    passed = measured >= bar.limit if bar.kind is Kind.AT_LEAST else measured <= bar.limit
    digits = ",.3g" if measured < 1000 else ",.0f"
    return Verdict(claim, f"{measured:{digits}}{unit}", passed)


def values(samples: Sequence[Metrics], metric: str) -> list[float]:
    """Return what was measured of `metric`, in the order of the repetitions."""
    return [sample[metric] for sample in samples if metric in sample]


def paired(
    ours: Sequence[float], theirs: Sequence[float], compare: Callable[[float, float], float]
) -> float:
    """Return the median of `compare` over the repetitions that both have."""
    return median(map(compare, ours, theirs))
