"""Stores, and what else the tests of checkpoints share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from persistence.checkpoint.directory_store import DirectoryStore
from persistence.checkpoint.postgres_store import PostgresStore
from persistence.checkpoint.redis_store import RedisStore
from persistence.checkpoint.stores import CheckpointStore
from persistence.disk.threads import Threads
from persistence.remote.postgres_urls import parse_postgres_url
from tests.postgres_servers import PostgresServer, new_namespace
from tests.redis_servers import HOST, RedisServer

_namespaces = count(1)


@pytest.fixture
async def redis(shared_server: RedisServer) -> AsyncIterator[Any]:
    """A client of the shared server."""
    client = Redis(host=HOST, port=shared_server.port)
    yield client
    await client.aclose()


@pytest.fixture
def namespace() -> str:
    return f"test{next(_namespaces)}"


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads()
    yield threads
    threads.close()


@pytest.fixture
def directory_store(tmp_path: Path, threads: Threads) -> DirectoryStore:
    return DirectoryStore(str(tmp_path / "checkpoints"), threads)


@pytest.fixture
async def postgres_store(postgres: PostgresServer) -> AsyncIterator[PostgresStore]:
    store = PostgresStore(parse_postgres_url(postgres.url), new_namespace(), 10.0)
    yield store
    await store.close()


@pytest.fixture(params=["directory", "redis", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path, threads: Threads) -> CheckpointStore:
    """Each of the stores in turn."""
    if request.param == "directory":
        return DirectoryStore(str(tmp_path / "checkpoints"), threads)
    if request.param == "postgres":
        found: PostgresStore = request.getfixturevalue("postgres_store")
        return found
    return RedisStore(request.getfixturevalue("redis"), request.getfixturevalue("namespace"))
