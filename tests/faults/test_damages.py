"""Damages of several bytes: none is taken for what was written."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from persistence.disk import format as fmt
from tests.faults import damages
from tests.faults.damages import KINDS, Damages


def test_no_damage_of_several_bytes_gives_a_frame(
    fault_seed: int, scaled: Callable[[int], int]
) -> None:
    damaged, count = Damages(fault_seed), scaled(20_000)
    damaged.run(count)
    assert len(damaged.done) == len(KINDS), "each kind happened"
    assert damaged.done.total() + damaged.unchanged == count


def test_a_decoder_that_checks_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = Damages(1)
    frames = {placed.offset: placed.frame for placed in damaged.history.frames}

    def trusting(log: bytearray, offset: int, salt: int) -> fmt.Frame:
        return frames[offset]

    monkeypatch.setattr(damages, "decode_frame", trusting)
    with pytest.raises(AssertionError, match="not noticed"):
        damaged.run(100)
