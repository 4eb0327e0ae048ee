"""Many asyncio tasks that share one list of work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

TASK_COUNT = 1000
"""Concurrent tasks wherever a workload is not about their number."""


async def in_tasks(
    items: Iterable[Any], act: Callable[[Any], Awaitable[object]], task_count: int = TASK_COUNT
) -> None:
    """Do `act` for every item, by `task_count` tasks that each take the next one when free."""
    remaining = iter(items)
    await asyncio.gather(*(_take(remaining, act) for _ in range(task_count)))


async def _take(remaining: Iterator[Any], act: Callable[[Any], Awaitable[object]]) -> None:
    for item in remaining:
        await act(item)
