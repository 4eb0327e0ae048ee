"""What a replay is asked to do and what it tells: options, report, progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from persistence.stats import Stats


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """What to replay, and on what.

    Attributes:
        logs: access logs, replayed one behind the other.
        directory: the engine's directory; with several workers, theirs are below it.
        memory_bytes: budget of the memory tier of each worker.
        policy: the memory tier's eviction policy.
        segment_bytes: size of the log's segments.
        fsync: "always", "interval" or "never".
        resume: go on with the replay that `directory` holds.
        limit: stop after so many requests; None: all of them.
        concurrency: requests in flight at most.
        redis_url: Redis server that the sessions are shared through; None: none.
        redis_write: "through" or "behind".
        namespace: in Redis; None: the one that is resumed, or a fresh one.
        workers: processes that share the sessions.
        patience_seconds: for which Redis may lag behind at the end, without coming nearer.
    """

    logs: tuple[Path, ...]
    directory: Path
    memory_bytes: int = 256 * 1024
    policy: str = "lru"
    segment_bytes: int = 2**20
    fsync: str = "always"
    resume: bool = False
    limit: int | None = None
    concurrency: int = 64
    redis_url: str | None = field(default=None, repr=False)  # there may be a password in it
    redis_write: str = "through"
    namespace: str | None = None
    workers: int = 1
    patience_seconds: float = 20.0


@dataclass(slots=True)
class ReplayReport:
    """The outcome of a replay; its fields are those of ``--json``.

    With several workers, `in_memory`, `on_disk`, `spilled`, `restored` and what is said of logs
    are sums over their copies, `memory_peak_bytes` is the highest of them, and
    `memory_budget_bytes` is that of each.

    Attributes:
        requests: requests in the log, all of them applied by now.
        applied: those that this run applied; the rest had been, before a resume.
        resumed_at: the watermark that this run started from; 0 for a fresh replay.
        sessions: sessions of the replay, in memory or on disk; with several workers, in Redis.
        seconds: time of the replay, without opening and verification.
        verified: every session was read again and equals the fold over the log, here and, if they
            are shared, in Redis and in every worker.
        differing_sessions: how many sessions differ anywhere.
        differences: the first of them, in words.
        workers: processes that applied requests.
        conflicts_retried: updates that were done again because another worker's came first.
        namespace: of the sessions in Redis; None: they are not shared.
        redis_sessions: how many were read from Redis and compared.
    """

    requests: int = 0
    skipped_lines: int = 0
    applied: int = 0
    resumed_at: int = 0
    sessions: int = 0
    in_memory: int = 0
    on_disk: int = 0
    spilled: int = 0
    restored: int = 0
    memory_peak_bytes: int = 0
    memory_budget_bytes: int = 0
    segments: int = 0
    compactions: int = 0
    disk_bytes: int = 0
    seconds: float = 0.0
    requests_per_second: float = 0.0
    verify_seconds: float = 0.0
    verified: bool = False
    differing_sessions: int = 0
    differences: list[str] = field(default_factory=list)
    workers: int = 1
    conflicts_retried: int = 0
    namespace: str | None = None
    redis_sessions: int = 0


Stage: TypeAlias = Literal["replay", "verify"]


@dataclass(frozen=True, slots=True)
class ReplayProgress:
    """Where a running replay stands."""

    stage: Stage
    done: int
    per_second: float
    in_memory: int
    on_disk: int
    spilled: int
    restored: int


Watch: TypeAlias = Callable[[ReplayProgress], None]


@dataclass(slots=True)
class Numbers:
    """What a replay tells of one worker's engine, or of several added up."""

    sessions: int = 0
    in_memory: int = 0
    spilled: int = 0
    restored: int = 0
    memory_peak_bytes: int = 0
    segments: int = 0
    compactions: int = 0
    disk_bytes: int = 0

    @staticmethod
    def of(stats: Stats) -> Numbers:
        """Return those of one engine."""
        return Numbers(
            stats.sessions,
            stats.in_memory,
            stats.spilled,
            stats.restored,
            stats.memory_peak_bytes,
            stats.disk.segments,
            stats.disk.compactions,
            stats.disk.total_bytes,
        )

    def add(self, other: Numbers) -> None:
        """Add another worker's; of the memory peaks the highest is kept."""
        self.sessions += other.sessions
        self.in_memory += other.in_memory
        self.spilled += other.spilled
        self.restored += other.restored
        self.memory_peak_bytes = max(self.memory_peak_bytes, other.memory_peak_bytes)
        self.segments += other.segments
        self.compactions += other.compactions
        self.disk_bytes += other.disk_bytes

    def progress(self, stage: Stage, done: int, per_second: float) -> ReplayProgress:
        """Return where a replay with these numbers stands."""
        on_disk = max(0, self.sessions - self.in_memory)
        return ReplayProgress(
            stage, done, per_second, self.in_memory, on_disk, self.spilled, self.restored
        )

    def report(self, report: ReplayReport) -> None:
        """Fill in the numbers, but for `sessions`."""
        report.in_memory = self.in_memory
        report.on_disk = max(0, self.sessions - self.in_memory)
        report.spilled = self.spilled
        report.restored = self.restored
        report.memory_peak_bytes = self.memory_peak_bytes
        report.segments = self.segments
        report.compactions = self.compactions
        report.disk_bytes = self.disk_bytes
