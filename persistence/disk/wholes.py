"""Changes of several commits that no cut of the log may come between.

A session that gets another id is one: the new one is created, then the old one ends. A restore
point of the moment between the two would bring both back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Wholes:
    """Changes or cuts at a time, any number of them, never both. On the event loop.

    Cuts go first: a change that comes while one waits begins behind it, so that changes that never
    cease keep no cut waiting. A change must not wait for a cut.
    """

    def __init__(self) -> None:
        self._changes = 0
        self._cuts = 0
        self._no_change = asyncio.Event()
        self._no_cut = asyncio.Event()

    @asynccontextmanager
    async def change(self) -> AsyncIterator[None]:
        """Let no cut come between what is done in this block."""
        while self._cuts:
            self._no_cut.clear()
            await self._no_cut.wait()
        self._changes += 1
        try:
            yield
        finally:
            self._changes -= 1
            if not self._changes:
                self._no_change.set()

    @asynccontextmanager
    async def cut(self) -> AsyncIterator[None]:
        """Let no change be half done in this block."""
        self._cuts += 1
        try:
            while self._changes:
                self._no_change.clear()
                await self._no_change.wait()
            yield
        finally:
            self._cuts -= 1
            if not self._cuts:
                self._no_cut.set()
