"""Locks by session id: one editor at a time per session, first come, first served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from persistence.errors import ConflictError, printable


class _Holder:
    __slots__ = ("task", "waiters")

    def __init__(self, task: asyncio.Task[object] | None) -> None:
        self.task = task
        self.waiters: deque[tuple[asyncio.Future[None], asyncio.Task[object] | None]] = deque()


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
            ConflictError: this very task holds it already; waiting would never end.
        """
        task = asyncio.current_task()
        holder = self.holders.get(session_id)
        if holder is None:
            self.holders[session_id] = _Holder(task)
            self._all_free.clear()
            return
        if holder.task is task:
            raise ConflictError(
                f"session {printable(session_id)} is being edited by this very task; "
                "change the draft instead, or write after the edit has ended"
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        holder.waiters.append((turn, task))
        try:
            await turn
        except asyncio.CancelledError:
            # Cancelled while waiting: leave the queue. Cancelled after the lock was handed over
            # but before this task ran: the lock is ours, so pass it on.
            if turn.done() and not turn.cancelled():
                self.release(session_id)
            elif (turn, task) in holder.waiters:
                holder.waiters.remove((turn, task))
            raise

    def release(self, session_id: str) -> None:
        """Give the lock to whoever waits longest."""
        holder = self.holders[session_id]
        while holder.waiters:
            turn, task = holder.waiters.popleft()
            if not turn.done():
                holder.task = task
                turn.set_result(None)
                return
        del self.holders[session_id]
        if not self.holders:
            self._all_free.set()

    async def all_free(self) -> None:
        """Wait until nobody holds any lock."""
        await self._all_free.wait()
