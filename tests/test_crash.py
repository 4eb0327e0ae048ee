"""SIGKILL at random times, again and again on the same directory, in every mode of fsync.

What the worker was told is compared with what it finds when it starts again: of each session's
history, in the order in which it was submitted, a prefix with everything acknowledged in it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from persistence.disk.filenames import MANIFEST
from persistence.disk.inspect import scan_directory
from tests.crash_nursery import SESSIONS
from tests.crashes import History, Nursery, check_by_opening, work_and_check

KILLS = 24
LONGEST_SECONDS = 0.3
LEAST_ACKNOWLEDGED = 20 * KILLS
"""Where the machine is slow and workers come to little in their time, there are more of them."""
MOST_SEGMENTS = 40


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def acknowledged(histories: dict[str, History]) -> int:
    return sum(history.acknowledged for history in histories.values())


@pytest.mark.parametrize(
    ("fsync", "segment", "filler_bytes"),
    [
        ("always", "64KiB", 4_000),
        ("interval", "64KiB", 4_000),
        ("never", "64KiB", 4_000),
        ("always", "1MiB", 40_000),
    ],
)
async def test_a_kill_at_any_time_loses_nothing_acknowledged_and_invents_nothing(
    tmp_path: Path, nursery: Nursery, fsync: str, segment: str, filler_bytes: int
) -> None:
    rng = random.Random(f"kill with fsync {fsync}")
    directory = tmp_path / "state"
    histories = {session_id: History() for session_id in SESSIONS}
    kills = run = 0
    while kills < KILLS or acknowledged(histories) < LEAST_ACKNOWLEDGED:
        run += 1
        order = {
            "directory": str(directory),
            "disk": {"fsync": fsync, "segment_bytes": segment, "queue_bytes": segment},
            "filler_bytes": filler_bytes,
            "run": run,
            "seconds": rng.uniform(0.01, LONGEST_SECONDS),
            "closes": rng.random() < 0.2,
        }
        code, _ = work_and_check(nursery, order, histories)
        assert code in (None, 0)
        kills += code is None
        if (directory / MANIFEST).exists():
            reports = [report for report, _ in scan_directory(str(directory))]
            assert not any(report.damages for report in reports), "before it is opened again"
            assert len(reports) < MOST_SEGMENTS, "compaction keeps up, however short its life is"
        assert run < 10 * KILLS
    await check_by_opening(directory, tmp_path / "copy", histories)
