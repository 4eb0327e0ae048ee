"""What the sharing room needs of this worker's own tiers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from persistence.clock import Clock, EngineTime
from persistence.commit import CommitQueue
from persistence.residency import Residency


@dataclass(frozen=True, slots=True)
class Local:
    """This worker's own side.

    Attributes:
        residency: its sessions.
        commits: its commit queue.
        clock: time.
        time: the engine's time base.
        all_ids: yields the ids of all its live sessions.
    """

    residency: Residency
    commits: CommitQueue
    clock: Clock
    time: EngineTime
    all_ids: Callable[[], AsyncIterator[str]]
