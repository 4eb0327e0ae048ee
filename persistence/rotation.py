"""Giving a session another id: its data moves, the old id is gone, and tokens for it end.

The order: note the intention in a journal of the directory, durably; create the session under its
new id, from the newest version; end the old one, if that version still is the newest; take the
note back. Writers of this worker wait meanwhile, as for an edit.

Invariant: once it is over, exactly one of the two lives. A crash in between leaves both, of which
the new id is known to nobody; the next opening finds the note, and ends the new one if the old one
lives. In a shared tier the end of the old one is refused when another worker has changed it, or
ended it, since: then the new one is ended, and it is done again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from struct import Struct
from typing import Final, NamedTuple

from persistence import record as rec
from persistence.commit import CommitQueue, committed
from persistence.disk.directory import not_usable
from persistence.disk.journal import Journal
from persistence.disk.threads import Threads
from persistence.errors import (
    Overtaken,
    PersistenceError,
    WriteOutcomeUnknown,
    printable,
)
from persistence.ids import check_session_id, new_session_id
from persistence.residency import Residency
from persistence.tasks import look_at
from persistence.updates import Updates

_log = logging.getLogger("persistence.rotation")

_BEGUN: Final = 1
_OVER: Final = 0
_ENTRY: Final = Struct("<B16s16sH")  # what, incarnations (old, new), bytes of the old id; both ids
_REWRITE_BYTES: Final = 64 * 1024


class _Move(NamedTuple):
    old_id: str
    old_incarnation: bytes
    new_incarnation: bytes


class Tiers(NamedTuple):
    """What a rotation works with."""

    updates: Updates
    residency: Residency
    commits: CommitQueue


class Rotations:
    """The rotations of one directory. Every method runs on the event loop.

    Args:
        journal: where those under way are noted.
        threads: runs the journal's calls.
        directory: whose they are, for messages.
        sync: whether notes are synced before they count (``disk.fsync = "always"``).

    Attributes:
        follow: called with both ids and the new incarnation before the old one ends.
        turn_back: called with both ids and the old incarnation when the old one is kept after all.
    """

    def __init__(self, journal: Journal, threads: Threads, directory: str, *, sync: bool) -> None:
        self._journal = journal
        self._directory = directory
        self._threads = threads
        self._sync = sync
        self._pending: dict[str, _Move] = {}
        self._tasks: set[asyncio.Task[str]] = set()
        self.follow: Callable[[str, str, bytes], Awaitable[None]] | None = None
        self.turn_back: Callable[[str, str, bytes], None] | None = None

    async def open(self) -> None:
        """Read what an earlier worker has left.

        Raises:
            DirectoryNotUsable, DiskFull: it cannot be read, or not be mended.
        """
        try:
            entries = await self._threads.write(self._journal.load)
        except OSError as error:
            raise not_usable(self._directory, error) from error
        for entry in entries:
            kind, old, new, old_bytes = _ENTRY.unpack_from(entry)
            ids = entry[_ENTRY.size :]
            old_id, new_id = ids[:old_bytes].decode(), ids[old_bytes:].decode()
            if kind == _BEGUN:
                self._pending[new_id] = _Move(old_id, old, new)
            else:
                self._pending.pop(new_id, None)

    async def settle(
        self,
        look: Callable[[str], Awaitable[bytes | None]],
        end: Callable[[str], Awaitable[object]],
    ) -> None:
        """Let exactly one of the two live of each rotation that an earlier worker left.

        Args:
            look: returns the incarnation of a live session.
            end: ends a session.
        """
        for new_id, move in list(self._pending.items()):
            try:
                old_lives = await look(move.old_id) == move.old_incarnation
                if old_lives and await look(new_id) == move.new_incarnation:
                    await end(new_id)
                await self._over(new_id, move)
            except PersistenceError as error:  # the next opening tries again
                _log.warning("a rotation of %s is not undone: %s", printable(move.old_id), error)

    async def close(self) -> None:
        """Give up what is under way; the next opening settles it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._threads.write(self._journal.close)

    async def rotate(self, tiers: Tiers, session_id: str) -> str:
        """Move a session to a fresh id; return that once it is durable.

        Cancelling only stops waiting.

        Raises:
            SessionNotFound: missing, expired or terminated.
            Overtaken: another worker changed it meanwhile; it is as that one left it.
        """
        check_session_id(session_id)
        await tiers.updates.admit()
        await tiers.updates.prepare(session_id)
        await tiers.updates.locks.acquire(session_id)
        # It has the lock, and gives it back, whatever becomes of the caller.
        task = asyncio.create_task(self._locked(tiers, session_id), name="persistence-rotate")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[str]) -> None:
        self._tasks.discard(task)
        look_at(task)

    async def _locked(self, tiers: Tiers, session_id: str) -> str:
        try:
            return await self._move(tiers, session_id)
        finally:
            tiers.updates.locks.release(session_id)

    async def _move(self, tiers: Tiers, session_id: str) -> str:
        updates, residency, commits = tiers
        key = check_session_id(session_id)
        await commits.outcome(session_id)  # only what is acknowledged is moved
        base = (await residency.base(session_id, key))[0]
        new_id = new_session_id()
        move = _Move(session_id, rec.incarnation_of(base), updates.new_incarnation())
        await self._begin(new_id, move)
        async with residency.disk.wholes.change():
            await self._exchange(updates, residency, new_id, move)
        await self._over(new_id, move)
        return new_id

    async def _exchange(
        self, updates: Updates, residency: Residency, new_id: str, move: _Move
    ) -> None:
        """Create the one and end the other."""
        session_id = move.old_id
        key = session_id.encode()
        is_made = False
        try:
            newest = await residency.base(session_id, key)
            made = updates.copy(newest, new_id, move.new_incarnation)
            await committed(made)
            is_made = True
            if self.follow is not None:
                await self.follow(session_id, new_id, move.new_incarnation)
            now = await residency.base(session_id, key)
            if rec.commit_of(now[0]) != rec.commit_of(newest[0]):
                raise _overtaken(session_id)
            # Nothing has been awaited since it was looked at.
            await committed(residency.submit_delete(session_id, key, exact=True))
        except WriteOutcomeUnknown:
            raise  # nobody knows which of them lives: the next opening settles it
        except PersistenceError:
            await self._undo(residency, new_id, move, is_made=is_made)
            raise

    async def _undo(self, residency: Residency, new_id: str, move: _Move, *, is_made: bool) -> None:
        try:
            if is_made:
                if self.turn_back is not None:
                    self.turn_back(move.old_id, new_id, move.old_incarnation)
                await committed(residency.submit_delete(new_id, new_id.encode()))
            await self._over(new_id, move)
        except PersistenceError as error:  # the next opening tries again
            _log.warning("a rotation of %s is not undone: %s", printable(move.old_id), error)

    async def _begin(self, new_id: str, move: _Move) -> None:
        self._pending[new_id] = move
        try:
            await self._append(_entry(_BEGUN, new_id, move), sync=self._sync)
        except PersistenceError:
            del self._pending[new_id]
            raise

    async def _over(self, new_id: str, move: _Move) -> None:
        """Take a note back. Not synced: one that is there too long finds that all is well."""
        self._pending.pop(new_id, None)
        await self._append(_entry(_OVER, new_id, move), sync=False)
        if self._journal.size_bytes > _REWRITE_BYTES:
            rest = [_entry(_BEGUN, new_id, each) for new_id, each in self._pending.items()]
            await asyncio.shield(self._threads.write(self._journal.rewrite, rest))

    async def _append(self, entry: bytes, *, sync: bool) -> None:
        await asyncio.shield(self._threads.write(self._journal.append, [entry], sync=sync))


def _entry(kind: int, new_id: str, move: _Move) -> bytes:
    old_id = move.old_id.encode()
    front = _ENTRY.pack(kind, move.old_incarnation, move.new_incarnation, len(old_id))
    return front + old_id + new_id.encode()


def _overtaken(session_id: str) -> Overtaken:
    return Overtaken(
        f"session {printable(session_id)} was changed while its id was being rotated; it has kept "
        "its id"
    )
