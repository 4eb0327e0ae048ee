"""SIGKILL at random times, again and again on the same directory, in every mode of fsync.

What the worker was told is compared with what it finds when it starts again: of each session's
history, in the order in which it was submitted, a prefix with everything acknowledged in it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from persistence import StateConfig, StateManager
from persistence.disk.filenames import MANIFEST
from persistence.disk.inspect import scan_directory
from tests.crash_nursery import SESSIONS, State
from tests.engine import contents

KILLS = 24
LONGEST_SECONDS = 0.4
MOST_SEGMENTS = 40
NURSERY = Path(__file__).with_name("crash_nursery.py")
ROOT = Path(__file__).parents[1]


class Nursery:
    """The process that raises the workers and kills them."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(NURSERY)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        self._process.__exit__(None, None, None)  # closes its stdin, which ends it

    def run(self, order: dict[str, Any]) -> Iterator[list[Any]]:
        """Yield what a worker reports until its end, the end included."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            words = json.loads(line)
            yield words
            if words[0] == "end":
                return


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


class History:
    """One session: what was submitted since it was last looked at, and what of it was done."""

    def __init__(self) -> None:
        self.states: list[State] = [None]
        self.done = 0
        self.acknowledged = 0

    def submitted(self, state: State) -> None:
        self.states.append(state)

    def acknowledge(self, state: State) -> None:
        place = self.states.index(state, self.done + 1)
        assert place == self.done + 1, "acknowledged before what it was built on"
        self.done = place
        self.acknowledged += 1

    def found(self, state: State) -> None:
        """After a crash: at least what was done, at most what was submitted, nothing else."""
        possible = self.states[self.done :]
        assert state in possible, f"found {state}, possible are {possible}"
        self.states, self.done = [state], 0


def work_and_check(
    nursery: Nursery, order: dict[str, Any], histories: dict[str, History]
) -> tuple[int | None, int]:
    """Let a worker live; check what it finds; return its exit code and how much it reported."""
    lines = 0
    code: int | None = None
    for kind, *words in nursery.run(order):
        lines += 1
        if kind == "end":
            (code,) = words
        else:
            history = histories[words[0]]
            {"found": history.found, "try": history.submitted, "done": history.acknowledge}[kind](
                words[1]
            )
    return code, lines


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
    while kills < KILLS:
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
        assert run < 4 * KILLS
    assert sum(history.acknowledged for history in histories.values()) > 20 * KILLS
    await check_by_opening(directory, tmp_path / "copy", histories)


async def check_by_opening(directory: Path, copy: Path, histories: dict[str, History]) -> None:
    shutil.copytree(directory, copy)
    config = StateConfig.model_validate({"disk": {"path": str(copy)}})
    async with StateManager(config=config) as state:
        left = await contents(state)
        assert left.keys() <= histories.keys()
        for session_id, history in histories.items():
            data = left.get(session_id)
            history.found(None if data is None else [data["generation"], data["count"]])
        assert (await state.stats()).disk.damages == 0
        assert await state.get_active_sessions() != []
    # Recovered and closed once more: nothing has changed.
    async with StateManager(config=config) as state:
        assert await contents(state) == left
