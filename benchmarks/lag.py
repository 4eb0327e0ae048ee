"""How long an event loop keeps a task waiting that was due, and how long requests take there."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.contender import Contender, Metric, Metrics, Stopwatch, percentile

METRICS = (
    Metric("p50", " ms"),
    Metric("p99", " ms"),
    Metric("p99.9", " ms"),
    Metric("max", " ms"),
)

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9999, 1.0)
"""Where a distribution is recorded: enough to draw it."""

_INTERVAL_SECONDS = 0.001
_MOST_LATENCIES = 200_000  # the newest ones

Interval = tuple[float, float]


@dataclass(frozen=True)
class Observed:
    """What was seen beside a contender at work, seconds.

    `measured`: what it has measured meanwhile, where that was one `measure`.
    """

    lags: list[float]
    latencies: list[float] = field(default_factory=list)
    measured: Metrics = field(default_factory=dict)


async def observe(contender: Contender, sample_count: int, limit_seconds: float) -> Observed:
    """Let `contender` work while the lag of its event loop is sampled.

    That ends after `sample_count` samples or `limit_seconds`, whichever is first; a `measure` that
    has begun is waited for. A contender with `request_tasks` gets requests from so many tasks, each
    of which lets the loop turn after each request, as a server's handlers do.
    """
    Stopwatch.intervals.clear()
    sampling = asyncio.create_task(_sample(sample_count, limit_seconds))
    await asyncio.sleep(0)  # it sleeps now, and will notice work that never lets the loop turn
    latencies: deque[float] = deque(maxlen=_MOST_LATENCIES)
    measured: Metrics = {}
    try:
        if contender.request_tasks:
            await asyncio.gather(
                *(_ask(contender, sampling, latencies) for _ in range(contender.request_tasks))
            )
        else:
            measured = await contender.measure()
            while not (sampling.done() or contender.fresh_process):
                await asyncio.sleep(0)
                await contender.measure()
    finally:
        sampling.cancel()
        waits = await sampling
    intervals = [] if contender.request_tasks else list(Stopwatch.intervals)
    lags = within(intervals, waits) if intervals else lags_of(waits)
    return Observed(lags, list(latencies), measured)


async def _ask(
    contender: Contender, sampling: asyncio.Task[list[Interval]], latencies: deque[float]
) -> None:
    while not sampling.done():
        start = time.perf_counter()
        await contender.request()
        latencies.append(time.perf_counter() - start)
        await asyncio.sleep(0)  # the next request arrives through the loop, in its turn


async def _sample(sample_count: int, limit_seconds: float = float("inf")) -> list[Interval]:
    """Sleep 1 ms again and again; return when each sleep was due and when it ended."""
    waits: list[Interval] = []
    end = time.perf_counter() + limit_seconds
    resumed = 0.0
    try:
        while len(waits) < sample_count and resumed < end:
            due = time.perf_counter() + _INTERVAL_SECONDS
            await asyncio.sleep(_INTERVAL_SECONDS)
            resumed = time.perf_counter()
            waits.append((due, resumed))
    except asyncio.CancelledError:
        # What was observed has ended; the sample that it kept waiting may be the longest of all.
        waits.append((due, time.perf_counter()))
    return waits


async def sample_lag(sample_count: int) -> list[float]:
    """Sleep 1 ms `sample_count` times; return by how many seconds each sleep was too long."""
    return lags_of(await _sample(sample_count))


def lags_of(waits: Sequence[Interval]) -> list[float]:
    """Return how long each of `waits` (when due, when resumed) was."""
    return [resumed - due for due, resumed in waits if resumed >= due]


def within(intervals: Sequence[Interval], waits: Sequence[Interval]) -> list[float]:
    """Return the parts of `waits` that lie in `intervals`: preparing and checking do not count."""
    lags = []
    for start, end in intervals:
        for due, resumed in waits:
            if resumed >= start and due <= end:
                lags.append(max(0.0, min(resumed, end) - max(due, start)))
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


def distribution(seconds: list[float]) -> list[tuple[float, float]]:
    """Return (share, milliseconds) of `seconds` for each of `SHARES`; [] for nothing."""
    ordered = sorted(seconds)
    return [(share, percentile(ordered, share) * 1e3) for share in SHARES] if ordered else []
