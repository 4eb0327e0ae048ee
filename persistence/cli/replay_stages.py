"""The two stages of a replay, as they are watched and reported: applying logs, and verifying."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

from persistence.cli.replay_model import (
    Numbers,
    ReplayOptions,
    ReplayProgress,
    ReplayReport,
    Stage,
    Watch,
)
from persistence.cli.replay_run import Applier, LogReader, Run, watched
from persistence.cli.replay_sessions import Cursor
from persistence.cli.replay_verify import Expected, Wrong, conclude
from persistence.clock import SystemClock

AnyApplier = TypeVar("AnyApplier", bound=Applier)


class Stages(ABC, Generic[AnyApplier]):
    """A replay, whoever applies its requests; a subclass says where its numbers come from.

    Args:
        applier: applies requests.
        options: what to replay.
        report: is filled in.
        watch: called several times a second; None: nobody watches.
    """

    def __init__(
        self,
        applier: AnyApplier,
        options: ReplayOptions,
        report: ReplayReport,
        watch: Watch | None,
    ) -> None:
        self._applier = applier
        self._options = options
        self._report = report
        self._watch = watch
        self._clock = SystemClock()

    @abstractmethod
    async def _numbers(self) -> Numbers:
        """Return the engine's numbers."""

    @abstractmethod
    async def _retried(self) -> int:
        """Return how many updates were done again because another worker's came first."""

    @abstractmethod
    async def _take_numbers(self) -> None:
        """Fill in the engine's numbers."""

    @abstractmethod
    async def _compare(self, expected: Expected, step: Callable[[], None]) -> dict[str, Wrong]:
        """Compare every session; return what is wrong by the place where, and fill in the rest.

        Args:
            expected: what there should be.
            step: to be called for each session.
        """

    async def run(self) -> None:
        """Replay."""
        options, report = self._options, self._report
        reader = LogReader(options.logs, options.limit)
        run = Run(self._applier, options.concurrency, report.resumed_at)
        started = self._clock.monotonic()

        async def replaying() -> ReplayProgress:
            return await self._progress("replay", reader.requests, run.applied, started)

        async with watched(replaying, self._watch):
            await run.run(reader)
        report.seconds = self._clock.monotonic() - started
        report.requests = reader.requests
        report.skipped_lines = reader.skipped_lines
        report.applied = run.applied
        report.requests_per_second = run.applied / report.seconds
        report.conflicts_retried = await self._retried()
        await self._take_numbers()

    async def verify(self, cursor: Cursor) -> None:
        """Compare every session with a fold over the logs."""
        options, report = self._options, self._report
        started = self._clock.monotonic()
        checked = 0

        def step() -> None:
            nonlocal checked
            checked += 1

        async def verifying() -> ReplayProgress:
            return await self._progress("verify", checked, checked, started)

        async with watched(verifying, self._watch):
            expected = await Expected.of(LogReader(options.logs, options.limit), cursor)
            wrong = await self._compare(expected, step)
        report.verify_seconds = self._clock.monotonic() - started
        report.memory_peak_bytes = (await self._numbers()).memory_peak_bytes
        conclude(report, wrong)

    async def _progress(
        self, stage: Stage, done: int, counted: int, started: float
    ) -> ReplayProgress:
        seconds = self._clock.monotonic() - started or 1.0
        return (await self._numbers()).progress(stage, done, counted / seconds)
