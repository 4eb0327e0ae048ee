"""That the mutants fit the source; ``python -m tests.faults mutants`` lets the tests kill them."""

from __future__ import annotations

import pytest

from tests.faults.mutants import MUTANTS, ROOT, Mutant, NotOnce, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_exactly_one_place(mutant: Mutant) -> None:
    source = (ROOT / mutant.path).read_text()
    assert mutated(source, mutant) != source
    assert all((ROOT / path.partition("::")[0]).exists() for path in mutant.tests)


def test_there_are_enough_and_each_has_a_name() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20


def test_a_mutant_that_does_not_fit_any_more_is_no_mutant() -> None:
    with pytest.raises(NotOnce, match="0 times"):
        mutated("nothing of that", MUTANTS[0])
    with pytest.raises(NotOnce, match="2 times"):
        mutated(MUTANTS[0].old * 2, MUTANTS[0])
