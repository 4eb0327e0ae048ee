"""Replays with several worker processes that share the sessions through Redis."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from persistence.cli.failure import CommandError
from persistence.cli.replayer import ReplayOptions, ReplayProgress, replay
from persistence.cli.running import run
from tests.cli.command import Command
from tests.cli.generated import write_log
from tests.cli.test_replay import REAL_LOG
from tests.redis_servers import Deployments, RedisServer, need_binary, wait_until

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("temporary")


REQUESTS = 300


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_log(tmp_path / "access.log", REQUESTS)


@pytest.fixture
def _told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell the progress often, so that the first of it comes in the middle of a short replay."""
    monkeypatch.setattr("persistence.cli.replay_run._PROGRESS_SECONDS", 0.02)


def url_of(deployments: Deployments, kind: str) -> str:
    return deployments.get(need_binary().name if kind == "standalone" else kind).url


def worker_processes(parent: int | None = None) -> list[psutil.Process]:
    """Return the running workers of a process; default: of this one."""
    return [
        child
        for child in psutil.Process(parent).children()
        if child.status() != psutil.STATUS_ZOMBIE
        and any("replay_worker" in word for word in child.cmdline())
    ]


# --- what is verified -------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "workers"), [("standalone", 4), ("cluster", 2)])
def test_several_workers_share_the_sessions_of_a_log(
    command: Command, log: Path, deployments: Deployments, kind: str, workers: int
) -> None:
    url = url_of(deployments, kind)
    result = command("replay", log, "--redis", url, "--workers", workers, "--json")
    assert result.code == 0, result
    report = result.json
    assert (report["requests"], report["applied"]) == (REQUESTS, REQUESTS)
    assert report["verified"] is True
    assert report["workers"] == workers
    assert report["redis_sessions"] == report["sessions"] > 0
    assert report["segments"] >= workers
    assert report["memory_budget_bytes"] == 256 * 1024
    assert report["conflicts_retried"] >= 0
    assert report["differences"] == []
    assert worker_processes() == []


def test_workers_with_little_memory_show_what_the_others_wrote_all_the_same(
    command: Command, tmp_path: Path, shared_server: RedisServer
) -> None:
    log = write_log(tmp_path / "many.log", 600, clients=100)
    words = ("--workers", 2, "--memory", "16KiB", "--fsync", "never", "--json")
    result = command("replay", log, "--redis", shared_server.url, *words)
    assert result.code == 0, result
    assert result.json["spilled"] > 0


def test_the_real_log_verifies_with_four_workers(
    command: Command, deployments: Deployments
) -> None:
    if not REAL_LOG.exists():
        pytest.skip(f"{REAL_LOG.name} is not there")
    words = ("--redis", url_of(deployments, "standalone"), "--workers", 4, "--fsync", "never")
    result = command("replay", REAL_LOG, *words, "--limit", 1500, "--json")
    assert result.code == 0, result
    report = result.json
    assert (report["requests"], report["verified"]) == (1500, True)
    assert report["redis_sessions"] == report["sessions"] > 100


def test_each_worker_has_a_directory_of_its_own_and_the_replay_can_be_resumed(
    command: Command, log: Path, shared_server: RedisServer, tmp_path: Path
) -> None:
    directory = tmp_path / "new" / "state"
    words = ("replay", log, "--redis", shared_server.url, "--directory", directory)
    first = command(*words, "--workers", 3, "--json")
    assert first.code == 0, first
    assert sorted(path.name for path in directory.iterdir()) == ["worker-1", "worker-2", "worker-3"]
    command(*words, "--workers", 3).assert_refused("not empty", "--resume")
    again = command(*words, "--workers", 2, "--resume", "--json").json
    assert (again["applied"], again["resumed_at"]) == (0, REQUESTS)
    assert again["verified"] is True
    assert again["namespace"] == first.json["namespace"]


def test_a_replay_by_one_worker_and_one_by_several_are_told_apart(
    command: Command, log: Path, shared_server: RedisServer, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    words = ("replay", log, "--limit", 50, "--redis", shared_server.url)
    assert command(*words, "--directory", one).code == 0
    assert command(*words, "--directory", two, "--workers", 2).code == 0
    command(*words, "--directory", one, "--workers", 2, "--resume").assert_refused("--workers")
    command(*words, "--directory", two, "--resume").assert_refused("two")


def test_a_session_that_is_wrong_in_redis_is_found_there_and_in_the_workers(
    log: Path, shared_server: RedisServer, tmp_path: Path
) -> None:
    options = ReplayOptions(
        (log,),
        tmp_path / "state",
        redis_url=shared_server.url,
        namespace="n",
        workers=2,
        patience_seconds=0.3,
    )
    damaged: list[bytes] = []

    def damage_once_verifying(progress: ReplayProgress) -> None:
        if progress.stage == "verify" and not damaged:
            damaged.append(min(shared_server.ask("KEYS", "n:session:{*.*")))
            shared_server.ask("DEL", damaged[0])

    report = asyncio.run(replay(options, damage_once_verifying))
    assert not report.verified
    assert report.differing_sessions == 1
    assert "in Redis: is missing" in report.differences[0]


def test_progress_is_told_over_all_workers(
    log: Path, shared_server: RedisServer, tmp_path: Path
) -> None:
    told: list[ReplayProgress] = []
    options = ReplayOptions((log,), tmp_path / "state", redis_url=shared_server.url, workers=2)
    report = asyncio.run(replay(options, told.append))
    assert {progress.stage for progress in told} == {"replay", "verify"}
    assert [progress for progress in told if progress.stage == "replay"][-1].done == REQUESTS
    assert told[-1].done == 3 * (report.sessions + 1)  # in Redis and in each worker
    assert told[-1].in_memory > 0


# --- ends -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_told_soon")
def test_a_worker_that_dies_is_told_and_ends_the_others(
    log: Path, shared_server: RedisServer, tmp_path: Path
) -> None:
    options = ReplayOptions((log,), tmp_path / "state", redis_url=shared_server.url, workers=3)
    killed: list[int] = []

    def kill_one(progress: ReplayProgress) -> None:
        if progress.done > 0 and not killed:
            process = worker_processes()[1]
            killed.append(process.pid)
            process.kill()

    with pytest.raises(CommandError, match=r"^worker \d \(process \d+\) was ended by SIGKILL") as e:
        asyncio.run(replay(options, kill_one))
    assert str(killed[0]) in str(e.value)
    assert worker_processes() == []
    again = ReplayOptions(
        (log,), tmp_path / "state", redis_url=shared_server.url, workers=3, resume=True
    )
    assert asyncio.run(replay(again)).verified


@pytest.mark.usefixtures("_told_soon")
def test_a_server_that_goes_away_ends_the_replay_which_can_be_resumed(
    log: Path, own_server: RedisServer, tmp_path: Path
) -> None:
    def options(*, resume: bool) -> ReplayOptions:
        return ReplayOptions(
            (log,), tmp_path / "state", redis_url=own_server.url, workers=2, resume=resume
        )

    def cut(progress: ReplayProgress) -> None:
        own_server.ask("CONFIG", "SET", "min-replicas-to-write", "1")  # and keeps its data

    with pytest.raises(CommandError, match=r"^worker \d: .*(?s:NOREPLICAS|cannot be reached)"):
        asyncio.run(replay(options(resume=False), cut))
    assert worker_processes() == []
    own_server.ask("CONFIG", "SET", "min-replicas-to-write", "0")
    assert asyncio.run(replay(options(resume=True))).verified


def test_an_interrupted_replay_ends_its_workers_in_order(
    log: Path, shared_server: RedisServer, tmp_path: Path
) -> None:
    options = ReplayOptions((log,), tmp_path / "state", redis_url=shared_server.url, workers=2)

    def interrupt(progress: ReplayProgress) -> None:
        if progress.stage == "replay":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        run(replay(options, interrupt))
    assert worker_processes() == []


def test_workers_end_when_their_parent_is_killed(
    shared_server: RedisServer, tmp_path: Path
) -> None:
    log = write_log(tmp_path / "long.log", 50_000)
    words = ["replay", str(log), "--redis", shared_server.url, "--workers", "2"]
    parent = subprocess.Popen(
        [sys.executable, "-m", "persistence.cli", *words, "--directory", str(tmp_path / "state")],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: shared_server.ask("DBSIZE") > 10, "the workers work")
        workers = worker_processes(parent.pid)
        assert len(workers) == 2
    finally:
        parent.kill()
        parent.wait()
    gone, alive = psutil.wait_procs(workers, timeout=20)
    assert (len(gone), alive) == (2, [])


def test_a_worker_that_cannot_open_its_directory_says_why(
    command: Command, log: Path, shared_server: RedisServer, tmp_path: Path
) -> None:
    words = ("replay", log, "--redis", shared_server.url, "--directory", tmp_path / "state")
    assert command(*words, "--workers", 2).code == 0
    foreign = tmp_path / "state" / "worker-3"
    foreign.mkdir()
    (foreign / "thesis.doc").write_text("years of work")
    command(*words, "--workers", 3, "--resume").assert_refused(
        "worker 3: ", "not a directory of this library"
    )
    assert worker_processes() == []
