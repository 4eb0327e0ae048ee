"""How much work each workload does: one row per size of run."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20
FEWEST_REPETITIONS = 3
"""The fewest of which a median leaves out what is far off."""


@dataclass(frozen=True)
class Sizes:
    """The numbers behind `--quick`, the default run and `--full`; counts, unless named otherwise.

    Attributes:
        repeated_seconds: no further repetition of a workload begins once all that was measured of
            it took so long, but for the first `FEWEST_REPETITIONS`: a slow machine, or a peer that
            is, gets fewer of them.
        fleet_processes: 0: one member, in the contender's own process.
        our_lag_samples: of the event loop of each row of the engine, unless `our_lag_seconds` are
            over before; the rows of the peers take `their_lag_samples`, `their_lag_seconds`.
        grown: the numbers of sessions of a growth curve, each ten times the one before, or
            between two such.
    """

    name: str
    repeated_seconds: float = 60.0
    repetitions: int = 5
    fresh_repetitions: int = 3
    hot_sessions: int = 10_000
    hot_sessions_many: int = 300_000
    hot_reads: int = 300_000
    update_sessions: int = 20_000
    updates: int = 20_000
    slow_updates: int = 1_000
    cold_sessions: int = 100_000
    cold_reads: int = 20_000
    dropped_reads: int = 2_000
    cold_memory_bytes: int = MIB
    spilled_sessions: int = 50_000
    lone_updates: int = 200
    creations: int = 600
    creation_sessions: int = 10_000
    resident_sessions: int = 300_000
    opened_sessions: int = 1_000_000
    lag_samples: int = 10_000
    lag_sessions: int = 10_000
    lag_repetitions: int = 1
    mixed_sessions: int = 50_000
    mixed_accesses: int = 20_000
    mixed_segment_bytes: int = 8 * MIB
    churned_sessions: int = 5_000
    expired_sessions: int = 200_000
    expiry_repetitions: int = 2
    scanned_sessions: int = 100_000
    checkpointed_sessions: int = 100_000
    seen_updates: int = 500
    fleet_processes: int = 4
    fleet_sessions: int = 1_000
    fleet_updates: int = 4_000
    traced_requests: int = 5_000
    traced_memory_bytes: int = MIB
    traced_repetitions: int = 5
    hit_accesses: int = 95_607
    grown: tuple[int, ...] = (10_000, 100_000)
    grown_index: tuple[int, ...] = ()
    growth_operations: int = 20_000
    growth_repetitions: int = 2
    our_lag_samples: int = 2_000
    our_lag_seconds: float = 5.0
    their_lag_samples: int = 500
    their_lag_seconds: float = 1.0


STANDARD = Sizes("standard")

QUICK = Sizes(
    "quick",
    repetitions=2,
    fresh_repetitions=1,
    hot_sessions_many=20_000,
    hot_reads=10_000,
    update_sessions=2_000,
    updates=2_000,
    slow_updates=50,
    cold_sessions=5_000,
    cold_reads=1_000,
    dropped_reads=100,
    cold_memory_bytes=200_000,
    spilled_sessions=3_000,
    lone_updates=15,
    creations=60,
    creation_sessions=500,
    resident_sessions=10_000,
    opened_sessions=10_000,
    lag_samples=500,
    lag_sessions=2_000,
    mixed_sessions=2_000,
    mixed_accesses=500,
    mixed_segment_bytes=MIB,
    churned_sessions=250,
    expired_sessions=3_000,
    expiry_repetitions=1,
    scanned_sessions=3_000,
    checkpointed_sessions=3_000,
    seen_updates=50,
    fleet_processes=2,
    fleet_sessions=100,
    fleet_updates=200,
    traced_requests=150,
    traced_memory_bytes=60_000,
    traced_repetitions=2,
    hit_accesses=2_000,
    grown=(500, 5_000),
    growth_operations=500,
    growth_repetitions=1,
    our_lag_samples=100,
    our_lag_seconds=0.2,
    their_lag_samples=30,
    their_lag_seconds=0.05,
)

FULL = Sizes(
    "full",
    repeated_seconds=6.0,
    repetitions=FEWEST_REPETITIONS,
    fresh_repetitions=1,
    lone_updates=500,
    cold_sessions=60_000,
    spilled_sessions=30_000,
    mixed_sessions=30_000,
    hit_accesses=40_000,
    expired_sessions=1_000_000,
    expiry_repetitions=1,
    seen_updates=1_000,
    traced_repetitions=3,
    grown=(10_000, 100_000, 1_000_000),
    grown_index=(3_000_000,),
    growth_repetitions=1,
    our_lag_samples=5_000,
    our_lag_seconds=4.0,
    their_lag_seconds=0.3,
)

TINY = Sizes(
    "tiny",
    repetitions=1,
    fresh_repetitions=1,
    hot_sessions=100,
    hot_sessions_many=200,
    hot_reads=200,
    update_sessions=50,
    updates=100,
    slow_updates=5,
    cold_sessions=300,
    cold_reads=50,
    dropped_reads=10,
    cold_memory_bytes=100_000,
    spilled_sessions=100,
    lone_updates=3,
    creations=5,
    creation_sessions=20,
    resident_sessions=100,
    opened_sessions=200,
    lag_samples=20,
    lag_sessions=100,
    mixed_sessions=100,
    mixed_accesses=100,
    mixed_segment_bytes=MIB,
    churned_sessions=50,
    expired_sessions=100,
    expiry_repetitions=1,
    scanned_sessions=100,
    checkpointed_sessions=200,
    seen_updates=5,
    fleet_processes=0,
    fleet_sessions=10,
    fleet_updates=20,
    traced_requests=30,
    traced_memory_bytes=10_000,
    traced_repetitions=1,
    hit_accesses=100,
    grown=(20, 200),
    grown_index=(20, 200),
    growth_operations=50,
    growth_repetitions=1,
    our_lag_samples=3,
    our_lag_seconds=0.1,
    their_lag_samples=2,
    their_lag_seconds=0.02,
)
"""For the test suite: every path runs, no number means anything."""
