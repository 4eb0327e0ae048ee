"""Eviction policies: in which order resident sessions leave. Pure, synchronous, no clock.

A shard of the memory tier keeps its sessions in a dict of last access times, and an access moves
its session to the end of that dict. So the dict *is* the recency order, at the price of one pop
and one insertion, without a linked list and without an object per session.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter


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
