"""How soon an update of one worker is seen by another one, through a Redis server."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import payloads
from benchmarks.contender import Metrics, check
from benchmarks.engine.opened import Engine, fill, opened
from benchmarks.peers.bare import latency_metrics
from benchmarks.redis_server import RedisServer


@dataclass
class SeenElsewhere(Engine):
    """From the call of `update_session` here until `get_session` there returns what it wrote.

    Both workers are in one process, so that one clock measures. The other one reads without a
    pause, and without `fresh`: only the announcement tells it.
    """

    update_count: int
    session_count: int = 100
    name: str = "persistence, another worker's read"

    async def open(self, directory: Path) -> None:
        self._server = RedisServer()
        self._server.start()
        await self.open_state(directory / "here", url=self._server.url)
        await fill(self.state, self.session_count)
        self._there = opened(directory / "there", url=self._server.url)
        self._other: Any = await self._there.__aenter__()
        self._next = 0

    async def measure(self) -> Metrics:
        return latency_metrics([await self._delay() for _ in range(self.update_count)])

    async def _delay(self) -> float:
        sid = payloads.session_id(self._next % self.session_count)
        self._next += 1
        before = (await self._other.get_session(sid))["prefs"]["visits"]
        started = time.perf_counter()
        updating = asyncio.create_task(self.state.update_session(sid, payloads.count_visit))
        while (session := await self._other.get_session(sid))["prefs"]["visits"] == before:  # noqa: ASYNC110
            await asyncio.sleep(0)
        delay = time.perf_counter() - started
        check(session["prefs"]["visits"] == before + 1, "an update was lost or doubled")
        await updating
        return delay

    async def close(self) -> None:
        await self._there.__aexit__(None, None, None)
        await super().close()
        self._server.close()
