"""What the command line says about the fault suites."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

from tests.support import patching


@pytest.fixture
def fault_seed(request: pytest.FixtureRequest) -> int:
    """The seed of what is left to chance."""
    return int(request.config.getoption("--fault-seed"))


@pytest.fixture
def scaled(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """Return how many there are to be, given the number of the short form."""
    scale = float(request.config.getoption("--fault-scale"))
    return lambda count: max(1, round(count * scale))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of warnings about faults that were meant say nothing."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def _patches_of_small_records() -> Iterator[None]:
    """Records of these suites are small; most updates shall write a patch all the same."""
    with patching(128, 0.7):
        yield
