"""Every peer is a store of sessions like any other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from benchmarks import payloads
from benchmarks.contender import THREAD
from benchmarks.optional import UnavailableError
from benchmarks.peers.cashews import Cashews
from benchmarks.peers.diskcache import DiskCache
from benchmarks.peers.files import FilePerSession
from benchmarks.peers.lmdb import Lmdb
from benchmarks.peers.plain import PlainDict
from benchmarks.peers.redis import Redis
from benchmarks.peers.rocksdb import RocksDb
from benchmarks.peers.sqlite import Sqlite
from benchmarks.peers.store import Store
from benchmarks.peers.zict import Buffer

STORES = {
    "dict": PlainDict(),
    "zict": Buffer(3),
    "LMDB": Lmdb(synced=False),
    "LMDB in threads": Lmdb(synced=False, called=THREAD),
    "RocksDB": RocksDb(synced=False),
    "SQLite": Sqlite(synced=False),
    "SQLite in threads": Sqlite(synced=False, called=THREAD),
    "diskcache": DiskCache(synced=False),
    "files": FilePerSession(),
    "Redis": Redis(synced=False),
    "Redis, WATCH": Redis(synced=False, watched=True),
    "cashews": Cashews(synced=False),
}

KEYS = [payloads.session_id(index) for index in range(8)]


@asynccontextmanager
async def _opened(store: Store, directory: Path) -> AsyncIterator[Store]:
    try:
        await store.open(directory)
    except UnavailableError as error:
        pytest.skip(str(error))
    try:
        yield store
    finally:
        await store.close()


@pytest.mark.parametrize("name", STORES)
async def test_a_store_keeps_changes_removes_and_lists(name: str, tmp_path: Path) -> None:
    async with _opened(STORES[name], tmp_path) as store:
        await store.fill(len(KEYS))
        assert await store.count() == len(KEYS)
        assert await store.get(KEYS[5]) == payloads.session(5)
        assert await store.get("session-nowhere") is None
        await store.read(KEYS)
        await store.read_one(KEYS[0])
        await store.change([(KEYS[1], payloads.count_visit)] * 3)
        # Tasks that change one session at once: none of the changes is lost.
        await asyncio.gather(*(store.change_one(KEYS[1], payloads.count_visit) for _ in range(5)))
        changed = await store.get(KEYS[1])
        assert changed is not None
        assert changed["prefs"]["visits"] == payloads.session(1)["prefs"]["visits"] + 8
        await store.remove(KEYS[:2])
        assert await store.get(KEYS[0]) is None
        assert await store.count() == len(KEYS) - 2
        assert store.written_bytes() >= 0
        assert store.occupied_bytes(tmp_path) >= 0


@pytest.mark.parametrize("name", ["LMDB", "RocksDB", "SQLite", "diskcache", "files"])
async def test_a_durable_store_finds_its_sessions_again(name: str, tmp_path: Path) -> None:
    async with _opened(STORES[name], tmp_path) as store:
        await store.fill(2)
    async with _opened(STORES[name], tmp_path) as store:
        assert await store.get(KEYS[1]) == payloads.session(1)
        assert store.occupied_bytes(tmp_path) > payloads.SESSION_BYTES
