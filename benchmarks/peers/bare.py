"""The bare system calls under every durable store: the limit that this machine sets."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import asyncio
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.access import Accesses
from benchmarks.arrivals import UPDATED_SHARE, arrivals, work_of_a_request
from benchmarks.contender import (
    PROCESS_CRASH,
    SYNCED,
    THREAD,
    Contender,
    Metric,
    Metrics,
    Stopwatch,
    median,
)
from benchmarks.pagecache import drop, warm

LATENCY = (Metric("median", " µs"), Metric("p99", " µs"))

LONE_APPEND = "bare write + fdatasync"

_STEADY_BYTES = 20_000
FRAME_BYTES = 748
"""What one 592-byte session occupies in the engine's log, so that both write the same."""


def open_log(directory: Path) -> int:
    """Open a file to append to, and return its descriptor."""
    return os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


@dataclass
class LoneAppend(Contender):
    """Append `FRAME_BYTES` to a file and fdatasync it, one after the other."""

    update_count: int
    name: str = LONE_APPEND
    is_limit: bool = True
    durability: str = SYNCED
    request_tasks: int = 1

    async def open(self, directory: Path) -> None:
        self._file = open_log(directory)

    async def measure(self) -> Metrics:
        frame = os.urandom(FRAME_BYTES)
        seconds = [self._append(frame) for _ in range(self.update_count)]
        return latency_metrics(seconds)

    async def request(self) -> None:
        self._append(bytes(FRAME_BYTES))

    def _append(self, frame: bytes) -> float:
        start = time.perf_counter()
        os.write(self._file, frame)
        os.fdatasync(self._file)
        return time.perf_counter() - start

    async def close(self) -> None:
        os.close(self._file)


@dataclass
class BatchAppend(Contender):
    """Append 1,000 frames with one write and one fdatasync: what group commit can reach."""

    update_count: int
    name: str = "bare write + fdatasync, 1,000 per sync"
    is_limit: bool = True
    durability: str = SYNCED

    async def open(self, directory: Path) -> None:
        self._file = open_log(directory)

    async def measure(self) -> Metrics:
        frame = os.urandom(FRAME_BYTES)
        batch_count = max(1, self.update_count // 1000)
        with Stopwatch() as watch:
            for _ in range(batch_count):
                os.write(self._file, b"".join([frame] * 1000))
                os.fdatasync(self._file)
        return watch.rate(batch_count * 1000)

    async def close(self) -> None:
        os.close(self._file)


@dataclass
class Pread(Contender):
    """`os.pread` of one frame at a random place of a warm file; nothing is decoded."""

    accesses: Accesses
    dropped: bool = False
    name: str = "bare pread"
    is_limit: bool = True

    async def open(self, directory: Path) -> None:
        self._file = os.open(directory / "log", os.O_RDWR | os.O_CREAT, 0o600)
        frame = random.Random(3).randbytes(FRAME_BYTES)
        for _ in range(self.accesses.session_count):
            os.write(self._file, frame)
        self._directory = directory

    async def measure(self) -> Metrics:
        (drop if self.dropped else warm)(self._directory)
        pread, file = os.pread, self._file
        indexes = self.accesses.indexes()
        with Stopwatch() as watch:
            for index in indexes:
                pread(file, FRAME_BYTES, index * FRAME_BYTES)
        return watch.rate(len(indexes))

    async def close(self) -> None:
        os.close(self._file)


@dataclass
class SteadyAppend(Contender):
    """Append 20 KB in a thread, 200 times a second, and nothing else; a sync each second.

    Beside timers of 100 tasks, a tenth of which append as well. What is left is what the thread,
    the event loop and the page cache cost.
    """

    append_count: int
    name: str = "bare write in a thread"
    is_limit: bool = True
    durability: str = PROCESS_CRASH
    called: str = THREAD

    async def open(self, directory: Path) -> None:
        self._file = open_log(directory)
        self._random = random.Random(7)
        self._data = self._random.randbytes(_STEADY_BYTES)
        self._writer, self._syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    async def measure(self) -> Metrics:
        syncing = asyncio.create_task(self._sync_each_second())
        seconds = await arrivals(self._random, self.append_count, self._append, self._request)
        syncing.cancel()
        await asyncio.wait([syncing])
        return latency_metrics(seconds)

    async def _append(self) -> float:
        start = time.perf_counter()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._writer, os.write, self._file, self._data)
        return time.perf_counter() - start

    async def _request(self) -> None:
        await work_of_a_request(self._random)
        if self._random.random() < UPDATED_SHARE:
            await self._append()

    async def _sync_each_second(self) -> None:
        while True:
            await asyncio.sleep(1)
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._syncer, os.fdatasync, self._file)

    async def close(self) -> None:
        self._writer.shutdown()
        self._syncer.shutdown()
        os.close(self._file)


def latency_metrics(seconds: list[float]) -> Metrics:
    """Return the median and the 99th percentile of `seconds`, in microseconds."""
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"median": median(ordered) * 1e6, "p99": p99 * 1e6}
