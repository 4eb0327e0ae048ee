"""Sessions in Redis: shared by workers, and checkpoints shipped there.

================== ============================================================================
through            `update` with every commit agreed with a Redis server first
shared-update      4 processes update the same sessions at once, synced; none may be lost
visible            from an update's call to its sight by another worker, told by Redis
checkpoint         a full checkpoint of all sessions to a Redis server
checkpoint-delta   a checkpoint after one session in a hundred has changed
checkpoint-restore a running worker takes over all sessions of a checkpoint
busy-checkpoint    hot reads, and the event loop's lag, while full checkpoints go to a server
================== ============================================================================
"""

from __future__ import annotations

from functools import partial

from benchmarks import lag
from benchmarks.bars import Bar, Kind
from benchmarks.contender import RATE, Contender
from benchmarks.engine.fleet import Workers
from benchmarks.engine.shared import (
    CHECKPOINTING,
    READS,
    THROUGH,
    UNDISTURBED,
    DeltaCheckpoint,
    FullCheckpoint,
    ReadWhileCheckpointing,
    RestoreCheckpoint,
    ThroughUpdate,
)
from benchmarks.engine.update import ConcurrentUpdate
from benchmarks.engine.visible import SeenElsewhere
from benchmarks.peers import redis
from benchmarks.peers.bare import LATENCY
from benchmarks.peers.diskcache import DiskCache
from benchmarks.peers.fleet import RedisFleet, StoreFleet
from benchmarks.peers.lmdb import Lmdb
from benchmarks.peers.sqlite import Sqlite
from benchmarks.sizes import Sizes
from benchmarks.workload import Workload, at_least

_defined = partial(Workload, definitions=__doc__)


def _through(sizes: Sizes) -> list[Contender]:
    return [
        ThroughUpdate(sizes.update_sessions, sizes.updates),
        ConcurrentUpdate(sizes.update_sessions, sizes.updates),
        redis.PipelinedSet(sizes.updates),
    ]


def _shared_update(sizes: Sizes) -> list[Contender]:
    shape = (sizes.fleet_sessions, sizes.fleet_updates, sizes.fleet_processes)
    return [
        Workers(*shape),
        RedisFleet(*shape),
        StoreFleet(Lmdb(), *shape),
        StoreFleet(Sqlite(), *shape),
        StoreFleet(DiskCache(), *shape),
    ]


def _visible(sizes: Sizes) -> list[Contender]:
    return [SeenElsewhere(sizes.seen_updates)]


def _checkpoint(sizes: Sizes) -> list[Contender]:
    count = sizes.checkpointed_sessions
    return [FullCheckpoint(count), redis.PipelinedSet(count)]


def _delta(sizes: Sizes) -> list[Contender]:
    count = sizes.checkpointed_sessions
    return [DeltaCheckpoint(count), redis.PipelinedSet(count // 100)]


def _restore(sizes: Sizes) -> list[Contender]:
    count = sizes.checkpointed_sessions
    return [RestoreCheckpoint(count), redis.PipelinedGet(count)]


def _busy(sizes: Sizes) -> list[Contender]:
    count, samples = sizes.checkpointed_sessions, sizes.lag_samples
    return [
        ReadWhileCheckpointing(count, samples),
        ReadWhileCheckpointing(count, samples, makes_checkpoints=False),
    ]


WORKLOADS = (
    _defined("through", (RATE,), _through, (at_least(0.5, redis.PIPELINED_SET, THROUGH),)),
    _defined("shared-update", (RATE,), _shared_update),
    _defined("visible", LATENCY, _visible),
    _defined("checkpoint", (RATE,), _checkpoint, (at_least(10, redis.PIPELINED_SET),)),
    _defined("checkpoint-delta", (RATE,), _delta),
    _defined("checkpoint-restore", (RATE,), _restore),
    _defined(
        "busy-checkpoint",
        (*lag.METRICS, READS),
        _busy,
        (
            Bar("p99.9", Kind.AT_MOST, 5, ours=CHECKPOINTING),
            Bar(READS.name, Kind.RATIO_AT_LEAST, 0.7, UNDISTURBED, ours=CHECKPOINTING),
        ),
        repetitions=lambda sizes: sizes.lag_repetitions,
        observed=False,
    ),
)
