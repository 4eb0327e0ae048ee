"""What other threads may do without the event loop: look at a session that is in memory.

A hot read is the most frequent call of all, and a round trip to another thread costs fifty times as
much. So it is done right here, in the caller's thread, and only ever *reads* the engine's tables:
single look-ups in plain dicts, each of which is atomic. That a session was accessed is noted in a
table of our own, and the loop catches up with it ten times a second, and before every call.

Until it has, the session's deadline is the old one. So whoever is near it goes the long way; what
is noted here has `_MARGIN_SECONDS` until it matters.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, TimerHandle
from typing import Final

from persistence.manager import StateManager
from persistence.session import Session

_MARGIN_SECONDS: Final = 10.0
_CATCH_UP_SECONDS: Final = 0.1


class Glances:
    """Reads of one manager's memory tier from any thread.

    Args:
        manager: the manager.
    """

    def __init__(self, manager: StateManager) -> None:
        self._manager = manager
        self._tiers = manager._tiers
        self._noted: dict[str, float] = {}
        self._hits = 0
        self._told_hits = 0
        self._timer: TimerHandle | None = None

    def look(self, session_id: str) -> Session | None:
        """Return a view of a session and count that as an access; None: look closer.

        From any thread.

        Raises:
            TypeError: it is not hashable, so no session id.
        """
        manager = self._manager
        if not manager._is_open or manager._gate is not None:
            return None
        tiers = self._tiers
        if tiers.sharing is not None and not tiers.sharing.is_current(session_id):
            return None
        session = tiers.memory.look(session_id, _MARGIN_SECONDS)
        if session is not None:
            self._noted[session_id] = session._accessed
            self._hits += 1  # may miss one now and then, which is nothing for a statistic
        return session

    def catch_up(self) -> None:
        """Let the engine know what was read. On the event loop."""
        noted = self._noted
        if not noted:
            return
        note = self._tiers.memory.note
        while noted:
            note(*noted.popitem())
        hits = self._hits
        self._tiers.memory.hits += hits - self._told_hits
        self._told_hits = hits

    def start(self, loop: AbstractEventLoop) -> None:
        """Catch up ten times a second from now on. On the event loop."""
        self.catch_up()
        self._timer = loop.call_later(_CATCH_UP_SECONDS, self.start, loop)

    def stop(self) -> None:
        """Catch up for the last time. On the event loop."""
        self.catch_up()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
