"""From what the runner has measured to results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Literal

from benchmarks.contender import Contender
from benchmarks.lag import distribution, lag_metrics
from benchmarks.results import (
    VERSION,
    BarResult,
    Distribution,
    Failed,
    RowResult,
    RunResult,
    Unit,
    WorkloadResult,
    measured,
)
from benchmarks.runner import Result, Row
from benchmarks.sizes import Sizes


def run_result(
    environment: dict[str, str], sizes: Sizes, idle: list[float], results: Sequence[Result]
) -> RunResult:
    """Return a whole run; `idle` are lags in seconds."""
    return RunResult(
        schema_version=VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=environment,
        sizes=sizes_result(sizes),
        idle=_distribution(idle),
        workloads=[workload_result(result) for result in results],
    )


def sizes_result(sizes: Sizes) -> dict[str, Any]:
    """Return sizes as they are read back from JSON, so that two runs can be compared."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(sizes).items()
    }


def workload_result(result: Result) -> WorkloadResult:
    """Return one workload."""
    workload = result.workload
    units = [Unit.of(metric) for metric in workload.metrics]
    return WorkloadResult(
        name=workload.name,
        definition=workload.definition,
        seconds=result.seconds,
        size_unit=workload.size_unit,
        units=units,
        rows=[_row(row, units) for row in result.rows],
        bars=[BarResult(**asdict(verdict)) for verdict in result.verdicts],
    )


def _row(row: Row, units: list[Unit]) -> RowResult:
    by, seen = row.by, row.observed
    return RowResult(
        contender=by.name,
        durability=by.durability,
        called=by.called,
        role=_role(by),
        series=by.series,
        size=by.size,
        failure=Failed(**asdict(row.failure)) if row.failure else None,
        metrics={
            unit.name: measured(unit.unit, row.values(unit.name))
            for unit in units
            if row.values(unit.name)
        },
        lag=_distribution(seen.lags) if seen and seen.lags else None,
        latency=_distribution(seen.latencies) if seen and seen.latencies else None,
    )


def _role(by: Contender) -> Literal["engine", "peer", "limit"]:
    return "engine" if by.ours else "limit" if by.is_limit else "peer"


def _distribution(seconds: list[float]) -> Distribution:
    summary = lag_metrics(seconds)
    return Distribution(
        count=len(seconds),
        p50=summary["p50"],
        p99=summary["p99"],
        p99_9=summary["p99.9"],
        max=summary["max"],
        points=distribution(seconds),
    )
