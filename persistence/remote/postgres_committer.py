"""Commits batches to PostgreSQL.

A batch becomes one run of the function in ``sql/commit.sql`` for every 256 requests: one statement,
one transaction, one round trip.

Invariants:
- What is sent twice is idempotent, by commit ids (see ``sql/commit.sql``).
- A run whose answer is lost is sent again until its outcome is known. When that does not succeed
  within three timeouts, the outcome is UNKNOWN, never "not applied", and nothing behind it is sent.
- Batches take turns, and within a batch requests of one session keep their order; so they are
  applied in the order of the calls.
- Requests are sorted by session id, so transactions lock rows in one order and never deadlock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any, Final

from crc32c import crc32c

from persistence import record as rec
from persistence.config import RedisConfig
from persistence.errors import printable
from persistence.record import ID_BYTES, NEVER, NO_ID
from persistence.remote.contract import (
    APPLIED,
    CommitResult,
    Delete,
    Outcome,
    Put,
    Request,
    Stored,
    Touch,
)
from persistence.remote.postgres_calls import PostgresCalls, Settled
from persistence.remote.postgres_faults import explain, unknown
from persistence.remote.postgres_schema import COMMIT

_REQUESTS_PER_RUN: Final = 256
_BYTES_PER_RUN: Final = 2**20
_LOST_TIMEOUTS: Final = 3
_LIVES: Final = "L"
_APPLIED: Final = "A"
_CODES: Final = {
    "D": Outcome.ALREADY_APPLIED,
    "C": Outcome.CONFLICT,
    "X": Outcome.TERMINATED,
    "M": Outcome.MISSING,
}
# The name is a constant, and everything else a parameter.
_STATEMENT: Final = (
    f"SELECT * FROM {COMMIT}($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)"  # noqa: S608
)

_Row = tuple[str, bytes, bytes, bytes, bytes, int, bytes | None, int, float, float, float]


def id_bytes(session_id: str) -> bytes:
    """Return a session id as it is in the tables."""
    assert session_id, "the empty id is the epoch's"
    return session_id.encode()


def decode_stored(kind: str, version: int, incarnation: bytes, commit: bytes) -> Stored:
    """Return what a row says of a session."""
    return Stored(kind == _LIVES, version, incarnation, commit)


class PostgresCommitter:
    """Commits for one tier.

    Args:
        calls: sends.
        space: the namespace, as it is in the tables.
        channel: where commits are announced.
        worker: the id to announce them under.
        config: ``timeout_seconds``, ``tombstone_seconds``.
        where: the tier, for messages.
    """

    def __init__(
        self,
        calls: PostgresCalls,
        space: str,
        channel: str,
        worker: bytes,
        *,
        config: RedisConfig,
        where: str,
    ) -> None:
        self._calls = calls
        self._where = where
        self._first = (space, channel, worker.hex(), config.tombstone_seconds)
        self._lost_seconds = _LOST_TIMEOUTS * config.timeout_seconds
        self._turn = asyncio.Lock()

    async def commit(self, requests: Sequence[Request]) -> list[CommitResult]:
        """Apply `requests` in order; return the outcome of each."""
        results = [APPLIED] * len(requests)
        rows = [_row_of(request) for request in requests]
        order = sorted(range(len(rows)), key=lambda index: rows[index][1])  # it keeps equal ones
        async with self._turn:
            settled: Settled | None = None
            for group in _groups(rows, order):
                if settled is None or settled.rows is not None:
                    settled = await self._run([rows[index] for index in group])
                elif settled.was_lost:  # this one was not sent
                    settled = settled._replace(was_lost=False)
                self._note(requests, group, settled, results)
        return results

    async def _run(self, rows: list[_Row]) -> Settled:
        columns = [list(column) for column in zip(*rows, strict=True)]
        return await self._calls.settle(
            _STATEMENT, *self._first, *columns, lost_seconds=self._lost_seconds
        )

    def _note(
        self,
        requests: Sequence[Request],
        group: list[int],
        settled: Settled,
        results: list[CommitResult],
    ) -> None:
        """Write down what became of one run."""
        if settled.rows is None:
            for index in group:
                results[index] = self._failed(requests[index], settled)
            return
        for index, row in zip(group, settled.rows, strict=True):
            code = row[0]
            if code != _APPLIED:
                results[index] = _answered(row)

    def _failed(self, request: Request, settled: Settled) -> CommitResult:
        doing = f"commit session {printable(request.session_id)}"
        error = settled.error
        assert error is not None, "it has no rows"
        if settled.was_lost:
            return CommitResult(Outcome.UNKNOWN, None, unknown(error, doing))
        return CommitResult(Outcome.REFUSED, None, explain(error, self._where, doing))


def _answered(row: Any) -> CommitResult:
    """Return the outcome that the function gave to a request that it did not just apply."""
    code, kind, version, incarnation, commit = row
    stored = None if kind is None else decode_stored(kind, version, incarnation, commit)
    return CommitResult(_CODES[code], stored)


def _row_of(request: Request) -> _Row:
    """Return a request as the function takes it."""
    key = id_bytes(request.session_id)
    if type(request) is Put:
        _, record, base, accessed, deadline, cap, *_ = request
        kind = "C" if base == NO_ID else "P"
        incarnation, commit = record[:ID_BYTES], record[ID_BYTES : 2 * ID_BYTES]
        version, checksum = rec.version_of(record), crc32c(record)
        return (
            kind, key, commit, base, incarnation, version, record, checksum, accessed, deadline, cap
        )  # fmt: skip
    if type(request) is Delete:
        _, commit, incarnation, base = request
        return "D", key, commit, base, incarnation, 0, None, 0, 0.0, 0.0, NEVER
    assert type(request) is Touch, "there are three kinds of requests"
    _, commit, accessed, deadline = request
    return "T", key, commit, NO_ID, NO_ID, 0, None, 0, accessed, deadline, NEVER


def _groups(rows: Sequence[_Row], order: list[int]) -> Iterator[list[int]]:
    """Yield the indexes of what goes into one run each."""
    group: list[int] = []
    room = _BYTES_PER_RUN
    for index in order:
        record = rows[index][6]
        size = 0 if record is None else len(record)
        if group and (len(group) == _REQUESTS_PER_RUN or size > room):
            yield group
            group, room = [], _BYTES_PER_RUN
        group.append(index)
        room -= size
    if group:
        yield group
