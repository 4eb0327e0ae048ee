"""Brings to the shared tier what it has not seen: branches of the outbox, or everything again.

A branch is delivered as its newest version, on the commit where it began. If the shared tier has
another one by now, the shared state wins and the branch becomes a conflict record. A tier that
lost its content, or fell back to an older one, gets the newest version of what is here: the
highest version of an incarnation wins, because only what was in the tier was ever acknowledged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from functools import partial
from itertools import islice
from typing import Final, NamedTuple

from persistence import record as rec
from persistence.commit import Commit, committed
from persistence.errors import CorruptionError, PersistenceError, RemoteDamaged
from persistence.ids import CommitIds
from persistence.record import NO_ID
from persistence.remote.contract import (
    CommitResult,
    Delete,
    Outcome,
    Put,
    RemoteSession,
    RemoteTier,
    Request,
    Stored,
)
from persistence.sharing.agreement import Agreement
from persistence.sharing.conflicts import Conflict, Conflicts
from persistence.sharing.local import Local
from persistence.sharing.outbox import Branch, Outbox

_log = logging.getLogger("persistence.sharing")

_PER_ROUND: Final = 256
_BYTES_PER_ROUND: Final = 4 * 2**20  # and one more session: what is sent is all in memory
_ENDS_KEPT: Final = 50_000


class _Mine(NamedTuple):
    """What was here of a session when its branch was sent.

    Attributes:
        record: the newest acknowledged version; None: there is no such session.
        sequence: of its newest put in the log, before it was read.
    """

    record: bytes | None
    sequence: int


class Delivery:
    """Owns the task that delivers.

    Args:
        remote: the shared tier.
        agreement: says whether it is up, and is told what is being delivered.
        outbox: what it has not seen.
        conflicts: where refused branches are kept.
        local: this worker's own side.
        flush_interval_seconds: how long a branch may wait.
        tombstone_seconds: for how long an end is remembered.
    """

    def __init__(
        self,
        remote: RemoteTier,
        agreement: Agreement,
        outbox: Outbox,
        conflicts: Conflicts,
        local: Local,
        *,
        flush_interval_seconds: float,
        tombstone_seconds: float,
    ) -> None:
        self.delivered = 0
        self._tombstone_seconds = tombstone_seconds
        # The incarnations that this worker ended lately, the latest last, and until when that is
        # remembered. A tier that loses its content loses its tombstones with it.
        self._ends: dict[str, tuple[bytes, float]] = {}
        self._remote = remote
        self._agreement = agreement
        self._outbox = outbox
        self._conflicts = conflicts
        self._residency = local.residency
        self._commits = local.commits
        self._wall = local.clock.wall
        self._all_ids = local.all_ids
        self._flush_interval_seconds = flush_interval_seconds
        self._commit_ids = CommitIds()
        self._wake = asyncio.Event()
        self._round_over = asyncio.Event()
        self._failed: dict[str, None] = {}  # the latest last
        self._refill_epoch: bytes | None = None
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start delivering."""
        self._task = asyncio.create_task(self._run(), name="persistence-delivery")

    def wake(self) -> None:
        """Deliver now, not only at the next interval."""
        self._wake.set()

    async def round_over(self) -> None:
        """Wait until what is being delivered now is decided."""
        await self._round_over.wait()

    def refill(self, epoch: bytes) -> None:
        """Bring every local session to a tier whose content is new to this worker."""
        self._refill_epoch = epoch
        self._wake.set()

    def ended(self, session_id: str, incarnation: bytes) -> None:
        """This worker ended a session; that is acknowledged."""
        self._ends.pop(session_id, None)
        self._ends[session_id] = incarnation, self._wall() + self._tombstone_seconds
        if len(self._ends) > _ENDS_KEPT:
            del self._ends[next(iter(self._ends))]

    async def end(self) -> None:
        """Deliver what the tier takes now, and end."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task

    async def close(self) -> None:
        """End at once."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            if not self._closing:
                await self._pause()
            try:
                if self._agreement.is_up:
                    await self._deliver_all()
            except PersistenceError as error:
                _log.warning("delivering to the shared tier: %s", error)
            except Exception:  # noqa: BLE001 - logged; the next round tries again
                _log.exception("delivering to the shared tier failed")
            if self._closing:
                return

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(self._flush_interval_seconds):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    async def _deliver_all(self) -> None:
        epoch = self._refill_epoch
        if epoch is not None:
            await self._refill(epoch)
        await self._send_touches()
        seen: set[str] = set()
        while self._agreement.is_up:
            # A branch that cannot be delivered now is tried again at the next interval.
            some = self._next_round(seen)
            if not some:
                return
            seen.update(await self._deliver(some))

    def _next_round(self, seen: Collection[str]) -> list[str]:
        """Return which branches come next. What has failed comes last, each by itself.

        A session that the tier never takes, one that is larger than a server's or a proxy's limit
        for example, breaks the connection for whatever is sent with it.
        """
        waiting = (
            sid for sid in self._outbox.branches if sid not in seen and sid not in self._failed
        )
        some = list(islice(waiting, _PER_ROUND))
        if some:
            return some
        branches = self._outbox.branches
        self._failed = {sid: None for sid in self._failed if sid in branches}
        return list(islice((sid for sid in self._failed if sid not in seen), 1))

    async def _send_touches(self) -> None:
        touches = self._agreement.touches
        while touches and self._agreement.is_up:
            some = [touches.popleft() for _ in range(min(len(touches), _PER_ROUND))]
            await self._remote.commit(some)

    # --- branches -----------------------------------------------------------------------------

    async def _deliver(self, some: list[str]) -> list[str]:
        """Deliver some branches in one round trip; return of which the turn has come."""
        delivering, contested = self._agreement.delivering, self._agreement.contested
        session_ids = some
        left: list[str] = []
        if self._agreement.writes_through:
            # A commit in flight may be delivering the branch itself.
            tails = self._commits.tails
            session_ids = [sid for sid in session_ids if sid in contested or sid not in tails]
        delivering.update(session_ids)
        self._round_over.clear()
        try:
            for session_id in contested.intersection(session_ids):
                await self._commits.decided(session_id)  # what comes from now on is refused
            asked, left = await self._gathered(session_ids)
            results = await self._remote.commit([request for _, request, _ in asked])
            for (session_id, request, mine), result in zip(asked, results, strict=True):
                try:
                    await self._delivered(session_id, request, mine, result)
                except RemoteDamaged as error:  # the same
                    _log.warning("a session cannot be delivered: %s", error)
        finally:
            delivering.difference_update(session_ids)
            contested.difference_update(session_ids[: len(session_ids) - len(left)])
            self._round_over.set()
        later = set(left)
        return [session_id for session_id in some if session_id not in later]

    async def _gathered(
        self, session_ids: list[str]
    ) -> tuple[list[tuple[str, Request, _Mine]], list[str]]:
        """Return what delivers branches, as many as may be in memory at once, and the others."""
        asked: list[tuple[str, Request, _Mine]] = []
        nbytes = 0
        for place, session_id in enumerate(session_ids):
            if nbytes >= _BYTES_PER_ROUND:
                return asked, session_ids[place:]
            branch = self._outbox.branches.get(session_id)
            if branch is None:
                continue
            try:
                mine = await self._here(session_id)
            except CorruptionError as error:  # it must not hold up the others
                _log.warning("a session cannot be delivered: %s", error)
                continue
            request = self._request(session_id, mine.record, branch)
            if request is None:
                await self._advance(session_id, mine)
            else:
                asked.append((session_id, request, mine))
                nbytes += len(mine.record or b"")
        return asked, []

    async def _here(self, session_id: str) -> _Mine:
        """Return what is here of a session now.

        Raises:
            CorruptionError: its stored bytes are damaged.
        """
        sequence = self._residency.sequence_of(session_id)
        return _Mine(await self._residency.peek(session_id, session_id.encode()), sequence)

    def _request(self, session_id: str, record: bytes | None, branch: Branch) -> Request | None:
        """Return what delivers a branch; None: the tier has nothing to learn of it."""
        if record is None:
            return self._end(session_id, branch)
        accessed, deadline, cap = self._residency.wall_times(session_id)
        return Put(session_id, record, branch.base, accessed, deadline, cap)

    def _end(self, session_id: str, branch: Branch) -> Request | None:
        """Return what delivers the end of a session.

        If the tier never had it, another worker's session may live there under the same id.
        """
        commit = self._commit_ids.next()
        if branch.base != NO_ID:
            # With the incarnation, the tombstone holds also where the tier has lost the session.
            incarnation, _ = self._ends.get(session_id, (NO_ID, 0.0))
            return Delete(session_id, commit, incarnation, branch.base)
        ended = self._outbox.ended.get(session_id)
        if not ended:
            return None  # its time was over before it got there
        return Delete(session_id, commit, NO_ID if NO_ID in ended else ended[-1])

    async def _delivered(
        self, session_id: str, request: Request, mine: _Mine, result: CommitResult
    ) -> None:
        """Take what became of one branch."""
        outcome = result.outcome
        record = mine.record
        self._failed.pop(session_id, None)
        if outcome in (Outcome.REFUSED, Outcome.UNKNOWN):
            self._failed[session_id] = None
            if not isinstance(result.error, RemoteDamaged):
                self._agreement.went_away()
            if outcome is Outcome.UNKNOWN and record is not None:
                await self._outbox.add({}, [(session_id, rec.commit_of(record))])
            _log.warning("a session is not delivered yet: %s", result.error)
            return
        over = (Outcome.TERMINATED, Outcome.MISSING)
        if result.is_stored or (record is None and outcome in over):
            await self._advance(session_id, mine)
            return
        branch = self._outbox.branches.get(session_id)
        if branch is None:
            return
        sent = self._outbox.sent.get(session_id, set())
        base = _other_base(record, branch, sent, result)
        if base is not None:
            await self._outbox.advance(session_id, base, lambda: None)
            self._wake.set()  # again, on what the tier has now
            return
        if record is None and branch.base == NO_ID:
            await self._end_again(session_id, result.stored)
            return
        await self._keep_conflict(session_id, mine, branch, result.stored)

    async def _end_again(self, session_id: str, stored: Stored | None) -> None:
        """Another incarnation lives there than the one that was asked to end."""
        ended = self._outbox.ended.get(session_id, ())
        if stored is None or stored.incarnation not in ended:
            await self._advance(session_id, _NOTHING)  # it is somebody else's, and was never ours
            return
        await self._outbox.advance(session_id, Branch(stored.commit, stored.version), lambda: None)
        self._wake.set()

    async def _advance(self, session_id: str, mine: _Mine) -> None:
        self.delivered += 1
        delivered = Branch(NO_ID, 0)
        if mine.record is not None:
            delivered = Branch(rec.commit_of(mine.record), rec.version_of(mine.record))
        newest = partial(self._newest, session_id, mine)
        await self._outbox.advance(session_id, delivered, newest)

    def _newest(self, session_id: str, mine: _Mine) -> bytes | None:
        """Return the newest commit here, where `mine` was here before.

        `NO_ID`: there is no such session. None: that cannot be told without waiting for the disk.
        """
        found = self._residency.commit_of(session_id)
        if found is None:
            return NO_ID
        if found != NO_ID:
            return found
        # It is nowhere but in the log, and too large to be read on the event loop, or there is no
        # telling whether the disk has to be waited for (tmpfs). With the same sequence number it
        # is what was read. Else its branch would never end, and be delivered again and again.
        if mine.record is None or self._residency.sequence_of(session_id) != mine.sequence:
            return None
        return rec.commit_of(mine.record)

    async def _keep_conflict(
        self, session_id: str, mine: _Mine, branch: Branch, stored: Stored | None
    ) -> None:
        """The shared state wins; what this worker had is kept and reported."""
        record = mine.record
        found = await self._remote.load(session_id)
        version, ended = (0, False) if stored is None else (stored.version, not stored.lives)
        await self._conflicts.keep(
            Conflict(session_id, self._wall(), record or b"", branch.base, version, ended)
        )
        while session_id in self._agreement.contested and session_id in self._commits.tails:
            await self._commits.decided(session_id)  # it is refused
        kept = NO_ID if record is None else rec.commit_of(record)
        if self._newest(session_id, mine) != kept:
            return  # it went on here meanwhile: the next round keeps that too
        # From here to the submission nothing awaits, so what is replaced is what was kept.
        commit = self._replaced(session_id, found)
        if commit is not None:
            await committed(commit)
        delivered = Branch(NO_ID, 0)
        if isinstance(found, RemoteSession):
            delivered = Branch(rec.commit_of(found.record), rec.version_of(found.record))
        newest = partial(self._newest, session_id, _NOTHING)
        await self._outbox.advance(session_id, delivered, newest)

    def _replaced(self, session_id: str, found: RemoteSession | Stored | None) -> Commit | None:
        """Submit what the shared tier has in place of what is here."""
        if isinstance(found, RemoteSession):
            return self._residency.submit_remote(session_id, found)
        if self._residency.has_copy(session_id):
            return self._residency.submit_delete(session_id, session_id.encode(), local=True)
        return None

    # --- everything ---------------------------------------------------------------------------

    async def _refill(self, epoch: bytes) -> None:
        """Bring every local session to the tier, which may have got some from other workers."""
        await self._seed_ends()
        some: list[str] = []
        in_flight: list[str] = []
        async for session_id in self._all_ids():
            if session_id in self._outbox:
                continue
            if session_id in self._commits.tails:
                in_flight.append(session_id)
                continue
            some.append(session_id)
            if len(some) == _PER_ROUND:
                await self._seed(some)
                some = []
        await self._seed(some)
        # Not every commit in flight goes to the tier: one may only bring a session to the log.
        for session_id in in_flight:
            await self._commits.decided(session_id)
            await self._seed([] if session_id in self._outbox else [session_id])
        if not self._agreement.is_up:
            return  # again when it is back
        await self._outbox.set_epoch(epoch)
        if self._refill_epoch == epoch:
            self._refill_epoch = None

    async def _seed_ends(self) -> None:
        """Bring the tombstones: another worker may have missed an end, and bring the session."""
        now = self._wall()
        ends = [(sid, each) for sid, (each, until) in self._ends.items() if until > now]
        for start in range(0, len(ends), _PER_ROUND):
            some = ends[start : start + _PER_ROUND]
            asked = [Delete(sid, self._commit_ids.next(), each) for sid, each in some]
            for result in await self._remote.commit(asked):
                refused = result.outcome in (Outcome.REFUSED, Outcome.UNKNOWN)
                if refused and not isinstance(result.error, RemoteDamaged):
                    self._agreement.went_away()
                    return

    async def _seed(self, session_ids: list[str]) -> None:
        """Bring sessions to a tier that may have none of them, some in each round trip."""
        asked: list[tuple[bytes, Put]] = []
        nbytes = 0
        for session_id in session_ids:
            try:
                record = await self._residency.peek(session_id, session_id.encode())
            except CorruptionError as error:
                _log.warning("a session cannot be brought back: %s", error)
                continue
            if record is not None:
                accessed, deadline, cap = self._residency.wall_times(session_id)
                asked.append((record, Put(session_id, record, NO_ID, accessed, deadline, cap)))
                nbytes += len(record)
            if nbytes >= _BYTES_PER_ROUND:
                await self._seed_some(asked)
                asked, nbytes = [], 0
            if not self._agreement.is_up:
                return
        await self._seed_some(asked)

    async def _seed_some(self, asked: list[tuple[bytes, Put]]) -> None:
        again = []
        for (record, put), result in zip(
            asked, await self._remote.commit([put for _, put in asked]), strict=True
        ):
            stored = result.stored
            if result.outcome is Outcome.CONFLICT and stored is not None:
                if stored.incarnation == rec.incarnation_of(record) and (
                    stored.version < rec.version_of(record)
                ):
                    again.append(put._replace(base=stored.commit))
            elif isinstance(result.error, RemoteDamaged):
                _log.warning("a session cannot be brought back: %s", result.error)
            elif result.outcome in (Outcome.REFUSED, Outcome.UNKNOWN):
                self._agreement.went_away()
                return
        if again:
            await self._remote.commit(again)


_NOTHING: Final = _Mine(None, 0)


def _other_base(
    record: bytes | None, branch: Branch, sent: Collection[bytes], result: CommitResult
) -> Branch | None:
    """Return what to build a branch on if the shared tier has not its base; None: a conflict.

    Either the tier has a commit of this very branch, whose reply was lost. Or it lost the base.
    """
    if result.stored is not None and result.stored.commit in sent:
        lives = result.stored.lives
        return Branch(result.stored.commit if lives else NO_ID, result.stored.version)
    if record is None:
        return None
    if result.outcome is Outcome.MISSING and branch.base != NO_ID:
        return Branch(NO_ID, 0)
    stored = result.stored
    if result.outcome is Outcome.CONFLICT and stored is not None:
        same = stored.incarnation == rec.incarnation_of(record)
        if same and stored.version < max(branch.version, 1 if branch.base != NO_ID else 0):
            return Branch(stored.commit, stored.version)
        if same and branch.base == NO_ID and stored.version < rec.version_of(record):
            return Branch(stored.commit, stored.version)
    return None
