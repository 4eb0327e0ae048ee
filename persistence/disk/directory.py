"""Opening a directory: whose it is, who holds it, what its manifest says."""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from persistence.disk.filenames import LOCK, MANIFEST, is_ours, parse_segment, temporary_name
from persistence.disk.files import NO_SPACE, Files, read_all, replace_file
from persistence.disk.format import NewerFormat
from persistence.disk.manifest import (
    MalformedManifest,
    Manifest,
    decode_manifest,
    encode_manifest,
)
from persistence.errors import DirectoryLocked, DirectoryNotUsable, DiskFull, PersistenceError


class DirectoryLock:
    """The exclusive lock of a directory, held by an open descriptor (flock).

    A fork shares the descriptor: the child must close it and must not unlock it, or it would
    unlock the parent's.

    Attributes:
        directory: what is locked, as an absolute path.
    """

    def __init__(self, files: Files, directory: str) -> None:
        assert os.path.isabs(directory), directory
        self._files = files
        self.directory = directory
        path = f"{directory}/{LOCK}"
        self._fd = files.open_lock(path)
        try:
            files.lock(self._fd)
        except OSError as error:
            files.close(self._fd)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise DirectoryLocked(
                f"{directory} is in use by another process or manager; a directory belongs to one "
                "worker at a time: close the other one, or give this one its own disk.path"
            ) from None

    def release(self) -> None:
        """Give the lock back. A child that was forked a moment ago must not go on holding it."""
        if self._fd >= 0:
            self._files.unlock(self._fd)
            self.abandon()

    def abandon(self) -> None:
        """Close the descriptor and leave the lock to whoever else has it: in a forked child."""
        if self._fd >= 0:
            self._files.close(self._fd)
            self._fd = -1


def not_usable(directory: str, error: OSError) -> PersistenceError:
    """Return the error to raise when `directory` cannot be opened."""
    if error.errno in NO_SPACE:
        return DiskFull(f"{directory} cannot be opened: {error.strerror}; free some space")
    what = {
        errno.EROFS: "it is on a read-only file system",
        errno.ENOTDIR: "it is not a directory",
        errno.EEXIST: "it is not a directory",
        errno.EACCES: "permission denied",
        errno.EPERM: "permission denied",
        errno.EMFILE: "too many open files (raise RLIMIT_NOFILE)",
    }.get(error.errno or 0, error.strerror or str(error))
    return DirectoryNotUsable(
        f"{directory} cannot be used: {what}; nothing was changed; choose another disk.path"
    )


def make_directory(files: Files, directory: str) -> None:
    """Create `directory` and its parents where they are missing, durably."""
    missing = []
    path = os.path.abspath(directory)
    while not files.exists(path):
        missing.append(path)
        path = os.path.dirname(path)
    files.make_directory(directory)
    for made in missing:
        files.sync_directory(os.path.dirname(made))


def check_ours(files: Files, directory: str) -> None:
    """Refuse a directory that holds something, but not what this library writes.

    Raises:
        DirectoryNotUsable: segments without a manifest, or files that are not ours. Nothing is
            changed, not even a lock file is made.
    """
    names = files.list_directory(directory)
    if MANIFEST in names:
        return
    if any(parse_segment(name) is not None for name in names):
        raise DirectoryNotUsable(
            f"{directory} holds segments but no {MANIFEST}: its file was lost; nothing was "
            f"changed; restore {MANIFEST} from a copy of the directory"
        )
    foreign = [name for name in names if not is_ours(name)]
    if foreign:
        raise DirectoryNotUsable(
            f"{directory} holds other files ({foreign[0]!a}) and no {MANIFEST}, so it is not "
            "a directory of this library; nothing was changed; choose an empty disk.path"
        )


def open_manifest(files: Files, directory: str) -> Manifest:
    """Return the manifest, making a fresh one in a directory that is new or empty.

    Raises:
        DirectoryNotUsable: newer format, damaged manifest, segments without a manifest, or
            files that are not ours. Nothing is changed.
    """
    path = f"{directory}/{MANIFEST}"
    if files.exists(path):
        return read_manifest(files, directory)
    check_ours(files, directory)
    manifest = Manifest.fresh()
    write_manifest(files, directory, manifest)
    # Whoever made the directory may have died before its name was durable. A parent that we may
    # not read is not of our making.
    with suppress(PermissionError):
        files.sync_directory(os.path.dirname(os.path.abspath(directory)))
    return manifest


def read_manifest(files: Files, directory: str) -> Manifest:
    """Read and check the manifest.

    Raises:
        DirectoryNotUsable: it is missing, damaged or of a newer format.
    """
    path = f"{directory}/{MANIFEST}"
    try:
        return decode_manifest(read_all(files, path))
    except FileNotFoundError:
        raise DirectoryNotUsable(
            f"{directory} has no {MANIFEST}: it is not a directory of this library"
        ) from None
    except NewerFormat as error:
        raise DirectoryNotUsable(
            f"{path}: {error}; nothing was changed; use a newer version of the library"
        ) from None
    except (MalformedManifest, ValueError) as error:
        raise DirectoryNotUsable(
            f"{path} is damaged ({error}); nothing was changed; restore it from a copy"
        ) from None


def write_manifest(files: Files, directory: str, manifest: Manifest) -> None:
    """Replace the manifest, atomically and durably."""
    data = encode_manifest(manifest)
    replace_file(files, directory, MANIFEST, temporary_name(MANIFEST), data)
