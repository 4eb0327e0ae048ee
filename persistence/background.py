"""Work that goes on for as long as a manager is open."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

from persistence.errors import PersistenceError

_log = logging.getLogger("persistence")

_PAUSE_SECONDS: Final = 1.0  # after an error

Step = Callable[[], Awaitable[None]]
"""Waits until there is something to do, and does it."""


def start(steps: Mapping[str, Step]) -> list[asyncio.Task[None]]:
    """Run each step again and again, in a task of its own that is named after it."""
    return [
        asyncio.create_task(_forever(name, step), name=f"persistence-{name}")
        for name, step in steps.items()
    ]


async def stop(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel the tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _forever(name: str, step: Step) -> None:
    """Run a step again and again; an error in it is logged and not the end."""
    while True:
        try:
            await step()
        except PersistenceError as error:
            _log.warning("background work '%s': %s", name, error)
            await asyncio.sleep(_PAUSE_SECONDS)
        except Exception:  # noqa: BLE001 - logged; the next round tries again
            _log.exception("background work '%s' failed", name)
            await asyncio.sleep(_PAUSE_SECONDS)
