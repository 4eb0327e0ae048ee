"""What becomes of a batch, on a shared tier that answers as it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import pytest

from persistence import record as rec
from persistence.clock import EngineTime, ManualClock
from persistence.commit import Commit
from persistence.disk.format import DELETE, PUT, TOUCH
from persistence.errors import ConflictError, RemoteUnavailable
from persistence.record import NEVER, NO_ID
from persistence.remote.contract import (
    APPLIED,
    CommitResult,
    Outcome,
    Put,
    RemoteTier,
    Request,
    Stored,
)
from persistence.sharing.agreement import Agreement
from persistence.sharing.copies import Copies
from persistence.sharing.outbox import Branch, Outbox
from tests.remote.sessions import new_id, new_record, next_record

REFUSED = CommitResult(Outcome.REFUSED, None, RemoteUnavailable("away"))
OTHER = CommitResult(Outcome.CONFLICT, Stored(True, 9, new_id(), new_id()))


class ToldTier:
    """Answers each request as it was told for its session, else that it is applied."""

    def __init__(self, results: Mapping[str, CommitResult]) -> None:
        self.asked: list[Request] = []
        self.meanwhile: Callable[[], object] = lambda: None
        self._results = results

    async def commit(self, requests: Sequence[Request]) -> list[CommitResult]:
        self.asked += requests
        self.meanwhile()
        return [self._results.get(request.session_id, APPLIED) for request in requests]


class Remembered:
    """An outbox without a journal."""

    def __init__(self) -> None:
        self.branches: dict[str, Branch] = {}

    def __contains__(self, session_id: str) -> bool:
        return session_id in self.branches

    async def add(
        self,
        branches: Mapping[str, Branch],
        sent: Iterable[tuple[str, bytes]] = (),
        ended: Iterable[tuple[str, bytes]] = (),
    ) -> None:
        self.branches.update(branches)

    async def remove(self, session_id: str) -> None:
        del self.branches[session_id]


class Agreed:
    """An agreement, and what it works on."""

    accepts_outages = True

    def __init__(self, **results: CommitResult) -> None:
        self.tier = ToldTier(results)
        self.outbox = Remembered()
        self.copies = Copies()
        self.agreement = Agreement(
            cast(RemoteTier, self.tier),
            cast(Outbox, self.outbox),
            self.copies,
            EngineTime(ManualClock()),
            accepts_outages=self.accepts_outages,
            writes_through=True,
            went_away=lambda: None,
            deliver=lambda: None,
        )
        self.agreement.is_up = True
        self.copies.reset(is_listening=True)

    async def decide(self, *commits: Commit) -> Any:
        return await self.agreement.decide(commits)


class Unanimous(Agreed):
    """One that never goes on alone."""

    accepts_outages = False


def commit_of(
    kind: int, session_id: str, record: bytes | None, ids: bytes, before: bytes | None = None
) -> Commit:
    """Return a commit as the queue has it."""
    key = session_id.encode()
    commit = Commit(kind, session_id, key, b"", record, ids, 1.0, 10.0, NEVER, 9.0, 0)
    commit.before = before
    return commit


def put(session_id: str, old: bytes | None = None) -> Commit:
    """Return an update of `old`, or a creation."""
    record = new_record({"n": 1}) if old is None else next_record(old, {"n": 2})
    base = NO_ID if old is None else rec.commit_of(old)
    return commit_of(PUT, session_id, record, record[:32] + base, old)


def end(session_id: str) -> Commit:
    """Return an end."""
    return commit_of(DELETE, session_id, None, new_id() + new_id() + NO_ID)


def touch(session_id: str) -> Commit:
    """Return a renewal."""
    return commit_of(TOUCH, session_id, None, new_id() + new_id() + NO_ID)


async def test_a_batch_that_is_applied_is_agreed_and_its_copies_are_current() -> None:
    agreed = Agreed()
    batch = [put("a", new_record({"n": 1})), put("b"), end("c"), touch("d")]
    decision = await agreed.decide(*batch)
    assert decision == (batch, [])
    assert [commit.shared for commit in batch] == [True, True, True, False]
    assert [agreed.copies.is_valid(name) for name in "abcd"] == [True, True, False, False]
    first = agreed.tier.asked[0]
    assert isinstance(first, Put)
    assert first.old == batch[0].before


async def test_where_all_must_agree_nothing_is_agreed_to_while_its_branch_is_being_delivered() -> (
    None
):
    """As part of the branch it would be acknowledged, and then another worker's might win."""
    agreed = Unanimous()
    agreed.agreement.delivering.add("a")
    batch = [put("a", new_record({"n": 1})), put("b"), touch("a")]
    decision = await agreed.decide(*batch)
    assert decision.agreed == [batch[1], batch[2]]
    [(commit, error)] = decision.refused
    assert commit is batch[0]
    assert isinstance(error, ConflictError)
    assert agreed.outbox.branches == {}


async def test_what_the_shared_tier_need_not_learn_of_is_agreed_without_asking() -> None:
    agreed = Agreed()
    local, spill = put("a"), put("b")
    local.local = spill.spills = True
    assert await agreed.decide(local, spill) == ([local, spill], [])
    assert agreed.tier.asked == []
    assert not agreed.copies.is_valid("a")


@pytest.mark.parametrize("also_refused", [False, True], ids=["all applied", "not all applied"])
async def test_a_copy_is_not_current_when_more_was_announced_meanwhile(
    also_refused: bool,
) -> None:
    agreed = Agreed(**({"z": OTHER} if also_refused else {}))
    agreed.tier.meanwhile = lambda: agreed.copies.announced("a", new_id())
    await agreed.decide(put("a"), put("b"), put("z"))
    assert agreed.copies.is_stale("a")
    assert not agreed.copies.is_valid("a")
    assert agreed.copies.is_valid("b")


@pytest.mark.parametrize("also_refused", [False, True], ids=["all applied", "not all applied"])
async def test_no_copy_is_current_when_announcements_were_missed_meanwhile(
    also_refused: bool,
) -> None:
    agreed = Agreed(**({"z": OTHER} if also_refused else {}))
    agreed.tier.meanwhile = lambda: agreed.copies.reset(is_listening=True)
    await agreed.decide(put("a"), put("z"))
    assert not agreed.copies.is_valid("a")


async def test_what_was_stale_before_is_current_once_it_was_committed_on() -> None:
    agreed = Agreed()
    agreed.copies.announced("a", new_id())
    await agreed.decide(put("a"))
    assert agreed.copies.is_valid("a")
    assert not agreed.copies.is_stale("a")


async def test_one_refusal_in_a_batch_stops_no_other() -> None:
    agreed = Agreed(b=OTHER)
    a, b, c = put("a", new_record({})), put("b", new_record({})), put("c", new_record({}))
    decision = await agreed.decide(a, b, c)
    assert decision.agreed == [a, c]
    [(commit, error)] = decision.refused
    assert commit is b
    assert isinstance(error, ConflictError)
    assert (a.shared, b.shared, c.shared) == (True, False, True)


async def test_what_cannot_be_asked_begins_a_branch_that_the_next_applied_commit_ends() -> None:
    agreed = Agreed(b=REFUSED)
    b = put("b", new_record({}))
    a = put("a")
    assert await agreed.decide(a, b) == ([a, b], [])
    assert agreed.outbox.branches == {"b": Branch(b.ids[32:], 1)}
    agreed.tier._results = {}
    assert b.record is not None
    decision = await agreed.decide(put("b", b.record))
    assert not decision.refused
    request = agreed.tier.asked[-1]
    assert isinstance(request, Put)
    assert (request.base, request.old) == (b.ids[32:], None), "the whole branch, on its base"
    assert agreed.outbox.branches == {}
