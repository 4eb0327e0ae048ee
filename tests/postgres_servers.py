"""A real PostgreSQL for tests: on a free port of 127.0.0.1, in a temporary directory.

One server for the test run; tests are kept apart by namespaces of their own. Its programs come from
the PATH or from where Debian installs them. PostgreSQL refuses to run as root: then it runs as
``postgres`` or ``nobody``. The process is ended by its process id.
"""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final, Self

import asyncpg
import pytest

from tests.redis_servers import HOST, PATIENCE_SECONDS, Proxy, free_port

USER: Final = "tester"
DATABASE: Final = "postgres"
_DEBIAN: Final = Path("/usr/lib/postgresql")
_NO_SERVER: Final = (
    "no PostgreSQL server to test against; install one, for example with: "
    "apt-get install postgresql"
)
_SETTINGS: Final = {
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "16MB",
    "max_connections": "80",
    "autovacuum": "off",
    "log_min_messages": "fatal",
}
_namespaces = itertools.count(1)


def find_programs() -> Path | None:
    """Return the directory with the newest ``initdb`` and ``postgres``; None: there is none."""
    on_path = shutil.which("postgres")
    folders = [Path(on_path).parent] if on_path else []
    if _DEBIAN.is_dir():
        versions = [each for each in _DEBIAN.iterdir() if each.name.isdigit()]
        folders += [each / "bin" for each in sorted(versions, key=lambda each: -int(each.name))]
    for folder in folders:
        if (folder / "initdb").is_file() and (folder / "postgres").is_file():
            return folder
    return None


PROGRAMS: Final = find_programs()


def _as_somebody() -> dict[str, Any]:
    """Return what lets a process run as somebody else than root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL does not run as root, and there is no other user")


class PostgresServer:
    """One server process."""

    def __init__(self, programs: Path) -> None:
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._programs = programs
        self._as: dict[str, Any] = _as_somebody()
        self._process: subprocess.Popen[bytes] | None = None

    def make(self) -> Self:
        """Make the database's files."""
        if self._as:
            os.chown(self.directory, self._as["user"], self._as["group"])
        subprocess.run(
            [
                self._programs / "initdb",
                *("-D", self._data, "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C"),
                *("--no-sync", "--no-instructions"),
            ],
            cwd=self.directory,
            stdout=subprocess.DEVNULL,
            check=True,
            **self._as,
        )
        return self

    @property
    def _data(self) -> str:
        return str(self.directory / "data")

    @property
    def url(self) -> str:
        """The URL of its database."""
        return self.url_at(self.port)

    def url_at(self, port: int) -> str:
        """The URL of its database through a proxy."""
        return f"postgresql://{USER}@{HOST}:{port}/{DATABASE}?sslmode=disable"

    def url_of(self, database: str, user: str = USER) -> str:
        """The URL of another database, or of another user."""
        return f"postgresql://{user}@{HOST}:{self.port}/{database}?sslmode=disable"

    def start(self) -> Self:
        """Start it; returns once it answers."""
        settings = {
            "port": str(self.port),
            "listen_addresses": HOST,
            "unix_socket_directories": str(self.directory),
            **_SETTINGS,
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._process = subprocess.Popen(
            [self._programs / "postgres", "-D", self._data, *options],
            cwd=self.directory,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            **self._as,
        )
        end = time.monotonic() + PATIENCE_SECONDS
        while not self._is_ready():
            if time.monotonic() > end or self._process.poll() is not None:
                self.close()
                pytest.fail(f"PostgreSQL of {self._programs} did not start")
            time.sleep(0.02)
        return self

    def _is_ready(self) -> bool:
        pid_file = Path(self._data, "postmaster.pid")
        try:
            lines = pid_file.read_text().splitlines()
        except FileNotFoundError:
            return False
        if len(lines) < 8 or lines[7].strip() != "ready":
            return False
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self.port)) == 0

    def stop(self) -> None:
        """End it at once, with all its children; its data stays."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """End it and remove its directory."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    async def run(self, statement: str, *arguments: Any, database: str = DATABASE) -> list[Any]:
        """Run one statement over a connection of its own."""
        connection = await asyncpg.connect(self.url_of(database))
        try:
            rows: list[Any] = await connection.fetch(statement, *arguments)
            return rows
        finally:
            await connection.close()

    async def run_script(self, script: str, database: str) -> None:
        """Run several statements in one transaction."""
        connection = await asyncpg.connect(self.url_of(database))
        try:
            await connection.execute(script)
        finally:
            await connection.close()


# --- fixtures; tests/conftest.py passes them on ---------------------------------------------------


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """The server of the test run."""
    if PROGRAMS is None:
        pytest.skip(_NO_SERVER)
    server = PostgresServer(PROGRAMS)
    try:
        server.make().start()
        yield server
    finally:
        server.close()


@pytest.fixture
async def postgres_proxy(postgres: PostgresServer) -> AsyncIterator[Proxy]:
    """A proxy in front of the server: ``postgres.url_at(postgres_proxy.port)``."""
    running = await Proxy(postgres.port).start()
    yield running
    await running.close()


def new_namespace() -> str:
    """Return a namespace that no other test uses."""
    return f"test{next(_namespaces)}"
