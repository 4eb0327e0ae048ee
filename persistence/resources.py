"""Live resources of sessions: what cannot be stored, such as connections, caches, browser pages.

A resource is made at most once for a session and worker, also when many ask at the same time, and
closed once: when the session ends, when it leaves memory, at shutdown. After that the next access
makes another one. A close that raises or hangs is logged and given up after a timeout; nobody else
waits for it.

Invariants:
- a resource belongs to one incarnation of one session; another one never gets it.
- what a factory has made is closed, whatever happens to who asked for it: it is made in a task of
  its own, and if the session has gone by then it is closed at once.
- a factory runs again only after the close of what it had made before has ended or timed out.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final

from persistence.errors import ManagerClosed, PersistenceError, SessionNotFound, again, printable

_log = logging.getLogger("persistence.resources")

CLOSE_TIMEOUT_SECONDS: Final = 10.0

Factory = Callable[[], Any]
Close = Callable[[Any], Any]


class _Resource:
    """One of them.

    Attributes:
        making: makes it; its result is the resource.
        close: what closes it; None: nothing has to.
    """

    __slots__ = ("close", "incarnation", "making")

    def __init__(self, incarnation: bytes, making: asyncio.Task[Any], close: Close | None) -> None:
        self.incarnation = incarnation
        self.making = making
        self.close = close


class Resources:
    """All resources of this worker. Every method runs on the event loop.

    Args:
        incarnation_of: accesses a session and returns its incarnation; raises SessionNotFound.
        is_running: whether a request of a session is under way: then it keeps its resources when it
            leaves memory, until the last such request has ended.
        is_resident: whether a session is in memory.
        watch: told whether there are any resources at all, so that others need not look.
        timeout_seconds: after which a close is given up.
    """

    def __init__(
        self,
        incarnation_of: Callable[[str], Awaitable[bytes]],
        is_running: Callable[[str], bool],
        is_resident: Callable[[str], bool],
        watch: Callable[[bool], None],
        timeout_seconds: float = CLOSE_TIMEOUT_SECONDS,
    ) -> None:
        self._incarnation_of = incarnation_of
        self._is_running = is_running
        self._is_resident = is_resident
        self._watch = watch
        self._timeout_seconds = timeout_seconds
        self._of: dict[str, dict[str, _Resource]] = {}
        self._closing: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closed = False
        self.made = 0
        self.closed = 0
        self.failed_closes = 0

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    @property
    def has_any(self) -> bool:
        """Whether there are any, or some are still being closed."""
        return bool(self._of or self._tasks)

    async def get(
        self,
        session_id: str,
        name: str,
        factory: Factory,
        close: Close | None,
        only: bytes | None = None,
    ) -> Any:
        """Return the resource `name` of a session, making it if there is none.

        Args:
            session_id: whose.
            name: which one.
            factory: makes it.
            close: closes it.
            only: the incarnation that the session must be; None: any.

        Raises:
            SessionNotFound: missing, expired or terminated, also while it was being made.
            ManagerClosed: the manager closes.
            Exception: what the factory raises; then there is none, and the next one tries again.
        """
        while True:
            incarnation = await self._incarnation_of(session_id)
            if only is not None and incarnation != only:
                raise SessionNotFound(session_id)
            if self._is_closed:
                raise ManagerClosed("the manager is closed: no more resources")
            mine = self._of.get(session_id)
            resource = None if mine is None else mine.get(name)
            if resource is not None and resource.incarnation != incarnation:
                self.release(session_id)
                continue
            closing = self._closing.get((session_id, name))
            if resource is None and closing is not None:
                await asyncio.wait([closing])
                continue
            if resource is None:
                resource = self._make(session_id, incarnation, name, factory, close)
            try:
                made = await asyncio.shield(resource.making)
                if self._of.get(session_id, {}).get(name) is resource:
                    return made
                # The session ended or left memory meanwhile, and it is being closed.
            except PersistenceError as error:
                raise again(error) from None
            except asyncio.CancelledError:
                if resource.making.cancelled():
                    raise ManagerClosed("the manager is closed: no more resources") from None
                raise

    def _make(
        self,
        session_id: str,
        incarnation: bytes,
        name: str,
        factory: Factory,
        close: Close | None,
    ) -> _Resource:
        making = self._start(_called(factory))
        resource = _Resource(incarnation, making, close)
        self._of.setdefault(session_id, {})[name] = resource
        making.add_done_callback(partial(self._is_made, session_id, name, resource))
        self._watch(True)
        return resource

    def _is_made(
        self, session_id: str, name: str, resource: _Resource, making: asyncio.Task[Any]
    ) -> None:
        """A factory has ended: forget what it did not make."""
        if not making.cancelled() and making.exception() is None:
            self.made += 1
            return
        mine = self._of.get(session_id, {})
        if mine.get(name) is resource:
            del mine[name]
            self._forget_if_empty(session_id)

    def _start(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.create_task(work, name="persistence-resource")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- closing ------------------------------------------------------------------------------

    def left(self, session_ids: Sequence[str]) -> None:
        """Sessions leave memory: close what they have, unless a request of theirs is under way."""
        for session_id in session_ids:
            if session_id in self._of and not self._is_running(session_id):
                self.release(session_id)

    def idle(self, session_id: str) -> None:
        """The last request of a session has ended: it may have left memory meanwhile."""
        if session_id in self._of and not self._is_resident(session_id):
            self.release(session_id)

    def release(self, session_id: str) -> None:
        """Close everything that a session has, in the background. The reverse order of making."""
        mine = self._of.pop(session_id, {})
        for name, resource in reversed(mine.items()):
            key = (session_id, name)
            before = self._closing.get(key)
            task = self._start(self._close_one(session_id, name, resource, before))
            self._closing[key] = task
            task.add_done_callback(partial(self._close_ended, key))
        if not self._of:
            self._watch(False)

    def release_all(self) -> None:
        """Close everything, in the background."""
        for session_id in list(self._of):
            self.release(session_id)

    def _close_ended(self, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        if self._closing.get(key) is task:
            del self._closing[key]

    def _forget_if_empty(self, session_id: str) -> None:
        if not self._of.get(session_id, True):
            del self._of[session_id]
        if not self._of:
            self._watch(False)

    async def _close_one(
        self, session_id: str, name: str, resource: _Resource, before: asyncio.Task[None] | None
    ) -> None:
        """Close a resource; never raises an Exception."""
        if before is not None:
            await asyncio.wait([before])
        making = resource.making
        # Not `asyncio.timeout`, which waits for code that ignores its cancellation.
        await asyncio.wait([making], timeout=self._timeout_seconds)
        closing = making
        if making.done():
            if making.cancelled() or making.exception() is not None:
                return  # there is none
            if resource.close is None:
                self.closed += 1
                return
            closing = asyncio.ensure_future(_called(partial(resource.close, making.result())))
            await asyncio.wait([closing], timeout=self._timeout_seconds)
        self._note_end(f"resource {name!a} of session {printable(session_id)}", closing)

    def _note_end(self, what: str, closing: asyncio.Task[Any]) -> None:
        """Note how closing a resource ended; one that has not ended is given up."""
        if not closing.done():
            self.failed_closes += 1
            self._tasks.discard(closing)
            closing.cancel()
            closing.add_done_callback(_look_at)
            _log.error("closing %s: not done in %g seconds; given up", what, self._timeout_seconds)
        elif closing.cancelled() or closing.exception() is not None:
            self.failed_closes += 1
            error = None if closing.cancelled() else closing.exception()
            _log.error("closing %s failed", what, exc_info=error)
        else:
            self.closed += 1

    async def close(self) -> None:
        """Close everything and wait for it, no longer than closes may take; idempotent.

        Cancelled, it gives up what is left.
        """
        self._is_closed = True
        self.release_all()
        try:
            while self._tasks:
                await asyncio.wait(self._tasks)
        except asyncio.CancelledError:
            for task in self._tasks:
                task.cancel()
            raise


def _look_at(task: asyncio.Task[Any]) -> None:
    """Look at how a task ended, so that nobody complains that nobody did."""
    if not task.cancelled():
        task.exception()


async def _called(function: Callable[[], Any]) -> Any:
    """Call a function, synchronous or not, and return what it returns."""
    result = function()
    if inspect.isawaitable(result):
        result = await _awaited(result)
    return result


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result
