"""How long a shutdown may take, and how it is cut short."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Final

from persistence.clock import Clock

_log = logging.getLogger("persistence")

_CANCEL_SECONDS: Final = 1.0
_END_SECONDS: Final = 1.0
_END_SHARE: Final = 0.2


class Grace:
    """The time that a shutdown has for what may take long. What must not be left out has no limit.

    That comes last, so a second of the time, or a fifth where that is less, is kept for it.

    Args:
        seconds: ``shutdown.grace_seconds``.
        clock: process time.
    """

    def __init__(self, seconds: float, clock: Clock) -> None:
        self._seconds = seconds
        self._now = clock.monotonic
        self._end: float | None = None
        self._is_over = asyncio.Event()

    def begin(self) -> None:
        """The clock runs from the first call on."""
        if self._end is None:
            kept_seconds = min(_END_SECONDS, _END_SHARE * self._seconds)
            self._end = self._now() + self._seconds - kept_seconds

    def limit(self, seconds: float) -> None:
        """Leave at most so many seconds from now on; 0: cut short what is going on."""
        end = self._now() + seconds
        self._end = end if self._end is None else min(self._end, end)
        if seconds <= 0:
            self._is_over.set()

    @property
    def left_seconds(self) -> float:
        """What is left of it."""
        assert self._end is not None, "it has begun"
        return max(0.0, self._end - self._now())

    async def spend(self, work: Coroutine[Any, Any, object], what: str, share: float = 1.0) -> bool:
        """Do `work` if there is time for it; return whether it was done.

        An error in it is logged and not raised: a shutdown goes on.

        Args:
            work: is cancelled when the time is over.
            what: to be named in the log.
            share: it may take this share of what is left.
        """
        task = asyncio.ensure_future(work)
        over = asyncio.ensure_future(self._is_over.wait())
        await asyncio.wait(
            (task, over), timeout=share * self.left_seconds, return_when=asyncio.FIRST_COMPLETED
        )
        over.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,), timeout=_CANCEL_SECONDS)
            _log.warning("closing without waiting any longer for %s", what)
            return False
        if not task.cancelled() and task.exception() is not None:
            _log.warning("while closing, %s: %s", what, task.exception())
            return False
        return not task.cancelled()
