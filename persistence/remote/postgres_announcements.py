"""The subscription of a tier in PostgreSQL: LISTEN, and a heartbeat through NOTIFY.

One connection listens on two channels: the namespace's announcements, and this worker's own
heartbeat. What ``sql/commit.sql`` announces arrives when its transaction is committed, in the
order of the commits.

While it listens, it also removes rows whose time is over: a thousand at once, so that nobody waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from typing import Any, Final

from asyncpg import InterfaceError, PostgresError

from persistence.errors import PersistenceError
from persistence.remote.contract import Announcement, Listener
from persistence.remote.exchanges import Lost
from persistence.remote.postgres_faults import Refused, first_line
from persistence.remote.postgres_link import PostgresLink, close_politely
from persistence.remote.subscription import Subscription

_log = logging.getLogger("persistence.remote")

_NOTIFY: Final = "SELECT pg_notify($1, $2)"
_BETWEEN_REMOVALS_SECONDS: Final = 0.05


class Channels:
    """Names of the channels of one namespace. PostgreSQL takes at most 63 bytes.

    Args:
        space: the namespace, as it is in the tables.
        worker: id of this worker.
    """

    def __init__(self, space: str, worker: bytes) -> None:
        digest = blake2b(space.encode(), digest_size=16).hexdigest()
        self.commits = f"persistence_commits_{digest}"
        self.beat = f"persistence_beat_{worker.hex()}"


def decode_announcements(message: str) -> list[Announcement]:
    """Decode a message on the channel of commits; ``sql/commit.sql`` says what is in it.

    Raises:
        ValueError: it is none of ours.
    """
    worker, *lines = message.split("\n")
    found = []
    for line in lines:
        kind, version, commit, session_id = line.split(" ")
        if kind not in ("L", "T", "t"):
            raise ValueError("an announcement is of no known kind")
        name = bytes.fromhex(session_id).decode()
        found.append(
            Announcement(
                name, int(version), bytes.fromhex(commit), kind != "L", bytes.fromhex(worker)
            )
        )
    return found


class PostgresSubscription(Subscription):
    """Keeps one listener informed until it is closed.

    Args:
        link: where the database is.
        channels: what to listen on.
        worker: this worker's id; its own announcements are not passed on.
        listener: who is told.
        epoch: returns the id of the tier's content.
        remove_expired: removes some rows whose time is over; returns whether there may be more.
        heartbeat_seconds: between two beats, and between two removals.
        timeout_seconds: within which a beat must come back.
    """

    def __init__(
        self,
        link: PostgresLink,
        channels: Channels,
        worker: bytes,
        listener: Listener,
        *,
        epoch: Callable[[], Awaitable[bytes]],
        remove_expired: Callable[[], Awaitable[bool]],
        heartbeat_seconds: float,
        timeout_seconds: float,
    ) -> None:
        self._link = link
        self._channels = channels
        self._own = worker.hex()
        self._remove_expired = remove_expired
        self._timeout_seconds = timeout_seconds
        self._expected = ""
        self._returned = asyncio.Event()
        super().__init__(listener, epoch, heartbeat_seconds)

    async def _listen(self) -> None:
        connection = await self._link.connect()
        broken = asyncio.Event()
        try:
            connection.add_termination_listener(lambda _: broken.set())
            await self._hear(connection)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch(broken))
                group.create_task(self._beat())
                group.create_task(self._tidy())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            if self._closing:
                await close_politely(connection)
            else:
                connection.terminate()

    async def _rediscover(self) -> None:
        """Nothing to look up: who connects tries all hosts of the URL."""

    async def _hear(self, connection: Any) -> None:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await connection.add_listener(self._channels.commits, self._take)
                await connection.add_listener(self._channels.beat, self._take_beat)
        except PostgresError as error:
            raise Refused(error, self._link.where) from error
        except (InterfaceError, OSError) as error:
            raise Lost(
                f"PostgreSQL at {self._link.where} does not let us listen: {first_line(error)}"
            ) from error

    async def _watch(self, broken: asyncio.Event) -> None:
        await broken.wait()
        raise Lost(f"PostgreSQL at {self._link.where}: the connection that listens broke")

    def _take(self, _connection: Any, _pid: int, channel: str, message: str) -> None:
        if message.startswith(self._own):
            return
        try:
            announcements = decode_announcements(message)
        except ValueError as error:
            _log.warning("a message on channel %a is none of ours: %s", channel, error)
            return
        self._listener.announced(announcements)

    def _take_beat(self, _connection: Any, _pid: int, _channel: str, message: str) -> None:
        if message == self._expected:
            self._returned.set()

    async def _prove(self, number: int) -> None:
        """Prove that what is announced arrives here."""
        self._expected = f"{number}"
        self._returned.clear()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                rows = await self._link.rows(_NOTIFY, self._channels.beat, self._expected)
                if isinstance(rows, PostgresError):
                    raise Refused(rows, self._link.where)
                await self._returned.wait()
        except TimeoutError:
            raise Lost(
                f"announcements do not arrive: a heartbeat did not come back within "
                f"{self._timeout_seconds:g} s"
            ) from None

    async def _tidy(self) -> None:
        """Remove what has expired, now and then."""
        while True:
            await asyncio.sleep(self._heartbeat_seconds)
            try:
                # A thousand at once, with pauses: others get a turn.
                while await self._remove_expired():  # noqa: ASYNC110
                    await asyncio.sleep(_BETWEEN_REMOVALS_SECONDS)
            except PersistenceError as error:
                _log.warning("expired rows of the shared tier are not removed now: %s", error)
