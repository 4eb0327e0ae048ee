"""How tasks end that somebody may have stopped waiting for."""

from __future__ import annotations

import asyncio
from typing import Any


def look_at(task: asyncio.Task[Any]) -> None:
    """Look at how a task ended: whoever waits is told, but perhaps nobody does any more.

    Else the event loop complains that its exception was never retrieved.
    """
    if not task.cancelled():
        task.exception()
