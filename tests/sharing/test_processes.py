"""Real processes on one session: no increment is lost, none is counted twice."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.redis_servers import Deployments, need_binary
from tests.sharing.conftest import Worker

PROCESSES = 4
INCREMENTS = 500
SCRIPT = Path(__file__).with_name("counting_process.py")
ROOT = Path(__file__).parents[2]


def counting(url: str, directory: Path, session_id: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), url, str(directory), session_id, str(INCREMENTS)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def count_in_processes(url: str, folder: Path, session_id: str) -> None:
    """Let all of them count at the same time, and wait for their end."""
    with ExitStack() as stack:
        processes = []
        for number in range(PROCESSES):
            process = stack.enter_context(counting(url, folder / f"process {number}", session_id))
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
@pytest.mark.parametrize("kind", ["standalone", "cluster"])
async def test_500_increments_by_each_of_four_processes_make_2000(
    worker: Worker, deployments: Deployments, tmp_path: Path, kind: str
) -> None:
    url = deployments.get(need_binary().name if kind == "standalone" else kind).url
    a = await worker(url)
    sid = await a.create_session(data={"n": 0})
    await asyncio.to_thread(count_in_processes, url, tmp_path, sid)
    session = await a.get_session(sid, fresh=True)
    assert session is not None
    assert (session["n"], session.version) == (2000, 2001)
