"""Functions of the application that may block, each called in a thread of its own.

Not in an executor: its few threads are everybody's. A function that waits for another one (a
factory that asks for a second resource) may find them all taken by such as itself, one that hangs
takes one away for good, and at exit the interpreter waits for all of them. A thread of its own is
in nobody's way, and as it is a daemon, the process ends without it.

What bounds the number of threads:
- a factory runs for somebody who waits for it in a thread, so there are no more of them than those;
- closes come in bunches, and nobody waits for them: so many at a time have a `Places`, which a
  close that hangs loses after some time. What is left then are threads that hang.

From Python 3.12 on no thread can be started any more when the interpreter exits, which is when the
last closes come. So one is kept ready for them as soon as there is something to close.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any, Final

from persistence.resources import CLOSE_TIMEOUT_SECONDS

_HELD_SECONDS: Final = CLOSE_TIMEOUT_SECONDS  # when a close is given up, somebody else has its turn


class _Spare:
    """A thread that calls what it is given, one after the other; it is there once it is `ready`.

    A call that hangs keeps those behind it from being made, and nobody else.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._process = 0

    def ready(self) -> None:
        """Start the thread, unless this process has it or can have none."""
        if self._process == os.getpid():
            return
        calls = self._calls = SimpleQueue()
        thread = threading.Thread(
            target=_call_all, args=(calls,), name="persistence-spare", daemon=True
        )
        with suppress(RuntimeError):
            thread.start()
            self._process = os.getpid()

    def call(self, function: Callable[[], None]) -> bool:
        """Let the thread call a function; False: there is no thread."""
        if self._process != os.getpid():
            return False
        self._calls.put(function)
        return True


def _call_all(calls: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        calls.get()()


_spare: Final = _Spare()
_needs_spare: Final = sys.version_info >= (3, 12)


class Places:
    """So many calls at a time; others begin in the order in which they came. On the loop.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: deque[Callable[[], None]] = deque()

    def take(self, begin: Callable[[], None]) -> None:
        """Call `begin` when there is a place; now, if there is one."""
        if not self._free:
            self._waiting.append(begin)
            return
        self._free -= 1
        begin()

    def give_back(self) -> None:
        """Let the next one have a place."""
        self._free += 1
        if self._waiting:
            self.take(self._waiting.popleft())


def off_loop(function: Any, places: Places | None = None) -> Any:
    """Return what calls a function in a thread, where it may block, and is awaited.

    Whoever is cancelled while awaiting it stops waiting; the function is called all the same. What
    is no function, or a coroutine function, is returned as it is.

    Args:
        function: what to call.
        places: the call needs one of them; None: it begins at once.
    """
    if not callable(function) or inspect.iscoroutinefunction(function):
        return function
    if places is not None and _needs_spare:
        _spare.ready()

    async def call(*arguments: Any) -> Any:
        result = await _Call(function, arguments, places).outcome
        return await result if inspect.isawaitable(result) else result

    return call


class _Call:
    """One call. `_run` happens in its thread, all else on the loop.

    Attributes:
        outcome: resolved with what the function returns or raises.
    """

    def __init__(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], places: Places | None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.outcome: asyncio.Future[Any] = self._loop.create_future()
        self._function = function
        self._arguments = arguments
        self._context = copy_context()
        self._places = places
        self._losing_place: asyncio.TimerHandle | None = None
        if places is None:
            self._begin()
        else:
            places.take(self._begin)

    def _begin(self) -> None:
        if self._places is not None:
            self._losing_place = self._loop.call_later(_HELD_SECONDS, self._leave_place)
        thread = threading.Thread(target=self._run, name="persistence-resource", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if threading.main_thread().is_alive():
                self._loop.call_soon(self._end, None, error)  # the system has none for us
            elif not _spare.call(self._run):  # at exit, where there are none any more
                self._run()

    def _run(self) -> None:
        result: Any = None
        error: BaseException | None = None
        try:
            result = self._context.run(self._function, *self._arguments)
        except Exception as raised:  # noqa: BLE001 - handed to whoever awaits the call
            error = raised
            if isinstance(raised, StopIteration):  # a future does not take it
                error = _foreign(self._function, raised)
        except BaseException as raised:  # noqa: BLE001 - a SystemExit would end the engine's loop
            error = _foreign(self._function, raised)
        try:
            self._loop.call_soon_threadsafe(self._end, result, error)
        except RuntimeError:
            return  # the loop is closed: nobody waits any more

    def _end(self, result: Any, error: BaseException | None) -> None:
        self._leave_place()
        if self.outcome.done():
            return  # whoever awaited it was cancelled
        if error is None:
            self.outcome.set_result(result)
        else:
            self.outcome.set_exception(error)

    def _leave_place(self) -> None:
        if self._places is not None and self._losing_place is not None:
            self._losing_place.cancel()
            self._losing_place = None
            self._places.give_back()


def _foreign(function: Callable[..., Any], raised: BaseException) -> Exception:
    """Return an error for what a function must not raise through the loop."""
    error = RuntimeError(f"{function!r} raised {raised!r}, which ends nothing but its own thread")
    error.__cause__ = raised
    return error
