"""The memory tier: the packed records of the hot sessions, in a budget of bytes.

Per session there are only atoms (str, bytes, float) in plain dicts, so nothing here is tracked by
the garbage collector per session: a full collection does not look at sessions at all. The dicts
are sharded, so that none of them grows by one big resize.

It holds acknowledged versions only, and knows nothing of disk or of commits: the manager tells it
what to keep and asks it who should leave.

Invariants, asserted by `check`:
- `records` and `accessed` of a shard have the same keys, `lives` has some of them;
- `used_bytes` is the sum of `charge` over all resident sessions, exactly.

Times are engine seconds (see `clock.EngineTime`). A session's *life* says when it expires: a
positive life is a TTL that runs from the last access (infinite: never), a negative one is a fixed
deadline with its sign changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Final

from persistence.clock import Clock, EngineTime
from persistence.memory.policies import least_recently_used
from persistence.record import NEVER
from persistence.session import Session, Terms

ENTRY_OVERHEAD_BYTES: Final = 180
"""What a resident session costs beside its record and its id: object headers (bytes 33, str 49),
the last access (a float, 24), and its places in two dicts (about 30 each), rounded up."""

_BYTES_PER_SHARD: Final = 4 * 2**20
_MAX_SHARDS: Final = 256
_NEAR_SECONDS: Final = 60.0  # far longer than a commit may take


class _Shard:
    """`accessed` is in order of use, oldest first; the others are in no order.

    `lives` holds only those that differ from the default, `caps` only those that have a deadline
    which no renewal moves: usually none at all. `noted` holds, for restored sessions, the last
    access that the index knows already: one that was not accessed again leaves without a word.
    """

    __slots__ = ("accessed", "caps", "lives", "noted", "records")

    def __init__(self) -> None:
        self.records: dict[str, bytes] = {}
        self.accessed: dict[str, float] = {}
        self.lives: dict[str, float] = {}
        self.caps: dict[str, float] = {}
        self.noted: dict[str, float] = {}


def charge(session_id: str, record: bytes) -> int:
    """Return the bytes that a resident session is charged with."""
    if session_id.isascii():
        return len(record) + len(session_id) + ENTRY_OVERHEAD_BYTES
    return len(record) + len(session_id.encode()) + ENTRY_OVERHEAD_BYTES


def shard_count(max_bytes: int) -> int:
    """Return how many shards a budget gets: a power of two, one per 4 MiB, at most 256."""
    wanted = max(1, min(_MAX_SHARDS, max_bytes // _BYTES_PER_SHARD))
    return 1 << (wanted - 1).bit_length()


class MemoryTier:
    """Resident sessions.

    Args:
        max_bytes: the configured budget; the effective one may be lowered by `budget_bytes`.
        clock: time.
        time: the engine's time base, which must be of the same clock.
        default_life: the life that most sessions have; it costs nothing.
    """

    def __init__(
        self, max_bytes: int, clock: Clock, time: EngineTime, default_life: float = NEVER
    ) -> None:
        self.default_life = default_life
        self.budget_bytes = max_bytes
        self.used_bytes = 0
        self.peak_bytes = 0
        self.hits = 0
        self._time = time
        self._terms = (default_life, NEVER, time)
        self._base = time.base
        self._monotonic = clock.monotonic
        count = shard_count(max_bytes)
        self._shards = [_Shard() for _ in range(count)]
        self._mask = count - 1

    def __len__(self) -> int:
        return sum(len(shard.records) for shard in self._shards)

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._shards[hash(session_id) & self._mask].records

    # --- reading ------------------------------------------------------------------------------

    def access(self, session_id: str) -> Session | None:
        """Return a view of a resident, unexpired session and count it as accessed now.

        This is the hot path of the whole engine: one call, no awaiting, no allocation besides the
        view. None means "look closer": not resident, or expired.
        """
        shard = self._shards[hash(session_id) & self._mask]
        last = shard.accessed.pop(session_id, None)
        if last is None:
            return None
        now = self._monotonic() + self._base
        if shard.lives or shard.caps:
            return self._access_unusual(shard, session_id, last, now)
        life = self.default_life
        if last + life <= now:
            shard.accessed[session_id] = last
            return None
        shard.accessed[session_id] = now
        self.hits += 1
        session = Session()
        session.id = session_id
        session._record = shard.records[session_id]
        session._accessed = now
        session._terms = self._terms
        return session

    def _access_unusual(
        self, shard: _Shard, session_id: str, last: float, now: float
    ) -> Session | None:
        """The same where some session of the shard has a life of its own, or a cap."""
        life = shard.lives.get(session_id, self.default_life)
        cap = shard.caps.get(session_id, NEVER)
        if deadline_of(last, life) <= now or cap <= now:
            shard.accessed[session_id] = last
            return None
        shard.accessed[session_id] = now
        self.hits += 1
        return Session.view(session_id, shard.records[session_id], now, self._terms_of(life, cap))

    def _terms_of(self, life: float, cap: float) -> Terms:
        is_usual = life == self.default_life and cap == NEVER
        return self._terms if is_usual else (life, cap, self._time)

    def look(self, session_id: str, margin_seconds: float) -> Session | None:
        """Return the view that `access` would, and change nothing: from any thread.

        The tables may change between two looks at them; each by itself is as it is at one moment,
        and a record is immutable. The caller sees to it that `note` is called.

        Args:
            session_id: which one.
            margin_seconds: None also where the deadline is as near as that.
        """
        shard = self._shards[hash(session_id) & self._mask]
        record = shard.records.get(session_id)
        last = shard.accessed.get(session_id)
        if record is None or last is None:
            return None
        now = self._monotonic() + self._base
        life = self.default_life
        if shard.lives or shard.caps:
            life = shard.lives.get(session_id, life)
            cap = shard.caps.get(session_id, NEVER)
            if min(deadline_of(last, life), cap) <= now + margin_seconds:
                return None
            return Session.view(session_id, record, now, self._terms_of(life, cap))
        if last + life <= now + margin_seconds:
            return None
        return Session.view(session_id, record, now, self._terms)

    def note(self, session_id: str, accessed: float) -> None:
        """Note an access at `accessed`, if the session is still here."""
        shard = self._shards[hash(session_id) & self._mask]
        last = shard.accessed.get(session_id)
        if last is not None and last < accessed:
            del shard.accessed[session_id]  # to the end, as in `access`
            shard.accessed[session_id] = accessed

    def peek(self, session_id: str) -> bytes | None:
        """Return the record of a resident session, expired or not, without accessing it."""
        return self._shards[hash(session_id) & self._mask].records.get(session_id)

    def renew(self, session_id: str) -> tuple[bytes, float, float] | None:
        """Like `live`, and see to it that the session lives on while it is being updated.

        An update that succeeds is an access of its own when it is put here, so only a deadline
        that is near is moved already now.
        """
        shard = self._shards[hash(session_id) & self._mask]
        record = shard.records.get(session_id)
        if record is None:
            return None
        now = self._monotonic() + self._base
        life = shard.lives.get(session_id, self.default_life) if shard.lives else self.default_life
        last = shard.accessed[session_id]
        cap = shard.caps.get(session_id, NEVER) if shard.caps else NEVER
        left = (last + life if life > 0 else -life) - now
        if left <= 0 or cap <= now:
            return None
        if left < _NEAR_SECONDS:
            del shard.accessed[session_id]
            shard.accessed[session_id] = now
        return record, life, cap

    def live(self, session_id: str) -> tuple[bytes, float, float] | None:
        """Return (record, life, cap) of a resident, unexpired session, without accessing it.

        None: not resident, or expired; `in` tells which.
        """
        shard = self._shards[hash(session_id) & self._mask]
        record = shard.records.get(session_id)
        if record is None:
            return None
        life = shard.lives.get(session_id, self.default_life)
        now = self._monotonic() + self._base
        last = shard.accessed[session_id]
        cap = shard.caps.get(session_id, NEVER) if shard.caps else NEVER
        if (last + life if life > 0 else -life) <= now or cap <= now:
            return None
        return record, life, cap

    def times(self, session_id: str) -> tuple[float, float]:
        """Return (last access, life) of a resident session.

        Raises:
            KeyError: it is not resident.
        """
        shard = self._shards[hash(session_id) & self._mask]
        return shard.accessed[session_id], shard.lives.get(session_id, self.default_life)

    def deadline(self, session_id: str) -> float:
        """Return when a resident session expires.

        Raises:
            KeyError: it is not resident.
        """
        accessed, life = self.times(session_id)
        return min(deadline_of(accessed, life), self.cap(session_id))

    def cap(self, session_id: str) -> float:
        """Return the deadline of a session that no renewal moves; infinity: none."""
        return self._shards[hash(session_id) & self._mask].caps.get(session_id, NEVER)

    # --- writing ------------------------------------------------------------------------------

    def put(
        self, session_id: str, record: bytes, accessed: float, life: float, cap: float = NEVER
    ) -> None:
        """Keep a session, as the most recently used one, replacing an older version of it."""
        shard = self._shards[hash(session_id) & self._mask]
        records = shard.records
        old = records.get(session_id)
        used = self.used_bytes
        if old is None:
            used += charge(session_id, record)
        else:
            used += len(record) - len(old)
            # A read may have renewed it after this version was submitted.
            last = shard.accessed.pop(session_id)
            if last > accessed:  # noqa: PLR1730 - every update comes by here; max() is felt
                accessed = last
        self.used_bytes = used
        if used > self.peak_bytes:  # noqa: PLR1730 - as above
            self.peak_bytes = used
        records[session_id] = record
        shard.accessed[session_id] = accessed
        if life != self.default_life:
            shard.lives[session_id] = life
        elif shard.lives:
            shard.lives.pop(session_id, None)
        if cap != NEVER:
            shard.caps[session_id] = cap
        elif shard.caps:
            shard.caps.pop(session_id, None)
        if shard.noted:
            shard.noted.pop(session_id, None)

    def put_noted(
        self, session_id: str, record: bytes, accessed: float, life: float, cap: float
    ) -> None:
        """Keep a session that is not resident, whose last access the index knows already."""
        shard = self._shards[hash(session_id) & self._mask]
        self.used_bytes = used = self.used_bytes + charge(session_id, record)
        if used > self.peak_bytes:  # noqa: PLR1730 - every restore comes by here
            self.peak_bytes = used
        shard.records[session_id] = record
        shard.accessed[session_id] = shard.noted[session_id] = accessed
        if life != self.default_life:
            shard.lives[session_id] = life
        if cap != NEVER:
            shard.caps[session_id] = cap

    def remove(self, session_id: str) -> bytes | None:
        """Drop a session; return its record, or None when it was not resident."""
        taken = self.take(session_id)
        return None if taken is None else taken[0]

    def shed(self, session_ids: Iterable[str]) -> list[str]:
        """Drop those of `session_ids` whose last access the index knows already; return the rest.

        What was restored and not accessed again leaves like this, so that a working set much
        larger than the budget costs little.
        """
        shards, mask = self._shards, self._mask
        rest: list[str] = []
        freed_bytes = 0
        for session_id in session_ids:
            shard = shards[hash(session_id) & mask]
            accessed = shard.noted.pop(session_id, None) if shard.noted else None
            if accessed is None or shard.accessed[session_id] != accessed:
                rest.append(session_id)
                continue
            del shard.accessed[session_id]
            freed_bytes += charge(session_id, shard.records.pop(session_id))
            if shard.lives:
                shard.lives.pop(session_id, None)
            if shard.caps:
                shard.caps.pop(session_id, None)
        self.used_bytes -= freed_bytes
        return rest

    def take(self, session_id: str) -> tuple[bytes, float, float, float] | None:
        """Remove a session; return its record, last access, life and cap; None: not resident."""
        shard = self._shards[hash(session_id) & self._mask]
        record = shard.records.pop(session_id, None)
        if record is None:
            return None
        self.used_bytes -= charge(session_id, record)
        accessed = shard.accessed.pop(session_id)
        life = shard.lives.pop(session_id, self.default_life) if shard.lives else self.default_life
        cap = shard.caps.pop(session_id, NEVER) if shard.caps else NEVER
        if shard.noted:
            shard.noted.pop(session_id, None)
        return record, accessed, life, cap

    def clear(self) -> None:
        """Drop everything."""
        for shard in self._shards:
            for table in (shard.records, shard.accessed, shard.lives, shard.caps, shard.noted):
                table.clear()
        self.used_bytes = 0

    # --- who leaves ---------------------------------------------------------------------------

    def victims(self, target_bytes: float, limit: int) -> list[str]:
        """Return the sessions that should leave to get down to `target_bytes`, in policy order.

        Args:
            target_bytes: the wanted `used_bytes`.
            limit: return at most so many; ask again for more.
        """
        excess = self.used_bytes - target_bytes
        chosen: list[str] = []
        shards, mask = self._shards, self._mask
        order = least_recently_used([shard.accessed for shard in shards])
        for session_id in islice(order, limit):
            if excess <= 0:
                break
            records = shards[hash(session_id) & mask].records
            excess -= charge(session_id, records[session_id])
            chosen.append(session_id)
        return chosen

    # --- going through ------------------------------------------------------------------------

    @property
    def policy(self) -> str:
        """The eviction policy in use: here LRU, for others see `memory.ordered`."""
        return "lru"

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return len(self._shards)

    def ids_of_shard(self, number: int) -> list[str]:
        """Return the sessions of one shard."""
        return list(self._shards[number].records)

    def accessed_since(self, number: int, since: float) -> list[str]:
        """Return the sessions of one shard that were accessed at or after `since`."""
        accessed = self._shards[number].accessed
        return [session_id for session_id, last in accessed.items() if last >= since]

    def check(self) -> None:
        """Assert the invariants. For tests: takes time in proportion to the sessions."""
        total = 0
        for shard in self._shards:
            keys = shard.records.keys()
            assert keys == shard.accessed.keys() >= shard.lives.keys(), "tables differ"
            assert keys >= shard.caps.keys(), "caps of sessions that are not resident"
            assert keys >= shard.noted.keys(), "notes on sessions that are not resident"
            total += sum(charge(name, record) for name, record in shard.records.items())
        assert total == self.used_bytes, (total, self.used_bytes)


def deadline_of(accessed: float, life: float) -> float:
    """Return the deadline of a session: see the module about *life*."""
    return accessed + life if life > 0 else -life
