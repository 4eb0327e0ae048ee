"""Those who wait for a limit: who is admitted, in which order, and how many in one turn."""

from __future__ import annotations

import asyncio

import pytest

from persistence.admission import Waiting, is_admitted
from persistence.errors import DiskFull
from tests.engine import loop_steps
from tests.test_turns import Ticks

CROWD = 100


class Crowd:
    """Tasks that wait in one queue, and what became of them.

    Attributes:
        ended: who has gone on, in this order: in which turn of the loop, number, admitted or not.
    """

    def __init__(self, waiting: Waiting, count: int) -> None:
        self._waiting = waiting
        self.ticks = Ticks()
        self.ended: list[tuple[int, int, bool]] = []
        self.tasks = [asyncio.create_task(self._wait(number)) for number in range(count)]

    async def _wait(self, number: int) -> None:
        may_pass = await self._waiting.join()
        self.ended.append((self.ticks.now, number, may_pass))

    def all_with(self, *, may_pass: bool) -> list[int]:
        return [number for _, number, passed in self.ended if passed is may_pass]

    def most_in_one_turn(self) -> int:
        turns = [turn for turn, _, _ in self.ended]
        return max(map(turns.count, turns))


async def crowd(waiting: Waiting, count: int = CROWD) -> Crowd:
    """Let so many wait."""
    found = Crowd(waiting, count)
    await loop_steps(1)
    assert len(waiting) == count
    return found


async def test_so_many_are_admitted_in_the_order_in_which_they_came() -> None:
    waiting = Waiting()
    found = await crowd(waiting)
    assert await waiting.admit(60) == 0
    await waiting.refuse()
    await loop_steps(1)
    assert found.all_with(may_pass=True) == list(range(60))
    assert found.all_with(may_pass=False) == list(range(60, CROWD))
    assert not waiting


async def test_only_a_few_go_on_in_one_turn_of_the_loop() -> None:
    waiting = Waiting()
    found = await crowd(waiting)
    await waiting.admit(CROWD // 2)
    await waiting.refuse()
    await loop_steps(1)
    assert len(found.ended) == CROWD
    assert found.most_in_one_turn() <= 16


async def test_whoever_comes_while_others_are_admitted_is_admitted_behind_them() -> None:
    waiting = Waiting()
    await crowd(waiting)
    admitting = asyncio.create_task(waiting.admit(CROWD + 5))
    await loop_steps(2)
    late = asyncio.create_task(asyncio.wait_for(waiting.join(), 5))
    assert await admitting == 4
    assert await late


async def test_whoever_comes_while_others_are_refused_waits() -> None:
    waiting = Waiting()
    await crowd(waiting)
    refusing = asyncio.create_task(waiting.refuse())
    await loop_steps(2)
    late = waiting.join()
    await refusing
    assert not late.done()
    assert len(waiting) == 1


async def test_whoever_has_given_up_is_passed_over() -> None:
    waiting = Waiting()
    found = await crowd(waiting, 4)
    found.tasks[0].cancel()
    found.tasks[2].cancel()
    await loop_steps(1)
    assert len(waiting) == 2
    assert await waiting.admit(3) == 1
    await loop_steps(1)
    assert found.all_with(may_pass=True) == [1, 3]


async def test_each_gets_an_error_of_its_own() -> None:
    waiting = Waiting()
    turns = [waiting.join() for _ in range(2)]
    await waiting.refuse(DiskFull("no space"))
    errors = [turn.exception() for turn in turns]
    assert [str(error) for error in errors] == ["no space"] * 2
    assert errors[0] is not errors[1]


async def test_those_whom_nobody_serves_any_more_are_cancelled() -> None:
    waiting = Waiting()
    turn = waiting.join()
    waiting.give_up()
    with pytest.raises(asyncio.CancelledError):
        await turn
    assert not waiting


async def test_a_turn_that_has_come_is_told_from_all_others() -> None:
    waiting = Waiting()
    admitted, refused, failed, cancelled, waits = [waiting.join() for _ in range(5)]
    await waiting.admit(1)
    refused.set_result(False)
    failed.set_exception(DiskFull("no space"))
    cancelled.cancel()
    turns = (admitted, refused, failed, cancelled, waits)
    assert [is_admitted(turn) for turn in turns] == [True, False, False, False, False]
