"""Looks for a session wherever it is: memory, log, shared tier."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeAlias

from persistence import record as rec
from persistence.errors import ConflictError
from persistence.expiry import life_of
from persistence.ids import check_session_id, plain_id
from persistence.record import RENEWS
from persistence.session import Session
from persistence.sharing.sharing import Sharing
from persistence.tiers import Tiers

ShortWay: TypeAlias = Callable[[str], Session | None]
"""Returns a view of a session that is at hand and counts that as an access; None: look closer."""


class Lookup:
    """Finds sessions that are not at hand.

    Args:
        ready: raises ManagerClosed; waits while a checkpoint is being put in place.

    Attributes:
        misses: how many reads have found no session.
    """

    def __init__(self, ready: Callable[[], Awaitable[None]]) -> None:
        self._ready = ready
        self._sharing: Sharing | None = None
        self.misses = 0

    def attach(self, tiers: Tiers) -> None:
        """Look in the tiers as they are now."""
        self._time, self._memory = tiers.time, tiers.memory
        self._residency, self._updates = tiers.residency, tiers.updates
        self._sharing = tiers.sharing

    def short_ways(self) -> tuple[ShortWay, ShortWay]:
        """Return the short ways to a session in memory, and to one in the page cache."""
        access, restore = self._memory.access, self._residency.restore_now
        if self._sharing is None:
            return access, restore
        return partial(_if_current, self._sharing, access), partial(
            _if_current, self._sharing, restore
        )

    async def bring_here(self, session_id: str, *, fresh: bool = False) -> None:
        """Let what is here of a session be what the shared tier has, if there is one."""
        while self._sharing is not None:
            try:
                await self._sharing.current(session_id, fresh=fresh)
                break
            except ConflictError:  # a checkpoint is being put in place: ask again behind it
                await self._ready()

    async def bring_when_ready(self, session_id: str) -> None:
        """Do the same for one who may come while the manager is closed, or at the gate."""
        await self._ready()
        await self.bring_here(session_id)

    async def bring_fresh(self, session_id: str) -> None:
        """Ask the shared tier for a session, if there is one.

        Raises:
            InvalidSessionId: it is no session id.
        """
        await self._ready()
        session_id = plain_id(session_id)
        check_session_id(session_id)
        await self.bring_here(session_id, fresh=True)

    async def cold(self, session_id: str) -> Session | None:
        """Return a view of a session that neither short way has found, and renew it."""
        await self._ready()
        key = check_session_id(session_id)
        await self.bring_here(session_id)
        base = await self._residency.acknowledged_base(session_id, key)
        if base is None:
            self.misses += 1
            return None
        session = self._memory.access(session_id)
        if session is not None:
            self._memory.hits -= 1  # it was not
            return session
        return self._updates.access_uncached(session_id, key, base)

    async def peek(self, session_id: str) -> Session | None:
        """Return a view, neither counting that as an access nor restoring a cold session."""
        session_id = plain_id(session_id)
        if not await self.has(session_id):
            return None  # it has been brought here, if it lives elsewhere
        key = session_id.encode()
        record = await self._residency.peek(session_id, key)
        if record is None:
            return None
        times = self._residency.times(session_id, key)
        if times is None:
            return None
        accessed, deadline, cap = times
        ttl_seconds, flags = rec.ttl_and_flags_of(record)
        life = life_of(ttl_seconds, flags & RENEWS, deadline)
        return Session.view(session_id, record, accessed, (life, cap, self._time))

    async def has(self, session_id: str) -> bool:
        """Whether a session is alive; see `StateManager.has_session`."""
        await self._ready()
        session_id = plain_id(session_id)
        key = check_session_id(session_id)
        await self.bring_here(session_id)
        deadline = self._residency.acknowledged_deadline(session_id, key)
        if deadline is None:
            return False
        if deadline > self._time.now():
            return True
        # Who is told that it is over must not see it come back.
        return not await self._residency.expire(session_id, key)

    async def restore(self, session_id: str) -> bytes | None:
        """Bring a live session into memory, renewing nothing; return its record."""
        await self._ready()
        session_id = plain_id(session_id)
        key = check_session_id(session_id)
        await self.bring_here(session_id)
        base = await self._residency.acknowledged_base(session_id, key, access=False)
        return None if base is None else base[0]

    async def living_incarnation(self, session_id: str) -> bytes | None:
        """Return the incarnation of a live session, bringing it into memory; renews nothing."""
        record = await self.restore(session_id)
        return None if record is None else rec.incarnation_of(record)


def _if_current(sharing: Sharing, look: ShortWay, session_id: str) -> Session | None:
    """Look for a session here only if what is here is what the shared tier has."""
    return look(session_id) if sharing.is_current(session_id) else None
