"""Reading sessions that are in memory."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from benchmarks import payloads
from benchmarks.contender import Metrics, Stopwatch, check
from benchmarks.engine.opened import MIB, Engine, fill, wrong_sessions


@dataclass
class HotRead(Engine):
    """`await get_session(id)` for every session, shuffled; then what `read` says about it.

    Attributes:
        read: "get" stops there, "field" reads one small field, "whole" all of the data.
    """

    read: str
    session_count: int
    read_count: int
    request_tasks: int = 32

    async def open(self, directory: Path) -> None:
        memory_bytes = max(100 * MIB, self.session_count * 2000)
        await self.open_state(directory, memory_bytes=memory_bytes)
        await fill(self.state, self.session_count)
        self._ids = [payloads.session_id(index) for index in range(self.session_count)]
        self._random = random.Random(1)
        self._random.shuffle(self._ids)
        check(not await wrong_sessions(self.state, range(100)), "sessions are not as created")

    async def measure(self) -> Metrics:
        rounds = max(1, self.read_count // self.session_count)
        loop = {"get": self._get, "field": self._get_field, "whole": self._get_whole}[self.read]
        await loop()  # what lay idle while others had their turn gets back into the CPU's caches
        with Stopwatch() as watch:
            for _ in range(rounds):
                await loop()
        return watch.rate(rounds * len(self._ids))

    async def request(self) -> None:
        session = await self.state.get_session(
            self._ids[self._random.randrange(self.session_count)]
        )
        if self.read == "field":
            session["prefs"]
        elif self.read == "whole":
            dict(session.data)

    async def _get(self) -> None:
        get_session = self.state.get_session
        for session_id in self._ids:
            await get_session(session_id)

    async def _get_field(self) -> None:
        get_session = self.state.get_session
        for session_id in self._ids:
            (await get_session(session_id))["prefs"]

    async def _get_whole(self) -> None:
        get_session = self.state.get_session
        for session_id in self._ids:
            dict((await get_session(session_id)).data)
