"""The whole engine in a simulated world, seed after seed; see `simworld`.

``python -m tests.faults simulation --seconds 3600 --seed 1`` runs as many as asked. A failure says
which seed it was, and what happened last in it.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.faults.simloop import SimulatedLoop, run
from tests.faults.simworld import World, simulate

SEEDS = 50
DAYS = 30
DAY = 86_400.0
STEPS_A_DAY = 24
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_nothing_goes_wrong_in_simulated_worlds(
    fault_seed: int, scaled: Callable[[int], int]
) -> None:
    """In a process of its own: sets of strings have an order that only a process can fix."""
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "tests.faults", "simulation"),
            *("--seed", str(fault_seed), "--worlds", str(scaled(SEEDS)), "--seconds", "80"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-4000:]


@pytest.mark.parametrize("seed", range(3))
def test_a_seed_has_one_outcome(seed: int) -> None:
    first, again = simulate(seed), simulate(seed)
    assert len(first.story) > 100
    assert first.story == again.story
    assert first.trace.digest() == again.trace.digest()


def test_thirty_days_of_short_lives_leave_nothing_behind() -> None:
    """TTLs, cleanups and merges by themselves, in simulated time; killed once a day."""

    async def main(loop: SimulatedLoop) -> None:
        world = World(1, loop, "alone")
        world._budget_bytes = 256 * 1024
        world._queue_bytes = 2**20
        world.cleanup_seconds = 3600.0
        chance = Random(1)
        [worker] = world.workers
        sizes: list[tuple[int, int]] = []
        lives: dict[str, float] = {}
        with world.patched():
            assert await worker.open()
            for step in range(DAYS * STEPS_A_DAY):
                sid = f"s{step}"
                ttl = chance.choice([600.0, 3600.0, 20_000.0])
                data = {"x": chance.randbytes(chance.randrange(4000))}
                await worker.state.create_session(
                    session_id=sid, data=data, ttl_seconds=ttl, auto_renew=False
                )
                lives[sid] = loop.now + ttl
                loop.now += DAY / STEPS_A_DAY - 30  # what is due meanwhile is done once, not often
                await asyncio.sleep(30)
                if step % STEPS_A_DAY == STEPS_A_DAY - 1:
                    there = set(await worker.state.get_active_sessions())
                    lives = {name: end for name, end in lives.items() if end > loop.now}
                    assert there == lives.keys()
                    stats = await worker.state.stats()
                    assert stats.disk.damages == 0
                    assert stats.memory_peak_bytes <= 2 * world._budget_bytes
                    sizes.append((stats.disk.total_bytes, len(worker.files.contents())))
                    await worker.kill()
                    assert await worker.open()
            await worker.close()
        live_bytes = max(len(lives), 30) * 4200
        assert max(size for size, _ in sizes) < 8 * live_bytes + 4 * 65_536
        assert max(files for _, files in sizes) < 40

    run(main)
