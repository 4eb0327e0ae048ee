"""Numbers about a running engine."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import datetime
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
class RequestStats:
    """The requests of this worker, since opening.

    Attributes:
        requests: how many have ended.
        running: how many are under way.
        errors: how many failed.
        refused: how many a limit has refused.
        total_seconds: what they took.
        seconds: percentiles of that, of all of them, from a t-digest.
        unstored_sessions: sessions of which something is kept in memory that is to be stored.
    """

    requests: int = 0
    running: int = 0
    errors: int = 0
    refused: int = 0
    total_seconds: float = 0.0
    seconds: Latencies = Latencies()
    unstored_sessions: int = 0


@dataclass(frozen=True, slots=True)
class Distribution:
    """Average, percentiles and extremes of some samples; zeros when there are none."""

    average: float = 0.0
    smallest: float = 0.0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    largest: float = 0.0

    @staticmethod
    def of(samples: Collection[float]) -> Distribution:
        """Return that of `samples`."""
        if not samples:
            return Distribution()
        cuts = Latencies.of(samples)
        average = sum(samples) / len(samples)
        return Distribution(average, min(samples), cuts.p50, cuts.p95, cuts.p99, max(samples))


@dataclass(frozen=True, slots=True)
class PopulationStats:
    """The live sessions of this worker, from a sample: see `census`.

    Attributes:
        sampled: how many sessions the distributions are made of.
        is_complete: whether these are all there are: then everything here is exact.
        oldest_created_at: when the oldest session was created that was met, aware UTC; None: none.
        newest_created_at: the same of the newest.
        age_seconds: since they were created.
        idle_seconds: since they were last accessed.
        bytes: what a session takes, packed.
    """

    sampled: int
    is_complete: bool
    oldest_created_at: datetime | None
    newest_created_at: datetime | None
    age_seconds: Distribution
    idle_seconds: Distribution
    bytes: Distribution


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
        hit_rate: their share of the reads of sessions that exist, 0 to 1; 0: there were none.
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
        requests: requests of sessions.
        population: how old, idle and large sessions are.
        resources: live resources of sessions.
        scratch_directories: scratch directories of sessions.
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
    hit_rate: float
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
    requests: RequestStats
    population: PopulationStats
    resources: int
    scratch_directories: int

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers as nested plain dicts, for JSON; times as ISO 8601 text."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return value.isoformat() if isinstance(value, datetime) else value
