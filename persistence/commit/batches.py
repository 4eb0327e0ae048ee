"""How batches are put together and taken apart. Pure, over commits."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

from persistence.commit.commits import Commit

THREAD_ENCODE_BYTES: Final = 128 * 1024
"""What is to be encoded in a thread: compressing and checksumming it would be a stall, and both let
go of the interpreter lock."""
_PIECE_COMMITS: Final = 32
_WOKEN_COMMITS: Final = 8  # in one turn of the loop: each wakes a task that may have much to do
_JOINED_BYTES: Final = 2**20


def next_batch(queue: Iterable[Commit], max_bytes: int) -> list[Commit]:
    """Return the next batch, which stays in the queue: as much as fits, at least one."""
    batch: list[Commit] = []
    nbytes = 0
    for commit in queue:
        nbytes += commit.nbytes
        if batch and nbytes > max_bytes:
            break
        batch.append(commit)
    return batch


def remove_first(queue: deque[Commit], count: int) -> None:
    """Remove the first `count` commits."""
    for _ in range(count):
        queue.popleft()


def take_out(queue: deque[Commit], sessions: set[str], first: int) -> list[Commit]:
    """Remove the commits of `sessions` that came after number `first`; return them."""
    taken = [commit for commit in queue if commit.session_id in sessions and commit.number > first]
    if taken:
        kept = [
            commit
            for commit in queue
            if commit.session_id not in sessions or commit.number <= first
        ]
        queue.clear()
        queue.extend(kept)
    return taken


def joined(chunks: list[bytes]) -> list[bytes]:
    """Return a batch in one chunk, unless it is so large that copying it would be felt.

    Each chunk is a system call of the writer thread, and after each it may have to wait for the
    interpreter lock.
    """
    if len(chunks) > 1 and sum(map(len, chunks)) <= _JOINED_BYTES:
        return [b"".join(chunks)]
    return chunks


def woken_together(batch: list[Commit]) -> Iterator[list[Commit]]:
    """Split a batch into pieces that wake `_WOKEN_COMMITS` tasks at most; a spill wakes none."""
    start = waiting = 0
    for end, commit in enumerate(batch):
        if waiting == _WOKEN_COMMITS or end - start == _PIECE_COMMITS:
            yield batch[start:end]
            start, waiting = end, 0
        if commit.done is not None:
            waiting += 1
    yield batch[start:]


def pieces(batch: list[Commit]) -> Iterator[list[Commit]]:
    """Split a batch into pieces that are encoded at once; a large commit is one of its own."""
    for start in range(0, len(batch), _PIECE_COMMITS):
        some = batch[start : start + _PIECE_COMMITS]
        if sum([commit.nbytes for commit in some]) < THREAD_ENCODE_BYTES:
            yield some
        else:
            yield from _by_size(some)


def _by_size(batch: list[Commit]) -> Iterator[list[Commit]]:
    """The same for commits that are too large to be encoded all at once."""
    piece: list[Commit] = []
    nbytes = 0
    for commit in batch:
        if piece and nbytes + commit.nbytes >= THREAD_ENCODE_BYTES:
            yield piece
            piece, nbytes = [], 0
        piece.append(commit)
        nbytes += commit.nbytes
    if piece:
        yield piece
