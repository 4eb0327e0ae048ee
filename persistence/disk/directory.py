"""Opening a directory: whose it is, who holds it, what its manifest says."""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress

from persistence.disk.filenames import (
    LOCK,
    MANIFEST,
    MANIFEST_COPY,
    is_ours,
    parse_segment,
    temporary_name,
)
from persistence.disk.files import NO_SPACE, Files, read_all, replace_file
from persistence.disk.format import OtherFormat
from persistence.disk.manifest import (
    MalformedManifest,
    Manifest,
    decode_manifest,
    encode_manifest,
)
from persistence.errors import DirectoryLocked, DirectoryNotUsable, DiskFull, PersistenceError
from persistence.sealer import Sealer

_log = logging.getLogger("persistence.disk")


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
    }.get(error.errno or 0)
    if what is None:  # it is not the directory's fault as a whole
        what = error.strerror or str(error)
        if isinstance(error.filename, str) and os.path.dirname(error.filename) == directory:
            return _in_the_way(directory, os.path.basename(error.filename), error)
    return DirectoryNotUsable(
        f"{directory} cannot be used: {what}; nothing was changed; choose another disk.path"
    )


def _in_the_way(directory: str, name: str, error: OSError) -> PersistenceError:
    """Return the error to raise when one file of a directory cannot be used."""
    what = {
        errno.EISDIR: "a directory is in the place of this file",
        errno.EINVAL: error.strerror,  # no regular file; see `files`
        errno.ENOENT: "it is a link that leads nowhere, or was removed this moment",
        errno.ELOOP: "it is a link that leads to itself",
    }.get(error.errno or 0)
    way_out = "look at it" if what is None else "move it away"
    return DirectoryNotUsable(
        f"{directory} cannot be used: {name!a}: {what or error.strerror}; nothing was changed; "
        f"{way_out}, or choose another disk.path"
    )


def make_directory(files: Files, directory: str) -> None:
    """Create `directory` and its parents where they are missing, durably."""
    missing = []
    path = os.path.abspath(directory)
    while not files.exists(path):
        missing.append(path)
        path = os.path.dirname(path)
    for parent in reversed(missing[1:]):  # one by one: the system's own way is recursive
        files.make_directory(parent)
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
    if MANIFEST in names or MANIFEST_COPY in names:
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


def check_keys(directory: str, manifest: Manifest, sealer: Sealer | None) -> None:
    """Refuse a directory that cannot be read, or written to, with these keys.

    Raises:
        DirectoryNotUsable: a key is missing, or it is encrypted and should not be, or the other
            way round. Nothing is changed.
    """
    if sealer is None:
        if manifest.keys:
            names = ", ".join(each.hex() for each in manifest.keys_in_use)
            raise DirectoryNotUsable(
                f"{directory} is encrypted (key {names}) and security.encrypt is off; nothing was "
                "changed; turn it on, and give the keys with security.key_file or "
                "security.secret_keys ('--key-file FILE' for commands)"
            )
        return
    if not manifest.keys:
        raise DirectoryNotUsable(
            f"{directory} is not encrypted and security.encrypt is on; nothing was changed; "
            "'persistence export' it, and import it into a new directory with '--key-file FILE'"
        )
    missing = [each.hex() for each in manifest.keys_in_use if not sealer.knows(each)]
    if missing:
        raise DirectoryNotUsable(
            f"{directory} is encrypted with key {', '.join(missing)}, which is not among the keys "
            "given; nothing was changed; add it to security.key_file or security.secret_keys, in "
            "front of the newest"
        )


def open_manifest(
    files: Files, directory: str, sealer: Sealer | None = None
) -> tuple[Manifest, str | None]:
    """Return the manifest, making a fresh one in a directory that is new or empty.

    Where the manifest was damaged and its copy was used, also what was wrong with it; it is whole
    again by then.

    Raises:
        DirectoryNotUsable: other format, damaged manifest, segments without a manifest,
            files that are not ours, or other keys. Nothing is changed.
    """
    if any(files.exists(f"{directory}/{name}") for name in (MANIFEST, MANIFEST_COPY)):
        manifest, defect = read_manifest(files, directory)
        check_keys(directory, manifest, sealer)
        _agree(files, directory, manifest, defect)
        if not any(parse_segment(name) is not None for name in files.list_directory(directory)):
            # Whoever wrote it may have got no further, and a segment must not outlive it.
            files.sync_directory(directory)
            _sync_name(files, directory)
        return manifest, defect
    check_ours(files, directory)
    manifest = Manifest.fresh(None if sealer is None else sealer.newest)
    write_manifest(files, directory, manifest)
    _sync_name(files, directory)
    return manifest, None


def _sync_name(files: Files, directory: str) -> None:
    """Make the directory's own name durable: who made it may have died before it was.

    A parent that we may not read is not of our making.
    """
    with suppress(PermissionError):
        files.sync_directory(os.path.dirname(os.path.abspath(directory)))


def _agree(files: Files, directory: str, manifest: Manifest, defect: str | None) -> None:
    """Let both copies say the same before anything is removed on the word of one of them.

    A crash may have come between the one and the other. The first must be whole; the second is
    better not there than wrong.
    """
    if defect is not None:
        _log.error("%s/%s: %s", directory, MANIFEST, defect)
        _write_one(files, directory, MANIFEST, manifest)
    try:
        data = read_all(files, f"{directory}/{MANIFEST_COPY}")
    except OSError:
        data = b""
    if data != encode_manifest(manifest):
        _write_copy(files, directory, manifest)


def read_manifest(files: Files, directory: str) -> tuple[Manifest, str | None]:
    """Read and check the manifest, or its copy where it is damaged or lost.

    Returns:
        The manifest, and what is wrong with the first if it is that of the copy.

    Raises:
        DirectoryNotUsable: both are missing or damaged, or it is of a other format.
        OSError: it cannot be read.
    """
    try:
        return _read_one(files, directory, MANIFEST), None
    except _Unusable as first:
        try:
            manifest = _read_one(files, directory, MANIFEST_COPY)
        except _Unusable:
            raise first.refusal from None
        return manifest, f"{first}; its copy {MANIFEST_COPY} was used"


class _Unusable(Exception):
    """A manifest is missing or damaged."""

    def __init__(self, reason: str, refusal: DirectoryNotUsable) -> None:
        super().__init__(reason)
        self.refusal = refusal


def _read_one(files: Files, directory: str, name: str) -> Manifest:
    path = f"{directory}/{name}"
    try:
        return decode_manifest(read_all(files, path))
    except FileNotFoundError:
        refusal = DirectoryNotUsable(
            f"{directory} has no {MANIFEST}: it is not a directory of this library"
        )
        raise _Unusable("the manifest is missing", refusal) from None
    except OtherFormat as error:
        raise DirectoryNotUsable(f"{path}: {error}; nothing was changed") from None
    except (MalformedManifest, ValueError) as error:
        refusal = DirectoryNotUsable(
            f"{path} is damaged ({error}); nothing was changed; restore it from a copy"
        )
        raise _Unusable(f"the manifest is damaged ({error})", refusal) from None


def write_manifest(files: Files, directory: str, manifest: Manifest) -> None:
    """Replace the manifest, atomically and durably, and then its copy.

    The first is the moment of truth. Only after this returns may anything that it drops be
    unlinked, so that the copy never names what is gone.
    """
    _write_one(files, directory, MANIFEST, manifest)
    _write_copy(files, directory, manifest)


def _write_one(files: Files, directory: str, name: str, manifest: Manifest) -> None:
    replace_file(files, directory, name, temporary_name(name), encode_manifest(manifest))


def _write_copy(files: Files, directory: str, manifest: Manifest) -> None:
    """Replace the second copy. Where that fails there is none: an old one would be wrong."""
    try:
        _write_one(files, directory, MANIFEST_COPY, manifest)
    except OSError as error:
        _log.warning("%s/%s: not written: %s", directory, MANIFEST_COPY, error.strerror)
        with suppress(OSError):
            files.remove(f"{directory}/{MANIFEST_COPY}")
            files.sync_directory(directory)
