"""One worker of a replay with several: applies what its parent sends it.

Run as ``python -m persistence.cli.replay_worker`` with pipes for stdin and stdout; see
`replay_pipe` for what goes through them. It ends, in order, when its stdin does: at the end of the
replay, and when its parent dies.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import astuple
from typing import Any, Final

from persistence import StateManager
from persistence.cli.accesslog import Request
from persistence.cli.failure import EXIT_FAILED, EXIT_OK
from persistence.cli.replay_model import Numbers
from persistence.cli.replay_pipe import OPEN, messages, packed
from persistence.cli.replay_sessions import ManagerApplier, begin, config_of
from persistence.errors import PersistenceError

_STDOUT: Final = 1


def main() -> int:
    """Run the worker; return its exit code."""
    return asyncio.run(_work())


async def _work() -> int:
    questions = messages(await _stdin())
    try:
        async with StateManager(config=config_of(await anext(questions))) as state:
            _answer(OPEN, None)
            await _Worker(state).serve(questions)
    except PersistenceError as error:
        _answer(OPEN, str(error))
        return EXIT_FAILED
    except StopAsyncIteration:  # the parent ended before it said anything
        return EXIT_FAILED
    return EXIT_OK


async def _stdin() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    return reader


def _answer(number: int, error: str | None, result: Any = None) -> None:
    data = packed([number, error, result])
    # Nobody reads the answers of a parent that is gone: stdin ends too, which ends the worker.
    with suppress(BrokenPipeError):
        while data:  # blocks when the parent falls behind, which always reads
            data = data[os.write(_STDOUT, data) :]


class _Worker:
    """Answers questions, each in a task of its own."""

    def __init__(self, state: StateManager) -> None:
        self._state = state
        self._applier = ManagerApplier(state)
        self._operations: dict[str, Callable[..., Awaitable[Any]]] = {
            "begin": self._begin,
            "apply": self._apply,
            "save": self._applier.save_watermark,
            "get": self._get,
            "numbers": self._numbers,
            "retried": self._retried,
        }

    async def serve(self, questions: AsyncIterator[Any]) -> None:
        """Answer until there are no more questions."""
        async with asyncio.TaskGroup() as group:
            async for number, operation, arguments in questions:
                group.create_task(self._serve_one(number, operation, arguments))

    async def _serve_one(self, number: int, operation: str, arguments: list[Any]) -> None:
        try:
            result = await self._operations[operation](*arguments)
        except PersistenceError as error:
            _answer(number, str(error))
        else:
            _answer(number, None, result)

    async def _begin(self, cursor: dict[str, Any], where: str, resume: bool) -> int:
        return await begin(self._state, cursor, where, resume=resume)

    async def _apply(self, position: int, sid: str, request: list[Any]) -> bool:
        return await self._applier.apply(position, sid, Request(*request))

    async def _get(self, sid: str) -> dict[str, Any] | None:
        session = await self._state.get_session(sid)
        return None if session is None else dict(session.data)

    async def _numbers(self) -> tuple[Any, ...]:
        return astuple(Numbers.of(await self._state.stats()))

    async def _retried(self) -> int:
        return self._applier.retried


if __name__ == "__main__":
    sys.exit(main())
