"""Going through all sessions: listing, finding by user, removing the expired and the idle.

Everything here works through the index shard by shard and in slices, so that the loop is never
held up, and never reads a session's data unless it has to be looked at.

Invariant: whoever is not told of a session because its time is over never sees it come back: its
end is logged before this answers.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from typing import Final

from persistence import record as rec
from persistence.clock import Clock, EngineTime
from persistence.commit import Commit, CommitQueue
from persistence.disk.format import user_tag
from persistence.disk.index import Row
from persistence.disk.tier import DiskTier
from persistence.errors import CorruptionError, Overtaken, PersistenceError, again
from persistence.memory.tier import MemoryTier
from persistence.record import NEVER
from persistence.residency import Residency
from persistence.session import USER_ID
from persistence.slices import Slices

_log = logging.getLogger("persistence.listing")

_ENDS_IN_FLIGHT: Final = 1024


class Listing:
    """All sessions of this worker.

    Args:
        memory: the memory tier.
        disk: the disk tier.
        residency: keeps the two in step.
        commits: where tombstones go.
        clock: time.
        time: the engine's time base.
        check_open: raises ManagerClosed once the manager is closed.
    """

    def __init__(
        self,
        memory: MemoryTier,
        disk: DiskTier,
        residency: Residency,
        commits: CommitQueue,
        clock: Clock,
        time: EngineTime,
        check_open: Callable[[], None],
    ) -> None:
        self._memory = memory
        self._disk = disk
        self._residency = residency
        self._commits = commits
        self._monotonic = clock.monotonic
        self._time = time
        self._check_open = check_open
        self._untold = 0

    # --- listing ------------------------------------------------------------------------------

    async def ids(self, prefix: str, *, is_own: bool = False) -> AsyncIterator[str]:
        """Yield the ids of the live sessions that start with `prefix`, in no order.

        A session that is alive all the while is yielded exactly once, whatever is written
        meanwhile.

        Args:
            prefix: what ids have to start with.
            is_own: the engine itself asks, also while it is opening or closing.
        """
        if not is_own:
            self._check_open()  # also where there is nothing to list
        for shard in self._disk.index.filled_shards():
            if not is_own:
                self._check_open()
            for session_id in await self._live(self._disk.index.rows_of_shard(shard)):
                if session_id.startswith(prefix):
                    yield session_id
        for session_id in self._live_unlogged():
            if session_id.startswith(prefix):
                yield session_id

    async def of_user(self, user_id: str) -> list[str]:
        """Return the ids of the live sessions of a user, in no order."""
        tag = user_tag(user_id)
        found: list[str] = []
        slices = Slices(self._monotonic)
        for shard in self._disk.index.filled_shards():
            rows = self._disk.index.user_in_shard(shard, tag)
            live = await self._live(rows) if rows else ()
            found += [each for each in live if await self._belongs(each, user_id)]
            await slices.give_way_if_due()
        unlogged = self._live_unlogged()
        return found + [each for each in unlogged if await self._belongs(each, user_id)]

    async def _belongs(self, session_id: str, user_id: str) -> bool:
        """Whether a session is a user's: the tag in its row has 31 bits only."""
        try:
            record = await self._residency.peek(session_id, session_id.encode())
        except CorruptionError as error:
            _log.warning("left out while looking for a user's sessions: %s", error)
            return False
        return record is not None and rec.meta_of(record).get(USER_ID) == user_id

    async def _live(self, rows: list[Row]) -> list[str]:
        """Return the ids of the live sessions among `rows`, once the end of the rest is logged."""
        alive = []
        ends = _Ends(self._residency, self._commits)
        slices = Slices(self._monotonic)
        for key, _ in await self._disk.reading.keys(rows) if rows else ():
            session_id = key.decode()
            deadline = self._residency.acknowledged_deadline(session_id, key)
            if deadline is None:
                continue
            if deadline > self._time.now():
                alive.append(session_id)
            elif self._residency.confirm_end is not None:
                is_over, is_logged = await self._expired(session_id, key)
                self._untold += is_logged
                if not is_over:
                    alive.append(session_id)
            elif session_id not in self._commits.tails:
                await ends.log(session_id, key, is_over=True)
            await slices.give_way_if_due()
        await ends.settle()
        self._untold += ends.logged
        if ends.error is not None:
            _log.warning("expired sessions could not be removed: %s", ends.error)
        return alive

    async def _expired(self, session_id: str, key: bytes) -> tuple[bool, bool]:
        """Ask the shared tier about a session past its deadline; log its end if it is over.

        Returns:
            Whether it is over, and whether that is in the log now.
        """
        before = self._residency.expired
        is_over = await self._residency.expire(session_id, key)
        return is_over, is_over and self._residency.expired > before

    def _live_unlogged(self) -> list[str]:
        """Return the ids of the live sessions that are resident and not in the log yet."""
        index, fingerprint = self._disk.index, self._disk.fingerprint
        return [
            session_id
            for session_id in self._residency.unlogged
            if self._residency.is_acknowledged(session_id, session_id.encode())
            and index.get(fingerprint(session_id.encode())) is None
        ]

    # --- removing -----------------------------------------------------------------------------

    async def remove_expired(self) -> int:
        """Remove the sessions whose time is over; return how many that were.

        Raises:
            DiskFull, WriteOutcomeUnknown: the end of some could not be logged.
        """
        return await self._remove_where(now=self._time.now(), idle_since=-NEVER)

    def untold(self, count: int) -> None:
        """Remember that `count` expired sessions were removed without anybody being told."""
        self._untold += count

    def take_untold(self) -> int:
        """Return how many there are, and forget them."""
        untold, self._untold = self._untold, 0
        return untold

    async def remove_idle(self, max_age_seconds: float) -> int:
        """Remove the sessions that nobody has accessed for `max_age_seconds`; return how many.

        Raises:
            DiskFull, WriteOutcomeUnknown: the end of some could not be logged.
        """
        now = self._time.now()
        return await self._remove_where(now=now, idle_since=now - max_age_seconds)

    async def _remove_where(self, *, now: float, idle_since: float) -> int:
        """Remove the sessions past their deadline at `now`, or last accessed before `idle_since`.

        What the index knows of resident sessions is behind, so memory is asked about those.
        """
        await self._residency.record_renewals()
        ends = _Ends(self._residency, self._commits)
        slices = Slices(self._monotonic)
        for session_id in list(self._residency.unlogged):
            await self._remove_if_over(ends, session_id, session_id.encode(), now, idle_since)
        for shard in self._disk.index.filled_shards():
            rows = self._disk.index.expired_in_shard(shard, now, idle_since)
            for key, _ in await self._disk.reading.keys(rows) if rows else ():
                await self._remove_if_over(ends, key.decode(), key, now, idle_since)
                if self._commits.is_full:
                    await self._commits.admission()
                await slices.give_way_if_due()
            await slices.give_way_if_due()
        await ends.settle()
        if ends.error is not None:
            raise again(ends.error)
        return ends.logged

    async def _remove_if_over(
        self, ends: _Ends, session_id: str, key: bytes, now: float, idle_since: float
    ) -> None:
        times = self._times(session_id, key)
        if times is None:
            return
        accessed, deadline = times
        if deadline > now and accessed >= idle_since:
            return
        is_over = deadline <= now
        confirm_end = self._residency.confirm_end
        if is_over and confirm_end is not None:
            ends.logged += (await self._expired(session_id, key))[1]
            return
        if confirm_end is not None:
            if not await confirm_end(session_id, key, idle_since):
                return
            if self._times(session_id, key) != times:
                return  # the race: it was used, or begun anew, while the shared tier was asked
        await ends.log(session_id, key, is_over=is_over)

    def _times(self, session_id: str, key: bytes) -> tuple[float, float] | None:
        """Return last access and deadline of a session; None: it is not there, or in flight."""
        if session_id in self._commits.tails:
            return None
        if session_id in self._memory:
            return self._memory.times(session_id)[0], self._memory.deadline(session_id)
        row = self._disk.index.get(self._disk.fingerprint(key))
        return None if row is None else (row.accessed, row.deadline)


class _Ends:
    """Logs the ends of many sessions, and counts those that are in the log.

    Attributes:
        logged: how many are.
        error: why the first that failed did.
    """

    def __init__(self, residency: Residency, commits: CommitQueue) -> None:
        self.logged = 0
        self.error: PersistenceError | None = None
        self._residency = residency
        self._commits = commits
        self._submitted: list[tuple[Commit, bool]] = []

    async def log(self, session_id: str, key: bytes, *, is_over: bool) -> None:
        """Submit the end of a session, expired or not; `settle` waits for it."""
        commit = self._residency.submit_delete(
            session_id, key, wait=False, local=is_over, expired=is_over
        )
        self._submitted.append((commit, is_over))
        if len(self._submitted) == _ENDS_IN_FLIGHT:
            await self.settle()

    async def settle(self) -> None:
        """Wait until all of them are decided."""
        if not self._submitted:
            return
        await self._commits.flush()
        for commit, is_over in self._submitted:
            if commit.error is None:
                self.logged += 1
                self._residency.expired += is_over
            elif self.error is None and not isinstance(commit.error, Overtaken):
                self.error = commit.error  # but for what has begun anew elsewhere meanwhile
        self._submitted = []
