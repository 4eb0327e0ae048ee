"""Sends calls to the servers that their keys live on, and sends again what may be sent again.

Every call given to `Router.settle` is idempotent: reads, and the commit script, which knows each
commit id that it has applied. That is the one condition under which anything is ever repeated.

After a reply that makes a repetition necessary, the calls of the same route *behind* it are
repeated too: they may build on it, and were executed without it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import Sequence
from importlib import resources
from typing import Any, Final, NamedTuple

from redis import exceptions as redis_errors

from persistence.clock import Clock
from persistence.errors import PersistenceError
from persistence.remote.exchanges import Fault, Lost, Unsent
from persistence.remote.faults import code_of
from persistence.remote.keys import slot_of
from persistence.remote.layout import pack_command
from persistence.remote.link import Call, Command, Link
from persistence.remote.topology import Topology

_log = logging.getLogger("persistence.remote")

_FIRST_PAUSE_SECONDS: Final = 0.01
_LONGEST_PAUSE_SECONDS: Final = 0.5
_SOONER: Final = 3
_ELSEWHERE: Final = frozenset({"MOVED", "READONLY"})
_PASSING: Final = frozenset({"MOVED", "ASK", "TRYAGAIN", "NOSCRIPT"})


class Script:
    """A Lua script of this package.

    Args:
        name: of its file.
    """

    def __init__(self, name: str) -> None:
        self.source = resources.files(__package__).joinpath("scripts", name).read_bytes()
        # The name that Redis gives to a script; nothing secret about it.
        self.sha = hashlib.sha1(self.source, usedforsecurity=False).hexdigest().encode()


class ScriptCall:
    """A script, its keys (on Cluster all of one slot) and its arguments."""

    __slots__ = ("arguments", "keys", "script")

    def __init__(self, script: Script, keys: Sequence[bytes], arguments: Sequence[bytes]) -> None:
        self.script = script
        self.keys = keys
        self.arguments = arguments

    @property
    def key(self) -> bytes:
        """The key that says which server it is for."""
        return self.keys[0]

    def pack(self) -> list[bytes]:
        """Return it in the protocol's bytes, in pieces."""
        start = (b"EVALSHA", self.script.sha, b"%d" % len(self.keys))
        return pack_command((*start, *self.keys, *self.arguments))


class Settled(NamedTuple):
    """What became of a call.

    Attributes:
        reply: the last reply, which may be an error that the server answered, or a `Fault`.
        was_lost: whether a sending of it got no reply, so that it may have been executed.
        is_outdated: the reply is of an earlier sending; the last one got none.
    """

    reply: Any
    was_lost: bool
    is_outdated: bool


class Router:
    """Sends calls to where their keys are.

    Args:
        topology: knows where that is.
        clock: process time.
    """

    def __init__(self, topology: Topology, clock: Clock) -> None:
        self._topology = topology
        self._monotonic = clock.monotonic
        self.repeated = 0
        """Calls that were sent again."""

    async def settle(self, calls: Sequence[Call], *, lost_seconds: float) -> list[Settled]:
        """Send `calls`, in order per route, until each has a final reply.

        Args:
            calls: idempotent ones.
            lost_seconds: for how long to go on with those whose reply was lost.
        """
        replies: list[Any] = [None] * len(calls)
        lost = [False] * len(calls)
        outdated = [False] * len(calls)
        pending = list(range(len(calls)))
        start = self._monotonic()
        pause = 0.0
        while pending:
            found = await self._send([calls[index] for index in pending])
            again = []
            for index, reply in zip(pending, found, strict=True):
                lost[index] = lost[index] or isinstance(reply, Lost)
                # A reply that was there before is better than none.
                outdated[index] = isinstance(reply, Lost) and _is_reply(replies[index])
                if not outdated[index]:
                    replies[index] = reply
                if isinstance(reply, Exception):
                    again.append(index)
            # Who cannot even be reached is given up sooner than who takes requests and is silent.
            gone = any(isinstance(reply, Unsent) for reply in found)
            waited = self._monotonic() - start
            if not again or waited >= (lost_seconds / _SOONER if gone else lost_seconds):
                break
            again = await self._repairable(calls, again, _by_index(pending, found), lost)
            pending = self._with_successors(calls, pending, again)
            if pending:
                self.repeated += len(pending)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
                pause = min(max(2 * pause, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
        return list(map(Settled, replies, lost, outdated))

    async def _send(self, calls: list[Call]) -> list[Any]:
        """Send `calls` once: each server's in one pipeline, all servers at the same time."""
        by_link: dict[Link, list[int]] = {}
        replies: list[Any] = [None] * len(calls)
        for index, call in enumerate(calls):
            try:
                link = self._topology.link_of(call.key)
            except PersistenceError as error:
                replies[index] = Unsent(str(error))
                continue
            by_link.setdefault(link, []).append(index)

        async def send(link: Link, indexes: list[int]) -> None:
            found = await link.exchange([calls[index] for index in indexes])
            for index, reply in zip(indexes, found, strict=True):
                replies[index] = reply
                if isinstance(reply, Exception) and code_of(reply) == "ASK":
                    replies[index] = await self._ask_elsewhere(reply, calls[index])

        if len(by_link) == 1:
            [(link, indexes)] = by_link.items()
            await send(link, indexes)
        else:
            async with asyncio.TaskGroup() as group:
                for link, indexes in by_link.items():
                    group.create_task(send(link, indexes))
        return replies

    async def _ask_elsewhere(self, redirection: Exception, call: Call) -> Any:
        """Send one call to the node that its slot is moving to."""
        # The answer ends with host:port; not every redis-py has a class for it.
        host, _, port = str(redirection).rpartition(" ")[2].rpartition(":")
        link = self._topology.link_at((host, int(port)))
        reply = (await link.exchange([Command(b"ASKING"), call]))[1]
        if isinstance(call, ScriptCall) and isinstance(reply, redis_errors.NoScriptError):
            await link.exchange([Command(b"SCRIPT", b"LOAD", call.script.source)])
            reply = (await link.exchange([Command(b"ASKING"), call]))[1]
        return reply

    async def _repairable(
        self, calls: Sequence[Call], failed: list[int], found: dict[int, Any], lost: list[bool]
    ) -> list[int]:
        """Return which of the failed calls to send again, after doing what that needs."""
        codes = {index: code_of(found[index]) for index in failed}
        await self._load_scripts([calls[i] for i in failed if codes[i] == "NOSCRIPT"])
        suspects = [i for i in failed if isinstance(found[i], Fault) or codes[i] in _ELSEWHERE]
        moved = set(suspects) if suspects and await self.rediscover() else set()
        return [i for i in failed if lost[i] or codes[i] in _PASSING or i in moved]

    async def rediscover(self) -> bool:
        """Look again where the servers are; return whether anything changed."""
        try:
            return await self._topology.discover()
        except (Fault, PersistenceError) as error:
            _log.debug("the servers of the shared tier could not be looked up: %s", error)
            return False

    async def _load_scripts(self, calls: Sequence[Call]) -> None:
        try:
            missing = {
                (self._topology.link_of(call.key), call.script)
                for call in calls
                if isinstance(call, ScriptCall)
            }
            for link, script in missing:
                await link.ask(b"SCRIPT", b"LOAD", script.source)
        except (Fault, PersistenceError) as error:
            _log.debug("a script could not be loaded: %s", error)

    def _with_successors(
        self, calls: Sequence[Call], pending: list[int], again: list[int]
    ) -> list[int]:
        """Return `again` and those of `pending` that may build on one of them."""
        routes: set[object] = set()
        wanted = set(again)
        found = []
        for index in pending:
            route = self._route(calls[index].key)
            if index in wanted or route in routes:
                routes.add(route)
                found.append(index)
        return found

    def _route(self, key: bytes) -> object:
        return slot_of(key) if self._topology.routes_by_slot else None

    def groups(self, keys: Sequence[bytes], limit: int) -> list[list[int]]:
        """Return the indexes of `keys` in groups that one command may take, in order per key."""
        if not self._topology.routes_by_slot:
            every = range(len(keys))
            return [list(every[start : start + limit]) for start in every[::limit]]
        by_route: dict[object, list[list[int]]] = {}
        for index, key in enumerate(keys):
            groups = by_route.setdefault(self._route(key), [[]])
            if len(groups[-1]) == limit:
                groups.append([])
            groups[-1].append(index)
        return [group for groups in by_route.values() for group in groups]


def _is_reply(found: Any) -> bool:
    return found is not None and not isinstance(found, Exception)


def _by_index(indexes: Sequence[int], values: Sequence[Any]) -> dict[int, Any]:
    """Return `values` by index."""
    return dict(zip(indexes, values, strict=True))
