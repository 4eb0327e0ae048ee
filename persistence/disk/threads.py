"""The disk tier's own threads. They run only calls which release the interpreter lock.

Never the loop's default executor, which an application may have filled with slow work. One thread
is the *writer*: appends, and the syncs that acknowledge them, happen in order. Another one is the
*syncer*, for syncs that nobody's update waits for: appends go on beside it. Both take their calls
from a plain queue and resolve loop futures themselves, because that is on the way of every update
and an executor costs a third more: its own future, a second one for the loop, and one more turn of
the loop to copy the result. The *readers*, which read what is not cached and compact, are an
executor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from threading import Thread, main_thread
from typing import Any, Final, ParamSpec, TypeAlias, TypeVar

from persistence.errors import ManagerClosed
from persistence.own_threads import mark_own_thread

P = ParamSpec("P")
T = TypeVar("T")

Told: TypeAlias = Callable[[T | None, BaseException | None], None]
"""Gets what a call returned, or what it raised."""

_READERS: Final = 4


class _Lane:
    """One thread that runs its calls in order. Started on first use."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[tuple[Callable[[], Any], Told[Any]] | None]
        self._calls = SimpleQueue()
        self._thread: Thread | None = None

    def put(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Run `call` after all earlier ones."""
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.tell(call, partial(_resolve, done))
        return done

    def tell(self, call: Callable[[], T], told: Told[T]) -> None:
        """Run `call` after all earlier ones; then, on the loop, `told` with what it led to."""
        if self._thread is None:
            loop = asyncio.get_running_loop()
            thread = Thread(target=self._run, args=(loop,), name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                if not _is_exiting():
                    raise
                told(*_outcome(call))
                return
            self._thread = thread
        self._calls.put((call, told))

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        mark_own_thread()
        while (item := self._calls.get()) is not None:
            call, told = item
            outcome = _outcome(call)
            try:
                loop.call_soon_threadsafe(told, *outcome)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more

    def end(self) -> None:
        """Wait for what is running and end the thread."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread.join()
            self._thread = None


class Threads:
    """Started on first use, joined by `close`. Used from one event loop."""

    def __init__(self) -> None:
        self._writer = _Lane("persistence-writer")
        self._syncer = _Lane("persistence-syncer")
        self._closed = False
        self._readers = ThreadPoolExecutor(_READERS, "persistence-reader", mark_own_thread)

    def write(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Run `call` in the writer thread, after all earlier ones."""
        self._check_open()
        return self._writer.put(partial(call, *args, **kwargs))

    def write_and_tell(self, told: Told[T], call: Callable[[], T]) -> None:
        """Run `call` as `write` does, and call `told` with what it led to.

        That is a turn of the loop earlier than a callback of a future.
        """
        self._check_open()
        self._writer.tell(call, told)

    def sync(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Run `call` in the syncing thread, beside what is being written."""
        self._check_open()
        return self._syncer.put(partial(call, *args, **kwargs))

    def read(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Run `call` in one of the other threads."""
        self._check_open()
        loop = asyncio.get_running_loop()
        try:
            return loop.run_in_executor(self._readers, partial(call, *args, **kwargs))
        except RuntimeError:
            if not _is_exiting():
                raise
            done: asyncio.Future[T] = loop.create_future()
            _resolve(done, *_outcome(partial(call, *args, **kwargs)))
            return done

    def _check_open(self) -> None:
        if self._closed:
            raise ManagerClosed("the manager is closed")

    def close(self) -> None:
        """Wait for what is running and end the threads."""
        self._closed = True
        self._writer.end()
        self._syncer.end()
        self._readers.shutdown(wait=True)


def _is_exiting() -> bool:
    """Whether the interpreter is exiting.

    By the time it closes us it has ended all executors, and from Python 3.12 on it starts no more
    threads. Calls run where they are made then: nothing else is left to do there either.
    """
    return not main_thread().is_alive()


def _outcome(call: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """Return what a call returns, or what it raises."""
    try:
        return call(), None
    except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the call
        return None, error


def _resolve(done: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(result)
    elif isinstance(error, StopIteration):  # a future does not take it
        done.set_exception(RuntimeError(f"the call raised {error!r}"))
    else:
        done.set_exception(error)


async def undisturbed(work: Awaitable[T]) -> T:
    """Await `work`; when the caller is cancelled, let it end first, and then be cancelled.

    A call in a thread goes on whatever happens to who awaits it: what it uses must stay.
    """
    running = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # has been looked at
        raise
