"""SIGKILL at named points of the engine's work, and at random times, on one directory.

``python -m tests.faults kills`` kills ten thousand times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.crashes import Nursery
from tests.faults.kills import Kills

KILLS = 30


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_kill_at_any_named_point_loses_nothing_acknowledged(
    nursery: Nursery, tmp_path: Path, fault_seed: int, scaled: Callable[[int], int]
) -> None:
    kills = Kills(nursery, tmp_path / "state", fault_seed)
    kills.run(scaled(KILLS))
    assert len(kills.at) > 10, "different ones"
    assert kills.acknowledged > 100
    await kills.check(tmp_path)
