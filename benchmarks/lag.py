"""How long an event loop keeps a task waiting that was due."""

from __future__ import annotations

import asyncio
import time

from benchmarks.contender import Metric, Metrics, percentile

METRICS = (
    Metric("p50", " ms"),
    Metric("p99", " ms"),
    Metric("p99.9", " ms"),
    Metric("max", " ms"),
)

_INTERVAL_SECONDS = 0.001


async def sample_lag(sample_count: int) -> list[float]:
    """Sleep 1 ms `sample_count` times; return by how many seconds each sleep was too long."""
    lags = []
    for _ in range(sample_count):
        start = time.perf_counter()
        await asyncio.sleep(_INTERVAL_SECONDS)
        lags.append(time.perf_counter() - start - _INTERVAL_SECONDS)
    return lags


def lag_metrics(lags: list[float]) -> Metrics:
    """Summarize `lags` (seconds) in milliseconds."""
    ordered = sorted(lags)
    return {
        "p50": percentile(ordered, 0.5) * 1e3,
        "p99": percentile(ordered, 0.99) * 1e3,
        "p99.9": percentile(ordered, 0.999) * 1e3,
        "max": ordered[-1] * 1e3,
    }
