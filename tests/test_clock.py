from __future__ import annotations

import time

import pytest

from persistence import Clock, ManualClock, SystemClock
from persistence.clock import EngineTime
from tests.engine import DAY


def test_the_system_clock_tells_the_machines_times() -> None:
    clock: Clock = SystemClock()
    assert abs(clock.wall() - time.time()) < 1
    assert abs(clock.monotonic() - time.monotonic()) < 1


def test_a_manual_clock_stands_still_until_it_is_told_to_move() -> None:
    clock = ManualClock(wall_seconds=500.0, monotonic_seconds=20.0)
    assert (clock.wall(), clock.monotonic()) == (500.0, 20.0)
    assert (clock.wall(), clock.monotonic()) == (500.0, 20.0)
    clock.advance(1.5)
    assert (clock.wall(), clock.monotonic()) == (501.5, 21.5)


@pytest.mark.parametrize("seconds", [10 * DAY, -10 * DAY])
def test_a_jump_moves_the_wall_clock_and_lets_no_time_pass(seconds: float) -> None:
    clock = ManualClock(wall_seconds=10_000.0, monotonic_seconds=20.0)
    clock.jump_wall(seconds)
    assert (clock.wall(), clock.monotonic()) == (10_000.0 + seconds, 20.0)


def test_engine_time_is_wall_time_when_the_engine_opens() -> None:
    clock = ManualClock()
    assert EngineTime(clock).now() == clock.wall()
    assert EngineTime(clock).skew() == 0


@pytest.mark.parametrize("seconds", [10 * DAY, -10 * DAY, 0.75])
def test_engine_time_goes_on_through_a_jump_and_the_skew_tells_the_jump(seconds: float) -> None:
    clock = ManualClock()
    engine_time = EngineTime(clock)
    opened = engine_time.now()
    clock.advance(5)
    clock.jump_wall(seconds)
    clock.advance(7)
    assert engine_time.now() == opened + 12
    assert engine_time.skew() == seconds
    assert engine_time.now() + engine_time.skew() == clock.wall()


def test_two_clocks_read_one_after_the_other_are_not_taken_for_a_jump() -> None:
    clock = ManualClock()
    engine_time = EngineTime(clock)
    clock.jump_wall(0.0004)
    assert engine_time.skew() == 0


def test_a_clock_that_drifts_is_followed_in_steps_of_half_a_second() -> None:
    clock = ManualClock()
    engine_time = EngineTime(clock)
    skews = []
    for _ in range(4):
        clock.jump_wall(0.25)
        skews.append(engine_time.skew())
    assert skews == [0, 0.5, 0.5, 1.0]
    clock.jump_wall(-1.0)
    assert engine_time.skew() == 0


def test_a_clock_moved_by_hand_is_exact() -> None:
    clock = ManualClock()
    engine_time = EngineTime(clock)
    opened = engine_time.now(), engine_time.tick()
    clock.advance(0.0004)
    for passed in (engine_time.now() - opened[0], engine_time.tick() - opened[1]):
        assert passed == pytest.approx(0.0004, rel=1e-3)


def test_ticks_are_shared_and_never_ahead() -> None:
    engine_time = EngineTime(SystemClock())
    ticks = []
    for _ in range(2000):
        ticks.append(engine_time.tick())
        assert engine_time.now() - 0.1 < ticks[-1] <= engine_time.now()
    assert ticks == sorted(ticks)
    assert len(set(map(id, ticks))) < 500
