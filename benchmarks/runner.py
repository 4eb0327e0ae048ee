"""Runs workloads: every contender in its process, repetitions interleaved (A B A B)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.bars import Verdict, judge, values
from benchmarks.catalogue import Workload
from benchmarks.contender import Contender, Metrics, Stopwatch, median
from benchmarks.isolation import Failure, Isolated, Reply
from benchmarks.scratch import Scratch
from benchmarks.sizes import Sizes

Progress = Callable[[str], None]


@dataclass
class Row:
    """One contender's results in one workload: one `Metrics` per recorded repetition."""

    contender: str
    durability: str
    samples: list[Metrics] = field(default_factory=list)
    failure: Failure | None = None

    def values(self, metric: str) -> list[float]:
        """Return what was measured of `metric`, in the order of the repetitions."""
        return values(self.samples, metric)

    def medians(self) -> Metrics:
        """Return the median of every metric; {} when there is no sample."""
        if not self.samples:
            return {}
        return {metric: median(self.values(metric)) for metric in self.samples[0]}


@dataclass(frozen=True)
class Result:
    """A workload's rows, its bars judged, and how long all of it took."""

    workload: Workload
    rows: list[Row]
    verdicts: list[Verdict]
    seconds: float

    @property
    def broken(self) -> bool:
        """Whether a contender crashed or answered wrongly (one that is missing is no fault)."""
        return any(row.failure and row.failure.kind != "unavailable" for row in self.rows)

    @property
    def missed(self) -> bool:
        """Whether a bar was judged and not reached."""
        return any(verdict.passed is False for verdict in self.verdicts)


def run(workload: Workload, sizes: Sizes, scratch: Scratch, progress: Progress) -> Result:
    """Run one workload at `sizes` in directories of `scratch`; tell `progress` what happens."""
    contenders = workload.contenders(sizes)
    rows = [Row(each.name, each.durability) for each in contenders]
    with Stopwatch() as watch, scratch.directory(workload.name) as directory:
        failure = _build(workload, sizes, directory, progress)
        if failure is not None:
            for row in rows:
                row.failure = failure
        else:
            lanes = [
                _lane(workload, contender, row, directory / str(number))
                for number, (contender, row) in enumerate(zip(contenders, rows, strict=True))
            ]
            _interleave(workload, sizes, lanes, progress)
    samples = {row.contender: row.samples for row in rows}
    units = {metric.name: metric.unit for metric in workload.metrics}
    verdicts = [judge(bar, samples, units[bar.metric]) for bar in workload.bars]
    return Result(workload, rows, verdicts, watch.seconds)


def _build(workload: Workload, sizes: Sizes, directory: Path, progress: Progress) -> Failure | None:
    if workload.build is None:
        return None
    progress(f"{workload.name}: building the directory that the rows share")
    built = Row("build", "")
    lane = FreshLane(workload.build(sizes), built, directory, shared=True)
    lane.repeat()
    return built.failure


class Lane:
    """A contender and its row: opens once, measures at each turn, closes once."""

    def __init__(self, contender: Contender, row: Row, directory: Path) -> None:
        self.contender = contender
        self.row = row
        self._directory = directory
        self._isolated: Isolated | None = None

    def open(self) -> None:
        """Prepare, and measure once without recording: caches, allocators and files settle."""
        self._isolated = Isolated(self.contender, self._directory)
        self._accept(self._isolated.open())
        if self.row.failure is None:
            self._accept(self._isolated.measure())

    def repeat(self) -> None:
        """Measure one repetition and record it."""
        assert self._isolated is not None, "open() comes first"
        if self.row.failure is None:
            self._record(self._isolated.measure())

    def close(self) -> None:
        """End the contender's process."""
        if self._isolated is not None:
            self._accept(self._isolated.close())
            self._isolated = None

    def _record(self, reply: Reply) -> None:
        if self._accept(reply):
            assert not isinstance(reply, Failure)
            self.row.samples.append(reply)

    def _accept(self, reply: Reply) -> bool:
        if isinstance(reply, Failure):
            self.row.failure = self.row.failure or reply
            return False
        return True


class FreshLane(Lane):
    """A contender that takes a new process for each repetition, and an emptied directory.

    A directory that the rows share (`shared`) stays as the one before left it.
    """

    def __init__(
        self, contender: Contender, row: Row, directory: Path, *, shared: bool = False
    ) -> None:
        super().__init__(contender, row, directory)
        self._shared = shared

    def open(self) -> None:
        """Nothing is kept open between repetitions, so there is nothing to settle."""

    def repeat(self) -> None:
        """Open, measure, record and close."""
        if self.row.failure is not None:
            return
        self._isolated = Isolated(self.contender, self._directory)
        if self._accept(self._isolated.open()):
            self._record(self._isolated.measure())
        self.close()
        if not self._shared:
            shutil.rmtree(self._directory)
            self._directory.mkdir()


def _lane(workload: Workload, contender: Contender, row: Row, own: Path) -> Lane:
    """Return the lane of `contender`; its directory is `own`, or the one that the rows share."""
    if workload.build is not None:
        assert contender.fresh_process, "one process at a time may have the shared directory"
        return FreshLane(contender, row, own.parent, shared=True)
    own.mkdir()
    return (FreshLane if contender.fresh_process else Lane)(contender, row, own)


def _interleave(workload: Workload, sizes: Sizes, lanes: list[Lane], progress: Progress) -> None:
    """Let the lanes take turns, so that what disturbs the machine disturbs all of them."""
    try:
        for lane in lanes:
            progress(f"{workload.name}: preparing {lane.row.contender}")
            lane.open()
        repetitions = workload.repetitions(sizes)
        for repetition in range(repetitions):
            progress(f"{workload.name}: repetition {repetition + 1} of {repetitions}")
            for lane in lanes:
                lane.repeat()
    finally:
        for lane in lanes:
            lane.close()
