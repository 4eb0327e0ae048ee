"""Which policy wins on the keys that are really asked for: small shadow caches tell. Pure.

A shadow is a policy on its own, without values. Each shadow sees the same sample of the keys: those
whose hash falls into one of `rate` parts, so that a key is either always seen or never, and a
cache that is `rate` times smaller has about the same hit ratio on them (Waldspurger et al., "Cache
Modeling and Optimization using Miniature Simulations", USENIX ATC 2017). A window's hits count half
after about 23 windows; the policy in use changes when another one is ahead by more than `MARGIN`,
so that noise does not move it back and forth.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

from persistence.memory.policies import POLICIES, EvictionPolicy, make_policy

SHADOW_KEYS: Final = 4096
"""A shadow has at most so many keys; a cache up to that size is seen whole."""
MARGIN: Final = 0.01
"""A policy must have this share more hits than the one in use."""
DECAY: Final = 0.97
"""What a window's hits count when the next one has passed."""
START_SHARE: Final = 0.1
"""Watching begins when so much of the budget is used: before anything must leave, so that the
shadows know the keys when it comes to that."""
_MIN_WINDOW: Final = 256
_SAMPLED_BITS_FROM: Final = 20  # the lower ones choose the shard of the memory tier


class Shadows:
    """The shadow caches of all policies, and which of them is ahead.

    Args:
        keys: how many keys the real cache holds when it is full.
        policy: the one in use.
        resident: the keys that are there already, in the order in which they would leave.

    Attributes:
        policy: the one that should be in use.
        rate: one of so many keys is looked at.
    """

    def __init__(self, keys: int, policy: str, resident: Iterable[str] = ()) -> None:
        self.policy = policy
        self.keys = keys
        self.rate = 1
        while keys > SHADOW_KEYS * self.rate:
            self.rate *= 2
        self._mask = (self.rate - 1) << _SAMPLED_BITS_FROM
        self._capacity = max(1, keys // self.rate)
        self._window = max(_MIN_WINDOW, self._capacity)
        self._left = self._window
        self._shadows: list[tuple[str, EvictionPolicy]] = [
            (name, make_policy(name)) for name in POLICIES
        ]
        self._seed(key for key in resident if not hash(key) & self._mask)
        self._hits = dict.fromkeys(POLICIES, 0.0)

    def _seed(self, sampled: Iterable[str]) -> None:
        for key in sampled:
            for _, shadow in self._shadows:
                if len(shadow) >= self._capacity:
                    shadow.evict()
                shadow.insert(key)

    def observe(self, key: str) -> bool:
        """Note that a key was asked for, hit or miss; tell whether a window has ended by that."""
        if hash(key) & self._mask:
            return False
        for name, shadow in self._shadows:
            if key in shadow:
                shadow.hit(key)
                self._hits[name] += 1
            else:
                if len(shadow) >= self._capacity:
                    shadow.evict()
                shadow.insert(key)
        self._left -= 1
        if self._left:
            return False
        self._end_window()
        return True

    def _end_window(self) -> None:
        hits = self._hits
        best = max(hits, key=hits.__getitem__)
        if hits[best] > hits[self.policy] * (1 + MARGIN):
            self.policy = best
        for name in hits:
            hits[name] *= DECAY
        self._left = self._window

    def fits(self, keys: int) -> bool:
        """Tell whether the shadows are about right for a real cache that holds so many keys."""
        return self.keys / 2 <= keys <= self.keys * 2


class WatchedCache(Protocol):
    """What an adviser must know of the cache that it advises."""

    @property
    def used_bytes(self) -> int:
        """What is resident."""

    @property
    def budget_bytes(self) -> int:
        """What may be."""

    def __len__(self) -> int:
        """Return how many keys are resident."""

    def resident(self) -> Iterable[str]:
        """Return the resident keys, those that would leave first first."""


class Adviser:
    """Says which policy a cache should be under. Watches from when the cache begins to fill.

    Attributes:
        policy: the one that should be in use; it begins with LRU.
    """

    def __init__(self) -> None:
        self.policy = "lru"
        self._shadows: Shadows | None = None

    def observe(self, key: str, cache: WatchedCache) -> None:
        """Note that a key was asked for, hit or miss."""
        shadows = self._shadows
        if shadows is None:
            if cache.used_bytes >= START_SHARE * cache.budget_bytes:
                self._watch(cache)
        elif shadows.observe(key):
            self.policy = shadows.policy
            if not shadows.fits(_full_house(cache)):
                self._watch(cache)

    def forget(self) -> None:
        """The cache is empty: begin to watch anew, under the policy in use."""
        self._shadows = None

    def _watch(self, cache: WatchedCache) -> None:
        self._shadows = Shadows(_full_house(cache), self.policy, cache.resident())


def full_house(keys: int, used_bytes: int, budget_bytes: int) -> int:
    """Return how many keys a budget will hold, going by those that are there."""
    return max(1, keys * budget_bytes // max(1, used_bytes))


def _full_house(cache: WatchedCache) -> int:
    return full_house(len(cache), cache.used_bytes, cache.budget_bytes)
