"""What a power loss leaves of what was not synced: nothing, a beginning, or any part of it.

A change is what one call did: to the data of a file, or to names. Each has a place in the order of
all changes. Disks keep that order (`Beginning`), or they do not (`Scattered`); they tear a write
between two sectors, or, for what nobody promises, anywhere (`torn_at_bytes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

SECTOR_BYTES: Final = 512

T = TypeVar("T")


class Change(NamedTuple):
    """A pending change of a file's data.

    Attributes:
        order: its place among all changes.
        offset: where; with no `data`, the size to which the file was cut.
        data: what was written.
    """

    order: int
    offset: int
    data: bytes | None


class Names(NamedTuple, Generic[T]):
    """A pending change of a directory, atomic: each path names this file now, or None: nothing."""

    order: int
    files: dict[str, T | None]


class Loss(Protocol):
    """Says what is left of what was not synced. Asked once for each, in a fixed order."""

    def keeps_names(self, order: int) -> bool:
        """Whether a change of names is left."""

    def keeps_directory(self, path: str) -> bool:
        """Whether a new directory is left."""

    def left_of(self, durable: bytes | bytearray, pending: Sequence[Change]) -> bytearray:
        """Return the content of a file, given what of it is durable and what was done since."""


class Nothing:
    """Nothing is left that was not synced."""

    def keeps_names(self, order: int) -> bool:
        return False

    def keeps_directory(self, path: str) -> bool:
        return False

    def left_of(self, durable: bytes | bytearray, pending: Sequence[Change]) -> bytearray:
        return bytearray(durable)


class Beginning:
    """The first changes are left, in the order in which they were made, and a part of the last one.

    Args:
        last: order of the last change that is left.
        part: how much of that one is, if it is a write; at any byte.
    """

    def __init__(self, last: int, part: float = 1.0) -> None:
        self._last = last
        self._part = part

    def keeps_names(self, order: int) -> bool:
        return order <= self._last

    def keeps_directory(self, path: str) -> bool:
        return True

    def left_of(self, durable: bytes | bytearray, pending: Sequence[Change]) -> bytearray:
        left = bytearray(durable)
        for change in pending:
            if change.order < self._last or change.data is None:
                if change.order <= self._last:
                    apply_change(left, change)
            elif change.order == self._last:
                taken = change.data[: round(len(change.data) * self._part)]
                apply_change(left, change._replace(data=taken))
        return left


class Scattered:
    """Each change is left or lost by chance, independently of the others; of writes each piece is.

    Args:
        random: decides.
        torn_at_bytes: pieces end anywhere; else where sectors do.
        odds: how probable it is that something is left.
    """

    def __init__(self, random: Random, *, torn_at_bytes: bool = False, odds: float = 0.5) -> None:
        self._random = random
        self._torn_at_bytes = torn_at_bytes
        self._odds = odds

    def _keeps(self) -> bool:
        return self._random.random() < self._odds

    def keeps_names(self, order: int) -> bool:
        return self._keeps()

    def keeps_directory(self, path: str) -> bool:
        return self._keeps()

    def left_of(self, durable: bytes | bytearray, pending: Sequence[Change]) -> bytearray:
        left = bytearray(durable)
        for change in pending:
            if change.data is None:
                if self._keeps():
                    apply_change(left, change)
                continue
            for start, end in self._pieces(change.offset, len(change.data)):
                if self._keeps():
                    piece = change.data[start:end]
                    apply_change(left, change._replace(offset=change.offset + start, data=piece))
        return left

    def _pieces(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        at = 0
        while at < size:
            if self._torn_at_bytes:
                end = at + self._random.randint(1, 2 * SECTOR_BYTES)
            else:
                end = (offset + at) // SECTOR_BYTES * SECTOR_BYTES + SECTOR_BYTES - offset
            yield at, min(end, size)
            at = end


def rename(names: dict[str, T], change: Names[T]) -> None:
    """Do to `names` what `change` says."""
    for path, file in change.files.items():
        if file is None:
            names.pop(path, None)
        else:
            names[path] = file


def apply_change(data: bytearray, change: Change) -> None:
    """Do to `data` what `change` says."""
    if change.data is None:
        del data[change.offset :]
        data.extend(bytes(change.offset - len(data)))
    else:
        data.extend(bytes(max(0, change.offset - len(data))))
        data[change.offset : change.offset + len(change.data)] = change.data
