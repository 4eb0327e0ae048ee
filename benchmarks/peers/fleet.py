"""Peers that several processes of one machine can use at once."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

from pathlib import Path

from benchmarks import payloads
from benchmarks.fleet import FleetUpdate, Member, RedisFleetUpdate
from benchmarks.peers.redis import Redis
from benchmarks.peers.store import Store


class StoreMember(Member):
    """A process that has the store open; the lock of each transaction is the store's own."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def open(self, directory: Path, number: int, session_count: int) -> None:
        await self.store.open(directory)
        if number == 0:
            await self.store.fill(session_count)

    async def update(self, keys: list[str]) -> None:
        await self.store.change([(key, payloads.count_visit) for key in keys])

    async def visits(self, keys: list[str]) -> int:
        found = [await self.store.get(key) for key in keys]
        return sum(data["prefs"]["visits"] for data in found if data is not None)

    async def close(self) -> None:
        await self.store.close()


class StoreFleet(FleetUpdate):
    """Processes that share the files of a store."""

    def __init__(
        self, store: Store, session_count: int, update_count: int, process_count: int
    ) -> None:
        super().__init__(StoreMember(store), session_count, update_count, process_count)
        self.name = store.name
        self.durability = store.durability
        self.called = store.called


class RedisFleet(RedisFleetUpdate):
    """Processes that share a Redis; an update that another one overtook begins again."""

    def __init__(self, session_count: int, update_count: int, process_count: int) -> None:
        store = Redis(synced=True, watched=True, url="set when it runs")
        super().__init__(StoreMember(store), session_count, update_count, process_count)
        self._store = store
        self.name = f"{store.name}, WATCH"
        self.durability = store.durability
        self.called = store.called

    def take_url(self, url: str) -> None:
        self._store.url = url
