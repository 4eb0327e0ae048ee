"""How much work each workload does: one row per size of run."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """The numbers behind `--quick`, the default run and `--full`; counts, unless named bytes."""

    name: str
    repetitions: int = 7
    fresh_repetitions: int = 5
    hot_sessions: int = 10_000
    hot_reads: int = 500_000
    update_sessions: int = 20_000
    updates: int = 40_000
    cold_sessions: int = 100_000
    cold_reads: int = 50_000
    cold_memory_bytes: int = MIB
    spilled_sessions: int = 50_000
    lone_updates: int = 300
    resident_sessions: int = 300_000
    opened_sessions: int = 1_000_000
    lag_samples: int = 10_000
    lag_sessions: int = 10_000
    lag_repetitions: int = 3
    mixed_sessions: int = 50_000
    mixed_accesses: int = 50_000
    checkpointed_sessions: int = 100_000
    seen_updates: int = 1_000


STANDARD = Sizes("standard")

QUICK = Sizes(
    "quick",
    repetitions=5,
    fresh_repetitions=3,
    hot_reads=100_000,
    updates=20_000,
    cold_sessions=20_000,
    cold_reads=5_000,
    spilled_sessions=10_000,
    lone_updates=100,
    resident_sessions=30_000,
    opened_sessions=30_000,
    lag_samples=2_000,
    lag_sessions=2_000,
    lag_repetitions=1,
    mixed_sessions=5_000,
    mixed_accesses=3_000,
    checkpointed_sessions=20_000,
    seen_updates=300,
)

FULL = Sizes(
    "full",
    repetitions=9,
    hot_reads=1_000_000,
    updates=100_000,
    cold_reads=100_000,
    spilled_sessions=100_000,
    lone_updates=1_000,
    lag_samples=20_000,
    mixed_accesses=100_000,
)

TINY = Sizes(
    "tiny",
    repetitions=1,
    fresh_repetitions=1,
    hot_sessions=200,
    hot_reads=400,
    update_sessions=100,
    updates=300,
    cold_sessions=3_000,
    cold_reads=300,
    spilled_sessions=200,
    lone_updates=5,
    resident_sessions=500,
    opened_sessions=2_000,
    lag_samples=50,
    lag_sessions=200,
    lag_repetitions=1,
    mixed_sessions=2_000,
    mixed_accesses=300,
    checkpointed_sessions=300,
    seen_updates=10,
)
"""For the test suite: every path runs, no number means anything."""
