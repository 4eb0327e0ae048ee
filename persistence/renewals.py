"""Renewals: when an access to a session is recorded beyond memory.

An access moves a deadline in memory only. It is brought into the index, and into the log as a small
touch frame, once it has crossed into another window (see `expiry`): in a sweep now and then, before
a spill, and before a checkpoint.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from persistence.clock import Clock, EngineTime
from persistence.commit import Commit, CommitQueue
from persistence.disk.format import TOUCH
from persistence.disk.tier import DiskTier
from persistence.errors import PersistenceError
from persistence.expiry import must_record, sweep_seconds
from persistence.memory.tier import MemoryTier
from persistence.record import ID_BYTES, NEVER, NO_ID
from persistence.slices import Slices

IDS_BYTES: Final = 2 * ID_BYTES
"""What a record begins with: the ids of its incarnation and of its commit."""


class Renewals:
    """Brings accesses from memory into index and log.

    Args:
        memory: the memory tier.
        disk: the disk tier.
        clock: time.
        time: the engine's time base.

    Attributes:
        unlogged: sessions in memory of which the log does not have this version, with the last
            access that the shared tier has been told of.
        renewing: gets the touches of these, for the shared tier; None: there is none.
        touches: how many accesses were recorded in the log.
    """

    def __init__(self, memory: MemoryTier, disk: DiskTier, clock: Clock, time: EngineTime) -> None:
        self.memory = memory
        self.disk = disk
        self.unlogged: dict[str, float] = {}
        self.renewing: Callable[[Commit], None] | None = None
        self.touches = 0
        self._commits: CommitQueue
        self._tails: dict[str, Commit]
        self._clock = clock
        self._time = time
        self._swept_until = time.now()
        self._shortest_ttl = NEVER
        self._shorter_ttl = asyncio.Event()

    def attach(self, commits: CommitQueue) -> None:
        """Tell which queue to commit to."""
        self._commits = commits
        self._tails = commits.tails

    def _note_ttl(self, life: float) -> None:
        """A session lives for so long: sweep as often as that takes."""
        if 0 < life < self._shortest_ttl:
            self._shortest_ttl = life
            self._shorter_ttl.set()

    def _note_resident(self, session_id: str, key: bytes, fingerprint: bytes) -> None:
        accessed, life = self.memory.times(session_id)
        deadline = self.memory.deadline(session_id)
        record = self.memory.peek(session_id)
        assert record is not None, "resident"
        self.note_access(session_id, key, fingerprint, record, accessed, life, deadline)

    def _renew_unlogged(self, session_id: str, key: bytes, fingerprint: bytes) -> None:
        """Let the shared tier know of an access to what has been taken over from it, if due.

        It is not in the log, so nothing is recorded there; elsewhere it would be over too early.
        """
        accessed, life = self.memory.times(session_id)
        if self.renewing is None or not must_record(self.unlogged[session_id], accessed, life):
            return
        record = self.memory.peek(session_id)
        assert record is not None, "resident"
        self.unlogged[session_id] = accessed
        deadline = self.memory.deadline(session_id)
        self.renewing(_touch(session_id, key, fingerprint, record, accessed, life, deadline))

    def note_access(
        self,
        session_id: str,
        key: bytes,
        fingerprint: bytes,
        record: bytes,
        accessed: float,
        life: float,
        deadline: float,
    ) -> None:
        """Bring a last access into the index, and into the log if that is due."""
        before = self.disk.index.touch(fingerprint, accessed, deadline)
        if before is not None and accessed != before and must_record(before, accessed, life):
            self._submit_touch(session_id, key, fingerprint, record, accessed, life, deadline)

    def _submit_touch(
        self,
        session_id: str,
        key: bytes,
        fingerprint: bytes,
        record: bytes,
        accessed: float,
        life: float,
        deadline: float,
    ) -> None:
        if session_id in self._commits.tails:
            return  # the put that is on its way carries a time of its own
        commit = _touch(session_id, key, fingerprint, record, accessed, life, deadline)
        try:
            self._commits.submit(commit, wait=False)
        except PersistenceError:
            return  # closing: the index snapshot carries it
        self.touches += 1

    async def record_renewals(self) -> None:
        """Record the renewals since the last call that are due, in slices."""
        since, self._swept_until = self._swept_until, self._time.now()
        slices = Slices(self._clock.monotonic)
        for shard in range(self.memory.shards):
            for session_id in self.memory.accessed_since(shard, since):
                if session_id in self.memory:
                    key = session_id.encode()
                    fingerprint = self.disk.fingerprint(key)
                    if session_id in self.unlogged:
                        self._renew_unlogged(session_id, key, fingerprint)
                    else:
                        self._note_resident(session_id, key, fingerprint)
                await slices.give_way_if_due()

    async def next_sweep(self) -> None:
        """Wait until renewals should be looked at: more often when TTLs are short."""
        self._shorter_ttl.clear()
        try:
            async with asyncio.timeout(sweep_seconds(self._shortest_ttl)):
                await self._shorter_ttl.wait()
        except TimeoutError:
            return


def _touch(
    session_id: str,
    key: bytes,
    fingerprint: bytes,
    record: bytes,
    accessed: float,
    life: float,
    deadline: float,
) -> Commit:
    """Return the commit that records an access."""
    ids = record[:IDS_BYTES] + NO_ID
    return Commit(
        TOUCH, session_id, key, fingerprint, None, ids, accessed, deadline, NEVER, life, 0
    )
