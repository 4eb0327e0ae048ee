"""Real processes on one session: no increment is lost, none is counted twice."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.redis_servers import Deployments, RedisServer, need_binary
from tests.sharing.conftest import Worker
from tests.sharing.support import add_one

PROCESSES = 4
FEW = 60
STOPPED_TIMEOUT_SECONDS = 1.0
SCRIPT = Path(__file__).with_name("counting_process.py")
ROOT = Path(__file__).parents[2]


def counting(
    url: str, directory: Path, session_id: str, times: int, *more: str
) -> subprocess.Popen[str]:
    arguments = (url, str(directory), session_id, str(times), *more)
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def count_in_processes(url: str, folder: Path, session_id: str, times: int) -> None:
    """Let all of them count at the same time, each so often, and wait for their end."""
    with ExitStack() as stack:
        processes = []
        for number in range(PROCESSES):
            directory = folder / f"process {number}"
            process = stack.enter_context(counting(url, directory, session_id, times))
            stack.callback(process.kill)  # of no effect once it has ended
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        assert [process.wait(500) for process in processes] == [0] * PROCESSES


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "times"), [("standalone", 500), ("cluster", 100)])
async def test_all_increments_by_each_of_four_processes_are_counted_once(
    worker: Worker, deployments: Deployments, tmp_path: Path, kind: str, times: int
) -> None:
    url = deployments.get(need_binary().name if kind == "standalone" else kind).url
    a = await worker(url)
    sid = await a.create_session(data={"n": 0})
    await asyncio.to_thread(count_in_processes, url, tmp_path, sid, times)
    session = await a.get_session(sid, fresh=True)
    assert session is not None
    assert (session["n"], session.version) == (PROCESSES * times, PROCESSES * times + 1)


async def test_a_process_that_was_stopped_past_every_timeout_overwrites_nothing(
    worker: Worker, own_server: RedisServer, tmp_path: Path
) -> None:
    a = await worker(own_server.url)
    sid = await a.create_session(data={"n": 0})
    with ExitStack() as stack:
        process = stack.enter_context(
            counting(own_server.url, tmp_path / "other", sid, FEW, str(STOPPED_TIMEOUT_SECONDS))
        )
        stack.callback(process.kill)
        assert process.stdout is not None
        assert process.stdin is not None
        assert await asyncio.to_thread(process.stdout.readline) == "open\n"
        process.stdin.write("go\n")
        process.stdin.flush()
        mine = 0
        for _ in range(2):
            await asyncio.sleep(0.05)
            process.send_signal(signal.SIGSTOP)
            until = time.monotonic() + 1.5 * STOPPED_TIMEOUT_SECONDS
            while time.monotonic() < until:
                await a.update_session(sid, add_one)
                mine += 1
            process.send_signal(signal.SIGCONT)
        unknown = int(await asyncio.to_thread(process.stdout.readline))
        assert await asyncio.to_thread(process.wait, 100) == 0
    session = await a.get_session(sid, fresh=True)
    assert session is not None
    most = FEW + mine
    assert most - unknown <= session["n"] == session.version - 1 <= most
    assert unknown < FEW / 2
