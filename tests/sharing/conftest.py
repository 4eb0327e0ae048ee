"""Workers that share sessions through a real server, each with a directory of its own."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from persistence import StateManager
from tests.engine import ScriptedFiles, config_for
from tests.redis_servers import Proxy, RedisServer

Worker = Callable[..., Awaitable[StateManager]]


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    """Open workers that are closed at the end of the test.

    Called with a URL, settings of the shared tier, and `path` for a directory that exists already.
    """
    numbers = itertools.count(1)
    opened: list[StateManager] = []

    async def worker(
        url: str,
        *,
        path: Path | None = None,
        session: dict[str, Any] | None = None,
        memory: dict[str, Any] | None = None,
        checkpoint: dict[str, Any] | None = None,
        security: dict[str, Any] | None = None,
        **redis: Any,
    ) -> StateManager:
        sections: dict[str, dict[str, Any]] = {
            # On a slow machine an answer may take a second, and that is no outage. Tests of
            # servers that hang say how long a worker waits.
            "redis": {"timeout_seconds": 10, "heartbeat_seconds": 1, **redis},
            "session": session or {},
            "shutdown": {"checkpoint": False},  # it would wait for servers that hang
            "memory": memory or {},
            "checkpoint": checkpoint or {},
        }
        if security is not None:
            sections["security"] = security
        directory = path or tmp_path / f"worker {next(numbers)}"
        config = config_for(directory, **sections)
        state = StateManager(url, config, files=ScriptedFiles())
        await state.open()
        opened.append(state)
        return state

    yield worker
    for state in opened:
        await state.close()


@pytest.fixture
async def proxy(own_server: RedisServer) -> AsyncIterator[Proxy]:
    """A proxy in front of the test's own server."""
    running = await Proxy(own_server.port).start()
    yield running
    await running.close()
