"""Changing sessions.

=============== ===============================================================================
update          read a session, change one field, commit; random sessions, 1,000 tasks, synced
update-100      the same by 100 tasks; a peer's request has a transaction of its own
lone-update     the same by one task that waits for each commit
large-update    change one small field of a session of 40 KB, commit; 100 tasks, synced
relaxed-update  the same as update; nothing is synced before it is acknowledged
creation        create sessions of 20 KB, 200 a second, beside 100 requests in flight
=============== ===============================================================================

In `update` and `relaxed-update` the peers get their updates in batches of 256 per transaction,
which is the fastest way, and one that a server of requests has only if it gathers them itself:
`update` shows LMDB under a server that does, as 1,000 tasks that each wait for their own update.
"""

from __future__ import annotations

from functools import partial

from benchmarks.bars import Bar, Kind
from benchmarks.contender import GATHERED, RATE, THREAD, Contender
from benchmarks.engine.creation import SteadyCreation
from benchmarks.engine.opened import DEFAULT_MEMORY_BYTES
from benchmarks.engine.update import ConcurrentUpdate, LargeUpdate, LoneUpdate
from benchmarks.peers import bare, lmdb, zict
from benchmarks.peers.bare import LATENCY
from benchmarks.peers.cashews import Cashews
from benchmarks.peers.diskcache import DiskCache
from benchmarks.peers.driven import LoneUpdates, Updates
from benchmarks.peers.files import FilePerSession
from benchmarks.peers.least import LeastUpdate
from benchmarks.peers.lmdb import Lmdb
from benchmarks.peers.redis import Redis
from benchmarks.peers.rocksdb import RocksDb
from benchmarks.peers.sqlite import Sqlite
from benchmarks.peers.store import Store
from benchmarks.sizes import Sizes
from benchmarks.tasks import TASK_COUNT
from benchmarks.workload import SESSION_RSS_BYTES, Workload, at_least

_defined = partial(Workload, definitions=__doc__)


def _updates(sizes: Sizes, stores: list[Store], share: int = 1, tasks: int = 0) -> list[Contender]:
    count = sizes.update_sessions
    return [
        Updates(store, count, update_count=sizes.updates // share, task_count=tasks)
        for store in stores
    ]


def _update(sizes: Sizes) -> list[Contender]:
    return [
        ConcurrentUpdate(sizes.update_sessions, sizes.updates),
        lmdb.Update(sizes.update_sessions, sizes.updates),
        lmdb.Update(sizes.update_sessions, sizes.updates, put_only=True),
        *_updates(sizes, [Lmdb(called=GATHERED)], tasks=TASK_COUNT),
        *_updates(sizes, [RocksDb(), Sqlite(), DiskCache()]),
        *_updates(sizes, [Redis(), Cashews()], 10),
        *_updates(sizes, [FilePerSession()], 20),
        LeastUpdate(sizes.update_sessions, sizes.updates),
        bare.BatchAppend(sizes.updates),
    ]


def _update_100(sizes: Sizes) -> list[Contender]:
    count, updates = sizes.update_sessions, sizes.slow_updates
    threads: list[Store] = [
        store(called=THREAD) for store in (Lmdb, RocksDb, Sqlite, DiskCache, FilePerSession)
    ]
    return [
        ConcurrentUpdate(count, sizes.updates, task_count=100),
        *(Updates(store, count, update_count=updates, task_count=100) for store in threads),
        Updates(Redis(), count, update_count=updates, task_count=100),
    ]


def _lone_update(sizes: Sizes) -> list[Contender]:
    count = sizes.lone_updates
    stores: list[Store] = [Lmdb(), RocksDb(), Sqlite(), DiskCache(), FilePerSession(), Redis()]
    return [
        LoneUpdate(count),
        bare.LoneAppend(count),
        *(LoneUpdates(store, 1000, update_count=count) for store in stores),
    ]


def _large_update(sizes: Sizes) -> list[Contender]:
    count = min(256, sizes.update_sessions)
    return [
        LargeUpdate(count, sizes.slow_updates),
        LargeUpdate(count, sizes.slow_updates, is_whole=True),
    ]


def _relaxed(sizes: Sizes) -> list[Contender]:
    return [
        ConcurrentUpdate(sizes.update_sessions, sizes.updates, fsync="never"),
        *_updates(sizes, [Lmdb(synced=False), RocksDb(synced=False), Sqlite(synced=False)]),
        *_updates(sizes, [DiskCache(synced=False)]),
        *_updates(sizes, [zict.Buffer(DEFAULT_MEMORY_BYTES // SESSION_RSS_BYTES)]),
        *_updates(sizes, [Redis(synced=False), Cashews(synced=False)], 10),
    ]


def _creation(sizes: Sizes) -> list[Contender]:
    count, creations = sizes.creation_sessions, sizes.creations
    return [
        SteadyCreation(count, creations),
        SteadyCreation(count, creations, fsync="always"),
        bare.SteadyAppend(creations),
    ]


WORKLOADS = (
    _defined(
        "update",
        (RATE,),
        _update,
        (at_least(2, lmdb.READ_MODIFY_WRITE), at_least(1.3, lmdb.PUT_ONLY)),
    ),
    _defined("update-100", (RATE,), _update_100),
    _defined(
        "lone-update",
        LATENCY,
        _lone_update,
        (Bar("median", Kind.EXCESS_AT_MOST, 150, bare.LONE_APPEND),),
        repetitions=lambda sizes: 2 * sizes.repetitions,  # short ones: syncs vary with the hour
    ),
    _defined("large-update", (RATE,), _large_update),
    _defined("relaxed-update", (RATE,), _relaxed),
    _defined("creation", LATENCY, _creation),
)
