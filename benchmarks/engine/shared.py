"""Sessions in Redis: updates agreed with it, checkpoints shipped to it."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from benchmarks import lag, payloads
from benchmarks.contender import NOTHING, SYNCED, Metric, Metrics, Stopwatch, check
from benchmarks.engine.opened import MIB, Engine, every, fill, wrong_sessions
from benchmarks.redis_server import RedisServer
from benchmarks.tasks import TASK_COUNT, in_tasks

THROUGH = "persistence, redis.write=through"
CHECKPOINTING = "persistence, making checkpoints"
UNDISTURBED = "persistence, making none"
READS = Metric("reads", "/s", higher_is_better=True)
_READS_AT_ONCE = 32  # then the others have their turn, as between two requests


@dataclass
class ThroughUpdate(Engine):
    """`update_session(id, count_visit)` of random sessions by 1,000 tasks, agreed with Redis."""

    session_count: int
    update_count: int
    name: str = THROUGH

    async def open(self, directory: Path) -> None:
        self._server = RedisServer()
        self._server.start()
        await self.open_state(directory, url=self._server.url)
        await fill(self.state, self.session_count)
        self._random = random.Random(2)

    async def measure(self) -> Metrics:
        indexes = self._random.choices(range(self.session_count), k=self.update_count)
        ids = [payloads.session_id(index) for index in indexes]
        with Stopwatch() as watch:
            await in_tasks(ids, self._update, TASK_COUNT)
        check((await self.state.stats()).sharing.undelivered == 0, "Redis has not all of it")
        return watch.rate(len(ids))

    async def _update(self, session_id: str) -> None:
        await self.state.update_session(session_id, payloads.count_visit)

    async def close(self) -> None:
        await super().close()
        self._server.close()


@dataclass
class FullCheckpoint(Engine):
    """`create_checkpoint()` of all sessions to Redis; the one before is deleted each time.

    The row tells what the checkpoint survives: the server keeps no file, for the peer neither.
    """

    session_count: int
    durability: str = NOTHING

    async def open(self, directory: Path) -> None:
        self._server = RedisServer()
        self._server.start()
        await self.open_state(directory, url=self._server.url, write="checkpoint")
        await fill(self.state, self.session_count)

    async def measure(self) -> Metrics:
        with Stopwatch() as watch:
            info = await self.state.create_checkpoint("benchmark")
        check(info.kind == "full" and info.sessions == self.session_count, "not all was shipped")
        await self.state.delete_checkpoint(info.id)  # so that the next one is full as well
        return watch.rate(self.session_count)

    async def close(self) -> None:
        await super().close()
        self._server.close()


@dataclass
class DeltaCheckpoint(FullCheckpoint):
    """`create_checkpoint()` after one session in a hundred was updated: only those are shipped."""

    async def open(self, directory: Path) -> None:
        await super().open(directory)
        await self.state.create_checkpoint("base")
        self._round = 0

    async def measure(self) -> Metrics:
        self._round += 1
        changed = range(self._round % 100, self.session_count, 100)
        await in_tasks(map(payloads.session_id, changed), self._update)
        with Stopwatch() as watch:
            info = await self.state.create_checkpoint("benchmark")
        check(info.kind == "incremental", f"a {info.kind} checkpoint was made")
        return watch.rate(len(changed))

    async def _update(self, session_id: str) -> None:
        await self.state.update_session(session_id, payloads.count_visit)


@dataclass
class RestoreCheckpoint(FullCheckpoint):
    """`restore_checkpoint()` of all sessions into a worker that is running, and into its log."""

    durability: str = SYNCED

    async def open(self, directory: Path) -> None:
        await super().open(directory)
        await self.state.create_checkpoint("benchmark")

    async def measure(self) -> Metrics:
        with Stopwatch() as watch:
            restored = await self.state.restore_checkpoint()
        check(restored.sessions == self.session_count, f"{restored.sessions} were restored")
        check(not await wrong_sessions(self.state, every(self.session_count, 100)), "wrong values")
        return watch.rate(restored.sessions)


@dataclass
class ReadWhileCheckpointing(Engine):
    """Hot `get_session`, and the lag, while one full checkpoint to Redis follows the other.

    Attributes:
        makes_checkpoints: False: the same without them, to compare with.
    """

    session_count: int
    sample_count: int
    makes_checkpoints: bool = True

    def __post_init__(self) -> None:
        self.name = CHECKPOINTING if self.makes_checkpoints else UNDISTURBED

    async def open(self, directory: Path) -> None:
        self._server = RedisServer()
        self._server.start()
        memory_bytes = max(100 * MIB, self.session_count * 2000)
        await self.open_state(
            directory, url=self._server.url, write="checkpoint", memory_bytes=memory_bytes
        )
        await fill(self.state, self.session_count)
        ids = [payloads.session_id(index) for index in range(self.session_count)]
        random.Random(1).shuffle(ids)
        self._ids: Iterator[str] = cycle(ids)

    async def measure(self) -> Metrics:
        self._stop = False
        self._reads = self._checkpoints = 0
        work = [asyncio.create_task(self._read())]
        if self.makes_checkpoints:
            work.append(asyncio.create_task(self._checkpoint()))
        with Stopwatch() as watch:
            metrics = lag.lag_metrics(await lag.sample_lag(self.sample_count))
        metrics[READS.name] = self._reads / watch.seconds
        self._stop = True
        await asyncio.gather(*work)
        check(bool(self._checkpoints) == self.makes_checkpoints, "not what was to be measured")
        return metrics

    async def _read(self) -> None:
        get_session = self.state.get_session
        while not self._stop:
            for session_id in islice(self._ids, _READS_AT_ONCE):
                check(await get_session(session_id) is not None, "a session went missing")
            self._reads += _READS_AT_ONCE
            await asyncio.sleep(0)

    async def _checkpoint(self) -> None:
        while not self._stop:
            info = await self.state.create_checkpoint("benchmark")
            check(info.sessions == self.session_count, "not all was shipped")
            await self.state.delete_checkpoint(info.id)  # so that the next one is full as well
            self._checkpoints += 1

    async def close(self) -> None:
        await super().close()
        self._server.close()
