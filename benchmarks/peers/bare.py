"""The bare system calls under every durable store: the limit that this machine sets."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.access import Accesses
from benchmarks.contender import SYNCED, Contender, Metric, Metrics, Stopwatch, median
from benchmarks.pagecache import drop, warm

LATENCY = (Metric("median", " µs"), Metric("p99", " µs"))

LONE_APPEND = "bare write + fdatasync"

FRAME_BYTES = 748
"""What one 592-byte session occupies in the engine's log, so that both write the same."""


@dataclass
class LoneAppend(Contender):
    """Append `FRAME_BYTES` to a file and fdatasync it, one after the other."""

    update_count: int
    name: str = LONE_APPEND
    is_limit: bool = True
    durability: str = SYNCED
    request_tasks: int = 1

    async def open(self, directory: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._file = os.open(directory / "log", flags, 0o600)

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
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._file = os.open(directory / "log", flags, 0o600)

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


def latency_metrics(seconds: list[float]) -> Metrics:
    """Return the median and the 99th percentile of `seconds`, in microseconds."""
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"median": median(ordered) * 1e6, "p99": p99 * 1e6}
