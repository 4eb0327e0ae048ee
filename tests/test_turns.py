"""How many calls begin in one turn of the event loop, and in which order the others follow."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from persistence import StateManager
from persistence.commit import Commit
from persistence.turns import CALLS_PER_TURN, Turns
from tests.disk.memoryfiles import MemoryFiles
from tests.support import config, opened

MOST = 4
BURST = 200


class Ticks:
    """Counts the turns of the loop, beside whatever runs."""

    def __init__(self) -> None:
        self.now = 0
        self._handle = asyncio.get_running_loop().call_soon(self._tick)

    def _tick(self) -> None:
        self.now += 1
        self._handle = asyncio.get_running_loop().call_soon(self._tick)

    def stop(self) -> None:
        self._handle.cancel()


async def begun_in(arrivals: list[int]) -> list[tuple[int, int]]:
    """Let so many calls come in each turn; return (turn, which), in the order in which they begin.

    Calls are numbered as they come.
    """
    turns, ticks = Turns(MOST), Ticks()
    begun: list[tuple[int, int]] = []

    async def call(which: int) -> None:
        await turns.enter()
        begun.append((ticks.now, which))

    tasks: list[asyncio.Task[None]] = []
    for count in arrivals:
        tasks += [asyncio.create_task(call(len(tasks) + which)) for which in range(count)]
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    ticks.stop()
    return begun


ARRIVALS = [
    [10 * MOST],
    [MOST] * 10,
    [MOST + 1, MOST - 1, 0, MOST + 3, 1, 1, 0, 0, 2 * MOST, MOST, MOST],
    [1] * 30,
]


@pytest.mark.parametrize("arrivals", ARRIVALS)
async def test_only_so_many_calls_begin_in_one_turn(arrivals: list[int]) -> None:
    begun = Counter(turn for turn, _ in await begun_in(arrivals))
    assert begun.total() == sum(arrivals)
    assert max(begun.values()) <= MOST


@pytest.mark.parametrize("arrivals", ARRIVALS)
async def test_calls_begin_in_the_order_in_which_they_came(arrivals: list[int]) -> None:
    assert [which for _, which in await begun_in(arrivals)] == list(range(sum(arrivals)))


async def test_a_task_that_calls_again_and_again_lets_the_loop_turn() -> None:
    turns, ticks = Turns(MOST), Ticks()
    for _ in range(10 * MOST):
        await turns.enter()
    ticks.stop()
    assert ticks.now >= 9


async def test_a_turn_that_nobody_waited_for_is_whole_again_in_the_next() -> None:
    turns = Turns(MOST)
    for _ in range(3):
        assert [turns.take() for _ in range(MOST + 1)] == [True] * MOST + [False]
        await asyncio.sleep(0)


async def test_whoever_gives_up_waiting_takes_nobodys_turn() -> None:
    turns, ticks = Turns(1), Ticks()
    assert turns.take()
    tasks = [asyncio.create_task(turns.enter()) for _ in range(10)]
    await asyncio.sleep(0)
    begun = ticks.now
    for task in tasks[1:9]:
        task.cancel()
    async with asyncio.timeout(5):
        await tasks[0]
        await tasks[9]
    ticks.stop()
    assert all(task.cancelled() for task in tasks[1:9])
    assert ticks.now - begun <= 3


async def test_a_turn_that_could_not_be_ended_for_want_of_memory_ends_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns = Turns(1)

    def no_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(asyncio.get_running_loop(), "call_soon", no_memory)
        with pytest.raises(MemoryError):
            turns.take()
    waiting = [asyncio.create_task(turns.enter()) for _ in range(2)]
    await asyncio.sleep(0)
    assert not waiting[1].done()
    with monkeypatch.context() as patch:
        patch.setattr(asyncio.get_running_loop(), "call_soon", no_memory)
        with pytest.raises(MemoryError):
            turns._end()
    for _ in range(5):
        async with asyncio.timeout(5):
            await turns.enter()
    assert all(task.done() for task in waiting)


# Through a manager


async def filled(state: StateManager) -> list[str]:
    """Create a burst of sessions, which are on disk then; return their ids."""
    ids = [f"s{number}" for number in range(BURST)]
    await asyncio.gather(*(state.create_session(session_id=sid, data={"n": 0}) for sid in ids))
    for sid in ids:
        await state.spill_session(sid)
    return ids


async def edit(state: StateManager, sid: str) -> None:
    async with state.edit(sid) as draft:
        draft["n"] = 1


Call = Callable[[StateManager, str], Awaitable[Any]]

CALLS: dict[str, Call] = {
    "read": lambda state, sid: state.get_session(sid),
    "update": lambda state, sid: state.update_session(sid, lambda data: data.update(n=1)),
    "update of a field": lambda state, sid: state.update_session_data(sid, "n", 1),
    "replacement": lambda state, sid: state.replace_session(sid, {"n": 1}),
    "edit": edit,
    "creation": lambda state, sid: state.create_session(session_id=f"another {sid}"),
    "end": lambda state, sid: state.terminate_session(sid),
}


@pytest.mark.parametrize("what", CALLS)
async def test_a_burst_of_calls_is_spread_over_turns(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(MemoryFiles(), config(compression="none")) as state:
        ids = await filled(state)
        ticks = Ticks()
        done: Counter[int] = Counter()
        submit, restore = state._commits.submit, state._residency.restore_now

        def submitted(commit: Commit, *, wait: bool = True) -> None:
            done[ticks.now] += 1
            submit(commit, wait=wait)

        def restored(sid: str) -> Any:
            done[ticks.now] += 1
            return restore(sid)

        if what == "read":
            monkeypatch.setattr(state, "_restore_now", restored)
        else:
            monkeypatch.setattr(state._commits, "submit", submitted)
        await asyncio.gather(*(CALLS[what](state, sid) for sid in ids))
        ticks.stop()
    assert done.total() == BURST
    assert max(done.values()) <= CALLS_PER_TURN


@pytest.mark.parametrize("what", ["flush", "close"])
async def test_what_was_called_before_is_covered_although_it_waits_for_its_turn(what: str) -> None:
    files = MemoryFiles()
    async with opened(files, config(fsync="never")) as state:
        ids = await filled(state)
        updates = [asyncio.create_task(state.update_session_data(sid, "n", 1)) for sid in ids]
        await asyncio.sleep(0)
        await (state.flush() if what == "flush" else state.close())
        assert sum(task.done() and not task.exception() for task in updates) == BURST
        assert not [path for path in files.unsynced_data() if path.endswith(".seg")]


async def test_calls_that_wait_for_their_turn_are_made_on_a_state_that_is_restored_meanwhile() -> (
    None
):
    async with opened(MemoryFiles(), config()) as state:
        ids = await filled(state)
        info = await state.create_checkpoint()
        restoring = asyncio.create_task(state.restore_checkpoint(info.id))
        calls: list[asyncio.Task[Any]] = []
        whats = ["update", "update of a field", "edit", "replacement", "read"]
        while state._gate is None:
            assert not restoring.done()
            # So many in each turn that some wait for theirs when the gate closes.
            for number in range(50):
                what, sid = whats[number % len(whats)], ids[len(calls) % BURST]
                calls.append(asyncio.ensure_future(CALLS[what](state, sid)))
            await asyncio.sleep(0)
        assert state._turns._waiting
        await restoring
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert not isinstance(outcome, BaseException), outcome
