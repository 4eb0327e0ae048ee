from __future__ import annotations

import asyncio
import random

import pytest

from persistence.errors import ConflictError
from persistence.locks import SessionLocks
from tests.engine import loop_steps


@pytest.fixture
def locks() -> SessionLocks:
    return SessionLocks()


async def test_a_lock_exists_only_while_somebody_holds_it(locks: SessionLocks) -> None:
    assert "a" not in locks
    async with locks.holding("a"):
        assert "a" in locks
        assert "b" not in locks
        assert len(locks) == 1
    assert "a" not in locks
    assert len(locks) == 0


async def test_locks_of_different_sessions_do_not_wait_for_each_other(
    locks: SessionLocks,
) -> None:
    async with locks.holding("a"), locks.holding("b"):
        assert len(locks) == 2


async def test_holders_come_in_the_order_in_which_they_asked(locks: SessionLocks) -> None:
    order: list[int] = []

    async def hold(number: int) -> None:
        async with locks.holding("a"):
            order.append(number)
            await loop_steps(number % 3)

    async with asyncio.TaskGroup() as group:
        for number in range(50):
            group.create_task(hold(number))
    assert order == list(range(50))


async def test_nobody_gets_in_between_a_release_and_the_next_in_line(locks: SessionLocks) -> None:
    order: list[str] = []

    async def hold(name: str) -> None:
        async with locks.holding("a"):
            order.append(name)

    await locks.acquire("a")
    waiting = asyncio.create_task(hold("waited"))
    await loop_steps(1)
    locks.release("a")
    # The one in line has not run yet; whoever asks now comes after it all the same.
    await asyncio.gather(hold("came later"), waiting)
    assert order == ["waited", "came later"]


async def test_asking_for_a_lock_that_this_task_holds_is_a_conflict(locks: SessionLocks) -> None:
    async with locks.holding("a"):
        with pytest.raises(ConflictError, match="'a' is being edited by this very task"):
            await locks.acquire("a")
        assert "a" in locks
    assert len(locks) == 0


async def test_a_handed_over_lock_knows_its_new_holder(locks: SessionLocks) -> None:
    async def second() -> None:
        async with locks.holding("a"):
            with pytest.raises(ConflictError):
                await locks.acquire("a")

    async with locks.holding("a"):
        task = asyncio.create_task(second())
        await loop_steps(2)
    await task
    assert len(locks) == 0


async def test_an_error_while_holding_releases(locks: SessionLocks) -> None:
    with pytest.raises(ZeroDivisionError):
        async with locks.holding("a"):
            raise ZeroDivisionError
    assert len(locks) == 0


async def test_who_is_cancelled_while_waiting_leaves_the_line(locks: SessionLocks) -> None:
    order: list[int] = []

    async def hold(number: int) -> None:
        async with locks.holding("a"):
            order.append(number)

    async with locks.holding("a"):
        tasks = [asyncio.create_task(hold(number)) for number in range(5)]
        await loop_steps(1)
        tasks[0].cancel()
        tasks[3].cancel()
        await loop_steps(2)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [1, 2, 4]
    assert len(locks) == 0


async def test_who_is_cancelled_with_the_lock_in_hand_passes_it_on(locks: SessionLocks) -> None:
    order: list[int] = []

    async def hold(number: int) -> None:
        async with locks.holding("a"):
            order.append(number)

    await locks.acquire("a")
    tasks = [asyncio.create_task(hold(number)) for number in range(3)]
    await loop_steps(1)
    locks.release("a")  # hands it to the first, which has not run yet
    tasks[0].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert tasks[0].cancelled()
    assert order == [1, 2]
    assert len(locks) == 0


async def test_all_free_waits_for_the_last_holder(locks: SessionLocks) -> None:
    await asyncio.wait_for(locks.all_free(), 1)
    await locks.acquire("a")
    await locks.acquire("b")
    waiting = asyncio.create_task(locks.all_free())
    await loop_steps(3)
    locks.release("a")
    await loop_steps(3)
    assert not waiting.done()
    locks.release("b")
    await waiting


@pytest.mark.parametrize("seed", range(5))
async def test_no_lock_is_lost_or_held_twice_when_many_are_cancelled(
    locks: SessionLocks, seed: int
) -> None:
    rng = random.Random(seed)
    inside: set[str] = set()
    entered = 0

    async def hold(name: str, steps: int) -> None:
        nonlocal entered
        async with locks.holding(name):
            assert name not in inside, "two holders at once"
            inside.add(name)
            entered += 1
            try:
                await loop_steps(steps)
            finally:
                inside.remove(name)

    tasks = []
    for _ in range(500):
        tasks.append(asyncio.create_task(hold(rng.choice("abc"), rng.randrange(4))))
        if rng.random() < 0.4:
            rng.choice(tasks).cancel()
        await loop_steps(rng.randrange(2))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    failures = [item for item in results if isinstance(item, Exception)]
    assert not failures
    assert entered > 100
    assert len(locks) == 0
    await asyncio.wait_for(locks.all_free(), 1)
