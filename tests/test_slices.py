from __future__ import annotations

import asyncio
from itertools import count

import pytest

from persistence import ManualClock
from persistence.slices import SLICE_SECONDS, Slices, short_rest


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What `asyncio.sleep` was asked for."""
    seconds: list[float] = []
    sleep = asyncio.sleep

    async def noting(delay: float) -> None:
        seconds.append(delay)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", noting)
    return seconds


async def test_a_slice_ends_when_its_time_is_used_up(slept: list[float]) -> None:
    clock = ManualClock()
    slices = Slices(clock.monotonic)
    await slices.give_way_if_due()
    assert slept == []
    clock.advance(SLICE_SECONDS)
    await slices.give_way_if_due()
    await slices.give_way_if_due()  # another one has begun
    assert slept == [0.0]


async def test_whether_to_rest_is_asked_behind_each_slice(slept: list[float]) -> None:
    clock = ManualClock()
    rests = iter([short_rest(), 0.0, short_rest()])
    slices = Slices(clock.monotonic, rest_seconds=lambda: next(rests))
    for _ in range(3):
        await slices.give_way()
    assert slept == [short_rest(), 0.0, short_rest()]
    assert short_rest() > 0


async def test_everything_else_has_its_turn_while_a_slice_gives_way() -> None:
    turns = count()
    asyncio.get_running_loop().call_soon(next, turns)
    await Slices(ManualClock().monotonic).give_way()
    assert next(turns) == 1
