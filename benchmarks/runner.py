"""Runs workloads: every contender in its process, repetitions interleaved (A B A B)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.bars import Verdict, judge, values
from benchmarks.contender import Contender, Metrics, Stopwatch, median
from benchmarks.isolation import Command, Failure, Host, Isolated, Reply
from benchmarks.lag import Observed, lag_metrics
from benchmarks.scratch import Scratch
from benchmarks.sizes import FEWEST_REPETITIONS, Sizes
from benchmarks.workload import Workload

Progress = Callable[[str], None]
Hosts = Callable[[Contender, Path], Host]

_OPENED_BESIDE = 2
_MOST_LAG_MS = 5
_JUDGED_SAMPLES = 1000  # one in a thousand needs at least so many


@dataclass
class Row:
    """One contender's results in one workload: one `Metrics` per recorded repetition.

    `observed` is the lag of its event loop, sampled after the repetitions, or during the last one.
    """

    by: Contender
    samples: list[Metrics] = field(default_factory=list)
    observed: Observed | None = None
    failure: Failure | None = None

    @property
    def contender(self) -> str:
        """Its name."""
        return self.by.name

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


@dataclass(frozen=True)
class Run:
    """What the runs of all workloads have in common.

    Attributes:
        scratch: where their directories are made.
        progress: is told what happens.
        hosts: where each contender lives; `Isolated` is the only one that gives numbers.
    """

    sizes: Sizes
    scratch: Scratch
    progress: Progress
    hosts: Hosts = Isolated


def run(
    workload: Workload, sizes: Sizes, scratch: Scratch, progress: Progress, hosts: Hosts = Isolated
) -> Result:
    """Run one workload at `sizes` in directories of `scratch`; tell `progress` what happens."""
    return _run(workload, Run(sizes, scratch, progress, hosts))


def _run(workload: Workload, common: Run) -> Result:
    contenders = workload.contenders(common.sizes)
    rows = [Row(each) for each in contenders]
    with Stopwatch() as watch, common.scratch.directory(workload.name) as directory:
        failure = _build(workload, common, directory)
        if failure is not None:
            for row in rows:
                row.failure = failure
        else:
            lanes = [
                _lane(workload, common, row, directory / str(number))
                for number, row in enumerate(rows)
            ]
            _interleave(workload, common, lanes)
    samples = {row.contender: row.samples for row in rows}
    units = {metric.name: metric.unit for metric in workload.metrics}
    bars = (*workload.bars, *workload.sized_bars(common.sizes))
    verdicts = [judge(bar, samples, units[bar.metric]) for bar in bars]
    verdicts += [_lag_verdict(row) for row in rows if row.by.ours and _is_judged(row)]
    return Result(workload, rows, verdicts, watch.seconds)


def _is_judged(row: Row) -> bool:
    return row.observed is not None and len(row.observed.lags) >= _JUDGED_SAMPLES


def _lag_verdict(row: Row) -> Verdict:
    """Judge the event loop of a row of the engine."""
    assert row.observed is not None, "_is_judged says so"
    late_ms = lag_metrics(row.observed.lags)["p99.9"]
    claim = f"event loop of {row.contender} late by p99.9 ≤ {_MOST_LAG_MS} ms"
    measured = f"{late_ms:.3g} ms ({len(row.observed.lags):,} samples)"
    return Verdict(claim, measured, late_ms <= _MOST_LAG_MS)


def _build(workload: Workload, common: Run, directory: Path) -> Failure | None:
    if workload.build is None:
        return None
    common.progress(f"{workload.name}: building the directory that the rows share")
    built = Row(workload.build(common.sizes))
    FreshLane(built, directory, common.hosts, shared=True).repeat()
    return built.failure


class Lane:
    """A row and its contender: opens once, measures at each turn, closes once."""

    def __init__(self, row: Row, directory: Path, hosts: Hosts) -> None:
        self.row = row
        self._directory = directory
        self._hosts = hosts
        self._host: Host | None = None

    def open(self) -> None:
        """Prepare, and measure once without recording: caches, allocators and files settle."""
        self._host = self._hosts(self.row.by, self._directory)
        self._ask("open")
        self._ask("measure")

    def repeat(self) -> None:
        """Measure one repetition and record it."""
        reply = self._ask("measure")
        if isinstance(reply, dict):
            self.row.samples.append(reply)

    def observe(self, sample_count: int, limit_seconds: float) -> None:
        """Sample the lag of the event loop while the contender works."""
        reply = self._ask("observe", sample_count, limit_seconds)
        if isinstance(reply, Observed):
            self.row.observed = reply

    def close(self) -> None:
        """End the contender's process."""
        if self._host is not None:
            self._note(self._host.ask(Command("close")))
            self._host = None

    def _ask(self, name: str, sample_count: int = 0, limit_seconds: float = 0.0) -> Reply | None:
        """Tell the contender something, unless it has failed before."""
        assert self._host is not None, "open() comes first"
        if self.row.failure is not None:
            return None
        return self._note(self._host.ask(Command(name, sample_count, limit_seconds)))

    def _note(self, reply: Reply) -> Reply | None:
        if isinstance(reply, Failure):
            self.row.failure = self.row.failure or reply
            if reply.kind == "wrong":
                self.row.samples.clear()  # how fast it was means nothing
            return None
        return reply


class FreshLane(Lane):
    """A contender that takes a new process for each repetition, and an emptied directory.

    A directory that the rows share (`shared`) stays as the one before left it.
    """

    def __init__(self, row: Row, directory: Path, hosts: Hosts, *, shared: bool = False) -> None:
        super().__init__(row, directory, hosts)
        self._shared = shared

    def open(self) -> None:
        """Nothing is kept open between repetitions, so there is nothing to settle."""

    def repeat(self) -> None:
        """Open, measure, record and close."""
        self._anew(super().repeat)

    def observe(self, sample_count: int, limit_seconds: float) -> None:
        """Open, measure while the event loop is sampled, record and close.

        This is the last repetition: what it measures once may take minutes.
        """
        self._anew(self._observe_all)

    def _observe_all(self) -> None:
        # From the start to the end of what is measured, however long it takes.
        super().observe(2**62, float("inf"))
        if self.row.observed is not None and self.row.observed.measured:
            self.row.samples.append(self.row.observed.measured)

    def _anew(self, act: Callable[[], None]) -> None:
        if self.row.failure is not None:
            return
        self._host = self._hosts(self.row.by, self._directory)
        self._ask("open")
        act()
        self.close()
        if not self._shared:
            shutil.rmtree(self._directory)
            self._directory.mkdir()


def _lane(workload: Workload, common: Run, row: Row, own: Path) -> Lane:
    """Return the lane of `row`; its directory is `own`, or the one that the rows share."""
    if workload.build is not None:
        assert row.by.fresh_process, "one process at a time may have the shared directory"
        return FreshLane(row, own.parent, common.hosts, shared=True)
    own.mkdir()
    return (FreshLane if row.by.fresh_process else Lane)(row, own, common.hosts)


def _open(lanes: list[Lane], *, is_isolated: bool) -> None:
    """Prepare all lanes, some beside each other if they can be: nothing of it is a figure."""
    if not is_isolated:  # they live in this very thread
        for lane in lanes:
            lane.open()
        return
    with ThreadPoolExecutor(_OPENED_BESIDE) as openers:
        try:
            for opened in [openers.submit(lane.open) for lane in lanes]:
                opened.result()
        except BaseException:
            openers.shutdown(cancel_futures=True)  # interrupted: the others need not begin
            raise


def _interleave(workload: Workload, common: Run, lanes: list[Lane]) -> None:
    """Let the lanes take turns, so that what disturbs the machine disturbs all of them."""
    sizes, progress = common.sizes, common.progress
    try:
        progress(f"{workload.name}: preparing {len(lanes)} contenders")
        _open(lanes, is_isolated=common.hosts is Isolated)
        repetitions = workload.repetitions(sizes)
        if workload.observed and all(isinstance(lane, FreshLane) for lane in lanes):
            repetitions -= 1  # the one that is observed
        began = time.perf_counter()
        for repetition in range(repetitions):
            is_enough = time.perf_counter() - began > sizes.repeated_seconds
            if is_enough and repetition >= FEWEST_REPETITIONS:
                break
            progress(f"{workload.name}: repetition {repetition + 1} of {repetitions}")
            for lane in lanes:
                lane.repeat()
        for lane in lanes if workload.observed else ():
            progress(f"{workload.name}: event loop of {lane.row.contender}")
            if lane.row.by.ours:
                lane.observe(sizes.our_lag_samples, sizes.our_lag_seconds)
            else:
                lane.observe(sizes.their_lag_samples, sizes.their_lag_seconds)
    finally:
        for lane in lanes:
            lane.close()
