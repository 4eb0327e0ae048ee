"""Replays access logs as a session workload, exactly once per request, and verifies the result.

See `replay_sessions` for what exactly once rests on, and `replay_fleet` for several workers.
"""

from __future__ import annotations

from collections.abc import Callable

from persistence import StateManager
from persistence.cli.replay_fleet import replay_with_workers
from persistence.cli.replay_model import (
    Numbers,
    ReplayOptions,
    ReplayProgress,
    ReplayReport,
    Watch,
)
from persistence.cli.replay_run import LogReader, Watermark
from persistence.cli.replay_sessions import (
    CURSOR_ID,
    ManagerApplier,
    begin,
    config_of,
    cursor_of,
    sections_of,
)
from persistence.cli.replay_shared import (
    check_options,
    check_redis,
    choose_namespace,
    verify_in_redis,
    with_redis,
)
from persistence.cli.replay_stages import Stages
from persistence.cli.replay_verify import Expected, Wrong, verify_here
from persistence.config import StateConfig

__all__ = [
    "CURSOR_ID",
    "LogReader",
    "ReplayOptions",
    "ReplayProgress",
    "ReplayReport",
    "Watermark",
    "replay",
]


async def replay(options: ReplayOptions, watch: Watch | None = None) -> ReplayReport:
    """Replay the logs, read every session again and compare it with a fold over the same logs.

    Args:
        options: what to replay, and on what.
        watch: called several times a second while the replay runs.

    Raises:
        CommandError: a log cannot be read, the directory's sessions are of something else, or a
            worker died.
        PersistenceError: the engine or Redis refuses the configuration or the directory, or fails.
    """
    check_options(options)
    if options.workers > 1:
        return await replay_with_workers(options, watch)
    return await _replay_here(options, watch)


async def _replay_here(options: ReplayOptions, watch: Watch | None) -> ReplayReport:
    """Replay in this process."""
    config, namespace = await _config(options)
    cursor = cursor_of(options, namespace)
    report = ReplayReport(memory_budget_bytes=options.memory_bytes, namespace=namespace)
    async with StateManager(config=config) as state:
        where = options.directory if namespace is None else f"{options.directory} or its namespace"
        report.resumed_at = await begin(state, cursor, where, resume=options.resume)
        single = _Single(state, options, report, watch)
        await single.run()
        await single.verify(cursor)
    return report


async def _config(options: ReplayOptions) -> tuple[StateConfig, str | None]:
    """Return the configuration and the namespace, once Redis is known to be there."""
    sections = sections_of(options, options.directory)
    if options.redis_url is None:
        return config_of(sections), None
    # With a name in place of the namespace first: a wrong setting is told before anything is done.
    namespace = options.namespace or "replay"
    config_of(with_redis(sections, options, namespace, "local"))
    namespace = await choose_namespace(options, options.directory)
    config = config_of(with_redis(sections, options, namespace, "local"))
    await check_redis(config.redis)
    return config, namespace


class _Single(Stages[ManagerApplier]):
    """A replay in this process."""

    def __init__(
        self,
        state: StateManager,
        options: ReplayOptions,
        report: ReplayReport,
        watch: Watch | None,
    ) -> None:
        super().__init__(ManagerApplier(state), options, report, watch)
        self._state = state

    async def _numbers(self) -> Numbers:
        return Numbers.of(await self._state.stats())

    async def _retried(self) -> int:
        return self._applier.retried

    async def _take_numbers(self) -> None:
        """Fill in the engine's numbers, without the cursor, which no client knows of."""
        report = self._report
        numbers = await self._numbers()
        numbers.report(report)
        report.sessions = numbers.sessions - 1
        # The cursor was written last, so it is in memory unless the budget holds not even that.
        report.in_memory = max(0, numbers.in_memory - 1)
        report.on_disk = report.sessions - report.in_memory

    async def _compare(self, expected: Expected, step: Callable[[], None]) -> dict[str, Wrong]:
        """Compare every session, here and in Redis."""
        report = self._report
        wrong = {"": await verify_here(self._state, expected, step)}
        if report.namespace is not None:
            await self._take_numbers()  # those that were in Redis only have come here
            wrong[" in Redis"], report.redis_sessions = await verify_in_redis(
                self._options, report.namespace, expected, step
            )
        return wrong
