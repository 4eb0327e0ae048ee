"""Asks what the shared tier has of a session, and lets the local copy follow.

At most one question about a session is under way at a time, shared by all who want to know. A
caller is only answered by a question that was *sent after its call*. The race: another worker ends
a session, we hear of it and ask; before our reply is there, that worker has created the session
anew, and somebody here reads it with ``fresh=True``. If it shared the question that is under way
it would be told that there is no such session, or be given an old version. The same goes for a
question that has been answered already, while the event loop has yet to tell that its task ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from persistence import record as rec
from persistence.commit import Commit, committed
from persistence.errors import PersistenceError, again
from persistence.record import NO_ID
from persistence.remote.contract import IDS_REMEMBERED, RemoteSession, RemoteTier, Stored
from persistence.sharing.conflicts import Conflict, Conflicts
from persistence.sharing.copies import Copies
from persistence.sharing.local import Local
from persistence.sharing.outbox import Branch, Outbox
from persistence.sharing.questions import Questions
from persistence.tasks import look_at


class _Fill:
    """One comparison of a session.

    Attributes:
        asked: its question may be on its way already: who comes now waits for the next one.
        task: does it.
    """

    __slots__ = ("asked", "task")

    task: asyncio.Task[None]

    def __init__(self) -> None:
        self.asked = False


class Fills:
    """Compares sessions with the shared tier. Every method runs on the event loop.

    Args:
        remote: the shared tier.
        copies: which local copies are valid.
        outbox: what the shared tier has not seen.
        conflicts: where what the shared tier has lost is kept.
        local: this worker's own side.
        wake_delivery: called when something was put into the outbox that may be delivered now.
    """

    def __init__(
        self,
        remote: RemoteTier,
        copies: Copies,
        outbox: Outbox,
        conflicts: Conflicts,
        local: Local,
        wake_delivery: Callable[[], None],
    ) -> None:
        self.refreshed = 0
        self._questions = Questions(remote)
        self._copies = copies
        self._outbox = outbox
        self._conflicts = conflicts
        self._kept: dict[str, bytes] = {}
        self._wall = local.clock.wall
        self._residency = local.residency
        self._commits = local.commits
        self._wake_delivery = wake_delivery
        self._newest: dict[str, _Fill] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._why_closed: PersistenceError | None = None

    def __contains__(self, session_id: str) -> bool:
        """Whether a session is being compared."""
        return session_id in self._newest

    async def refresh(self, session_id: str) -> None:
        """Compare a session with the shared tier and take over what is newer there.

        What is here afterwards is at least as new as what the shared tier had when this was
        called.

        Raises:
            ManagerClosed, ConflictError: `close` was called before that was known.
            RemoteUnavailable: the shared tier does not answer.
            RemoteDamaged: what is stored there is damaged, or no session.
        """
        self._check_open()
        fill = self._newest.get(session_id)
        if fill is None or fill.asked:
            fill = self._start(session_id, fill)
        try:
            await asyncio.shield(fill.task)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is None or not caller.cancelling():  # the comparison was, not the caller
                self._check_open()
            raise

    def _check_open(self) -> None:
        if self._why_closed is not None:
            raise again(self._why_closed)

    def _start(self, session_id: str, before: _Fill | None) -> _Fill:
        """Start a comparison, which asks when the one `before` it has ended."""
        fill = _Fill()
        waiting_for = None if before is None else before.task
        fill.task = asyncio.create_task(
            self._run(session_id, fill, waiting_for), name="persistence-fill"
        )
        self._newest[session_id] = fill
        self._tasks.add(fill.task)
        fill.task.add_done_callback(partial(self._ended, session_id, fill))
        return fill

    def _ended(self, session_id: str, fill: _Fill, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._newest.get(session_id) is fill:
            del self._newest[session_id]
        look_at(task)

    async def close(self, why: PersistenceError) -> None:
        """End all comparisons.

        Args:
            why: what whoever waits for one, or comes later, is told.
        """
        self._why_closed = why
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._questions.close()

    # --- one comparison -----------------------------------------------------------------------

    async def _run(
        self, session_id: str, fill: _Fill, waiting_for: asyncio.Task[None] | None
    ) -> None:
        if waiting_for is not None:
            await asyncio.wait([waiting_for])
        in_flight = self._commits.tails.get(session_id)
        while not await self._compare(session_id, fill, in_flight):
            pass

    async def _compare(self, session_id: str, fill: _Fill, in_flight: Commit | None) -> bool:
        """Ask once, and follow; False: what came may be out of date already, so ask again.

        Args:
            session_id: about which session.
            fill: on whose behalf.
            in_flight: the newest commit of the session that was in flight when it began.
        """
        key = session_id.encode()
        generation = self._copies.generation
        mine = await self._residency.peek(session_id, key)
        fill.asked = True
        self._copies.begin_fill(session_id)
        try:
            found = await self._ask(session_id, mine)
        finally:
            announced = self._copies.end_fill(session_id)
        if generation != self._copies.generation:
            return False  # it disconnected meanwhile
        if announced and _commit_id(found) != announced[-1]:
            return False
        if session_id in self._outbox:
            return True  # this worker is ahead
        tail = self._commits.tails.get(session_id)
        if tail is not None:
            # Readers see what is acknowledged, and the tail may be built on less than was found.
            with suppress(PersistenceError):
                await self._commits.decided(session_id)
            # Accepted since this began, so on top of all that was accepted before.
            return tail is not in_flight and tail.shared and not tail.failed
        if not self._is_here(session_id, mine):
            return False  # what is here changed meanwhile, and may be newer than what was found
        was_stale = self._copies.is_stale(session_id)
        if await self._kept_now(session_id, key, mine, found, was_stale=was_stale):
            return False
        self._copies.forget(session_id)  # what is announced from here on is newer than `found`
        await self._follow(session_id, key, mine, found, was_stale=was_stale)
        return True

    async def _kept_now(
        self,
        session_id: str,
        key: bytes,
        mine: bytes | None,
        found: RemoteSession | Stored | bytes | None,
        *,
        was_stale: bool,
    ) -> bool:
        """Keep the local version as a conflict record if the shared tier has lost it.

        Also if it may have: what was newer there is gone, and not all was heard of that happened
        since. It has expired, in all likelihood; or a replica without it took over.

        Returns:
            Whether it has been kept just now: meanwhile there may be something newer there.
        """
        if mine is None or isinstance(found, bytes):
            return False
        if found is None:
            if not was_stale or self._copies.is_stale_for_certain(session_id):
                return False
        elif not was_lost(mine, found):
            return False
        commit = rec.commit_of(mine)
        if self._kept.get(session_id) == commit or not self._residency.is_alive(session_id, key):
            self._kept.pop(session_id, None)
            return False
        ended = not isinstance(found, RemoteSession)
        version = 0
        if found is not None:
            version = found.version if isinstance(found, Stored) else rec.version_of(found.record)
        await self._conflicts.keep(Conflict(session_id, self._wall(), mine, NO_ID, version, ended))
        self._kept[session_id] = commit
        return True

    def _is_here(self, session_id: str, record: bytes | None) -> bool:
        """Whether a record, or none, is still what is here of a session, as far as can be told."""
        commit = self._residency.commit_of(session_id)
        return commit == NO_ID or commit == (None if record is None else rec.commit_of(record))

    async def _ask(
        self, session_id: str, mine: bytes | None
    ) -> RemoteSession | Stored | bytes | None:
        """Return what the shared tier has; the local record itself if it is the same version."""
        if mine is not None and not self._copies.is_stale(session_id):
            stored = await self._questions.stored(session_id)
            if stored is None:
                return None
            if not stored.lives and stored.incarnation == rec.incarnation_of(mine):
                return stored
            if stored.commit == rec.commit_of(mine):
                return mine
        return await self._questions.load(session_id)

    async def _follow(
        self,
        session_id: str,
        key: bytes,
        mine: bytes | None,
        found: RemoteSession | Stored | bytes | None,
        *,
        was_stale: bool,
    ) -> None:
        """Let the local state, which is `mine`, follow what the shared tier has.

        Args:
            session_id: whose.
            key: its id as UTF-8.
            mine: what is here.
            found: what is there.
            was_stale: it has been announced that there was something newer there.
        """
        if isinstance(found, bytes):
            self._copies.validate(session_id)
        elif found is None and was_stale:
            # What was newer is over. The race: its time was shorter, and what is here lives on;
            # brought back there, it would be a session that had ended.
            await self._ended_there(session_id, key)
        elif found is None:
            await self._missing_there(session_id, key)
        elif isinstance(found, Stored):
            await self._ended_there(session_id, key)
        else:
            await self.adopt(session_id, mine, found)

    async def look(self, session_id: str) -> RemoteSession | Stored | None:
        """Return what the shared tier has; see `Questions.load`. Nothing here follows."""
        self._check_open()
        return await self._questions.load(session_id)

    async def adopt(self, session_id: str, mine: bytes | None, found: RemoteSession) -> None:
        """Take over a version that the shared tier has; nothing here is newer, or it lost that.

        Args:
            session_id: whose.
            mine: what is here.
            found: what is there.
        """
        if mine_is_newer(mine, found):
            # It failed over to an older copy: everything acknowledged was there before.
            record = found.record
            branch = Branch(rec.commit_of(record), rec.version_of(record))
            await self._outbox.add({session_id: branch})
            self._wake_delivery()
            return
        generation = self._copies.generation
        await self._residency.adopt(session_id, *self._residency.times_of_remote(found))
        self.refreshed += 1
        if generation == self._copies.generation and not self._copies.is_stale(session_id):
            self._copies.validate(session_id)

    async def _ended_there(self, session_id: str, key: bytes) -> None:
        """It was terminated elsewhere, or has expired."""
        if self._residency.has_copy(session_id):
            await committed(self._residency.submit_delete(session_id, key, local=True))

    async def _missing_there(self, session_id: str, key: bytes) -> None:
        """The shared tier has nothing, not even a tombstone.

        So nobody terminated it: it expired there while a renewal was on its way, or the tier lost
        it. What lives here goes there again.
        """
        if self._residency.is_acknowledged(session_id, key):
            await self._outbox.add({session_id: Branch(NO_ID, 0)})
            self._wake_delivery()


def mine_is_newer(mine: bytes | None, found: RemoteSession) -> bool:
    """Whether the local record is a later version of the same incarnation.

    Only what the shared tier has, or what is in the outbox, is ever acknowledged: so if it is in
    no outbox, the shared tier had it and lost it.
    """
    if mine is None or rec.incarnation_of(mine) != rec.incarnation_of(found.record):
        return False
    return rec.version_of(mine) > rec.version_of(found.record)


def was_lost(mine: bytes, found: RemoteSession | Stored) -> bool:
    """Whether the shared tier went on without an acknowledged version that is here.

    It failed over to an older copy, or came back empty, and somebody else was there first. Then
    its history does not have what was acknowledged, and is not that of a later version either.
    """
    if rec.commit_of(mine) in found.history:
        return False
    if isinstance(found, Stored):  # an end: if it is that of this incarnation, it was meant
        other = found.incarnation != rec.incarnation_of(mine)
        return other and len(found.history) < IDS_REMEMBERED  # else it may be further back
    theirs = found.record
    if rec.incarnation_of(mine) != rec.incarnation_of(theirs):
        return len(found.history) < IDS_REMEMBERED
    same = rec.version_of(mine) == rec.version_of(theirs)
    return same and rec.packed_fields(mine) != rec.packed_fields(theirs)


def _commit_id(found: RemoteSession | Stored | bytes | None) -> bytes | None:
    if found is None:
        return None
    if isinstance(found, bytes):
        return rec.commit_of(found)
    return found.commit if isinstance(found, Stored) else rec.commit_of(found.record)
