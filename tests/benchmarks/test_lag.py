from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.contender import Contender, Metrics, Stopwatch
from benchmarks.lag import distribution, lag_metrics, observe, within


@dataclass
class Blocking(Contender):
    """Blocks the loop for a known time where it is measured, and for longer where it is not."""

    name: str = "blocking"
    fresh_process: bool = True

    async def open(self, directory: Path) -> None:
        return

    async def measure(self) -> Metrics:
        time.sleep(0.08)  # noqa: ASYNC251 - what is to be noticed
        with Stopwatch() as watch:
            time.sleep(0.02)  # noqa: ASYNC251
        return watch.rate(1)

    async def request(self) -> None:
        time.sleep(0.005)  # noqa: ASYNC251


def test_a_loop_that_never_turns_is_noticed_and_only_what_is_measured_counts() -> None:
    observed = asyncio.run(observe(Blocking(), 1000, 10.0))
    assert 0.02 <= max(observed.lags) < 0.08
    assert observed.latencies == []


def test_requests_are_made_until_there_are_enough_samples() -> None:
    contender = Blocking(fresh_process=False)
    contender.request_tasks = 2
    observed = asyncio.run(observe(contender, 3, 10.0))
    assert len(observed.lags) == 3
    assert min(observed.latencies) >= 0.005
    assert max(observed.lags) >= 0.004  # two requests of 5 ms between two turns


def test_sampling_ends_at_its_limit() -> None:
    contender = Blocking(fresh_process=False)
    contender.request_tasks = 1
    observed = asyncio.run(observe(contender, 10**6, 0.02))
    assert 1 <= len(observed.lags) < 100


def test_waits_are_cut_to_what_is_measured() -> None:
    waits = [(0.0, 1.0), (1.5, 3.0), (5.0, 9.0)]
    assert within([(2.0, 6.0)], waits) == [1.0, 1.0]
    assert within([(0.5, 0.7), (8.0, 10.0)], waits) == [0.7 - 0.5, 1.0]
    assert within([], waits) == []


def test_a_distribution_ends_with_the_longest() -> None:
    points = distribution([0.001 * number for number in range(1, 101)])
    assert points[-1] == pytest.approx((1.0, 100.0))
    assert dict(points)[0.5] == pytest.approx(51.0)
    assert distribution([]) == []


def test_metrics_are_in_milliseconds() -> None:
    assert lag_metrics([0.001, 0.002])["max"] == 2.0
