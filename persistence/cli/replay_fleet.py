"""A replay with several workers that share the sessions of the logs through Redis.

Each request goes to a random worker, the next one of a session only after the one before was
acknowledged, by whichever worker. A request is acknowledged once Redis has it: ``redis.on_outage``
is ``"fail"``, because what one worker went on with alone the others could not see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from persistence.cli.failure import CommandError
from persistence.cli.replay_model import (
    ReplayOptions,
    ReplayProgress,
    ReplayReport,
    Stage,
    Watch,
)
from persistence.cli.replay_parent import Fleet, WorkerProcess, fleet_of
from persistence.cli.replay_run import LogReader, Run, watched
from persistence.cli.replay_sessions import (
    CURSOR_ID,
    Cursor,
    Sections,
    config_of,
    cursor_of,
    sections_of,
)
from persistence.cli.replay_shared import (
    check_redis,
    choose_namespace,
    holds_something,
    verify_in_redis,
    with_redis,
)
from persistence.cli.replay_verify import Expected, Wrong, compare_patiently, conclude
from persistence.clock import SystemClock


async def replay_with_workers(options: ReplayOptions, watch: Watch | None) -> ReplayReport:
    """Replay with ``options.workers`` processes; see `replayer.replay`."""
    directories = [options.directory / f"worker-{n}" for n in range(1, options.workers + 1)]
    namespace = await _checked_namespace(options, directories[0])
    cursor = cursor_of(options, namespace)
    report = ReplayReport(
        memory_budget_bytes=options.memory_bytes, namespace=namespace, workers=options.workers
    )
    all_sections = [_sections(options, each, namespace) for each in directories]
    options.directory.mkdir(parents=True, exist_ok=True)
    async with fleet_of(all_sections) as fleet:
        where = f"{options.directory} or its namespace"
        report.resumed_at = await fleet.begin(cursor, where, resume=options.resume)
        stages = _Stages(fleet, options, report, watch)
        await stages.run()
        await stages.verify(cursor, namespace)
    return report


def _sections(options: ReplayOptions, directory: Path, namespace: str) -> Sections:
    return with_redis(sections_of(options, directory), options, namespace, "fail")


async def _checked_namespace(options: ReplayOptions, first: Path) -> str:
    """Return the namespace, once the settings, the directory and Redis have been looked at."""
    config_of(_sections(options, first, options.namespace or "replay"))
    cursor_of(options, None)
    where = options.directory
    if holds_something(where):
        if not options.resume:
            raise CommandError(
                f"{where} is not empty; go on with --resume or name another directory"
            )
        if not holds_something(first):
            raise CommandError(f"{where} holds no replay with --workers")
    namespace = await choose_namespace(options, first)
    await check_redis(config_of(_sections(options, first, namespace)).redis)
    return namespace


class _Stages:
    """The stages of a replay with several workers, as they are watched and reported."""

    def __init__(
        self, fleet: Fleet, options: ReplayOptions, report: ReplayReport, watch: Watch | None
    ) -> None:
        self._fleet = fleet
        self._options = options
        self._report = report
        self._watch = watch
        self._clock = SystemClock()

    async def run(self) -> None:
        """Replay."""
        options, report = self._options, self._report
        reader = LogReader(options.logs, options.limit)
        run = Run(self._fleet, options.concurrency, report.resumed_at)
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
        report.conflicts_retried = await self._fleet.retried()
        (await self._fleet.numbers()).report(report)

    async def verify(self, cursor: Cursor, namespace: str) -> None:
        """Compare every session, in Redis and as each worker sees it."""
        options, report = self._options, self._report
        started = self._clock.monotonic()
        checked = 0

        def step() -> None:
            nonlocal checked
            checked += 1

        async def verifying() -> ReplayProgress:
            return await self._progress("verify", checked, checked, started)

        wrong: dict[str, Wrong] = {}
        async with watched(verifying, self._watch):
            expected = await Expected.of(LogReader(options.logs, options.limit), cursor)
            wrong[" in Redis"], report.redis_sessions = await verify_in_redis(
                options, namespace, expected, step
            )
            for worker in self._fleet.workers:
                place = f" in worker {worker.number}"
                wrong[place] = await self._compare(worker, expected, step)
        report.sessions = report.redis_sessions
        report.verify_seconds = self._clock.monotonic() - started
        report.memory_peak_bytes = (await self._fleet.numbers()).memory_peak_bytes
        conclude(report, wrong)

    async def _compare(
        self, worker: WorkerProcess, expected: Expected, step: Callable[[], None]
    ) -> Wrong:
        """Compare what one worker sees: a message's delay after the others at the latest."""

        async def read(sid: str) -> Mapping[str, Any] | None:
            data: Mapping[str, Any] | None = await worker.ask("get", sid)
            return data

        ids = expected.ids() | {CURSOR_ID}
        return await compare_patiently(expected, ids, read, step, self._options.patience_seconds)

    async def _progress(
        self, stage: Stage, done: int, counted: int, started: float
    ) -> ReplayProgress:
        seconds = self._clock.monotonic() - started or 1.0
        return (await self._fleet.numbers()).progress(stage, done, counted / seconds)
