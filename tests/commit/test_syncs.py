"""Syncs and flushes, through the manager: what waits for which, and what does not."""

from __future__ import annotations

import asyncio
import random
from contextlib import nullcontext
from typing import Any

import pytest

from persistence import StateManager
from persistence.errors import DiskFull, WriteOutcomeUnknown
from tests.engine import (
    KIB,
    MIB,
    ScriptedFiles,
    Start,
    commits_of,
    contents,
    disk_of,
    eventually,
    loop_steps,
    outcomes,
    update,
    with_sessions,
)


async def test_with_fsync_never_nothing_is_synced_until_it_is_asked_for(
    start: Start, files: ScriptedFiles
) -> None:
    state = await with_sessions(start, "a", disk={"fsync": "never"})
    for number in range(20):
        await state.update_session_data("a", "x", number)
    assert files.calls["sync_data"] == 0
    await state.flush()
    assert files.calls["sync_data"] == 1


async def test_with_fsync_interval_a_sync_follows_by_itself(
    start: Start, files: ScriptedFiles
) -> None:
    state = await start(disk={"fsync": "interval", "flush_interval_seconds": 0.02})
    await state.create_session(session_id="a")
    await eventually(lambda: files.calls["sync_data"] == 1)
    await state.update_session_data("a", "x", 1)
    await eventually(lambda: files.calls["sync_data"] == 2)
    await loop_steps(20)
    assert files.calls["sync_data"] == 2, "nothing was written since"


LATER: dict[str, Any] = {"fsync": "interval", "flush_interval_seconds": 3600}


async def flushed_so_far(
    start: Start, files: ScriptedFiles
) -> tuple[StateManager, asyncio.Task[None]]:
    """Return a manager with a session "a", and its flush, which stands before its sync."""
    state = await with_sessions(start, "a", disk=LATER)
    files.syncs.hold()
    flushing = asyncio.create_task(state.flush())
    await files.syncs.reached()
    return state, flushing


async def test_a_segment_is_synced_in_parts_before_it_is_full(
    start: Start, files: ScriptedFiles
) -> None:
    state = await with_sessions(start, "a", disk={**LATER, "segment_bytes": 512 * KIB})
    for number in range(4):
        await state.update_session_data("a", "x", random.Random(number).randbytes(12 * KIB))
    assert files.calls["sync_data"] == 0, "not an eighth of it yet"
    await state.update_session_data("a", "x", random.Random(4).randbytes(20 * KIB))
    await eventually(lambda: files.calls["sync_data"] == 1)
    assert len(disk_of(state).segments) == 1, "it is still the first one"
    await loop_steps(20)
    assert files.calls["sync_data"] == 1


async def test_updates_do_not_wait_for_a_sync_that_acknowledges_nothing(
    start: Start, files: ScriptedFiles
) -> None:
    state, flushing = await flushed_so_far(start, files)
    for number in range(5):
        await state.update_session_data("a", "x", number)
    assert not flushing.done()
    assert await contents(state) == {"a": {"x": 4}}
    files.open_gates()
    await flushing


async def test_a_flush_during_a_sync_waits_for_the_next_one(
    start: Start, files: ScriptedFiles
) -> None:
    state, first = await flushed_so_far(start, files)
    await state.update_session_data("a", "x", 1)
    second = asyncio.create_task(state.flush())
    await loop_steps(20)
    files.syncs.let_pass(1)
    await first
    await files.syncs.reached()
    await loop_steps(20)
    assert not second.done()
    files.open_gates()
    await second
    assert files.calls["sync_data"] == 2


@pytest.mark.parametrize("fails", [False, True], ids=["well", "poisoned"])
async def test_a_flush_that_comes_when_the_queue_has_been_closed_is_answered(
    start: Start, files: ScriptedFiles, *, fails: bool
) -> None:
    state = await with_sessions(start, "a")
    commits = commits_of(state)
    if fails:
        files.sync_error = OSError(5, "Input/output error")
        with pytest.raises(WriteOutcomeUnknown):
            await state.update_session_data("a", "x", 1)
    await state.close()
    with pytest.raises(WriteOutcomeUnknown) if fails else nullcontext():
        await asyncio.wait_for(commits.flush(), 10)


async def test_a_sync_that_takes_longer_than_the_interval_holds_updates_back(
    start: Start, files: ScriptedFiles
) -> None:
    state = await with_sessions(start, disk={"fsync": "interval", "flush_interval_seconds": 0.02})
    files.syncs.hold()
    await state.create_session(session_id="a", data={"x": 0})
    await files.syncs.reached()
    await state.update_session_data("a", "x", 1)
    await eventually(lambda: commits_of(state)._syncs.is_behind)
    late = update(state, "a", 2)
    await loop_steps(20)
    await disk_of(state).threads.write(lambda: None)  # behind its write, if there were one
    await loop_steps(20)
    assert not late.done()
    assert await contents(state) == {"a": {"x": 1}}, "what is written is acknowledged"
    writes = files.calls["write_at"]
    files.syncs.let_pass(1)
    await late
    assert files.calls["write_at"] == writes + 1
    files.open_gates()


async def test_an_update_beside_a_sync_that_fails_fails_with_it(
    start: Start, files: ScriptedFiles
) -> None:
    state, flushing = await flushed_so_far(start, files)
    files.writes.hold()
    written = update(state, "a", 1)
    await files.writes.reached()
    files.sync_error = OSError(5, "Input/output error")
    files.syncs.let_pass()
    flushed = (await outcomes([flushing]))[0]
    assert isinstance(flushed, WriteOutcomeUnknown)
    files.open_gates()
    files.sync_error = None
    for error in await outcomes([written, update(state, "a", 2), state.flush()]):
        assert isinstance(error, WriteOutcomeUnknown)
    assert files.calls["sync_data"] == 1
    assert await contents(state) == {"a": {"x": 0}}


async def test_closing_waits_for_the_sync_that_is_under_way(
    start: Start, files: ScriptedFiles
) -> None:
    state, flushing = await flushed_so_far(start, files)
    await state.update_session_data("a", "x", 1)
    closing = asyncio.create_task(state.close())
    files.syncs.let_pass(1)
    await flushing
    await files.syncs.reached()
    assert not closing.done()
    files.open_gates()
    await closing


async def test_syncs_and_flushes_come_under_a_load_that_never_pauses(
    start: Start, files: ScriptedFiles
) -> None:
    state = await with_sessions(
        start,
        *map(str, range(40)),
        disk={"fsync": "interval", "flush_interval_seconds": 0.02, "segment_bytes": 256 * MIB},
    )
    done = False

    async def write(name: str, pause: int) -> None:
        while not done:
            two = [state.update_session_data(name, "x", number) for number in range(2)]
            await asyncio.gather(*two, loop_steps(pause))

    tasks = [asyncio.create_task(write(str(number), number)) for number in range(40)]
    try:
        before = files.calls["sync_data"]
        await eventually(lambda: files.calls["sync_data"] >= before + 5)
        async with asyncio.timeout(5):
            for _ in range(5):
                await state.flush()
            assert await state.spill_session("1")
    finally:
        done = True
        await asyncio.gather(*tasks)


async def test_a_flush_waits_for_all_that_was_submitted_before_it(
    start: Start, files: ScriptedFiles
) -> None:
    state = await with_sessions(start, *"abc", disk={"fsync": "never"})
    files.writes.hold()
    tasks = [update(state, name, 1) for name in "abc"]
    await files.writes.reached()
    tasks += [update(state, name, 2) for name in "abc"]
    await loop_steps(3)
    flushing = asyncio.create_task(state.flush())
    await loop_steps(10)
    assert not flushing.done()
    files.open_gates()
    await flushing
    assert all(task.done() for task in tasks)
    assert files.calls["sync_data"] == 1


async def test_a_flush_is_not_deceived_by_later_updates_that_failed_first(
    start: Start, files: ScriptedFiles
) -> None:
    state = await with_sessions(start, "held", "fails", "waits", disk={"compression": "none"})
    files.syncs.hold()
    held = update(state, "held", 1)
    await files.syncs.reached()
    large = b"1" * (3 * MIB)  # a batch of its own
    fails = [update(state, "fails", large)]
    await loop_steps(2)
    waits = update(state, "waits", 1)
    await loop_steps(2)
    flushing = asyncio.create_task(state.flush())
    await loop_steps(2)
    fails += [update(state, "fails", number) for number in range(10)]
    await loop_steps(2)
    files.full = True
    files.writes.hold()
    files.syncs.let_pass(1)
    await held
    files.writes.let_pass(1)  # the large one, for which there is no space
    await asyncio.wait(fails)
    files.full = False
    await files.writes.reached()  # the one that waits stands before the disk
    await loop_steps(20)
    assert not flushing.done()
    files.open_gates()
    await flushing
    assert waits.done()
    assert all(isinstance(error, DiskFull) for error in await outcomes(fails))
