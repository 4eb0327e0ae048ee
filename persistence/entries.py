"""What a worker keeps of the requests of one session until that is in the session's record."""

from __future__ import annotations

from persistence.admission import Waiting
from persistence.observe.metrics import Tally


class Entry:
    """One session's requests that are not in its record yet. Times are of the process clock.

    Attributes:
        session_id, incarnation: of the session; other ones once it got another id.
        limit: its ``max_requests``; 0: none.
        left: what it may admit of the block that is reserved.
        waiting: the requests that wait for the next block, and a task serves; None: none do.
        running: how many requests are under way.
        durations: of requests that are not in `tally` yet, seconds.
        name, ended: of the last of them.
        stored: when it was last stored, or made.
    """

    __slots__ = (
        "durations",
        "ended",
        "incarnation",
        "left",
        "limit",
        "name",
        "running",
        "session_id",
        "stored",
        "tally",
        "waiting",
    )

    def __init__(self, session_id: str, incarnation: bytes, limit: int, now: float) -> None:
        self.session_id = session_id
        self.incarnation = incarnation
        self.limit = limit
        self.left = 0
        self.waiting: Waiting | None = None
        self.running = 0
        self.durations: list[float] = []
        self.name = ""
        self.ended = now
        self.stored = now
        self.tally = Tally()

    @property
    def has_news(self) -> bool:
        """Whether there is anything to store."""
        return bool(self.durations or self.tally)

    @property
    def is_needed(self) -> bool:
        """Whether anything would be lost with it."""
        return self.has_news or self.is_used or self.left > 0

    @property
    def is_used(self) -> bool:
        """Whether somebody is at it right now."""
        return bool(self.running) or self.waiting is not None
