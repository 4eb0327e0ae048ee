"""File systems of real kernels: small ones on loop devices, and what can be done to them.

Everything here needs root, and most of it loop devices; `why_not` says what is missing.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_SHUTDOWN: Final = 0x8004587D  # EXT4_IOC_SHUTDOWN, the same number as XFS's
_WITHOUT_JOURNAL: Final = (2).to_bytes(
    4, "little"
)  # nothing more reaches the disk, not even the journal
DISK_BYTES: Final = 24 * 2**20


def why_not(*tools: str) -> str | None:
    """Return why file systems cannot be mounted here, or None."""
    if os.geteuid() != 0:
        return "mounting needs root"
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return f"{', '.join(missing)} is not installed" if missing else None


def _run(*command: str | os.PathLike[str]) -> str:
    """Run a command; return why it failed, or an empty string."""
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    return ended.stderr.strip() or f"exit code {ended.returncode}" if ended.returncode else ""


class NotHere(Exception):
    """This machine does not allow it; the message says what."""


@contextmanager
def tmpfs(path: Path, options: str) -> Iterator[Path]:
    """Mount a file system in memory on `path`, which is made."""
    path.mkdir()
    problem = why_not("mount") or _run("mount", "-t", "tmpfs", "-o", options, "tmpfs", path)
    if problem:
        raise NotHere(f"mounting is not allowed here: {problem}")
    try:
        yield path
    finally:
        _run("umount", path)


class Ext4:
    """An ext4 file system in a file, on a loop device.

    Args:
        scratch: where the file and the mount point are made.

    Attributes:
        path: the mount point.
    """

    def __init__(self, scratch: Path) -> None:
        problem = why_not("mount", "mkfs.ext4", "losetup")
        if problem:
            raise NotHere(problem)
        self.path = scratch / "disk"
        self.path.mkdir()
        self._image = scratch / "image"
        with self._image.open("wb") as file:
            file.truncate(DISK_BYTES)
        problem = _run("mkfs.ext4", "-q", "-F", "-m", "0", self._image)
        if problem:
            raise NotHere(f"mkfs.ext4: {problem}")
        self.mount()

    def mount(self, options: str = "loop") -> None:
        """Mount it; a journal that was left is replayed."""
        problem = _run("mount", "-t", "ext4", "-o", options, self._image, self.path)
        if problem:
            raise NotHere(f"mounting is not allowed here: {problem}")

    def unmount(self) -> None:
        """Unmount it."""
        problem = _run("umount", self.path)
        assert not problem, problem

    def remount_read_only(self) -> None:
        """Let it take no more writes. Nothing may be open for writing."""
        problem = _run("mount", "-o", "remount,ro", self.path)
        assert not problem, problem

    def fail_read_only(self) -> None:
        """Let the kernel find an error and make it read-only, also where files are open."""
        device = _device_of(self.path)
        problem = _run("mount", "-o", "remount,errors=remount-ro", self.path)
        if problem:
            raise NotHere(problem)
        trigger = Path(f"/sys/fs/ext4/{device}/trigger_fs_error")
        if not trigger.exists():
            raise NotHere(f"{trigger} is missing")
        trigger.write_text("a test\n")

    def cut_power(self) -> None:
        """From now on nothing reaches the disk, and every write and sync fails."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, _WITHOUT_JOURNAL)
        except OSError as error:
            raise NotHere(f"no shutdown ioctl: {error.strerror}") from error
        finally:
            os.close(fd)

    def after_power_cut(self) -> None:
        """Start again, as a machine does that has its power back."""
        self.unmount()
        self.mount()

    def close(self) -> None:
        """Unmount and forget it."""
        with suppress(AssertionError):
            self.unmount()


def _device_of(path: Path) -> str:
    for line in Path("/proc/mounts").read_text().splitlines():
        device, mounted_on, *_ = line.split()
        if mounted_on == str(path):
            return os.path.basename(device)
    raise NotHere(f"{path} is not mounted")


@contextmanager
def ext4(scratch: Path) -> Iterator[Ext4]:
    """Make and mount an ext4 file system of its own."""
    disk = Ext4(scratch)
    try:
        yield disk
    finally:
        disk.close()
