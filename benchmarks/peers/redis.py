"""Plain Redis through redis-py."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks import payloads
from benchmarks.contender import NOTHING, Contender, Metrics, Stopwatch, chunks
from benchmarks.optional import load
from benchmarks.redis_server import RedisServer

PIPELINED_SET = "Redis, one pipelined SET per session"
PER_PIPELINE = 1000


@dataclass
class PipelinedSet(Contender):
    """SET each session's packed bytes, `PER_PIPELINE` in one pipeline."""

    session_count: int
    name: str = PIPELINED_SET
    durability: str = NOTHING

    async def open(self, directory: Path) -> None:
        pack = load("msgpack").packb
        self._server = RedisServer()
        self._server.start()
        self._client = load("redis").Redis.from_url(self._server.url)
        self._items = [
            (payloads.session_id(index), pack(payloads.session(index)))
            for index in range(self.session_count)
        ]

    async def measure(self) -> Metrics:
        with Stopwatch() as watch:
            for some in chunks(self._items, PER_PIPELINE):
                pipeline = self._client.pipeline(transaction=False)
                for name, value in some:
                    pipeline.set(name, value)
                pipeline.execute()
        return watch.rate(len(self._items))

    async def close(self) -> None:
        self._client.close()
        self._server.close()
