"""What the shared tier has not seen yet, remembered across restarts.

A session is in the outbox from the first commit that only this worker has until the shared tier
has the newest. Kept is the commit that the shared tier had then: everything since is one branch
on top of it, delivered as a whole. The records themselves are in the log.

An entry is durable before the first commit of the branch is acknowledged. Its removal is not
waited for: an entry too many only sends again what is there already, under the same commit id.
The journal also keeps the *epoch*, the id of the shared tier's content: another one means that the
tier lost it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from struct import Struct
from typing import Final, NamedTuple

from persistence.disk.journal import MAGIC, Journal, decode_entries
from persistence.disk.threads import Threads
from persistence.record import ID_BYTES, NO_ID

_REMOVED: Final = 0
_BRANCH: Final = 1
_EPOCH: Final = 2
_SENT: Final = 3
_ENDED: Final = 4
_ENTRY: Final = Struct("<B16sQ")  # what it is, the id it is about, a version
_ENDS_KEPT: Final = 16
_MIN_REWRITE_BYTES: Final = 256 * 1024
_ENTRY_BYTES: Final = 64  # about, with the session id


class Branch(NamedTuple):
    """What only this worker has of a session begins behind this commit.

    Attributes:
        base: id of the last commit that the shared tier has; `NO_ID`: it has none.
        version: its version; 0: none.
    """

    base: bytes
    version: int


def has_shared(content: bytes) -> bool:
    """Whether the directory with this file has ever shared its sessions: it knows an epoch."""
    directory_id = content[len(MAGIC) : len(MAGIC) + ID_BYTES]
    entries, _ = decode_entries(directory_id, content)
    known = [_ENTRY.unpack_from(entry)[:2] for entry in entries]
    return any(kind == _EPOCH and epoch != NO_ID for kind, epoch in known)


class Outbox:
    """Session id -> where its branch begins.

    Args:
        journal: where it is kept.
        threads: runs the journal's calls.
        sync: whether entries are synced before they count (``disk.fsync = "always"``).

    Attributes:
        branches: by session id.
        sent: of some branches, commits that the shared tier may have.
        ended: of branches that begin with nothing, the incarnations that were ended here, the
            latest ones. If the shared tier has another one, that is somebody else's and goes on.
            `NO_ID` among them: whichever lives there is to end.
        epoch: whose content everything that is not in the outbox is part of.
    """

    def __init__(self, journal: Journal, threads: Threads, *, sync: bool) -> None:
        self.branches: dict[str, Branch] = {}
        self.sent: dict[str, set[bytes]] = {}
        self.ended: dict[str, list[bytes]] = {}
        self.epoch = NO_ID
        self._journal = journal
        self._threads = threads
        self._sync = sync
        self._lock = asyncio.Lock()

    def __contains__(self, session_id: str) -> bool:
        return session_id in self.branches

    def __len__(self) -> int:
        return len(self.branches)

    async def open(self) -> None:
        """Read what an earlier worker left."""
        for entry in await self._threads.write(self._journal.load):
            self._replay(entry)

    def _replay(self, entry: bytes) -> None:
        kind, base, version = _ENTRY.unpack_from(entry)
        session_id = entry[_ENTRY.size :].decode()
        if kind == _EPOCH:
            self.epoch = base
        elif kind == _BRANCH:
            self._set(session_id, Branch(base, version))
        elif kind == _SENT:
            self.sent.setdefault(session_id, set()).add(base)
        elif kind == _ENDED:
            ended = self.ended.setdefault(session_id, [])
            ended.append(base)
            del ended[:-_ENDS_KEPT]
        else:
            self._end(session_id)

    def _set(self, session_id: str, branch: Branch) -> None:
        self.branches[session_id] = branch
        self.sent.pop(session_id, None)

    def _end(self, session_id: str) -> None:
        self.branches.pop(session_id, None)
        self.sent.pop(session_id, None)
        self.ended.pop(session_id, None)

    async def add(
        self,
        branches: Mapping[str, Branch],
        sent: Iterable[tuple[str, bytes]] = (),
        ended: Iterable[tuple[str, bytes]] = (),
    ) -> None:
        """Begin the branches of sessions that are not in it yet; return when that is durable.

        Args:
            branches: by session id.
            sent: commits of branches (session id, commit id) that were sent to the shared tier
                without a reply. It may have any of them: then the branch goes on from there.
            ended: incarnations (session id, incarnation id) that end on their branches.

        Raises:
            DiskFull, WriteOutcomeUnknown: nothing was added.
        """
        # Looked at under the lock: two batches may begin the same branch.
        async with self._lock:
            new = {sid: each for sid, each in branches.items() if sid not in self.branches}
            entries = [_entry(_BRANCH, each, sid) for sid, each in new.items()]
            entries += [
                _entry(_SENT, Branch(commit, 0), sid)
                for sid, commit in sent
                if sid in new or commit not in self.sent.get(sid, ())
            ]
            for sid, incarnation in ended:
                branch = self.branches.get(sid) or new.get(sid)
                if branch is not None and branch.base == NO_ID:
                    entries.append(_entry(_ENDED, Branch(incarnation, 0), sid))
            if entries:
                await self._append(entries, sync=self._sync)
                for entry in entries:
                    self._replay(entry)

    async def advance(
        self, session_id: str, delivered: Branch, newest: Callable[[], bytes | None]
    ) -> None:
        """The shared tier has commit `delivered` of a branch; it ends if that is the newest.

        The race: a later commit is submitted while this waits for the lock. It finds its session
        in the outbox, so it adds nothing, and then its branch is ended here. So what is newest is
        only looked at under the lock: a commit that comes after that finds no branch, and adds one.
        """
        async with self._lock:
            if session_id not in self.branches:
                return
            if newest() == delivered.base:
                self._end(session_id)
                await self._append([_entry(_REMOVED, _NOTHING, session_id)], sync=False)
            else:
                self._set(session_id, delivered)
                await self._append([_entry(_BRANCH, delivered, session_id)], sync=False)
            await self._rewrite_if_long()

    async def remove(self, session_id: str) -> None:
        """End a branch: the shared tier has all of it, or it is a conflict record now."""
        async with self._lock:
            if session_id in self.branches:
                self._end(session_id)
                await self._append([_entry(_REMOVED, _NOTHING, session_id)], sync=False)
                await self._rewrite_if_long()

    async def begin_anew(
        self, branches: Mapping[str, Branch], replaces: Collection[str] = ()
    ) -> None:
        """Begin branches here, whatever there was of them: the local state was replaced.

        Synced in any case, like what has replaced it: nothing else will tell once this returns.

        Args:
            branches: by session id.
            replaces: of which sessions nobody knows what the shared tier has: if they have ended
                here, whichever lives there is to end.
        """
        async with self._lock:
            entries = [_entry(_BRANCH, each, sid) for sid, each in branches.items()]
            entries += [_entry(_ENDED, _NOTHING, sid) for sid in replaces]
            await self._append(entries, sync=True)
            for entry in entries:
                self._replay(entry)

    async def set_epoch(self, epoch: bytes) -> None:
        """Note whose content everything that is not in the outbox is part of."""
        async with self._lock:
            if epoch != self.epoch:
                await self._append([_entry(_EPOCH, Branch(epoch, 0), "")], sync=self._sync)
                self.epoch = epoch

    async def _append(self, entries: list[bytes], *, sync: bool) -> None:
        await asyncio.shield(self._threads.write(self._journal.append, entries, sync=sync))

    async def _rewrite_if_long(self) -> None:
        size = self._journal.size_bytes
        if size < max(_MIN_REWRITE_BYTES, 4 * _ENTRY_BYTES * len(self.branches)):
            return
        entries = [_entry(_EPOCH, Branch(self.epoch, 0), "")]
        for sid, branch in self.branches.items():
            entries.append(_entry(_BRANCH, branch, sid))
            entries += [_entry(_SENT, Branch(sent, 0), sid) for sent in self.sent.get(sid, ())]
            entries += [_entry(_ENDED, Branch(each, 0), sid) for each in self.ended.get(sid, ())]
        await asyncio.shield(self._threads.write(self._journal.rewrite, entries))

    async def close(self) -> None:
        """Close the journal."""
        async with self._lock:
            await self._threads.write(self._journal.close)


_NOTHING: Final = Branch(NO_ID, 0)


def _entry(kind: int, branch: Branch, session_id: str) -> bytes:
    return _ENTRY.pack(kind, branch.base, branch.version) + session_id.encode()
