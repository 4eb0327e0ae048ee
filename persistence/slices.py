"""Work on the event loop in slices: long loops give way before anybody notices them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

SLICE_SECONDS: Final = 0.0005
_REST_SECONDS: Final = 0.001  # of the event loop's timers at least a tick


def short_rest() -> float:
    """Return how long to rest between two slices of work that nobody waits for, seconds."""
    return _REST_SECONDS


class Slices:
    """Yields to the event loop whenever a slice is used up. Call `due` often, it is cheap.

    What only gives way has all of the loop that nobody else uses. Others get their turn, but the
    loop is never idle, and while it is not, the engine's own threads wait for the interpreter lock
    up to `sys.getswitchinterval()` (5 ms) at each step. So what nobody waits for *rests*.

    Args:
        monotonic: process time, seconds.
        seconds: how long a slice is.
        rest_seconds: tells after each how long to rest.
    """

    __slots__ = ("_end", "_monotonic", "_rest_seconds", "_seconds")

    def __init__(
        self,
        monotonic: Callable[[], float],
        seconds: float = SLICE_SECONDS,
        *,
        rest_seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._monotonic = monotonic
        self._seconds = seconds
        self._rest_seconds = rest_seconds
        self._end = monotonic() + seconds

    def due(self) -> bool:
        """Whether this slice is used up; then ``await give_way()``."""
        return self._monotonic() >= self._end

    async def give_way(self) -> None:
        """Let the event loop run everything else, at least once, then start another slice."""
        await asyncio.sleep(self._rest_seconds())
        self._end = self._monotonic() + self._seconds

    async def give_way_if_due(self) -> None:
        """Let everything else run if this slice is used up."""
        if self._monotonic() >= self._end:
            await self.give_way()
