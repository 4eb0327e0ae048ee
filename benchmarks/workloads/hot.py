"""Reading sessions that are in memory.

=============== ===============================================================================
hot-get         `await get_session(id)`, all sessions in memory, shuffled
hot-get-many    the same with 300,000 sessions, more than fit in the caches of a processor
hot-field       the same as hot-get, then one small field of what came back
hot-whole       the same, then all of its data as a dict
memory          what a resident session costs: RSS growth, and a full garbage collection
=============== ===============================================================================
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks import resident
from benchmarks.bars import Bar, Kind
from benchmarks.contender import RATE, Contender
from benchmarks.engine.hot import HotRead
from benchmarks.engine.memory import Resident
from benchmarks.peers import live, zict
from benchmarks.peers.diskcache import DiskCache
from benchmarks.peers.driven import HotReads
from benchmarks.peers.lmdb import Lmdb
from benchmarks.peers.plain import DictRead
from benchmarks.peers.redis import Redis
from benchmarks.peers.rocksdb import RocksDb
from benchmarks.peers.sqlite import Sqlite
from benchmarks.sizes import Sizes
from benchmarks.workload import Workload, at_least

_defined = partial(Workload, definitions=__doc__)


def _reads(read: str, session_count: int, read_count: int) -> list[Contender]:
    options: dict[str, Any] = {
        "read": read,
        "session_count": session_count,
        "read_count": read_count,
    }
    return [
        HotRead(**options),
        zict.Lru(packed=True, **options),
        zict.Lru(packed=False, **options),
        DictRead(packed=False, **options),
    ]


def _get(sizes: Sizes) -> list[Contender]:
    return _reads("get", sizes.hot_sessions, sizes.hot_reads)


def _get_many(sizes: Sizes) -> list[Contender]:
    return _reads("get", sizes.hot_sessions_many, sizes.hot_reads)


def _field(sizes: Sizes) -> list[Contender]:
    count, reads = sizes.hot_sessions, sizes.hot_reads
    stores = (Lmdb(), RocksDb(), Sqlite(), DiskCache())
    return [
        *_reads("field", count, reads),
        zict.GetAlone(read="get", packed=True, session_count=count, read_count=reads),
        *(HotReads(store, count, read_count=reads // 10) for store in stores),
        HotReads(Redis(synced=False), count, read_count=reads // 100),
    ]


def _whole(sizes: Sizes) -> list[Contender]:
    return _reads("whole", sizes.hot_sessions, sizes.hot_reads)


def _memory(sizes: Sizes) -> list[Contender]:
    return [Resident(sizes.resident_sessions), live.LiveObjects(sizes.resident_sessions)]


_AS_ZICT = (at_least(0.8, zict.LRU_OF_BYTES),)
_FIELD = (at_least(0.27, zict.GET_ALONE),)  # 600,000 where zict does 2,200,000

WORKLOADS = (
    _defined("hot-get", (RATE,), _get, _AS_ZICT),
    _defined("hot-get-many", (RATE,), _get_many, _AS_ZICT),
    _defined("hot-field", (RATE,), _field, _FIELD),
    _defined("hot-whole", (RATE,), _whole),
    _defined(
        "memory",
        resident.METRICS,
        _memory,
        (Bar("rss", Kind.AT_MOST, 1000), Bar("gc", Kind.AT_MOST, 10)),
        repetitions=lambda sizes: sizes.fresh_repetitions,
        observed=False,  # the pauses are what is measured
    ),
)
