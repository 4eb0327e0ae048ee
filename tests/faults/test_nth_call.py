"""Whichever call on the disk fails, however: nothing acknowledged is lost, nothing wrong is shown.

A sample here; ``python -m tests.faults nth`` takes every call with every failure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

import pytest

from tests.disk.memoryfiles import MUTATING, Call, MemoryFiles
from tests.faults import nthcall
from tests.faults.simulation import stepped
from tests.faults.world import Impossible, World, check_image

RUNS = 12


def test_a_run_has_500_operations_and_every_kind_of_call() -> None:
    steps = nthcall.script(1)
    assert len(steps) == 500
    assert {step.partition(" ")[0] for step in steps} == set(nthcall.WEIGHTS)
    with stepped():
        calls = nthcall.count_calls(1)
    assert len(calls) > 2000
    assert Counter(calls).keys() >= MUTATING - {"truncate"} | {"open_write", "read_at"}
    assert len(list(nthcall.failures(calls))) > 20_000


def test_two_runs_make_the_same_calls() -> None:
    with stepped():
        first = nthcall.count_calls(3)
    with stepped():
        assert nthcall.count_calls(3) == first


@pytest.mark.slow
def test_whichever_call_fails_nothing_acknowledged_is_lost(
    fault_seed: int, scaled: Callable[[int], int]
) -> None:
    chance = Random(fault_seed)
    seed = chance.randrange(1000)
    with stepped():
        calls = nthcall.count_calls(seed)
    everything = list(nthcall.failures(calls))
    for failure in chance.sample(everything, min(len(everything), scaled(RUNS))):
        try:
            nthcall.check(seed, failure)
        except BaseException as error:
            error.add_note(f"run {seed}, {failure} ({calls[failure.nth - 1]})")
            raise


def test_copies_of_one_run_find_what_a_run_for_each_failure_finds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where something is wrong: here the last look, which refuses what it is shown."""
    seed = 5
    with stepped():
        calls = nthcall.count_calls(seed)
    failures = Random(seed).sample(list(nthcall.failures(calls)), 8)

    async def refuse(world: World, *_: object, **__: object) -> None:
        text = f"{world.lives} lives, {sorted(world.ledger.settled)}, {world.refusals}"
        assert not world.lives % 2, text

    monkeypatch.setattr(nthcall, "check_checkpoints", refuse)
    found: dict[nthcall.Failure, str] = {}
    for failure in failures:
        try:
            nthcall.check(seed, failure)
        except AssertionError as error:
            found[failure] = str(error).splitlines()[0]
        else:
            found[failure] = ""
    told: dict[nthcall.Failure, str] = {}

    def report(failure: nthcall.Failure, text: str) -> bool:
        told[failure] = text
        return True

    nthcall.explore(seed, failures, report)
    assert told.keys() == found.keys()
    for failure, text in told.items():
        assert found[failure] in text
        assert bool(text) == bool(found[failure])
    assert any(found.values())


@pytest.mark.parametrize("turns", range(3))
async def test_calls_that_take_their_time_change_nothing(turns: int) -> None:
    """The same run with calls that end some turns of the loop later, and in another order."""
    with stepped(turns):
        world = World(turns)
        await world.run(nthcall.script(turns))
        assert world.refusals == []
        await world.die()
        await check_image(world, world.files.after_power_loss())
        await check_image(world, world.files.after_power_loss(Random(turns)))


@pytest.mark.parametrize("skipped", ["sync_data", "sync", "sync_directory"])
async def test_the_monitor_sees_an_acknowledgement_without_its_sync(skipped: str) -> None:
    """Of the monitor itself: an engine that leaves out a sync does not get through."""

    def leave_out(_: MemoryFiles, call: Call) -> int | None:
        return 0 if call.operation == skipped else None

    with stepped():
        world = World(1)
        world.faults.append(leave_out)
        with pytest.raises(Impossible):
            await world.run(nthcall.script(1))
        await world.die()
