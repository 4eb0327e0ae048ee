"""Results to test with."""

from __future__ import annotations

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

LAG = Distribution(
    count=2000, p50=0.1, p99=1.0, p99_9=4.5, max=9.0, points=[(0.5, 0.1), (0.99, 1.0), (1.0, 9.0)]
)


def row(
    contender: str,
    *samples: float,
    role: str = "peer",
    durability: str = "power loss",
    metric: str = "rate",
    failure: Failed | None = None,
) -> RowResult:
    return RowResult.model_validate(
        {
            "contender": contender,
            "durability": durability,
            "called": "inline",
            "role": role,
            "failure": failure,
            "metrics": {metric: measured("/s", list(samples))} if samples else {},
            "lag": LAG if samples else None,
            "latency": LAG if samples else None,
        }
    )


def workload(*rows: RowResult, name: str = "update", better: str = "more") -> WorkloadResult:
    return WorkloadResult(
        name=name,
        definition="change a session & wait",
        seconds=1.0,
        units=[Unit(name="rate", unit="/s", higher_is_better=better == "more")],
        rows=list(rows),
        bars=[BarResult(claim="rate of persistence ≥ 2 × LMDB", measured="1.50 ×", passed=False)],
    )


def run(*workloads: WorkloadResult, **sizes: int) -> RunResult:
    return RunResult(
        schema_version=VERSION,
        created="2026-01-02T03:04:05+00:00",
        environment={"processor": "one <b>of</b> many", "python": "CPython 3, an empty call 1 ns"},
        sizes={"name": "quick", **sizes},
        idle=LAG,
        workloads=list(workloads),
    )
