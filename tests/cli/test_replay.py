"""Replays end to end: what they report, what they verify, what they refuse."""

from __future__ import annotations

import asyncio
import bz2
import gzip
import lzma
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from persistence import DiskConfig, ShutdownConfig, StateConfig, StateManager
from persistence.cli.replayer import (
    CURSOR_ID,
    LogReader,
    ReplayOptions,
    ReplayProgress,
    Watermark,
    replay,
)
from persistence.cli.running import run
from tests.cli.command import Command, locked
from tests.cli.generated import log_bytes, write_log

KIB = 1024
REAL_LOG = Path(__file__).parents[3] / "shared/data/web-apache_logs.log.gz"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_log(tmp_path / "access.log", 600)


def change_directory(directory: Path, change: Callable[[StateManager], Any]) -> None:
    """Open the sessions that a replay has left and change them."""

    async def work() -> None:
        config = StateConfig(
            disk=DiskConfig(path=str(directory)), shutdown=ShutdownConfig(checkpoint=False)
        )
        async with StateManager(config=config) as state:
            await change(state)

    asyncio.run(work())


# --- what a replay reports --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        ("log", bytes),
        ("log.gz", gzip.compress),
        ("log.xz", lzma.compress),
        ("log.bz2", bz2.compress),
    ],
)
def test_a_replay_is_verified_and_leaves_nothing_behind(
    command: Command, tmp_path: Path, temporary: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"access.{suffix}"
    path.write_bytes(pack(log_bytes(500, clients=30, bad_lines=7)))
    result = command("replay", path, "--json")
    assert result.code == 0, result.err
    report = result.json
    assert report["verified"] is True
    assert (report["requests"], report["applied"], report["skipped_lines"]) == (500, 500, 7)
    assert 25 <= report["sessions"] <= 30
    assert report["in_memory"] + report["on_disk"] == report["sessions"]
    assert report["memory_budget_bytes"] == 256 * KIB
    assert report["seconds"] > 0
    assert report["differences"] == []
    assert list(temporary.iterdir()) == []


def test_a_budget_of_64_kib_spills_restores_rotates_and_compacts(
    command: Command, tmp_path: Path, temporary: Path
) -> None:
    path = write_log(tmp_path / "access.log", 2500, clients=400)
    result = command("replay", path, "--memory", "64KiB", "--segment", "256KiB", "--json")
    assert result.code == 0, result.out
    report = result.json
    assert report["verified"] is True
    assert report["spilled"] > 0
    assert report["restored"] > 0
    assert report["on_disk"] > report["in_memory"]
    assert report["memory_peak_bytes"] <= 64 * KIB + 8 * KIB
    assert report["compactions"] + report["segments"] > 1


@pytest.mark.parametrize("fsync", ["always", "interval", "never"])
def test_every_sync_mode_verifies(command: Command, log: Path, temporary: Path, fsync: str) -> None:
    assert command("replay", log, "--fsync", fsync, "--json").json["verified"] is True


def test_several_logs_are_one_behind_the_other(
    command: Command, tmp_path: Path, temporary: Path
) -> None:
    one, two = (write_log(tmp_path / f"{seed}.log", 200, seed=seed) for seed in (1, 2))
    both = tmp_path / "both.log"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    apart = command("replay", one, two, "--json").json
    together = command("replay", both, "--json").json
    for name in ("requests", "skipped_lines", "sessions", "verified"):
        assert apart[name] == together[name], name


def test_one_request_at_a_time_verifies_too(command: Command, log: Path, temporary: Path) -> None:
    result = command("replay", log, "--concurrency", 1, "--fsync", "never", "--json")
    assert result.json["verified"] is True


def test_a_limit_stops_the_replay(command: Command, log: Path, temporary: Path) -> None:
    report = command("replay", log, "--limit", 100, "--json").json
    assert (report["requests"], report["verified"]) == (100, True)


def test_an_empty_log_is_verified(command: Command, tmp_path: Path, temporary: Path) -> None:
    path = tmp_path / "empty.log"
    path.write_bytes(b"\n\nno request\n")
    report = command("replay", path, "--json").json
    assert (report["requests"], report["skipped_lines"]) == (0, 3)
    assert (report["sessions"], report["verified"]) == (0, True)


def test_a_person_gets_a_table(command: Command, log: Path, temporary: Path) -> None:
    result = command("replay", log)
    assert result.code == 0
    assert "600" in result.out
    assert "all equal" in result.out


def test_progress_is_told_while_it_runs(log: Path, tmp_path: Path) -> None:
    told: list[ReplayProgress] = []
    asyncio.run(replay(ReplayOptions((log,), tmp_path / "state"), told.append))
    assert {progress.stage for progress in told} == {"replay", "verify"}
    last = [progress for progress in told if progress.stage == "replay"][-1]
    assert last.done == 600
    assert last.in_memory + last.on_disk > 0


@pytest.mark.parametrize(
    ("memory", "requests", "sessions"), [("256KiB", 10_000, 1862), ("64KiB", 3000, None)]
)
def test_the_real_log_verifies(
    command: Command, temporary: Path, memory: str, requests: int, sessions: int | None
) -> None:
    if not REAL_LOG.exists():
        pytest.skip(f"{REAL_LOG.name} is not there")
    options = ("--memory", memory, "--segment", "1MiB", "--fsync", "never", "--limit", requests)
    result = command("replay", REAL_LOG, *options, "--json")
    assert result.code == 0, result.out
    report = result.json
    assert (report["requests"], report["skipped_lines"]) == (requests, 0)
    assert (report["sessions"], report["verified"]) == (sessions or report["sessions"], True)
    assert report["spilled"] > 0
    assert report["restored"] > 0
    assert report["segments"] > 1
    assert report["compactions"] > 0
    assert report["memory_peak_bytes"] <= report["memory_budget_bytes"] + 8 * KIB


# --- resuming ---------------------------------------------------------------------------------


def test_an_interrupted_replay_goes_on_where_it_stood(log: Path, tmp_path: Path) -> None:
    options = ReplayOptions((log,), tmp_path / "state", resume=True, fsync="never")
    calls = 0

    def interrupt_once_it_runs(progress: ReplayProgress) -> None:
        nonlocal calls
        calls += 1
        if progress.stage == "verify":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        run(replay(options, interrupt_once_it_runs))
    report = asyncio.run(replay(options))
    assert report.verified
    assert (report.requests, report.applied, report.resumed_at) == (600, 0, 600)


def test_a_finished_replay_is_verified_again(command: Command, log: Path, tmp_path: Path) -> None:
    words = ("replay", log, "--directory", tmp_path / "state", "--resume", "--json")
    assert command(*words).json["applied"] == 600
    again = command(*words).json
    assert (again["applied"], again["requests"], again["verified"]) == (0, 600, True)


def test_resuming_skips_what_sessions_have_above_the_watermark(log: Path, tmp_path: Path) -> None:
    options = ReplayOptions((log,), tmp_path / "state", resume=True)
    asyncio.run(replay(options))

    async def set_back(state: StateManager) -> None:
        await state.update_session_data(CURSOR_ID, "watermark", 100)

    change_directory(tmp_path / "state", set_back)
    report = asyncio.run(replay(options))
    assert (report.resumed_at, report.applied, report.verified) == (100, 0, True)


def test_a_changed_session_is_found_and_listed(command: Command, log: Path, tmp_path: Path) -> None:
    directory = tmp_path / "state"
    assert command("replay", log, "--directory", directory, "--json").code == 0

    async def damage(state: StateManager) -> None:
        sids = sorted(await state.get_active_sessions())
        sids.remove(CURSOR_ID)
        await state.update_session_data(sids[0], "requests", -1)
        await state.terminate_session(sids[1])
        await state.create_session(session_id="stranger")

    change_directory(directory, damage)
    result = command("replay", log, "--directory", directory, "--resume", "--json")
    assert result.code == 1
    report = result.json
    assert report["verified"] is False
    assert report["differing_sessions"] == 3
    text = "\n".join(report["differences"])
    assert "field requests is -1" in text
    assert "is missing" in text
    assert "session 'stranger': is there, but no request in the log belongs to it" in text
    human = command("replay", log, "--directory", directory, "--resume")
    assert human.code == 1
    assert "NOT VERIFIED: 3 sessions differ" in human.out


# --- refusals ---------------------------------------------------------------------------------


def test_a_directory_with_a_replay_needs_resume(
    command: Command, log: Path, tmp_path: Path
) -> None:
    assert command("replay", log, "--directory", tmp_path / "state").code == 0
    command("replay", log, "--directory", tmp_path / "state").assert_refused("--resume")


def test_resuming_with_another_log_is_refused(command: Command, log: Path, tmp_path: Path) -> None:
    other = write_log(tmp_path / "other.log", 50)
    directory = ("--directory", tmp_path / "state")
    assert command("replay", log, *directory).code == 0
    command("replay", other, *directory, "--resume").assert_refused("access.log", "other.log")
    command("replay", log, *directory, "--resume", "--limit", 5).assert_refused("limit 5")
    with log.open("ab") as file:
        file.write(b"one more line\n")
    command("replay", log, *directory, "--resume").assert_refused("access.log", "bytes")


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_sessions_of_something_else_are_refused(
    command: Command, log: Path, tmp_path: Path, resume: list[str]
) -> None:
    async def create(state: StateManager) -> None:
        await state.create_session(session_id="mine")

    change_directory(tmp_path / "state", create)
    words = ("replay", log, "--directory", tmp_path / "state", *resume)
    command(*words).assert_refused("sessions of something else")


def test_resume_without_a_directory_is_refused(command: Command, log: Path) -> None:
    command("replay", log, "--resume").assert_refused("--directory")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--policy", "oldest"], "memory.policy"),
        (["--fsync", "sometimes"], "disk.fsync"),
        (["--segment", "1KiB"], "disk.segment_bytes"),
        (["--memory", "0"], "memory.max_bytes"),
    ],
)
def test_a_wrong_setting_is_named(
    command: Command, log: Path, temporary: Path, words: list[str], said: str
) -> None:
    command("replay", log, *words).assert_refused(said)
    assert list(temporary.iterdir()) == []


def test_unreadable_logs_are_named(command: Command, tmp_path: Path, temporary: Path) -> None:
    damaged = tmp_path / "damaged.log.gz"
    damaged.write_bytes(gzip.compress(log_bytes(50))[:-20])
    command("replay", tmp_path / "missing.log", "--json").assert_refused("missing.log")
    command("replay", tmp_path, "--json").assert_refused("not a regular file")
    command("replay", damaged, "--json").assert_refused("damaged.log.gz: damaged gzip archive")
    assert list(temporary.iterdir()) == []


def test_a_directory_that_is_open_or_foreign_is_refused(
    command: Command, log: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "state"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.doc").write_text("years of work")

    assert command("replay", log, "--directory", directory).code == 0
    with locked(directory):
        command("replay", log, "--directory", directory, "--resume").assert_refused("in use")
    command("replay", log, "--directory", foreign).assert_refused("foreign")
    assert (foreign / "thesis.doc").read_text() == "years of work"


# --- parts ------------------------------------------------------------------------------------


def test_the_reader_counts_what_it_reads(log: Path) -> None:
    reader = LogReader((log,), limit=None)
    assert len(list(reader)) == reader.requests == 600
    assert reader.skipped_lines == 5


async def test_the_watermark_is_the_lowest_unfinished_position() -> None:
    mark = Watermark(10)
    for position, low in [(12, 10), (11, 10), (10, 13), (14, 13), (13, 15)]:
        mark.finish(position)
        assert mark.low == low


async def test_a_position_far_above_the_watermark_waits() -> None:
    mark = Watermark(0)
    await mark.within(3, 4)
    waiting = asyncio.ensure_future(mark.within(4, 4))
    await asyncio.sleep(0)
    assert not waiting.done()
    mark.finish(1)
    await asyncio.sleep(0)
    assert not waiting.done()
    mark.finish(0)
    await waiting


@pytest.mark.parametrize(
    "data", [b"\x00\xff\x7fELF" * 100, b'{"id": "s"}\n{"id": "t"}\n'], ids=["binary", "JSON Lines"]
)
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_a_file_without_a_single_request_is_no_success(
    command: Command, tmp_path: Path, temporary: Path, data: bytes, options: list[str]
) -> None:
    (tmp_path / "odd.log").write_bytes(data)
    result = command("replay", tmp_path / "odd.log", *options)
    assert result.code == 1
    assert f"0 of {max(1, data.count(10))} lines are requests" in result.err
