"""The reader's side: a bounded mailbox, and the iterator over it.

A slow reader neither holds anybody up nor takes memory without bound. When `max_pending` changes
wait to be read, what comes then is merged into the last one: of a single session into one change,
which says how many versions it skips; of all sessions into a ``gap``, which says how many changes
are missing there. So what a reader gets is in order, and whatever it does not get is told.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from threading import get_ident
from types import TracebackType
from typing import Self

from persistence.lifecycle import wrong_loop
from persistence.record import NO_ID
from persistence.watching.changes import SessionChange, coalesced, gap

_log = logging.getLogger("persistence.watching")


@dataclass(frozen=True, slots=True)
class Permit:
    """Lets somebody hear of one incarnation of a session, and of no other, for a time.

    Attributes:
        incarnation: of the session.
        is_over: whether the time is over. From any thread.
        refusal: returns the error for whatever is refused.
    """

    incarnation: bytes
    is_over: Callable[[], bool]
    refusal: Callable[[], Exception]

    def check(self) -> None:
        """Raise if the time is over. From any thread."""
        if self.is_over():
            raise self.refusal()


class Mailbox:
    """What is on its way to one reader. Every method runs on the event loop.

    Args:
        max_pending: changes that wait at most; the end of a session, or a gap, may be one more.
        of_all: whether it is for the changes of all sessions.
        permit: what the reader may have; None: everything.
    """

    __slots__ = (
        "_arrived",
        "_ended",
        "_is_refused",
        "_max_pending",
        "_of_all",
        "_pending",
        "permit",
    )

    def __init__(self, max_pending: int, *, of_all: bool, permit: Permit | None = None) -> None:
        self.permit = permit
        self._pending: deque[SessionChange] = deque()
        self._max_pending = max_pending
        self._of_all = of_all
        self._arrived = asyncio.Event()
        self._ended = False
        self._is_refused = False

    def put(self, change: SessionChange, incarnation: bytes = NO_ID) -> None:
        """Let the reader have a change; never waits.

        Args:
            change: what to tell.
            incarnation: of the session that it is about; `NO_ID`: of all, or not known.
        """
        if self._ended:
            return
        if self.permit is not None and self.permit.incarnation != incarnation:
            self.refuse()
            return
        pending = self._pending
        if len(pending) < self._max_pending or (change.is_end and not self._of_all):
            pending.append(change)  # behind the end of its session nothing comes
        elif not self._of_all:
            pending[-1] = coalesced(pending[-1], change)
        else:
            self._overflow(change)
        self._arrived.set()

    def _overflow(self, change: SessionChange) -> None:
        """Count a change that there is no room for, in the gap at the end."""
        last = self._pending[-1]
        if last.kind != "gap":
            self._pending.append(gap(change.skipped + 1))
        else:
            self._pending[-1] = gap(last.skipped + change.skipped + 1)

    def begin_with(self, change: SessionChange | None) -> None:
        """Let this one, or none, stand for all that has come until now."""
        self._pending.clear()
        if change is not None:
            self._pending.append(change)
            self._arrived.set()

    def end(self) -> None:
        """Nothing more will come; what is there can still be read."""
        self._ended = True
        self._arrived.set()

    def refuse(self) -> None:
        """What comes now is not for the reader, who is told so behind what was."""
        self._is_refused = True
        self.end()

    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self._ended

    def check(self) -> None:
        """Raise what the permit says if the reader may have nothing any more."""
        permit = self.permit
        if permit is None:
            return
        if self._pending or not self._ended:
            permit.check()
        elif self._is_refused:
            raise permit.refusal()

    async def take(self) -> SessionChange:
        """Return the next change.

        Raises:
            StopAsyncIteration: there will be none.
            Exception: what the permit says.
        """
        while True:
            self.check()  # again after each wait: what it says may be another thing by then
            if self._pending:
                return self._pending.popleft()
            if self._ended:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()

    def take_all(self) -> list[SessionChange]:
        """Return what is there.

        Raises:
            Exception: what the permit says.
        """
        self.check()
        changes = list(self._pending)
        self._pending.clear()
        return changes


def put_all(
    mailboxes: Iterable[Mailbox], change: SessionChange, incarnation: bytes = NO_ID
) -> None:
    """Let several readers have a change; see `Mailbox.put`.

    One that cannot take it is ended, rather than missing it in silence; nobody else suffers.
    """
    for mailbox in mailboxes:
        try:
            mailbox.put(change, incarnation)
        except Exception:  # noqa: BLE001 - logged; who commits must not fail for who listens
            _log.exception("a stream of changes is ended, for one could not be put into it")
            mailbox.end()


class Watch(AsyncIterator[SessionChange]):
    """A stream of changes: what `StateManager.watch` returns.

    It listens from the moment it is made, so whoever reads the session after that misses nothing.
    It ends with the session and with the manager. `aclose`, the end of ``async with``, or letting
    go of it, end it sooner. It belongs to the manager's event loop: from elsewhere, each call
    raises WrongEventLoop.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        begin: Callable[[], Awaitable[None]] | None,
        leave: Callable[[], None],
    ) -> None:
        """Listen.

        Args:
            mailbox: where changes arrive.
            begin: what the first reading does before; None: nothing.
            leave: ends it.
        """
        self._mailbox = mailbox
        self._begin = begin
        self._leave: Callable[[], None] | None = leave
        self._loop = asyncio.get_running_loop()
        self._thread = get_ident()

    @property
    def permit(self) -> Permit | None:
        """What the reader may have; None: everything."""
        return self._mailbox.permit

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionChange:
        """Wait for the next change.

        Raises:
            SessionNotFound: there is no such session (only the first call).
            CorruptionError: its stored bytes are damaged (only the first call).
            TokenInvalid: it was begun with a token, which does not hold any more.
            WrongEventLoop: called in another event loop than the manager's.
        """
        self._check_loop()
        self._mailbox.check()
        if self._begin is not None:
            begin, self._begin = self._begin, None
            try:
                await begin()
            except asyncio.CancelledError:
                self._begin = begin  # whoever asks next begins
                raise
            except BaseException:
                await self.aclose()
                raise
        return await self._mailbox.take()

    def waiting(self) -> list[SessionChange]:
        """Return the changes that wait to be read, and take them; never waits itself.

        Raises:
            TokenInvalid: it was begun with a token, which does not hold any more.
            WrongEventLoop: called in another event loop than the manager's.
        """
        self._check_loop()
        return self._mailbox.take_all()

    async def aclose(self) -> None:
        """Listen no more. Idempotent.

        Raises:
            WrongEventLoop: called in another event loop than the manager's.
        """
        self._check_loop()
        self._mailbox.begin_with(None)
        self._mailbox.end()
        if self._leave is not None:
            self._leave()
            self._leave = None

    def _check_loop(self) -> None:
        # A reader that waits in another loop would be woken from this one: too late, or, where the
        # loop notices, with an error in the middle of what told it.
        if get_ident() != self._thread or not self._loop.is_running():
            raise wrong_loop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # Whoever breaks out of the loop only lets go of it. That may be in any thread, and in the
        # middle of anything.
        leave = getattr(self, "_leave", None)
        if leave is None or self._loop.is_closed():
            return
        try:
            self._loop.call_soon_threadsafe(leave)
        except RuntimeError:  # closed this very moment
            return
