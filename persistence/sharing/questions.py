"""Asks the shared tier about many sessions in one round trip.

Without this, a few thousand readers who all have to ask, after a reconnect for example, would wait
for a connection one after the other, the last of them until the timeout; and a request that is not
answered in time looks like an outage.

A question is always sent after it was put; it never joins a round trip that is under way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

from persistence.errors import PersistenceError, again
from persistence.remote.contract import RemoteSession, RemoteTier, Stored

T = TypeVar("T")

_ROUND_TRIPS: Final = 4  # of one kind at the same time: a reader need not wait for others' replies
_STORED_AT_ONCE: Final = 256
_LOADED_AT_ONCE: Final = 32  # these may be large


class Questions:
    """What the shared tier has of sessions. Every method runs on the event loop.

    Args:
        remote: the shared tier.
    """

    def __init__(self, remote: RemoteTier) -> None:
        self._stored: _Kind[Stored | None] = _Kind(remote.stored, _STORED_AT_ONCE)
        self._load: _Kind[RemoteSession | Stored | None] = _Kind(remote.load_many, _LOADED_AT_ONCE)

    async def stored(self, session_id: str) -> Stored | None:
        """Return what is stored of a session, without its data.

        Raises:
            RemoteUnavailable: the shared tier does not answer.
        """
        return await self._stored.ask(session_id)

    async def load(self, session_id: str) -> RemoteSession | Stored | None:
        """Return the session; `Stored` if there is a tombstone, None if there is nothing.

        Raises:
            RemoteUnavailable: the shared tier does not answer.
            RemoteDamaged: what is stored is damaged, or no session.
        """
        return await self._load.ask(session_id)

    async def close(self) -> None:
        """Ask nothing any more; whoever waits is cancelled."""
        await self._stored.close()
        await self._load.close()


class _Kind(Generic[T]):
    """Questions of one kind.

    Args:
        ask: asks about some sessions; what it returns for each may be an error to raise.
        at_once: about how many at most.
    """

    def __init__(
        self,
        ask: Callable[[Sequence[str]], Awaitable[Sequence[T | PersistenceError]]],
        at_once: int,
    ) -> None:
        self._ask = ask
        self._at_once = at_once
        self._waiting: deque[tuple[str, asyncio.Future[T]]] = deque()
        self._asking: set[asyncio.Task[None]] = set()

    async def ask(self, session_id: str) -> T:
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((session_id, answer))
        # One that has just ended takes nothing more, though it may still be in the set.
        if sum(not task.done() for task in self._asking) < _ROUND_TRIPS:
            task = asyncio.create_task(self._ask_all(), name="persistence-questions")
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        return await answer

    async def _ask_all(self) -> None:
        while self._waiting:
            count = min(len(self._waiting), self._at_once)
            await self._ask_some([self._waiting.popleft() for _ in range(count)])

    async def _ask_some(self, some: list[tuple[str, asyncio.Future[T]]]) -> None:
        found: Sequence[T | Exception]
        try:
            found = await self._ask([session_id for session_id, _ in some])
        except asyncio.CancelledError:
            for _, answer in some:
                answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait must hear of it
            found = [error] * len(some)
        for (_, answer), each in zip(some, found, strict=True):
            if answer.done():
                continue  # whoever asked was cancelled
            if isinstance(each, Exception):
                answer.set_exception(again(each) if isinstance(each, PersistenceError) else each)
            else:
                answer.set_result(each)

    async def close(self) -> None:
        tasks = list(self._asking)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _, answer in self._waiting:
            answer.cancel()
        self._waiting.clear()
