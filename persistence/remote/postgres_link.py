"""Connections to a database, and single statements over them.

asyncpg's connections are used, and not its pool, which asks the server to reset a connection each
time it comes back, and waits without end for one that hangs. Here:

- Nothing is ever sent twice: a call ends with its rows, with an error that the server answered, or
  with a `Fault` that says whether anything was sent.
- A connection goes back only after an answer. After a timeout, a cancelled call or any other error
  it is closed, so no answer ever reaches another caller.
- Every statement is a transaction of its own. The server gives up on one after the timeout, so that
  what nobody waits for any more does not come late.
- The timeout is for statements of up to 1 MiB, there and back. A larger one has a second more for
  each 2 MiB.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import asyncpg
from asyncpg import InterfaceError, PostgresError

from persistence.remote.connections import Connections
from persistence.remote.exchanges import Lost, Unsent
from persistence.remote.postgres_faults import Refused, ends_connection, first_line, is_broken
from persistence.remote.postgres_urls import PostgresTarget

SMALL_BYTES: Final = 2**20
"""What a statement carries, there or back, within the timeout; more has more time."""
_SLOWEST_BYTES_PER_SECOND: Final = 2 * 2**20
_CLOSE_SECONDS: Final = 1.0
_SETTINGS: Final = {
    "application_name": "persistence",
    # Two workers that commit on one session wait for each other; nothing else is needed.
    "default_transaction_isolation": "read committed",
    "timezone": "UTC",
}


class PostgresLink(Connections[Any]):
    """The connections to one database.

    Args:
        target: where it is.
        max_connections: how many there may be.
        timeout_seconds: after which the server counts as not answering.
    """

    def __init__(
        self, target: PostgresTarget, max_connections: int, timeout_seconds: float
    ) -> None:
        super().__init__(f"PostgreSQL at {target.shown}", max_connections, timeout_seconds)
        self.where = target.shown
        self._arguments = target.arguments
        self._settings = {**_SETTINGS, "statement_timeout": f"{_milliseconds(timeout_seconds)}"}

    async def connect(self) -> Any:
        """Return a new connection that is the caller's own: to listen on, for example.

        Raises:
            Unsent: the server cannot be reached.
            Refused: it lets nobody in.
        """
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await asyncpg.connect(**self._arguments, server_settings=self._settings)
        except PostgresError as error:
            if not is_broken(error):
                raise Refused(error, self.where) from error
            raise self._unreached(first_line(error)) from error
        except (InterfaceError, OSError) as error:  # a builtin TimeoutError is an OSError
            raise self._unreached(_words(error, "no answer in time")) from error

    def _unreached(self, reason: str) -> Unsent:
        return Unsent(f"{self._server} cannot be reached: {reason}")

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[Any]:
        """Lend a connection; it goes back unless the block raises. Waits at most the timeout.

        Raises:
            Unsent: there is none, or the server cannot be reached.
            Refused: it lets nobody in.
        """
        connection = await self._take()
        try:
            yield connection
            if self._keep(connection):
                connection = None
        finally:
            self._free.release()
            if connection is not None:
                connection.terminate()

    def _is_usable(self, connection: Any) -> bool:
        return not connection.is_closed()

    def _drop(self, connection: Any) -> None:
        connection.terminate()

    async def rows(
        self, statement: str, *arguments: Any, payload_bytes: int = 0
    ) -> list[Any] | PostgresError:
        """Run one statement; return its rows, or the error that the server answered.

        Args:
            statement: SQL.
            *arguments: of it.
            payload_bytes: about how much it carries, there or back.

        Raises:
            Unsent, Refused: it was certainly not executed.
            Lost: nobody knows.
        """
        answer: list[Any] | PostgresError
        async with self.lease() as connection:
            more_seconds = seconds_for(payload_bytes)
            try:
                async with asyncio.timeout(self._timeout_seconds + more_seconds):
                    if more_seconds:
                        await self._give_time(connection, more_seconds)
                    answer = await connection.fetch(statement, *arguments)
                    if more_seconds:
                        await self._give_time(connection, 0.0)
            except PostgresError as error:
                if ends_connection(error):
                    self.drop_idle()
                    raise Lost(f"{self._server}: {first_line(error)}") from error
                answer = error
                if more_seconds:
                    connection.terminate()  # it would go on giving statements so much time
            except (InterfaceError, OSError) as error:
                self.drop_idle()
                reason = _words(error, "does not answer")
                raise Lost(f"{self._server}: {reason}") from error
        return answer

    async def _give_time(self, connection: Any, more_seconds: float) -> None:
        """Let the server give up later."""
        milliseconds = _milliseconds(self._timeout_seconds + more_seconds)
        await connection.execute(f"SET statement_timeout = {milliseconds}")

    async def close(self) -> None:
        """Close all connections; those in use when they are given back."""
        self._closed = True
        await asyncio.gather(*(close_politely(connection) for connection in self._end_idle()))


def seconds_for(payload_bytes: int) -> float:
    """Return how much longer than the timeout a statement may take that carries so much."""
    return payload_bytes / _SLOWEST_BYTES_PER_SECOND if payload_bytes > SMALL_BYTES else 0.0


def _milliseconds(seconds: float) -> int:
    """Return when the server gives up: a little sooner than we, so that it can still say so."""
    return max(1, round(900 * seconds))


async def close_politely(connection: Any) -> None:
    """Close a connection with a word to the server, if it listens."""
    try:
        async with asyncio.timeout(_CLOSE_SECONDS):
            await connection.close()
    except (PostgresError, InterfaceError, OSError):
        connection.terminate()


def _words(error: Exception, otherwise: str) -> str:
    return (str(error) or otherwise).splitlines()[0]
