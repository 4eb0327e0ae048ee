"""Numbers about a running engine."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from statistics import quantiles
from typing import Any

from persistence.checkpoint.keeper import CheckpointStats
from persistence.disk.tier import DiskStats


@dataclass(frozen=True, slots=True)
class Latencies:
    """Percentiles over the last 1,024 samples, seconds; zeros when there are none."""

    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0

    @staticmethod
    def of(samples: Collection[float]) -> Latencies:
        """Return the percentiles of `samples`."""
        if len(samples) < 2:
            value = next(iter(samples), 0.0)
            return Latencies(value, value, value)
        cuts = quantiles(samples, n=100, method="inclusive")
        return Latencies(cuts[49], cuts[94], cuts[98])


@dataclass(frozen=True, slots=True)
class SharingStats:
    """About the shared tier.

    Attributes:
        is_up: whether it answers and announcements arrive.
        undelivered: sessions of which it has not seen the newest version.
        delivered: branches that were brought to it after they had been acknowledged here.
        refreshed: sessions that were taken over from it.
        conflicts: branches that it refused, kept as conflict records in this directory.
    """

    is_up: bool
    undelivered: int
    delivered: int
    refreshed: int
    conflicts: int


@dataclass(frozen=True, slots=True)
class Stats:
    """What `StateManager.stats` returns. Sizes in bytes, counts since opening.

    Attributes:
        sessions: all live sessions of this worker (expired ones count until they are cleaned up).
        in_memory: resident ones.
        on_disk: those that are on disk only.
        memory_used_bytes: accounted, exactly.
        memory_peak_bytes: the most that was ever used.
        memory_budget_bytes: ``memory.max_bytes``.
        memory_policy: the eviction policy in use (``memory.policy``, or what "adaptive" chose).
        memory_effective_budget_bytes: less than that under memory pressure.
        rss_bytes: resident set of the process when it was last read; 0: not yet.
        hits: reads served from memory.
        misses: reads of ids that do not exist.
        restored: sessions brought back from disk.
        spilled: sessions that left memory for the disk.
        spill_failures: sessions that stayed in memory because the disk took nothing.
        expired: sessions that were removed because their time was over.
        touches: renewals that were recorded.
        commits: acknowledged frames.
        batches: writes that they were grouped into.
        pending_bytes: in the commit queue.
        commit_seconds: how long a batch takes from encoding to durable.
        disk: the log.
        checkpoints: restore points.
        sharing: the shared tier; None: there is none for sessions.
    """

    sessions: int
    in_memory: int
    on_disk: int
    memory_used_bytes: int
    memory_peak_bytes: int
    memory_budget_bytes: int
    memory_policy: str
    memory_effective_budget_bytes: int
    rss_bytes: int
    hits: int
    misses: int
    restored: int
    spilled: int
    spill_failures: int
    expired: int
    touches: int
    commits: int
    batches: int
    pending_bytes: int
    commit_seconds: Latencies
    disk: DiskStats
    checkpoints: CheckpointStats
    sharing: SharingStats | None

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers as nested plain dicts, for JSON."""
        return asdict(self)
