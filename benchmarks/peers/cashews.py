"""cashews: an asyncio cache over Redis."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contender import NOTHING, SYNCED
from benchmarks.optional import load
from benchmarks.payloads import Data
from benchmarks.peers.redis import CONNECTIONS
from benchmarks.peers.store import AsyncStore, Change
from benchmarks.redis_server import RedisServer


@dataclass
class Cashews(AsyncStore):
    """`Cache().setup("redis://…")` on dicts, which it pickles; a server of its own."""

    synced: bool = True
    name: str = "cashews"

    def __post_init__(self) -> None:
        self.durability = SYNCED if self.synced else NOTHING
        self.name = "cashews + Redis, AOF always" if self.synced else "cashews + Redis, no file"

    async def open(self, directory: Path) -> None:
        """See `Store`."""
        cashews = load("cashews")
        self._server = RedisServer(durable=directory if self.synced else None)
        self._server.start()
        self._cache: Any = cashews.Cache()
        self._cache.setup(self._server.url, suppress=False, max_connections=CONNECTIONS)
        await self._cache.init()

    async def close(self) -> None:
        """See `Store`."""
        try:
            with warnings.catch_warnings():
                # It calls what newer versions of redis-py have under another name.
                warnings.simplefilter("ignore", DeprecationWarning)
                await self._cache.close()
        finally:
            self._server.close()

    async def get(self, key: str) -> Data | None:
        """See `Store`."""
        data: Data | None = await self._cache.get(key)
        return data

    async def change_alone(self, key: str, change: Change) -> None:
        """See `AsyncStore`."""
        data = await self.get(key) or {}
        change(data)
        await self._cache.set(key, data)

    async def remove_one(self, key: str) -> None:
        """See `AsyncStore`."""
        await self._cache.delete(key)

    async def count(self) -> int:
        """See `Store`."""
        found = 0
        async for _ in self._cache.scan("*"):
            found += 1
        return found
