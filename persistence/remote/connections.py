"""The connections to one server: so many at most, and those that nobody uses are kept.

What kind of connections they are, a subclass says; so far, those of redis-py and of asyncpg.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from persistence.remote.exchanges import Unsent

Connection = TypeVar("Connection")


class Connections(ABC, Generic[Connection]):
    """Connections that are lent one caller at a time.

    Args:
        server: its kind and address, for messages: ``Redis at host:6379``.
        max_connections: how many there may be.
        timeout_seconds: after which the server counts as not answering.
    """

    def __init__(self, server: str, max_connections: int, timeout_seconds: float) -> None:
        self._server = server
        self._max_connections = max_connections
        self._timeout_seconds = timeout_seconds
        self._free = asyncio.Semaphore(max_connections)
        self._idle: list[Connection] = []
        self._closed = False

    @abstractmethod
    async def connect(self) -> Connection:
        """Return a new connection that is the caller's own: to listen on, for example.

        Raises:
            Unsent: the server cannot be reached.
            Refused: it lets nobody in.
        """

    @abstractmethod
    def _is_usable(self, connection: Connection) -> bool:
        """Whether one that nobody has used for a while can be used."""

    @abstractmethod
    def _drop(self, connection: Connection) -> None:
        """Close a connection at once: there is nobody to say goodbye to."""

    async def _take(self) -> Connection:
        """Return a connection for one caller, who ends with ``_free.release()``.

        Waits for a free one, at most the timeout.

        Raises:
            Unsent: there is none, or the server cannot be reached.
            Refused: it lets nobody in.
        """
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await self._free.acquire()
        except TimeoutError:
            raise Unsent(
                f"{self._server}: all {self._max_connections} connections are busy"
            ) from None
        try:
            return self._take_idle() or await self.connect()
        except BaseException:
            self._free.release()
            raise

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if self._is_usable(connection):
                return connection
            self._drop(connection)
        return None

    def _keep(self, connection: Connection) -> bool:
        """Keep a connection for the next caller; False: it has to be closed."""
        if not self._closed:
            self._idle.append(connection)
        return not self._closed

    def drop_idle(self) -> None:
        """Close what nobody uses: after a fault the others are suspect too."""
        for connection in self._end_idle():
            self._drop(connection)

    def _end_idle(self) -> list[Connection]:
        """Take away all that nobody uses, and return them."""
        idle, self._idle = self._idle, []
        return idle
