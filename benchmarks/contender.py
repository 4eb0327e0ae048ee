"""The contract between a workload and the things that it compares, and how results are named.

A contender does one workload in one way: this engine, a peer, or the bare system calls under
both. It runs in a process of its own (`isolation`), so that nobody pays for another's garbage
collection, threads or allocator.
"""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar, TypeVar

T = TypeVar("T")

Metrics = dict[str, float]
"""What one repetition measured, by metric name."""

ENGINE = "persistence"
"""The engine's name in every table."""

# What an acknowledged write survives.
NOTHING = "nothing"
SYNCED = "power loss"
PROCESS_CRASH = "process crash"

# How asyncio code calls a contender.
ASYNCIO = "await"
INLINE = "inline"
"""A blocking call on the event loop."""
THREAD = "to_thread"
"""A blocking call in `asyncio.to_thread`."""
GATHERED = "to_thread, gathered"
"""The same, for all requests that have come meanwhile: a group commit that the caller wrote."""


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
        called: how asyncio code calls it; every row states it.
        fresh_process: True for a new process per repetition (opening, memory), which then runs
            `open`, `measure` and `close` once.
        request_tasks: how many tasks call `request` while the event loop's lag is sampled; 0: it
            is sampled during `measure`.
        ours: whether it is the engine.
        is_limit: whether it is no peer but what the machine, or theory, sets as a limit.
        series: of rows that differ in size alone, the name that they have in common.
        size: the size of such a row, in the unit of its workload.
    """

    name: str
    durability: str = NOTHING
    called: str = INLINE
    fresh_process: bool = False
    request_tasks: int = 0
    ours: bool = False
    is_limit: bool = False
    series: str = ""
    size: float | None = None

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

    async def request(self) -> None:
        """Do one request of this workload, called as asyncio code calls this contender."""
        raise NotImplementedError

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
    """Measures one `with` block, and remembers when it was: what is measured, and what is not."""

    intervals: ClassVar[list[tuple[float, float]]] = []
    """Start and end of all blocks that have ended in this process, `time.perf_counter` seconds."""

    seconds: float = 0.0

    def __enter__(self) -> Stopwatch:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        end = time.perf_counter()
        self.seconds = end - self._start
        self.intervals.append((self._start, end))

    def rate(self, operations: int) -> Metrics:
        """Return `operations` per second as the metric "rate"."""
        return {RATE.name: operations / self.seconds}


def percentile(ordered: list[float], share: float) -> float:
    """Return the value of the sorted list `ordered` at `share` (0 to 1), nearest rank."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(values: Iterable[float]) -> float:
    """Return the median; of an even number of values, the mean of the two in the middle.

    The upper one of the two would be the best of two repetitions, of a rate as of a ratio.
    """
    return statistics.median(values)


def chunks(items: list[T], size: int) -> Iterator[list[T]]:
    """Cut `items` into lists of `size`."""
    remaining = iter(items)
    while chunk := list(islice(remaining, size)):
        yield chunk
