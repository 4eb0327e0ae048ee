"""How many calls begin in one turn of the event loop, and in which order the others follow."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from persistence.turns import Turns
from tests.disk.memoryfiles import MemoryFiles
from tests.support import config, opened

MOST = 4


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


async def begun_in(calls: int) -> list[tuple[int, int]]:
    """Let so many tasks begin a call each, all ready at once; return (turn, which) in order."""
    turns, ticks = Turns(MOST), Ticks()
    begun: list[tuple[int, int]] = []

    async def call(which: int) -> None:
        await turns.enter()
        begun.append((ticks.now, which))

    await asyncio.gather(*(call(which) for which in range(calls)))
    ticks.stop()
    return begun


async def test_only_so_many_calls_begin_in_one_turn() -> None:
    begun = await begun_in(10 * MOST)
    per_turn = [sum(turn == when for turn, _ in begun) for when in {turn for turn, _ in begun}]
    assert sum(per_turn) == 10 * MOST
    assert max(per_turn) == MOST


async def test_calls_begin_in_the_order_in_which_they_came() -> None:
    assert [which for _, which in await begun_in(10 * MOST)] == list(range(10 * MOST))


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
    turns = Turns(1)
    assert turns.take()
    tasks = [asyncio.create_task(turns.enter()) for _ in range(5)]
    await asyncio.sleep(0)
    for task in tasks[1:4]:
        task.cancel()
    async with asyncio.timeout(5):
        await tasks[0]
        await tasks[4]
    assert all(task.cancelled() for task in tasks[1:4])


@pytest.mark.parametrize("what", ["read", "update", "create", "terminate"])
async def test_a_burst_of_calls_keeps_nobody_else_from_the_loop(what: str) -> None:
    """All are ready in one turn; a bystander gets many turns before the last of them has begun."""
    ids = [f"s{n}" for n in range(200)]
    async with opened(MemoryFiles(), config(compression="none")) as state:
        for sid in ids:
            await state.create_session(session_id=sid, data={"n": 0})
        if what == "read":
            for sid in ids:
                await state.spill_session(sid)
        calls: dict[str, Callable[[str], Awaitable[object]]] = {
            "read": state.get_session,
            "update": lambda sid: state.update_session_data(sid, "n", 1),
            "create": lambda sid: state.create_session(session_id=f"{sid} again"),
            "terminate": state.terminate_session,
        }
        ticks = Ticks()
        await asyncio.gather(*(calls[what](sid) for sid in ids))
        ticks.stop()
    assert ticks.now >= len(ids) // 16
