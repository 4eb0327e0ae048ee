"""What the tests of sharing have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from persistence import StateManager
from persistence.sharing.sharing import Sharing

_PATIENCE_SECONDS = 20.0
_POLL_SECONDS = 0.002


def sharing_of(state: StateManager) -> Sharing:
    """Return a worker's side of the shared tier."""
    assert state._sharing is not None, "it has one"
    return state._sharing


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait until something that happens elsewhere has happened."""
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while not await condition():  # noqa: ASYNC110 - it happens in another process
            await asyncio.sleep(_POLL_SECONDS)


async def until_up(*states: StateManager) -> None:
    """Wait until workers are connected and listening."""

    async def all_up() -> bool:
        return all(sharing_of(state).is_up for state in states)

    await until(all_up)


async def until_down(*states: StateManager) -> None:
    """Wait until workers have noticed that the shared tier is away."""

    async def all_down() -> bool:
        return not any(sharing_of(state).is_up for state in states)

    await until(all_down)


async def until_delivered(*states: StateManager) -> None:
    """Wait until nothing is left in the outboxes."""

    async def empty() -> bool:
        return not any(len(sharing_of(state).outbox) for state in states)

    await until(empty)


async def value(state: StateManager, session_id: str, field: str = "n") -> Any:
    """Return one field as a worker sees it now; None: there is no such session."""
    session = await state.get_session(session_id)
    return None if session is None else session[field]


def add_one(data: Any) -> None:
    """Count up."""
    data["n"] += 1
