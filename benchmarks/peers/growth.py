"""A peer at one number of sessions."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from benchmarks import payloads
from benchmarks.contender import Metrics, Stopwatch
from benchmarks.grown import Taken, growth_metrics
from benchmarks.peers.driven import Driven
from benchmarks.resident import rss_bytes


@dataclass
class Growth(Driven):
    """Create sessions, update and read random ones, go through all keys, and open it again."""

    operation_count: int = 0
    fresh_process: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.series = self.name
        self.name = f"{self.series}, {self.session_count:,}"
        self.size = float(self.session_count)
        self.request_tasks = 0

    async def open(self, directory: Path) -> None:
        self._directory = directory
        self._random = random.Random(2)
        await self.store.open(directory)

    async def measure(self) -> Metrics:
        store, before_bytes = self.store, rss_bytes()
        with Stopwatch() as creating:
            await store.fill(self.session_count)
        grown = (rss_bytes() - before_bytes) / self.session_count
        keys = [self._key() for _ in range(self.operation_count)]
        with Stopwatch() as restoring:
            await store.read(keys)
        with Stopwatch() as updating:
            await store.change([(key, payloads.count_visit) for key in keys])
        written = store.written_bytes()
        with Stopwatch() as scanning:
            await store.count()
        await store.close()
        with Stopwatch() as opening:
            await store.open(self._directory)
        return growth_metrics(
            self.session_count,
            len(keys),
            Taken(
                creating.seconds,
                updating.seconds,
                restoring.seconds,
                scanning.seconds,
                opening.seconds,
            ),
            rss_bytes=grown,
            written_bytes=written,
            occupied_bytes=store.occupied_bytes(self._directory),
        )
