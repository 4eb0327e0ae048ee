"""The memory budget, and how sessions leave memory for the log: spilling.

A session that is in the log already leaves memory for free; one that is not is committed first.
*Leaving* means that it has left memory and is on its way into the log; until it is there, it is
found in the commit that carries it, and comes back if that fails.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from persistence.clock import Clock, EngineTime
from persistence.commit import Commit, row_user
from persistence.config import MemoryConfig
from persistence.disk.format import PUT
from persistence.disk.tier import DiskTier
from persistence.errors import DiskFull, PersistenceError, printable
from persistence.memory.tier import MemoryTier, deadline_of
from persistence.record import NO_ID
from persistence.renewals import IDS_BYTES, Renewals
from persistence.slices import Slices

_log = logging.getLogger("persistence.residency")

_VICTIMS_PER_WRITE: Final = 32
_VICTIMS_PER_STEP: Final = 512


class Spilling(Renewals):
    """Keeps memory within its budget.

    Args:
        config: thresholds of the budget.
        memory: the memory tier.
        disk: the disk tier.
        clock: time.
        time: the engine's time base.

    Attributes:
        unlisted: those of `unlogged` that the log has no version of.
        on_leave: gets the ids of sessions that are about to leave memory; None: nobody asks.
        spilled: how many sessions have left memory.
        spill_failures: how many could not, because the disk took nothing.
    """

    def __init__(
        self,
        config: MemoryConfig,
        memory: MemoryTier,
        disk: DiskTier,
        clock: Clock,
        time: EngineTime,
    ) -> None:
        super().__init__(memory, disk, clock, time)
        self.unlisted: set[str] = set()
        self.on_leave: Callable[[Sequence[str]], None] | None = None
        self.spilled = 0
        self.spill_failures = 0
        self._leaving: dict[str, Commit] = {}
        self._fingerprint = disk.fingerprint
        self._config = config
        self._spilling: asyncio.Task[None] | None = None
        self.set_budget(memory.budget_bytes)

    # --- the budget ---------------------------------------------------------------------------

    def set_budget(self, budget_bytes: int) -> None:
        """Set the effective budget, and spill if it is exceeded now."""
        self.memory.budget_bytes = budget_bytes
        self._large_bytes = budget_bytes // 2  # only records this large may exceed the budget
        self._threshold_bytes = budget_bytes * self._config.spill_threshold
        self._target_bytes = budget_bytes * self._config.spill_target
        if self.memory.used_bytes > self._threshold_bytes:
            self._spill_in_background()

    def spill_down(self, spare: str | None = None) -> None:
        """Called after everything that adds to memory: act on a crossed threshold at once.

        A few sessions leave right here, and as many as it takes to be within the budget again;
        the rest of the way down to ``memory.spill_target`` is gone in slices in the background.
        """
        memory = self.memory
        if memory.used_bytes <= self._threshold_bytes:
            return
        while True:
            victims = memory.victims(self._target_bytes, _VICTIMS_PER_WRITE)
            if spare in victims:
                victims.remove(spare)
            self._evict(victims)
            if memory.used_bytes <= memory.budget_bytes or not victims:
                break
        if memory.used_bytes > self._target_bytes:
            self._spill_in_background()

    def _spill_in_background(self) -> None:
        if self._spilling is None:
            self._spilling = asyncio.create_task(self._spill_to_target(), name="persistence-spill")
            self._spilling.add_done_callback(self._spilling_ended)

    def _spilling_ended(self, task: asyncio.Task[None]) -> None:
        self._spilling = None
        if not task.cancelled() and task.exception() is not None:
            _log.error("spilling stopped", exc_info=task.exception())

    async def _spill_to_target(self) -> None:
        await self.spill_to(self._target_bytes)

    async def spill_to(self, target_bytes: float) -> None:
        """Spill in policy order until memory uses at most `target_bytes`, in slices.

        Gives up when the disk takes nothing; the sessions stay in memory.
        """
        slices = Slices(self._clock.monotonic)
        failures = self.spill_failures
        while self.memory.used_bytes > target_bytes:
            victims = self.memory.victims(target_bytes, _VICTIMS_PER_STEP)
            for start in range(0, len(victims), _VICTIMS_PER_WRITE):
                self._evict(victims[start : start + _VICTIMS_PER_WRITE])
                await slices.give_way_if_due()
                if self._commits.is_full:
                    await self._commits.admission()
            if not victims or self.spill_failures > failures:
                return

    # --- leaving ------------------------------------------------------------------------------

    def _evict(self, session_ids: Sequence[str]) -> None:
        """Let sessions leave memory; those that are not in the log yet are on their way then."""
        if self.on_leave is not None:
            self.on_leave(session_ids)
        memory = self.memory
        rest = memory.shed(session_ids)
        self.spilled += len(session_ids) - len(rest)
        for session_id in rest:
            taken = memory.take(session_id)
            if taken is None:
                continue
            key = session_id.encode()
            if self.unlogged and session_id in self.unlogged:
                self._submit_spill(session_id, key, *taken)
                continue
            record, accessed, life, cap = taken
            deadline = accessed + life if life > 0 else -life
            deadline = min(deadline, cap)
            fingerprint = self._fingerprint(key)
            self.note_access(session_id, key, fingerprint, record, accessed, life, deadline)
            self.spilled += 1

    def _submit_spill(
        self, session_id: str, key: bytes, record: bytes, accessed: float, life: float, cap: float
    ) -> None:
        commit = self.put_commit(session_id, key, record, accessed, life, cap)
        commit.spills = True
        self._leaving[session_id] = commit
        if session_id in self._commits.tails:
            # The next version, or the end, is on its way to the log. Behind that, this one would
            # be the newest. So it is not sent: it stays here until that is decided.
            return
        try:
            self._commits.submit(commit, wait=False)
        except PersistenceError:  # closing, or broken
            self.failed(commit)

    async def spill(self, session_id: str, key: bytes) -> None:
        """Let one session leave memory, committing it first where it has to be.

        Raises:
            DiskFull, WriteOutcomeUnknown: it could not be committed and stays in memory.
        """
        await self._commits.decided(session_id)
        failures = self.spill_failures
        unlogged = session_id in self.unlogged
        self._evict([session_id])
        if unlogged:
            await self._commits.flush()
            if session_id in self.unlogged and self.spill_failures > failures:
                raise DiskFull(
                    f"session {printable(session_id)} could not be logged and stays in memory; "
                    "free some space"
                )

    def _put_of_resident(self, session_id: str, key: bytes, record: bytes) -> Commit:
        accessed, life = self.memory.times(session_id)
        return self.put_commit(session_id, key, record, accessed, life, self.memory.cap(session_id))

    def put_commit(
        self,
        session_id: str,
        key: bytes,
        record: bytes,
        accessed: float,
        life: float,
        cap: float,
        base: bytes = NO_ID,
    ) -> Commit:
        """Return the commit that logs `record`, built on commit `base`; times: engine seconds."""
        return Commit(
            PUT,
            session_id,
            key,
            self.disk.fingerprint(key),
            record,
            record[:IDS_BYTES] + base,
            accessed,
            min(deadline_of(accessed, life), cap),
            cap,
            life,
            row_user(record),
        )

    async def log_unlogged(self) -> None:
        """Commit every session that is not in the log yet; they stay resident."""
        for session_id in list(self.unlogged):
            record = self.memory.peek(session_id)
            if record is None or session_id in self._commits.tails:
                continue
            if self._commits.is_full:
                await self._commits.admission()
            commit = self._put_of_resident(session_id, session_id.encode(), record)
            commit.local = True
            self._commits.submit(commit, wait=False)

    # --- what has become of it ----------------------------------------------------------------

    def _spill_logged(self, commit: Commit) -> None:
        """A version that left memory is in the log, unless a newer one was adopted meanwhile."""
        session_id = commit.session_id
        if self._leaving.get(session_id) is commit:
            del self._leaving[session_id]
            self.spilled += 1
            self._logged(session_id)
        elif self.memory.peek(session_id) == commit.record:  # it came back
            self._logged(session_id)

    def _logged(self, session_id: str) -> None:
        self.unlogged.pop(session_id, None)
        self.unlisted.discard(session_id)

    def failed(self, commit: Commit) -> None:
        """A commit failed: a session that was leaving, with it or behind it, comes back."""
        leaving = self._leaving.get(commit.session_id)
        if commit.spills:
            self.spill_failures += 1
        if leaving is not None and (leaving is commit or not commit.spills):
            self._come_back(leaving)

    def _come_back(self, commit: Commit) -> None:
        """Make a leaving session resident again."""
        assert commit.record is not None, "a spill carries its record"
        del self._leaving[commit.session_id]
        self.memory.put(commit.session_id, commit.record, commit.accessed, commit.life, commit.cap)
