"""When what has been appended is synced, and who waits for that.

With ``disk.fsync = "always"`` an append syncs by itself, and there is left what `flush` asks for.
Else a sync runs beside the next appends: every ``flush_interval_seconds``, and when so much has
been written since the last one that a segment would be full of it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from functools import partial
from typing import Final

from persistence.config import DiskConfig
from persistence.disk.tier import DiskTier
from persistence.errors import PersistenceError, again

_SYNCED_EARLY: Final = 1 / 8  # of a segment: with `interval`, so much is synced before its time


class Syncs:
    """The syncs of one queue of commits, one at a time. Every method runs on the event loop.

    Args:
        disk: what is synced.
        config: ``fsync``, ``flush_interval_seconds``, ``segment_bytes``.
        oldest_undecided: returns the number of the first commit that has not been decided.
        wake: called when `is_wanted` may have become true, or a sync has ended.

    Attributes:
        failure: what a sync ended with that nobody thought of.
    """

    def __init__(
        self,
        disk: DiskTier,
        config: DiskConfig,
        *,
        oldest_undecided: Callable[[], float],
        wake: Callable[[], None],
    ) -> None:
        self.failure: BaseException | None = None
        self._disk = disk
        self._oldest_undecided = oldest_undecided
        self._wake = wake
        is_timed = config.fsync == "interval"
        self._later_seconds = config.flush_interval_seconds if is_timed else None
        # So that little is left to be synced when a segment is full, which updates wait for.
        self._early_bytes = config.segment_bytes * _SYNCED_EARLY if is_timed else math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._is_due = False
        self._syncing: asyncio.Future[None] | None = None
        self._bytes_before = 0  # that had been written when the last sync was started
        self._flushes: list[tuple[int, asyncio.Future[None]]] = []

    # --- when ---------------------------------------------------------------------------------

    def appended(self) -> None:
        """Note that something is in the log: with `interval` a sync follows in time."""
        if self._timer is None and self._later_seconds is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._later_seconds, self._time_is_up)

    def _time_is_up(self) -> None:
        self._timer = None
        self._is_due = True
        self._wake()

    def stop_timer(self) -> None:
        """Let no more syncs come by time: the queue is closing, and ends with one."""
        self._later_seconds = None
        if self._timer is not None:
            self._timer.cancel()

    @property
    def is_wanted(self) -> bool:
        """Whether a sync is to be started: one at a time."""
        return self._syncing is None and (
            self._is_due
            or self._flushes_are_due()
            or self._disk.writer.bytes_written - self._bytes_before > self._early_bytes
        )

    def _flushes_are_due(self) -> bool:
        return bool(self._flushes) and self._oldest_undecided() > self._flushes[0][0]

    @property
    def is_behind(self) -> bool:
        """Whether a sync has come to take longer than the interval.

        Then updates wait for it: what is acknowledged and not synced must not grow with the time
        that the disk takes. It is never more than the updates of two intervals, nor, as a segment
        is synced when it is full, more than a segment.
        """
        return self._is_due and self._syncing is not None

    # --- one sync -----------------------------------------------------------------------------

    def start(self, submitted: int) -> None:
        """Have synced what is in the log now, while the next batches are written.

        Args:
            submitted: the number of the last commit. What comes later is not covered, nor what is
                decided meanwhile.
        """
        self._is_due = False
        writer = self._disk.writer
        self._bytes_before = writer.bytes_written
        covered = min(self._oldest_undecided(), submitted + 1)
        if writer.is_synced and writer.poisoned is None:
            self.answer(None, covered)
            return
        self._syncing = self._disk.threads.sync(writer.sync)
        self._syncing.add_done_callback(partial(self._ended, covered))

    def _ended(self, covered: float, syncing: asyncio.Future[None]) -> None:
        """Answer the flushes that waited for a sync; those that came later wait for another."""
        self._syncing = None
        error = syncing.exception()
        if error is None or isinstance(error, PersistenceError):
            self.answer(error, covered)
        else:
            self.failure = error
        self._wake()

    async def ended(self) -> None:
        """Wait for the sync that is under way, whatever it ends with."""
        if self._syncing is not None:
            await asyncio.wait([self._syncing])

    # --- flushes ------------------------------------------------------------------------------

    async def flushed(self, submitted: int) -> None:
        """Wait until everything up to commit number `submitted` is decided and synced.

        Raises:
            WriteOutcomeUnknown: a sync failed.
        """
        flushed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._flushes.append((submitted, flushed))
        self._wake()
        await flushed

    def answer(self, error: PersistenceError | None, covered: float = math.inf) -> None:
        """Answer those who wait for commits before number `covered`; on an error, everybody."""
        waiting = []
        for target, flushed in self._flushes:
            if error is None and covered <= target:
                waiting.append((target, flushed))
            elif not flushed.done():
                if error is None:
                    flushed.set_result(None)
                else:
                    flushed.set_exception(again(error))
        self._flushes = waiting
