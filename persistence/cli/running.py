"""Runs a command so that whatever asks it to end lets it clean up first."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, TypeVar

_Result = TypeVar("_Result")

_ENDING_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)
_ended_by: list[int] = []


def exit_code_of_signal() -> int:
    """Return what shells report for the signal that ended the last command: 128 + its number."""
    return 128 + (_ended_by[0] if _ended_by else signal.SIGINT)


def _interrupt(number: int, _: FrameType | None) -> None:
    _ended_by.append(number)
    raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, as SIGINT does.

    Their default would leave temporary directories and child processes behind.
    """
    _ended_by.clear()
    before = {number: signal.getsignal(number) for number in _ENDING_SIGNALS}
    for number in _ENDING_SIGNALS:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Run `work` to its end; SIGINT, SIGTERM and SIGHUP cancel it first.

    Cancelling closes the engine in order, where an exception raised in the middle of its work
    would only break off.

    Raises:
        KeyboardInterrupt: a signal ended it.
    """
    with interruptible():
        return asyncio.run(_guarded(work))


async def _guarded(work: Coroutine[Any, Any, _Result]) -> _Result:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    ended_by: list[int] = []

    def end(number: int) -> None:
        if not ended_by:  # a second one must not cut the closing short
            task.cancel()
        ended_by.append(number)
        _ended_by.append(number)

    for number in _ENDING_SIGNALS:
        loop.add_signal_handler(number, end, number)
    try:
        return await task
    except asyncio.CancelledError:
        if ended_by:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number in _ENDING_SIGNALS:
            loop.remove_signal_handler(number)
