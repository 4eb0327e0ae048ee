"""Each example, run the way a reader runs it: as a process, in a directory of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.redis_servers import RedisServer

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
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
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_every_example_is_run_here() -> None:
    tested = {"quickstart.py", "shared_worker.py", "worker.py"}
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


def _listening(start: Start) -> tuple[subprocess.Popen[str], int]:
    process = start("worker.py", "0")
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
