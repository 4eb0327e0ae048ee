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
from persistence.cli.replay_model import Numbers, ReplayOptions, ReplayReport, Watch
from persistence.cli.replay_parent import Fleet, WorkerProcess, fleet_of
from persistence.cli.replay_sessions import (
    CURSOR_ID,
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
from persistence.cli.replay_stages import Stages
from persistence.cli.replay_verify import Expected, Wrong, compare_patiently


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
        stages = _Several(fleet, options, report, watch)
        await stages.run()
        await stages.verify(cursor)
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


class _Several(Stages[Fleet]):
    """A replay with several workers."""

    async def _numbers(self) -> Numbers:
        return await self._applier.numbers()

    async def _retried(self) -> int:
        return await self._applier.retried()

    async def _take_numbers(self) -> None:
        (await self._numbers()).report(self._report)

    async def _compare(self, expected: Expected, step: Callable[[], None]) -> dict[str, Wrong]:
        """Compare every session, in Redis and as each worker sees it."""
        report = self._report
        assert report.namespace is not None, "several workers share one"
        wrong: dict[str, Wrong] = {}
        wrong[" in Redis"], report.redis_sessions = await verify_in_redis(
            self._options, report.namespace, expected, step
        )
        for worker in self._applier.workers:
            place = f" in worker {worker.number}"
            wrong[place] = await self._compare_with(worker, expected, step)
        report.sessions = report.redis_sessions
        return wrong

    async def _compare_with(
        self, worker: WorkerProcess, expected: Expected, step: Callable[[], None]
    ) -> Wrong:
        """Compare what one worker sees: a message's delay after the others at the latest."""

        async def read(sid: str) -> Mapping[str, Any] | None:
            data: Mapping[str, Any] | None = await worker.ask("get", sid)
            return data

        ids = expected.ids() | {CURSOR_ID}
        return await compare_patiently(expected, ids, read, step, self._options.patience_seconds)
