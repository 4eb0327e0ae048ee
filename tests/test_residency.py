"""Who is in memory: the budget, spilling and coming back, and that nobody notices."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import OrderedDict
from collections.abc import Awaitable
from typing import Any

import pytest

from persistence import ManualClock, Session, StateManager
from persistence import record as rec
from persistence.errors import CorruptionError, DiskFull
from persistence.memory.budget import MemoryPressure
from persistence.memory.tier import charge
from persistence.record import NEVER, commit_of
from tests.engine import (
    KIB,
    MIB,
    Crash,
    ScriptedFiles,
    Start,
    commits_of,
    contents,
    data_of,
    directory_of,
    disk_of,
    eventually,
    loop_steps,
    memory_of,
    outcomes,
    residency_of,
)

BUDGET = 64 * KIB
SMALL = {"max_bytes": BUDGET}


def resident(state: StateManager) -> list[str]:
    """Return who is in memory, least recently used first."""
    return memory_of(state).victims(-1, 1_000_000)


def charged(state: StateManager, session_id: str) -> int:
    record = memory_of(state).peek(session_id)
    return 0 if record is None else charge(session_id, record)


async def assert_in_step(state: StateManager) -> None:
    """Memory accounts exactly, and holds the newest acknowledged version of what it holds."""
    memory_of(state).check()
    held = {session_id: memory_of(state).peek(session_id) for session_id in resident(state)}
    for session_id, record in held.items():
        assert record is not None
        key = session_id.encode()
        found = await disk_of(state).reading.newest(disk_of(state).fingerprint(key), key)
        assert found is not None
        assert commit_of(found[0]) == commit_of(record)


# The budget


async def test_sessions_leave_at_the_very_write_that_crosses_the_threshold(start: Start) -> None:
    state = await start(memory=SMALL)
    crossed = 0
    for number in range(400):
        before = len(resident(state))
        await state.create_session(session_id=str(number), data={"x": "x" * 500})
        assert memory_of(state).used_bytes <= 0.8 * BUDGET
        if len(resident(state)) <= before:
            crossed += 1
            assert memory_of(state).used_bytes <= 0.7 * BUDGET
    assert crossed > 10
    assert len(await state.get_active_sessions()) == 400
    await assert_in_step(state)


@pytest.mark.parametrize(("threshold", "target"), [(1.0, 1.0), (0.5, 0.0), (0.9, 0.3)])
async def test_threshold_and_target_are_those_configured(
    start: Start, threshold: float, target: float
) -> None:
    state = await start(memory={**SMALL, "spill_threshold": threshold, "spill_target": target})
    highest = 0
    for number in range(400):
        before = memory_of(state).used_bytes
        await state.create_session(session_id=str(number), data={"x": "x" * 500})
        await loop_steps(2)
        used = memory_of(state).used_bytes
        assert used <= threshold * BUDGET
        highest = max(highest, used)
        if used < before:
            assert used <= target * BUDGET
    assert highest > threshold * BUDGET - 2 * KIB


@pytest.mark.parametrize("seed", range(5))
async def test_memory_never_exceeds_the_budget_by_more_than_one_session(
    start: Start, seed: int
) -> None:
    rng = random.Random(seed)
    state = await start(memory=SMALL, disk={"queue_bytes": 32 * KIB})
    names = [str(number) for number in range(60)]
    largest = 0

    async def act(name: str) -> None:
        await state.get_or_create_session(name)
        size = int(20 * KIB * rng.random() ** 4)
        await state.update_session_data(name, "x", rng.randbytes(size))
        await state.get_session(rng.choice(names))
        if rng.random() < 0.1:
            await state.terminate_session(rng.choice(names))
        if rng.random() < 0.1:
            await state.restore_session(rng.choice(names))

    for _ in range(20):
        await outcomes(act(rng.choice(names)) for _ in range(10))
        largest = max([largest, *(charged(state, name) for name in resident(state))])
        memory_of(state).check()
    stats = await state.stats()
    assert stats.memory_peak_bytes <= BUDGET + 20 * KIB + KIB
    assert stats.memory_used_bytes <= BUDGET
    assert min(stats.spilled, stats.restored) > 20
    await assert_in_step(state)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_bytes", [BUDGET, 16 * MIB], ids=["one shard", "four shards"])
async def test_sessions_leave_in_exactly_the_order_of_their_last_use(
    start: Start, clock: ManualClock, seed: int, max_bytes: int
) -> None:
    rng = random.Random(seed)
    state = await start(memory={"max_bytes": max_bytes}, disk={"compression": "none"})
    names = [str(number) for number in range(60)]
    model: OrderedDict[str, int] = OrderedDict()  # session -> what it is charged with
    for step in range(360):
        clock.advance(1)
        name = names[step] if step < 60 else rng.choice(names)
        if step < 60:
            await state.create_session(session_id=name, data={"x": bytes(max_bytes // 33)})
        elif rng.random() < 0.3:
            await state.update_session_data(name, "y", rng.randrange(100))
        else:
            await state.get_session(name)
        await loop_steps(5)  # what does not leave at once leaves in the background
        model.pop(name, None)
        model[name] = charged(state, name)
        if sum(model.values()) > 0.8 * max_bytes:
            while sum(model.values()) > 0.7 * max_bytes:
                model.popitem(last=False)
        assert resident(state) == list(model)
    assert (await state.stats()).restored > 50


async def test_a_lowered_budget_spills_at_once_and_a_raised_one_fills_again(
    start: Start,
) -> None:
    state = await start(memory={"max_bytes": MIB})
    for number in range(500):
        await state.create_session(session_id=str(number), data={"x": "x" * 1000})
    assert len(resident(state)) == 500
    expected = resident(state)
    residency_of(state).set_budget(100 * KIB)
    await eventually(lambda: memory_of(state).used_bytes <= 70 * KIB)
    assert resident(state) == expected[-len(resident(state)) :], "the most recently used stay"
    assert len(await contents(state)) == 500
    assert memory_of(state).used_bytes <= 80 * KIB
    assert (await state.stats()).memory_effective_budget_bytes == 100 * KIB
    assert (await state.stats()).memory_budget_bytes == MIB
    residency_of(state).set_budget(MIB)
    assert len(await contents(state)) == 500
    assert len(resident(state)) == 500


class Pressure:
    """Stands for the reader of the machine's memory: says what the test wants."""

    used_fraction = 0.5

    def read(self) -> MemoryPressure:
        return MemoryPressure(MIB, int(self.used_fraction * MIB), 4711, "a test")


async def test_pressure_lowers_the_effective_budget_and_its_end_raises_it_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.manager.MemoryReader", Pressure)
    monkeypatch.setattr(Pressure, "used_fraction", 0.99)
    state = await start(memory={"max_bytes": MIB, "check_interval_seconds": 0.005})
    for number in range(500):
        await state.create_session(session_id=str(number), data={"x": "x" * 1000})
    await eventually(lambda: memory_of(state).budget_bytes == MIB // 16)
    await eventually(lambda: memory_of(state).used_bytes <= MIB // 16)
    stats = await state.stats()
    assert stats.memory_effective_budget_bytes == MIB // 16
    assert stats.rss_bytes == 4711
    assert stats.spilled > 400
    monkeypatch.setattr(Pressure, "used_fraction", 0.1)
    await eventually(lambda: memory_of(state).budget_bytes == MIB)
    assert len(await contents(state)) == 500


# Sessions that are larger than the budget


async def test_a_session_larger_than_the_budget_is_served_without_being_cached(
    start: Start, crash: Crash
) -> None:
    state = await start(memory=SMALL)
    rng = random.Random(1)
    await state.create_session(session_id="small", data={"x": 1})
    first, second = rng.randbytes(100 * KIB), rng.randbytes(200 * KIB)
    await state.create_session("ada", session_id="large", data={"x": first, "y": [1]})
    assert await data_of(state, "large") == {"x": first, "y": [1]}
    session = await state.update_session_data("large", "x", second)
    assert (session.version, session["x"]) == (2, second)
    async with state.edit("large") as draft:
        draft["y"].append(2)
    assert await data_of(state, "large") == {"x": second, "y": [1, 2]}
    assert await state.find_sessions(user_id="ada") == ["large"]
    assert await state.restore_session("large")
    assert await state.spill_session("large")
    assert resident(state) == ["small"]
    assert (await state.stats()).memory_peak_bytes < BUDGET
    again = await start(path=crash(state), memory=SMALL)
    assert await data_of(again, "large") == {"x": second, "y": [1, 2]}


async def test_a_session_that_is_small_on_disk_only_pushes_nobody_out_of_memory(
    start: Start, crash: Crash
) -> None:
    """It is compressed there, and larger than the budget when it is read."""
    state = await start(memory=SMALL)
    await state.create_session(session_id="large", data={"x": "x" * 2 * BUDGET})
    again = await start(path=crash(state), memory=SMALL)
    for number in range(5):
        await again.create_session(session_id=f"small {number}")
    for _ in range(2):
        assert await data_of(again, "large") == {"x": "x" * 2 * BUDGET}
        assert len(resident(again)) == 5


async def test_a_session_that_outgrows_the_budget_leaves_and_comes_back_when_it_shrinks(
    start: Start,
) -> None:
    state = await start(memory=SMALL)
    await state.create_session(session_id="a", data={"x": 1})
    assert resident(state) == ["a"]
    await state.update_session_data("a", "x", bytes(100 * KIB))
    assert resident(state) == []
    await state.update_session_data("a", "x", 2)
    assert resident(state) == ["a"]
    assert await data_of(state, "a") == {"x": 2}
    memory_of(state).check()


async def test_concurrent_updates_of_a_session_larger_than_the_budget_are_all_counted(
    start: Start,
) -> None:
    state = await start(memory=SMALL)
    await state.create_session(session_id="a", data={"x": bytes(70 * KIB), "count": 0})

    def increment(data: Any) -> None:
        data["count"] += 1

    await asyncio.gather(*(state.update_session("a", increment) for _ in range(40)))
    assert (await data_of(state, "a"))["count"] == 40


# Coming back


async def test_a_cold_session_comes_back_into_memory(start: Start) -> None:
    state = await start()
    await state.create_session(session_id="a", data={"x": [1]})
    await state.spill_session("a")
    assert await data_of(state, "a") == {"x": [1]}
    assert resident(state) == ["a"]
    stats = await state.stats()
    assert (stats.restored, stats.hits) == (1, 0)
    await state.get_session("a")
    stats = await state.stats()
    assert (stats.restored, stats.hits) == (1, 1)


async def test_concurrent_reads_of_one_cold_session_do_one_read(
    start: Start, files: ScriptedFiles
) -> None:
    files.tells_cached = False
    state = await start()
    await state.create_session(session_id="a", data={"x": [1]})
    await state.spill_session("a")
    before = files.calls["read_at"]
    files.reads.hold()
    tasks = [asyncio.create_task(state.get_session("a")) for _ in range(50)]
    tasks += [asyncio.create_task(state.update_session("a", list)) for _ in range(5)]
    await files.reads.reached()
    await loop_steps(5)
    files.open_gates()
    sessions = await asyncio.gather(*tasks)
    assert files.calls["read_at"] == before + 1
    assert all(session is not None and session.data == {"x": [1]} for session in sessions)
    assert (await state.stats()).restored == 1


async def test_a_session_that_was_just_read_back_is_not_the_first_to_leave(
    start: Start, files: ScriptedFiles, clock: ManualClock
) -> None:
    files.tells_cached = False
    state = await start(memory={"max_bytes": 16 * MIB}, disk={"compression": "none"})
    tier = memory_of(state)
    names = [str(number) for number in range(1000)]
    alone = names[0]
    shard = hash(alone) % tier.shards
    others = [name for name in names if hash(name) % tier.shards != shard][:40]
    payload = {"x": bytes(16 * MIB // 50)}
    await state.create_session(session_id=alone, data=payload)
    await state.spill_session(alone)
    for name in others:
        clock.advance(1)
        await state.create_session(session_id=name, data=payload)
        if tier.used_bytes + 16 * MIB // 50 > 0.8 * tier.budget_bytes:
            break  # the next one crosses the threshold
    clock.advance(1)
    await state.get_session(alone)
    await loop_steps(10)
    assert resident(state)[-1] == alone
    assert 0.65 * tier.budget_bytes < tier.used_bytes <= 0.7 * tier.budget_bytes


async def test_a_reader_that_is_cancelled_takes_nothing_from_the_others(
    start: Start, files: ScriptedFiles
) -> None:
    files.tells_cached = False
    state = await start()
    await state.create_session(session_id="a", data={"x": 1})
    await state.spill_session("a")
    files.reads.hold()
    tasks = [asyncio.create_task(state.get_session("a")) for _ in range(5)]
    await files.reads.reached()
    tasks[0].cancel()
    tasks[3].cancel()
    await loop_steps(3)
    files.open_gates()
    results = await outcomes(tasks)
    assert [isinstance(result, Session) for result in results] == [False, True, True, False, True]


@pytest.mark.timeout(10)
async def test_a_reader_that_comes_between_the_end_of_a_read_and_its_news_does_not_spin(
    start: Start, files: ScriptedFiles, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.tells_cached = False
    state = await start()
    await state.create_session(session_id="a", data={"x": 1})
    await state.spill_session("a")
    clock.advance(1)
    residency = residency_of(state)
    read = residency._read_and_restore
    in_between: list[asyncio.Task[Any]] = []

    async def read_and_let_others_in(*args: Any, **options: Any) -> Any:
        found = await read(*args, **options)
        if not in_between:  # they run after this task has ended, and before anybody is told
            in_between.append(asyncio.create_task(state.spill_session("a")))
            in_between.append(asyncio.create_task(state.get_session("a")))
        return found

    monkeypatch.setattr(residency, "_read_and_restore", read_and_let_others_in)
    first = await state.get_session("a")
    assert first is not None
    assert await in_between[0] is True
    second = await in_between[1]
    assert second is not None
    assert second.data == {"x": 1}


async def again(state: StateManager) -> None:
    await state.terminate_session("a")
    await state.create_session(session_id="a", data={"x": 3})


CHANGES: dict[str, Any] = {
    "update": lambda state: state.update_session_data("a", "x", 2),
    "terminate": lambda state: state.terminate_session("a"),
    "terminate and create": again,
    "spill": lambda state: state.spill_session("a"),
    "compact": lambda state: state.compact(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
async def test_a_read_that_is_overtaken_returns_an_old_or_a_new_version_and_keeps_the_new(
    start: Start, files: ScriptedFiles, change: Any
) -> None:
    files.tells_cached = False
    state = await start(disk={"segment_bytes": 64 * KIB})
    await state.create_session(session_id="a", data={"x": 1})
    for _ in range(4):
        await state.create_session(session_id="filler", data={"x": bytes(50 * KIB)})
        await state.terminate_session("filler")
    await state.spill_session("a")
    files.reads.hold()
    reading = asyncio.create_task(state.get_session("a"))
    await files.reads.reached()
    files.reads.let_others_pass()
    changing = asyncio.ensure_future(change(state))
    await loop_steps(20)
    files.open_gates()
    session = await reading
    await changing
    now = await state.get_session("a")
    expected = {"update": {"x": 2}, "terminate": None, "terminate and create": {"x": 3}}
    name = next(name for name, item in CHANGES.items() if item is change)
    assert (now.data if now else None) == expected.get(name, {"x": 1})
    assert session is None or session.data in ({"x": 1}, expected.get(name))
    await assert_in_step(state)


async def test_damaged_bytes_of_a_cold_session_are_reported_and_others_stay_readable(
    start: Start,
) -> None:
    state = await start(disk={"compression": "none"})
    for name in ("good", "damaged"):
        await state.create_session(session_id=name, data={"x": f"the value of {name}"})
        await state.spill_session(name)
    (segment,) = directory_of(state).glob("*.seg")
    data = bytearray(segment.read_bytes())
    at = data.index(b"the value of damaged")
    data[at] ^= 1
    segment.write_bytes(data)
    for error in await outcomes([state.get_session("damaged") for _ in range(3)]):
        assert isinstance(error, CorruptionError)
        assert error.path == str(segment)
        assert error.session_id == "damaged"
        assert 0 < error.offset < at
    (error,) = await outcomes([state.update_session_data("damaged", "x", 1)])
    assert isinstance(error, CorruptionError)
    assert await data_of(state, "good") == {"x": "the value of good"}
    assert await state.terminate_session("damaged")
    await state.create_session(session_id="damaged", data={"x": "new"})
    assert await data_of(state, "damaged") == {"x": "new"}


@pytest.mark.parametrize("tells_cached", [True, False], ids=["cached reads", "reads in threads"])
@pytest.mark.parametrize("seed", range(2))
async def test_memory_and_log_stay_in_step_whatever_happens_at_once(
    start: Start, files: ScriptedFiles, seed: int, tells_cached: bool
) -> None:
    rng = random.Random(seed)
    files.tells_cached = tells_cached
    state = await start(
        memory={"max_bytes": 8 * KIB}, disk={"segment_bytes": 64 * KIB, "queue_bytes": 16 * KIB}
    )
    names = [str(number) for number in range(30)]

    async def act() -> None:
        name = rng.choice(names)
        actions: list[Awaitable[Any]] = [
            state.get_session(name),
            state.get_or_create_session(name),
            state.update_session_data(name, "x", rng.randbytes(rng.randrange(900))),
            state.spill_session(name),
            state.restore_session(name),
            state.terminate_session(name),
            state.compact(),
        ]
        chosen = rng.choices(range(len(actions)), [4, 4, 6, 2, 2, 1, 0.2])[0]
        for number, action in enumerate(actions):
            if number != chosen:
                asyncio.ensure_future(action).cancel()
        await outcomes([actions[chosen]])

    for _ in range(25):
        await asyncio.gather(*(act() for _ in range(20)))
        await assert_in_step(state)
    stats = await state.stats()
    assert stats.restored > 50
    assert stats.memory_peak_bytes <= 8 * KIB + 2 * KIB


# Sessions that are not in the log yet


async def adopted(state: StateManager, session_id: str, data: dict[str, Any]) -> None:
    """Let `state` take over a session, as it would from another worker."""
    await state.create_session(session_id="template", data=data)
    record = memory_of(state).peek("template")
    assert record is not None
    accessed = memory_of(state).times("template")[0]
    await state.terminate_session("template")
    await residency_of(state).adopt(session_id, record, accessed, NEVER)


async def test_an_adopted_session_is_there_and_reaches_the_log_with_a_flush(
    start: Start, crash: Crash
) -> None:
    state = await start()
    await adopted(state, "a", {"x": 1})
    assert await data_of(state, "a") == {"x": 1}
    assert await state.get_active_sessions() == ["a"]
    assert (await state.stats()).sessions == 1
    assert await contents(await start(path=crash(state))) == {}
    await state.flush()
    assert resident(state) == ["a"]
    assert (await state.stats()).sessions == 1
    assert await contents(await start(path=crash(state))) == {"a": {"x": 1}}


@pytest.mark.parametrize("how", ["spill", "close", "update"])
async def test_an_adopted_session_reaches_the_log_when_it_has_to(
    start: Start, crash: Crash, how: str
) -> None:
    state = await start()
    await adopted(state, "a", {"x": 1})
    if how == "spill":
        assert await state.spill_session("a")
        assert resident(state) == []
        again = await start(path=crash(state))
    elif how == "close":
        await state.close()
        again = await start()
    else:
        assert (await state.update_session_data("a", "y", 2)).data == {"x": 1, "y": 2}
        again = await start(path=crash(state))
    assert (await data_of(again, "a"))["x"] == 1
    assert residency_of(again).unlogged == {}


async def test_a_session_that_is_on_its_way_into_the_log_can_be_looked_at(
    start: Start, files: ScriptedFiles
) -> None:
    state = await start()
    await adopted(state, "a", {"x": 1})
    files.writes.hold()
    spilling = asyncio.create_task(state.spill_session("a"))
    await files.writes.reached()
    assert "a" not in memory_of(state)
    session = await state.get_session("a", renew=False)
    assert session is not None
    assert (session["x"], session.expires_at) == (1, None)
    health = await state.session_health("a")
    assert (health.idle_seconds, health.left_seconds) == (0, NEVER)
    assert not spilling.done()
    files.open_gates()
    assert await spilling


async def test_an_adopted_session_may_be_terminated(start: Start, crash: Crash) -> None:
    state = await start()
    await adopted(state, "a", {"x": 1})
    assert await state.terminate_session("a")
    assert await contents(state) == {}
    assert residency_of(state).unlogged == {}
    await state.flush()
    assert await contents(await start(path=crash(state))) == {}


async def test_a_spill_that_fails_keeps_the_session_and_raises_nothing_at_the_reader(
    start: Start, files: ScriptedFiles
) -> None:
    state = await start(memory=SMALL)
    for number in range(30):
        await adopted(state, str(number), {"x": "x" * 1000})
    assert not commits_of(state).is_full
    files.full = True
    for number in range(30):
        assert await data_of(state, str(number)) == {"x": "x" * 1000}
    residency_of(state).set_budget(16 * KIB)
    await eventually(lambda: residency_of(state).spill_failures > 0)
    for number in range(30):
        assert await data_of(state, str(number)) == {"x": "x" * 1000}
    assert isinstance((await outcomes([state.spill_session("1")]))[0], DiskFull)
    files.full = False
    await state.flush()
    residency_of(state).set_budget(16 * KIB)
    await eventually(lambda: memory_of(state).used_bytes <= 16 * KIB)
    assert len(await contents(state)) == 30
    await assert_in_step(state)


@pytest.mark.parametrize("how", ["updated", "terminated"])
async def test_an_adopted_session_that_leaves_while_its_next_version_is_on_its_way_stays_behind_it(
    start: Start, crash: Crash, files: ScriptedFiles, how: str
) -> None:
    state = await start()
    await adopted(state, "a", {"x": 1})
    files.writes.hold()
    if how == "updated":
        work: Awaitable[object] = state.update_session_data("a", "x", 2)
    else:
        work = state.terminate_session("a")
    task = asyncio.ensure_future(work)
    await files.writes.reached()
    residency_of(state).set_budget(1)
    await eventually(lambda: resident(state) == [])
    if how == "updated":
        assert await data_of(state, "a") == {"x": 1}  # what is acknowledged
        residency_of(state).set_budget(1)
    files.open_gates()
    await task
    await state.flush()
    expected = {"a": {"x": 2}} if how == "updated" else {}
    assert await contents(state) == expected
    assert await contents(await start(path=crash(state))) == expected
    assert residency_of(state).unlogged == {}


@pytest.mark.parametrize("how", ["updated", "terminated"])
async def test_adopted_sessions_leave_behind_their_next_versions_also_when_those_come_in_one_batch(
    start: Start, crash: Crash, how: str
) -> None:
    """The first acknowledgement of a batch makes sessions leave that are further on in it."""
    state = await start(memory={"max_bytes": 16 * KIB})
    names = [str(number) for number in range(10)]
    for name in names:
        await adopted(state, name, {"x": "x" * 1000})
    assert residency_of(state).unlogged.keys() == set(names)
    work: list[Awaitable[object]] = [
        state.update_session_data(name, "y", "y" * 1000) for name in names[:5]
    ]
    if how == "updated":
        work += [state.update_session_data(name, "y", "y" * 1000) for name in names[5:]]
    else:
        work += [state.terminate_session(name) for name in names[5:]]
    await asyncio.gather(*work)
    await state.flush()
    left = names if how == "updated" else names[:5]
    expected = {name: {"x": "x" * 1000, "y": "y" * 1000} for name in left}
    assert await contents(state) == expected
    assert await contents(await start(path=crash(state))) == expected
    await assert_in_step(state)


async def test_an_adopted_session_that_leaves_comes_back_if_its_next_version_fails(
    start: Start, files: ScriptedFiles
) -> None:
    state = await start()
    await adopted(state, "a", {"x": 1})
    files.writes.hold()
    task = asyncio.ensure_future(state.update_session_data("a", "x", 2))
    await files.writes.reached()
    residency_of(state).set_budget(1)
    await eventually(lambda: resident(state) == [])
    files.full = True
    files.open_gates()
    assert isinstance((await outcomes([task]))[0], DiskFull)
    assert await data_of(state, "a") == {"x": 1}
    files.full = False
    await state.flush()
    assert await contents(state) == {"a": {"x": 1}}


async def test_a_session_adopted_again_while_its_older_version_is_being_spilled_is_logged_too(
    start: Start, crash: Crash, files: ScriptedFiles
) -> None:
    state = await start()
    await adopted(state, "a", {"x": 1})
    old = memory_of(state).peek("a")
    assert old is not None
    files.writes.hold()
    residency_of(state).set_budget(1)
    await files.writes.reached()
    residency_of(state).set_budget(64 * KIB)
    new = rec.assemble(
        incarnation=b"i" * 16,
        commit=b"c" * 16,
        version=2,
        created=0.0,
        ttl_seconds=0.0,
        flags=0,
        user=0,
        meta=rec.pack_meta({}),
        fields={"x": rec.pack_value(2, "x")},
    )
    await residency_of(state).adopt("a", new, 0.0, NEVER)
    files.open_gates()
    await eventually(lambda: not commits_of(state).pending_bytes)
    residency_of(state).set_budget(1)
    await eventually(lambda: resident(state) == [])
    await state.flush()
    assert await data_of(state, "a") == {"x": 2}
    assert await contents(await start(path=crash(state))) == {"a": {"x": 2}}


# What it costs the process


async def test_the_number_of_tracked_objects_does_not_grow_with_the_sessions(
    start: Start,
) -> None:
    state = await start()
    await state.create_session(data={"x": 1})

    async def fill(count: int) -> int:
        for _ in range(count // 500):
            await asyncio.gather(
                *(state.create_session("ada", data={"x": [1, 2, {"y": 3}]}) for _ in range(500))
            )
        await state.flush()
        gc.collect()
        return len(gc.get_objects())

    few = await fill(500)
    many = await fill(4000)
    assert (await state.stats()).in_memory == 4501
    assert many - few < 300
    residency_of(state).set_budget(KIB)
    await eventually(lambda: memory_of(state).used_bytes <= KIB)
    gc.collect()
    assert len(gc.get_objects()) - few < 300, "cold ones neither"
