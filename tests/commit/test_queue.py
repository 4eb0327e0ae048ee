"""The commit queue, through the manager: what is acknowledged when, chains, failures, limits."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable
from typing import Any

import pytest

from persistence import Session, StateManager
from persistence.commit import Commit, CommitQueue
from persistence.errors import DiskFull, PersistenceError, SessionNotFound, WriteOutcomeUnknown
from tests.engine import (
    KIB,
    Crash,
    ScriptedFiles,
    Start,
    commits_of,
    contents,
    data_of,
    disk_of,
    eventually,
    loop_steps,
    outcomes,
    update,
    with_sessions,
)

MODES = ["always", "interval", "never"]
every_mode = pytest.mark.parametrize("fsync", MODES)


def assert_idle(state: StateManager) -> None:
    """Nothing is in flight and nothing is accounted as if it were."""
    commits = commits_of(state)
    assert commits.tails == {}
    assert commits.pending_bytes == 0
    assert not commits.is_full


# What is acknowledged when


async def test_with_fsync_always_nothing_is_acknowledged_before_its_sync_returned(
    start: Start, files: ScriptedFiles
) -> None:
    state = await with_sessions(start, "a", "b")
    files.syncs.hold()
    first = update(state, "a", 1)
    await files.syncs.reached()
    second = update(state, "b", 1)
    await loop_steps(20)
    assert not first.done()
    assert not second.done()
    assert await contents(state) == {"a": {"x": 0}, "b": {"x": 0}}
    files.syncs.let_pass(1)
    await first
    await files.syncs.reached()  # the sync that covers the second
    await loop_steps(20)
    assert not second.done(), "the first sync was on its way before the second was written"
    assert await contents(state) == {"a": {"x": 1}, "b": {"x": 0}}
    files.open_gates()
    await second
    assert await contents(state) == {"a": {"x": 1}, "b": {"x": 1}}


@pytest.mark.parametrize("fsync", ["interval", "never"])
async def test_in_the_other_modes_the_write_is_enough(
    start: Start, files: ScriptedFiles, crash: Crash, fsync: str
) -> None:
    state = await with_sessions(start, "a", disk={"fsync": fsync, "flush_interval_seconds": 3600})
    files.syncs.hold()  # no sync ever returns
    files.writes.hold()
    task = update(state, "a", 1)
    await files.writes.reached()
    await loop_steps(20)
    assert not task.done()
    files.writes.let_pass()
    await task
    assert files.calls["sync_data"] == 0
    assert await contents(await start(path=crash(state))) == {"a": {"x": 1}}
    files.open_gates()


async def test_one_sync_that_acknowledges_many_wakes_a_few_in_each_turn_of_the_loop(
    start: Start, files: ScriptedFiles
) -> None:
    state = await with_sessions(start, *map(str, range(100)))
    files.syncs.hold()
    woken: list[int] = []
    turn = 0

    async def updated(number: int) -> None:
        await update(state, str(number), 1)
        woken.append(turn)

    tasks = [asyncio.create_task(updated(number)) for number in range(100)]
    await files.syncs.reached()
    await loop_steps(30)  # until the others wait for the next sync, all together
    files.open_gates()
    while not all(task.done() for task in tasks):
        turn += 1
        await asyncio.sleep(0)
    assert max(map(woken.count, woken)) <= 8


async def test_while_one_sync_runs_the_next_batch_gathers(
    start: Start, files: ScriptedFiles
) -> None:
    state = await with_sessions(start, *map(str, range(100)))
    before = files.calls["sync_data"]
    files.syncs.hold()
    tasks = [update(state, "0", 1)]
    await files.syncs.reached()
    tasks += [update(state, str(number), 1) for number in range(1, 100)]
    await loop_steps(12)  # until all of them have begun, so many in each turn
    files.open_gates()
    await asyncio.gather(*tasks)
    assert files.calls["sync_data"] - before == 2
    stats = await state.stats()
    assert stats.commits == 200
    assert_idle(state)


async def test_1000_concurrent_updates_share_a_few_syncs(
    start: Start, files: ScriptedFiles
) -> None:
    state = await start()
    await asyncio.gather(*(state.create_session(data={"x": n}) for n in range(1000)))
    assert files.calls["sync_data"] < 50
    assert (await state.stats()).commits == 1000


# Chains


async def test_many_updates_of_one_session_in_flight_come_in_their_order(
    start: Start, files: ScriptedFiles
) -> None:
    state = await with_sessions(start, "a")
    order: list[int] = []
    files.syncs.hold()
    tasks = []
    for number in range(1, 200):
        task = update(state, "a", number)
        task.add_done_callback(lambda _, number=number: order.append(number))  # type: ignore[misc]
        tasks.append(task)
        if number % 50 == 0:
            await files.syncs.reached()
            files.syncs.let_pass(1)
    files.open_gates()
    sessions = await asyncio.gather(*tasks)
    assert [session["x"] for session in sessions] == list(range(1, 200))
    assert [session.version for session in sessions] == list(range(2, 201))
    assert order == list(range(1, 200))
    assert await data_of(state, "a") == {"x": 199}
    assert_idle(state)


async def test_each_update_builds_on_the_one_in_flight_before_it(
    start: Start, files: ScriptedFiles
) -> None:
    state = await with_sessions(start, "a")
    files.syncs.hold()
    tasks = [
        asyncio.create_task(state.update_session_data("a", f"field {number}", number))
        for number in range(20)
    ]
    await files.syncs.reached()
    files.open_gates()
    sessions = await asyncio.gather(*tasks)
    for number, session in enumerate(sessions):
        assert len(session) == number + 2
    assert len(await data_of(state, "a")) == 21


async def test_a_failed_batch_fails_what_was_built_on_it_and_nothing_else(
    start: Start, files: ScriptedFiles
) -> None:
    state = await with_sessions(start, *"abcd")
    files.syncs.hold()
    held = update(state, "d", 1)
    await files.syncs.reached()
    files.writes.hold()
    failing = [update(state, name, 1) for name in "ab"]
    await loop_steps(2)
    files.syncs.let_pass()
    await held
    await files.writes.reached()
    successors = [update(state, name, number) for name in "ab" for number in (2, 3)]
    others = [update(state, name, 2) for name in "cd"]
    await loop_steps(2)
    files.full = True
    files.writes.let_pass(1)
    await asyncio.wait(failing)
    files.full = False
    files.open_gates()
    for error in await outcomes([*failing, *successors]):
        assert isinstance(error, DiskFull)
    assert [session["x"] for session in await asyncio.gather(*others)] == [2, 2]
    assert await contents(state) == {"a": {"x": 0}, "b": {"x": 0}, "c": {"x": 2}, "d": {"x": 2}}
    again = await asyncio.gather(*(update(state, name, 5) for name in "abcd"))
    assert [session.version for session in again] == [2, 2, 3, 4]
    assert_idle(state)


async def test_where_there_is_no_room_an_end_fails_with_the_update_that_it_was_built_on(
    start: Start, files: ScriptedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = await with_sessions(start, *"ab")
    disk = disk_of(state)

    async def make_room(nbytes: int, *, grows: bool) -> None:
        if grows:
            raise DiskFull(f"no space for {nbytes} bytes")

    files.syncs.hold()
    held = update(state, "a", 1)
    await files.syncs.reached()
    monkeypatch.setattr(disk, "make_room", make_room)
    refused = [update(state, "a", 2), asyncio.create_task(state.terminate_session("a"))]
    other = asyncio.create_task(state.terminate_session("b"))  # that frees space
    await loop_steps(2)
    files.open_gates()
    await held
    for error in await outcomes(refused):
        assert isinstance(error, DiskFull)
    await other
    monkeypatch.undo()
    assert await contents(state) == {"a": {"x": 1}}
    assert_idle(state)


async def test_every_error_is_an_object_of_its_own(start: Start, files: ScriptedFiles) -> None:
    """One exception raised in many tasks would collect all their tracebacks."""
    state = await with_sessions(start, *"ab")
    files.full = True
    errors = await outcomes([update(state, name, 1) for name in "aabb"])
    assert all(isinstance(error, DiskFull) for error in errors)
    assert len({id(error) for error in errors}) == 4


# A disk that is full for a while


async def test_after_a_full_disk_writes_resume_and_nothing_of_the_failed_ones_is_left(
    start: Start, files: ScriptedFiles, crash: Crash
) -> None:
    state = await with_sessions(start, *"abc", disk={"segment_bytes": 64 * KIB})
    rng = random.Random(3)
    expected: dict[str, dict[str, Any]] = {name: {"x": 0} for name in "abc"}
    for number in range(120):
        files.full = rng.random() < 0.4
        name = rng.choice("abc")
        value = rng.randbytes(rng.choice((10, 5000)))
        (result,) = await outcomes([state.update_session_data(name, "x", value)])
        if files.full:
            assert isinstance(result, DiskFull)
        else:
            assert isinstance(result, Session), number
            expected[name] = {"x": value}
    files.full = False
    assert await contents(state) == expected
    assert await contents(await start(path=crash(state))) == expected
    assert_idle(state)


async def test_a_write_that_was_cut_short_is_cut_back(
    start: Start, files: ScriptedFiles, crash: Crash, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = await with_sessions(start, "a", disk={"compression": "none"})
    whole = files.write_at

    def half(fd: int, data: bytes | memoryview, offset: int) -> int:
        taken = whole(fd, data[: len(data) // 2], offset)
        files.full = True
        return taken

    monkeypatch.setattr(files, "write_at", half)
    (error,) = await outcomes([state.update_session_data("a", "x", "x" * 1000)])
    assert isinstance(error, DiskFull)
    monkeypatch.setattr(files, "write_at", whole)
    image = crash(state)
    files.full = False
    await state.update_session_data("a", "x", 2)
    assert await contents(await start(path=crash(state))) == {"a": {"x": 2}}
    assert await contents(await start(path=image)) == {"a": {"x": 0}}


async def test_short_writes_without_an_error_go_on(
    start: Start, files: ScriptedFiles, crash: Crash, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = await with_sessions(start, "a")
    whole = files.write_at
    monkeypatch.setattr(files, "write_at", lambda fd, data, at: whole(fd, data[:7], at))
    await state.update_session_data("a", "x", "x" * 100)
    assert await contents(await start(path=crash(state))) == {"a": {"x": "x" * 100}}


# A disk that fails


async def test_a_failed_sync_leaves_the_outcome_unknown_and_stops_all_writing(
    start: Start, files: ScriptedFiles, crash: Crash
) -> None:
    state = await with_sessions(start, *"abc")
    await state.spill_session("c")
    files.sync_error = OSError(5, "Input/output error")
    errors = await outcomes([update(state, "a", 1), update(state, "a", 2), update(state, "b", 1)])
    assert all(isinstance(error, WriteOutcomeUnknown) for error in errors)
    files.sync_error = None  # the kernel reports an error once and then success
    syncs = files.calls["sync_data"]
    calls: list[Awaitable[Any]] = [
        state.update_session_data("b", "x", 2),
        state.create_session(),
        state.terminate_session("b"),
        state.flush(),
    ]
    for error in await outcomes(calls):
        assert isinstance(error, WriteOutcomeUnknown)
        assert "open the directory again" in str(error)
    assert files.calls["sync_data"] == syncs, "never tried again"
    assert await contents(state) == {name: {"x": 0} for name in "abc"}
    assert await state.spill_session("a")
    assert await data_of(state, "a") == {"x": 0}
    again = await contents(await start(path=crash(state)))
    assert again["a"]["x"] in (0, 1, 2)
    assert again["b"]["x"] in (0, 1)
    assert again["c"] == {"x": 0}


async def test_a_write_error_that_is_not_a_full_disk_stops_all_writing(
    start: Start, files: ScriptedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = await with_sessions(start, "a")

    def fail(fd: int, data: bytes | memoryview, offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "write_at", fail)
    assert isinstance((await outcomes([update(state, "a", 1)]))[0], WriteOutcomeUnknown)
    monkeypatch.undo()
    assert isinstance((await outcomes([update(state, "a", 2)]))[0], WriteOutcomeUnknown)
    assert await data_of(state, "a") == {"x": 0}


@pytest.mark.parametrize("call", ["write_at", "sync_data"])
async def test_an_error_that_nobody_thought_of_fails_everyone_and_hangs_nobody(
    start: Start, files: ScriptedFiles, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    state = await with_sessions(start, *"abc", disk={"queue_bytes": KIB})
    files.syncs.hold()
    tasks = [update(state, "a", 1)]
    await files.syncs.reached()
    tasks += [update(state, name, number) for number in range(3) for name in "bbc"]
    tasks += [update(state, "c", b"x" * KIB), *(update(state, "a", 5) for _ in range(5))]
    await loop_steps(5)
    flushing = asyncio.create_task(state.flush())
    await loop_steps(2)

    def fail(*_: object) -> int:
        raise MemoryError

    monkeypatch.setattr(files, call, fail)
    files.open_gates()
    async with asyncio.timeout(10):
        errors = await outcomes([*tasks, flushing])
        assert all(isinstance(error, WriteOutcomeUnknown | Session) for error in errors)
        assert any(isinstance(error, WriteOutcomeUnknown) for error in errors)
        later: list[Awaitable[Any]] = [
            state.update_session_data("a", "x", 1),
            state.create_session(),
            state.flush(),
            state.terminate_session("a"),
        ]
        assert all(isinstance(error, WriteOutcomeUnknown) for error in await outcomes(later))
        assert await state.get_session("b") is not None
        await state.close()


# One update by itself


async def test_who_updates_alone_does_not_wait_for_the_committing_task(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = await with_sessions(start, *map(str, range(20)))
    batches = watched_batches(monkeypatch)
    for value in range(1, 10):
        await state.update_session_data("0", "x", value)
    await state.terminate_session("1")
    assert batches == []
    await asyncio.gather(*(state.update_session_data(str(n), "x", 1) for n in range(2, 20)))
    assert sum(map(len, batches)) == 17, "the first alone, those behind it gathered meanwhile"
    batches.clear()
    await asyncio.gather(*(state.update_session_data(str(n), "x", 2) for n in range(2, 20)))
    assert sum(map(len, batches)) == 18, "no longer: it would take a sync more each time"
    assert_idle(state)


def watched_batches(monkeypatch: pytest.MonkeyPatch) -> list[list[Commit]]:
    """Return the batches that the committing task will write."""
    batches: list[list[Commit]] = []
    start = CommitQueue._start

    async def note(self: CommitQueue, batch: list[Commit]) -> Any:
        batches.append(batch)
        return await start(self, batch)

    monkeypatch.setattr(CommitQueue, "_start", note)
    return batches


async def test_a_flush_and_a_close_wait_for_what_is_written_alone(
    start: Start, files: ScriptedFiles, crash: Crash
) -> None:
    state = await with_sessions(start, "a")
    files.writes.hold()
    task = update(state, "a", 1)
    await files.writes.reached()
    flushing = asyncio.create_task(state.flush())
    closing = asyncio.create_task(state.close())
    await loop_steps(20)
    assert not any(each.done() for each in (task, flushing, closing))
    files.open_gates()
    await asyncio.gather(task, flushing, closing)
    assert await contents(await start(path=crash(state))) == {"a": {"x": 1}}


async def test_syncs_and_flushes_come_while_one_task_updates_without_a_pause(
    start: Start, files: ScriptedFiles
) -> None:
    state = await with_sessions(
        start, "a", disk={"fsync": "interval", "flush_interval_seconds": 0.02}
    )
    done = False

    async def write() -> None:
        number = 0
        while not done:
            number += 1
            await state.update_session_data("a", "x", number)

    writing = asyncio.create_task(write())
    before = files.calls["sync_data"]
    async with asyncio.timeout(10):
        for _ in range(3):
            await state.flush()
        await eventually(lambda: files.calls["sync_data"] > before + 5)
    done = True
    await writing


async def test_an_end_written_alone_on_a_full_disk_is_tried_again_by_the_task(
    start: Start, files: ScriptedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = await with_sessions(start, "a", "b")
    batches = watched_batches(monkeypatch)
    files.full = True
    with pytest.raises(DiskFull):
        await state.terminate_session("a")
    assert len(batches) == 1
    files.full = False
    await state.terminate_session("a")
    assert await contents(state) == {"b": {"x": 0}}
    assert_idle(state)


async def test_where_memory_lacks_to_write_an_update_alone_the_task_writes_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = await with_sessions(start, "a", "b")

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(disk_of(state), "begin_now", fail)
    async with asyncio.timeout(10):
        for name in "ab":
            await state.update_session_data(name, "x", 1)
    assert await contents(state) == {"a": {"x": 1}, "b": {"x": 1}}
    assert_idle(state)


@pytest.mark.parametrize("place", ["encode", "append", "apply"])
async def test_an_error_that_nobody_thought_of_does_not_lose_what_is_written_alone(
    start: Start, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    state = await with_sessions(start, "a", "b")
    disk = disk_of(state)

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(disk if place == "apply" else disk.writer, place, fail)
    async with asyncio.timeout(10):
        errors = await outcomes([state.update_session_data(name, "x", 1) for name in "ab"])
        assert all(isinstance(error, WriteOutcomeUnknown) for error in errors)
        assert await contents(state) == {"a": {"x": 0}, "b": {"x": 0}}
        await state.close()


# Back-pressure


async def test_no_more_than_the_queue_is_in_flight_and_everybody_gets_through(
    start: Start, files: ScriptedFiles
) -> None:
    limit = 16 * KIB
    state = await with_sessions(start, *map(str, range(50)), disk={"queue_bytes": limit})
    commits = commits_of(state)
    peak = 0
    files.syncs.hold()
    tasks = [update(state, str(number % 50), "x" * 1000) for number in range(500)]
    largest = 1300
    for _ in range(200):
        files.syncs.let_pass(1)
        await loop_steps(5)
        peak = max(peak, commits.pending_bytes)
    files.open_gates()
    while not all(task.done() for task in tasks):
        peak = max(peak, commits.pending_bytes)
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert limit <= peak <= limit + largest
    assert_idle(state)


async def test_an_update_larger_than_the_queue_gets_through(start: Start) -> None:
    state = await with_sessions(start, *"ab", disk={"queue_bytes": KIB})
    async with asyncio.timeout(10):
        await asyncio.gather(
            *(
                update(state, name, b"x" * (100 * KIB + number))
                for number in range(5)
                for name in "ab"
            )
        )
    assert_idle(state)


async def test_nobody_starves_while_others_keep_the_queue_full(start: Start) -> None:
    names = [str(number) for number in range(60)]
    state = await with_sessions(start, *names, disk={"queue_bytes": 4 * KIB})
    progress = Counter(dict.fromkeys(names, 0))

    async def write(name: str) -> None:
        while progress.total() < 60 * 30:
            await state.update_session_data(name, "x", "x" * 200)
            progress[name] += 1

    async with asyncio.timeout(20):
        await asyncio.gather(*map(write, names))
    assert min(progress.values()) >= 10, progress.most_common()[-5:]


async def test_those_who_wait_for_room_come_in_the_order_in_which_they_asked(
    start: Start,
) -> None:
    state = await with_sessions(start, "a", disk={"queue_bytes": KIB})
    sessions = await asyncio.gather(*(update(state, "a", number) for number in range(100)))
    assert [session.version for session in sessions] == list(range(2, 102))


@pytest.mark.parametrize("seed", range(3))
async def test_cancelled_waiters_leave_no_hole_in_the_queue(
    start: Start, files: ScriptedFiles, seed: int
) -> None:
    rng = random.Random(seed)
    state = await with_sessions(start, *"abcdef", disk={"queue_bytes": 2 * KIB})
    tasks = []
    for _ in range(400):
        tasks.append(update(state, rng.choice("abcdef"), "x" * 300))
        if rng.random() < 0.3:
            rng.choice(tasks).cancel()
        if rng.random() < 0.2:
            await loop_steps(rng.randrange(4))
    async with asyncio.timeout(20):
        results = await outcomes(tasks)
    assert not [result for result in results if isinstance(result, PersistenceError)]
    assert sum(isinstance(result, Session) for result in results) > 100
    await state.flush()
    assert_idle(state)
    async with asyncio.timeout(5):
        await asyncio.gather(*(update(state, name, 1) for name in "abcdef"))


async def test_reads_spills_and_ends_do_not_deadlock_with_a_full_queue(
    start: Start, files: ScriptedFiles
) -> None:
    state = await with_sessions(
        start, *"abcdef", memory={"max_bytes": 4 * KIB}, disk={"queue_bytes": KIB}
    )
    files.syncs.hold()
    tasks: list[Awaitable[Any]] = [update(state, name, "x" * 500) for name in "abcdef" * 3]
    await loop_steps(5)
    assert commits_of(state).is_full
    for name in "abcdef":
        assert await state.get_session(name) is not None
        tasks.append(asyncio.create_task(state.spill_session(name)))
        tasks.append(asyncio.create_task(state.terminate_session(name)))
    await loop_steps(5)
    files.open_gates()
    async with asyncio.timeout(10):
        results = await outcomes(tasks)
    unexpected = [
        result
        for result in results
        if isinstance(result, BaseException) and not isinstance(result, SessionNotFound)
    ]
    assert unexpected == []
    assert await contents(state) == {}
    assert_idle(state)


# Rotation


async def test_order_and_acknowledgements_survive_rotations(
    start: Start, files: ScriptedFiles, crash: Crash
) -> None:
    state = await with_sessions(start, *"abc", disk={"segment_bytes": 64 * KIB})
    rng = random.Random(7)
    tasks = []
    last = {}
    for number in range(300):
        name = rng.choice("abc")
        value = [number, rng.randbytes(rng.randrange(3000))]
        last[name] = {"x": value}
        tasks.append(update(state, name, value))
        if number % 10 == 0:
            await loop_steps(3)
    sessions = await asyncio.gather(*tasks)
    assert [session["x"][0] for session in sessions] == list(range(300))
    assert (await state.stats()).disk.bytes_written > 5 * 64 * KIB
    assert await contents(state) == last
    assert await contents(await start(path=crash(state))) == last


async def test_a_session_larger_than_a_segment_is_stored(start: Start, crash: Crash) -> None:
    state = await with_sessions(start, "a", disk={"segment_bytes": 64 * KIB})
    value = random.Random(1).randbytes(300 * KIB)
    await state.update_session_data("a", "x", value)
    await state.create_session(session_id="b")
    assert await data_of(await start(path=crash(state)), "a") == {"x": value}
