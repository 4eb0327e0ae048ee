"""What resident sessions cost a process: its memory, and the length of a full collection."""

from __future__ import annotations

import gc
import time

from benchmarks.contender import Metric, Metrics, median
from benchmarks.optional import load

METRICS = (Metric("rss", " B/session"), Metric("gc", " ms"))

_COLLECTIONS = 5


def rss_bytes() -> int:
    """Return this process's resident memory, bytes."""
    return int(load("psutil").Process().memory_info().rss)


def resident_metrics(before_bytes: int, session_count: int) -> Metrics:
    """Measure growth since `before_bytes` per session, and the median of five collections."""
    milliseconds = [_collect() for _ in range(_COLLECTIONS)]
    return {
        "rss": (rss_bytes() - before_bytes) / session_count,
        "gc": median(milliseconds),
    }


def _collect() -> float:
    start = time.perf_counter()
    gc.collect()
    return (time.perf_counter() - start) * 1e3
