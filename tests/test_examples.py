"""Each example, run the way a reader runs it: as a process, in a directory of its own."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.redis_servers import RedisServer

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
ERRORS = "errors"  # a file in the directory of the examples
PATIENCE_SECONDS = 30

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start an example; what still runs at the end is killed."""
    environ = {name: text for name, text in os.environ.items() if "PERSISTENCE_" not in name}
    environ["PYTHONPATH"] = str(ROOT)
    environ.pop("REDIS_URL", None)
    running: list[subprocess.Popen[str]] = []

    def start(name: str, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(EXAMPLES / name), *words]
        with (tmp_path / ERRORS).open("a") as errors:
            process = subprocess.Popen(
                command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()
    sys.stderr.write((tmp_path / ERRORS).read_text())  # for whoever reads why a test failed


def test_every_example_is_run_here() -> None:
    tested = {
        "chat_server.py",
        "live_service.py",
        "quickstart.py",
        "rendering_client.py",
        "shared_worker.py",
        "worker.py",
    }
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_quickstart_finds_the_session_of_the_worker_before(start: Start) -> None:
    process = start("quickstart.py")
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0
    assert output == (
        "version 3 of ada's session: {'cart': [{'book': 'Dune', 'price': Decimal('9.99')}], "
        "'page': '/book/dune', 'total': Decimal('9.99')}\n"
        "terminated: None\n"
    )


def test_the_worker_goes_on_counting_after_sigkill_and_closes_on_sigterm(
    start: Start, tmp_path: Path
) -> None:
    process, port = _listening(start)
    assert _visit(port, "ada") == "Hello ada, visit 1\n"
    assert _visit(port, "ada") == "Hello ada, visit 2\n"
    process.kill()
    process.wait(PATIENCE_SECONDS)

    process, port = _listening(start)
    assert _visit(port, "ada") == "Hello ada, visit 3\n"
    assert _visit(port, "bob") == "Hello bob, visit 1\n"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, output) == (0, "closed\n")
    # The index snapshot is the last thing that an orderly close writes.
    assert (tmp_path / ".persistence" / "worker" / "INDEX").exists()


def _listening(
    start: Start, name: str = "worker.py", *words: str
) -> tuple[subprocess.Popen[str], int]:
    process = start(name, *(words or ("0",)))
    assert process.stdout is not None
    first_line = process.stdout.readline()
    assert first_line.startswith("listening on port "), first_line
    return process, int(first_line.split()[-1])


def _visit(port: int, name: str) -> str:
    with (
        socket.create_connection(("localhost", port), timeout=PATIENCE_SECONDS) as connection,
        connection.makefile("rw", encoding="utf-8") as lines,
    ):
        lines.write(f"{name}\n")
        lines.flush()
        return lines.readline()


def test_a_worker_counts_alone_where_there_is_no_redis(start: Start) -> None:
    process = start("shared_worker.py", "one")
    assert _numbers(process, 2) == [1, 2]
    process.kill()
    process.wait(PATIENCE_SECONDS)

    process = start("shared_worker.py", "one")
    assert _numbers(process, 1)[0] in (3, 4)  # one may have been counted and not printed
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0
    assert output.endswith("closed\n")


def test_workers_count_in_one_session_and_a_new_one_goes_on(
    start: Start, own_server: RedisServer
) -> None:
    one, two = [start("shared_worker.py", name, own_server.url) for name in ("one", "two")]
    counted = []
    for process in (one, two):
        counted += _numbers(process, 3)
    for process in (one, two):
        process.send_signal(signal.SIGTERM)
    for process in (one, two):
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0
        assert output.endswith("closed\n")
        counted += [int(line.split()[-1]) for line in output.splitlines()[:-1]]
    assert len(counted) == len(set(counted))

    three = start("shared_worker.py", "three", own_server.url)
    [first] = _numbers(three, 1)
    assert first > max(counted)


def _numbers(process: subprocess.Popen[str], count: int) -> list[int]:
    """Return the next numbers that a worker prints."""
    assert process.stdout is not None
    return [int(process.stdout.readline().split()[-1]) for _ in range(count)]


class _Client:
    """One connection to an example that talks in lines."""

    def __init__(self, port: int) -> None:
        self._connection = socket.create_connection(("localhost", port), timeout=PATIENCE_SECONDS)
        self._lines = self._connection.makefile("rw", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._connection.close()

    def say(self, *lines: str) -> None:
        self._lines.write("".join(f"{line}\n" for line in lines))
        self._lines.flush()

    def hear(self) -> str:
        return self._lines.readline().rstrip("\n")

    def ask(self, line: str) -> str:
        self.say(line)
        return self.hear()

    def reset(self) -> None:
        """Go without a goodbye: what the other end reads next is an error."""
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._lines.close()
        self._connection.close()


def test_two_chat_servers_share_what_a_user_prefers(start: Start, own_server: RedisServer) -> None:
    url = own_server.url
    one, port_of_one = _listening(start, "chat_server.py", "one", "0", url)
    two, port_of_two = _listening(start, "chat_server.py", "two", "0", url)
    with _Client(port_of_one) as here, _Client(port_of_two) as there, _Client(port_of_two) as show:
        assert here.ask("ada hello") == "[small] message 1: hello"
        assert show.ask("ada /follow") == "model small"
        assert there.ask("ada hi") == "[small] message 2: hi"
        assert here.ask("ada /model huge") == "there are small, large"
        assert here.ask("ada /model large") == "you talk to large from now on"
        assert show.hear() == "model large"
        assert there.ask("ada again") == "[large] message 3: again"
        assert there.ask("bob hello") == "[small] message 1: hello"
        for process in (one, two):  # a stream that is open holds up no end
            process.send_signal(signal.SIGTERM)
        for process in (one, two):
            output, _ = process.communicate(timeout=PATIENCE_SECONDS)
            assert (process.returncode, output) == (0, "closed\n")

    _, port_of_three = _listening(start, "chat_server.py", "three", "0", url)
    with _Client(port_of_three) as elsewhere:
        assert elsewhere.ask("ada back") == "[large] message 4: back"


def test_the_rendering_client_stops_at_its_limit_in_the_next_process_too(start: Start) -> None:
    outputs = []
    for _ in range(2):
        process = start("rendering_client.py")
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0
        outputs.append(output.splitlines())
    assert outputs[0] == [
        "ada /: 200 Home | Books and more",
        "ada /books: 200 Books | Dune | Ubik",
        "ada /broken: 500 ",
        "ada /: 200 Home | Books and more",
        "ada /books: 200 Books | Dune | Ubik",
        "ada has used up its requests",
        "ada made 5 requests, 1 failed: status 500; the last one was GET /books",
        "bob /: 200 Home | Books and more",
        "bob made 1 requests, 0 failed: nothing; the last one was GET /",
    ]
    assert outputs[1] == [
        *outputs[0][5:8],
        "bob made 2 requests, 0 failed: nothing; the last one was GET /",
    ]


def test_the_live_service_has_one_connection_for_each_session_and_closes_it(start: Start) -> None:
    process, port = _listening(start, "live_service.py", "0")
    with _Client(port) as ada, _Client(port) as ada_too, _Client(port) as bob:
        ada.say("ada")
        assert ada.ask("hello") == "connection 1, call 1: HELLO"
        ada_too.say("ada")
        assert ada_too.ask("me too") == "connection 1, call 2: ME TOO"
        assert ada.hear() == "connection 1, call 2: ME TOO", "both are in the registry"
        bob.say("bob")
        assert bob.ask("hi") == "connection 2, call 1: HI"
        bob.say("stop")
        assert bob.hear() == ""
        assert process.stdout is not None
        assert process.stdout.readline() == "connection 2 closed\n"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, output) == (0, "connection 1 closed\nclosed\n")


def test_the_live_service_goes_on_when_clients_are_gone_or_stopped_by_others(
    start: Start, tmp_path: Path
) -> None:
    process, port = _listening(start, "live_service.py", "0")
    with _Client(port) as ada, _Client(port) as ada_too:
        ada.say("ada")
        assert ada.ask("hello") == "connection 1, call 1: HELLO"
        ada_too.say("ada", "stop")
        assert ada_too.hear() == ""
        assert ada.ask("still there?") == "", "there is no session any more"
    with _Client(port) as bob, _Client(port) as bob_too:
        bob.say("bob")
        assert bob.ask("hello") == "connection 2, call 1: HELLO"
        bob_too.say("bob")
        assert bob_too.ask("me too") == "connection 2, call 2: ME TOO"
        assert bob.hear() == "connection 2, call 2: ME TOO"
        bob_too.reset()
        for count in range(3, 9):
            assert bob.ask("hi") == f"connection 2, call {count}: HI"
        bob.say("stop")
        assert bob.hear() == ""
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, (tmp_path / ERRORS).read_text()) == (0, "")
