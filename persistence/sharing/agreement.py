"""``redis.write = "through"``: a batch goes to the shared tier before it goes to the log.

The shared tier accepts a commit only on the commit that it was built on, so two workers never both
commit on the same base. What it refuses fails here, with everything that was built on it. What it
cannot be asked becomes a branch in the outbox (``on_outage = "local"``) or fails (``"fail"``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from persistence import record as rec
from persistence.clock import EngineTime
from persistence.commit import Commit, ExactEnd
from persistence.disk.format import DELETE, PUT, TOUCH
from persistence.errors import (
    Overtaken,
    PersistenceError,
    RemoteDamaged,
    RemoteUnavailable,
    SessionExists,
    SessionNotFound,
    again,
    printable,
)
from persistence.record import ID_BYTES, NO_ID
from persistence.remote.contract import (
    APPLIED,
    CommitResult,
    Delete,
    Outcome,
    Put,
    RemoteTier,
    Request,
    Stored,
    Touch,
)
from persistence.sharing.copies import Copies
from persistence.sharing.outbox import Branch, Outbox

_COMMIT_AT: Final = ID_BYTES
_BASE_AT: Final = 2 * ID_BYTES
_TOUCHES_KEPT: Final = 10_000


class Decision(NamedTuple):
    """What became of a batch.

    Attributes:
        agreed: these go into the log, in order.
        refused: these fail, each with its error.
    """

    agreed: list[Commit]
    refused: list[tuple[Commit, PersistenceError]]


@dataclass(slots=True)
class _Fate:
    """What becomes of a batch, while it is being found out.

    Attributes:
        branches: what the shared tier learns of later.
        unsure: those of them that were sent, and may have been applied.
        refused: what fails.
        generation: of the local copies, when the batch was sent.
    """

    branches: list[Commit] = field(default_factory=list)
    unsure: list[Commit] = field(default_factory=list)
    refused: list[tuple[Commit, PersistenceError]] = field(default_factory=list)
    generation: int = 0

    def decision(self, batch: Sequence[Commit]) -> Decision:
        """Return what may be written of `batch`, in its order."""
        if not self.refused:
            return Decision(list(batch), [])
        lost = {id(commit) for commit, _ in self.refused}
        return Decision([commit for commit in batch if id(commit) not in lost], self.refused)


def request_of(commit: Commit, skew: float, base: bytes | None = None) -> Request | None:
    """Return what to ask of the shared tier for a commit; None: nothing.

    Args:
        commit: a put, a tombstone or a touch.
        skew: wall time minus engine time, seconds.
        base: build it on this commit instead of its own base.
    """
    ids = commit.ids
    if commit.kind == PUT:
        record = commit.record
        assert record is not None, "a put carries its record"
        return Put(
            commit.session_id,
            record,
            ids[_BASE_AT:] if base is None else base,
            commit.accessed + skew,
            commit.deadline + skew,
            commit.cap + skew,
            commit.before if base is None else None,
            commit.changed if base is None else None,  # what it changed of its own base
        )
    own = ids[_COMMIT_AT:_BASE_AT]
    if commit.kind == DELETE:
        is_exact = isinstance(commit, ExactEnd)
        return Delete(commit.session_id, own, ids[:ID_BYTES], ids[_BASE_AT:] if is_exact else NO_ID)
    if own == NO_ID:
        return None
    return Touch(commit.session_id, own, commit.accessed + skew, commit.deadline + skew)


def tier_is_behind(commit: Commit, stored: Stored) -> bool:
    """Whether the shared tier lost commits that it had acknowledged: it failed over to an old copy.

    The base of `commit` was in the shared tier, for only what is there is acknowledged. If what is
    stored now is an older version of the same incarnation, the tier went back in time.
    """
    if commit.record is None or not stored.lives:
        return False
    same = rec.incarnation_of(commit.record) == stored.incarnation
    return same and stored.version < rec.version_of(commit.record) - 1


def branch_of(commit: Commit) -> Branch:
    """Return the branch that begins with a commit."""
    version = 0 if commit.record is None else rec.version_of(commit.record) - 1
    return Branch(commit.ids[_BASE_AT:], version)


class Agreement:
    """Asks the shared tier, batch after batch.

    Args:
        remote: the shared tier.
        outbox: what it has not seen.
        copies: which local copies are valid.
        time: the engine's time base.
        accepts_outages: ``redis.on_outage = "local"``.
        writes_through: ``redis.write = "through"``.
        went_away: called when a request could not be decided.
        deliver: called when a branch has to be delivered before anything else can go on.

    Attributes:
        is_up: whether the shared tier answers.
        delivering: sessions whose branch is being delivered: what comes meanwhile is part of it.
        contested: sessions in the outbox of which the shared tier has refused an update: nothing
            that is built on their branch is accepted, so it has to end, and must not grow.
        touches: renewals to be sent.
    """

    def __init__(
        self,
        remote: RemoteTier,
        outbox: Outbox,
        copies: Copies,
        time: EngineTime,
        *,
        accepts_outages: bool,
        writes_through: bool,
        went_away: Callable[[], None],
        deliver: Callable[[], None],
    ) -> None:
        self.is_up = False
        self.delivering: set[str] = set()
        self.contested: set[str] = set()
        self._deliver = deliver
        self._remote = remote
        self._outbox = outbox
        self._copies = copies
        self._time = time
        self._accepts_outages = accepts_outages
        self.went_away = went_away
        self.writes_through = writes_through
        self.touches: deque[Touch] = deque(maxlen=_TOUCHES_KEPT)

    async def decide(self, batch: Sequence[Commit]) -> Decision:
        """Ask for a batch; never raises a PersistenceError."""
        fate = _Fate()
        commits, requests = self._requests(batch, fate)
        if requests:
            await self._ask(commits, requests, fate)
        await self._begin_branches(fate)
        return fate.decision(batch)

    def _requests(self, batch: Sequence[Commit], fate: _Fate) -> tuple[list[Commit], list[Request]]:
        """Return which commits to ask for, and how; those that begin branches go to `fate`."""
        commits: list[Commit] = []
        requests: list[Request] = []
        skew = self._time.skew()
        on_branch: set[str] = set()
        # Nearly always: then no session has to be looked up in either.
        is_plain = self.is_up and not self.delivering and not self._outbox.branches
        for commit in batch:
            if commit.local or commit.spills:
                continue
            if is_plain:
                request = request_of(commit, skew)
            elif not self._accepts_outages and not self.is_up:
                request = None if commit.kind == TOUCH else self._request(commit, skew, on_branch)
            elif self.is_up and self.waits_for_delivery(commit.session_id):
                # As part of the branch it would be acknowledged without having been agreed to.
                if commit.kind != TOUCH:
                    fate.refused.append((commit, _overtaken(commit.session_id)))
                continue
            elif not self.is_up or self._is_in_delivery(commit.session_id):
                fate.branches.append(commit)
                continue
            else:
                request = self._request(commit, skew, on_branch)
            if request is not None:
                commits.append(commit)
                requests.append(request)
        return commits, requests

    def _is_in_delivery(self, session_id: str) -> bool:
        """Whether a commit comes while the branch that it is part of is being delivered.

        Once the branch has ended the shared tier has what the commit was built on, and is asked:
        the delivery itself is over a moment later, when the end of the branch is in the outbox.
        """
        return session_id in self.delivering and session_id in self._outbox

    def waits_for_delivery(self, session_id: str) -> bool:
        """Whether no update of a session is accepted until its branch has been delivered."""
        if session_id not in self.delivering or not self.writes_through:
            return False
        return not self._accepts_outages or session_id in self.contested

    async def postpone(self, batch: Sequence[Commit]) -> Decision:
        """Remember a batch for later (``redis.write = "behind"``)."""
        skew = self._time.skew()
        fate = _Fate()
        for commit in batch:
            if commit.local or commit.spills:
                continue
            if commit.kind != TOUCH:
                fate.branches.append(commit)
                continue
            touch = request_of(commit, skew)
            if isinstance(touch, Touch):
                self.touches.append(touch)
        await self._begin_branches(fate)
        return fate.decision(batch)

    def _request(self, commit: Commit, skew: float, on_branch: set[str]) -> Request | None:
        """Build the request; the first one of a session with a branch delivers the branch."""
        session_id = commit.session_id
        base = None
        if commit.kind == PUT and session_id not in on_branch:
            branch = self._outbox.branches.get(session_id)
            base = None if branch is None else branch.base
            on_branch.add(session_id)
        return request_of(commit, skew, base)

    async def _ask(self, commits: list[Commit], requests: list[Request], fate: _Fate) -> None:
        """Send the requests and take what becomes of them."""
        fate.generation = self._copies.generation
        self._copies.forget_all([commit.session_id for commit in commits])
        results = await self._remote.commit(requests)
        if results.count(APPLIED) == len(results) and not self._outbox.branches:
            self._take_applied(commits, fate)
        else:
            await self._take_each(commits, requests, results, fate)

    def _take_applied(self, commits: list[Commit], fate: _Fate) -> None:
        """Take results that all say the same, and what is nearly always said."""
        put: list[str] = []
        for commit in commits:
            if commit.kind == PUT:
                commit.shared = True
                put.append(commit.session_id)
            elif commit.kind == DELETE:
                commit.shared = True
        self._copies.validate_all(put, fate.generation)

    async def _take_each(
        self,
        commits: list[Commit],
        requests: list[Request],
        results: list[CommitResult],
        fate: _Fate,
    ) -> None:
        """Take results of all kinds."""
        repeated: list[Commit] = []
        behind: dict[str, bytes] = {}
        # Only the first put of a session can tell that the tier went back: behind a refused one
        # every later version number is far from what is stored.
        decided: set[str] = set()
        for commit, request, result in zip(commits, requests, results, strict=True):
            base = None
            if commit.session_id not in decided:
                base = self._restored_base(commit, result)
            if commit.kind == PUT:
                decided.add(commit.session_id)
            if base is not None:
                behind.setdefault(commit.session_id, base)
            if commit.session_id in behind and commit.kind == PUT:
                repeated.append(commit)
                continue
            await self._take(commit, request, result, fate)
        if repeated:
            await self._ask_again(repeated, behind, fate)

    def _restored_base(self, commit: Commit, result: CommitResult) -> bytes | None:
        """Return what to build a commit on whose base the shared tier lost; None: it did not."""
        if commit.kind != PUT:
            return None
        if result.outcome is Outcome.MISSING and commit.ids[_BASE_AT:] != NO_ID:
            return NO_ID
        stored = result.stored
        if result.outcome is Outcome.CONFLICT and stored is not None:
            in_outbox = commit.session_id in self._outbox
            return stored.commit if not in_outbox and tier_is_behind(commit, stored) else None
        return None

    async def _ask_again(
        self,
        commits: list[Commit],
        bases: dict[str, bytes],
        fate: _Fate,
    ) -> None:
        """Commit what was built on something that the shared tier lost, on what it has now."""
        skew = self._time.skew()
        asked = []
        for commit in commits:
            request = request_of(commit, skew, bases.pop(commit.session_id, None))
            assert request is not None, "puts only"
            asked.append((commit, request))
        results = await self._remote.commit([request for _, request in asked])
        for (commit, request), result in zip(asked, results, strict=True):
            await self._take(commit, request, result, fate)

    async def _take(
        self,
        commit: Commit,
        request: Request,
        result: CommitResult,
        fate: _Fate,
    ) -> None:
        """Take one result."""
        session_id = commit.session_id
        outcome = result.outcome
        if commit.kind == TOUCH:
            return  # a renewal that is lost is recorded again a sixteenth of a TTL later
        if result.is_stored or (commit.kind == DELETE and _is_over(commit, outcome)):
            commit.shared = True
            if session_id in self._outbox:
                self.contested.discard(session_id)
                await self._outbox.remove(session_id)
            if commit.kind == PUT:
                self._copies.validate_all((session_id,), fate.generation)
            return
        if outcome in (Outcome.REFUSED, Outcome.UNKNOWN):
            if not isinstance(result.error, RemoteDamaged):
                self.went_away()
                if self._accepts_outages:
                    fate.branches.append(commit)
                    if outcome is Outcome.UNKNOWN:
                        fate.unsure.append(commit)
                    return
            assert result.error is not None, "a refusal says why"
            fate.refused.append((commit, result.error))
            return
        creates = isinstance(request, Put) and request.base == NO_ID
        if outcome is Outcome.TERMINATED:
            fate.refused.append((commit, SessionNotFound(session_id)))
        elif creates and commit.creates:
            fate.refused.append((commit, SessionExists(session_id)))
        else:
            fate.refused.append((commit, _overtaken(session_id)))
        stored = result.stored
        self._copies.announced(session_id, NO_ID if stored is None else stored.commit)
        if session_id in self._outbox:
            # The race: whoever was refused tries again, finds the branch, is refused again, and
            # with a commit in flight at any time the branch is never delivered.
            self.contested.add(session_id)
            self._deliver()

    async def _begin_branches(self, fate: _Fate) -> None:
        """Let the shared tier learn of what it could not be asked, later."""
        if not fate.branches:
            return
        branches: dict[str, Branch] = {}
        kept = [commit for commit in fate.branches if commit.kind != TOUCH]
        for commit in kept:
            branches.setdefault(commit.session_id, branch_of(commit))
        sent = [(commit.session_id, commit.ids[_COMMIT_AT:_BASE_AT]) for commit in fate.unsure]
        ended = [(each.session_id, each.ids[:ID_BYTES]) for each in kept if each.kind == DELETE]
        try:
            await self._outbox.add(branches, sent, ended)
        except PersistenceError as error:
            fate.refused += [(commit, again(error)) for commit in kept]


def _is_over(end: Commit, outcome: Outcome) -> bool:
    """Whether a session that was to be ended is over, for whoever asked for that."""
    if outcome is Outcome.TERMINATED:
        # By another worker. That does not end the very version: it may live on under another id.
        return not isinstance(end, ExactEnd)
    return outcome is Outcome.MISSING


def unavailable(where: str) -> RemoteUnavailable:
    """Return the error for what cannot be asked while the shared tier is away."""
    return RemoteUnavailable(f"{where} cannot be reached, and redis.on_outage is 'fail'")


def _overtaken(session_id: str) -> Overtaken:
    return Overtaken(
        f"session {printable(session_id)}: another worker's commit came first; nothing was "
        "written: edit again, on the newer version"
    )
