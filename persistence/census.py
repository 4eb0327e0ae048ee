"""How old, idle and large the sessions are, without going through all of them.

Each look reads about `MAX_SAMPLE` sessions at most, in slices, and neither restores nor renews
any. Where there are no more, what it says is exact. Where there are more it is a sample: each look
goes on where the one before has ended, so that one after the other they meet all of them; the
oldest session that was met is remembered for as long as it lives.

A sample is fair: buckets are made by a keyed hash of the ids. What is not in the page cache is left
out rather than waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, NamedTuple

from persistence import record as rec
from persistence.clock import Clock, EngineTime
from persistence.disk.index import SHARDS, Row
from persistence.disk.tier import DiskTier
from persistence.memory.tier import MemoryTier
from persistence.residency import Residency
from persistence.slices import Slices
from persistence.stats import Distribution, PopulationStats

MAX_SAMPLE: Final = 256


class _Met(NamedTuple):
    """A session that was met. Times are wall seconds."""

    created: float
    session_id: str
    incarnation: bytes
    idle_seconds: float
    nbytes: int


class Census:
    """Looks at sessions.

    Args:
        memory: the memory tier.
        disk: the disk tier.
        residency: keeps the two in step.
        clock: time.
        time: the engine's time base.

    Attributes:
        last_created: id of the session that was created last; empty: there was none.
    """

    def __init__(
        self,
        memory: MemoryTier,
        disk: DiskTier,
        residency: Residency,
        clock: Clock,
        time: EngineTime,
    ) -> None:
        self._memory = memory
        self._disk = disk
        self._residency = residency
        self._monotonic = clock.monotonic
        self._time = time
        self.last_created = ""
        self._shard = self._bucket = 0
        self._looking = asyncio.Lock()
        self._oldest: _Met | None = None
        self._newest: _Met | None = None

    async def look(self) -> PopulationStats:
        """Return what a look at some sessions, or at all of them, tells."""
        async with self._looking:  # each goes on where the one before has ended
            return await self._look()

    async def _look(self) -> PopulationStats:
        met: list[_Met] = []
        latest = self._residency.resident(self.last_created)
        if latest is not None:
            self._meet(self.last_created, latest, None, met)
            self._newest = self._best(self._newest, met, max)
            met.clear()
        slices = Slices(self._monotonic)
        for session_id in list(self._residency.unlisted)[:MAX_SAMPLE]:
            record = self._residency.resident(session_id)
            if record is not None:
                self._meet(session_id, record, None, met)
        is_complete = len(self._residency.unlisted) <= MAX_SAMPLE
        looked = 0
        # The cursor comes back to where it is now; unless that is gone: a checkpoint may be put in
        # place meanwhile.
        first, shards_left = self._bucket, SHARDS
        while True:
            rows = self._next_rows()
            looked += len(rows)
            for row in rows:
                is_complete = self._look_at(row, met) and is_complete
            if not self._bucket:  # on to the next shard
                shards_left -= 1
            await slices.give_way_if_due()
            if shards_left < 0 or (not shards_left and self._bucket >= first):
                break
            if looked >= MAX_SAMPLE:
                is_complete = False
                break
        return self._told(met, is_complete=is_complete)

    def _next_rows(self) -> list[Row]:
        """Return the rows of one bucket, and go on to the next."""
        index = self._disk.index
        rows: list[Row] = []
        if self._bucket < index.bucket_count(self._shard):
            rows = index.rows_of_bucket(self._shard, self._bucket)
        self._bucket += 1
        if self._bucket >= index.bucket_count(self._shard):
            self._shard, self._bucket = (self._shard + 1) % SHARDS, 0
        return rows

    def _look_at(self, row: Row, met: list[_Met]) -> bool:
        """Look at one session; False: what it is could not be told without waiting."""
        if row.deadline <= self._time.now():
            return True
        found = self._disk.reading.glimpse(row)
        if found is None:
            return self._disk.index.get(row.fingerprint) is None
        key, record = found
        self._meet(key.decode(), record, row, met)
        return True

    def _meet(self, session_id: str, record: bytes, row: Row | None, met: list[_Met]) -> None:
        if session_id in self._memory:
            accessed = self._memory.times(session_id)[0]
            if self._memory.deadline(session_id) <= self._time.now():
                return
        elif row is not None:
            accessed = row.accessed
        else:
            return
        idle_seconds = max(0.0, self._time.now() - accessed)
        incarnation = rec.incarnation_of(record)
        met.append(_Met(rec.created_of(record), session_id, incarnation, idle_seconds, len(record)))

    def _told(self, met: list[_Met], *, is_complete: bool) -> PopulationStats:
        wall = self._time.now() + self._time.skew()
        if is_complete:
            self._oldest = None
        self._oldest = self._best(self._oldest, met, min)
        self._newest = self._best(self._newest, met, max)
        return PopulationStats(
            sampled=len(met),
            is_complete=is_complete,
            oldest_created_at=_shown(self._oldest),
            newest_created_at=_shown(self._newest),
            age_seconds=Distribution.of([max(0.0, wall - each.created) for each in met]),
            idle_seconds=Distribution.of([each.idle_seconds for each in met]),
            bytes=Distribution.of([each.nbytes for each in met]),
        )

    def _best(
        self, known: _Met | None, met: list[_Met], choose: Callable[[list[_Met]], _Met]
    ) -> _Met | None:
        """Return the oldest or newest of those met now and the one known, if that still lives."""
        candidates = list(met)
        if known is not None and self._lives(known):
            candidates.append(known)
        return choose(candidates) if candidates else None

    def _lives(self, known: _Met) -> bool:
        session_id, key = known.session_id, known.session_id.encode()
        if not self._residency.is_acknowledged(session_id, key):
            return False
        record = self._residency.readable(session_id, key)
        # One that is not at hand is rather taken for the same than waited for.
        return record is None or rec.incarnation_of(record) == known.incarnation


def _shown(met: _Met | None) -> datetime | None:
    return None if met is None else datetime.fromtimestamp(met.created, UTC)
