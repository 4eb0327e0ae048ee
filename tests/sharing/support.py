"""What the tests of sharing have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

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
        sides = [sharing_of(state) for state in states]
        return all(side.is_up and side.copies.is_listening for side in sides)

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


class HeldReplies:
    """Holds what the shared tier answers to a worker that asks about sessions.

    Args:
        state: the worker.
        monkeypatch: of the test.
    """

    def __init__(self, state: StateManager, monkeypatch: pytest.MonkeyPatch) -> None:
        self._arrived = asyncio.Event()
        self._go_on = asyncio.Event()
        questions = sharing_of(state)._fills._questions
        for name in ("load", "stored"):
            monkeypatch.setattr(questions, name, self._later(getattr(questions, name)))

    def _later(self, ask: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def asked(*arguments: Any) -> Any:
            reply = await ask(*arguments)
            self._arrived.set()
            await self._go_on.wait()
            return reply

        return asked

    async def arrived(self) -> None:
        """Wait until there is one."""
        async with asyncio.timeout(_PATIENCE_SECONDS):
            await self._arrived.wait()

    def release(self) -> None:
        """Pass on what was held, and everything from now on."""
        self._go_on.set()
