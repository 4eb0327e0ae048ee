"""A restore that the shared tier has not learned of yet, remembered across a crash.

A restored state is in place as soon as the manifest of the directory names it. Only then can it be
noted, session by session, that it is to replace what the shared tier has (`Sharing.open`). A
worker that was killed in between would take what is not noted yet for old copies: a part of its
sessions would be restored, and the others would come back from the shared tier.

So before anything is replaced, a journal of the directory says how far the log had got, and which
sessions there were. The next opening looks where the log is now. If the restored state is in place,
it is imposed, once more or for the first time, before anything else is done with the shared tier;
otherwise everything is as it was. Then the file is removed.

Imposing again what was imposed already changes nothing, as long as nobody has worked with it: that
is why the file is gone, durably, before the first call is let in. On a worker that does not share
its sessions (any more) it stays for when it does.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from struct import Struct
from typing import Final

from persistence.clock import Clock
from persistence.disk.directory import not_usable
from persistence.disk.filenames import RESTORING
from persistence.disk.install import SEQUENCE_GAP
from persistence.disk.tier import DiskTier
from persistence.errors import (
    DirectoryNotUsable,
    DiskFull,
    PersistenceError,
    WriteOutcomeUnknown,
)
from persistence.slices import Slices

_log = logging.getLogger("persistence.sharing")

_MARK: Final = Struct("<Q?")  # the log's highest sequence number, whether no session is restored
_ID_BYTES: Final = Struct("<H")  # of each session id, in front of it
_IDS_PER_ENTRY: Final = 1000


@dataclass(frozen=True, slots=True)
class Mark:
    """Where the log was before a restore.

    Attributes:
        sequence: the highest sequence number there was.
        is_empty: no session is restored, so that no segment is left of the log.
    """

    sequence: int
    is_empty: bool

    def is_passed(self, sequence: int, *, has_segments: bool) -> bool:
        """Whether the restored state is in place, in a log that has got to `sequence`.

        What is restored lies behind a gap in the sequence numbers. Whatever is written where it
        never was installed does not get that far, and no merge makes a number smaller.
        """
        if self.is_empty and not has_segments:
            return True
        return sequence > self.sequence + SEQUENCE_GAP // 2


class Restoring:
    """What is remembered of one directory's restore. Every method runs on the event loop.

    Args:
        disk: the log.
        clock: time, for slices only.
    """

    def __init__(self, disk: DiskTier, clock: Clock) -> None:
        self._disk = disk
        self._journal = disk.journal(RESTORING)
        self._threads = disk.threads
        self._slices = Slices(clock.monotonic)
        self._mark: Mark | None = None
        self._before: dict[str, None] = {}
        self._is_in_place = False

    @property
    def before(self) -> list[str] | None:
        """The sessions that there were before what is to be imposed; None: nothing is."""
        return list(self._before) if self._is_in_place else None

    async def open(self) -> None:
        """Look whether a restore was cut short, and how far it had got.

        To be called before anything is written to the log.

        Raises:
            DirectoryNotUsable, DiskFull: the file cannot be read, or not be mended or removed.
        """
        sequence, has_segments = self._disk.writer.sequence, bool(self._disk.segments)
        try:
            entries = await self._threads.write(self._journal.load)
            if not entries:
                return
            self._mark = Mark(*_MARK.unpack(entries[0]))
            if not self._mark.is_passed(sequence, has_segments=has_segments):
                await self._forget()
                return
        except OSError as error:
            raise not_usable(self._disk.directory, error) from error
        for entry in entries[1:]:
            self._before.update(dict.fromkeys(_unpacked(entry)))
            await self._slices.give_way_if_due()
        self._is_in_place = True

    @asynccontextmanager
    async def noted(self, before: Iterable[str] | None, *, is_empty: bool) -> AsyncIterator[None]:
        """Note a restore; within this it is to be installed.

        If that fails with everything as it was, the note is taken back.

        Args:
            before: the sessions that there are now; None: they are not shared, so note nothing.
            is_empty: no session is restored.

        Raises:
            DiskFull, DirectoryNotUsable: it cannot be noted; nothing was changed.
        """
        if before is None:
            yield
            return
        is_first = self._mark is None
        if self._mark is None:
            self._mark = Mark(self._disk.writer.sequence, is_empty)
        # Else an earlier one was never imposed as a whole: that remains to be done in any case.
        self._before.update(dict.fromkeys(before))
        try:
            await self._write(self._mark)
            yield
        except WriteOutcomeUnknown:
            raise  # the next opening sees what became of it
        except PersistenceError:
            if is_first:
                await self.over()
            raise
        self._is_in_place = True

    async def _write(self, mark: Mark) -> None:
        entries = [_MARK.pack(mark.sequence, mark.is_empty)]
        rest = iter(self._before)
        while some := list(islice(rest, _IDS_PER_ENTRY)):
            entries.append(_packed(some))
            await self._slices.give_way_if_due()
        try:
            await self._threads.write(self._journal.rewrite, entries)
        except DiskFull as error:
            raise DiskFull(f"{error}; nothing was changed") from error
        except WriteOutcomeUnknown as error:
            raise DirectoryNotUsable(
                f"{self._disk.directory}: {RESTORING}: {error.__cause__}; nothing was changed"
            ) from error

    async def over(self) -> None:
        """Forget it: everything is noted that the shared tier has to learn, or nothing is new."""
        try:
            await self._forget()
        except OSError as error:
            _log.error(
                "%s/%s cannot be removed (%s): remove it before this worker is started again, or "
                "what is here then replaces once more what the shared tier has",
                self._disk.directory,
                RESTORING,
                error.strerror,
            )

    async def _forget(self) -> None:
        self._mark = None
        self._before = {}
        self._is_in_place = False
        await self._threads.write(self._journal.remove)

    async def close(self) -> None:
        """Close the journal; what is noted stays."""
        await self._threads.write(self._journal.close)


def _packed(session_ids: Iterable[str]) -> bytes:
    keys = [session_id.encode() for session_id in session_ids]
    return b"".join([_ID_BYTES.pack(len(key)) + key for key in keys])


def _unpacked(entry: bytes) -> Iterator[str]:
    at = 0
    while at < len(entry):
        start = at + _ID_BYTES.size
        at = start + _ID_BYTES.unpack_from(entry, at)[0]
        yield entry[start:at].decode()
