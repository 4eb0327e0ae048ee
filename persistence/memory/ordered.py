"""The memory tier under a policy other than LRU, or under the one that the workload chooses.

Each shard has a policy of its own over its sessions, so no table is larger than a shard. The
adaptive tier watches shadow caches (see `memory.adaptive`) and moves its shards to the policy that
is ahead, one shard at each search for victims, so that no move is long.

What counts as asked for is a read, and the read at the beginning of an update. That the update is
put here afterwards does not count once more, or each session would look popular from the start.

Invariants, asserted by `check`: each resident session is in the policy of its shard, or it was
named as a victim in the last search; no other session is.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from persistence.clock import Clock, EngineTime
from persistence.memory.adaptive import Adviser
from persistence.memory.policies import EvictionPolicy, drained, make_policy
from persistence.memory.tier import MemoryTier, charge
from persistence.record import NEVER
from persistence.session import Session

ADAPTIVE = "adaptive"


def make_memory_tier(
    policy: str, max_bytes: int, clock: Clock, time: EngineTime, default_life: float = NEVER
) -> MemoryTier:
    """Return the memory tier for a value of ``memory.policy``; see `MemoryTier`."""
    if policy == "lru":
        return MemoryTier(max_bytes, clock, time, default_life)
    return OrderedTier(policy, max_bytes, clock, time, default_life)


class OrderedTier(MemoryTier):
    """See the module.

    Args:
        policy: a name of `policies.POLICIES`, or ``"adaptive"``, which begins as LRU.
        max_bytes: see `MemoryTier`, as the other arguments.
    """

    def __init__(
        self,
        policy: str,
        max_bytes: int,
        clock: Clock,
        time: EngineTime,
        default_life: float = NEVER,
    ) -> None:
        super().__init__(max_bytes, clock, time, default_life)
        self._adviser = Adviser() if policy == ADAPTIVE else None
        self._policy = policy
        self._names = [self.policy] * self.shards
        self._policies: list[EvictionPolicy] = [make_policy(name) for name in self._names]
        self._named: list[str] = []
        self._next_shard = 0

    @property
    def policy(self) -> str:
        """The policy in use."""
        return self._policy if self._adviser is None else self._adviser.policy

    # --- who is asked for ---------------------------------------------------------------------

    def access(self, session_id: str) -> Session | None:
        """See `MemoryTier.access`."""
        session = super().access(session_id)
        if session is not None:
            self._hit(session_id)
        return session

    def note(self, session_id: str, accessed: float) -> None:
        """See `MemoryTier.note`."""
        super().note(session_id, accessed)
        if session_id in self:
            self._hit(session_id)

    def renew(self, session_id: str) -> tuple[bytes, float, float] | None:
        """See `MemoryTier.renew`."""
        found = super().renew(session_id)
        if found is not None:
            self._hit(session_id)
        return found

    def _hit(self, session_id: str) -> None:
        policy = self._policies[hash(session_id) & self._mask]
        if session_id in policy:
            policy.hit(session_id)
        if self._adviser is not None:
            self._adviser.observe(session_id, self)

    def resident(self) -> Iterable[str]:
        """See `adaptive.WatchedCache`; in order within each shard."""
        return chain.from_iterable(shard.accessed for shard in self._shards)

    # --- who comes and goes -------------------------------------------------------------------

    def put(
        self, session_id: str, record: bytes, accessed: float, life: float, cap: float = NEVER
    ) -> None:
        """See `MemoryTier.put`."""
        is_new = session_id not in self
        super().put(session_id, record, accessed, life, cap)
        if is_new:
            self._enter(session_id)

    def put_noted(
        self, session_id: str, record: bytes, accessed: float, life: float, cap: float
    ) -> None:
        """See `MemoryTier.put_noted`."""
        super().put_noted(session_id, record, accessed, life, cap)
        self._enter(session_id)

    def _enter(self, session_id: str) -> None:
        policy = self._policies[hash(session_id) & self._mask]
        if session_id not in policy:
            policy.insert(session_id)
        if self._adviser is not None:
            self._adviser.observe(session_id, self)

    def take(self, session_id: str) -> tuple[bytes, float, float, float] | None:
        """See `MemoryTier.take`."""
        taken = super().take(session_id)
        if taken is not None:
            self._leave(session_id)
        return taken

    def shed(self, session_ids: Iterable[str]) -> list[str]:
        """See `MemoryTier.shed`."""
        wanted = list(session_ids)
        rest = super().shed(wanted)
        for session_id in wanted:
            if session_id not in self:
                self._leave(session_id)
        return rest

    def _leave(self, session_id: str) -> None:
        policy = self._policies[hash(session_id) & self._mask]
        if session_id in policy:
            policy.remove(session_id)

    def clear(self) -> None:
        """See `MemoryTier.clear`."""
        super().clear()
        self._policies = [make_policy(name) for name in self._names]
        self._named = []
        if self._adviser is not None:
            self._adviser.forget()

    # --- who leaves ---------------------------------------------------------------------------

    def victims(self, target_bytes: float, limit: int) -> list[str]:
        """See `MemoryTier.victims`.

        The shards are asked in turn, but for those with less than their share of the sessions. A
        victim that does not leave after all is taken in again at the next call.
        """
        self._take_back()
        self._convert_one(self.policy)
        excess = self.used_bytes - target_bytes
        left = sum(map(len, self._policies))
        while excess > 0 and left and len(self._named) < limit:
            number = self._next_shard
            self._next_shard = (number + 1) & self._mask
            policy = self._policies[number]
            if len(policy) * self.shards < left:
                continue
            session_id = policy.evict()
            left -= 1
            excess -= charge(session_id, self._shards[number].records[session_id])
            self._named.append(session_id)
        return list(self._named)

    def _take_back(self) -> None:
        for session_id in self._named:
            if session_id in self:
                policy = self._policies[hash(session_id) & self._mask]
                if session_id not in policy:
                    policy.insert(session_id)
        self._named = []

    def _convert_one(self, policy: str) -> None:
        """Move one of the shards that have another policy to the one in use."""
        if self._adviser is None:
            return
        for number, name in enumerate(self._names):
            if name != policy:
                self._policies[number] = make_policy(policy, drained(self._policies[number]))
                self._names[number] = policy
                return

    def check(self) -> None:
        """See `MemoryTier.check`."""
        super().check()
        ordered = 0
        for shard, policy in zip(self._shards, self._policies, strict=True):
            missing = [name for name in shard.records if name not in policy]
            assert set(missing) <= set(self._named), "a resident session that nobody would evict"
            ordered += len(policy)
            assert len(policy) + len(missing) == len(shard.records), "a victim that is not there"
        assert ordered <= len(self), "a policy knows of sessions that are not resident"
