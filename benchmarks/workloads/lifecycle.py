"""Sessions that come, go, are listed, and are found again.

=============== ===============================================================================
churn           create sessions and terminate them, 1,000 tasks, synced; most sessions stay
expiry          the TTL of all sessions ends at the same moment: remove them
scan            go through the ids of all sessions
open            open a directory of many cold sessions, after all that may have happened to it
=============== ===============================================================================
"""

from __future__ import annotations

from functools import partial

from benchmarks.bars import Bar, Kind
from benchmarks.contender import RATE, Contender, Metric
from benchmarks.engine.lifecycle import Churn, Expiry, Scan
from benchmarks.engine.opening import HINTS, INDEX_SNAPSHOT, Build, Opening
from benchmarks.peers import driven
from benchmarks.peers.diskcache import DiskCache
from benchmarks.peers.lmdb import Lmdb
from benchmarks.peers.plain import PlainDict
from benchmarks.peers.redis import Redis
from benchmarks.peers.rocksdb import RocksDb
from benchmarks.peers.sqlite import Sqlite
from benchmarks.peers.store import Store
from benchmarks.sizes import Sizes
from benchmarks.workload import Workload

_defined = partial(Workload, definitions=__doc__)

_CLEAN = "after a clean close"
_HINTS_ONLY = "index snapshot removed"
_FULL_SCAN = "hints removed too: full scan"
_KILLED = "after kill -9"

_INDEX_BYTES = 100  # per cold session


def _churn(sizes: Sizes) -> list[Contender]:
    count, churned = sizes.update_sessions, sizes.churned_sessions
    stores: list[Store] = [Lmdb(), RocksDb(), Sqlite(), DiskCache(), PlainDict()]
    return [
        Churn(count, churned),
        *(driven.Churn(store, count, churned_count=churned) for store in stores),
        driven.Churn(Redis(), count, churned_count=max(1, churned // 10)),
    ]


def _expiry(sizes: Sizes) -> list[Contender]:
    count = sizes.expired_sessions
    return [
        Expiry(count),
        driven.Expiry(Sqlite(synced=False), count),
        driven.Expiry(DiskCache(synced=False), max(1, count // 20)),
    ]


def _scan(sizes: Sizes) -> list[Contender]:
    count = sizes.scanned_sessions
    stores: list[Store] = [Lmdb(synced=False), RocksDb(synced=False), Sqlite(synced=False)]
    return [
        Scan(count),
        *(driven.Scan(store, count) for store in stores),
        driven.Scan(Redis(synced=False), count),
        driven.Scan(PlainDict(), count),
    ]


def _open(sizes: Sizes) -> list[Contender]:
    count = sizes.opened_sessions
    return [
        Opening(_CLEAN, count),
        Opening(_HINTS_ONLY, count, removed=(INDEX_SNAPSHOT,)),
        Opening(_FULL_SCAN, count, removed=(INDEX_SNAPSHOT, HINTS)),
        Opening(_KILLED, count, killed=True),
        driven.Reopen(Lmdb(), count),
        driven.Reopen(RocksDb(synced=False), count),
        driven.Reopen(Sqlite(synced=False), count),
    ]


WORKLOADS = (
    _defined("churn", (RATE,), _churn),
    _defined("expiry", (RATE,), _expiry, repetitions=lambda sizes: sizes.expiry_repetitions),
    _defined("scan", (RATE,), _scan),
    _defined(
        "open",
        (Metric("seconds", " s"), Metric("rss", " B/session")),
        _open,
        (
            Bar("seconds", Kind.AT_MOST, 1, ours=_CLEAN),
            Bar("seconds", Kind.AT_MOST, 3, ours=_HINTS_ONLY),
            Bar("seconds", Kind.AT_MOST, 3, ours=_KILLED),
            Bar("rss", Kind.AT_MOST, _INDEX_BYTES, ours=_CLEAN),
        ),
        build=lambda sizes: Build(sizes.opened_sessions),
        repetitions=lambda sizes: sizes.fresh_repetitions,
    ),
)
