"""A private directory for a session: random name, removed with the session, there after a restart.

They lie in ``scratch/`` of the worker's directory and belong to this worker. Which one is whose is
in the journal ``SCRATCH`` (`disk.journal`): an entry is durable before the directory exists, so a
crash leaves no directory that nobody knows. No session id is part of a path.

Invariants:
- a directory belongs to one incarnation of a session; a session of the same id gets another one.
- at opening, what belongs to no live session is removed, whether the journal knows it or not.
- however much there is to remove, it keeps only one of the threads that read sessions.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from struct import Struct
from typing import Any, Final, NamedTuple

from persistence.disk.filenames import SCRATCH, SCRATCH_DIRECTORY
from persistence.disk.files import NO_SPACE, Files
from persistence.disk.tier import DiskTier
from persistence.errors import (
    DirectoryNotUsable,
    DiskFull,
    PersistenceError,
    SessionNotFound,
    printable,
)
from persistence.tasks import look_at

_log = logging.getLogger("persistence.scratch")

_NAME_BYTES: Final = 16
_NAME: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
_ENTRY: Final = Struct("<B16s16s")  # made or removed, name, incarnation; the id is behind it
_REMOVED: Final = 0
_MADE: Final = 1
_REWRITE_ABOVE_BYTES: Final = 64 * 1024
_ENTRY_BYTES: Final = 128  # about, with the session id


class _Place(NamedTuple):
    name: bytes
    incarnation: bytes


class Scratch:
    """The directories of this worker's sessions.

    Args:
        disk: the worker's directory and its threads.
        files: the system calls.
        sync: whether the journal is synced (``disk.fsync = "always"``).
    """

    def __init__(self, disk: DiskTier, files: Files, *, sync: bool) -> None:
        self._disk = disk
        self._files = files
        self._sync = sync
        self._journal = disk.journal(SCRATCH)
        self._root = f"{disk.directory}/{SCRATCH_DIRECTORY}"
        self._places: dict[str, _Place] = {}
        self._lock = asyncio.Lock()
        self._removing = asyncio.Lock()
        self._is_closing = False
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._places)

    async def open(self, incarnation_of: Callable[[str], Awaitable[bytes | None]]) -> None:
        """Read whose directories there are, if any, and remove those of sessions that are gone.

        What fails here is logged: a directory that is in the way must not keep a worker from its
        sessions.

        Args:
            incarnation_of: returns the incarnation of a live session; None: there is none.
        """
        try:
            if await self._disk.threads.write(self._is_used):
                await self._open(incarnation_of)
        except (OSError, PersistenceError) as error:
            _log.warning("scratch directories: %s", error)

    async def _open(self, incarnation_of: Callable[[str], Awaitable[bytes | None]]) -> None:
        for entry in await self._disk.threads.write(self._journal.load):
            kind, name, incarnation = _ENTRY.unpack_from(entry)
            session_id = entry[_ENTRY.size :].decode()
            if kind == _MADE:
                self._places[session_id] = _Place(name, incarnation)
            else:
                self._places.pop(session_id, None)
        names: set[bytes] = set()
        for session_id, place in list(self._places.items()):
            # Of two with one directory the later one is a new id that will not be kept.
            if place.name in names or await incarnation_of(session_id) != place.incarnation:
                del self._places[session_id]
            else:
                names.add(place.name)
        kept = {place.name.hex() for place in self._places.values()}
        await self._disk.threads.write(self._clear_up, kept)
        await self._disk.threads.write(self._journal.rewrite, self._entries())

    def _is_used(self) -> bool:
        """Whether there is anything of it. In the writer thread."""
        journal = f"{self._disk.directory}/{SCRATCH}"
        return self._files.exists(journal) or self._files.exists(self._root)

    def _clear_up(self, kept: set[str]) -> None:
        """Remove the directories that are not among `kept`. In the writer thread."""
        if not self._files.exists(self._root):
            return
        for name in self._files.list_directory(self._root):
            if name not in kept and _NAME.fullmatch(name):
                self._remove_tree(name)

    def _remove_tree(self, name: str) -> None:
        try:
            self._files.remove_tree(f"{self._root}/{name}", self._goes_on)
        except OSError as error:
            _log.warning("scratch directory %s is not removed: %s", name, error)

    def _goes_on(self) -> bool:
        return not self._is_closing

    def _entries(self) -> list[bytes]:
        return [_entry(_MADE, place, sid) for sid, place in self._places.items()]

    async def get(self, session_id: str, incarnation: bytes) -> str:
        """Return the path of the directory of a session that is there; it exists.

        Raises:
            SessionNotFound: it ended, or got another id, meanwhile.
            DiskFull: there is no room for it.
            DirectoryNotUsable: something is in its way.
            WriteOutcomeUnknown: the journal takes no entries.
        """
        async with self._lock:
            place = self._places.get(session_id)
            if place is not None and place.incarnation != incarnation:
                self.ended(session_id)
                place = None
            if place is None:
                place = _Place(secrets.token_bytes(_NAME_BYTES), incarnation)
                await self._log([_entry(_MADE, place, session_id)])
                self._places[session_id] = place
        path = f"{self._root}/{place.name.hex()}"
        await asyncio.shield(self._start(self._make(session_id, place, path)))
        return path

    async def _make(self, session_id: str, place: _Place, path: str) -> None:
        """Make a directory. In a task of its own: whoever gives up waiting leaves nothing behind.

        While the thread makes it, the session may end, and another thread remove it: it may be
        there afterwards, and this may fail in any way.
        """
        failure = None
        try:
            await self._disk.threads.read(self._files.make_directory, path)
        except OSError as error:
            failure = error
        if self._places.get(session_id) != place:
            if not any(each.name == place.name for each in self._places.values()):
                self._start(self._remove(session_id, place))
            raise SessionNotFound(session_id)
        if failure is not None:
            raise _not_made(session_id, path, failure) from failure

    async def _log(self, entries: list[bytes]) -> None:
        await asyncio.shield(
            self._disk.threads.write(self._journal.append, entries, sync=self._sync)
        )
        if self._journal.size_bytes > _REWRITE_ABOVE_BYTES + 2 * _ENTRY_BYTES * len(self._places):
            await asyncio.shield(
                self._disk.threads.write(self._journal.rewrite, [*self._entries(), *entries])
            )

    async def follow(self, old_id: str, new_id: str, incarnation: bytes) -> None:
        """A session is about to go on under another id: its directory goes with it.

        To be called when both are there, before the old one ends. The entry of the old id stays in
        the journal: whichever of them lives after a crash has the directory. What fails is logged,
        and the session begins with an empty one.
        """
        async with self._lock:
            place = self._places.get(old_id)
            if place is None:
                return
            followed = _Place(place.name, incarnation)
            try:
                await self._log([_entry(_MADE, followed, new_id)])
            except PersistenceError as error:
                _log.warning("scratch directory of %s is not kept: %s", printable(old_id), error)
                return
            if self._places.pop(old_id, None) is not None:
                self._places[new_id] = followed

    def turn_back(self, old_id: str, new_id: str, incarnation: bytes) -> None:
        """The session has kept its old id after all."""
        place = self._places.pop(new_id, None)
        if place is not None:
            self._places[old_id] = _Place(place.name, incarnation)

    def ended(self, session_id: str) -> None:
        """A session has ended: remove its directory, in the background."""
        place = self._places.pop(session_id, None)
        if place is not None:
            self._start(self._remove(session_id, place))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name="persistence-scratch")
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        look_at(task)

    async def _remove(self, session_id: str, place: _Place) -> None:
        try:
            async with self._removing:
                if not self._is_closing:
                    await self._disk.threads.read(self._remove_tree, place.name.hex())
            async with self._lock:
                if session_id not in self._places and not self._is_closing:
                    await self._log([_entry(_REMOVED, place, session_id)])
        except PersistenceError as error:  # the next opening removes it
            _log.warning("scratch directory of %s: %s", printable(session_id), error)

    async def keep_only(self, incarnation_of: Callable[[str], Awaitable[bytes | None]]) -> None:
        """All sessions were replaced: remove the directories of those that are gone."""
        for session_id, place in list(self._places.items()):
            is_gone = await incarnation_of(session_id) != place.incarnation
            if is_gone and self._places.get(session_id) is place:  # else it has a new one already
                self.ended(session_id)

    async def settled(self) -> None:
        """Wait until nothing is being made or removed."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def is_busy(self) -> bool:
        """Whether something is being made or removed."""
        return bool(self._tasks)

    async def close(self) -> None:
        """Stop removing, which the next opening does then; close the journal."""
        self._is_closing = True
        await self.settled()
        await self._disk.threads.write(self._journal.close)


def _not_made(session_id: str, path: str, error: OSError) -> PersistenceError:
    """Return the error to raise when the directory of a session cannot be made."""
    what = (
        f"the scratch directory of session {printable(session_id)} cannot be made: {path}: "
        f"{error.strerror}"
    )
    if error.errno in NO_SPACE:
        return DiskFull(f"{what}; free some space")
    return DirectoryNotUsable(
        f"{what}; remove what is in its way, and let only sessions write there"
    )


def _entry(kind: int, place: _Place, session_id: str) -> bytes:
    return _ENTRY.pack(kind, place.name, place.incarnation) + session_id.encode()
