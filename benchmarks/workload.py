"""What a workload is: its name, who takes part, and which bars have to be reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.bars import Bar, Kind
from benchmarks.contender import ENGINE, RATE, Contender, Metric
from benchmarks.sizes import Sizes

SESSION_RSS_BYTES = 1000
"""Roughly what one session takes of a memory budget."""

Contenders = Callable[[Sizes], Sequence[Contender]]


@dataclass(frozen=True)
class Workload:
    """A named workload.

    Attributes:
        metrics: what is measured; the first one is the one that matters.
        contenders: who takes part, in the order of the rows; called with the sizes of the run.
        bars: what has to be reached.
        build: fills the directory that all contenders share; None gives each its own.
        repetitions: how often each contender measures, the unrecorded first time not counted.
        definitions: the docstring of the module that defines it, with its line in a table.
        size_unit: what the sizes of its rows count, where they are a growth curve.
        sized_bars: those of `bars` that depend on the sizes of the run.
        observed: False: no lag is sampled beside it (it is the lag that it measures).
        sizes_chosen: whether it takes part in a run of these sizes when no name is given.
    """

    name: str
    metrics: tuple[Metric, ...]
    contenders: Contenders
    bars: tuple[Bar, ...] = ()
    build: Callable[[Sizes], Contender] | None = None
    repetitions: Callable[[Sizes], int] = lambda sizes: sizes.repetitions
    definitions: str | None = None
    size_unit: str = ""
    sized_bars: Callable[[Sizes], tuple[Bar, ...]] = lambda sizes: ()
    observed: bool = True
    sizes_chosen: Callable[[Sizes], bool] = lambda sizes: True

    @property
    def definition(self) -> str:
        """The workload's line in the table of its module."""
        lines = (line.split(maxsplit=1) for line in (self.definitions or "").splitlines())
        return next((words[1] for words in lines if words[:1] == [self.name]), "")


def at_least(times: float, against: str, ours: str = ENGINE) -> Bar:
    """Return the bar that `ours` does so many times as much per second as `against`."""
    return Bar(RATE.name, Kind.RATIO_AT_LEAST, times, against, ours=ours)
