"""What resident sessions cost a process: its memory, and the length of a full collection.

A full collection goes over everything there is, modules included, unless that has been frozen, as
`persistence.worker.run` and many servers do. "gc" is with the modules frozen; "gc of all" and "gc
before" (there were sessions) are without.
"""

from __future__ import annotations

import gc
import time

from benchmarks.contender import Metric, Metrics, median
from benchmarks.optional import load

METRICS = (
    Metric("rss", " B/session"),
    Metric("gc", " ms"),
    Metric("gc of all", " ms"),
    Metric("gc before", " ms"),
)

_COLLECTIONS = 5


def rss_bytes() -> int:
    """Return this process's resident memory, bytes."""
    return int(load("psutil").Process().memory_info().rss)


class Growth:
    """What is resident now; `metrics` then measures what the sessions have added."""

    def __init__(self) -> None:
        gc.unfreeze()
        self._collection_ms = _collection_ms()  # of interpreter and modules alone
        gc.freeze()
        self._rss_bytes = rss_bytes()

    def metrics(self, session_count: int) -> Metrics:
        """Measure the growth per session, and full collections before and after."""
        collection_ms = _collection_ms()
        rss = (rss_bytes() - self._rss_bytes) / session_count  # garbage does not count
        gc.unfreeze()
        return {
            "rss": rss,
            "gc": collection_ms,
            "gc of all": _collection_ms(),
            "gc before": self._collection_ms,
        }


def _collection_ms() -> float:
    """Return the median length of several full collections in a row, milliseconds."""
    return median(_collect() for _ in range(_COLLECTIONS))


def _collect() -> float:
    start = time.perf_counter()
    gc.collect()
    return (time.perf_counter() - start) * 1e3
