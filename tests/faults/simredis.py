"""A shared tier in memory: what `commit.lua` does, and a network that loses, delays and repeats.

`Server` is the state and the script's rules; `tests/faults/test_simredis.py` compares it with real
servers, request by request. `SimulatedTier` is one worker's connection to it, with what
`remote.committer` and `remote.announcements` promise: a request is sent again until its outcome is
known or three timeouts are over; announcements arrive in order, late, or not at all, and then the
subscription breaks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextvars import copy_context
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Final, TypeVar

from persistence import record as rec
from persistence.errors import PersistenceError, RemoteUnavailable, WriteOutcomeUnknown
from persistence.record import NO_ID
from persistence.remote.contract import (
    APPLIED,
    IDS_REMEMBERED,
    Announcement,
    CommitResult,
    Delete,
    Listener,
    Outcome,
    Put,
    RemoteSession,
    Request,
    Stored,
    Touch,
)

T = TypeVar("T")

_LOST_TIMEOUTS: Final = 3
_FIRST_PAUSE_SECONDS: Final = 0.01
_LONGEST_PAUSE_SECONDS: Final = 0.3


@dataclass(slots=True)
class Entry:
    """One key: a session, or a tombstone."""

    lives: bool
    version: int
    incarnation: bytes
    ids: list[bytes]
    expires: float
    session: RemoteSession | None = None
    of_nothing: bool = False

    @property
    def stored(self) -> Stored:
        """What the tier says of it without its data."""
        return Stored(self.lives, self.version, self.incarnation, self.ids[0])


class Server:
    """The state of a server, and what its script does with it.

    Args:
        wall: the server's clock, Unix seconds.
        new_id: returns random bytes, as many as asked for.
        tombstone_seconds: for how long it is remembered that a session was ended.
    """

    def __init__(
        self,
        wall: Callable[[], float],
        new_id: Callable[[int], bytes],
        tombstone_seconds: float = 86_400.0,
    ) -> None:
        self.epoch = new_id(16)
        self.entries: dict[str, Entry] = {}
        self._wall = wall
        self._new_id = new_id
        self._tombstone_seconds = tombstone_seconds

    def snapshot(self) -> tuple[bytes, dict[str, Entry]]:
        """Return what a replica has."""
        entries = {sid: copy(entry) for sid, entry in self.entries.items()}
        for entry in entries.values():
            entry.ids = list(entry.ids)
        return self.epoch, entries

    def go_back(self, snapshot: tuple[bytes, dict[str, Entry]]) -> None:
        """Have what a replica has."""
        self.epoch, self.entries = snapshot

    def empty(self) -> None:
        """Lose everything."""
        self.epoch, self.entries = self._new_id(16), {}

    def find(self, session_id: str) -> Entry | None:
        """Return what is there of a session."""
        entry = self.entries.get(session_id)
        if entry is not None and entry.expires <= self._wall():
            del self.entries[session_id]
            return None
        return entry

    def load(self, session_id: str) -> RemoteSession | Stored | None:
        """Return what `RemoteTier.load` does."""
        entry = self.find(session_id)
        if entry is None:
            return None
        history = tuple(entry.ids[:IDS_REMEMBERED])
        return (entry.stored if entry.session is None else entry.session)._replace(history=history)

    def commit(
        self, requests: Sequence[Request], worker: bytes
    ) -> tuple[list[CommitResult], list[Announcement]]:
        """Apply requests in order; return what becomes of each, and what is announced."""
        told: list[Announcement] = []
        results = [self._apply(request, worker, told) for request in requests]
        return results, told

    def _apply(self, request: Request, worker: bytes, told: list[Announcement]) -> CommitResult:
        entry = self.find(request.session_id)
        if isinstance(request, Touch):
            return _with(self._touch(entry, request), entry)
        objection = _objection(entry, request)
        if objection is not None:
            return _with(objection, entry)._replace(
                may_be_forgotten=_may_be_forgotten(objection, entry, request)
            )
        made = _put(entry, request) if isinstance(request, Put) else self._end(entry, request)
        self.entries[request.session_id] = made
        ended = not made.lives
        told.append(Announcement(request.session_id, made.version, made.ids[0], ended, worker))
        return CommitResult(Outcome.MISSING) if made.of_nothing else APPLIED

    def _end(self, entry: Entry | None, request: Delete) -> Entry:
        expires = self._wall() + self._tombstone_seconds
        if entry is None:
            return Entry(False, 0, request.incarnation, [request.commit], expires, None, True)
        ids = [request.commit, *entry.ids[: IDS_REMEMBERED - 1]]
        return Entry(False, entry.version, entry.incarnation, ids, expires)

    def _touch(self, entry: Entry | None, request: Touch) -> Outcome:
        if entry is None:
            return Outcome.MISSING
        if entry.session is None:
            return Outcome.TERMINATED
        if entry.ids[0] != request.commit:
            return Outcome.CONFLICT
        if request.accessed >= entry.session.accessed:
            entry.session = entry.session._replace(
                accessed=request.accessed, deadline=request.deadline
            )
            entry.expires = request.deadline
        return Outcome.APPLIED


def _doubted(results: list[CommitResult]) -> list[CommitResult]:
    """Take for unknown what a tier that has lost a reply cannot tell."""
    unknown = WriteOutcomeUnknown("the simulated tier: applied or not, that is forgotten")
    return [
        CommitResult(Outcome.UNKNOWN, None, unknown) if result.may_be_forgotten else result
        for result in results
    ]


def _put(entry: Entry | None, request: Put) -> Entry:
    record = request.record
    before = [] if entry is None else entry.ids[: IDS_REMEMBERED - 1]
    return Entry(
        True,
        rec.version_of(record),
        rec.incarnation_of(record),
        [rec.commit_of(record), *before],
        request.deadline,
        RemoteSession(record, request.accessed, request.deadline, request.cap),
    )


def _with(outcome: Outcome, entry: Entry | None) -> CommitResult:
    if outcome is Outcome.APPLIED:
        return APPLIED
    shown = outcome in {Outcome.CONFLICT, Outcome.TERMINATED, Outcome.ALREADY_APPLIED}
    return CommitResult(outcome, entry.stored if entry is not None and shown else None)


def _may_be_forgotten(objection: Outcome, entry: Entry | None, request: Put | Delete) -> bool:
    refused = objection in {Outcome.CONFLICT, Outcome.TERMINATED}
    if entry is None or not refused or isinstance(request, Delete):
        return False
    if request.base == NO_ID:
        return len(entry.ids) >= IDS_REMEMBERED - 1
    return request.base not in entry.ids


def _objection(entry: Entry | None, request: Put | Delete) -> Outcome | None:  # noqa: PLR0911
    """Return why it cannot be applied: `objection` of the script, line by line."""
    creates = isinstance(request, Put) and request.base == NO_ID
    ends = isinstance(request, Delete)
    commit = request.commit if isinstance(request, Delete) else rec.commit_of(request.record)
    if entry is None:
        return None if creates or ends else Outcome.MISSING
    newest = entry.ids[0]
    if entry.lives and newest == request.base and not creates and not ends:
        return None
    if commit in entry.ids:
        if entry.of_nothing and newest == commit:
            return Outcome.MISSING
        return Outcome.ALREADY_APPLIED
    if isinstance(request, Put):
        same = entry.incarnation == rec.incarnation_of(request.record)
    else:
        same = entry.incarnation == request.incarnation
    if creates:
        if entry.lives:
            return Outcome.CONFLICT
        return Outcome.TERMINATED if same else None
    if not entry.lives:
        return Outcome.TERMINATED
    if isinstance(request, Put):
        return Outcome.CONFLICT
    if request.incarnation != NO_ID and not same:
        return Outcome.CONFLICT
    if request.base not in {NO_ID, newest}:
        return Outcome.CONFLICT
    return None


# --- the network ----------------------------------------------------------------------------------


class _Unsent(Exception):
    """It did not get there, certainly."""


class _Lost(Exception):
    """It was sent, and no reply came."""


@dataclass
class Network:
    """Between the workers and the server: what goes wrong there, now.

    Args:
        server: the server.
        chance: of delays and losses.

    Attributes:
        is_up: whether the server runs.
        hangs: whether it is stopped, with its connections open.
        cut_off: the workers that do not reach it.
        loses: the odds that something is lost on its way.
        delay_seconds: how long anything takes on its way, at most and nearly always.
        executed_late: how many requests were executed after their senders had given them up.
        lost_replies: how many replies were lost.
    """

    server: Server
    chance: Random
    is_up: bool = True
    hangs: bool = False
    cut_off: set[str] = field(default_factory=set)
    loses: float = 0.0
    delay_seconds: float = 0.002
    executed_late: int = 0
    lost_replies: int = 0
    generation: int = 0
    """Of connections: what was sent over one of an older generation gets no reply."""
    subscriptions: list[_Subscription] = field(default_factory=list)
    _stopped: list[Callable[[], None]] = field(default_factory=list)

    def delay(self) -> float:
        """Return how long something takes on its way, seconds."""
        return self.delay_seconds * self.chance.random()

    def go_down(self) -> None:
        """Let the server end: all connections are gone."""
        self.is_up = False
        self.hangs = False
        self._stopped.clear()
        self.cut()

    def cut(self) -> None:
        """Cut all connections."""
        self.generation += 1
        for each in self.subscriptions:
            each.broken.set()
        self.subscriptions.clear()

    def stop(self) -> None:
        """Let the server hang."""
        self.hangs = self.is_up

    def go_on(self) -> None:
        """Let it go on, with what has come meanwhile."""
        self.hangs = False
        stopped, self._stopped = self._stopped, []
        for execute in stopped:
            self.executed_late += 1
            execute()

    def when_running(self, execute: Callable[[], None]) -> None:
        """Execute something now, or when the server goes on."""
        if self.hangs:
            self._stopped.append(execute)
        elif self.is_up:
            execute()

    def commit(self, requests: Sequence[Request], worker: bytes) -> list[CommitResult]:
        """Run the script; tell the subscribers."""
        results, told = self.server.commit(requests, worker)
        if told:
            for each in self.subscriptions:
                each.publish(told)
        return results


class _Subscription:
    """One connection that listens: what is published arrives there in order.

    Args:
        network: the way to it.
        name: the worker's.
        announced: called with announcements.
    """

    def __init__(
        self, network: Network, name: str, announced: Callable[[list[Announcement]], None]
    ) -> None:
        self.broken = asyncio.Event()
        self.beat = asyncio.Event()
        self._announced = announced
        self._network = network
        self._name = name
        self._last = 0.0
        self._context = copy_context()  # the listener's, not that of whoever publishes

    def publish(self, message: list[Announcement] | None) -> None:
        """Send a message after all others; None: a heartbeat."""
        loop = asyncio.get_running_loop()
        self._last = max(self._last, loop.time() + self._network.delay())
        loop.call_at(self._last, self._arrive, message, context=self._context)

    def _arrive(self, message: list[Announcement] | None) -> None:
        if self.broken.is_set():
            return
        if self._name in self._network.cut_off:  # it is sent again until it gets through
            loop = asyncio.get_running_loop()
            self._last = max(self._last, loop.time() + 0.1)
            loop.call_at(self._last, self._arrive, message, context=self._context)
        elif message is None:
            self.beat.set()
        else:
            self._announced(message)

    def close(self) -> None:
        """Take nothing more."""
        self.broken.set()
        if self in self._network.subscriptions:
            self._network.subscriptions.remove(self)


class SimulatedTier:
    """One worker's shared tier; see `remote.contract.RemoteTier`.

    Args:
        network: the way to the server.
        name: the worker's.
        worker: the id under which it announces.
        timeout_seconds: after which a reply counts as lost.
        heartbeat_seconds: between two proofs that announcements arrive.
    """

    def __init__(
        self,
        network: Network,
        name: str,
        worker: bytes,
        *,
        timeout_seconds: float,
        heartbeat_seconds: float,
    ) -> None:
        self.worker = worker
        self._network = network
        self._name = name
        self._timeout_seconds = timeout_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._turn = asyncio.Lock()
        self._is_dead = False
        self._listening: asyncio.Task[None] | None = None

    def kill(self) -> None:
        """The process is dead: it sends nothing any more."""
        self._is_dead = True

    # --- one exchange -----------------------------------------------------------------------------

    async def _once(self, execute: Callable[[], T]) -> T:
        """Send something once; return the reply.

        Raises:
            _Unsent, _Lost: see there.
        """
        network, chance = self._network, self._network.chance
        await asyncio.sleep(network.delay())
        if self._is_dead:
            await asyncio.Event().wait()
        if self._name in network.cut_off:
            await asyncio.sleep(self._timeout_seconds)
            raise _Unsent("no connection in time")
        if not network.is_up:
            raise _Unsent("connection refused")
        generation = network.generation
        fate = chance.random()
        reply: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def run() -> None:
            result = execute()
            if not reply.done():
                reply.set_result(result)

        if fate < network.loses / 3:
            await asyncio.sleep(self._timeout_seconds * chance.random())
            raise _Lost("the connection broke")
        if fate < 2 * network.loses / 3:  # it stands still on its way, and arrives all the same
            network.executed_late += 1
            loop = asyncio.get_running_loop()
            loop.call_later(2 * self._timeout_seconds * chance.random(), network.when_running, run)
            await asyncio.sleep(self._timeout_seconds * chance.random())
            raise _Lost("the connection broke")
        network.when_running(run)
        if fate < network.loses:
            network.lost_replies += 1
            await asyncio.sleep(self._timeout_seconds * chance.random())
            raise _Lost("the connection broke")
        try:
            async with asyncio.timeout(self._timeout_seconds):
                found = await reply
                await asyncio.sleep(network.delay())
        except TimeoutError:
            raise _Lost("no reply in time") from None
        if generation != network.generation or self._name in network.cut_off:
            network.lost_replies += 1
            raise _Lost("the connection broke")
        return found

    async def _settle(
        self,
        execute: Callable[[], T],
        lost_seconds: float,
        doubted: Callable[[T], T] = lambda reply: reply,
    ) -> T:
        """Send something until there is a reply; see `remote.router.Router.settle`."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        pause = 0.0
        was_lost = False
        while True:
            gone = False
            try:
                reply = await self._once(execute)
                return doubted(reply) if was_lost else reply
            except _Unsent as error:
                if not was_lost:
                    raise
                gone, why = True, str(error)
            except _Lost as error:
                was_lost, why = True, str(error)
            if loop.time() - start >= (lost_seconds / _LOST_TIMEOUTS if gone else lost_seconds):
                raise _Lost(why)
            await asyncio.sleep(pause * self._network.chance.random())
            pause = min(max(2 * pause, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)

    async def _ask(self, execute: Callable[[], T]) -> T:
        try:
            return await self._settle(execute, self._timeout_seconds)
        except (_Unsent, _Lost) as error:
            raise RemoteUnavailable(f"the simulated tier: {error}") from None

    # --- the contract -----------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect."""
        await self._ask(lambda: None)

    async def close(self) -> None:
        """Stop listening."""
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def load(self, session_id: str) -> RemoteSession | Stored | None:
        """Return the session."""
        return await self._ask(lambda: self._network.server.load(session_id))

    async def load_many(
        self, session_ids: Sequence[str]
    ) -> list[RemoteSession | Stored | PersistenceError | None]:
        """Return the sessions."""
        server = self._network.server
        return await self._ask(lambda: [server.load(sid) for sid in session_ids])

    async def stored(self, session_ids: Sequence[str]) -> list[Stored | None]:
        """Return what is stored of the sessions."""

        def execute() -> list[Stored | None]:
            entries = [self._network.server.find(sid) for sid in session_ids]
            return [None if entry is None else entry.stored for entry in entries]

        return await self._ask(execute)

    async def commit(self, requests: Sequence[Request]) -> list[CommitResult]:
        """Apply requests in order."""
        if not requests:
            return []
        kept = list(requests)
        async with self._turn:
            try:
                return await self._settle(
                    lambda: self._network.commit(kept, self.worker),
                    _LOST_TIMEOUTS * self._timeout_seconds,
                    _doubted,
                )
            except _Unsent as error:
                refused = RemoteUnavailable(f"the simulated tier: {error}")
                return [CommitResult(Outcome.REFUSED, None, refused)] * len(kept)
            except _Lost as error:
                unknown = WriteOutcomeUnknown(f"the simulated tier: {error}")
                return [CommitResult(Outcome.UNKNOWN, None, unknown)] * len(kept)

    async def scan(self, prefix: str = "") -> AsyncIterator[list[str]]:
        """Yield the ids of live sessions."""
        server = self._network.server
        yield await self._ask(
            lambda: [
                sid
                for sid in list(server.entries)
                if sid.startswith(prefix) and (entry := server.find(sid)) and entry.lives
            ]
        )

    async def epoch(self) -> bytes:
        """Return the id of the tier's content."""
        return await self._ask(lambda: self._network.server.epoch)

    async def ping(self) -> float:
        """Return how long an answer takes."""
        start = asyncio.get_running_loop().time()
        try:
            await self._once(lambda: None)
        except (_Unsent, _Lost) as error:
            raise RemoteUnavailable(f"the simulated tier: {error}") from None
        return asyncio.get_running_loop().time() - start

    async def subscribe(self, listener: Listener) -> None:
        """Listen."""
        await self.close()
        self._listening = asyncio.create_task(self._listen_on(listener), name="sim-subscription")

    async def _listen_on(self, listener: Listener) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            if await self._listen(listener):
                listener.disconnected()
                pause = _FIRST_PAUSE_SECONDS
            await asyncio.sleep(pause * (0.5 + self._network.chance.random() / 2))
            pause = min(2 * pause, 1.0)

    async def _listen(self, listener: Listener) -> bool:
        """Listen until something breaks; return whether the listener was told to be connected."""
        was_connected = False

        def announced(message: list[Announcement]) -> None:
            if message[0].worker != self.worker and not self._is_dead:
                listener.announced(message)

        subscription = _Subscription(self._network, self._name, announced)
        try:
            await self._once(partial(self._network.subscriptions.append, subscription))
            while not subscription.broken.is_set():
                await self._prove(subscription)
                if not was_connected:
                    # Only now: what was committed before may have been missed.
                    epoch = await self.epoch()
                    was_connected = True
                    listener.connected(epoch=epoch)
                await _wait(subscription.broken, self._heartbeat_seconds)
        except (_Unsent, _Lost, RemoteUnavailable):
            return was_connected
        finally:
            subscription.close()
        return was_connected

    async def _prove(self, subscription: _Subscription) -> None:
        """See that what is published arrives.

        Raises:
            _Unsent, _Lost: it does not, or not in time.
        """
        subscription.beat.clear()
        await self._once(partial(subscription.publish, None))
        if not await _wait(subscription.beat, self._timeout_seconds):
            raise _Lost("a heartbeat did not come back")


async def _wait(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event, and not for ever; return whether it came."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
