"""Locks by session id: one editor at a time per session, first come, first served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Final

from persistence.errors import ConflictError, printable

OWNER: Final[ContextVar[object]] = ContextVar("persistence-owner", default=None)
"""Who calls, where that is not the task: a thread, each of whose calls is a task of its own."""

NOBODY: Final[Sequence[object]] = ()
ASKERS: Final[ContextVar[Sequence[object]]] = ContextVar("persistence-askers", default=NOBODY)
"""Who waits right now, as `OWNER` or task, for what this code does in a task of its own."""


def caller() -> object:
    """Return who calls."""
    return OWNER.get() or asyncio.current_task()


class _Holder:
    __slots__ = ("owner", "waiters")

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self.waiters: deque[tuple[asyncio.Future[None], object]] = deque()


class SessionLocks:
    """A lock exists only while somebody holds it, so idle sessions cost nothing."""

    def __init__(self) -> None:
        self.holders: dict[str, _Holder] = {}
        self._all_free = asyncio.Event()
        self._all_free.set()

    def __contains__(self, session_id: str) -> bool:
        return session_id in self.holders

    def __len__(self) -> int:
        return len(self.holders)

    @asynccontextmanager
    async def holding(self, session_id: str) -> AsyncIterator[None]:
        """Hold the lock of a session.

        Raises:
            ConflictError: this very task holds it already; waiting would never end.
        """
        await self.acquire(session_id)
        try:
            yield
        finally:
            self.release(session_id)

    async def acquire(self, session_id: str) -> None:
        """Take the lock of a session, after everybody who asked before.

        Raises:
            ConflictError: this very task holds it already, or whoever waits for what it does;
                waiting would never end.
        """
        owner = caller()
        holder = self.holders.get(session_id)
        if holder is None:
            self.holders[session_id] = _Holder(owner)
            self._all_free.clear()
            return
        if holder.owner is owner:
            raise ConflictError(
                f"session {printable(session_id)} is being edited by this very task or thread; "
                "change the draft instead, or write after the edit has ended"
            )
        if holder.owner in ASKERS.get():
            raise ConflictError(
                f"session {printable(session_id)} is being edited by whoever asked for this "
                "resource, and waits for it; let the factory write nothing to it, or ask for the "
                "resource before or after the edit"
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        holder.waiters.append((turn, owner))
        try:
            await turn
        except asyncio.CancelledError:
            # Cancelled while waiting: leave the queue. Cancelled after the lock was handed over
            # but before this task ran: the lock is ours, so pass it on.
            if turn.done() and not turn.cancelled():
                self.release(session_id)
            elif (turn, owner) in holder.waiters:
                holder.waiters.remove((turn, owner))
            raise

    def release(self, session_id: str) -> None:
        """Give the lock to whoever waits longest."""
        holder = self.holders[session_id]
        while holder.waiters:
            turn, owner = holder.waiters.popleft()
            if not turn.done():
                holder.owner = owner
                turn.set_result(None)
                return
        del self.holders[session_id]
        if not self.holders:
            self._all_free.set()

    async def all_free(self) -> None:
        """Wait until nobody holds any lock."""
        await self._all_free.wait()
