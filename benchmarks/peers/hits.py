"""Hit ratios to compare with: another LRU, and the best that any policy could do."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import heapq
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import traces
from benchmarks.contender import Contender, Metric, Metrics
from benchmarks.optional import load
from benchmarks.sizes import Sizes


@dataclass
class _Hits(Contender):
    """Memory for a share of all keys, counted as keys."""

    sizes: Sizes
    shares: tuple[float, ...]
    metrics: tuple[Metric, ...]
    fresh_process: bool = True

    async def open(self, directory: Path) -> None:
        self._keys = traces.keys(self.sizes)[1]

    async def measure(self) -> Metrics:
        distinct = len(set(self._keys))
        rooms = [max(1, round(share * distinct)) for share in self.shares]
        return {
            metric.name: 100 * self.hits(self._keys, room) / len(self._keys)
            for metric, room in zip(self.metrics, rooms, strict=True)
        }

    @abstractmethod
    def hits(self, keys: Sequence[int], room: int) -> int:
        """Return how many accesses find their key among `room` kept ones."""


@dataclass
class LruHits(_Hits):
    """`zict.LRU`."""

    name: str = "zict.LRU"

    def hits(self, keys: Sequence[int], room: int) -> int:
        lru = load("zict").LRU(room, {})
        found = 0
        for key in keys:
            if key in lru:
                found += 1
                lru[key]
            else:
                lru[key] = None
        return found


@dataclass
class OptimalHits(_Hits):
    """Belady: what is needed latest leaves first. It knows the future, so nobody can be better."""

    name: str = "optimum (knows the future)"
    is_limit: bool = True

    def hits(self, keys: Sequence[int], room: int) -> int:
        return optimal_hits(keys, room)


def optimal_hits(keys: Sequence[int], room: int) -> int:
    """Return the hits of the best possible policy; a key need not be kept at all."""
    upcoming = next_uses(keys)
    resident: dict[int, int] = {}  # key -> its next use
    by_next_use: list[tuple[int, int]] = []  # (-next use, key); stale entries are passed over
    found = 0
    for position, key in enumerate(keys):
        if key in resident:
            found += 1
        resident[key] = upcoming[position]
        heapq.heappush(by_next_use, (-upcoming[position], key))
        while len(resident) > room:
            next_use, victim = heapq.heappop(by_next_use)
            if resident.get(victim) == -next_use:
                del resident[victim]
    return found


def next_uses(keys: Sequence[int]) -> list[int]:
    """Return, for each position, where its key comes next; far beyond the end for never."""
    upcoming = [0] * len(keys)
    seen: dict[int, int] = {}
    for position in range(len(keys) - 1, -1, -1):
        key = keys[position]
        upcoming[position] = seen.get(key, len(keys) + position)
        seen[key] = position
    return upcoming
