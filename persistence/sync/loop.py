"""An event loop in a thread of its own, and how other threads hand calls to it.

``asyncio.run_coroutine_threadsafe`` would do, and costs half as much again: its future is a lock, a
condition and a list of callbacks, and each call writes to the loop's pipe. Here a waiting thread
stands before one lock, and calls that come while the loop is busy are taken together.

Invariants:
- a call is answered, whatever happens: by the loop, or by whoever ends it (`_fail_rest`);
- no thread waits for itself: none of the engine's own, and none that runs an event loop;
- after a fork nothing here is touched any more in the child: the thread is not there, and what the
  loop holds (its epoll set) is the parent's.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from types import CoroutineType
from typing import Any, Final, TypeVar, cast

from persistence.errors import ManagerClosed, WrongEventLoop
from persistence.locks import ASKERS, NOBODY, OWNER
from persistence.own_threads import is_own_thread, mark_own_thread
from persistence.sync.offload import Places
from persistence.tasks import look_at

T = TypeVar("T")

_log = logging.getLogger("persistence.sync")

_LEFT_OVER_SECONDS: Final = 0.5
_CLOSES_AT_ONCE: Final = 256  # a thread each; at a shutdown they have 10 s in all
running_loop = asyncio._get_running_loop
"""Returns the running event loop of this thread, or None; in C, where there is C."""


class _Caller(threading.local):
    """What a thread is to the engine: whoever holds an edit may be recognised when it comes again.

    Attributes:
        owner: this thread's own object.
        context: its calls run in it, where nothing is but `OWNER`.
    """

    def __init__(self) -> None:
        self.owner = object()
        self.context = Context()
        self.context.run(OWNER.set, self.owner)


_caller = _Caller()


def callers_context() -> Context:
    """Return the context of this thread, with its own object in it as `OWNER`."""
    context = copy_context()
    context.run(OWNER.set, _caller.owner)
    return context


class _Call:
    """One call on its way.

    Attributes:
        begin: called on the loop; returns a coroutine, a future to wait for, or the result.
        context: in which it runs.
        answered: a lock that is held until there is an answer.
        result, error: the answer.
        task: what runs it.
    """

    __slots__ = ("answered", "begin", "context", "error", "result", "task")

    def __init__(self, begin: Callable[[], Any], context: Context) -> None:
        self.begin = begin
        self.context = context
        self.answered = threading.Lock()
        self.answered.acquire()
        self.result: Any = None
        self.error: BaseException | None = None
        self.task: asyncio.Future[Any] | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin; on the loop."""
        try:
            outcome = self.context.run(self.begin)
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            self.error = error
            self.answered.release()
            return
        if type(outcome) is CoroutineType:
            self.task = loop.create_task(outcome, context=self.context)
            self.task.add_done_callback(self._done)
        elif isinstance(outcome, asyncio.Future):
            self.task = outcome
            outcome.add_done_callback(self._done)
        else:
            self.result = outcome
            self.answered.release()

    def _done(self, task: asyncio.Future[Any]) -> None:
        if task.cancelled():
            self.error = ManagerClosed("the manager was closed while this call was under way")
        else:
            self.error = task.exception()
            if self.error is None:
                self.result = task.result()
        self.answered.release()

    def give_up(self) -> None:
        """Nobody waits any more; on the loop."""
        if self.task is not None:
            self.task.cancel()


class LoopThread:
    """Runs an event loop until `end`. Its methods are called from other threads.

    Args:
        finish: ends what runs on the loop; called on it. Gets `grace_seconds` of `end`.
        before_calls: called on the loop before each bunch of calls.

    Attributes:
        closes: places for the closes of resources, which may block; see `offload`.
    """

    def __init__(
        self,
        finish: Callable[[float | None], Coroutine[Any, Any, None]],
        before_calls: Callable[[], None],
    ) -> None:
        self.loop = asyncio.new_event_loop()
        self.closes = Places(_CLOSES_AT_ONCE)
        self._finish = finish
        self._before_calls = before_calls
        self._calls: deque[_Call] = deque()
        self._is_woken = False
        self._why_over: str | None = None
        self._ending: asyncio.Task[None] | None = None
        self._end_error: BaseException | None = None
        # A daemon, for at exit the interpreter waits for all others before it calls `atexit`.
        self._thread = threading.Thread(target=self._main, name="persistence-loop", daemon=True)
        _running.add(self)
        self._thread.start()

    # --- calls --------------------------------------------------------------------------------

    def run(self, begin: Callable[[], Coroutine[Any, Any, T]], context: Context | None = None) -> T:
        """Run a coroutine on the loop and return what it returns, or raise what it raises.

        Args:
            begin: makes it; called on the loop.
            context: in which both run; None: an own one.

        Raises:
            WrongEventLoop: this thread runs an event loop, or is one of the engine's own.
            ManagerClosed: the loop has ended, or this is the child of a fork.
        """
        return cast(T, self.ask(begin, context))

    def ask(self, begin: Callable[[], Any], context: Context | None = None) -> Any:
        """The same for what need not be a coroutine: a future is waited for, all else is returned.

        Raises:
            WrongEventLoop, ManagerClosed: see `run`.
        """
        refuse_event_loop()
        if is_own_thread():
            raise WrongEventLoop(
                "this is one of the engine's own threads, which would wait for itself: make the "
                "call in another thread (a finalizer may close a manager, and call nothing else)"
            )
        if context is None:
            # Nothing of the caller's own, which takes a fifth of the time. But the engine has to
            # know of a factory which one it is, and who waits for it.
            alone = ASKERS.get() is NOBODY
            context = _caller.context.copy() if alone else callers_context()
        call = _Call(begin, context)
        self._calls.append(call)
        # Whoever ends the loop says so first and looks for calls then, so none is forgotten.
        if self._why_over is not None:
            raise ManagerClosed(self._why_over)
        if not self._is_woken:
            self._is_woken = True
            self._post(self._take)
        try:
            call.answered.acquire()
        except BaseException:  # KeyboardInterrupt, in the main thread
            self._post(call.give_up)
            raise
        error = call.error
        if error is None:
            return call.result
        try:
            raise error
        finally:
            del call, error  # no circle through the trace

    def post(self, begin: Callable[[], Any]) -> None:
        """Call something on the loop some time; nobody waits for it. From any thread."""
        if self._why_over is None:
            self._post(begin)

    def _post(self, callback: Callable[[], Any]) -> None:
        try:
            self.loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed: it has ended, and with it all calls
            return

    def _take(self) -> None:
        """Begin all calls that are there; on the loop."""
        self._is_woken = False  # first: what comes from here on wakes us again
        if self._why_over is not None:
            self._fail_rest()
            return
        try:
            self._before_calls()
        finally:
            calls = self._calls
            while calls:
                calls.popleft().start(self.loop)

    # --- the end ------------------------------------------------------------------------------

    def end(self, grace_seconds: float | None) -> None:
        """End everything, and wait for that, unless this is one of the engine's own threads.

        There it is a garbage collection, or a callback, that ends it. It goes on when that thread
        gets on with its work; the interpreter waits for it at exit.
        """
        if self not in _running:
            return  # ended, or this is the child of a fork
        self._post(lambda: self._begin_end(grace_seconds))
        if is_own_thread():
            return
        self._thread.join()
        error, self._end_error = self._end_error, None
        if error is not None:
            raise error

    @property
    def is_open(self) -> bool:
        """Whether it neither has ended nor is about to, nor belongs to another process."""
        return self in _running and self._ending is None

    def end_soon(self) -> None:
        """End everything, and wait for nothing. From any thread."""
        self.post(lambda: self._begin_end(None))

    def _begin_end(self, grace_seconds: float | None) -> None:
        if self._ending is None:
            self._ending = self.loop.create_task(self._end(grace_seconds), name="persistence-end")
        elif grace_seconds is not None and not self._ending.done():
            self._hurrying = self.loop.create_task(self._finish(grace_seconds))
            self._hurrying.add_done_callback(look_at)  # `_end` has met the same one

    async def _end(self, grace_seconds: float | None) -> None:
        try:
            await self._finish(grace_seconds)
        except Exception as error:  # noqa: BLE001 - raised by `end`
            self._end_error = error
        finally:
            self.loop.stop()

    def _main(self) -> None:
        mark_own_thread()
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            self._why_over = "the manager is closed"
            try:
                self._clean_up()
            finally:
                self._fail_rest()
                _running.discard(self)

    def _clean_up(self) -> None:
        loop = self.loop
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=_LEFT_OVER_SECONDS))
        loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()

    def _fail_rest(self) -> None:
        while self._calls:
            call = self._calls.popleft()
            call.error = ManagerClosed("the manager is closed")
            call.answered.release()

    def forked(self) -> None:
        """In the child of a fork: there is no thread here."""
        self._why_over = (
            "this manager was opened by another process; after a fork, open one of your own with "
            "its own disk.path"
        )


def refuse_event_loop() -> None:
    """Raise WrongEventLoop if this thread runs an event loop: a blocking call would hold it up."""
    if running_loop() is not None:
        raise WrongEventLoop(
            "this thread runs an event loop, and a call of persistence.sync would hold it up (or, "
            "from the engine's own thread, wait for itself): use persistence.StateManager with "
            "await there, or make the call in another thread (await asyncio.to_thread(...))"
        )


_running: set[LoopThread] = set()
_inherited: set[LoopThread] = set()
"""In the child of a fork, those of the parent: kept, for what would be closed here is shared."""


def _end_all() -> None:
    """At exit: what is acknowledged is safe anyway; this makes the last checkpoint and seals."""
    for thread in list(_running):
        try:
            thread.end(None)
        except Exception:  # noqa: BLE001 - logged; the others are to be closed too
            _log.exception("closing a manager at exit")


def _after_fork_in_child() -> None:
    for thread in list(_running):
        thread.forked()
        _inherited.add(thread)
    _running.clear()


atexit.register(_end_all)
os.register_at_fork(after_in_child=_after_fork_in_child)
