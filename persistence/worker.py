"""Runs a worker: an open manager, signals, an orderly end.

On SIGTERM or SIGINT the worker's coroutine is cancelled; then running edits end, everything is
synced, the shared tier gets what it has not seen, a checkpoint is written, and the log is sealed,
all within ``shutdown.grace_seconds``. A second signal leaves out what may take long: the log is
consistent all the same.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

from persistence.clock import Clock
from persistence.config import StateConfig
from persistence.manager import StateManager

_log = logging.getLogger("persistence.worker")

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_LEFT_OVER_SECONDS: Final = 0.5
_MAIN_SHARE: Final = 0.4
"""Share of the grace period that the worker's own coroutine has to end in once it is cancelled."""


def run(
    main: Callable[[StateManager], Awaitable[object]],
    config: StateConfig | None = None,
    *,
    url: str | None = None,
    clock: Clock | None = None,
    schema: object = None,
) -> None:
    """Run ``await main(state)`` with an open manager; return when it ended or was told to stop.

    To be called in the main thread, without a running event loop. Once the manager is open, what
    has been imported and built by then is frozen (`gc.freeze`): full collections of the garbage
    collector, which stop the loop, are short then.

    Args:
        main: a coroutine function that gets the open manager. It is cancelled on a signal.
        config: the configuration; default: all defaults.
        url: URL of the shared tier; it overrides ``redis.url``.
        schema: what sessions are to the application; see `StateManager`.
        clock: where time comes from; default: the machine's clocks.

    Raises:
        PersistenceError: the manager could not be opened (see `StateManager.open`).
        BaseException: whatever `main` raised, `SystemExit` included, after everything has been
            closed; also the `SystemExit` of another task.
    """
    _run_on_a_loop(_Worker(main, StateManager(url, config, clock=clock, schema=schema)))


def _run_on_a_loop(worker: _Worker) -> None:
    """Like ``asyncio.run``, which would wait for ever for a task that takes no cancellation."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        _run_to_its_end(loop, worker)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=_LEFT_OVER_SECONDS))
        loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()


def _run_to_its_end(loop: asyncio.AbstractEventLoop, worker: _Worker) -> None:
    """Run a worker; where a task ends the loop with `SystemExit`, let the worker end first."""
    running = loop.create_task(worker.run())
    wanted: BaseException | None = None
    while not running.done():
        try:
            loop.run_until_complete(running)
        except (SystemExit, KeyboardInterrupt) as error:
            wanted = wanted or error
            worker.stop()
    if wanted is not None:
        raise wanted


@contextmanager
def _frozen() -> Iterator[None]:
    """Let the garbage collector leave alone what is there by now, for as long as the worker runs.

    Modules, classes and configuration stay for good, but each full collection goes over all of
    them, and for 30 ms and more nothing else runs. A process that has frozen something before
    decides for itself.
    """
    is_ours = not gc.get_freeze_count()
    if is_ours:
        gc.collect()
        gc.freeze()
    try:
        yield
    finally:
        if is_ours:
            gc.unfreeze()


class _Worker:
    """One run."""

    def __init__(
        self, main: Callable[[StateManager], Awaitable[object]], state: StateManager
    ) -> None:
        self._main = main
        self._state = state
        self._signals = 0
        self._told = asyncio.Event()
        self._told_again = asyncio.Event()
        self._hurrying: asyncio.Task[None] | None = None

    async def run(self) -> None:
        with self._listening():
            opening = asyncio.create_task(self._state.open(), name="persistence-open")
            if not await self._until_told(opening):
                opening.cancel()
                await asyncio.wait((opening,))
                await self._state.close()
                return
            opening.result()
            with _frozen():
                await self._serve()

    async def _serve(self) -> None:
        working = asyncio.create_task(self._worked(), name="persistence-worker")
        try:
            if not await self._until_told(working):
                working.cancel()
                grace_seconds = self._state.config.shutdown.grace_seconds
                self._state.start_grace()
                again = asyncio.create_task(self._told_again.wait())
                await asyncio.wait(
                    (working, again),
                    timeout=_MAIN_SHARE * grace_seconds,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                again.cancel()
                if not working.done():
                    _log.warning("the worker's coroutine goes on although it was cancelled")
        finally:
            await self._state.close()
        if working.done() and not working.cancelled():
            working.result()

    def stop(self) -> None:
        """Do what the first signal does."""
        self._told.set()

    async def _worked(self) -> None:
        await self._main(self._state)

    async def _until_told(self, task: asyncio.Task[None]) -> bool:
        """Wait until `task` is done (True), or a signal comes first."""
        told = asyncio.create_task(self._told.wait())
        await asyncio.wait((task, told), return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        return task.done()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._take, number)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _take(self, number: signal.Signals) -> None:
        self._signals += 1
        if self._signals == 1:
            _log.info("%s: shutting down", signal.Signals(number).name)
            self.stop()
        elif self._hurrying is None:
            self._told_again.set()
            _log.warning("%s again: shutting down at once", signal.Signals(number).name)
            self._hurrying = asyncio.create_task(self._state.close(grace_seconds=0))
