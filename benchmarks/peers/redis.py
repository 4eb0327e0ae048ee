"""Plain Redis through redis-py."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import amplification, payloads
from benchmarks.contender import NOTHING, SYNCED, Contender, Metrics, Stopwatch, check, chunks
from benchmarks.optional import load
from benchmarks.payloads import Data
from benchmarks.peers.store import AsyncStore, Change
from benchmarks.redis_server import RedisServer

PIPELINED_SET = "Redis, one pipelined SET per session"
PER_PIPELINE = 1000
CONNECTIONS = 100


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


@dataclass
class PipelinedGet(PipelinedSet):
    """GET the packed bytes of all sessions, `PER_PIPELINE` in one pipeline, into a dict."""

    name: str = "Redis, one pipelined GET per session"

    async def open(self, directory: Path) -> None:
        await super().open(directory)
        await super().measure()

    async def measure(self) -> Metrics:
        found: dict[str, bytes] = {}
        with Stopwatch() as watch:
            for some in chunks(self._items, PER_PIPELINE):
                pipeline = self._client.pipeline(transaction=False)
                for name, _ in some:
                    pipeline.get(name)
                found.update(zip([name for name, _ in some], pipeline.execute(), strict=True))
        check(found == dict(self._items), "sessions came back changed")
        return watch.rate(len(found))


@dataclass
class Redis(AsyncStore):
    """`redis.asyncio`: GET, SET and DEL on one key per session, a server of its own.

    Attributes:
        synced: True starts the server with `appendfsync always`, False without a file.
        watched: True lets an update fail and start again when another process was faster (WATCH,
            MULTI, EXEC); False lets the last process win.
        url: a server that runs already.
    """

    synced: bool = True
    watched: bool = False
    url: str = ""
    name: str = "Redis"

    def __post_init__(self) -> None:
        self.durability = SYNCED if self.synced else NOTHING
        self.name = "Redis, AOF always" if self.synced else "Redis, no file"

    async def open(self, directory: Path) -> None:
        """See `Store`."""
        msgpack, client = load("msgpack"), load("redis.asyncio")
        self._pack, self._unpack = msgpack.packb, msgpack.unpackb
        self._changed = load("redis.exceptions").WatchError
        self._server: RedisServer | None = None
        if not self.url:
            self._server = RedisServer(durable=directory if self.synced else None)
            self._server.start()
        url = self._server.url if self._server else self.url
        pool = client.BlockingConnectionPool.from_url(url, max_connections=CONNECTIONS)
        self._client: Any = client.Redis.from_pool(pool)

    async def close(self) -> None:
        """See `Store`."""
        try:
            await self._client.aclose()
        finally:
            if self._server is not None:
                self._server.close()

    async def fill(self, session_count: int) -> None:
        """See `Store`."""
        for some in chunks(list(range(session_count)), PER_PIPELINE):
            pipeline = self._client.pipeline(transaction=False)
            for index in some:
                pipeline.set(payloads.session_id(index), self._pack(payloads.session(index)))
            await pipeline.execute()

    async def get(self, key: str) -> Data | None:
        """See `Store`."""
        packed = await self._client.get(key)
        data: Data | None = None if packed is None else self._unpack(packed)
        return data

    async def change_alone(self, key: str, change: Change) -> None:
        """See `AsyncStore`."""
        if self.watched:
            while not await self._try(key, change):
                pass
            return
        data = await self.get(key) or {}
        change(data)
        await self._client.set(key, self._pack(data))

    async def _try(self, key: str, change: Change) -> bool:
        async with self._client.pipeline(transaction=True) as pipeline:
            await pipeline.watch(key)
            packed = await pipeline.get(key)
            data: Data = {} if packed is None else self._unpack(packed)
            change(data)
            pipeline.multi()
            pipeline.set(key, self._pack(data))
            try:
                await pipeline.execute()
            except self._changed:
                return False
        return True

    async def remove_one(self, key: str) -> None:
        """See `AsyncStore`."""
        await self._client.delete(key)

    async def remove(self, keys: Sequence[str]) -> None:
        """See `Store`."""
        for some in chunks(list(keys), PER_PIPELINE):
            await self._client.delete(*some)

    async def count(self) -> int:
        """See `Store`."""
        found = 0
        async for _ in self._client.scan_iter(count=1000):
            found += 1
        return found

    def written_bytes(self) -> int:
        """See `Store`; what the server has written, its replies to clients included."""
        return amplification.written_bytes(self._server.pid if self._server else None)
