"""The only module that touches the operating system's files: the seam for fault injection.

`Files` is a thin layer of one method per system call. What must be done about a short count, a
full disk or a failed sync is decided by the callers, so that a test that replaces this class
exercises exactly those decisions.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NamedTuple

_NOWAIT: Final = getattr(os, "RWF_NOWAIT", 0)
_NO_NOWAIT: Final = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS}
NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})

UNCOUNTED: Final = 2**63 - 1
DIRECTORY_MODE: Final = 0o700
FILE_MODE: Final = 0o600
MAX_KEY_FILE_BYTES: Final = 2**20


class Space(NamedTuple):
    """Free space of a file system; one that does not count its inodes has `UNCOUNTED`."""

    free_bytes: int
    free_inodes: int


def read_key_file(path: str) -> tuple[bytes, int]:
    """Return the content of a small file, and its mode."""
    fd = _open_file(path, os.O_RDONLY)
    try:
        with os.fdopen(os.dup(fd), "rb") as file:
            return file.read(MAX_KEY_FILE_BYTES), os.fstat(fd).st_mode
    finally:
        os.close(fd)


def create_key_file(path: str, data: bytes) -> bool:
    """Create a file that only the user can read, durably and whole or not at all.

    Several processes may do so at the same time: one of them makes it.

    Returns:
        False: it is there already, and was left as it is.
    """
    partial = f"{path}.{os.getpid()}.{os.urandom(8).hex()}.tmp"
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)  # fails where a rename would replace
        except FileExistsError:
            return False
    finally:
        os.unlink(partial)
    Files().sync_directory(os.path.dirname(os.path.abspath(path)))
    return True


def replace_key_file(path: str, data: bytes) -> None:
    """Replace a file by one that only the user can read, atomically and durably.

    Behind a link, the file that it leads to is replaced.
    """
    path = os.path.realpath(path)
    partial = f"{path}.{os.getpid()}.{os.urandom(8).hex()}.tmp"
    directory, name = os.path.dirname(path), os.path.basename(path)
    replace_file(Files(), directory, name, os.path.basename(partial), data)


class Files:
    """System calls on files. Every method but `close` raises OSError as the call does."""

    def make_directory(self, path: str) -> None:
        """Create `path` and its parents, private to the user; fine if it exists."""
        os.makedirs(path, mode=DIRECTORY_MODE, exist_ok=True)

    def list_directory(self, path: str) -> list[str]:
        """Return the names in `path`, sorted."""
        return sorted(os.listdir(path))

    def open_read(self, path: str) -> int:
        """Open the file `path` for reading."""
        return _open_file(path, os.O_RDONLY)

    def open_write(self, path: str) -> int:
        """Open the existing file `path` for reading and writing."""
        return _open_file(path, os.O_RDWR)

    def create(self, path: str) -> int:
        """Create `path`, which must not exist, for reading and writing."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return os.open(path, flags, FILE_MODE)

    def open_lock(self, path: str) -> int:
        """Open or create the lock file `path`."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)

    def lock(self, fd: int) -> None:
        """Take the exclusive lock of `fd`; BlockingIOError when another holds it."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def unlock(self, fd: int) -> None:
        """Give back the lock of `fd`, also where a forked child still has the file open."""
        fcntl.flock(fd, fcntl.LOCK_UN)

    def close(self, fd: int) -> None:
        """Close `fd`. Never fails: the descriptor is gone, whatever the system says.

        An error of a close tells nothing that the sync before it did not tell, and whoever closes
        once more closes a file of somebody else.
        """
        try:
            os.close(fd)
        except OSError as error:
            if error.errno == errno.EBADF:  # no fault of the world's
                raise

    def size(self, fd: int) -> int:
        """Return the size of the open file, bytes."""
        return os.fstat(fd).st_size

    def exists(self, path: str) -> bool:
        """Whether `path` exists."""
        return os.path.lexists(path)

    def read_at(self, fd: int, size: int, offset: int) -> bytes:
        """Read at most `size` bytes at `offset`; fewer at the end of the file."""
        return os.pread(fd, size, offset)

    def read_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Read into `buffer` at `offset`; return how many bytes, fewer at the end of the file."""
        return os.preadv(fd, [buffer], offset)

    def read_cached(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Read into `buffer` what needs no waiting; BlockingIOError when nothing does.

        Raises:
            BlockingIOError: the bytes are not in the page cache.
            NotImplementedError: the file system cannot tell (``RWF_NOWAIT`` is missing).
        """
        if not _NOWAIT:
            raise NotImplementedError
        try:
            return os.preadv(fd, [buffer], offset, _NOWAIT)
        except OSError as error:
            if error.errno in _NO_NOWAIT:
                raise NotImplementedError from error
            raise

    def write_at(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        """Write at `offset`; return how many bytes were taken, possibly fewer."""
        return os.pwrite(fd, data, offset)

    def truncate(self, fd: int, size: int) -> None:
        """Cut the file to `size` bytes."""
        os.ftruncate(fd, size)

    def sync_data(self, fd: int) -> None:
        """Make the file's data durable (fdatasync)."""
        os.fdatasync(fd)

    def sync(self, fd: int) -> None:
        """Make the file durable (fsync)."""
        os.fsync(fd)

    def sync_directory(self, path: str) -> None:
        """Make the names in directory `path` durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: str, target: str) -> None:
        """Rename `source` to `target`, replacing it atomically."""
        os.replace(source, target)

    def remove(self, path: str) -> None:
        """Unlink `path`; fine when it is gone already."""
        try:
            os.unlink(path)
        except FileNotFoundError:
            return

    def remove_tree(self, path: str, goes_on: Callable[[], bool]) -> None:
        """Remove the directory `path` and all that is in it; fine when it is gone already.

        Args:
            path: its path.
            goes_on: asked before each file; once it says no, the rest stays.
        """
        with suppress(FileNotFoundError):
            for _, directories, names, fd in os.fwalk(path, topdown=False):
                for name in names:
                    if not goes_on():
                        return
                    _remove(os.unlink, name, fd)
                for name in directories:
                    _remove(os.rmdir, name, fd)
            os.rmdir(path)

    def space(self, path: str) -> Space:
        """Return the free space of the file system that holds `path`."""
        stats = os.statvfs(path)
        free_inodes = stats.f_favail if stats.f_files else UNCOUNTED
        return Space(stats.f_bavail * stats.f_frsize, free_inodes)


def _open_file(path: str, access: int) -> int:
    """Open `path`, which must be a file: a named pipe in its place must not hold us up for ever."""
    fd = os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return fd


def read_all(files: Files, path: str) -> bytes:
    """Read the whole file `path`."""
    fd = files.open_read(path)
    try:
        return read_exactly(files, fd, files.size(fd), 0)
    finally:
        files.close(fd)


def read_exactly(files: Files, fd: int, size: int, offset: int) -> bytes:
    """Read `size` bytes at `offset`, going on after short reads; less only at the file's end."""
    data = files.read_at(fd, size, offset)
    if len(data) == size or not data:
        return data
    parts = [data]
    got = len(data)
    while got < size:
        data = files.read_at(fd, size - got, offset + got)
        if not data:
            break
        parts.append(data)
        got += len(data)
    return b"".join(parts)


def fill(files: Files, fd: int, buffer: memoryview, offset: int) -> bool:
    """Fill `buffer` from `offset` on, going on after short reads; False at the file's end."""
    while buffer:
        got = files.read_into(fd, buffer, offset)
        if not got:
            return False
        buffer = buffer[got:]
        offset += got
    return True


def _remove(call: Callable[..., None], name: str, directory: int) -> None:
    """Remove a file or a directory, or the link that looks like one, if it is still there."""
    with suppress(FileNotFoundError):
        try:
            call(name, dir_fd=directory)
        except NotADirectoryError:
            os.unlink(name, dir_fd=directory)


def write_exactly(files: Files, fd: int, data: bytes | bytearray, offset: int) -> None:
    """Write all of `data` at `offset`, going on after short writes and interruptions."""
    view = memoryview(data)
    while view:
        try:
            taken = files.write_at(fd, view, offset)
        except InterruptedError:
            continue
        if taken == 0:
            raise OSError(errno.ENOSPC, "the file system takes no more bytes")
        view = view[taken:]
        offset += taken


def replace_file(
    files: Files, directory: str, name: str, temporary: str, *data: bytes | bytearray
) -> None:
    """Replace the file `name` atomically and durably by `data`, one piece behind the other.

    The order is what makes it so: a temporary in the same directory, write, fsync, rename, fsync
    of the directory. Only after this returns may anything that `name` supersedes be unlinked.
    """
    target = f"{directory}/{name}"
    source = f"{directory}/{temporary}"
    files.remove(source)
    fd = files.create(source)
    try:
        try:
            end = 0
            for piece in data:
                write_exactly(files, fd, piece, end)
                end += len(piece)
            files.sync(fd)
        finally:
            files.close(fd)
        files.rename(source, target)
        files.sync_directory(directory)
    except OSError:
        files.remove(source)
        raise
