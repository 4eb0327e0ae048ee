"""More sessions than memory holds.

==================== ==========================================================================
cold-restore         get a random session that is on disk (page cache warm), read one field
cold-restore-dropped the same, the page cache dropped before: each read goes to the disk
spill                push sessions out of memory that are not in the log yet
mixed                95 % reads, 5 % updates, Zipf-popular sessions, data 10 × the memory
mixed-half           the same with 50 % updates; bytes written and occupied per byte of data
==================== ==========================================================================

In the mixed workloads 100 accesses are under way at once. A peer gets them as a batch, whose
updates share a transaction. "written": bytes that were handed to write calls per byte of updates.
"occupied": bytes on disk per byte of live sessions.
"""

from __future__ import annotations

from functools import partial

from benchmarks import amplification
from benchmarks.access import Accesses
from benchmarks.bars import Bar, Kind
from benchmarks.contender import RATE, Contender
from benchmarks.engine.cold import RESTORE_ALONE, ColdRestore, Mixed
from benchmarks.engine.spill import Spill
from benchmarks.peers import bare, driven, lmdb, zict
from benchmarks.peers.diskcache import DiskCache
from benchmarks.peers.driven import ColdReads
from benchmarks.peers.files import FilePerSession
from benchmarks.peers.lmdb import Lmdb
from benchmarks.peers.redis import Redis
from benchmarks.peers.rocksdb import RocksDb
from benchmarks.peers.sqlite import Sqlite
from benchmarks.peers.store import Store
from benchmarks.sizes import Sizes
from benchmarks.workload import SESSION_RSS_BYTES, Workload, at_least

_defined = partial(Workload, definitions=__doc__)

_SYNCED = "persistence, fsync=always"
_RELAXED = "persistence, fsync=never"


def _cold(sizes: Sizes) -> list[Contender]:
    accesses = Accesses(sizes.cold_sessions, sizes.cold_reads)
    resident_count = sizes.cold_memory_bytes // SESSION_RSS_BYTES
    # Files are an order of magnitude slower; a smaller sample keeps the run short.
    fewer = Accesses(max(2 * resident_count, sizes.cold_sessions // 10), sizes.cold_reads // 10)
    count, reads = sizes.cold_sessions, sizes.cold_reads
    return [
        ColdRestore(accesses, sizes.cold_memory_bytes),
        ColdRestore(accesses, sizes.cold_memory_bytes, alone=True),
        lmdb.CompressedRead(accesses),
        lmdb.CompressedRead(accesses, one_snapshot=True),
        ColdReads(RocksDb(), count, read_count=reads),
        ColdReads(Sqlite(), count, read_count=reads),
        ColdReads(DiskCache(), fewer.session_count, read_count=fewer.count),
        ColdReads(FilePerSession(), fewer.session_count, read_count=fewer.count),
        zict.BufferOverFile(fewer, resident_count),
        zict.BufferOverFile(fewer, sizes.cold_sessions, with_room=True),
        bare.Pread(accesses),
    ]


def _dropped(sizes: Sizes) -> list[Contender]:
    accesses = Accesses(sizes.cold_sessions, sizes.dropped_reads)
    resident_count = sizes.cold_memory_bytes // SESSION_RSS_BYTES
    fewer = Accesses(2 * resident_count, sizes.dropped_reads)
    return [
        ColdRestore(accesses, sizes.cold_memory_bytes, dropped=True),
        lmdb.CompressedRead(accesses, dropped=True),
        ColdReads(RocksDb(), sizes.cold_sessions, read_count=accesses.count, dropped=True),
        ColdReads(Sqlite(), sizes.cold_sessions, read_count=accesses.count, dropped=True),
        zict.BufferOverFile(fewer, resident_count, dropped=True),
        bare.Pread(accesses, dropped=True),
    ]


def _spill(sizes: Sizes) -> list[Contender]:
    return [
        Spill(sizes.spilled_sessions),
        Spill(sizes.spilled_sessions, logged=True),
        lmdb.Update(sizes.spilled_sessions, sizes.spilled_sessions, put_only=True),
        zict.BufferSpill(sizes.spilled_sessions // 10),
        bare.BatchAppend(sizes.spilled_sessions),
    ]


def _mixed(update_share: float, sizes: Sizes) -> list[Contender]:
    count = sizes.mixed_sessions
    accesses = Accesses(count, sizes.mixed_accesses, update_share=update_share, zipf=0.99)
    fewer = Accesses(count, sizes.mixed_accesses // 10, update_share=update_share, zipf=0.99)
    fewest = Accesses(count // 10, fewer.count, update_share=update_share, zipf=0.99)
    resident_count = count // 10
    memory_bytes = resident_count * SESSION_RSS_BYTES
    segment_bytes = sizes.mixed_segment_bytes
    fast: list[Store] = [Lmdb(), RocksDb(), Sqlite(), DiskCache()]
    return [
        Mixed(accesses, memory_bytes, "always", segment_bytes),
        Mixed(accesses, memory_bytes, "never", segment_bytes),
        *(driven.Mixed(store, count, accesses=accesses) for store in fast),
        driven.Mixed(Redis(), count, accesses=fewer),
        driven.Mixed(FilePerSession(), fewest.session_count, accesses=fewest),
        zict.BufferOverFile(accesses, resident_count),
    ]


_AHEAD = (
    *(at_least(1, peer, _SYNCED) for peer in ("LMDB", "RocksDB", "SQLite (WAL)", "diskcache")),
    at_least(1, "Redis, AOF always", _SYNCED),
    at_least(1, "file per session", _SYNCED),
    at_least(1, zict.BUFFER_OVER_FILE, _SYNCED),
)

WORKLOADS = (
    _defined(
        "cold-restore",
        (RATE,),
        _cold,
        (
            at_least(0.8, lmdb.COMPRESSED_READ),
            at_least(1, lmdb.COMPRESSED_READ, RESTORE_ALONE),
            at_least(10, zict.BUFFER_OVER_FILE),
        ),
    ),
    _defined("cold-restore-dropped", (RATE,), _dropped),
    _defined("spill", (RATE,), _spill, (Bar(RATE.name, Kind.AT_LEAST, 200_000),)),
    _defined("mixed", (RATE, *amplification.METRICS), partial(_mixed, 0.05), _AHEAD),
    _defined(
        "mixed-half",
        (RATE, *amplification.METRICS),
        partial(_mixed, 0.5),
        (
            Bar(amplification.WRITTEN.name, Kind.AT_MOST, 2.5, ours=_SYNCED),
            Bar(amplification.OCCUPIED.name, Kind.AT_MOST, 2, ours=_SYNCED),
        ),
    ),
)
