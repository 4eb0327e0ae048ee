"""Commits and compaction kept in step: how much dead space there may be, and who waits for whom."""

from __future__ import annotations

import asyncio
import errno
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any, Final

import pytest

from persistence import StateManager
from persistence.disk.format import FOOTER_BYTES, SEGMENT_HEADER_BYTES, SegmentKind
from persistence.disk.pressure import Pressure
from persistence.disk.segments import Segment
from tests.disk.memoryfiles import Call, MemoryFiles, fail
from tests.engine import eventually
from tests.support import config, everything, opened

SEGMENT_BYTES: Final = 64 * 1024
UPDATES: Final = 300
VALUE_BYTES: Final = 8000
SLACK_BYTES: Final = 2 * SEGMENT_BYTES  # the output of a merge, and the batch under way


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def segment_of(live_bytes: int, dead_bytes: int, **given: Any) -> Segment:
    length = SEGMENT_HEADER_BYTES + FOOTER_BYTES + live_bytes + dead_bytes
    return Segment(1, SegmentKind.LOG, 0, length=length, live_bytes=live_bytes, **given)


def pressure_of(*segments: Segment) -> Pressure:
    pressure = Pressure(SEGMENT_BYTES)
    pressure.measure(segments)
    return pressure


def test_nothing_waits_below_the_soft_limit() -> None:
    pressure = pressure_of(segment_of(50_000, 50_000 + 2 * SEGMENT_BYTES))
    assert pressure.dead_bytes == pressure.soft_bytes
    assert pressure.of_commits == 0
    assert pressure.pause_seconds(1.0) == 0
    assert pressure.of_compaction == 1


def test_pauses_grow_towards_the_hard_limit_with_what_a_batch_cost() -> None:
    halfway = pressure_of(segment_of(0, 5 * SEGMENT_BYTES // 2))
    assert halfway.of_commits == 0.5
    assert halfway.pause_seconds(0.01) == 0.01
    assert halfway.pause_seconds(10) == 0.05, "but no pause is long"
    full = pressure_of(segment_of(0, 9 * SEGMENT_BYTES))
    assert full.of_commits == 1
    assert full.pause_seconds(0.01) == 0.05


@pytest.mark.parametrize("flag", ["damaged", "without_rows"])
def test_dead_space_that_compaction_cannot_free_is_no_pressure(flag: str) -> None:
    assert pressure_of(segment_of(0, 9 * SEGMENT_BYTES, **{flag: True})).of_compaction == 0


def small() -> Any:
    return config(segment_bytes=SEGMENT_BYTES, compression="none")


@pytest.fixture
def _threads_take_turns() -> Iterator[None]:
    """Let a loop that never rests leave the others more than 200 turns in a second."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0001)
    yield
    sys.setswitchinterval(before)


async def update(state: StateManager, sid: str, counts: dict[str, int]) -> None:
    """Make dead space: each update leaves the record before it behind."""
    await state.create_session(session_id=sid, data={"n": 0})
    for number in range(UPDATES):
        await state.replace_session(sid, {"n": number, "x": bytes(VALUE_BYTES)})
        counts[sid] = number


def most_bytes(state: StateManager) -> float:
    stats = state._disk.stats()
    frames = stats.live_bytes + stats.tombstone_bytes + state._disk._pressure.hard_bytes
    return frames + stats.segments * (SEGMENT_HEADER_BYTES + FOOTER_BYTES) + SLACK_BYTES


async def test_one_batch_that_outdates_records_of_several_segments_raises_no_limit() -> None:
    async with opened(MemoryFiles(), small()) as state:
        for sid, fraction in [("large", 0.75), ("stays", 0.3), ("tiny", 0.1)]:
            await state.create_session(
                session_id=sid, data={"x": bytes(int(SEGMENT_BYTES * fraction))}
            )
        assert state._disk.stats().segments == 2
        first = state.create_session()  # is written alone; the others gather meanwhile
        both = [state.replace_session(sid, {}) for sid in ("large", "tiny")]
        await asyncio.gather(first, *both)
        live_bytes = state._disk.stats().live_bytes
        assert state._disk._pressure.hard_bytes == 2 * live_bytes + 3 * SEGMENT_BYTES


@pytest.mark.alone
@pytest.mark.usefixtures("_threads_take_turns")
async def test_the_log_stays_within_its_bound_while_updates_never_pause() -> None:
    counts: dict[str, int] = {}
    async with opened(MemoryFiles(), small()) as state, asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(update(state, f"s{n}", counts)) for n in range(4)]
        while not all(task.done() for task in running):
            # While a merge runs its inputs are there beside its outputs.
            more = SEGMENT_BYTES if state._disk.compactor.is_merging else 0
            assert state._disk.total_bytes <= most_bytes(state) + more
            await asyncio.sleep(0)
    assert state._disk.compactor.stats.merges > 3


class Hold:
    """Lets no merge begin until it is let go."""

    def __init__(self, files: MemoryFiles) -> None:
        self.is_reached = threading.Event()
        self._go = threading.Event()
        files.gates.append(self)

    def __call__(self, call: Call) -> None:
        if call.operation == "create" and call.path.endswith(".seg.tmp"):
            self.is_reached.set()
            assert self._go.wait(20)

    def let_go(self) -> None:
        self._go.set()


async def test_updates_wait_for_a_compaction_that_is_too_far_behind() -> None:
    files = MemoryFiles()
    counts: dict[str, int] = {}
    async with opened(files, small()) as state:
        hold = Hold(files)
        await state.create_session(session_id="still", data={"x": bytes(VALUE_BYTES)})
        updating = asyncio.create_task(update(state, "s", counts))
        pressure = state._disk._pressure
        await eventually(lambda: hold.is_reached.is_set() and pressure.of_commits >= 1)
        await eventually(lambda: bool(state._disk.compactor._waiting))
        before = counts["s"]
        assert await state.get_session("still") is not None, "readers do not wait"
        for _ in range(200):
            await asyncio.sleep(0)
        assert counts["s"] <= before + 1 < UPDATES - 1, "no more updates are taken"
        assert state._disk.total_bytes <= most_bytes(state)
        hold.let_go()
        await updating
        assert (await everything(state))["s"]["n"] == UPDATES - 1


async def test_updates_do_not_wait_for_a_compaction_that_cannot_work() -> None:
    files = MemoryFiles()
    files.faults.append(fail(errno.EIO, "create", path=".seg.tmp", times=None))
    counts: dict[str, int] = {}
    async with opened(files, small()) as state:
        await state.create_session(session_id="still", data={"x": b"some live bytes to copy"})
        async with asyncio.timeout(20):
            await update(state, "s", counts)
        assert state._disk.total_bytes > most_bytes(state)
        files.faults.clear()
        await state.compact()
        assert state._disk.total_bytes <= most_bytes(state)
        assert (await everything(state))["s"]["n"] == UPDATES - 1
