"""Where sessions are: brings them into memory, finds them, and ends those whose time is over.

Restoring copies the bytes that the log has back into memory. Concurrent reads of one cold session
do one read. How sessions leave memory is in `spilling`, how accesses are recorded in `renewals`.

Invariants:
- what memory holds is the newest acknowledged version;
- a session is in the index, or in `unlogged` (and then resident or leaving), or it does not exist;
  in both when memory has a newer version, which came from elsewhere, than the log. `unlisted` are
  those that the log has no version of. What *leaving* means is said in `spilling`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeAlias

from persistence.clock import Clock, EngineTime
from persistence.commit import Commit, ExactEnd, committed
from persistence.config import MemoryConfig
from persistence.disk.format import DELETE, NO_IDS, TOUCH
from persistence.disk.index import TIMES, TIMES_AT, Row
from persistence.disk.tier import DiskTier
from persistence.errors import CorruptionError, PersistenceError, SessionNotFound
from persistence.expiry import life_of, must_record
from persistence.ids import CommitIds
from persistence.memory.tier import MemoryTier, charge, deadline_of
from persistence.record import (
    ID_BYTES,
    NEVER,
    NO_ID,
    RENEWS,
    TTL_AND_FLAGS,
    TTL_AT,
    ttl_and_flags_of,
)
from persistence.remote.contract import RemoteSession
from persistence.renewals import IDS_BYTES
from persistence.session import Session
from persistence.spilling import Spilling
from persistence.tasks import look_at

_log = logging.getLogger("persistence.residency")

_pack_times = TIMES.pack_into
_unpack_ttl_and_flags = TTL_AND_FLAGS.unpack_from


Base: TypeAlias = tuple[bytes, float, float]
"""The version that an update builds on: its record, its life (see `memory.tier`) and its cap."""


class Residency(Spilling):
    """Decides nothing about sessions' contents; keeps memory, index and log in step.

    Built in layers: what records accesses, above that what lets sessions leave memory, above that
    what brings them back. Neither of the lower ones knows of this one.

    Args:
        config: thresholds of the budget.
        memory: the memory tier.
        disk: the disk tier.
        clock: time.
        time: the engine's time base.

    Attributes:
        confirm_end: asks the shared tier whether a session is really over; None: there is none.
        adopting: told of a session that is taken over before memory has it.
        on_end: gets the id of a session that has ended.
        restored: how many sessions came back into memory.
        expired: how many were ended because their time was over.
    """

    def __init__(
        self,
        config: MemoryConfig,
        memory: MemoryTier,
        disk: DiskTier,
        clock: Clock,
        time: EngineTime,
    ) -> None:
        super().__init__(config, memory, disk, clock, time)
        self.confirm_end: Callable[[str, bytes, float], Awaitable[bool]] | None = None
        self.adopting: Callable[[str, bytes, float], None] | None = None
        self.on_end: Callable[[str], None] | None = None
        self.restored = 0
        self.expired = 0
        self._commit_ids = CommitIds()
        self._read_at = disk.reading.at
        self._find = disk.index.find
        self._renew = memory.renew
        self._monotonic = time.monotonic
        self._time_base = time.base
        self._reading: dict[str, asyncio.Task[tuple[bytes, Row] | None]] = {}

    # --- the queue's calls --------------------------------------------------------------------

    def acknowledged(self, commits: Sequence[Commit]) -> None:
        """Commits are in the log and in the index: let memory follow, in order."""
        memory = self.memory
        if self.unlogged:
            # All of them first: what is kept below makes others leave memory, and an older version
            # of one further on must not be sent to the log behind it.
            for commit in commits:
                if commit.kind != TOUCH and not commit.spills:
                    self._logged(commit.session_id)
                    self._leaving.pop(commit.session_id, None)
        put = memory.put
        large_bytes, threshold_bytes = self._large_bytes, self._threshold_bytes
        for commit in commits:
            record = commit.record
            if record is None:
                if commit.kind == DELETE:
                    memory.remove(commit.session_id)
                    if self.on_end is not None:
                        self.on_end(commit.session_id)
                continue
            if commit.spills:
                self._spill_logged(commit)
            elif len(record) > large_bytes or commit.life < self._shortest_ttl:
                self._keep(commit.session_id, record, commit.accessed, commit.life, commit.cap)
            else:  # the same, the short way: what nearly every commit is
                put(commit.session_id, record, commit.accessed, commit.life, commit.cap)
            if memory.used_bytes > threshold_bytes:
                self.spill_down()

    # --- reading ------------------------------------------------------------------------------

    def _keep(
        self, session_id: str, record: bytes, accessed: float, life: float, cap: float
    ) -> None:
        """Make a session resident, unless it is larger than the whole budget."""
        memory = self.memory
        if len(record) > self._large_bytes and charge(session_id, record) > memory.budget_bytes:
            memory.remove(session_id)
            return
        memory.put(session_id, record, accessed, life, cap)
        if 0 < life < self._shortest_ttl:
            self._note_ttl(life)

    def _restore(self, session_id: str, record: bytes, row: Row, *, access: bool) -> Base:
        """Take in a record that was read from the log."""
        _, _, accessed, deadline, cap, *_ = row
        ttl_seconds, flags = ttl_and_flags_of(record)
        life = life_of(ttl_seconds, flags & RENEWS, deadline)
        # Recovery may have granted more than one TTL from the last recorded access.
        if 0 < life < NEVER and deadline - life > accessed:
            accessed = min(deadline - life, self._time.now())
        if access and deadline > self._time.now():
            accessed = self._time.now()
        self._keep(session_id, record, accessed, life, cap)
        self.restored += 1
        if self.memory.used_bytes > self._threshold_bytes:
            self.spill_down(spare=session_id)
        return record, life, cap

    def _is_over(self, commit: Commit) -> bool:
        """Whether a version in flight has no session any more: an end, or past its deadline."""
        if commit.record is None:
            return True
        if commit.deadline > self._time.now():
            return False
        return self.memory.live(commit.session_id) is None  # or a read has renewed it since

    def base_now(self, session_id: str) -> Base | None:
        """Return the newest version of a live session if it is in flight or resident.

        None means "look closer": `base` does.
        """
        resident = self._renew(session_id)
        tail = self._tails.get(session_id)
        if tail is None:
            return resident
        if tail.record is None or (tail.deadline <= self._time.now() and resident is None):
            return None
        return tail.record, tail.life, tail.cap

    async def base(self, session_id: str, key: bytes) -> Base:
        """Return the newest version of a live session, in flight or acknowledged.

        When this returns, nothing has happened since it looked: an update may be built on the
        result if it is submitted before the next await.

        Raises:
            SessionNotFound: missing, expired or terminated.
            CorruptionError: its stored bytes are damaged.
        """
        while True:
            base = self.base_now(session_id)
            if base is not None:
                return base
            tail = self._commits.tails.get(session_id)
            if tail is not None and self._is_over(tail):
                if tail.record is not None and not await self.expire(session_id, key):
                    continue
                raise SessionNotFound(session_id)
            base = await self.acknowledged_base(session_id, key)
            if base is None:
                raise SessionNotFound(session_id)
            if session_id not in self._commits.tails:
                return base

    async def aside_base(self, session_id: str, key: bytes) -> tuple[Base, float]:
        """Like `base`, but nothing is renewed; returns the last access as well (engine seconds).

        Raises:
            SessionNotFound: missing, expired or terminated.
            CorruptionError: its stored bytes are damaged.
        """
        while True:
            tail = self._tails.get(session_id)
            if tail is not None:
                if tail.record is None or self._is_over(tail):
                    raise SessionNotFound(session_id)
                return (tail.record, tail.life, tail.cap), tail.accessed
            base = await self.acknowledged_base(session_id, key, access=False)
            if base is None:
                raise SessionNotFound(session_id)
            if session_id in self._tails:
                continue
            if session_id in self.memory:
                return base, self.memory.times(session_id)[0]
            row = self.disk.index.get(self.disk.fingerprint(key))
            if row is not None:
                return base, row.accessed

    async def newest(self, session_id: str, key: bytes) -> bytes | None:
        """Return the newest record of a session, in flight or acknowledged, as `peek` does."""
        tail = self._tails.get(session_id)
        return await self.peek(session_id, key) if tail is None else tail.record

    async def acknowledged_base(
        self, session_id: str, key: bytes, *, access: bool = True
    ) -> Base | None:
        """Return the acknowledged version of a live session, bringing it into memory.

        None: missing, or expired; then its removal has been logged. `access`: a session that is
        brought in counts as accessed now.
        """
        while True:
            live = self.memory.live(session_id)
            if live is not None:
                return live
            if session_id in self.memory:
                if await self.expire(session_id, key):
                    return None
                continue
            if self._leaving and session_id in self._leaving:
                self._come_back(self._leaving[session_id])
                continue
            fingerprint = self.disk.fingerprint(key)
            row = self.disk.index.get(fingerprint)
            if row is None:
                return None
            if row.deadline <= self._time.now():
                if await self.expire(session_id, key):
                    return None
                continue
            record = self.disk.reading.now(row, key)
            if record is not None:
                return self._restore(session_id, record, row, access=access)
            found = await self._read_in_thread(session_id, key, fingerprint, access=access)
            if found is None:
                return None
            if self.memory.peek(session_id) is None:
                # Larger than the budget, or spilled again already. It is still the newest
                # version if its row has not changed; else look again.
                record, row = found
                if self.disk.index.get(fingerprint) == row:
                    ttl_seconds, flags = ttl_and_flags_of(record)
                    return record, life_of(ttl_seconds, flags & RENEWS, row.deadline), row.cap

    def restore_now(self, session_id: str) -> Session | None:
        """Restore a cold session, and count it as accessed, if that needs no waiting.

        The short way for what nearly every restore is: one search in the index, one read from the
        page cache. None means "look closer": `acknowledged_base` does.
        """
        # What memory holds is the newest, also when it has expired there: the log may lack it, if
        # it was taken over from the shared tier, and hold an older version that lives longer.
        if self._leaving or session_id in self.memory:
            return None
        try:
            key = session_id.encode()
        except (AttributeError, UnicodeEncodeError):  # no session id
            return None
        found = self._find(self._fingerprint(key))
        if found is None:
            return None
        bucket, at, (accessed, deadline, cap, segment, offset, length, _) = found
        now = self._monotonic() + self._time_base
        if deadline <= now or length > self._large_bytes:
            return None
        record = self._read_at(segment, offset, length, key)
        if record is None or len(record) > self._large_bytes:  # it was compressed
            return None
        life = NEVER
        if deadline != NEVER:  # `life_of`, without the call
            ttl_seconds, flags = _unpack_ttl_and_flags(record, TTL_AT)
            if ttl_seconds:
                life = ttl_seconds if flags & RENEWS else -deadline
                if life > 0:
                    deadline = min(cap, now + life)
        _pack_times(bucket, at + TIMES_AT, now, deadline)
        if must_record(accessed, now, life):
            fingerprint = self._fingerprint(key)
            self._submit_touch(session_id, key, fingerprint, record, now, life, deadline)
        self.memory.put_noted(session_id, record, now, life, cap)
        if 0 < life < self._shortest_ttl:
            self._note_ttl(life)
        self.restored += 1
        if self.memory.used_bytes > self._threshold_bytes:
            self.spill_down(spare=session_id)
        return Session.view(session_id, record, now, (life, cap, self._time))

    async def _read_in_thread(
        self, session_id: str, key: bytes, fingerprint: bytes, *, access: bool
    ) -> tuple[bytes, Row] | None:
        """Read a session in a task of its own, shared by everybody who wants it now.

        The task takes the record into memory in the same step in which it has verified that it is
        the newest, so no update can come between.
        """
        task = self._reading.get(session_id)
        if task is None or task.done():
            # Never share a reading that has ended: what it found may be out of date already, and
            # asking it again would answer at once, for ever.
            task = asyncio.create_task(
                self._read_and_restore(session_id, key, fingerprint, access=access),
                name="persistence-read",
            )
            self._reading[session_id] = task
            task.add_done_callback(partial(self._reading_ended, session_id))
        return await asyncio.shield(task)

    def _reading_ended(self, session_id: str, task: asyncio.Task[object]) -> None:
        if self._reading.get(session_id) is task:
            del self._reading[session_id]
        look_at(task)

    async def _read_and_restore(
        self, session_id: str, key: bytes, fingerprint: bytes, *, access: bool
    ) -> tuple[bytes, Row] | None:
        found = await self.disk.reading.newest(fingerprint, key)
        if found is not None and self.memory.peek(session_id) is None:
            self._restore(session_id, *found, access=access)
        return found

    async def peek(self, session_id: str, key: bytes) -> bytes | None:
        """Return the acknowledged record of a session, neither restoring nor renewing it."""
        record = self.memory.peek(session_id)
        if record is None and session_id in self._leaving:
            record = self._leaving[session_id].record
        if record is not None:
            return record
        fingerprint = self.disk.fingerprint(key)
        row = self.disk.index.get(fingerprint)
        if row is None:
            return None
        record = self.disk.reading.now(row, key)
        if record is None:
            reading = asyncio.ensure_future(self.disk.reading.newest(fingerprint, key))
            reading.add_done_callback(look_at)
            found = await asyncio.shield(reading)
            record = None if found is None else found[0]
        return record

    # --- looking ------------------------------------------------------------------------------

    def has_copy(self, session_id: str) -> bool:
        """Whether anything is here of a session, in flight, resident or in the log."""
        return (
            session_id in self.memory
            or session_id in self._commits.tails
            or session_id in self._leaving
            or self.disk.index.get(self.disk.fingerprint(session_id.encode())) is not None
        )

    def resident(self, session_id: str) -> bytes | None:
        """Return the acknowledged record of a session if it is in memory or leaving it."""
        record = self.memory.peek(session_id)
        leaving = self._leaving.get(session_id) if record is None else None
        return record if leaving is None else leaving.record

    def readable(self, session_id: str, key: bytes) -> bytes | None:
        """Return the acknowledged record of a session, if it is intact and at hand."""
        record = self.resident(session_id)
        row = None if record is not None else self.disk.index.get(self.disk.fingerprint(key))
        if row is None:
            return record
        try:
            return self.disk.reading.now(row, key)
        except CorruptionError:
            return None

    def record_now(self, session_id: str, key: bytes) -> bytes | None:
        """Return the acknowledged record of a live session; None: there is none.

        Neither renews nor restores it. Where it is in no cache, the disk is waited for.

        Raises:
            CorruptionError: its stored bytes are damaged.
        """
        if not self.is_acknowledged(session_id, key):
            return None
        record = self.resident(session_id)
        if record is not None:
            return record
        row = self.disk.index.get(self.disk.fingerprint(key))
        return None if row is None else self.disk.reading.waiting(row, key)

    def commit_of(self, session_id: str) -> bytes | None:
        """Return the id of the newest commit of a session, in flight or acknowledged.

        None: there is no such session. `NO_ID`: that cannot be told without waiting for the disk,
        or because of damage.
        """
        tail = self._commits.tails.get(session_id)
        if tail is not None:
            return tail.ids[ID_BYTES:IDS_BYTES]
        key = session_id.encode()
        record = self.readable(session_id, key)
        if record is not None:
            return record[ID_BYTES:IDS_BYTES]
        return None if self.disk.index.get(self.disk.fingerprint(key)) is None else NO_ID

    def sequence_of(self, session_id: str) -> int:
        """Return the sequence number of a session's newest put in the log; 0: there is none."""
        return self.disk.index.sequence(self.disk.fingerprint(session_id.encode())) or 0

    def times(self, session_id: str, key: bytes) -> tuple[float, float, float] | None:
        """Return last access, deadline and cap of the acknowledged version of a session.

        None: there is none.
        """
        if session_id in self.memory:
            accessed, _ = self.memory.times(session_id)
            return accessed, self.memory.deadline(session_id), self.memory.cap(session_id)
        found = self._leaving.get(session_id) or self.disk.index.get(self.disk.fingerprint(key))
        return None if found is None else (found.accessed, found.deadline, found.cap)

    def wall_times(self, session_id: str) -> tuple[float, float, float]:
        """Return last access, deadline and cap of a session that is here, in wall seconds."""
        times = self.times(session_id, session_id.encode())
        if times is None:
            return 0.0, 0.0, NEVER  # it has just ended
        skew = self._time.skew()
        accessed, deadline, cap = times
        return accessed + skew, deadline + skew, cap + skew

    def is_alive(self, session_id: str, key: bytes) -> bool:
        """Whether a session exists and has not expired, without reading or renewing it."""
        tail = self._commits.tails.get(session_id)
        if tail is not None:
            return not self._is_over(tail)
        return self.is_acknowledged(session_id, key)

    def is_acknowledged(self, session_id: str, key: bytes) -> bool:
        """The same for readers, who see acknowledged versions only."""
        return (self.acknowledged_deadline(session_id, key) or 0.0) > self._time.now()

    def acknowledged_deadline(self, session_id: str, key: bytes) -> float | None:
        """Return the deadline of the acknowledged version of a session; None: there is none."""
        if session_id in self.memory:
            return self.memory.deadline(session_id)
        leaving = self._leaving.get(session_id)
        if leaving is not None:
            return leaving.deadline
        row = self.disk.index.get(self.disk.fingerprint(key))
        return None if row is None else row.deadline

    # --- expiry -------------------------------------------------------------------------------

    async def expire(self, session_id: str, key: bytes) -> bool:
        """Log the end of an expired session, so that no crash brings it back.

        A disk that takes nothing does not make the session live again: it stays expired. Returns
        False if it is not over after all: another worker renewed it, or it has begun anew.
        """
        if self.confirm_end is not None and not await self.confirm_end(session_id, key, -NEVER):
            return False
        tail = self._tails.get(session_id)
        if tail is None:
            # The race: while the shared tier was asked, another call was told that the session is
            # over, and created it anew. That one must not be ended.
            deadline = self.acknowledged_deadline(session_id, key)
            if deadline is None:
                return True
            if deadline > self._time.now():
                return False
        try:
            if tail is None or (tail.record is not None and self._is_over(tail)):
                commit = self.submit_delete(session_id, key, local=True, expired=True)
                assert commit.done is not None, "submitted to be waited for"
                await commit.done
                self.expired += 1
            else:
                await self._commits.decided(session_id)
        except PersistenceError as error:
            _log.warning("an expired session could not be removed: %s", error)
        return True

    async def expire_if_over(self, session_id: str, key: bytes) -> None:
        """Log the end of a session that is there but past its deadline.

        Whoever is told that it is absent must not see it come back.
        """
        deadline = self.acknowledged_deadline(session_id, key)
        if deadline is not None and deadline <= self._time.now():
            await self.expire(session_id, key)

    def submit_delete(
        self,
        session_id: str,
        key: bytes,
        *,
        wait: bool = True,
        local: bool = False,
        expired: bool = False,
        exact: bool = False,
    ) -> Commit:
        """Submit a tombstone on top of whatever there is.

        Args:
            session_id: whose.
            key: its id as UTF-8.
            wait: whether somebody waits for it.
            local: the shared tier knows already, or finds out by itself.
            expired: its time is over, and that is why.
            exact: end the version that is here, and no newer one that the shared tier may have.
        """
        now = self._time.now()
        tail = self._commits.tails.get(session_id)
        record = tail.record if tail is not None else self.resident(session_id)
        if tail is None and record is None and not local and self.confirm_end is not None:
            record = self.readable(session_id, key)  # so that no other incarnation is ended
        ids = NO_IDS[:ID_BYTES] + self._commit_ids.next() + NO_ID
        if record is not None:
            ids = record[:ID_BYTES] + ids[ID_BYTES:IDS_BYTES] + record[ID_BYTES:IDS_BYTES]
        commit = (ExactEnd if exact else Commit)(
            DELETE,
            session_id,
            key,
            self.disk.fingerprint(key),
            None,
            ids,
            now,
            now,
            NEVER,
            0.0,
            0,
        )
        commit.local = local
        commit.expired = expired
        self._commits.submit(commit, wait=wait)
        return commit

    # --- taking over --------------------------------------------------------------------------

    async def adopt(
        self, session_id: str, record: bytes, accessed: float, life: float, cap: float = NEVER
    ) -> None:
        """Make a session resident that is not in the log, as a take-over does.

        It is committed when it is spilled or flushed.
        """
        if self._commits.is_full:
            await self._commits.admission()
        if session_id in self._commits.tails:
            return  # this worker went on meanwhile, and will hear whether that was on this version
        if charge(session_id, record) > self.memory.budget_bytes:
            await committed(self._submit_local(session_id, record, accessed, life, cap))
            return
        if self.adopting is not None:
            self.adopting(session_id, record, min(deadline_of(accessed, life), cap))
        self._leaving.pop(session_id, None)
        self.unlogged[session_id] = accessed
        if self.disk.index.get(self.disk.fingerprint(session_id.encode())) is None:
            self.unlisted.add(session_id)
        self.memory.put(session_id, record, accessed, life, cap)
        self._note_ttl(life)
        self.spill_down(spare=session_id)

    def submit_remote(self, session_id: str, found: RemoteSession) -> Commit:
        """Submit a version that the shared tier has, in place of whatever there is here."""
        return self._submit_local(session_id, *self.times_of_remote(found))

    def _submit_local(
        self, session_id: str, record: bytes, accessed: float, life: float, cap: float
    ) -> Commit:
        commit = self.put_commit(session_id, session_id.encode(), record, accessed, life, cap)
        commit.local = True
        self._commits.submit(commit)
        return commit

    def times_of_remote(self, found: RemoteSession) -> tuple[bytes, float, float, float]:
        """Return (record, last access, life, cap) in engine seconds."""
        skew = self._time.skew()
        ttl_seconds, flags = ttl_and_flags_of(found.record)
        life = life_of(ttl_seconds, flags & RENEWS, found.deadline - skew)
        return found.record, found.accessed - skew, life, found.cap - skew

    async def close(self) -> None:
        """Wait for reads and spills under way."""
        if self._spilling is not None:
            await asyncio.wait([self._spilling])
        if self._reading:
            await asyncio.wait(list(self._reading.values()))
