"""Reads access logs and deals their requests: many at once, those of one session in order.

Who applies them is somebody else's business (`Applier`): this process, or several others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Protocol, TypeVar

from persistence.cli.accesslog import Request, parse_line, read_lines
from persistence.cli.replay_model import ReplayProgress, Watch
from persistence.cli.workload import session_id

_Item = TypeVar("_Item")

_CURSOR_EVERY_REQUESTS: Final = 256
_QUEUE_REQUESTS: Final = 1024  # a burst of one client must not hold up the others behind it
_WINDOW_REQUESTS: Final = 8192
_SLICE_ITEMS: Final = 64
_PROGRESS_SECONDS: Final = 0.25


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


async def in_slices(items: Iterable[_Item]) -> AsyncIterator[_Item]:
    """Yield `items`, letting everything else on the event loop run now and then."""
    for number, item in enumerate(items):
        if number % _SLICE_ITEMS == 0:
            await asyncio.sleep(0)
        yield item


class Applier(Protocol):
    """Applies requests to sessions."""

    async def apply(self, position: int, sid: str, request: Request) -> bool:
        """Apply a request; return once that is acknowledged. False: it had been applied."""

    async def save_watermark(self, low: int) -> None:
        """Note in the cursor that every request below `low` is acknowledged."""


class Run:
    """One run: the reader deals requests to tasks, each of which owns some of the sessions.

    Args:
        applier: applies them.
        concurrency: requests in flight at most.
        start: position of the first request that may not be applied yet.
    """

    def __init__(self, applier: Applier, concurrency: int, start: int) -> None:
        self._applier = applier
        self._start = start
        self._saved = start
        self._watermark = Watermark(start)
        self._queues: list[asyncio.Queue[tuple[int, str, Request] | None]] = [
            asyncio.Queue(_QUEUE_REQUESTS) for _ in range(concurrency)
        ]
        self.applied = 0

    async def run(self, reader: LogReader) -> None:
        """Apply all requests, and save the watermark."""
        try:
            async with asyncio.TaskGroup() as group:
                for queue in self._queues:
                    group.create_task(self._work(queue))
                await self._deal(reader)
        except ExceptionGroup as group_error:
            # Whatever went wrong (a full disk, say) mostly hits all tasks at once.
            raise group_error.exceptions[0] from None
        await self._save_watermark()

    async def _deal(self, reader: LogReader) -> None:
        async for request in in_slices(reader):
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
            if await self._applier.apply(position, sid, request):
                self.applied += 1
            self._watermark.finish(position)
            if self._watermark.low - self._saved >= _CURSOR_EVERY_REQUESTS:
                await self._save_watermark()

    async def _save_watermark(self) -> None:
        self._saved = self._watermark.low
        await self._applier.save_watermark(self._saved)


@asynccontextmanager
async def watched(
    progress: Callable[[], Awaitable[ReplayProgress]], watch: Watch | None
) -> AsyncIterator[None]:
    """Hand `progress()` to `watch` now and then while the context lasts."""
    if watch is None:
        yield
        return

    async def tick() -> None:
        while True:
            watch(await progress())
            await asyncio.sleep(_PROGRESS_SECONDS)

    ticker = asyncio.create_task(tick())
    try:
        yield
        watch(await progress())
    finally:
        ticker.cancel()
        # Gathered: suppressing its cancellation here would swallow one of our own as well.
        await asyncio.gather(ticker, return_exceptions=True)
