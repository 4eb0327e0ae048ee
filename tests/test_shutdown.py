"""How the time of a shutdown is spent."""

from __future__ import annotations

import asyncio
import logging

import pytest

from persistence import ManualClock, SystemClock
from persistence.shutdown import Grace


@pytest.mark.parametrize(
    ("seconds", "left_seconds"), [(25.0, 24.0), (5.0, 4.0), (2.0, 1.6), (0, 0)]
)
def test_some_of_the_time_is_kept_for_the_end(seconds: float, left_seconds: float) -> None:
    grace = Grace(seconds, ManualClock())
    grace.begin()
    assert grace.left_seconds == pytest.approx(left_seconds)


def test_the_time_runs_from_the_first_beginning_on() -> None:
    clock = ManualClock()
    grace = Grace(25.0, clock)
    grace.begin()
    clock.advance(10.0)
    grace.begin()
    assert grace.left_seconds == 14.0
    grace.limit(5.0)
    assert grace.left_seconds == 5.0
    grace.limit(60.0)
    assert grace.left_seconds == 5.0, "it is never more again"


async def test_work_that_has_its_time_is_done_and_what_is_over_is_cancelled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    grace = Grace(0.05, SystemClock())
    grace.begin()
    assert await grace.spend(asyncio.sleep(0), "the first part")
    with caplog.at_level(logging.WARNING):
        assert not await grace.spend(asyncio.Event().wait(), "the second part")
    assert "without waiting any longer for the second part" in caplog.text


async def test_an_error_is_logged_and_the_shutdown_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail() -> None:
        raise OSError("the cable")

    grace = Grace(25.0, SystemClock())
    grace.begin()
    with caplog.at_level(logging.WARNING):
        assert not await grace.spend(fail(), "the last part")
    assert "while closing, the last part: the cable" in caplog.text


async def test_cut_short_it_waits_for_nothing() -> None:
    grace = Grace(3600.0, SystemClock())
    grace.begin()
    spending = asyncio.create_task(grace.spend(asyncio.Event().wait(), "a part"))
    await asyncio.sleep(0)
    grace.limit(0)
    assert not await spending
