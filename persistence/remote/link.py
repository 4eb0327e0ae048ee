"""Connections to one server, and exchanges over them.

redis-py's connections are used, and nothing above them: its clients retry by themselves (one INCR
with two lost replies was applied three times), and its pool hands a connection on whatever is
still in it. Here:

- Nothing is ever sent twice. An exchange ends with all its replies, or with a `Fault` that says
  whether anything was sent.
- A connection goes back only when every reply that was asked for has been read. After a timeout, a
  cancelled call or any other error it is closed, so no reply ever reaches another caller.
- Timeouts are for progress: for each write and each few replies, not for a whole batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection

from persistence.remote.connections import Connections
from persistence.remote.exchanges import Fault, Lost, Unsent
from persistence.remote.faults import Refused
from persistence.remote.layout import pack_command

_BYTES_PER_SLICE: Final = 32 * 1024
_REPLIES_PER_SLICE: Final = 32


class Call(Protocol):
    """One command for one server."""

    @property
    def key(self) -> bytes:
        """The key that says which server it is for."""

    def pack(self) -> list[bytes]:
        """Return it in the protocol's bytes, in pieces."""


class Command:
    """A plain command.

    Args:
        arguments: its name and what follows.
        key: the key that it is about, if any.
    """

    __slots__ = ("arguments", "key")

    def __init__(self, *arguments: bytes, key: bytes = b"") -> None:
        self.arguments = arguments
        self.key = key

    def pack(self) -> list[bytes]:
        """Return it in the protocol's bytes, in pieces."""
        return pack_command(self.arguments)


class Lease:
    """A connection for the time of one exchange."""

    __slots__ = ("_connection", "_timeout_seconds", "_where", "owed")

    def __init__(self, connection: AbstractConnection, timeout_seconds: float, where: str) -> None:
        self._connection = connection
        self._timeout_seconds = timeout_seconds
        self._where = where
        self.owed = 0

    async def send(self, pieces: list[bytes], calls: int) -> None:
        """Send some commands, which `calls` replies will answer.

        Raises:
            Lost: the connection broke.
        """
        self.owed += calls
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await self._connection.send_packed_command(pieces, check_health=False)
        except (redis_errors.RedisError, OSError) as error:  # a builtin TimeoutError is an OSError
            raise Lost(f"Redis at {self._where}: {_words(error, 'takes no more')}") from error

    async def receive_into(self, replies: list[Any], count: int) -> None:
        """Add the next `count` replies; those that are errors are added too.

        Raises:
            Refused: the answer is an error behind which the connection cannot be used.
            Lost: it did not come. Those that came before it have been added.
        """
        try:
            async with asyncio.timeout(self._timeout_seconds):
                for _ in range(count):
                    replies.append(await self._receive())
                    self.owed -= 1
        except redis_errors.ConnectionError as error:
            if _is_answer(error):
                raise Refused(error, self._where) from error
            raise Lost(f"Redis at {self._where}: {_words(error, 'gone')}") from error
        except (redis_errors.RedisError, OSError) as error:
            raise Lost(f"Redis at {self._where}: {_words(error, 'does not answer')}") from error

    async def _receive(self) -> Any:
        try:
            return await self._connection.read_response()
        except redis_errors.ResponseError as error:
            return error


class Link(Connections[AbstractConnection]):
    """The connections to one server.

    Args:
        where: the server, for messages.
        make: makes a connection that is not connected yet.
        max_connections: how many there may be.
        timeout_seconds: after which the server counts as not answering.
    """

    def __init__(
        self,
        where: str,
        make: Callable[[], AbstractConnection],
        max_connections: int,
        timeout_seconds: float,
    ) -> None:
        super().__init__(f"Redis at {where}", max_connections, timeout_seconds)
        self.where = where
        self._make = make

    async def connect(self) -> AbstractConnection:
        """Return a new connection that is the caller's own: to listen on, for example.

        Raises:
            Unsent: the server cannot be reached.
            Refused: it lets nobody in.
        """
        connection = self._make()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await connection.connect()  # type: ignore[no-untyped-call]
            return connection
        except (redis_errors.RedisError, OSError) as error:
            await connection.disconnect(nowait=True)
            if isinstance(error, redis_errors.ResponseError) or _is_answer(error):
                raise Refused(error, self.where) from error
            reason = _words(error, "no answer in time")
            raise Unsent(f"{self._server} cannot be reached: {reason}") from error
        except BaseException:
            await connection.disconnect(nowait=True)
            raise

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[Lease]:
        """Lend a connection. Waits for a free one, at most the timeout.

        Raises:
            Unsent: there is none, or the server cannot be reached.
            Refused: it lets nobody in.
        """
        connection: AbstractConnection | None = await self._take()
        try:
            assert connection is not None, "taken"
            lease = Lease(connection, self._timeout_seconds, self.where)
            yield lease
            if not lease.owed and self._keep(connection):
                connection = None
        finally:
            self._free.release()
            if connection is not None:
                await connection.disconnect(nowait=True)

    def _is_usable(self, connection: AbstractConnection) -> bool:
        """Whether the other end has neither closed it nor said something nobody asked for."""
        reader = connection._reader
        if reader is None or reader.at_eof():
            return False
        return not reader._buffer  # type: ignore[attr-defined]

    def _drop(self, connection: AbstractConnection) -> None:
        connection._close()  # type: ignore[no-untyped-call]

    async def exchange(self, calls: Sequence[Call]) -> list[Any]:
        """Send `calls` in one pipeline; return for each its reply, or the `Fault` it met.

        Gives way to the event loop every now and then, so that Redis starts while the rest is
        still being packed.
        """
        replies: list[Any] = []
        sent = False
        try:
            async with self.lease() as lease:
                for pieces, count in _slices(calls):
                    if sent:
                        await asyncio.sleep(0)
                    sent = True
                    await lease.send(pieces, count)
                while len(replies) < len(calls):
                    wanted = min(_REPLIES_PER_SLICE, len(calls) - len(replies))
                    await lease.receive_into(replies, wanted)
                    if lease.owed:
                        await asyncio.sleep(0)  # those that have come already are read at once
        except Fault as fault:
            replies.append(fault)
            # Those behind it may have been sent, and their answers cannot be read any more.
            rest = Lost(str(fault)) if sent else fault
            replies += [rest] * (len(calls) - len(replies))
            self.drop_idle()
        return replies

    async def ask(self, *arguments: bytes) -> Any:
        """Send one command; return its reply, which may be an error.

        Raises:
            Fault: there is none.
        """
        [reply] = await self.exchange([Command(*arguments)])
        if isinstance(reply, Fault):
            raise reply
        return reply

    async def close(self) -> None:
        """Close all connections; those in use when they are given back."""
        self._closed = True
        for connection in self._end_idle():
            await connection.disconnect(nowait=True)


def _slices(calls: Sequence[Call]) -> Iterator[tuple[list[bytes], int]]:
    """Pack `calls` in slices: yield the bytes of some, and how many they are."""
    pieces: list[bytes] = []
    count = size = 0
    for call in calls:
        packed = call.pack()
        pieces += packed
        count += 1
        size += sum(map(len, packed))
        if size > _BYTES_PER_SLICE:
            yield pieces, count
            pieces, count, size = [], 0, 0
    if pieces:
        yield pieces, count


def _is_answer(error: BaseException) -> bool:
    """Whether it stands for an answer: redis-py makes connection errors of some (LOADING, ...)."""
    return (
        isinstance(error, redis_errors.ConnectionError)
        and type(error) is not redis_errors.ConnectionError
    )


def _words(error: Exception, otherwise: str) -> str:
    return (str(error) or otherwise).splitlines()[0]
