"""Replays access logs as a session workload, exactly once per request, and verifies the result.

Exactly once, although the process may be killed at any moment, rests on two facts kept in the
engine itself:

1. Each session's ``position`` is the index of the last request applied to it, written by the very
   commit that applied it. Requests of one session are applied in the order of the log (one worker
   owns the session), so whatever is at or below that position has been applied, and nothing else.
2. The cursor session holds a low watermark: every request below it has been acknowledged. It only
   saves work: a resumed replay starts there and skips, session by session, what fact 1 shows to
   be done.

The watermark is saved after the acknowledgements that it speaks of, so in every ``fsync`` mode the
log on disk never holds a watermark without the updates below it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from persistence import (
    DiskConfig,
    MemoryConfig,
    SessionConfig,
    SessionMetadata,
    ShutdownConfig,
    StateConfig,
    StateManager,
)
from persistence.cli.accesslog import Request, parse_line, read_lines
from persistence.cli.failure import CommandError
from persistence.cli.fold import Fold, differences
from persistence.cli.workload import (
    NOT_STARTED,
    TTL_SECONDS,
    apply_request,
    clean,
    session_id,
)
from persistence.clock import SystemClock
from persistence.errors import printable

_Item = TypeVar("_Item")

CURSOR_ID: Final = "replay-cursor"
"""Id of the session that holds the watermark. No client's: theirs contain a space."""

_CURSOR_EVERY_REQUESTS: Final = 256
_QUEUE_REQUESTS: Final = 1024  # a burst of one client must not hold up the others behind it
_WINDOW_REQUESTS: Final = 8192
_SLICE_ITEMS: Final = 64
_PROGRESS_SECONDS: Final = 0.25
_LISTED_DIFFERENCES: Final = 20


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """What to replay, and on what.

    Attributes:
        logs: access logs, replayed one behind the other.
        directory: the engine's directory.
        memory_bytes: budget of the memory tier.
        policy: the memory tier's eviction policy.
        segment_bytes: size of the log's segments.
        fsync: "always", "interval" or "never".
        resume: go on with the replay that `directory` holds.
        limit: stop after so many requests; None: all of them.
        concurrency: requests in flight at most.
    """

    logs: tuple[Path, ...]
    directory: Path
    memory_bytes: int = 256 * 1024
    policy: str = "lru"
    segment_bytes: int = 2**20
    fsync: str = "always"
    resume: bool = False
    limit: int | None = None
    concurrency: int = 64


@dataclass(slots=True)
class ReplayReport:
    """The outcome of a replay; its fields are those of ``--json``.

    Attributes:
        requests: requests in the log, all of them applied by now.
        applied: those that this run applied; the rest had been, before a resume.
        resumed_at: the watermark that this run started from; 0 for a fresh replay.
        sessions: sessions of the replay, in memory or on disk.
        seconds: time of the replay, without opening and verification.
        verified: every session was read again and equals the fold over the log.
        differences: the first of them, in words.
    """

    requests: int = 0
    skipped_lines: int = 0
    applied: int = 0
    resumed_at: int = 0
    sessions: int = 0
    in_memory: int = 0
    on_disk: int = 0
    spilled: int = 0
    restored: int = 0
    memory_peak_bytes: int = 0
    memory_budget_bytes: int = 0
    segments: int = 0
    compactions: int = 0
    disk_bytes: int = 0
    seconds: float = 0.0
    requests_per_second: float = 0.0
    verify_seconds: float = 0.0
    verified: bool = False
    differing_sessions: int = 0
    differences: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ReplayProgress:
    """Where a running replay stands."""

    stage: Literal["replay", "verify"]
    done: int
    per_second: float
    in_memory: int
    on_disk: int
    spilled: int
    restored: int


class LogReader:
    """The requests of some logs, in order, and the count of lines that are none.

    Attributes:
        requests: requests read so far.
        skipped_lines: lines so far that are no request; blank ones count.
    """

    def __init__(self, logs: tuple[Path, ...], limit: int | None) -> None:
        self._logs = logs
        self._limit = limit
        self.requests = 0
        self.skipped_lines = 0

    def __iter__(self) -> Iterator[Request]:
        for log in self._logs:
            for line in read_lines(log):
                if self.requests == self._limit:
                    return
                request = None if line is None else parse_line(line)
                if request is None:
                    self.skipped_lines += 1
                else:
                    self.requests += 1
                    yield request


class Watermark:
    """The lowest position that is not known to be applied, while positions finish in any order."""

    def __init__(self, low: int) -> None:
        self.low = low
        self._finished: set[int] = set()
        self._moved = asyncio.Event()

    def finish(self, position: int) -> None:
        """Note that the request at `position` is applied and acknowledged."""
        self._finished.add(position)
        before = self.low
        while self.low in self._finished:
            self._finished.remove(self.low)
            self.low += 1
        if self.low != before:
            self._moved.set()

    async def within(self, position: int, window: int) -> None:
        """Wait until `position` is less than `window` above the mark: bounds what is noted."""
        while position - self.low >= window:
            self._moved.clear()
            await self._moved.wait()


async def _in_slices(items: Iterable[_Item]) -> AsyncIterator[_Item]:
    """Yield `items`, letting everything else on the event loop run now and then."""
    for number, item in enumerate(items):
        if number % _SLICE_ITEMS == 0:
            await asyncio.sleep(0)
        yield item


class _Replay:
    """One run: the reader deals requests to workers, each of which owns some of the sessions."""

    def __init__(self, state: StateManager, concurrency: int, start: int) -> None:
        self._state = state
        self._start = start
        self._saved = start
        self._watermark = Watermark(start)
        self._queues: list[asyncio.Queue[tuple[int, str, Request] | None]] = [
            asyncio.Queue(_QUEUE_REQUESTS) for _ in range(concurrency)
        ]
        self.applied = 0

    async def run(self, reader: LogReader) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for queue in self._queues:
                    group.create_task(self._work(queue))
                await self._deal(reader)
        except ExceptionGroup as group_error:
            # Whatever went wrong (a full disk, say) mostly hits all workers at once.
            raise group_error.exceptions[0] from None
        await self._save_cursor()

    async def _deal(self, reader: LogReader) -> None:
        async for request in _in_slices(reader):
            position = reader.requests - 1
            if position < self._start:
                continue
            sid = session_id(request)
            await self._watermark.within(position, _WINDOW_REQUESTS)
            await self._queues[hash(sid) % len(self._queues)].put((position, sid, request))
        for queue in self._queues:
            await queue.put(None)

    async def _work(self, queue: asyncio.Queue[tuple[int, str, Request] | None]) -> None:
        while (item := await queue.get()) is not None:
            position, sid, request = item
            await self._apply(position, sid, request)
            self._watermark.finish(position)
            if self._watermark.low - self._saved >= _CURSOR_EVERY_REQUESTS:
                await self._save_cursor()

    async def _apply(self, position: int, sid: str, request: Request) -> None:
        session = await self._state.get_or_create_session(
            sid,
            ttl_seconds=TTL_SECONDS,
            metadata=SessionMetadata(
                client_ip=clean(request.client),
                user_agent=None if request.agent is None else clean(request.agent),
                source="replay",
            ),
        )
        if position <= session.get("position", NOT_STARTED):
            return
        change = partial(apply_request, position=position, request=request)
        await self._state.update_session(sid, change)
        self.applied += 1

    async def _save_cursor(self) -> None:
        low = self._saved = self._watermark.low

        def advance(data: Any) -> None:
            # Two workers may save at once, in either order: the mark never goes back.
            data["watermark"] = max(data["watermark"], low)

        await self._state.update_session(CURSOR_ID, advance)


def _identity(options: ReplayOptions) -> dict[str, Any]:
    """Return what tells this input from another one, as it is kept in the cursor."""
    try:
        logs = [[clean(log.name), log.stat().st_size] for log in options.logs]
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from error
    return {"logs": logs, "limit": options.limit}


def _described(identity: Any) -> str:
    try:
        logs = ", ".join(f"{name} ({size} bytes)" for name, size in identity["logs"])
        limit = identity["limit"]
    except (TypeError, KeyError, ValueError):
        return "something else"
    return logs if limit is None else f"{logs}, limit {limit}"


async def _start(state: StateManager, options: ReplayOptions, identity: dict[str, Any]) -> int:
    """Return the position to start at: the cursor's watermark, or 0 with a new cursor.

    Raises:
        CommandError: the directory's sessions are not those that this replay may go on with.
    """
    where = options.directory
    cursor = await state.get_session(CURSOR_ID)
    if cursor is None:
        async for _ in state.iter_sessions():
            raise CommandError(f"{where} holds sessions of something else; name another directory")
        await state.create_session(
            session_id=CURSOR_ID,
            ttl_seconds=TTL_SECONDS,
            data={"input": identity, "watermark": 0},
        )
        return 0
    if not options.resume:
        raise CommandError(
            f"{where} holds a replay already; go on with --resume or name another directory"
        )
    if cursor.get("input") != identity:
        raise CommandError(
            f"{where} holds a replay of {_described(cursor.get('input'))}, "
            f"not of {_described(identity)}; --resume needs the same log"
        )
    watermark: int = cursor["watermark"]
    return watermark


def _config(options: ReplayOptions) -> StateConfig:
    """Return the engine's configuration, which checks what the command line was given."""
    return StateConfig(
        session=SessionConfig(ttl_seconds=TTL_SECONDS),
        memory=MemoryConfig.model_validate(
            {"max_bytes": options.memory_bytes, "policy": options.policy}
        ),
        disk=DiskConfig.model_validate(
            {
                "path": options.directory,
                "fsync": options.fsync,
                "segment_bytes": options.segment_bytes,
            }
        ),
        shutdown=ShutdownConfig(checkpoint=False),
    )


@asynccontextmanager
async def _watched(
    report: Callable[[], Any], watch: Callable[[Any], None] | None
) -> AsyncIterator[None]:
    """Hand `report()` to `watch` now and then while the context lasts."""
    if watch is None:
        yield
        return

    async def tick() -> None:
        while True:
            watch(await report())
            await asyncio.sleep(_PROGRESS_SECONDS)

    ticker = asyncio.create_task(tick())
    try:
        yield
        watch(await report())
    finally:
        ticker.cancel()
        # Gathered: suppressing its cancellation here would swallow one of our own as well.
        await asyncio.gather(ticker, return_exceptions=True)


async def _progress(
    state: StateManager, stage: Literal["replay", "verify"], done: int, per_second: float
) -> ReplayProgress:
    stats = await state.stats()
    return ReplayProgress(
        stage, done, per_second, stats.in_memory, stats.on_disk, stats.spilled, stats.restored
    )


async def _take_stats(state: StateManager, report: ReplayReport) -> None:
    """Fill in the engine's numbers, without the cursor, which no client knows of."""
    stats = await state.stats()
    report.sessions = stats.sessions - 1
    # The cursor was written last, so it is in memory unless the budget holds not even that.
    report.in_memory = max(0, stats.in_memory - 1)
    report.on_disk = report.sessions - report.in_memory
    report.spilled = stats.spilled
    report.restored = stats.restored
    report.segments = stats.disk.segments
    report.compactions = stats.disk.compactions
    report.disk_bytes = stats.disk.total_bytes


async def _verify(
    state: StateManager, reader: LogReader, step: Callable[[], None]
) -> dict[str, list[str]]:
    """Read every session again and return the differences from the log, by session id."""
    expected = Fold()
    async for request in _in_slices(reader):
        expected.add(request)
    listed = {sid async for sid in state.iter_sessions() if sid != CURSOR_ID}
    wrong: dict[str, list[str]] = {}
    async for sid in _in_slices(sorted(expected.ids() | listed)):
        session = await state.get_session(sid)
        wanted = expected.data(sid)
        found = list(differences(wanted, session.data if session else None))
        if wanted is not None and session is not None and sid not in listed:
            found.append("is not listed")
        if found:
            wrong[sid] = found
        step()
    return wrong


async def replay(
    options: ReplayOptions, watch: Callable[[ReplayProgress], None] | None = None
) -> ReplayReport:
    """Replay the logs, read every session again and compare it with a fold over the same logs.

    Args:
        options: what to replay, and on what.
        watch: called several times a second while the replay runs.

    Raises:
        CommandError: a log cannot be read, or the directory's sessions are of something else.
        PersistenceError: the engine refuses the configuration or the directory, or fails.
    """
    clock = SystemClock()
    identity = _identity(options)
    reader = LogReader(options.logs, options.limit)
    report = ReplayReport(memory_budget_bytes=options.memory_bytes)
    async with StateManager(config=_config(options)) as state:
        report.resumed_at = await _start(state, options, identity)
        run = _Replay(state, options.concurrency, report.resumed_at)
        started = clock.monotonic()

        async def replaying() -> ReplayProgress:
            seconds = clock.monotonic() - started or 1.0
            return await _progress(state, "replay", reader.requests, run.applied / seconds)

        async with _watched(replaying, watch):
            await run.run(reader)
        report.seconds = clock.monotonic() - started
        report.requests = reader.requests
        report.skipped_lines = reader.skipped_lines
        report.applied = run.applied
        report.requests_per_second = run.applied / report.seconds
        await _take_stats(state, report)

        checking = clock.monotonic()
        checked = 0

        def step() -> None:
            nonlocal checked
            checked += 1

        async def verifying() -> ReplayProgress:
            seconds = clock.monotonic() - checking or 1.0
            return await _progress(state, "verify", checked, checked / seconds)

        async with _watched(verifying, watch):
            wrong = await _verify(state, LogReader(options.logs, options.limit), step)
        report.verify_seconds = clock.monotonic() - checking
        report.memory_peak_bytes = (await state.stats()).memory_peak_bytes
    report.differing_sessions = len(wrong)
    report.differences = [
        f"session {printable(sid)}: {what}" for sid, found in wrong.items() for what in found
    ][:_LISTED_DIFFERENCES]
    report.verified = not wrong
    return report
