"""The contract between a workload and the things that it compares, and how results are named.

A contender does one workload in one way: this engine, a peer, or the bare system calls under
both. It runs in a process of its own (`isolation`), so that nobody pays for another's garbage
collection, threads or allocator.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

Metrics = dict[str, float]
"""What one repetition measured, by metric name."""

ENGINE = "persistence"
"""The engine's name in every table."""

# What an acknowledged write survives.
NOTHING = "nothing"
SYNCED = "power loss"
PROCESS_CRASH = "process crash"


@dataclass(frozen=True)
class Metric:
    """One thing that a workload measures.

    `unit` is shown behind the number; `higher_is_better` tells the report which way is good.
    """

    name: str
    unit: str
    higher_is_better: bool = False


RATE = Metric("rate", "/s", higher_is_better=True)


class Contender(ABC):
    """One way of doing a workload. Pickled into its process before `open`, never after.

    Class attributes of a subclass, or fields of a dataclass:
        name: the row's name.
        durability: what an acknowledged write survives; every row states it.
        fresh_process: True for a new process per repetition (opening, memory), which then runs
            `open`, `measure` and `close` once.
    """

    name: str
    durability: str = NOTHING
    fresh_process: bool = False

    @abstractmethod
    async def open(self, directory: Path) -> None:
        """Prepare, not measured. `directory` exists, is empty, and is this contender's own.

        (A workload with a shared directory passes that one instead, built by its `build`.)

        Raises:
            UnavailableError: this contender cannot run on this machine.
        """

    @abstractmethod
    async def measure(self) -> Metrics:
        """Do one repetition.

        Raises:
            WrongResultError: what came back is not what was stored.
        """

    async def close(self) -> None:
        """Release everything; the process ends after it."""
        return


class WrongResultError(Exception):
    """A contender answered wrongly: its speed means nothing, and the run fails."""


def check(condition: bool, message: str) -> None:
    """Raise `WrongResultError` with `message` unless `condition` holds."""
    if not condition:
        raise WrongResultError(message)


class Stopwatch:
    """Measures one `with` block."""

    seconds: float = 0.0

    def __enter__(self) -> Stopwatch:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start

    def rate(self, operations: int) -> Metrics:
        """Return `operations` per second as the metric "rate"."""
        return {RATE.name: operations / self.seconds}


def percentile(ordered: list[float], share: float) -> float:
    """Return the value of the sorted list `ordered` at `share` (0 to 1), nearest rank."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(values: Iterable[float]) -> float:
    """Return the median, nearest rank (an actual sample, never a mean of two)."""
    return percentile(sorted(values), 0.5)


def chunks(items: list[T], size: int) -> Iterator[list[T]]:
    """Cut `items` into lists of `size`."""
    remaining = iter(items)
    while chunk := list(islice(remaining, size)):
        yield chunk
