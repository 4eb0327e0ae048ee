"""Gathers the numbers of all rooms into `Stats`."""

from __future__ import annotations

from persistence.stats import Latencies, PopulationStats, RequestStats, Stats
from persistence.tiers import Tiers


def summary(
    tiers: Tiers,
    *,
    budget_bytes: int,
    rss_bytes: int,
    misses: int,
    requests: RequestStats,
    population: PopulationStats,
    resources: int,
    scratch_directories: int,
) -> Stats:
    """Return the numbers of the tiers beside those that are not theirs; see `Stats`."""
    memory, residency, commits = tiers.memory, tiers.residency, tiers.commits
    disk = tiers.disk.stats()
    sessions = disk.sessions + len(residency.unlisted)
    return Stats(
        sessions=sessions,
        in_memory=len(memory),
        on_disk=max(0, sessions - len(memory)),
        memory_used_bytes=memory.used_bytes,
        memory_peak_bytes=memory.peak_bytes,
        memory_policy=memory.policy,
        memory_budget_bytes=budget_bytes,
        memory_effective_budget_bytes=memory.budget_bytes,
        rss_bytes=rss_bytes,
        hits=memory.hits,
        hit_rate=memory.hits / max(1, memory.hits + residency.restored),
        misses=misses,
        restored=residency.restored,
        spilled=residency.spilled,
        spill_failures=residency.spill_failures,
        expired=residency.expired,
        touches=residency.touches,
        commits=commits.committed,
        batches=commits.batches,
        pending_bytes=commits.pending_bytes,
        commit_seconds=Latencies.of(commits.latencies_seconds),
        disk=disk,
        checkpoints=tiers.keeper.stats(),
        sharing=None if tiers.sharing is None else tiers.sharing.stats(),
        requests=requests,
        population=population,
        resources=resources,
        scratch_directories=scratch_directories,
    )
