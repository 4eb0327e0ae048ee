"""The whole engine in a simulated world, seed after seed; see `simworld`.

``python -m tests.faults simulation --seconds 3600 --seed 1`` runs as many as asked. A failure says
which seed it was, and what happened last in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.simworld import simulate

SEEDS = 150
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_nothing_goes_wrong_in_simulated_worlds(
    fault_seed: int, scaled: Callable[[int], int]
) -> None:
    """In a process of its own: sets of strings have an order that only a process can fix."""
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "tests.faults", "simulation"),
            *("--seed", str(fault_seed), "--worlds", str(scaled(SEEDS)), "--seconds", "110"),
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
