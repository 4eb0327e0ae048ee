"""Work on the event loop in slices: long loops give way before anybody notices them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

SLICE_SECONDS: Final = 0.0005


class Slices:
    """Yields to the event loop whenever a slice is used up. Call `due` often, it is cheap.

    Args:
        monotonic: process time, seconds.
        seconds: how long a slice is.
    """

    __slots__ = ("_end", "_monotonic", "_seconds")

    def __init__(self, monotonic: Callable[[], float], seconds: float = SLICE_SECONDS) -> None:
        self._monotonic = monotonic
        self._seconds = seconds
        self._end = monotonic() + seconds

    def due(self) -> bool:
        """Whether this slice is used up; then ``await give_way()``."""
        return self._monotonic() >= self._end

    async def give_way(self) -> None:
        """Let the event loop run everything else once, then start another slice."""
        await asyncio.sleep(0)
        self._end = self._monotonic() + self._seconds

    async def give_way_if_due(self) -> None:
        """Let everything else run if this slice is used up."""
        if self._monotonic() >= self._end:
            await self.give_way()
