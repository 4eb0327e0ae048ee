"""What a policy would have hit in a given budget, on keys that were asked for. Pure.

For choosing a budget: ``persistence replay --policy all`` draws the curves of a log with this.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from persistence.memory.adaptive import Adviser
from persistence.memory.policies import EvictionPolicy, drained, make_policy

ADAPTIVE = "adaptive"


@dataclass(frozen=True, slots=True)
class HitRatio:
    """What a simulated cache did.

    Attributes:
        requests: keys that were asked for.
        hits: those of them that were resident.
        requested_bytes: the sizes of all that was asked for.
        hit_bytes: the sizes of what was resident.
        policy: the policy in use at the end.
    """

    requests: int
    hits: int
    requested_bytes: int
    hit_bytes: int
    policy: str

    @property
    def ratio(self) -> float:
        """Hits of all requests; 0 for none."""
        return self.hits / self.requests if self.requests else 0.0

    @property
    def byte_ratio(self) -> float:
        """Bytes that were resident of all bytes asked for; 0 for none."""
        return self.hit_bytes / self.requested_bytes if self.requested_bytes else 0.0


class SimulatedCache:
    """A cache of keys with sizes, under one policy or the adaptive one.

    Args:
        name: a name of `policies.POLICIES`, or `ADAPTIVE`.
        budget_bytes: what the resident keys' sizes may sum up to.
        threshold: the share of it above which keys leave,
        target: and the share at which they stop leaving.
    """

    def __init__(
        self, name: str, budget_bytes: int, threshold: float = 1.0, target: float = 1.0
    ) -> None:
        self.used_bytes = 0
        self.budget_bytes = budget_bytes
        self._threshold_bytes = budget_bytes * threshold
        self._target_bytes = budget_bytes * target
        self._adviser = Adviser() if name == ADAPTIVE else None
        self._name = name if self._adviser is None else self._adviser.policy
        self._policy: EvictionPolicy = make_policy(self._name)
        self._sizes: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._policy)

    def resident(self) -> Iterable[str]:
        """See `adaptive.WatchedCache`; about in order of arrival."""
        return self._sizes

    @property
    def policy(self) -> str:
        """The policy in use."""
        return self._name

    def ask(self, key: str, size_bytes: int) -> bool:
        """Ask for a key, which is resident after that if it fits at all; tell whether it was."""
        policy, sizes = self._policy, self._sizes
        is_hit = key in policy
        if is_hit:
            policy.hit(key)
        if self._adviser is not None:
            self._adviser.observe(key, self)
            self._follow(self._adviser.policy)
            policy = self._policy
        self.used_bytes += size_bytes - sizes.get(key, 0)
        if not is_hit:
            self._make_room(0)
            policy.insert(key)
        sizes[key] = size_bytes
        self._make_room(1)
        return is_hit

    def _make_room(self, least: int) -> None:
        policy = self._policy
        if self.used_bytes <= self._threshold_bytes:
            return
        while self.used_bytes > self._target_bytes and len(policy) > least:
            self.used_bytes -= self._sizes.pop(policy.evict())

    def _follow(self, name: str) -> None:
        if name != self._name:
            self._name = name
            self._policy = make_policy(name, drained(self._policy))


def simulated(
    name: str,
    budget_bytes: int,
    asked: Iterable[tuple[str, int]],
    threshold: float = 1.0,
    target: float = 1.0,
) -> HitRatio:
    """Return what a cache hits of (key, size in bytes), asked for in order.

    The other arguments are those of `SimulatedCache`.
    """
    cache = SimulatedCache(name, budget_bytes, threshold, target)
    requests = hits = requested_bytes = hit_bytes = 0
    for key, size_bytes in asked:
        requests += 1
        requested_bytes += size_bytes
        if cache.ask(key, size_bytes):
            hits += 1
            hit_bytes += size_bytes
    return HitRatio(requests, hits, requested_bytes, hit_bytes, cache.policy)
