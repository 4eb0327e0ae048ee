"""Bars: what a workload's result has to reach, judged on medians."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from benchmarks.contender import ENGINE, Metrics

Medians = Mapping[str, Metrics]
"""Contender's name -> metric's name -> median."""


class Kind(Enum):
    """How a bar compares; the value is how the report writes it."""

    RATIO_AT_LEAST = "≥ {limit:g} × {against}"
    EXCESS_AT_MOST = "≤ {against} + {limit:g}{unit}"
    AT_LEAST = "≥ {limit:,g}{unit}"
    AT_MOST = "≤ {limit:,g}{unit}"


@dataclass(frozen=True)
class Bar:
    """One claim: `metric` of `ours`, compared as `kind` says with `limit` or `against`.

    `limit` is a factor for RATIO_AT_LEAST, else in the metric's unit.
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


def judge(bar: Bar, medians: Medians, unit: str) -> Verdict:
    """Judge `bar`; `unit` is that of its metric."""
    against = bar.against or ""
    compared = bar.kind.value.format(limit=bar.limit, against=against, unit=unit)
    claim = f"{bar.metric} of {bar.ours} {compared}"
    ours = medians.get(bar.ours, {}).get(bar.metric)
    theirs = medians.get(against, {}).get(bar.metric)
    if ours is None or (bar.against is not None and theirs is None):
        return Verdict(claim, "not measured", None)
    if bar.kind is Kind.RATIO_AT_LEAST:
        assert theirs, f"a ratio bar needs a peer: {bar}"
        return Verdict(claim, f"{ours / theirs:.2f} ×", ours / theirs >= bar.limit)
    if bar.kind is Kind.EXCESS_AT_MOST:
        assert theirs is not None, f"an excess bar needs a peer: {bar}"
        return Verdict(claim, f"{ours - theirs:+,.0f}{unit}", ours - theirs <= bar.limit)
    passed = ours >= bar.limit if bar.kind is Kind.AT_LEAST else ours <= bar.limit
    return Verdict(claim, f"{ours:,.3g}{unit}" if ours < 1000 else f"{ours:,.0f}{unit}", passed)
