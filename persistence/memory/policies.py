"""Eviction policies: in which order resident sessions leave. Pure, synchronous, no clock.

- `Lru`: folklore, the reference of every paper. Good at whatever is recent: conversations.
- `Sieve`: Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024. A hit costs one flag. Good at web
  keys.
- `S3Fifo`: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. A hit costs
  one counter. Good at web keys of which many are asked for once.

No policy is the best everywhere; `memory.adaptive` finds out which one is. The default tier (see
`memory.tier`) does not use `Lru`: its own tables are in order of access already, and
`least_recently_used` reads them.

A policy knows the keys that are resident and their order, and nothing of bytes: who asks for
victims stops asking when enough bytes are free.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Final, Protocol

SMALL_SHARE: Final = 0.1
"""S3-FIFO: the share of all keys that wait in the small queue for a second look (the paper's)."""
_PROMOTING_HITS: Final = 2
"""S3-FIFO: so many hits in the small queue move a key to the main queue (the authors' code)."""
_MAX_HITS: Final = 3
"""S3-FIFO: hits are counted in two bits."""
_FEW_REMOVED: Final = 64


def least_recently_used(shards: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """Return session ids, least recently used first, over all shards.

    Exact as far as each shard is in order of access. (A session that was brought in without being
    accessed counts as used when it came.)

    Args:
        shards: for each shard, session id -> last access (engine seconds), oldest first.

    Nothing may be inserted into or removed from the shards while this is being iterated.
    """
    occupied = [shard for shard in shards if shard]
    if len(occupied) == 1:
        return iter(occupied[0])
    by_access = itemgetter(1)
    merged = heapq.merge(*(shard.items() for shard in occupied), key=by_access)
    return map(itemgetter(0), merged)


class EvictionPolicy(Protocol):
    """The order in which keys leave."""

    def __len__(self) -> int:
        """Return how many keys are resident."""

    def __contains__(self, key: str) -> bool:
        """Tell whether a key is resident."""

    def insert(self, key: str) -> None:
        """Take in a key that is not resident."""

    def hit(self, key: str) -> None:
        """Note that a resident key was asked for."""

    def remove(self, key: str) -> None:
        """Forget a resident key that left for another reason than eviction."""

    def evict(self) -> str:
        """Choose the key that leaves next, forget it, and return it.

        Raises:
            KeyError: none is resident.
        """


class Lru:
    """Least recently used first."""

    __slots__ = ("_order",)

    def __init__(self) -> None:
        self._order: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, key: str) -> bool:
        return key in self._order

    def insert(self, key: str) -> None:
        """See `EvictionPolicy`."""
        self._order[key] = None

    def hit(self, key: str) -> None:
        """See `EvictionPolicy`."""
        del self._order[key]
        self._order[key] = None

    def remove(self, key: str) -> None:
        """See `EvictionPolicy`."""
        del self._order[key]

    def evict(self) -> str:
        """See `EvictionPolicy`."""
        for key in self._order:
            del self._order[key]
            return key
        raise KeyError("no key is resident")


class _Queues:
    """Two FIFO queues of keys, from which a key is taken out of turn lazily.

    Invariant: a key is in at most one of the queues, and there once; `_removed` are those that are
    still there though they left. So a removal costs no search, and what was removed is never more
    than an eighth of what is there (and a few).
    """

    __slots__ = ("_removed", "first", "second")

    def __init__(self) -> None:
        self.first: deque[str] = deque()
        self.second: deque[str] = deque()
        self._removed: set[str] = set()

    def remove(self, key: str) -> None:
        self._removed.add(key)
        if len(self._removed) > _FEW_REMOVED + (len(self.first) + len(self.second)) // 8:
            self._purge()

    def forget(self, key: str) -> None:
        """See to it that a key that comes in is not found at its old place."""
        if key in self._removed:
            self._purge()

    def is_empty(self, queue: deque[str]) -> bool:
        """Tell whether nothing is in a queue but what was removed."""
        removed = self._removed
        while queue and queue[0] in removed:
            removed.discard(queue.popleft())
        return not queue

    def swap(self) -> None:
        self.first, self.second = self.second, self.first

    def pop(self, queue: deque[str]) -> str | None:
        """Return the oldest key of a queue, which it leaves; None: the queue is empty."""
        removed = self._removed
        while queue:
            key = queue.popleft()
            if key not in removed:
                return key
            removed.discard(key)
        return None

    def _purge(self) -> None:
        removed = self._removed
        self.first = deque(key for key in self.first if key not in removed)
        self.second = deque(key for key in self.second if key not in removed)
        removed.clear()


class Sieve:
    """A FIFO queue that a hand goes along, from the oldest key to the newest, and round again.

    The hand evicts the first key that was not asked for since it last came by. Survivors keep
    their places. Here the queue is cut at the hand: `first` are those ahead of it, `second` those
    that it has passed, all of them older. A hand that has come to the end begins again at the
    oldest key, also when a key comes in behind the end: newcomers get the time of a round.
    """

    __slots__ = ("_queues", "_visited")

    def __init__(self) -> None:
        self._visited: dict[str, bool] = {}
        self._queues = _Queues()

    def __len__(self) -> int:
        return len(self._visited)

    def __contains__(self, key: str) -> bool:
        return key in self._visited

    def insert(self, key: str) -> None:
        """See `EvictionPolicy`."""
        queues = self._queues
        queues.forget(key)
        if queues.is_empty(queues.first):
            queues.swap()
        self._visited[key] = False
        queues.first.append(key)

    def hit(self, key: str) -> None:
        """See `EvictionPolicy`."""
        self._visited[key] = True

    def remove(self, key: str) -> None:
        """See `EvictionPolicy`."""
        del self._visited[key]
        self._queues.remove(key)

    def evict(self) -> str:
        """See `EvictionPolicy`."""
        visited, queues = self._visited, self._queues
        if not visited:
            raise KeyError("no key is resident")
        while True:
            key = queues.pop(queues.first)
            if key is None:
                queues.swap()
            elif visited[key]:
                visited[key] = False
                queues.second.append(key)
            else:
                del visited[key]
                return key


class S3Fifo:
    """A small queue that newcomers must be asked for in, a main queue, and a memory of the evicted.

    `first` is the small queue, a tenth of the keys. Who was asked for there moves to the main queue
    (`second`); who was not leaves, and is remembered as a ghost: if it comes again soon, it goes
    to the main queue at once. The main queue is a FIFO in which a hit buys another round.
    """

    __slots__ = ("_ghosts", "_hits", "_queues")

    def __init__(self) -> None:
        self._hits: dict[str, int] = {}
        self._queues = _Queues()
        self._ghosts: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._hits)

    def __contains__(self, key: str) -> bool:
        return key in self._hits

    def insert(self, key: str) -> None:
        """See `EvictionPolicy`."""
        queues = self._queues
        queues.forget(key)
        self._hits[key] = 0
        if key in self._ghosts:
            del self._ghosts[key]
            queues.second.append(key)
        else:
            queues.first.append(key)

    def hit(self, key: str) -> None:
        """See `EvictionPolicy`."""
        hits = self._hits[key]
        if hits < _MAX_HITS:
            self._hits[key] = hits + 1

    def remove(self, key: str) -> None:
        """See `EvictionPolicy`."""
        del self._hits[key]
        self._queues.remove(key)

    def evict(self) -> str:
        """See `EvictionPolicy`."""
        hits, queues = self._hits, self._queues
        if not hits:
            raise KeyError("no key is resident")
        while True:
            small = max(1, int(SMALL_SHARE * len(hits)))
            if len(queues.second) <= len(hits) - small and queues.first:
                key = queues.pop(queues.first)
                if key is None:
                    continue
                if hits[key] < _PROMOTING_HITS:
                    del hits[key]
                    self._remember(key)
                    return key
                hits[key] = 0
            else:
                key = queues.pop(queues.second)
                if key is None:
                    continue
                if not hits[key]:
                    del hits[key]
                    return key
                hits[key] -= 1
            queues.second.append(key)

    def _remember(self, key: str) -> None:
        """Make a ghost of an evicted key; there are about as many as keys in the main queue."""
        ghosts = self._ghosts
        ghosts[key] = None
        most = (1 - SMALL_SHARE) * (len(self._hits) + 1)
        while len(ghosts) > most:
            del ghosts[next(iter(ghosts))]


POLICIES: Final[Mapping[str, type[Lru | Sieve | S3Fifo]]] = {
    "lru": Lru,
    "sieve": Sieve,
    "s3fifo": S3Fifo,
}
"""Name, as in ``memory.policy``, -> policy."""


def make_policy(name: str, keys: Iterable[str] = ()) -> EvictionPolicy:
    """Return a policy by its name, with `keys` resident, the next to leave first."""
    policy = POLICIES[name]()
    for key in keys:
        policy.insert(key)
    return policy


def drained(policy: EvictionPolicy) -> Iterator[str]:
    """Evict every key of a policy: the order in which they would have left."""
    while len(policy):
        yield policy.evict()
