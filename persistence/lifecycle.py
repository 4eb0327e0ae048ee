"""Who is let in, and when: whether a manager is open, for this process, this thread and moment."""

from __future__ import annotations

import asyncio
import os
import weakref
from threading import get_ident
from typing import Any

from persistence.errors import ManagerClosed, WrongEventLoop
from persistence.turns import Turns

_open_managers: weakref.WeakSet[Lifecycle] = weakref.WeakSet()


class Lifecycle:
    """The part of `StateManager` that knows whether it may be used.

    It is opened once, in one event loop, and closed once. While a checkpoint is being put in place,
    it is open, and who comes waits. After a fork it belongs to the parent alone.
    """

    def __init__(self) -> None:
        self._is_open = False
        self._gate: asyncio.Event | None = None  # set and taken away when all may come in again
        self._loop: asyncio.AbstractEventLoop
        self._turns: Turns
        self._thread = 0
        self._why_closed = "the manager is not open; use it with 'async with' or await open()"

    def _opened(self) -> None:
        """Let in who comes in this event loop and thread."""
        self._loop = asyncio.get_running_loop()
        self._thread = get_ident()
        self._turns = Turns()
        self._is_open = True
        _open_managers.add(self)

    def _closed(self) -> None:
        """Let nobody in any more."""
        self._is_open = False
        self._why_closed = "the manager is closed"
        _open_managers.discard(self)

    def _refuse(self, session_id: object = None) -> Any:
        raise ManagerClosed(self._why_closed)

    def _check_open(self) -> None:
        if not self._is_open:
            self._refuse()
        # Not get_running_loop(): on some Pythons that asks the system for the process each time.
        if get_ident() != self._thread or not self._loop.is_running():
            raise wrong_loop()

    async def _ready(self) -> None:
        """Raise ManagerClosed if it is closed; wait while a checkpoint is being put in place."""
        self._check_open()
        while self._gate is not None:
            await self._gate.wait()
            self._check_open()

    async def _begin(self) -> None:
        """As `_ready`, for calls that do much: only so many begin in one turn of the loop.

        When this returns, nothing has happened since it looked.
        """
        while True:
            await self._ready()
            if self._turns.take():
                return
            await self._turns.enter()
            if self._gate is None:
                self._check_open()
                return

    def _forked(self) -> None:
        """In the child of a fork: this manager belongs to the parent."""
        self._is_open = False
        self._why_closed = (
            "this manager was opened by another process; after a fork, open one of your own "
            "with its own disk.path"
        )


def wrong_loop() -> WrongEventLoop:
    """Return the error for a call from another event loop or thread than the manager's."""
    return WrongEventLoop(
        "this manager was opened in another event loop: use persistence.sync.StateManager, which "
        "any thread can use, or hand the call to that loop (asyncio.run_coroutine_threadsafe), or "
        "open one of your own with its own disk.path"
    )


def _after_fork_in_child() -> None:
    for manager in list(_open_managers):
        manager._forked()
    _open_managers.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
