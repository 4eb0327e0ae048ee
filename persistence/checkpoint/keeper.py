"""Makes a worker's checkpoints: on request, at intervals, and before too much is unshipped.

How much may be unshipped follows from how fast checkpoints have been: what a shutdown must ship
within its grace period may not grow beyond that. So when the log has grown by more than half of
what the measured throughput ships in the grace period, a checkpoint is made at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from persistence.checkpoint.catalogue import (
    CheckpointInfo,
    delete_checkpoint,
    list_checkpoints,
)
from persistence.checkpoint.create import OnProgress, Plan, create_checkpoint
from persistence.checkpoint.restore import NewIds, StagedRestore, stage_restore
from persistence.checkpoint.stores import CheckpointStore
from persistence.clock import Clock
from persistence.disk.tier import DiskTier
from persistence.errors import PersistenceError

_log = logging.getLogger("persistence.checkpoint")

_ASSUMED_BYTES_PER_SECOND: Final = 20 * 2**20  # until one has been measured
_GRACE_SHARE: Final = 0.5
_WEIGHT_OF_NEWEST: Final = 0.5
_MEASURED_BYTES: Final = 2**20  # of a smaller one, most of the time is not shipping
_LOOK_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class CheckpointStats:
    """About checkpoints.

    Attributes:
        made: how many since the manager was opened.
        failed: how many could not be made.
        unshipped_bytes: about what the next one has to ship: what the log has grown by since the
            last one, or all that is needed of it where there is none to go on from.
        limit_bytes: when so much is unshipped, one is made at once; 0: never.
        bytes_per_second: how fast they are made, by the log's bytes.
        last_id: of the last one; None: there was none yet.
    """

    made: int = 0
    failed: int = 0
    unshipped_bytes: int = 0
    limit_bytes: int = 0
    bytes_per_second: float = 0.0
    last_id: str | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    """When checkpoints are made.

    Attributes:
        interval_seconds: between two; 0: none by the clock.
        min_pause_seconds: at least, between the end of one and the start of the next.
        grace_seconds: what a shutdown has; 0: no checkpoint is made at a shutdown.
    """

    interval_seconds: float
    min_pause_seconds: float
    grace_seconds: float

    @property
    def is_needed(self) -> bool:
        """Whether anything makes checkpoints by itself."""
        return self.interval_seconds > 0 or self.grace_seconds > 0


class Keeper:
    """One worker's checkpoints. One is made or restored at a time.

    Args:
        tier: the log.
        store: where they go.
        plan: how they are made.
        schedule: when.
        clock: time.
        prepare: brings into the log what is only in memory.
        learn_keys: looks for keys that other workers may have begun to seal with. It is called
            before the manifests of a store are opened, which are those of all its workers.
    """

    def __init__(
        self,
        tier: DiskTier,
        store: CheckpointStore,
        plan: Plan,
        schedule: Schedule,
        clock: Clock,
        prepare: Callable[[], Awaitable[None]],
        learn_keys: Callable[[], Awaitable[None]],
    ) -> None:
        self._tier = tier
        self._store = store
        self._plan = plan
        self._schedule = schedule
        self._clock = clock
        self._prepare = prepare
        self._learn_keys = learn_keys
        self._lock = asyncio.Lock()
        self._made = 0
        self._failed = 0
        self._last_id: str | None = None
        self._bytes_per_second = float(_ASSUMED_BYTES_PER_SECOND)
        self._shipped_at = self._shipped_before()
        self._ended = clock.monotonic()
        self._task: asyncio.Task[None] | None = None

    @property
    def at_shutdown(self) -> bool:
        """Whether a shutdown ends with one."""
        return self._schedule.grace_seconds > 0

    def start(self) -> None:
        """Start making them by the schedule."""
        if self._schedule.is_needed:
            self._task = asyncio.create_task(self._run(), name="persistence-checkpoint")

    async def stop(self) -> None:
        """Stop; one that is being made is given up, and leaves nothing that counts."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    # --- what callers do ----------------------------------------------------------------------

    async def create(
        self, reason: str, on_progress: OnProgress | None = None, *, is_last: bool = False
    ) -> CheckpointInfo:
        """Make one of everything that is acknowledged now.

        Args:
            reason: is kept with it.
            on_progress: told how far it is.
            is_last: before a shutdown, whose time is short (see `create_checkpoint`).
        """
        async with self._lock:
            await self._prepare()
            await self._look_for_keys()
            written = self._tier.writer.bytes_written
            started = self._clock.monotonic()
            try:
                info = await create_checkpoint(
                    self._tier,
                    self._store,
                    self._plan,
                    self._clock,
                    reason,
                    on_progress,
                    is_last=is_last,
                )
            except Exception:
                self._failed += 1
                raise
            finally:
                self._ended = self._clock.monotonic()
            self._measure(written - self._shipped_at, self._ended - started)
            self._shipped_at = written
            self._made += 1
            self._last_id = info.id
            return info

    def _measure(self, nbytes: int, seconds: float) -> None:
        if nbytes >= _MEASURED_BYTES and seconds > 0:
            newest = nbytes / seconds
            self._bytes_per_second += _WEIGHT_OF_NEWEST * (newest - self._bytes_per_second)

    async def list(self) -> list[CheckpointInfo]:
        """Return all restore points, oldest first."""
        await self._look_for_keys()
        return await list_checkpoints(self._store, self._plan.sealer)

    async def delete(self, checkpoint_id: str) -> None:
        """Delete one."""
        async with self._lock:
            await self._look_for_keys()
            await delete_checkpoint(self._store, checkpoint_id, self._plan.sealer)

    async def restore(
        self,
        wanted: str,
        new_ids: NewIds,
        skew: float,
        segment_bytes: int,
        install: Callable[[StagedRestore], Awaitable[None]],
        on_progress: OnProgress | None = None,
    ) -> StagedRestore:
        """Fetch, verify and stage a checkpoint, then let `install` put it in place."""
        async with self._lock:
            await self._look_for_keys()
            staged = await stage_restore(
                self._tier,
                self._store,
                self._clock,
                wanted,
                new_ids=new_ids,
                skew=skew,
                segment_bytes=segment_bytes,
                on_progress=on_progress,
                seals=self._plan.seals,
            )
            await install(staged)
            self._shipped_at = self._shipped_before()
            return staged

    async def _look_for_keys(self) -> None:
        if self._plan.seals is not None:
            await self._learn_keys()

    def stats(self) -> CheckpointStats:
        """Return numbers about them."""
        return CheckpointStats(
            made=self._made,
            failed=self._failed,
            unshipped_bytes=self._unshipped_bytes,
            limit_bytes=self._limit_bytes,
            bytes_per_second=self._bytes_per_second,
            last_id=self._last_id,
        )

    # --- by the schedule ----------------------------------------------------------------------

    def _shipped_before(self) -> int:
        """Return the `bytes_written` at which there was nothing to ship; may be negative.

        What an earlier life of the worker has left unshipped counts as much as what this one does.
        """
        newest = self._tier.shipped.newest
        if newest is not None and newest.store != self._store.name:
            newest = None
        sequence = 0 if newest is None else newest.sequence
        return self._tier.writer.bytes_written - self._tier.bytes_behind(sequence)

    @property
    def _unshipped_bytes(self) -> int:
        return self._tier.writer.bytes_written - self._shipped_at

    @property
    def _limit_bytes(self) -> int:
        return int(_GRACE_SHARE * self._schedule.grace_seconds * self._bytes_per_second)

    def _is_due(self) -> str | None:
        """Return why one is due now; None: none is."""
        since = self._clock.monotonic() - self._ended
        schedule = self._schedule
        if since < schedule.min_pause_seconds:
            return None
        if 0 < schedule.interval_seconds <= since:
            return "interval"
        if schedule.grace_seconds and self._unshipped_bytes > self._limit_bytes:
            return "unshipped"
        return None

    async def _run(self) -> None:
        look = min(_LOOK_SECONDS, self._schedule.interval_seconds or _LOOK_SECONDS)
        while True:
            await asyncio.sleep(look)
            reason = self._is_due()
            if reason is None:
                continue
            try:
                await self.create(reason)
            except PersistenceError as error:
                _log.warning("no checkpoint was made: %s", error)
            except Exception:  # noqa: BLE001 - logged; the next one tries again
                _log.exception("making a checkpoint failed")
