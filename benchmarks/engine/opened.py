"""Opening the engine for a workload, and filling it."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks import payloads
from benchmarks.contender import ASYNCIO, PROCESS_CRASH, SYNCED, Contender
from benchmarks.tasks import TASK_COUNT, in_tasks

MIB = 2**20
DEFAULT_MEMORY_BYTES = 100 * MIB
DURABILITY = {"always": SYNCED, "interval": PROCESS_CRASH, "never": PROCESS_CRASH}


class Engine(Contender):
    """A contender that is the engine. Subclasses say how it is configured and what is done.

    `state` is the open manager. Everything not named in `options` is left at its default.
    """

    name = "persistence"
    durability = SYNCED
    called = ASYNCIO
    ours = True
    state: Any = None

    async def open_state(self, directory: Path, *, clock: Any = None, **options: Any) -> None:
        """Open `state`; `options` as for `configuration`."""
        synced = DURABILITY[options.get("fsync", "always")] == SYNCED
        assert synced or self.durability != SYNCED, f"the row of {self.name} claims too much"
        self.state = await _manager(directory, clock=clock, **options).__aenter__()

    async def close(self) -> None:
        if self.state is not None:
            await self.state.close()


def configuration(
    directory: Path,
    *,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    fsync: str = "always",
    url: str | None = None,
    write: str = "through",
    memory: Mapping[str, Any] | None = None,
    **disk: Any,
) -> Any:
    """Build the engine's configuration: its defaults, but for what a workload sets."""
    engine = _engine()
    return engine.StateConfig(
        redis=engine.RedisConfig(url=url, write=write),
        memory=engine.MemoryConfig(max_bytes=memory_bytes, **(memory or {})),
        disk=engine.DiskConfig(path=str(directory / "engine"), fsync=fsync, **disk),
    )


@asynccontextmanager
async def opened(directory: Path, **options: Any) -> AsyncIterator[Any]:
    """Open a manager for one `async with` block; `options` as for `configuration`."""
    async with _manager(directory, **options) as state:
        yield state


def _engine() -> Any:
    """Import the engine in the contender's process: what it costs there is part of the result."""
    return importlib.import_module("persistence")


def _manager(directory: Path, *, clock: Any = None, **options: Any) -> Any:
    return _engine().StateManager(None, configuration(directory, **options), clock=clock)


async def fill(state: Any, session_count: int, task_count: int = TASK_COUNT) -> None:
    """Create sessions 0 to `session_count` - 1, by `task_count` tasks, and flush."""

    async def create(index: int) -> None:
        await state.create_session(
            session_id=payloads.session_id(index), data=payloads.session(index)
        )

    await in_tasks(range(session_count), create, task_count)
    await state.flush()


async def wrong_sessions(state: Any, indexes: Iterable[int]) -> int:
    """Count those of `indexes` whose session is missing or is not as it was created."""
    wrong = 0
    for index in indexes:
        session = await state.get_session(payloads.session_id(index))
        if session is None or dict(session.data) != payloads.session(index):
            wrong += 1
    return wrong


def every(session_count: int, sample_count: int) -> Iterable[int]:
    """Return `sample_count` indexes spread evenly over `session_count` sessions."""
    step = max(1, session_count // sample_count)
    return islice(range(0, session_count, step), sample_count)
