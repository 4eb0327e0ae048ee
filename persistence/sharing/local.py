"""What the sharing room needs of this worker's own tiers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from persistence.clock import Clock, EngineTime
from persistence.commit import CommitQueue
from persistence.remote.contract import Announcement
from persistence.residency import Residency


class Watchers(Protocol):
    """Who is told of what other workers do. Called on the event loop; must not block or raise."""

    @property
    def topics(self) -> Collection[str]:
        """The sessions whose copies here have to follow without being asked for."""

    def announced(self, announcements: Sequence[Announcement]) -> None:
        """Other workers committed."""

    def reconnected(self) -> None:
        """Announcements arrive from now on; what was before may have been missed."""


@dataclass(frozen=True, slots=True)
class Local:
    """This worker's own side.

    Attributes:
        residency: its sessions.
        commits: its commit queue.
        clock: time.
        time: the engine's time base.
        all_ids: yields the ids of all its live sessions.
        watchers: who is told of what other workers do.
    """

    residency: Residency
    commits: CommitQueue
    clock: Clock
    time: EngineTime
    all_ids: Callable[[], AsyncIterator[str]]
    watchers: Watchers
