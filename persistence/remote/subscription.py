"""Keeps a listener informed, whatever the server is: connects again, and proves that it hears.

A connection that is open proves nothing: every ``redis.heartbeat_seconds`` a beat is sent through
the server, and must come back to the subscription within ``redis.timeout_seconds``. When one does
not, or the connection breaks, the listener hears `disconnected`; then we connect again, for ever,
with growing pauses, and it hears `connected`. Behind each beat the epoch is read: when the content
was lost meanwhile, the listener hears `connected` with the new one.

A server of another kind says how to listen (`_listen`) and how to prove it (`_prove`).
"""

from __future__ import annotations

import asyncio
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Final

from persistence.errors import PersistenceError
from persistence.remote.contract import Listener
from persistence.remote.exchanges import Fault

_log = logging.getLogger("persistence.remote")

_FIRST_PAUSE_SECONDS: Final = 0.05
_LONGEST_PAUSE_SECONDS: Final = 5.0


class Subscription(ABC):
    """Keeps one listener informed until it is closed. It starts by itself.

    A subclass sets its own attributes before it calls this constructor, which starts the task.

    Args:
        listener: who is told.
        epoch: returns the id of the tier's content.
        heartbeat_seconds: between two beats.

    Attributes:
        is_connected: whether announcements arrive, as far as the last beat tells.
        connects: how often it has connected.
    """

    def __init__(
        self,
        listener: Listener,
        epoch: Callable[[], Awaitable[bytes]],
        heartbeat_seconds: float,
    ) -> None:
        self.is_connected = False
        self.connects = 0
        self._listener = listener
        self._epoch = epoch
        self._heartbeat_seconds = heartbeat_seconds
        self._closing = False
        self._task = asyncio.create_task(self._run(), name="persistence-subscription")

    async def close(self) -> None:
        """Stop listening."""
        self._closing = True
        self.is_connected = False
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    @abstractmethod
    async def _listen(self) -> None:
        """Subscribe, run `_beat`, and pass messages on until something breaks.

        Raises:
            Fault: it broke.
        """

    @abstractmethod
    async def _prove(self, number: int) -> None:
        """Send beat `number` through the server, and wait until the subscription has it.

        Raises:
            Fault: it did not come.
        """

    @abstractmethod
    async def _rediscover(self) -> None:
        """Look up where to connect next; raises nothing."""

    async def _run(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        told = ""
        while True:
            connects = self.connects
            try:
                await self._listen()
            except (Fault, PersistenceError) as error:
                level = logging.DEBUG if str(error) == told else logging.WARNING
                told = str(error)
                _log.log(level, "the subscription to other workers' commits broke: %s", error)
            except Exception:  # noqa: BLE001 - whatever it is, the listener must not go deaf
                _log.exception("the subscription to other workers' commits failed")
            if self._closing:  # a task group whose task fails meanwhile forgets a cancellation
                return
            if self.is_connected:
                self.is_connected = False
                self._listener.disconnected()
            if self.connects > connects:
                pause = _FIRST_PAUSE_SECONDS
                told = ""
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            await self._rediscover()

    async def _beat(self) -> None:
        """Prove again and again that what is announced arrives here, and is of the same content.

        A content can be lost while all connections stay open (FLUSHALL, TRUNCATE). Nothing is
        announced then, and who only reads what is here would never hear of it.
        """
        number = 0
        known = b""
        while True:
            number += 1
            await self._prove(number)
            # Only now: what was committed before the subscription was complete may be missed.
            epoch = await self._epoch()
            if not self.is_connected:
                self.is_connected = True
                self.connects += 1
                self._listener.connected(epoch=epoch)
            elif epoch != known:
                self._listener.connected(epoch=epoch)
            known = epoch
            await asyncio.sleep(self._heartbeat_seconds)


class Subscriptions:
    """The subscription of one tier, if it has one: a new listener takes the place of the last."""

    def __init__(self) -> None:
        self._current: Subscription | None = None

    @property
    def is_connected(self) -> bool:
        """Whether announcements arrive, as far as the last beat tells."""
        return self._current is not None and self._current.is_connected

    async def begin(self, make: Callable[[], Subscription]) -> None:
        """End the subscription that there is, and make another one."""
        await self.close()
        self._current = make()

    async def close(self) -> None:
        """Stop listening; idempotent."""
        current, self._current = self._current, None
        if current is not None:
            await current.close()
