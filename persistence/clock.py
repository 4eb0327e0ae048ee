"""Time, injected everywhere. No other module calls ``time.*`` itself.

Two times are needed. *Wall time* is what is stored and shown. *Process time* never jumps: within
a process every deadline runs on it, so that an operator who sets the wall clock ten days ahead
neither expires every session nor makes one immortal.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol


class Clock(Protocol):
    """What the engine asks of a clock. Both members are called as ``clock.wall()``."""

    @property
    def wall(self) -> Callable[[], float]:
        """Seconds since the Unix epoch, UTC; may jump."""

    @property
    def monotonic(self) -> Callable[[], float]:
        """Seconds since an arbitrary start; never goes back."""


class SystemClock:
    """The machine's clocks. Class attributes, so that a call costs no Python frame."""

    wall: Callable[[], float] = staticmethod(time.time)
    monotonic: Callable[[], float] = staticmethod(time.monotonic)


class ManualClock:
    """A clock that moves only when told: for tests and simulations.

    Args:
        wall_seconds: the starting wall time, Unix seconds.
        monotonic_seconds: the starting process time, seconds.
    """

    def __init__(
        self, wall_seconds: float = 1_700_000_000.0, monotonic_seconds: float = 1000.0
    ) -> None:
        self._wall = wall_seconds
        self._monotonic = monotonic_seconds

    def wall(self) -> float:
        """Return the wall time, Unix seconds."""
        return self._wall

    def monotonic(self) -> float:
        """Return the process time, seconds."""
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass on both clocks."""
        self._wall += seconds
        self._monotonic += seconds

    def jump_wall(self, seconds: float) -> None:
        """Set the wall clock forward (or back, when negative); no time passes."""
        self._wall += seconds


_TICK_SECONDS: Final = 0.001
_CLOCK_SET_SECONDS: Final = 0.5  # less is drift, or the moment between reading two clocks


class EngineTime:
    """The engine's own time base: wall time when the engine opened, advancing with process time.

    Deadlines in memory and in the index are engine times: comparable with each other, and free of
    wall-clock jumps. What is written to disk is wall time, so each write adds the current `skew`,
    and what is read at opening is wall time, which at that moment *is* engine time.
    """

    def __init__(self, clock: Clock) -> None:
        self._wall = clock.wall
        self._monotonic = self.monotonic = clock.monotonic
        self.base = clock.wall() - clock.monotonic()
        self._skew = 0.0
        self._tick = 0.0
        # A clock that somebody else moves has no flow to cut into ticks.
        self._tick_seconds = _TICK_SECONDS if isinstance(clock, SystemClock) else 0.0

    def now(self) -> float:
        """Return the current engine time, seconds."""
        return self._monotonic() + self.base

    def tick(self) -> float:
        """Return the start of the current millisecond or so: at most `now`, and never goes back.

        The same float object within a tick: every new session keeps one, and a worker that takes
        in ten thousand sessions a second need not keep ten thousand of them.
        """
        now = self._monotonic() + self.base
        if now - self._tick >= self._tick_seconds:
            self._tick = now
        return self._tick

    def skew(self) -> float:
        """Return wall time minus engine time, seconds: 0 unless the wall clock was set.

        It stays the same number until the wall clock has moved by half a second: whatever is shown
        of one moment is then the same whenever one asks.
        """
        skew = self._wall() - (self._monotonic() + self.base)
        if abs(skew - self._skew) >= _CLOCK_SET_SECONDS:
            self._skew = round(skew, 3) if abs(skew) >= _CLOCK_SET_SECONDS else 0.0
        return self._skew
