"""The workloads, one line each; below them, who takes part and which bar has to be reached.

=============== ===============================================================================
hot-get         `await get_session(id)`, all sessions in memory, shuffled
hot-field       the same, then one small field of what came back
hot-whole       the same, then all of its data as a dict
update          read a session, change one field, commit; random sessions, 1,000 tasks, synced
lone-update     the same by one task that waits for each commit
cold-restore    get a random session that is on disk (page cache warm), read one field
spill           push sessions out of memory that are not in the log yet
mixed           95 % reads, 5 % updates, Zipf-popular sessions, data 10 × the memory
memory          what a resident session costs: RSS growth, and a full garbage collection
open            open a directory of many cold sessions, after all that may have happened to it
through         `update` with every commit agreed with a Redis server first
visible         from an update's call to its sight by another worker, told by Redis, one at a time
checkpoint      a full checkpoint of all sessions to a Redis server
busy-checkpoint hot reads, and the event loop's lag, while full checkpoints go to a Redis server
loop-lag        the event loop's lag while everything runs at full speed, values up to 64 KiB
=============== ===============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import lag, resident
from benchmarks.access import Accesses
from benchmarks.bars import Bar, Kind
from benchmarks.contender import ENGINE, RATE, Contender, Metric
from benchmarks.engine import busy
from benchmarks.engine.cold import ColdRestore, Mixed
from benchmarks.engine.hot import HotRead
from benchmarks.engine.memory import Resident
from benchmarks.engine.opening import HINTS, INDEX_SNAPSHOT, Build, Opening
from benchmarks.engine.shared import (
    CHECKPOINTING,
    READS,
    THROUGH,
    UNDISTURBED,
    FullCheckpoint,
    ReadWhileCheckpointing,
    ThroughUpdate,
)
from benchmarks.engine.spill import Spill
from benchmarks.engine.update import ConcurrentUpdate, LoneUpdate
from benchmarks.engine.visible import SeenElsewhere
from benchmarks.peers import bare, idle, live, lmdb, redis, zict
from benchmarks.sizes import MIB, Sizes

Contenders = Callable[[Sizes], Sequence[Contender]]

_LATENCY = (Metric("median", " µs"), Metric("p99", " µs"))
_SESSION_RSS_BYTES = 1000  # roughly what one session takes of a memory budget


@dataclass(frozen=True)
class Workload:
    """A named workload.

    Attributes:
        contenders: who takes part, in the order of the rows; called with the sizes of the run.
        bars: what has to be reached.
        build: fills the directory that all contenders share; None gives each its own.
        repetitions: how often each contender measures, the unrecorded first time not counted.
    """

    name: str
    metrics: tuple[Metric, ...]
    contenders: Contenders
    bars: tuple[Bar, ...] = ()
    build: Callable[[Sizes], Contender] | None = None
    repetitions: Callable[[Sizes], int] = lambda sizes: sizes.repetitions

    @property
    def definition(self) -> str:
        """The workload's line in the table above."""
        assert __doc__ is not None
        lines = (line.split(maxsplit=1) for line in __doc__.splitlines())
        return next(words[1] for words in lines if words[:1] == [self.name])


def _hot(read: str) -> Contenders:
    def contenders(sizes: Sizes) -> list[Contender]:
        count, reads = sizes.hot_sessions, sizes.hot_reads
        return [
            HotRead(read, count, reads),
            zict.Lru(read, packed=True, session_count=count, read_count=reads),
            zict.Lru(read, packed=False, session_count=count, read_count=reads),
        ]

    return contenders


def _update(sizes: Sizes) -> list[Contender]:
    return [
        ConcurrentUpdate(sizes.update_sessions, sizes.updates),
        lmdb.Update(sizes.update_sessions, sizes.updates),
        lmdb.Update(sizes.update_sessions, sizes.updates, put_only=True),
        bare.BatchAppend(sizes.updates),
    ]


def _lone_update(sizes: Sizes) -> list[Contender]:
    return [LoneUpdate(sizes.lone_updates), bare.LoneAppend(sizes.lone_updates)]


def _cold(sizes: Sizes) -> list[Contender]:
    accesses = Accesses(sizes.cold_sessions, sizes.cold_reads)
    resident_count = sizes.cold_memory_bytes // _SESSION_RSS_BYTES
    # Files are an order of magnitude slower; a smaller sample keeps the run short.
    fewer = Accesses(max(2 * resident_count, sizes.cold_sessions // 10), sizes.cold_reads // 10)
    return [
        ColdRestore(accesses, sizes.cold_memory_bytes),
        lmdb.CompressedRead(accesses),
        lmdb.CompressedRead(accesses, one_snapshot=True),
        zict.BufferOverFile(fewer, resident_count),
        zict.BufferOverFile(fewer, sizes.cold_sessions, with_room=True),
        bare.Pread(accesses),
    ]


def _spill(sizes: Sizes) -> list[Contender]:
    return [
        Spill(sizes.spilled_sessions),
        Spill(sizes.spilled_sessions, logged=True),
        lmdb.Update(sizes.spilled_sessions, sizes.spilled_sessions, put_only=True),
        zict.BufferSpill(sizes.spilled_sessions // 10),
        bare.BatchAppend(sizes.spilled_sessions),
    ]


def _mixed(sizes: Sizes) -> list[Contender]:
    accesses = Accesses(sizes.mixed_sessions, sizes.mixed_accesses, update_share=0.05, zipf=0.99)
    resident_count = sizes.mixed_sessions // 10
    memory_bytes = resident_count * _SESSION_RSS_BYTES
    return [
        Mixed(accesses, memory_bytes, "always"),
        Mixed(accesses, memory_bytes, "never"),
        zict.BufferOverFile(accesses, resident_count),
    ]


def _memory(sizes: Sizes) -> list[Contender]:
    return [Resident(sizes.resident_sessions), live.LiveObjects(sizes.resident_sessions)]


_CLEAN = "after a clean close"
_HINTS_ONLY = "index snapshot removed"
_FULL_SCAN = "hints removed too: full scan"
_KILLED = "after kill -9"


def _open(sizes: Sizes) -> list[Contender]:
    count = sizes.opened_sessions
    return [
        Opening(_CLEAN, count),
        Opening(_HINTS_ONLY, count, removed=(INDEX_SNAPSHOT,)),
        Opening(_FULL_SCAN, count, removed=(INDEX_SNAPSHOT, HINTS)),
        Opening(_KILLED, count, killed=True),
    ]


def _through(sizes: Sizes) -> list[Contender]:
    return [
        ThroughUpdate(sizes.update_sessions, sizes.updates),
        ConcurrentUpdate(sizes.update_sessions, sizes.updates),
        redis.PipelinedSet(sizes.updates),
    ]


def _visible(sizes: Sizes) -> list[Contender]:
    return [SeenElsewhere(sizes.seen_updates)]


def _checkpoint(sizes: Sizes) -> list[Contender]:
    return [
        FullCheckpoint(sizes.checkpointed_sessions),
        redis.PipelinedSet(sizes.checkpointed_sessions),
    ]


def _checkpoint_busy(sizes: Sizes) -> list[Contender]:
    count, samples = sizes.checkpointed_sessions, sizes.lag_samples
    return [
        ReadWhileCheckpointing(count, samples),
        ReadWhileCheckpointing(count, samples, makes_checkpoints=False),
    ]


def _loop_lag(sizes: Sizes) -> list[Contender]:
    return [
        busy.BusyLoop(sizes.lag_samples, sizes.lag_sessions, memory_bytes=2 * MIB),
        idle.IdleLoop(sizes.lag_samples),
    ]


def _at_least(times: float, against: str, ours: str = ENGINE) -> Bar:
    return Bar(RATE.name, Kind.RATIO_AT_LEAST, times, against, ours=ours)


WORKLOADS = (
    Workload("hot-get", (RATE,), _hot("get"), (_at_least(0.7, zict.LRU_OF_BYTES),)),
    Workload("hot-field", (RATE,), _hot("field")),
    Workload("hot-whole", (RATE,), _hot("whole")),
    Workload("update", (RATE,), _update, (_at_least(1.5, lmdb.READ_MODIFY_WRITE),)),
    Workload(
        "lone-update",
        _LATENCY,
        _lone_update,
        (Bar("median", Kind.EXCESS_AT_MOST, 200, bare.LONE_APPEND),),
        repetitions=lambda sizes: 3 * sizes.repetitions,  # short ones: syncs vary with the hour
    ),
    Workload(
        "cold-restore",
        (RATE,),
        _cold,
        (_at_least(0.6, lmdb.COMPRESSED_READ), _at_least(6, zict.BUFFER_OVER_FILE)),
    ),
    Workload("spill", (RATE,), _spill, (Bar(RATE.name, Kind.AT_LEAST, 150_000),)),
    Workload("mixed", (RATE,), _mixed),
    Workload(
        "memory",
        resident.METRICS,
        _memory,
        (Bar("rss", Kind.AT_MOST, 1000), Bar("gc", Kind.AT_MOST, 10)),
        repetitions=lambda sizes: sizes.fresh_repetitions,
    ),
    Workload(
        "open",
        (Metric("seconds", " s"), Metric("rss", " B/session")),
        _open,
        tuple(
            Bar("seconds", Kind.AT_MOST, 3, ours=name) for name in (_CLEAN, _HINTS_ONLY, _KILLED)
        ),
        build=lambda sizes: Build(sizes.opened_sessions),
        repetitions=lambda sizes: sizes.fresh_repetitions,
    ),
    Workload("through", (RATE,), _through, (_at_least(0.5, redis.PIPELINED_SET, THROUGH),)),
    Workload("visible", _LATENCY, _visible),
    Workload("checkpoint", (RATE,), _checkpoint, (_at_least(10, redis.PIPELINED_SET),)),
    Workload(
        "busy-checkpoint",
        (*lag.METRICS, READS),
        _checkpoint_busy,
        (
            Bar("p99.9", Kind.AT_MOST, 10, ours=CHECKPOINTING),
            Bar(READS.name, Kind.RATIO_AT_LEAST, 0.7, UNDISTURBED, ours=CHECKPOINTING),
        ),
        repetitions=lambda sizes: sizes.lag_repetitions,
    ),
    Workload(
        "loop-lag",
        busy.METRICS,
        _loop_lag,
        (Bar("p99.9", Kind.AT_MOST, 10),),
        repetitions=lambda sizes: sizes.lag_repetitions,
    ),
)


def chosen(names: Sequence[str]) -> list[Workload]:
    """Return the workloads whose name starts with one of `names`; all of them for none.

    Raises:
        ValueError: a name that no workload has.
    """
    for name in names:
        if not any(workload.name.startswith(name) for workload in WORKLOADS):
            known = ", ".join(workload.name for workload in WORKLOADS)
            raise ValueError(f"there is no workload {name!r}; there are {known}")
    if not names:
        return list(WORKLOADS)
    return [each for each in WORKLOADS if each.name.startswith(tuple(names))]
