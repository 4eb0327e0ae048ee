"""Sequences of up to three operations, and a crash at every point of each.

Some of the 584 here; ``python -m tests.faults sequences`` takes all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from tests.faults import sequences
from tests.faults.sequences import OPERATIONS, Tally, all_sequences

SHORT_ONES = 2
LONG_ONES = 2
SHARE = 0.12


def test_there_are_584_sequences() -> None:
    found = all_sequences()
    assert len(found) == len(set(found)) == 8 + 64 + 512


@pytest.mark.slow
def test_a_crash_at_any_point_of_a_sequence_loses_nothing_and_invents_nothing(
    fault_seed: int, scaled: Callable[[int], int]
) -> None:
    base = sequences.make_base()
    tally = Tally()
    chance = Random(fault_seed)
    long_ones = [item for item in all_sequences() if len(item) > 1]
    some = chance.sample(OPERATIONS, min(len(OPERATIONS), scaled(SHORT_ONES)))
    chosen: list[sequences.Sequence] = [(name,) for name in some]
    chosen += chance.sample(long_ones, min(len(long_ones), scaled(LONG_ONES)))
    for sequence in chosen:
        sequences.check(base, sequence, fault_seed, tally, SHARE)
    assert tally.sequences == len(chosen)
    assert tally.points > 25 * len(chosen)
    assert tally.opened > 30
