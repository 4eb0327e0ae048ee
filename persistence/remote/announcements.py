"""The subscription: what other workers commit, and the proof that it still arrives.

One connection listens on two channels: the namespace's announcements, and this worker's own
heartbeat. Every ``redis.heartbeat_seconds`` a beat is published *through every primary* and must
come back over the subscription within ``redis.timeout_seconds``. A PING on the subscribing
connection would not do: on Cluster, announcements travel from node to node, and it is that way
that may be broken. What follows when a beat does not come back is in `subscription`.

Plain channels on Cluster too: a sharded channel must live in the slot of the script's keys, so
there would have to be one for each of 16,384 slots.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection

from persistence.errors import PersistenceError
from persistence.remote.contract import Listener
from persistence.remote.exchanges import Fault, Lost
from persistence.remote.faults import Refused
from persistence.remote.keys import Keys
from persistence.remote.layout import announcing_worker, decode_announcements, pack_command
from persistence.remote.subscription import Subscription
from persistence.remote.topology import Topology

_log = logging.getLogger("persistence.remote")


class RedisSubscription(Subscription):
    """Keeps one listener informed until it is closed.

    Args:
        topology: where the servers are.
        keys: names of the channels.
        worker: this worker's id; its own announcements are not passed on.
        listener: who is told.
        epoch: returns the id of the tier's content.
        heartbeat_seconds: between two beats.
        timeout_seconds: within which one must come back.
    """

    def __init__(
        self,
        topology: Topology,
        keys: Keys,
        worker: bytes,
        listener: Listener,
        *,
        epoch: Callable[[], Awaitable[bytes]],
        heartbeat_seconds: float,
        timeout_seconds: float,
    ) -> None:
        self._topology = topology
        self._commits = keys.commits
        self._beat_channel = keys.beat(worker)
        self._worker = worker
        self._timeout_seconds = timeout_seconds
        self._beats: set[bytes] = set()
        self._returned = asyncio.Event()
        super().__init__(listener, epoch, heartbeat_seconds)

    async def _rediscover(self) -> None:
        try:
            await self._topology.discover()
        except (Fault, PersistenceError) as error:
            _log.debug("the servers of the shared tier could not be looked up: %s", error)

    async def _listen(self) -> None:
        """Subscribe, and pass messages on until something breaks."""
        link = self._topology.primaries()[0]
        connection = await link.connect()
        try:
            await self._subscribe(connection, link.where)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(connection, link.where))
                group.create_task(self._beat())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            await connection.disconnect(nowait=True)

    async def _subscribe(self, connection: AbstractConnection, where: str) -> None:
        command = pack_command((b"SUBSCRIBE", self._commits, self._beat_channel))
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await connection.send_packed_command(command, check_health=False)
                for _ in range(2):
                    await connection.read_response(push_request=True)
        except redis_errors.ResponseError as error:
            raise Refused(error, where) from error
        except (redis_errors.RedisError, OSError) as error:
            raise Lost(f"Redis at {where} does not let us subscribe: {error}") from error

    async def _read(self, connection: AbstractConnection, where: str) -> None:
        while True:
            try:
                message = await connection.read_response(push_request=True)
            except (redis_errors.RedisError, OSError) as error:
                raise Lost(f"Redis at {where}: {error}") from error
            self._receive(message)

    def _receive(self, message: Any) -> None:
        kind, channel, data = message[:3]
        if kind != b"message":
            return
        if channel == self._beat_channel:
            self._beats.discard(data)
            if not self._beats:
                self._returned.set()
        elif announcing_worker(data) != self._worker:
            try:
                self._listener.announced(decode_announcements(data))
            except ValueError as error:
                _log.warning("a message on channel %a is none of ours: %s", channel, error)

    async def _prove(self, number: int) -> None:
        """Prove that what is published anywhere arrives here."""
        links = self._topology.primaries()
        beats = {b"%d:%d" % (number, place): link for place, link in enumerate(links)}
        self._beats = set(beats)
        self._returned.clear()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                for beat, link in beats.items():
                    reply = await link.ask(b"PUBLISH", self._beat_channel, beat)
                    if isinstance(reply, Exception):
                        raise Refused(reply, link.where)
                await self._returned.wait()
        except TimeoutError:
            raise Lost(
                f"announcements do not arrive: a heartbeat did not come back within "
                f"{self._timeout_seconds:g} s"
            ) from None
