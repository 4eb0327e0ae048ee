"""Checkpoints in a directory: a file per chunk, a file per manifest.

Every file is written under a temporary name, synced, renamed, and its directory synced, so that a
manifest that is there was written after chunks that are there. Names are made of checkpoint ids,
which have one fixed form (`manifest.is_id`), and numbers; nothing else in the directory is touched.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

from persistence.checkpoint.manifest import is_id
from persistence.checkpoint.stores import ChunkKey, ChunkMissing, ChunkUnreadable
from persistence.disk.directory import make_directory
from persistence.disk.filenames import TEMPORARY_SUFFIX, temporary_name
from persistence.disk.files import NO_SPACE, Files, read_all, replace_file
from persistence.disk.threads import Threads, undisturbed
from persistence.errors import DirectoryNotUsable, DiskFull

_log = logging.getLogger("persistence.checkpoint")

T = TypeVar("T")

_MANIFEST_SUFFIX: Final = ".manifest"
_CHUNK: Final = re.compile(r"(.+)\.(\d{6,10})\.chunk", re.ASCII)
# What the system says when one file is damaged, or no file. Not when it is the process (too many
# open files), the user or the whole file system: then it would be read another time.
_DAMAGED: Final = frozenset(
    {
        errno.EIO,
        errno.EINVAL,  # not a regular file
        errno.EISDIR,
        errno.ENXIO,
        errno.ELOOP,
        errno.EBADMSG,
        errno.EILSEQ,
        errno.ENODATA,
        *(getattr(errno, name) for name in ("EUCLEAN", "EREMOTEIO") if hasattr(errno, name)),
    }
)


def beside(disk_path: str) -> str:
    """Return the directory for the checkpoints of the log in `disk_path`: its neighbour."""
    return disk_path.rstrip("/") + "-checkpoints"


def chunk_name(key: ChunkKey) -> str:
    """Return the file name of a chunk."""
    assert is_id(key.checkpoint), key
    return f"{key.checkpoint}.{key.number:06d}.chunk"


def manifest_name(checkpoint_id: str) -> str:
    """Return the file name of a manifest."""
    assert is_id(checkpoint_id), checkpoint_id
    return checkpoint_id + _MANIFEST_SUFFIX


class DirectoryStore:
    """Checkpoints in `directory`, which is made when the first one is. See `CheckpointStore`.

    Args:
        directory: where; several workers may share it.
        threads: where files are touched.
        files: system calls on files.
    """

    def __init__(self, directory: str, threads: Threads, files: Files | None = None) -> None:
        self._directory = directory
        self._threads = threads
        self._files = files or Files()

    @property
    def name(self) -> str:
        """`directory:` and the path."""
        return f"directory:{self._directory}"

    async def put_chunk(self, key: ChunkKey, data: bytes) -> None:
        """Keep a chunk, durably."""
        await self._run(self._write, chunk_name(key), data)

    async def get_chunk(self, key: ChunkKey) -> bytes:
        """Return a chunk."""
        return await self._run(self._read_chunk, chunk_name(key))

    async def chunk_bytes(self, keys: Sequence[ChunkKey]) -> list[int]:
        """Return the length of each chunk, 0 for one that is missing or cannot be read."""
        return await self._run(self._sizes, [chunk_name(key) for key in keys])

    async def publish(self, checkpoint_id: str, manifest: bytes) -> None:
        """Keep a manifest, durably and atomically."""
        await self._run(self._write, manifest_name(checkpoint_id), manifest)

    async def manifests(self) -> dict[str, bytes]:
        """Return every manifest by its id."""
        return await self._run(self._read_manifests)

    async def withdraw(self, checkpoint_id: str) -> bool:
        """Remove a manifest, durably; return whether it was there."""
        return await self._run(self._remove_manifest, manifest_name(checkpoint_id))

    async def chunks(self) -> list[ChunkKey]:
        """Return the keys of all chunks; of half-written ones too."""
        return await self._run(self._list_chunks)

    async def remove_chunks(self, keys: Iterable[ChunkKey]) -> None:
        """Remove chunks, and what is left of half-written ones."""
        names = [chunk_name(key) for key in keys]
        await self._run(self._remove_chunks, [*names, *map(temporary_name, names)])

    # --- in a thread --------------------------------------------------------------------------

    async def _run(self, call: Callable[..., T], *args: Any) -> T:
        try:
            return await undisturbed(self._threads.read(call, *args))
        except OSError as error:
            name = f" ({error.filename!a})" if isinstance(error.filename, str) else ""
            what = f"checkpoints in {self._directory}: {error.strerror}{name}"
            if error.errno in NO_SPACE:
                raise DiskFull(f"{what}; free some space") from error
            raise DirectoryNotUsable(f"{what}; look at checkpoint.store") from error

    def _path(self, name: str) -> str:
        return f"{self._directory}/{name}"

    def _write(self, name: str, data: bytes) -> None:
        if not self._files.exists(self._directory):
            make_directory(self._files, self._directory)
        replace_file(self._files, self._directory, name, temporary_name(name), data)

    def _names(self) -> list[str]:
        try:
            return self._files.list_directory(self._directory)
        except FileNotFoundError:
            return []

    def _read_chunk(self, name: str) -> bytes:
        try:
            return read_all(self._files, self._path(name))
        except FileNotFoundError:
            raise ChunkMissing(self._path(name)) from None
        except OSError as error:
            if error.errno not in _DAMAGED:
                raise
            raise ChunkUnreadable(f"{self._path(name)}: {error.strerror}") from error

    def _sizes(self, names: list[str]) -> list[int]:
        return [self._size(self._path(name)) for name in names]

    def _size(self, path: str) -> int:
        try:
            fd = self._files.open_read(path)
            try:
                return self._files.size(fd)
            finally:
                self._files.close(fd)
        except OSError as error:
            if error.errno != errno.ENOENT and error.errno not in _DAMAGED:
                raise
            return 0

    def _read_manifests(self) -> dict[str, bytes]:
        found = {}
        for name in self._names():
            checkpoint_id = name.removesuffix(_MANIFEST_SUFFIX)
            if name != checkpoint_id and is_id(checkpoint_id):
                try:
                    found[checkpoint_id] = read_all(self._files, self._path(name))
                except OSError as error:
                    if error.errno in _DAMAGED:
                        found[checkpoint_id] = b""  # it is there, and cannot be read
                    elif error.errno != errno.ENOENT:
                        raise
        return found

    def _list_chunks(self) -> list[ChunkKey]:
        keys = set()
        for name in self._names():
            match = _CHUNK.fullmatch(name.removesuffix(TEMPORARY_SUFFIX))
            if match is not None and is_id(match[1]):
                keys.add(ChunkKey(match[1], int(match[2])))
        return sorted(keys)

    def _remove_manifest(self, name: str) -> bool:
        if not self._files.exists(self._path(name)):
            return False
        self._files.remove(self._path(name))
        self._files.sync_directory(self._directory)
        return True

    def _remove_chunks(self, names: list[str]) -> None:
        found = [name for name in names if self._files.exists(self._path(name))]
        for name in found:
            try:
                self._files.remove(self._path(name))
            except IsADirectoryError:
                # Not of our making. It must not keep the next checkpoint from being made.
                _log.warning("%s is a directory and no chunk: it is kept", self._path(name))
        if found:
            self._files.sync_directory(self._directory)
