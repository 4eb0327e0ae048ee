"""Whether a provider with connections may be used, and by whom.

Connections belong to the event loop that made them, and to its process. In another loop they break
in the middle of a call; the child of a fork would read and write the parent's.
"""

from __future__ import annotations

import asyncio
import os
from typing import Final

from persistence.errors import ManagerClosed, WrongEventLoop

_NOT_OPEN: Final = "the provider is not open yet: await open(), or use it with 'async with'"
_CLOSED: Final = "the provider is closed; make another one"


class Opening:
    """Opened once, in one event loop of one process, and closed once."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = 0
        self._why_closed: str | None = _NOT_OPEN

    def begin(self) -> None:
        """Say that it is about to be opened, or looked at again.

        Raises:
            ManagerClosed, WrongEventLoop: it is closed, or it is somebody else's.
        """
        if self._why_closed is None:
            self._check_owner()
        elif self._why_closed is _CLOSED:
            raise ManagerClosed(_CLOSED)

    def done(self) -> None:
        """Let in who comes in this event loop and process."""
        if self._why_closed is _NOT_OPEN:  # not closed meanwhile
            self._loop, self._process = asyncio.get_running_loop(), os.getpid()
            self._why_closed = None

    @property
    def is_new(self) -> bool:
        """Whether nobody has opened it yet, nor closed it."""
        return self._why_closed is _NOT_OPEN

    def check(self) -> None:
        """Raise unless it is open, here.

        Raises:
            ManagerClosed: it is closed, or this is the child of a fork.
            WrongEventLoop: it was opened in another event loop.
        """
        if self._why_closed is not None:
            raise ManagerClosed(self._why_closed)
        self._check_owner()

    def end(self) -> bool:
        """Let nobody in any more; return whether there may be something to close here.

        Raises:
            WrongEventLoop: it was opened in another event loop; nothing has changed.
        """
        if self._why_closed is None:
            if self._process != os.getpid():
                return False  # what would be closed is the parent's
            self._check_owner()
        self._why_closed = _CLOSED
        return self._loop in (None, asyncio.get_running_loop())

    def _check_owner(self) -> None:
        if self._process != os.getpid():
            raise ManagerClosed(
                "this provider was opened by another process, which uses its connections; after a "
                "fork, make one of your own"
            )
        if asyncio.get_running_loop() is not self._loop:
            raise WrongEventLoop(
                "this provider was opened in another event loop, where its connections are: make "
                "one in each event loop, or hand the call to that loop "
                "(asyncio.run_coroutine_threadsafe); threads can share a "
                "persistence.sync.StateManager"
            )
