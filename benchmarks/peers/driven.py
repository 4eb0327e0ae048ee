"""Workloads done by any of the peers that are a `Store`."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import payloads
from benchmarks.access import Accesses
from benchmarks.amplification import amplification
from benchmarks.contender import Contender, Metrics, Stopwatch, check, chunks
from benchmarks.pagecache import drop, warm
from benchmarks.peers.bare import latency_metrics
from benchmarks.peers.store import Step, Store, becoming
from benchmarks.tasks import in_tasks
from benchmarks.traces import Trace

_TTL_SECONDS = 3600.0
READ_TASKS = 32
"""Tasks that read while the lag is sampled."""


@dataclass
class Driven(Contender):
    """A contender that is a store; `label` tells its rows of one workload apart."""

    store: Store
    session_count: int
    label: str = ""

    def __post_init__(self) -> None:
        self.name = self.store.name + (f", {self.label}" if self.label else "")
        self.durability = self.store.durability
        self.called = self.store.called
        self.is_limit = self.store.is_limit
        self.request_tasks = READ_TASKS

    async def open(self, directory: Path) -> None:
        self._directory = directory
        self._random = random.Random(2)
        await self.store.open(directory)
        await self.store.fill(self.session_count)

    async def close(self) -> None:
        await self.store.close()

    def _key(self) -> str:
        return payloads.session_id(self._random.randrange(self.session_count))

    async def request(self) -> None:
        await self.store.read_one(self._key())


@dataclass
class HotReads(Driven):
    """Get every session, shuffled, and read one field."""

    read_count: int = 0

    async def open(self, directory: Path) -> None:
        await super().open(directory)
        self._keys = [payloads.session_id(index) for index in range(self.session_count)]
        self._random.shuffle(self._keys)

    async def measure(self) -> Metrics:
        keys = self._keys[: self.read_count]
        rounds = max(1, self.read_count // self.session_count)
        await self.store.read(keys)  # as for the engine: back into the CPU's caches
        with Stopwatch() as watch:
            for _ in range(rounds):
                await self.store.read(keys)
        return watch.rate(rounds * len(keys))


@dataclass
class ColdReads(Driven):
    """Get random sessions and read one field, the page cache warm, or `dropped`.

    The store is opened anew: nothing is left in its own memory of what was just written.
    """

    read_count: int = 0
    dropped: bool = False

    async def open(self, directory: Path) -> None:
        await super().open(directory)
        await self._reopen(warm)

    async def _reopen(self, prepare: Callable[[Path], None]) -> None:
        await self.store.close()
        prepare(self._directory)
        await self.store.open(self._directory)

    async def measure(self) -> Metrics:
        if self.dropped:
            await self._reopen(drop)
        else:
            warm(self._directory)
        keys = [self._key() for _ in range(self.read_count)]
        with Stopwatch() as watch:
            await self.store.read(keys)
        data = await self.store.get(payloads.session_id(7))
        check(data == payloads.session(7), "a session came back changed")
        return watch.rate(len(keys))


@dataclass
class Updates(Driven):
    """Read a session, count a visit, write it back; random sessions.

    Attributes:
        task_count: requests at once, each of which waits for its own update; 0: the updates are
            handed over all together, in the way that is the fastest for the store.
    """

    update_count: int = 0
    task_count: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.request_tasks = self.task_count or READ_TASKS

    async def open(self, directory: Path) -> None:
        await super().open(directory)
        self._visits: Counter[str] = Counter()

    async def measure(self) -> Metrics:
        keys = [self._key() for _ in range(self.update_count)]
        with Stopwatch() as watch:
            if self.task_count:
                await in_tasks(keys, self._update, self.task_count)
            else:
                await self.store.change([(key, payloads.count_visit) for key in keys])
        self._visits.update(keys)
        for key in keys[:10]:
            data = await self.store.get(key)
            index = int(key.rpartition("-")[2])
            wanted = payloads.session(index)["prefs"]["visits"] + self._visits[key]
            check(data is not None and data["prefs"]["visits"] == wanted, "updates were lost")
        return watch.rate(len(keys))

    async def _update(self, key: str) -> None:
        await self.store.change_one(key, payloads.count_visit)

    async def request(self) -> None:
        await self._update(self._key())


@dataclass
class LoneUpdates(Updates):
    """The same by one caller, who waits for each."""

    task_count: int = 1

    async def measure(self) -> Metrics:
        seconds = []
        for _ in range(self.update_count):
            key = self._key()
            start = time.perf_counter()
            await self._update(key)
            seconds.append(time.perf_counter() - start)
        return latency_metrics(seconds)


@dataclass
class Mixed(Driven):
    """Reads and updates, as `accesses` draws them.

    A batch of accesses has arrived at once, as many as the engine has tasks: they are read, and
    their updates are handed over together, hence in one transaction.
    """

    accesses: Accesses | None = None
    batch_size: int = 100

    async def open(self, directory: Path) -> None:
        await super().open(directory)
        self._seed = 0
        self._updates = 0
        self._written_before = self.store.written_bytes()

    async def measure(self) -> Metrics:
        assert self.accesses is not None, "a mix needs its accesses"
        self._seed += 1
        drawn = [(payloads.session_id(each), up) for each, up in self.accesses.draw(self._seed)]
        batches = [_apart(some) for some in chunks(drawn, self.batch_size)]
        with Stopwatch() as watch:
            for keys, steps in batches:
                await self.store.read(keys)
                if steps:
                    await self.store.change(steps)
        self._updates += sum(len(steps) for _, steps in batches)
        return watch.rate(len(drawn)) | amplification(
            self.store.written_bytes() - self._written_before,
            self._updates * payloads.SESSION_BYTES,
            self.store.occupied_bytes(self._directory),
            self.session_count * payloads.SESSION_BYTES,
        )

    async def request(self) -> None:
        assert self.accesses is not None, "a mix needs its accesses"
        if self._random.random() < self.accesses.update_share:
            await self.store.change_one(self._key(), payloads.count_visit)
        else:
            await self.store.read_one(self._key())


def _apart(accesses: list[tuple[str, bool]]) -> tuple[list[str], list[Step]]:
    """Tell the reads of a batch from its updates."""
    reads = [key for key, update in accesses if not update]
    return reads, [(key, payloads.count_visit) for key, update in accesses if update]


@dataclass
class Churn(Driven):
    """Create sessions and delete them, on top of `session_count` that stay."""

    churned_count: int = 0

    async def open(self, directory: Path) -> None:
        await super().open(directory)
        self._next = self.session_count

    async def measure(self) -> Metrics:
        indexes = self._fresh(self.churned_count)
        steps = [(payloads.session_id(index), becoming(index)) for index in indexes]
        with Stopwatch() as watch:
            await self.store.change(steps)
            await self.store.remove([key for key, _ in steps])
        check(await self.store.get(steps[0][0]) is None, "a deleted session came back")
        return watch.rate(len(steps))

    def _fresh(self, count: int) -> range:
        self._next += count
        return range(self._next - count, self._next)

    async def request(self) -> None:
        (index,) = self._fresh(1)
        key = payloads.session_id(index)
        await self.store.change_one(key, becoming(index))
        await self.store.remove([key])


@dataclass
class Expiry(Driven):
    """All sessions are over at the same moment; delete them, in the way that the store has."""

    fresh_process: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.request_tasks = 0

    async def open(self, directory: Path) -> None:
        await super().open(directory)
        store: Any = self.store
        store.let_expire(_TTL_SECONDS)

    async def measure(self) -> Metrics:
        store: Any = self.store
        later = time.time() + 2 * _TTL_SECONDS
        with Stopwatch() as watch:
            removed = store.delete_expired(later)
        check(removed == self.session_count, f"{removed} sessions were removed")
        return watch.rate(removed)


@dataclass
class Scan(Driven):
    """Go through the keys of all sessions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.request_tasks = 0

    async def measure(self) -> Metrics:
        with Stopwatch() as watch:
            found = await self.store.count()
        check(found == self.session_count, f"{found} keys")
        return watch.rate(found)


@dataclass
class Replay(Driven):
    """The requests of a trace: read a session or begin it, change it, write it back."""

    trace: Callable[[], Trace] | None = None
    batch_size: int = 100

    async def measure(self) -> Metrics:
        self._round += 1
        steps = self._trace.steps(f"{self._round}-")  # sessions of its own each time
        with Stopwatch() as watch:
            for some in chunks(steps, self.batch_size):
                await self.store.change(some)
        check(await self.store.get(steps[-1][0]) is not None, "a session went missing")
        return watch.rate(len(steps))

    async def open(self, directory: Path) -> None:
        assert self.trace is not None, "a replay needs its trace"
        self._trace = self.trace()
        self._steps: list[Step] = self._trace.steps("lag-")
        self._position = self._round = 0
        await super().open(directory)

    async def request(self) -> None:
        key, change = self._steps[self._position % len(self._steps)]
        self._position += 1
        await self.store.change_one(key, change)


@dataclass
class Reopen(Driven):
    """Open what holds the sessions, and read one; page cache warm."""

    fresh_process: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.request_tasks = 0

    async def open(self, directory: Path) -> None:
        self._own = directory / self.store.name.replace(" ", "-")
        empty = directory / f"{self._own.name}-empty"
        empty.mkdir(exist_ok=True)
        await self.store.open(empty)  # else importing it would count as opening
        await self.store.close()
        if not self._own.exists():
            self._own.mkdir()
            await self.store.open(self._own)
            await self.store.fill(self.session_count)
            await self.store.close()

    async def measure(self) -> Metrics:
        with Stopwatch() as watch:
            await self.store.open(self._own)
            data = await self.store.get(payloads.session_id(self.session_count - 1))
        check(data == payloads.session(self.session_count - 1), "a session came back changed")
        return {"seconds": watch.seconds}
