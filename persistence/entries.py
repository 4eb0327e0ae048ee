"""What is known of the requests of one session: in its record, and what is not there yet."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgpack

from persistence import record as rec
from persistence.admission import Waiting
from persistence.observe.metrics import Tally
from persistence.session import REQUESTS


class Entry:
    """One session's requests that are not in its record yet. Times are of the process clock.

    There may be thousands, each of which a garbage collection goes over: so it holds atoms, and a
    tally only while something is in it.

    Attributes:
        session_id, incarnation: of the session; other ones once it got another id.
        limit: its ``max_requests``; 0: none.
        left: what it may admit of the block that is reserved.
        waiting: the requests that wait for the next block, and a task serves; None: none do.
        coming: how many requests wait, or were admitted and have not got round to it.
        running: how many requests are under way.
        started: the sum of the times at which they have begun.
        durations: of requests that are not in `tally` yet, seconds.
        name, ended: of the last of them.
        stored: when it was last stored, or made.
    """

    __slots__ = (
        "_tally",
        "coming",
        "durations",
        "ended",
        "incarnation",
        "left",
        "limit",
        "name",
        "running",
        "session_id",
        "started",
        "stored",
        "waiting",
    )

    def __init__(self, session_id: str, incarnation: bytes, limit: int, now: float) -> None:
        self.session_id = session_id
        self.incarnation = incarnation
        self.limit = limit
        self.left = 0
        self.waiting: Waiting | None = None
        self.coming = 0
        self.running = 0
        self.started = 0.0
        self.durations: tuple[float, ...] = ()
        self.name = ""
        self.ended = now
        self.stored = now
        self._tally: Tally | None = None

    @property
    def tally(self) -> Tally:
        """What was counted."""
        if self._tally is None:
            self._tally = Tally()
        return self._tally

    @tally.setter
    def tally(self, tally: Tally) -> None:
        self._tally = tally

    def take(self) -> Tally:
        """Return what was counted, and begin anew."""
        taken, self._tally = self._tally, None
        return Tally() if taken is None else taken

    @property
    def has_news(self) -> bool:
        """Whether there is anything to store."""
        return bool(self.durations or self._tally)

    @property
    def is_needed(self) -> bool:
        """Whether anything would be lost with it."""
        return self.has_news or self.is_used or self.left > 0

    @property
    def is_used(self) -> bool:
        """Whether somebody is at it right now."""
        return bool(self.running or self.coming) or self.waiting is not None

    def cut_short(self, now: float) -> None:
        """Count what is under way as if it ended now, each after what all have taken on average."""
        average_seconds = now - self.started / self.running
        self.durations += (max(0.0, average_seconds),) * self.running
        self.ended = now


class Noted(NamedTuple):
    """What is stored about a session's requests.

    Attributes:
        mark: high-water mark of the limit.
        tally: what was counted.
    """

    mark: int
    tally: Tally

    @staticmethod
    def of(meta: dict[str, Any]) -> Noted:
        """Return what the metadata of a record hold."""
        try:
            mark, *parts = msgpack.unpackb(meta[REQUESTS])
        except (KeyError, ValueError, TypeError):  # nothing, or nothing that anybody wrote so
            return Noted(0, Tally())
        return Noted(int(mark), Tally.of_parts(parts) if parts else Tally())

    def packed_with(self, meta: dict[str, Any]) -> bytes:
        """Return the metadata with this in it, packed."""
        parts = self.tally.parts() if self.tally else []
        return rec.pack_meta({**meta, REQUESTS: msgpack.packb([self.mark, *parts])})
