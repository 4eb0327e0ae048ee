"""Which server a key lives on: one, the primary that the sentinels name, or a Cluster's nodes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, Protocol

from redis.asyncio.connection import AbstractConnection

from persistence.errors import ConfigError, RemoteUnavailable
from persistence.remote.connect import maker, sentinel_maker
from persistence.remote.exchanges import Fault, Unsent
from persistence.remote.faults import Refused
from persistence.remote.keys import CLUSTER_SLOTS, slot_of
from persistence.remote.link import Link
from persistence.remote.urls import Target

_log = logging.getLogger("persistence.remote")

Address = tuple[str, int]
_NOWHERE: Final = ("", 0)


class Topology(Protocol):
    """Knows the servers. Links stay the same objects as long as their servers are the same."""

    routes_by_slot: bool
    """Whether keys of one command must be in the same slot."""

    async def discover(self) -> bool:
        """Find the servers (again); return whether anything changed.

        Raises:
            Fault: nobody who could tell answers.
            ConfigError: those who can tell know of no such service or cluster.
        """

    def link_of(self, key: bytes) -> Link:
        """Return the link to the primary that has `key`; any for an empty key."""

    def link_at(self, address: Address) -> Link:
        """Return the link to a server that a redirection names."""

    def primaries(self) -> list[Link]:
        """Return the links to all primaries; at least one once `discover` has succeeded."""

    async def close(self) -> None:
        """Close all links."""


class _Links:
    """Makes links, one for each address."""

    def __init__(self, target: Target, max_connections: int, timeout_seconds: float) -> None:
        self.target = target
        self.timeout_seconds = timeout_seconds
        self._max_connections = max_connections
        self._links: dict[Address, Link] = {}

    def at(self, address: Address) -> Link:
        link = self._links.get(address)
        if link is None:
            socket = address == _NOWHERE
            where = f"unix:{self.target.path}" if socket else f"{address[0]}:{address[1]}"
            make = maker(self.target, None if socket else address, self.timeout_seconds)
            link = self._links[address] = self._link(where, make)
        return link

    def _link(self, where: str, make: Callable[[], AbstractConnection]) -> Link:
        return Link(where, make, self._max_connections, self.timeout_seconds)

    def to_sentinel(self, address: Address) -> Link:
        make = sentinel_maker(self.target, address, self.timeout_seconds)
        return Link(f"sentinel {address[0]}:{address[1]}", make, 1, self.timeout_seconds)

    async def keep_only(self, addresses: set[Address]) -> None:
        for address in self._links.keys() - addresses:
            await self._links.pop(address).close()

    async def close(self) -> None:
        await self.keep_only(set())


class Standalone:
    """One server."""

    routes_by_slot = False

    def __init__(self, links: _Links) -> None:
        target = links.target
        self._links = links
        self._link = links.at(_NOWHERE if target.path else target.addresses[0])

    async def discover(self) -> bool:
        """Nothing to find: it is where the URL says."""
        return False

    def link_of(self, key: bytes) -> Link:
        """Return the one link there is."""
        return self._link

    def link_at(self, address: Address) -> Link:
        """Return the one link there is: it redirects to nowhere else."""
        return self._link

    def primaries(self) -> list[Link]:
        """Return the one link there is."""
        return [self._link]

    async def close(self) -> None:
        """Close it."""
        await self._links.close()


class Sentinel:
    """The primary of a service, as the sentinels say."""

    routes_by_slot = False

    def __init__(self, links: _Links) -> None:
        self._links = links
        self._address: Address = _NOWHERE

    async def discover(self) -> bool:
        """Ask one sentinel after the other until one names the primary."""
        target = self._links.target
        faults: list[str] = []
        unknown = False
        for sentinel in target.addresses:
            link = self._links.to_sentinel(sentinel)
            try:
                reply = await link.ask(
                    b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", target.service.encode()
                )
            except Fault as fault:
                faults.append(str(fault))
                continue
            finally:
                await link.close()
            if isinstance(reply, list):
                return await self._move_to((reply[0].decode(), int(reply[1])))
            unknown = unknown or reply is None
            faults.append(f"{link.where}: {reply}")
        if unknown:
            raise ConfigError(f"redis.url: no sentinel knows a service {target.service!a}")
        raise Unsent(f"no sentinel names the primary of {target.service!a}: {'; '.join(faults)}")

    async def _move_to(self, address: Address) -> bool:
        if address == self._address:
            return False
        _log.info("the primary of %a is %s:%d", self._links.target.service, *address)
        self._address = address
        self._links.at(address)
        await self._links.keep_only({address})
        return True

    def link_of(self, key: bytes) -> Link:
        """Return the link to the primary."""
        if self._address == _NOWHERE:
            raise RemoteUnavailable("the sentinels have not named a primary yet")
        return self._links.at(self._address)

    def link_at(self, address: Address) -> Link:
        """Return the link to the primary: it redirects to nowhere else."""
        return self.link_of(b"")

    def primaries(self) -> list[Link]:
        """Return the link to the primary."""
        return [self.link_of(b"")]

    async def close(self) -> None:
        """Close all links."""
        await self._links.close()


class Cluster:
    """The primaries of a Redis Cluster, by slot."""

    routes_by_slot = True

    def __init__(self, links: _Links) -> None:
        self._links = links
        self._slots: list[Address] = []
        self._primaries: list[Address] = []

    async def discover(self) -> bool:
        """Ask a node that is known for the map of slots."""
        faults: list[str] = []
        for address in dict.fromkeys((*self._primaries, *self._links.target.addresses)):
            link = self._links.at(address)
            try:
                reply = await link.ask(b"CLUSTER", b"SLOTS")
            except Refused:
                raise
            except Fault as fault:
                faults.append(str(fault))
                continue
            if isinstance(reply, Exception):
                raise Refused(reply, link.where)
            if reply:
                return await self._take(reply, address[0])
            faults.append(f"{link.where} knows no slots")
        raise Unsent(f"no node of the Redis Cluster tells its slots: {'; '.join(faults)}")

    async def _take(self, reply: list[list[object]], asked_host: str) -> bool:
        slots = [_NOWHERE] * CLUSTER_SLOTS
        for first, last, primary, *_ in reply:
            assert isinstance(first, int), "CLUSTER SLOTS starts with numbers"
            assert isinstance(last, int), "CLUSTER SLOTS starts with numbers"
            assert isinstance(primary, list), "CLUSTER SLOTS goes on with nodes"
            host = primary[0].decode() if primary[0] else asked_host
            slots[first : last + 1] = [(host, int(primary[1]))] * (last + 1 - first)
        changed = slots != self._slots
        self._slots = slots
        self._primaries = [place for place in dict.fromkeys(slots) if place != _NOWHERE]
        for address in self._primaries:
            self._links.at(address)
        await self._links.keep_only(set(self._primaries) | set(self._links.target.addresses))
        return changed

    def link_of(self, key: bytes) -> Link:
        """Return the link to the primary that has the slot of `key`."""
        if not self._slots:
            raise RemoteUnavailable("the nodes of the Redis Cluster are not known yet")
        address = self._slots[slot_of(key)] if key else self._primaries[0]
        if address == _NOWHERE:
            raise RemoteUnavailable(f"no node of the Redis Cluster serves slot {slot_of(key)}")
        return self._links.at(address)

    def link_at(self, address: Address) -> Link:
        """Return the link to a node."""
        return self._links.at(address)

    def primaries(self) -> list[Link]:
        """Return the links to all primaries."""
        if not self._primaries:
            raise RemoteUnavailable("the nodes of the Redis Cluster are not known yet")
        return [self._links.at(address) for address in self._primaries]

    async def close(self) -> None:
        """Close all links."""
        await self._links.close()


def topology_of(target: Target, max_connections: int, timeout_seconds: float) -> Topology:
    """Return the topology that `target` is of."""
    links = _Links(target, max_connections, timeout_seconds)
    if target.kind == "sentinel":
        return Sentinel(links)
    return Cluster(links) if target.kind == "cluster" else Standalone(links)
