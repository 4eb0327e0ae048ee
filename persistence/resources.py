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
- nobody waits for what waits for him: for a factory that asks for what is being made for it, or a
  close for what it closes.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, Final

from persistence.errors import (
    ConflictError,
    InvalidArgument,
    ManagerClosed,
    PersistenceError,
    SessionNotFound,
    again,
    printable,
)
from persistence.locks import ASKERS, caller
from persistence.tasks import look_at

_log = logging.getLogger("persistence.resources")

CLOSE_TIMEOUT_SECONDS: Final = 10.0

Factory = Callable[[], Any]
Close = Callable[[Any], Any]


class _Resource:
    """One of them.

    Attributes:
        name: of the session's resources.
        making: makes it; its result is the resource.
        ready: what those who ask wait for: the resource, or why there is none. Also resolved when
            it is being closed before it was made: then they look again.
        close: what closes it; None: nothing has to.
        askers: who waits for it to be made; see `locks.ASKERS`.
        needs: the resources that its factory waits for.
    """

    __slots__ = ("askers", "close", "incarnation", "making", "name", "needs", "ready")

    making: asyncio.Task[Any]

    def __init__(self, name: str, incarnation: bytes, close: Close | None) -> None:
        self.name = name
        self.incarnation = incarnation
        self.close = close
        self.ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.askers: list[object] = []
        self.needs: list[_Resource] = []

    def waits_for(self, other: _Resource) -> bool:
        """Whether it cannot be made before the other one is."""
        return self is other or any(each.waits_for(other) for each in self.needs)

    async def made(self, session_id: str) -> Any:
        """Wait until it is made, and return it; also when it is being closed before that.

        Raises:
            ConflictError: a factory asks for what cannot be made before that factory has ended.
            Exception: what its factory raises.
        """
        if self.ready.done():
            return await self.ready
        maker = _MAKING.get()
        if maker is not None and maker.ready.done():
            maker = None  # a task that a factory has left behind
        if maker is not None and self.waits_for(maker):
            raise ConflictError(
                f"resource {self.name!a} of session {printable(session_id)} cannot be made: the "
                f"factory of {maker.name!a} asks for it, and it waits for that one; let a factory "
                "ask only for resources that do without its own"
            )
        askers = [caller(), *ASKERS.get()]
        self.askers += askers
        if maker is not None:
            maker.needs.append(self)
        try:
            return await asyncio.shield(self.ready)
        finally:
            for asker in askers:
                self.askers.remove(asker)
            if maker is not None:
                maker.needs.remove(self)


_MAKING: Final[ContextVar[_Resource | None]] = ContextVar("persistence-making", default=None)
"""The resource that this code is part of the making of."""

_CLOSING: Final[ContextVar[asyncio.Task[None] | None]] = ContextVar(
    "persistence-closing", default=None
)
"""What this code is part of the close of a resource for."""


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
            ConflictError: a factory asks for what waits for that factory, or a close for what it
                closes.
            InvalidArgument: something that the factory awaited was cancelled.
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
                if closing is _CLOSING.get():
                    raise ConflictError(
                        f"resource {name!a} of session {printable(session_id)} is being closed by "
                        "whoever asks for it, and another one is made only after that; use what "
                        "the close was called with"
                    )
                await asyncio.wait([closing])
                continue
            if resource is None:
                resource = self._make(session_id, incarnation, name, factory, close)
            try:
                has_waited = not resource.ready.done()
                made = await resource.made(session_id)
                if has_waited and not self._is_resident(session_id):
                    # Kept although its session left memory meanwhile, because somebody waited: with
                    # the session back, that closes it when it leaves the next time.
                    await self._incarnation_of(session_id)
                if self._of.get(session_id, {}).get(name) is resource:
                    return made
                # The session ended or left memory meanwhile, and it is being closed.
            except BaseException as error:
                # It may have left memory, and kept its resources only because somebody waited.
                self.idle(session_id)
                if isinstance(error, PersistenceError):
                    raise again(error) from None
                raise

    def _make(
        self,
        session_id: str,
        incarnation: bytes,
        name: str,
        factory: Factory,
        close: Close | None,
    ) -> _Resource:
        resource = _Resource(name, incarnation, close)
        resource.making = self._start(_made_for(resource, factory))
        self._of.setdefault(session_id, {})[name] = resource
        resource.making.add_done_callback(partial(self._is_made, session_id, resource))
        self._watch(True)
        return resource

    def _is_made(self, session_id: str, resource: _Resource, making: asyncio.Task[Any]) -> None:
        """A factory has ended: tell those who wait, and forget what it did not make."""
        ready = resource.ready
        error = _why_not_made(session_id, resource)
        if error is None:
            self.made += 1
            if not ready.done():
                ready.set_result(making.result())
            return
        if not ready.done():
            ready.set_exception(error)
            ready.exception()  # perhaps nobody waits any more
        mine = self._of.get(session_id, {})
        if mine.get(resource.name) is resource:
            del mine[resource.name]
            self._forget_if_empty(session_id)

    def _start(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.create_task(work, name="persistence-resource")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- closing ------------------------------------------------------------------------------

    def left(self, session_ids: Sequence[str]) -> None:
        """Sessions leave memory: close what they have, unless they are in use.

        In use is one of which a request is under way, or somebody waits for a resource: under
        pressure it might leave before each of its resources is made, again and again.
        """
        for session_id in session_ids:
            if session_id in self._of and not self._is_used(session_id):
                self.release(session_id)

    def idle(self, session_id: str) -> None:
        """A session is not in use any more, perhaps: it may have left memory meanwhile."""
        is_left = session_id in self._of and not self._is_resident(session_id)
        if is_left and not self._is_used(session_id):
            self.release(session_id)

    def _is_used(self, session_id: str) -> bool:
        return self._is_running(session_id) or any(
            resource.askers for resource in self._of[session_id].values()
        )

    def release(self, session_id: str) -> None:
        """Close everything that a session has, in the background. The reverse order of making."""
        mine = self._of.pop(session_id, {})
        for name, resource in reversed(mine.items()):
            if not resource.ready.done():
                resource.ready.set_result(None)  # whoever waits finds out what has become of it
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
        _CLOSING.set(asyncio.current_task())
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
            closing.add_done_callback(look_at)
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


def _why_not_made(session_id: str, resource: _Resource) -> BaseException | None:
    """Return why a factory that has ended has made nothing; None: it has."""
    if not resource.making.cancelled():
        return resource.making.exception()
    return InvalidArgument(
        f"the factory of resource {resource.name!a} of session {printable(session_id)} ended in a "
        "cancellation: something that it awaited was cancelled; there is no resource, and the next "
        "call tries again"
    )


async def _made_for(resource: _Resource, factory: Factory) -> Any:
    """Call a factory, so that what it does can be told from what others do."""
    # Also where the event loop starts tasks eagerly: not before it is known, and waited for.
    await asyncio.sleep(0)
    _MAKING.set(resource)
    ASKERS.set(resource.askers)
    return await _called(factory)


async def _called(function: Callable[[], Any]) -> Any:
    """Call a function, synchronous or not, and return what it returns."""
    result = function()
    if inspect.isawaitable(result):
        result = await _awaited(result)
    return result


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result
