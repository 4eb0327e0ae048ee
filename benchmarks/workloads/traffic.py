"""Traffic as it was recorded, the sizes of sessions as they are, and a loop that has it all.

=============== ===============================================================================
conversation    a chat service: each request adds an answer to its conversation, 100 at once
web-trace       an access log: each request adds its page to its client's session, 100 at once
documents       create a session of each real document, 100 at once
hit-ratio       share of accesses that hit memory, which is filled to its last byte (default: 80 %)
loop-lag        the event loop's lag while everything runs at full speed, values up to 64 KiB
=============== ===============================================================================

In the first three, a peer gets 100 requests as a batch that shares a transaction.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks import traces
from benchmarks.bars import Bar, Kind
from benchmarks.contender import RATE, Contender, Metric
from benchmarks.engine import busy
from benchmarks.engine.replay import HitRatio, Replay
from benchmarks.peers import driven, hits, idle, zict
from benchmarks.peers.diskcache import DiskCache
from benchmarks.peers.files import FilePerSession
from benchmarks.peers.lmdb import Lmdb
from benchmarks.peers.redis import Redis
from benchmarks.peers.rocksdb import RocksDb
from benchmarks.peers.sqlite import Sqlite
from benchmarks.peers.store import Store
from benchmarks.sizes import MIB, Sizes
from benchmarks.traces import Trace
from benchmarks.workload import SESSION_RSS_BYTES, Workload, at_least

_defined = partial(Workload, definitions=__doc__)

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5)
_HITS = tuple(Metric(f"{share:.0%}", " % hits", higher_is_better=True) for share in SHARES)
_POLICIES = ("lru", "sieve", "s3fifo", "adaptive")


def _replay(trace: Callable[[Sizes], Trace], sizes: Sizes) -> list[Contender]:
    draw, memory_bytes = partial(trace, sizes), sizes.traced_memory_bytes
    fast: list[Store] = [Lmdb(), RocksDb(), Sqlite(), DiskCache(), Redis(), FilePerSession()]
    return [
        Replay(draw, memory_bytes),
        Replay(draw, memory_bytes, fsync="never"),
        *(driven.Replay(store, 0, trace=draw) for store in fast),
        driven.Replay(zict.Buffer(memory_bytes // SESSION_RSS_BYTES), 0, trace=draw),
    ]


def _hit_ratio(sizes: Sizes) -> list[Contender]:
    return [
        *(HitRatio(sizes, policy, SHARES, _HITS) for policy in _POLICIES),
        hits.LruHits(sizes, SHARES, _HITS),
        hits.OptimalHits(sizes, SHARES, _HITS),
    ]


def _loop_lag(sizes: Sizes) -> list[Contender]:
    return [
        busy.BusyLoop(sizes.lag_samples, sizes.lag_sessions, memory_bytes=2 * MIB),
        idle.IdleLoop(sizes.lag_samples),
    ]


_SYNCED = "persistence, fsync=always"
_AHEAD = (at_least(1, "LMDB", _SYNCED), at_least(1, "SQLite (WAL)", _SYNCED))

_replayed = partial(_defined, repetitions=lambda sizes: sizes.traced_repetitions)

WORKLOADS = (
    _replayed("conversation", (RATE,), partial(_replay, traces.conversation), _AHEAD),
    _replayed("web-trace", (RATE,), partial(_replay, traces.web), _AHEAD),
    _replayed("documents", (RATE,), partial(_replay, traces.documents), _AHEAD),
    _defined("hit-ratio", _HITS, _hit_ratio, repetitions=lambda sizes: 1, observed=False),
    _defined(
        "loop-lag",
        busy.METRICS,
        _loop_lag,
        (Bar("p99.9", Kind.AT_MOST, 5),),
        repetitions=lambda sizes: sizes.lag_repetitions,
        observed=False,
    ),
)
