"""Commits batches to Redis.

A batch becomes one run of ``scripts/commit.lua`` for every 128 sessions; on Cluster one for each
slot. All runs are sent before the first reply is awaited: one round trip.

Invariants:
- What is sent twice is idempotent, by commit ids (see `scripts/commit.lua`).
- A commit whose reply is lost is sent again until its outcome is known. When that does not succeed
  within three timeouts, the outcome is UNKNOWN, never "not applied".
- Batches take turns, so requests of one session are applied in the order of the calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from persistence.config import RedisConfig
from persistence.errors import PersistenceError, RemoteDamaged, printable
from persistence.remote.contract import (
    APPLIED,
    CommitResult,
    Outcome,
    Put,
    Request,
)
from persistence.remote.exchanges import Lost
from persistence.remote.faults import (
    code_in,
    explain,
    explain_key,
    explain_text,
    stopped_a_script,
    unknown,
)
from persistence.remote.keys import Keys
from persistence.remote.layout import (
    APPLIED_CODE,
    CODES,
    DETAILED,
    FOREIGN_CODE,
    FORGOTTEN,
    STATE_BYTES,
    decode_state,
    pack_requests,
)
from persistence.remote.router import Router, Script, ScriptCall, Settled
from persistence.sealer import Sealer

REQUESTS_PER_CALL: Final = 128
"""One run of a script blocks Redis for everybody: this many sessions take about a millisecond."""
_BYTES_PER_CALL: Final = 2**20
_SMALL_REQUEST_BYTES: Final = 64
_LOST_TIMEOUTS: Final = 3
_READONLY: Final = "READONLY"


class Committer:
    """Commits for one tier.

    Args:
        router: sends.
        keys: names of keys and channels.
        worker: the id to announce commits under.
        config: ``timeout_seconds``, ``tombstone_seconds``.
        where: the tier, for messages.
        sealer: seals values; None: they are sent as they are.
    """

    def __init__(
        self,
        router: Router,
        keys: Keys,
        worker: bytes,
        *,
        config: RedisConfig,
        where: str,
        sealer: Sealer | None = None,
    ) -> None:
        self._sealer = sealer
        self._router = router
        self._keys = keys
        self._where = where
        self._script = Script("commit.lua")
        self._announcing = (keys.commits, worker, b"%d" % len(keys.session_prefix))
        self._tombstone_ms = config.tombstone_seconds * 1000
        self._lost_seconds = _LOST_TIMEOUTS * config.timeout_seconds
        self._turn = asyncio.Lock()

    async def commit(self, requests: Sequence[Request]) -> list[CommitResult]:
        """Apply `requests` in order; return the outcome of each."""
        if not requests:
            return []
        results = [APPLIED] * len(requests)
        keys = [self._keys.session(request.session_id) for request in requests]
        async with self._turn:
            todo = list(range(len(requests)))
            await self._send(requests, keys, todo, results)
            # A primary that was demoted says so for each key; look for the new one, once.
            todo = [index for index in todo if _is_readonly(results[index])]
            if todo and await self._router.rediscover():
                await self._send(requests, keys, todo, results)
        return results

    async def _send(
        self,
        requests: Sequence[Request],
        keys: Sequence[bytes],
        todo: list[int],
        results: list[CommitResult],
    ) -> None:
        groups = self._groups(requests, keys, todo)
        calls = [
            _CommitCall(self, [requests[i] for i in group], [keys[i] for i in group])
            for group in groups
        ]
        settled = await self._router.settle(calls, lost_seconds=self._lost_seconds)
        for group, outcome in zip(groups, settled, strict=True):
            self._note(requests, group, outcome, results)

    def _groups(
        self, requests: Sequence[Request], keys: Sequence[bytes], todo: list[int]
    ) -> list[list[int]]:
        """Return the indexes of what goes into one run of the script each."""
        found = []
        for places in self._router.groups([keys[i] for i in todo], REQUESTS_PER_CALL):
            group = [todo[place] for place in places]
            sizes = _sizes([requests[index] for index in group])
            if sum(sizes) <= _BYTES_PER_CALL:
                found.append(group)
            else:
                found += _split(group, sizes)
        return found

    def arguments(self, requests: Sequence[Request]) -> list[bytes]:
        """Return the arguments of one run of the script."""
        packed = pack_requests(requests, self._tombstone_ms, self._sealer)
        return [*self._announcing, packed.requests, *packed.outside]

    @property
    def script(self) -> Script:
        """The script."""
        return self._script

    # --- outcomes ---------------------------------------------------------------------------------

    def _note(
        self,
        requests: Sequence[Request],
        group: list[int],
        settled: Settled,
        results: list[CommitResult],
    ) -> None:
        """Write down what became of one run of the script."""
        reply, was_lost, is_outdated = settled
        if isinstance(reply, Exception):
            was_lost = was_lost or stopped_a_script(reply)
            for index in group:
                results[index] = self._failed(requests[index], reply, was_lost=was_lost)
            return
        codes = reply[0]
        if codes.count(b"A") == len(group):  # nearly always
            for index in group:
                results[index] = APPLIED
            return
        details = iter(reply[1:])
        for index, code in zip(group, codes, strict=True):
            if code == APPLIED_CODE:
                results[index] = APPLIED
            else:
                detail = next(details) if code in DETAILED else b""
                result = self._answered(requests[index], code, detail)
                doubt = None
                if is_outdated and not result.is_stored:  # it may have been applied since
                    doubt = "it was sent again behind another one, without a reply"
                elif was_lost and result.may_be_forgotten:
                    doubt = "too much has happened since a reply was lost to tell if it was applied"
                if doubt is not None:
                    result = self._failed(requests[index], Lost(doubt), was_lost=True)
                results[index] = result

    def _failed(self, request: Request, reply: Exception, *, was_lost: bool) -> CommitResult:
        """Return the outcome of a request whose run of the script had no result."""
        doing = f"commit session {printable(request.session_id)}"
        if was_lost:
            return CommitResult(Outcome.UNKNOWN, None, unknown(reply, doing))
        return CommitResult(Outcome.REFUSED, None, explain(reply, self._where, doing))

    def _answered(self, request: Request, code: int, detail: bytes | Exception) -> CommitResult:
        """Return the outcome that the script gave to one request."""
        outcome = CODES[bytes([code])]
        if outcome is not Outcome.REFUSED:
            assert isinstance(detail, bytes), "only refusals carry an error"
            if not detail:
                return CommitResult(outcome)
            is_forgotten = detail[STATE_BYTES:] == FORGOTTEN
            return CommitResult(outcome, decode_state(detail), may_be_forgotten=is_forgotten)
        session_id = request.session_id
        key = self._keys.session(session_id).decode("utf-8", "backslashreplace")
        if code == FOREIGN_CODE:
            foreign = RemoteDamaged(key, "somebody else uses this key", session_id)
            return CommitResult(outcome, None, foreign)
        text = detail.decode("utf-8", "replace") if isinstance(detail, bytes) else str(detail)
        known = code_in(text)
        doing = f"commit session {printable(session_id)}"
        error: PersistenceError = explain_key(known, text, key, session_id) or explain_text(
            known, text, self._where, doing
        )
        return CommitResult(outcome, None, error)


class _CommitCall(ScriptCall):
    """One run of the script. Its arguments are made when it is sent, and not kept."""

    __slots__ = ("_committer", "_requests")

    def __init__(
        self, committer: Committer, requests: Sequence[Request], keys: Sequence[bytes]
    ) -> None:
        super().__init__(committer.script, keys, ())
        self._committer = committer
        self._requests = requests

    def pack(self) -> list[bytes]:
        """Return it in the protocol's bytes, in pieces."""
        return ScriptCall(self.script, self.keys, self._committer.arguments(self._requests)).pack()


def _split(group: list[int], sizes: list[int]) -> list[list[int]]:
    """Return `group` in parts of at most `_BYTES_PER_CALL`, or of one."""
    parts: list[list[int]] = []
    room = 0
    for index, size in zip(group, sizes, strict=True):
        if not parts or size > room:
            parts.append([])
            room = _BYTES_PER_CALL
        parts[-1].append(index)
        room -= size
    return parts


def _sizes(requests: list[Request]) -> list[int]:
    """Return about how many bytes each takes."""
    return [
        len(request.record) if type(request) is Put else _SMALL_REQUEST_BYTES
        for request in requests
    ]


def _is_readonly(result: CommitResult) -> bool:
    return result.outcome is Outcome.REFUSED and _READONLY in str(result.error)
