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

from persistence.config import RedisConfig
from persistence.errors import printable
from persistence.remote.contract import (
    APPLIED,
    CommitResult,
    Outcome,
    Request,
)
from persistence.remote.exchanges import Lost
from persistence.remote.postgres_calls import PostgresCalls, Settled
from persistence.remote.postgres_faults import explain, unknown
from persistence.remote.postgres_rows import Row, RowCodec, decode_stored
from persistence.remote.postgres_schema import COMMIT

_REQUESTS_PER_RUN: Final = 256
_BYTES_PER_RUN: Final = 2**20
_LOST_TIMEOUTS: Final = 3
_APPLIED: Final = "A"
_FORGOTTEN: Final = Settled(
    None, Lost("too much has happened since an answer was lost to tell if it was applied"), True
)
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


class PostgresCommitter:
    """Commits for one tier.

    Args:
        calls: sends.
        space: the namespace, as it is in the tables.
        channel: where commits are announced.
        worker: the id to announce them under.
        codec: makes rows of requests.
        config: ``timeout_seconds``, ``tombstone_seconds``.
        where: the tier, for messages.
    """

    def __init__(
        self,
        calls: PostgresCalls,
        space: str,
        channel: str,
        worker: bytes,
        codec: RowCodec,
        *,
        config: RedisConfig,
        where: str,
    ) -> None:
        self._calls = calls
        self._codec = codec
        self._where = where
        self._first = (space, channel, worker.hex(), config.tombstone_seconds)
        self._lost_seconds = _LOST_TIMEOUTS * config.timeout_seconds
        self._turn = asyncio.Lock()

    async def commit(self, requests: Sequence[Request]) -> list[CommitResult]:
        """Apply `requests` in order; return the outcome of each."""
        results = [APPLIED] * len(requests)
        rows = [self._codec.row_of(request) for request in requests]
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

    async def _run(self, rows: list[Row]) -> Settled:
        columns = [list(column) for column in zip(*rows, strict=True)]
        return await self._calls.settle(
            _STATEMENT,
            *self._first,
            *columns,
            lost_seconds=self._lost_seconds,
            payload_bytes=sum(map(_size, rows)),
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
                if settled.was_lost and results[index].may_be_forgotten:
                    results[index] = self._failed(requests[index], _FORGOTTEN)

    def _failed(self, request: Request, settled: Settled) -> CommitResult:
        doing = f"commit session {printable(request.session_id)}"
        error = settled.error
        assert error is not None, "it has no rows"
        if settled.was_lost:
            return CommitResult(Outcome.UNKNOWN, None, unknown(error, doing))
        return CommitResult(Outcome.REFUSED, None, explain(error, self._where, doing))


def _answered(row: Any) -> CommitResult:
    """Return the outcome that the function gave to a request that it did not just apply."""
    code, kind, version, incarnation, commit, is_forgotten = row
    stored = None if kind is None else decode_stored(kind, version, incarnation, commit)
    return CommitResult(_CODES[code], stored, may_be_forgotten=is_forgotten)


def _size(row: Row) -> int:
    """Return about how many bytes a row takes."""
    record = row[6]
    return 0 if record is None else len(record)


def _groups(rows: Sequence[Row], order: list[int]) -> Iterator[list[int]]:
    """Yield the indexes of what goes into one run each."""
    group: list[int] = []
    room = _BYTES_PER_RUN
    for index in order:
        size = _size(rows[index])
        if group and (len(group) == _REQUESTS_PER_RUN or size > room):
            yield group
            group, room = [], _BYTES_PER_RUN
        group.append(index)
        room -= size
    if group:
        yield group
