"""`MemoryFiles`: a disk in memory under the engine, with faults on demand and crashes to look at.

It tells apart what a program wrote and what is durable: the data of a file from the last sync of
that file, a name from the last sync of its directory. So one run can be followed by

- `after_kill`: the process died; the kernel still has everything that was written;
- `after_power_loss`: the machine died; of what was not synced, nothing is left, or any part of it
  (`tests.disk.powerloss` says which parts there are);

also by the one and then the other: what a process left unsynced stays so after its death.

Faults are functions that see every call before it happens (`Fault`); `fail`, `kill_at` and
`short_writes` make the usual ones. After `kill` nothing reaches the disk any more, so that the
clean-up code of a program that is about to die leaves no trace, as in a real death.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import Final

from persistence.disk.files import Files, Space
from tests.disk.powerloss import Change, Loss, Names, Nothing, Scattered, apply_change, rename

MUTATING: Final = frozenset(
    {
        "make_directory",
        "create",
        "open_lock",
        "write_at",
        "truncate",
        "sync_data",
        "sync",
        "sync_directory",
        "rename",
        "remove",
    }
)
"""The calls that change the disk, or that make a change durable."""
_FIRST_FD: Final = 1_000_000  # no real descriptor, so that a call past the seam fails


class Killed(Exception):
    """The simulated process is dead."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call: the name of the method, the file, and how many bytes it is about.

    `target` is the new name in a rename.
    """

    operation: str
    path: str
    size: int = 0
    target: str = ""

    def __str__(self) -> str:
        name = os.path.basename(self.path)
        return f"{self.operation} {name}" + (
            f" {os.path.basename(self.target)}" if self.target else ""
        )


Fault = Callable[["MemoryFiles", Call], int | None]
"""Sees a call before it happens: raises to let it fail, returns a count to make it a short one.

A sync with a count of 0 is a lie: it returns, and nothing is durable.
"""

Gate = Callable[[Call], None]
"""Sees a call before any fault does, in the thread that makes it, and may let it wait."""


@dataclass(eq=False, slots=True)
class _File:
    """An inode. `pending` lists what was done to it since its last sync, in order."""

    data: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    pending: list[Change] = field(default_factory=list)
    locked_by: int = 0

    def copy(self) -> _File:
        """Return an inode of the same content, unlocked."""
        return _File(bytearray(self.data), bytearray(self.durable), list(self.pending))


class MemoryFiles(Files):
    """`Files` in memory; see the module. Safe to use from several threads.

    Attributes:
        gates: passed in order before each call.
        faults: asked in order before each call, one call at a time.
        calls: the mutating calls that took place, in order. A removal of what is not there and
            the making of a directory that exists are none.
        free_bytes: how much the disk still takes; None: no end.
        most_files: how many files it takes, like a file system with so many inodes; None: no end.
    """

    def __init__(self) -> None:
        self.gates: list[Gate] = []
        self.faults: list[Fault] = []
        self.calls: list[Call] = []
        self.free_bytes: int | None = None
        self.most_files: int | None = None
        self.is_dead = False
        self.dies_after_this_call = False
        self._lock = threading.RLock()
        self._directories = {"/"}
        self._lost_directories: set[str] = set()  # if the power is lost now
        self._files: dict[str, _File] = {}
        self._durable: dict[str, _File] = {}
        self._renamings: list[Names[_File]] = []
        self._changes = 0
        self._open: dict[int, tuple[_File, str]] = {}
        self._next_fd = _FIRST_FD

    # --- for tests: what is there -----------------------------------------------------------------

    def contents(self, directory: str = "/") -> dict[str, bytes]:
        """Return every file below `directory`: path -> bytes."""
        below = directory.rstrip("/") + "/"
        return {
            path: bytes(file.data)
            for path, file in sorted(self._files.items())
            if path.startswith(below)
        }

    def data(self, path: str) -> bytes:
        """Return the bytes of the file `path`."""
        return bytes(self._files[path].data)

    def set_data(self, path: str, data: bytes) -> None:
        """Let `path` hold exactly `data`, durably: made, replaced or damaged behind the engine."""
        self._directories.update(_parents(path))
        self._lost_directories.difference_update(_parents(path))
        self._files[path] = self._durable[path] = _File(bytearray(data), bytearray(data))

    def flip(self, path: str, bit: int) -> None:
        """Flip one bit of a file."""
        data = bytearray(self.data(path))
        data[bit // 8] ^= 1 << bit % 8
        self.set_data(path, bytes(data))

    def delete(self, path: str) -> None:
        """Remove a file behind the engine's back."""
        del self._files[path]
        self._durable.pop(path, None)

    @property
    def open_files(self) -> list[str]:
        """The paths under which files were opened that are still open."""
        return sorted(path for _, path in self._open.values())

    # --- for tests: crashes -----------------------------------------------------------------------

    def kill(self) -> None:
        """Let the process be dead: every later call raises `Killed` and does nothing."""
        self.is_dead = True

    def after_kill(self) -> MemoryFiles:
        """Return the disk as the next process finds it after the death of this one.

        What was not synced still is not.
        """
        with self._lock:
            again = MemoryFiles()
            again._directories = set(self._directories)
            again._lost_directories = set(self._lost_directories)
            copies: dict[_File, _File] = {}
            again._files = _copied(self._files, copies)
            again._durable = _copied(self._durable, copies)
            again._changes = self._changes
            again._renamings = [
                Names(
                    change.order,
                    {
                        path: file and copies.setdefault(file, file.copy())
                        for path, file in change.files.items()
                    },
                )
                for change in self._renamings
            ]
            return again

    def after_power_loss(self, loss: Loss | Random | None = None) -> MemoryFiles:
        """Return the disk as it is after the machine lost its power.

        Args:
            loss: what is left of what was not synced. None: nothing. Random numbers: each change,
                to data (by sector) and to names, is left or lost by chance.
        """
        if loss is None:
            loss = Nothing()
        elif isinstance(loss, Random):
            loss = Scattered(loss)
        with self._lock:
            names = dict(self._durable)
            for change in self._renamings:
                if loss.keeps_names(change.order):
                    rename(names, change)
            lost = {
                path for path in sorted(self._lost_directories) if not loss.keeps_directory(path)
            }
            again = MemoryFiles()
            for path in self._directories:
                if lost.isdisjoint({path, *_parents(path)}):
                    again._directories.add(path)
            for path, file in names.items():
                if lost.isdisjoint(_parents(path)):
                    again.set_data(path, bytes(loss.left_of(file.durable, file.pending)))
            return again

    @property
    def unsynced(self) -> list[int]:
        """The orders of all changes since the syncs that would have made them durable."""
        with self._lock:
            files = {*self._files.values(), *self._durable.values()}
            data = [change.order for file in files for change in file.pending]
            return sorted([*data, *(change.order for change in self._renamings)])

    def unsynced_data(self) -> set[str]:
        """Return the files that hold something which was written and not synced.

        What was written and then cut away again does not count.
        """
        with self._lock:
            return {
                path
                for path, file in self._files.items()
                if any(item.data and item.offset < len(file.data) for item in file.pending)
            }

    def unsynced_names(self) -> set[str]:
        """Return the names whose last change is not durable."""
        with self._lock:
            return {path for change in self._renamings for path in change.files}

    def is_durable(self, data: bytes) -> bool:
        """Whether some file holds `data` even if the power is lost now."""
        with self._lock:
            return any(data in file.durable for file in self._durable.values())

    # --- one call ---------------------------------------------------------------------------------

    def _entering(self, call: Call) -> AbstractContextManager[int | None]:
        return _Entered(self, call)

    def _enter(self, call: Call) -> int | None:
        if self.is_dead:
            raise Killed(str(call))
        limit = None
        for fault in self.faults:
            wanted = fault(self, call)
            limit = wanted if limit is None else limit
        return limit

    def _leave(self, call: Call) -> None:
        if self.dies_after_this_call:
            self.kill()
            raise Killed(str(call))

    def _did(self, call: Call) -> None:
        self.calls.append(call)

    def _name(self, files: dict[str, _File | None]) -> None:
        change = Names(self._next_order(), files)
        rename(self._files, change)
        self._renamings.append(change)

    def _change(self, file: _File, offset: int, data: bytes | None) -> None:
        change = Change(self._next_order(), offset, data)
        apply_change(file.data, change)
        file.pending.append(change)

    def _next_order(self) -> int:
        self._changes += 1
        return self._changes

    def _opened(self, file: _File, path: str) -> int:
        self._next_fd += 1
        self._open[self._next_fd] = file, path
        return self._next_fd

    def _existing(self, path: str) -> _File:
        if path in self._directories:
            raise _error(errno.EISDIR, path)
        try:
            return self._files[path]
        except KeyError:
            raise _error(errno.ENOENT, path) from None

    def _check_parent(self, path: str) -> None:
        parent = os.path.dirname(path)
        if parent not in self._directories:
            raise _error(errno.ENOTDIR if parent in self._files else errno.ENOENT, path)

    def _claim(self, file: _File, end: int, offset: int) -> int:
        """Take the space that a write up to `end` needs; return up to where there is room."""
        growth = end - max(offset, len(file.data))
        if self.free_bytes is None or growth <= 0:
            return end
        end -= max(0, growth - self.free_bytes)
        if end <= offset:
            raise _error(errno.ENOSPC, "")
        self.free_bytes -= max(0, end - max(offset, len(file.data)))
        return end

    def _free_inodes(self) -> int:
        return 2**20 if self.most_files is None else max(0, self.most_files - len(self._files))

    def _give_back(self, nbytes: int) -> None:
        if self.free_bytes is not None:
            self.free_bytes += nbytes

    # --- Files ------------------------------------------------------------------------------------

    def make_directory(self, path: str) -> None:
        call = Call("make_directory", path)
        with self._entering(call):
            wanted = [path, *_parents(path)]
            if any(name in self._files for name in wanted):
                raise _error(errno.EEXIST if path in self._files else errno.ENOTDIR, path)
            if path not in self._directories:
                self._lost_directories.update(set(wanted) - self._directories)
                self._directories.update(wanted)
                self._did(call)

    def list_directory(self, path: str) -> list[str]:
        with self._entering(Call("list_directory", path)):
            if path not in self._directories:
                raise _error(errno.ENOTDIR if path in self._files else errno.ENOENT, path)
            names = (*self._files, *self._directories)
            return sorted(os.path.basename(name) for name in names if os.path.dirname(name) == path)

    def open_read(self, path: str) -> int:
        with self._entering(Call("open_read", path)):
            return self._opened(self._existing(path), path)

    def open_write(self, path: str) -> int:
        with self._entering(Call("open_write", path)):
            return self._opened(self._existing(path), path)

    def create(self, path: str) -> int:
        call = Call("create", path)
        with self._entering(call):
            self._check_parent(path)
            if path in self._files or path in self._directories:
                raise _error(errno.EEXIST, path)
            if not self._free_inodes():
                raise _error(errno.ENOSPC, path)
            file = _File()
            self._name({path: file})
            self._did(call)
            return self._opened(file, path)

    def open_lock(self, path: str) -> int:
        call = Call("open_lock", path)
        with self._entering(call):
            self._check_parent(path)
            if path not in self._files:
                self._name({path: _File()})
                self._did(call)
            return self._opened(self._existing(path), path)

    def lock(self, fd: int) -> None:
        file, path = self._open[fd]
        with self._entering(Call("lock", path)):
            if file.locked_by not in (0, fd):
                raise _error(errno.EAGAIN, path)
            file.locked_by = fd

    def unlock(self, fd: int) -> None:
        file, _ = self._open[fd]
        if file.locked_by == fd:
            file.locked_by = 0

    def close(self, fd: int) -> None:
        with self._lock:
            file, path = self._open.pop(fd)
            if file.locked_by == fd:
                file.locked_by = 0
            if not self.is_dead:
                with suppress(OSError):  # as the system's close: see `Files.close`
                    self._enter(Call("close", path))

    def size(self, fd: int) -> int:
        file, path = self._open[fd]
        with self._entering(Call("size", path)):
            return len(file.data)

    def exists(self, path: str) -> bool:
        with self._entering(Call("exists", path)):
            return path in self._files or path in self._directories

    def read_at(self, fd: int, size: int, offset: int) -> bytes:
        file, path = self._open[fd]
        with self._entering(Call("read_at", path, size)) as limit:
            size = size if limit is None else min(size, limit)
            return bytes(file.data[offset : offset + size])

    def read_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        data = self.read_at(fd, len(buffer), offset)
        buffer[: len(data)] = data
        return len(data)

    def read_cached(self, fd: int, buffer: memoryview, offset: int) -> int:
        file, path = self._open[fd]
        with self._entering(Call("read_cached", path, len(buffer))) as limit:
            size = len(buffer) if limit is None else min(len(buffer), limit)
            data = file.data[offset : offset + size]
            buffer[: len(data)] = data
            return len(data)

    def write_at(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        file, path = self._open[fd]
        call = Call("write_at", path, len(data))
        with self._entering(call) as limit:
            size = len(data) if limit is None else min(len(data), limit)
            end = self._claim(file, offset + size, offset) if size else offset
            written = bytes(data[: end - offset])
            self._change(file, offset, written)
            self._did(Call("write_at", path, len(written)))
            return len(written)

    def truncate(self, fd: int, size: int) -> None:
        file, path = self._open[fd]
        call = Call("truncate", path, size)
        with self._entering(call):
            self._give_back(len(file.data) - size)
            self._change(file, size, None)
            self._did(call)

    def sync_data(self, fd: int) -> None:
        self._sync(Call("sync_data", self._open[fd][1]), fd)

    def sync(self, fd: int) -> None:
        self._sync(Call("sync", self._open[fd][1]), fd)

    def _sync(self, call: Call, fd: int) -> None:
        file = self._open[fd][0]
        with self._entering(call) as limit:
            if limit != 0:
                for change in file.pending:
                    apply_change(file.durable, change)
                file.pending.clear()
            self._did(call)

    def sync_directory(self, path: str) -> None:
        call = Call("sync_directory", path)
        with self._entering(call) as limit:
            if path not in self._directories:
                raise _error(errno.ENOENT, path)
            self._did(call)
            if limit == 0:
                return
            kept = []
            for change in self._renamings:
                if os.path.dirname(next(iter(change.files))) == path:
                    rename(self._durable, change)
                else:
                    kept.append(change)
            self._renamings = kept
            self._lost_directories -= {
                made for made in self._lost_directories if os.path.dirname(made) == path
            }

    def rename(self, source: str, target: str) -> None:
        call = Call("rename", source, target=target)
        with self._entering(call):
            file = self._existing(source)
            self._check_parent(target)
            self._give_back(len(self._files[target].data) if target in self._files else 0)
            self._name({target: file, source: None})
            self._did(call)

    def remove(self, path: str) -> None:
        call = Call("remove", path)
        with self._entering(call):
            if path in self._files:
                self._give_back(len(self._files[path].data))
                self._name({path: None})
                self._did(call)

    def space(self, path: str) -> Space:
        with self._entering(Call("space", path)):
            free_bytes = 2**40 if self.free_bytes is None else self.free_bytes
            return Space(free_bytes, self._free_inodes())


class _Entered:
    """One call under way: faults before it, under the lock, and perhaps death behind it."""

    __slots__ = ("_call", "_files")

    def __init__(self, files: MemoryFiles, call: Call) -> None:
        self._files = files
        self._call = call

    def __enter__(self) -> int | None:
        for gate in self._files.gates:
            gate(self._call)
        self._files._lock.acquire()
        try:
            return self._files._enter(self._call)
        except BaseException:
            self._files._lock.release()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        try:
            if kind is None:
                self._files._leave(self._call)
        finally:
            self._files._lock.release()


def _error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)


def _parents(path: str) -> list[str]:
    parents = []
    while path != "/":
        path = os.path.dirname(path)
        parents.append(path)
    return parents


def _copied(names: dict[str, _File], copies: dict[_File, _File]) -> dict[str, _File]:
    return {path: copies.setdefault(file, file.copy()) for path, file in names.items()}


# --- faults ---------------------------------------------------------------------------------------


def fail(
    number: int,
    operations: str | Iterable[str],
    *,
    path: str = "",
    nth: int = 1,
    times: int | None = 1,
) -> Fault:
    """Return a fault: calls fail with the error `number`.

    Args:
        number: an errno.
        operations: names of calls, or one name.
        path: only where this is part of the file's path.
        nth: the first call to fail, counted from 1 among those that match.
        times: how many fail in a row; None: all from then on.
    """
    names = {operations} if isinstance(operations, str) else set(operations)
    seen = 0

    def fault(_: MemoryFiles, call: Call) -> None:
        nonlocal seen
        if call.operation in names and path in call.path:
            seen += 1
            if seen >= nth and (times is None or seen < nth + times):
                raise _error(number, call.path)

    return fault


def lose_dirty_pages(number: int, *, path: str = "", nth: int = 1) -> Fault:
    """Return a fault: a sync fails with the error `number`, and the kernel forgets what was dirty.

    As ext4 and XFS do it: the pages are clean from then on and still show what they should hold,
    later syncs succeed without writing them, and the disk never gets them.
    """
    fails = fail(number, {"sync", "sync_data"}, path=path, nth=nth)

    def fault(files: MemoryFiles, call: Call) -> None:
        try:
            fails(files, call)
        except OSError:
            files._files[call.path].pending.clear()
            raise

    return fault


def kill_at(nth: int, part: float = 0.0) -> Fault:
    """Return a fault: the process dies at its `nth` mutating call, counted from 1.

    Args:
        nth: which call.
        part: how much of it is still done, if it is a write; other calls are not done.
    """
    seen = 0

    def fault(files: MemoryFiles, call: Call) -> int | None:
        nonlocal seen
        if call.operation not in MUTATING:
            return None
        seen += 1
        if seen != nth:
            return None
        if call.operation == "write_at" and part:
            files.dies_after_this_call = True
            return int(call.size * part)
        files.kill()
        raise Killed(str(call))

    return fault


def short_writes(most: int) -> Fault:
    """Return a fault: a write takes at most so many bytes."""

    def fault(_: MemoryFiles, call: Call) -> int | None:
        return most if call.operation == "write_at" else None

    return fault


def lie(operations: str | Iterable[str], *, path: str = "", nth: int = 1) -> Fault:
    """Return a fault: from the `nth` of these syncs on they return without making anything durable.

    Args:
        operations: `sync_data`, `sync`, `sync_directory`: one of them or several.
        path: only where this is part of the file's path.
        nth: the first to lie, counted from 1 among those that match.
    """
    names = {operations} if isinstance(operations, str) else set(operations)
    seen = 0

    def fault(_: MemoryFiles, call: Call) -> int | None:
        nonlocal seen
        if call.operation not in names or path not in call.path:
            return None
        seen += 1
        return 0 if seen >= nth else None

    return fault
