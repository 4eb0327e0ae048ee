"""Named places in the engine's work on the disk at which a process kills itself, with SIGKILL.

A place is a system call on a kind of file, and the moment before it, in the middle of it (a write
of which a part is done) or after it. So the engine itself needs no hooks.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from persistence.disk.files import Files

SEGMENT: Final = r"\d{10}\.seg"
OUTPUT: Final = r"\d{10}\.seg\.tmp"


class Place(NamedTuple):
    """A system call, and when.

    Attributes:
        operation: name of the method of `Files`.
        name: what the file's name must match; in a rename, the new one.
        moment: "before", "within" or "after".
    """

    operation: str
    name: str
    moment: str


POINTS: Final[dict[str, Place]] = {
    "lock taken": Place("lock", "LOCK", "after"),
    "append torn": Place("write_at", SEGMENT, "within"),
    "append written": Place("write_at", SEGMENT, "after"),
    "append synced": Place("sync_data", SEGMENT, "after"),
    "segment created": Place("create", SEGMENT, "after"),
    "segment header written": Place("sync", SEGMENT, "before"),
    "segment header synced": Place("sync", SEGMENT, "after"),
    "directory about to be synced": Place("sync_directory", r"state", "before"),
    "directory synced": Place("sync_directory", r"state", "after"),
    "hint torn": Place("write_at", r"\d{10}\.hint\.tmp", "within"),
    "hint written": Place("rename", r"\d{10}\.hint", "before"),
    "hint renamed": Place("rename", r"\d{10}\.hint", "after"),
    "manifest torn": Place("write_at", r"MANIFEST\.tmp", "within"),
    "manifest written": Place("rename", "MANIFEST", "before"),
    "manifest renamed": Place("rename", "MANIFEST", "after"),
    "manifest copy renamed": Place("rename", r"MANIFEST\.bak", "after"),
    "merge begun": Place("create", OUTPUT, "after"),
    "merge torn": Place("write_at", OUTPUT, "within"),
    "merge synced": Place("sync", OUTPUT, "after"),
    "merge named": Place("rename", SEGMENT, "after"),
    "merged segment about to go": Place("remove", SEGMENT, "before"),
    "merged segment gone": Place("remove", SEGMENT, "after"),
    "hint of a merged segment gone": Place("remove", r"\d{10}\.hint", "after"),
    "snapshot written": Place("rename", "INDEX", "before"),
    "snapshot renamed": Place("rename", "INDEX", "after"),
    "snapshot used up": Place("remove", "INDEX", "after"),
    "recovery begun": Place("open_write", SEGMENT, "after"),
    "torn tail kept": Place("rename", r"\d{10}-\d+-\d+\.bytes", "after"),
    "torn tail about to be cut": Place("truncate", SEGMENT, "before"),
    "torn tail cut": Place("truncate", SEGMENT, "after"),
    "chunk torn": Place("write_at", r".*\.chunk\.tmp", "within"),
    "chunk kept": Place("rename", r".*\.chunk", "after"),
    "checkpoint about to be published": Place("rename", r".*\.manifest", "before"),
    "checkpoint published": Place("rename", r".*\.manifest", "after"),
    "checkpoint about to be noted": Place("rename", "SHIPPED", "before"),
    "checkpoint noted": Place("rename", "SHIPPED", "after"),
    "old checkpoint withdrawn": Place("remove", r".*\.manifest", "after"),
    "old chunk gone": Place("remove", r".*\.chunk", "after"),
}


class KillingFiles(Files):
    """The system's files, and the end of the process at the `nth` time that a place is reached.

    Args:
        point: name of the place.
        nth: counted from 1.
        report: called right before the end.
    """

    def __init__(self, point: str, nth: int, report: Callable[..., None]) -> None:
        self._place = POINTS[point]
        self._left = nth
        self._report = report
        self._point = point
        self._lock = threading.Lock()
        self._paths: dict[int, str] = {}

    def _die(self) -> None:
        self._report("point", self._point)
        os.kill(os.getpid(), signal.SIGKILL)

    def _around(self, operation: str, path: str, call: Callable[[], Any]) -> Any:
        place = self._place
        if operation != place.operation or not re.fullmatch(place.name, os.path.basename(path)):
            return call()
        with self._lock:
            self._left -= 1
            is_here = self._left == 0
        if is_here and place.moment == "before":
            self._die()
        result = call()
        if is_here:
            self._die()
        return result

    def _opened(self, operation: str, path: str, call: Callable[[str], int]) -> int:
        def opening() -> int:
            fd = call(path)
            self._paths[fd] = path
            return fd

        fd: int = self._around(operation, path, opening)
        return fd

    def open_write(self, path: str) -> int:
        return self._opened("open_write", path, super().open_write)

    def create(self, path: str) -> int:
        return self._opened("create", path, super().create)

    def open_lock(self, path: str) -> int:
        return self._opened("open_lock", path, super().open_lock)

    def lock(self, fd: int) -> None:
        call = super().lock
        self._around("lock", self._paths[fd], lambda: call(fd))

    def write_at(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        call = super().write_at
        # A half, also when it is not the time yet: whoever finds the write short writes the rest.
        half = data[: (len(data) + 1) // 2]
        part = half if self._place.moment == "within" else data
        taken: int = self._around("write_at", self._paths[fd], lambda: call(fd, part, offset))
        return taken

    def truncate(self, fd: int, size: int) -> None:
        call = super().truncate
        self._around("truncate", self._paths[fd], lambda: call(fd, size))

    def sync_data(self, fd: int) -> None:
        call = super().sync_data
        self._around("sync_data", self._paths[fd], lambda: call(fd))

    def sync(self, fd: int) -> None:
        call = super().sync
        self._around("sync", self._paths[fd], lambda: call(fd))

    def sync_directory(self, path: str) -> None:
        call = super().sync_directory
        self._around("sync_directory", path, lambda: call(path))

    def rename(self, source: str, target: str) -> None:
        call = super().rename
        self._around("rename", target, lambda: call(source, target))

    def remove(self, path: str) -> None:
        if self.exists(path):
            call = super().remove
            self._around("remove", path, lambda: call(path))
