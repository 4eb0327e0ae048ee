"""Helpers that the engine's own tests share: managers on a disk in memory, and their deaths."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final
from unittest.mock import patch

from persistence import DiskConfig, MemoryConfig, SessionConfig, StateConfig, StateManager
from persistence.clock import Clock, ManualClock
from persistence.disk import patches
from persistence.disk.files import Files
from tests import encryption
from tests.disk.memoryfiles import MemoryFiles

Points = Callable[[int], Iterable[int]]
"""See the fixture `points`."""
Sampled = Callable[[Sequence[int]], Sequence[int]]
"""See the fixture `sampled`."""

PATH: Final = "/state"
"""Where `MemoryFiles` hold the engine's directory in these tests."""


def config(path: str = PATH, *, ttl_seconds: float = 3600, **disk: Any) -> StateConfig:
    """Return a configuration without work by the clock: what happens, a test has asked for.

    Args:
        path: the directory.
        ttl_seconds: of sessions.
        disk: fields of `DiskConfig`. Compaction has no rate limit.
    """
    return StateConfig(
        session=SessionConfig(ttl_seconds=ttl_seconds, cleanup_interval_seconds=0),
        memory=MemoryConfig(check_interval_seconds=0),
        disk=DiskConfig(**{"path": path, "compaction_bytes_per_second": 0, **disk}),
        **encryption.sections(),
    )


@contextmanager
def patching(min_record_bytes: int = 64, max_base_fraction: float = 4.0) -> Iterator[None]:
    """Let logs that are opened meanwhile hold patches of small records, of any size by default."""
    with (
        patch.object(patches, "MIN_RECORD_BYTES", min_record_bytes),
        patch.object(patches, "MAX_BASE_FRACTION", max_base_fraction),
    ):
        yield


@asynccontextmanager
async def opened(
    files: Files, configuration: StateConfig | None = None, *, clock: Clock | None = None
) -> AsyncIterator[StateManager]:
    """Open a manager; close it at the end, unless its disk is dead by then or it was abandoned."""
    state = StateManager(
        config=configuration or config(), clock=clock or ManualClock(), files=files
    )
    await state.open()
    try:
        yield state
        if not (isinstance(files, MemoryFiles) and files.is_dead):
            await state.close()
    finally:
        await abandon(state)


async def abandon(state: StateManager) -> None:
    """End a manager the way SIGKILL does: without a last word to the disk. Fine after `close`.

    With `MemoryFiles`, look at ``files.after_kill()`` or ``files.after_power_loss()`` afterwards.
    """
    disk = state._disk
    if isinstance(disk._files, MemoryFiles) and state._is_open:
        disk._files.kill()
    state._is_open = False
    tasks = [
        *state._background,
        *state._residency._reading.values(),
        *disk._background,
        state._commits._task,
        state._residency._spilling,
        disk.compactor._task,
        state._closing,
    ]
    disk.compactor._stopping.set()
    running = {task for task in tasks if task is not None and not task.done()}
    while running:  # one that was cleaning up after itself when it was cancelled goes on
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=0.05)
    disk.threads.close()
    disk.writer.close()
    disk._open_segments.close()
    disk._lock.release()


async def everything(state: StateManager) -> dict[str, dict[str, Any]]:
    """Return the data of every live session."""
    sessions = {sid: await state.get_session(sid) for sid in await state.get_active_sessions()}
    return {sid: session.data for sid, session in sessions.items() if session is not None}
