"""What the engine's tests share: a disk that does as it is told, managers on it, crash images."""

from __future__ import annotations

import asyncio
import errno
import math
import shutil
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Final

from persistence import Session, StateConfig, StateManager
from persistence.commit import CommitQueue
from persistence.disk.files import Files
from persistence.disk.tier import DiskTier
from persistence.memory.tier import MemoryTier
from persistence.residency import Residency
from tests import encryption

KIB: Final = 1024
MIB: Final = 1024 * KIB
DAY: Final = 86_400.0

_PATIENCE_SECONDS: Final = 20.0

Start = Callable[..., Awaitable[StateManager]]
"""Opens a manager on a directory of the test; see the fixture `start`."""

OpenTyped = Callable[..., Awaitable[Any]]
"""The same for a manager whose sessions have a schema."""

Crash = Callable[[StateManager], Path]
"""Returns what a SIGKILL would leave; see the fixture `crash`."""


class Gate:
    """Lets calls through, or holds them until the test lets them pass. Open at first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._passes = math.inf
        self._waiting = 0
        self._calls = 0
        self._free_from = math.inf

    def hold(self) -> None:
        """Hold every call from now on."""
        with self._changed:
            self._passes = 0
            self._free_from = math.inf

    def let_pass(self, count: float = math.inf) -> None:
        """Let the next `count` calls through: by default all, the gate is open again."""
        with self._changed:
            self._passes += count
            self._changed.notify_all()

    def let_others_pass(self) -> None:
        """Go on holding the calls that stand here now, and no others."""
        with self._changed:
            self._free_from = self._calls

    def go_through(self) -> None:
        """Called in the thread that wants to pass."""
        with self._changed:
            number = self._calls
            self._calls += 1
            if number >= self._free_from:
                return
            self._waiting += 1
            self._changed.notify_all()
            passed = self._changed.wait_for(lambda: self._passes > 0, _PATIENCE_SECONDS)
            self._waiting -= 1
            self._passes -= 1
        assert passed, "a test held a call and forgot about it"

    async def reached(self) -> None:
        """Wait until a call stands before the gate."""
        await asyncio.to_thread(self._wait_for_call)

    def _wait_for_call(self) -> None:
        with self._changed:
            # One that may pass already, and has not got round to it, does not count.
            held = self._changed.wait_for(lambda: self._waiting > self._passes, _PATIENCE_SECONDS)
            assert held


class ScriptedFiles(Files):
    """The system's files, except where a test says otherwise.

    Args:
        durable: whether a sync is one. Processes that crash do not need it, and without it a test
            takes a tenth of the time.

    Attributes:
        calls: how often each call was made.
        syncs: the gate before each sync of the log.
        writes: the gate before each write of the log.
        reads: the gate before each read in a thread.
        full: whether the disk takes no more bytes.
        sync_error: what every sync of the log raises.
        tells_cached: False: like a file system that cannot tell what is in the page cache, so
            that every read goes through a thread.
    """

    def __init__(self, *, durable: bool = False) -> None:
        self.calls: Counter[str] = Counter()
        self.syncs = Gate()
        self.writes = Gate()
        self.reads = Gate()
        self.full = False
        self.sync_error: BaseException | None = None
        self.tells_cached = True
        self._durable = durable
        self._still = threading.Lock()

    def open_gates(self) -> None:
        """Let everything through again."""
        self.syncs.let_pass()
        self.writes.let_pass()
        self.reads.let_pass()

    def image(self, source: Path | str, target: Path) -> Path:
        """Copy a directory as a SIGKILL at this moment would leave it: between two calls."""
        with self._still:
            shutil.copytree(source, target)
        return target

    def create(self, path: str) -> int:
        with self._still:
            self.calls["create"] += 1
            return super().create(path)

    def read_at(self, fd: int, size: int, offset: int) -> bytes:
        if _thread_name().startswith("persistence-reader"):
            self.reads.go_through()
        self.calls["read_at"] += 1
        return super().read_at(fd, size, offset)

    def read_cached(self, fd: int, buffer: memoryview, offset: int) -> int:
        if not self.tells_cached:
            raise NotImplementedError
        self.calls["read_cached"] += 1
        return super().read_cached(fd, buffer, offset)

    def write_at(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        if _thread_name().startswith("persistence-writer"):
            self.writes.go_through()
        with self._still:
            self.calls["write_at"] += 1
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write_at(fd, data, offset)

    def truncate(self, fd: int, size: int) -> None:
        with self._still:
            super().truncate(fd, size)

    def sync_data(self, fd: int) -> None:
        self.syncs.go_through()
        self.calls["sync_data"] += 1
        if self.sync_error is not None:
            raise self.sync_error
        if self._durable:
            super().sync_data(fd)

    def sync(self, fd: int) -> None:
        self.calls["sync"] += 1
        if self._durable:
            super().sync(fd)

    def sync_directory(self, path: str) -> None:
        self.calls["sync_directory"] += 1
        if self._durable:
            super().sync_directory(path)

    def rename(self, source: str, target: str) -> None:
        with self._still:
            self.calls["rename"] += 1
            super().rename(source, target)

    def remove(self, path: str) -> None:
        with self._still:
            super().remove(path)


def _thread_name() -> str:
    return threading.current_thread().name


def config_for(path: Path, **sections: dict[str, Any]) -> StateConfig:
    """Return a configuration in which nothing happens by itself after some time."""
    given = {name: dict(section) for name, section in sections.items()}
    given["session"] = {"cleanup_interval_seconds": 0, **given.get("session", {})}
    given["memory"] = {"check_interval_seconds": 0, **given.get("memory", {})}
    given["disk"] = {"path": str(path), **given.get("disk", {})}
    return StateConfig.model_validate({**encryption.sections(), **given})


def memory_of(state: StateManager) -> MemoryTier:
    """Return the memory tier, for its `check` and its order."""
    return state._memory


def residency_of(state: StateManager) -> Residency:
    """Return what moves sessions between the tiers."""
    return state._residency


def disk_of(state: StateManager) -> DiskTier:
    """Return the disk tier, for its index and its segments."""
    return state._disk


def commits_of(state: StateManager) -> CommitQueue:
    """Return the queue of what is in flight."""
    return state._commits


def directory_of(state: StateManager) -> Path:
    """Return where the log is."""
    return Path(state.config.disk.path)


def names_in(directory: Path) -> set[str]:
    """Return the names of the files in a directory."""
    return {path.name for path in directory.iterdir()}


async def with_sessions(start: Start, *names: str, **sections: dict[str, Any]) -> StateManager:
    """Return a manager in which each of `names` is a session with a field x = 0."""
    state = await start(**sections)
    for name in names:
        await state.create_session(session_id=name, data={"x": 0})
    return state


def update(state: StateManager, name: str, value: Any) -> asyncio.Task[Session]:
    """Begin to set the field x of a session."""
    return asyncio.create_task(state.update_session_data(name, "x", value))


async def loop_steps(count: int) -> None:
    """Let the event loop run everything that is ready, `count` times."""
    for _ in range(count):
        await asyncio.sleep(0)


async def eventually(
    condition: Callable[[], bool], meanwhile: Callable[[], Awaitable[object]] | None = None
) -> None:
    """Wait for what a background task does after some (short) time of the real clock."""
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while not condition():
            if meanwhile is not None:
                await meanwhile()
            await asyncio.sleep(0.005)


async def outcomes(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    """Return what each of `calls` returned or raised, running them at the same time."""
    return await asyncio.gather(*calls, return_exceptions=True)


async def contents(state: StateManager) -> dict[str, dict[str, Any]]:
    """Return the data of every live session."""
    found = {}
    async for session_id in state.iter_sessions():
        session = await state.get_session(session_id)
        if session is not None:
            assert session_id not in found, "listed twice"
            found[session_id] = session.data
    return found


async def data_of(state: StateManager, session_id: str) -> dict[str, Any]:
    """Return the data of a session that must be there."""
    session = await state.get_session(session_id)
    assert session is not None, session_id
    return session.data
