"""What has been shipped: a small durable record of the directory's newest checkpoint.

An incremental checkpoint ships what was written behind the newest one's cut. Puts are found there
as long as their sessions exist; tombstones would be dropped by compaction once they hide nothing,
so compaction keeps those behind `ShippedRecord.sequence`.

The record lies in the directory, not in the store: whoever goes back to an older copy of the
directory goes back to that copy's record as well, and nothing written since is missed. It is
written only after the checkpoint has been published; a crash in between makes the next checkpoint
start from the one before. Without a record, or with a damaged one, the next checkpoint is full.

One that cannot be read now may be read by the next life of the worker, whose checkpoint then goes
on from it. So as long as it is there, all tombstones are kept.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from crc32c import crc32c

from persistence.disk.compaction import NOTHING_TO_SHIP
from persistence.disk.filenames import SHIPPED, temporary_name
from persistence.disk.files import Files, read_all, replace_file
from persistence.disk.threads import Threads

_log = logging.getLogger("persistence.disk")

_FORMAT_VERSION: Final = 1


class Shipped(NamedTuple):
    """The newest checkpoint of a directory.

    Attributes:
        store: where it is (`CheckpointStore.name`).
        id: its id there.
        sequence: everything in the log up to this sequence number is in it.
    """

    store: str
    id: str
    sequence: int


def encode_shipped(shipped: Shipped) -> bytes:
    """Encode the record: one line of JSON, and its CRC-32C in a second."""
    body = json.dumps({"format_version": _FORMAT_VERSION, **shipped._asdict()}).encode()
    return body + b"\n%08x\n" % crc32c(body)


def decode_shipped(data: bytes) -> Shipped | None:
    """Decode the record; None when it is damaged, or of another format version."""
    body, _, rest = data.partition(b"\n")
    if rest != b"%08x\n" % crc32c(body):
        return None
    try:
        entries = json.loads(body)
        if entries.pop("format_version") != _FORMAT_VERSION:
            return None
        return Shipped(str(entries["store"]), str(entries["id"]), int(entries["sequence"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


class ShippedRecord:
    """The record of one directory. Used from the event loop; files are touched in a thread.

    Attributes:
        newest: what it says; None: there is no checkpoint to go on from.
    """

    def __init__(self, files: Files, directory: str, threads: Threads) -> None:
        self._files = files
        self._directory = directory
        self._threads = threads
        self._underway: int | None = None
        self._is_unreadable = False
        self.newest: Shipped | None = None

    @property
    def sequence(self) -> int:
        """Tombstones behind this are kept for the next checkpoint."""
        if self.newest is not None:
            return self.newest.sequence
        if self._is_unreadable:
            return 0
        return NOTHING_TO_SHIP if self._underway is None else self._underway

    async def load(self) -> None:
        """Read the record. What cannot be read is as good as none: the next one is full."""
        try:
            self.newest = await self._threads.read(_read, self._files, self._directory)
        except FileNotFoundError:
            return
        except OSError as error:
            _log.warning("%s/%s cannot be read: %s", self._directory, SHIPPED, error.strerror)
        self._is_unreadable = self.newest is None

    @contextmanager
    def keeping(self, sequence: int) -> Iterator[None]:
        """Keep tombstones behind `sequence` while the checkpoint cut there is being made."""
        self._underway = sequence
        try:
            yield
        finally:
            self._underway = None

    async def advance(self, shipped: Shipped) -> None:
        """Remember a checkpoint that has been published.

        Raises:
            OSError: the record was not written; the next checkpoint repeats what this one ships.
        """
        await self._threads.read(
            replace_file,
            self._files,
            self._directory,
            SHIPPED,
            temporary_name(SHIPPED),
            encode_shipped(shipped),
        )
        self.newest = shipped
        self._is_unreadable = False

    async def give_up(self) -> None:
        """Forget the newest checkpoint, durably: the next one is full."""
        is_there = self.newest is not None or self._is_unreadable
        if not is_there or self._underway is not None:
            return
        await self._threads.read(_remove, self._files, self._directory)
        self.newest = None
        self._is_unreadable = False


def _read(files: Files, directory: str) -> Shipped | None:
    return decode_shipped(read_all(files, f"{directory}/{SHIPPED}"))


def _remove(files: Files, directory: str) -> None:
    files.remove(f"{directory}/{SHIPPED}")
    files.sync_directory(directory)
