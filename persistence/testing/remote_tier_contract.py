"""What every shared tier must do, as tests: derive from `RemoteTierContract` and run them on yours.

::

    import pytest
    from persistence.testing.remote_tier_contract import RemoteTierContract

    class TestMyTier(RemoteTierContract):
        @pytest.fixture
        async def open_tier(self):
            opened = []

            async def open_tier(*, tombstone_seconds=86_400.0):
                tier = MyTier(url, tombstone_seconds=tombstone_seconds)
                opened.append(tier)
                await tier.open()
                return tier

            yield open_tier
            for tier in opened:
                await tier.close()

`open_tier` opens one more worker's tier on the same content, which is empty when the test begins: a
namespace of its own for each test does that. The tier's clock is this machine's; where a test waits
for it, it waits for what must happen, a fraction of a second.

With ``pytest.register_assert_rewrite("persistence.testing")`` in a ``conftest.py``, before the
import, failures show the values that differ.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from typing import Any, Final, Protocol

from persistence import record as rec
from persistence.clock import SystemClock
from persistence.record import NEVER, NO_ID
from persistence.remote.contract import (
    APPLIED,
    IDS_REMEMBERED,
    Announcement,
    Outcome,
    Put,
    RemoteSession,
    RemoteTier,
    Request,
    Stored,
)
from persistence.testing.sessions import (
    HOSTILE_IDS,
    create,
    data_of,
    end,
    new_id,
    new_record,
    next_record,
    touch,
    update,
)

_PATIENCE_SECONDS: Final = 20.0
_POLL_SECONDS: Final = 0.005
_STEPS: Final = 16
_wall: Final = SystemClock.wall


class OpenTier(Protocol):
    """Opens one more worker's tier on the same content; it is closed after the test."""

    def __call__(self, *, tombstone_seconds: float = 86_400.0) -> Awaitable[RemoteTier]:
        """Return an open tier.

        Args:
            tombstone_seconds: for how long a tombstone is kept.
        """


class Heard:
    """A listener that writes down what it hears."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.announcements: list[Announcement] = []
        self.epochs: list[bytes] = []

    def announced(self, announcements: Sequence[Announcement]) -> None:
        """Other workers committed."""
        self.announcements += announcements

    def connected(self, *, epoch: bytes) -> None:
        """Announcements arrive."""
        self.events.append("connected")
        self.epochs.append(epoch)

    def disconnected(self) -> None:
        """Announcements may be missing."""
        self.events.append("disconnected")


class _Looking(Heard):
    """Looks at each session as soon as it hears of it."""

    def __init__(self, tier: RemoteTier) -> None:
        super().__init__()
        self.looks: list[asyncio.Future[RemoteSession | Stored | None]] = []
        self._tier = tier

    def announced(self, announcements: Sequence[Announcement]) -> None:
        """Other workers committed."""
        super().announced(announcements)
        self.looks += [
            asyncio.ensure_future(self._tier.load(each.session_id)) for each in announcements
        ]


# --- helpers --------------------------------------------------------------------------------------


async def until(condition: Callable[[], bool | Awaitable[bool]], what: str) -> None:
    """Wait for what the tier does."""
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while True:
                reached = condition()
                if isinstance(reached, bool):
                    if reached:
                        return
                elif await reached:
                    return
                await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError:
        raise AssertionError(f"in {_PATIENCE_SECONDS} seconds it did not happen: {what}") from None


async def outcomes(tier: RemoteTier, *requests: Request) -> list[Outcome]:
    """Commit, and return what became of each."""
    results = await tier.commit(requests)
    assert len(results) == len(requests), "there is one result for each request"
    return [result.outcome for result in results]


async def outcome(tier: RemoteTier, request: Request) -> Outcome:
    """Commit one request, and return what became of it."""
    [found] = await outcomes(tier, request)
    return found


async def created(tier: RemoteTier, session_id: str, data: dict[str, Any]) -> bytes:
    """Create a session; return its record."""
    record = new_record(data)
    found = await outcome(tier, create(session_id, record))
    assert found is Outcome.APPLIED, f"{session_id!r} was not there, and can be created"
    return record


async def loaded(tier: RemoteTier, session_id: str) -> RemoteSession:
    """Return a session that must be there."""
    found = await tier.load(session_id)
    assert isinstance(found, RemoteSession), f"it lives, and what was found is {found}"
    assert type(found.record) is bytes, "a record is bytes, not a view of some"
    return found


async def gone(tier: RemoteTier, session_id: str) -> None:
    """Wait for the tier's clock to end a session or a tombstone."""

    async def is_gone() -> bool:
        return await tier.load(session_id) is None

    await until(is_gone, f"{session_id!r} is gone")


async def listed(tier: RemoteTier, prefix: str = "") -> list[str]:
    """Return the ids that a scan yields."""
    return [name async for page in tier.scan(prefix) for name in page]


def chain_of(length: int) -> list[bytes]:
    """Return so many versions of one session, each built on the one before."""
    chain = [new_record({"n": 0})]
    for n in range(1, length):
        chain.append(next_record(chain[-1], {"n": n}))
    return chain


@asynccontextmanager
async def cancelled_after(steps: int, awaitable: Awaitable[Any]) -> AsyncIterator[None]:
    """Begin a call, and cancel it after so many steps of the event loop."""
    task = asyncio.ensure_future(awaitable)
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    yield


# --- the contract ---------------------------------------------------------------------------------


class RemoteTierContract:
    """Tests of one tier. A subclass brings the fixture `open_tier`; see the module."""

    # --- what is stored comes back --------------------------------------------------------------

    async def test_a_session_comes_back_byte_for_byte_with_its_times(
        self, open_tier: OpenTier
    ) -> None:
        """Also empty names, names that a server may use itself, and bytes that are no text."""
        tier = await open_tier()
        data = {"cart": {"items": [1, 2]}, "": None, "ü": "x" * 100, "state": b"\xff\0", "n": 0}
        record = new_record(data)
        now = _wall()
        assert await tier.commit([Put("a", record, NO_ID, now, now + 60.5, now + 600)]) == [APPLIED]
        history = (rec.commit_of(record),)
        expected = RemoteSession(record, now, now + 60.5, now + 600, history)
        assert await tier.load("a") == expected
        assert data_of(record) == data
        await created(tier, "empty", {})
        assert (await loaded(await open_tier(), "empty")).deadline < NEVER

    async def test_what_never_was_is_none(self, open_tier: OpenTier) -> None:
        """And questions about nothing have empty answers."""
        tier = await open_tier()
        assert await tier.load("a") is None
        assert await tier.stored(["a", "b"]) == [None, None]
        assert await tier.load_many(["a"]) == [None]
        assert await tier.load_many([]) == []
        assert await tier.stored([]) == []
        assert await tier.commit([]) == []
        assert await listed(tier) == []

    async def test_wide_and_large_sessions_come_back(self, open_tier: OpenTier) -> None:
        """A thousand fields and a version that has half of them; a value of three megabytes."""
        tier = await open_tier()
        wide = await created(tier, "wide", {f"field{n}": n for n in range(1000)})
        narrow = next_record(wide, {f"field{n}": n + 1 for n in range(500, 1000)})
        large = await created(tier, "large", {"blob": bytes(range(256)) * 12_288, "n": 1})
        assert await outcome(tier, update("wide", wide, narrow)) is Outcome.APPLIED
        assert (await loaded(tier, "wide")).record == narrow
        assert (await loaded(tier, "large")).record == large

    async def test_many_are_loaded_and_looked_at_in_the_order_asked(
        self, open_tier: OpenTier
    ) -> None:
        """Also one that was never there, one that was ended, and one that is asked for twice."""
        tier = await open_tier()
        records = {f"s{n}": new_record({"n": n}) for n in range(400)}
        await tier.commit([create(name, record) for name, record in records.items()])
        await tier.commit([end("s3")])
        names = [*reversed(records), "nobody", "s7"]
        for name, found, state in zip(
            names, await tier.load_many(names), await tier.stored(names), strict=True
        ):
            if name == "nobody":
                assert (found, state) == (None, None)
            elif name == "s3":
                assert isinstance(found, Stored)
                assert (found._replace(history=()), found.lives) == (state, False)
            else:
                assert isinstance(found, RemoteSession)
                assert found.record == records[name]
                assert state is not None
                assert state.commit == rec.commit_of(records[name])

    # --- compare and set ------------------------------------------------------------------------

    async def test_an_update_is_applied_on_the_commit_it_was_built_on(
        self, open_tier: OpenTier
    ) -> None:
        """With the difference at hand, and without; fields come, go and change their order."""
        tier = await open_tier()
        for name, whole in (("a", False), ("b", True)):
            old = await created(tier, name, {"a": 1, "b": "x" * 100, "c": 3})
            new = next_record(old, {"c": 3, "d": [4], "b": "y" * 100})
            turned = next_record(new, {"b": "y" * 100, "d": [4], "c": 3})
            requests = [update(name, old, new, whole=whole), update(name, new, turned, whole=whole)]
            assert await tier.commit(requests) == [APPLIED] * 2
            assert (await loaded(tier, name)).record == turned
            [stored] = await tier.stored([name])
            assert stored == Stored(True, 3, rec.incarnation_of(new), rec.commit_of(turned))

    async def test_an_update_of_known_fields_is_applied(self, open_tier: OpenTier) -> None:
        """`Put.changed` instead of the record before."""
        tier = await open_tier()
        old = await created(tier, "a", {"a": 1, "b": 2, "c": 3})
        new = next_record(old, {"a": 1, "b": 5, "c": 6})
        changed = {name: bytes(rec.packed_fields(new)[name]) for name in ("b", "c")}
        put = update("a", old, new)._replace(changed=changed)
        assert await outcome(tier, put) is Outcome.APPLIED
        one = next_record(new, {"a": 9, "b": 5, "c": 6})
        put = update("a", new, one)._replace(changed={"a": bytes(rec.packed_fields(one)["a"])})
        assert await outcome(tier, put) is Outcome.APPLIED
        assert (await loaded(tier, "a")).record == one

    async def test_an_update_replaces_every_time_of_the_version_before(
        self, open_tier: OpenTier
    ) -> None:
        """Later or earlier; to a deadline from none, and back."""
        tier = await open_tier()
        record, base, now = new_record({"n": 0}), NO_ID, _wall()
        history: tuple[bytes, ...] = ()
        for times in (
            (now, NEVER, NEVER),
            (now + 1, now + 60, now + 600),
            (now + 2, now + 90.5, now + 500),
            (now + 3, now + 70, NEVER),
            (now + 4, NEVER, NEVER),
        ):
            put = Put("a", record, base, *times)
            assert await outcome(tier, put) is Outcome.APPLIED
            base = rec.commit_of(record)
            history = (base, *history)
            assert await loaded(tier, "a") == RemoteSession(record, *times, history)
            record = next_record(record, {"n": 0})

    async def test_an_update_on_another_base_is_refused_and_told_what_is_stored(
        self, open_tier: OpenTier
    ) -> None:
        """Both have the same version number, which decides nothing."""
        tier, other = await open_tier(), await open_tier()
        first = await created(tier, "a", {"n": 0})
        theirs, ours = next_record(first, {"n": 1}), next_record(first, {"n": 2})
        assert await outcome(other, update("a", first, theirs)) is Outcome.APPLIED
        [result] = await tier.commit([update("a", first, ours)])
        assert result.outcome is Outcome.CONFLICT
        assert result.stored == Stored(True, 2, rec.incarnation_of(first), rec.commit_of(theirs))
        assert not result.is_stored
        assert (await loaded(tier, "a")).record == theirs

    async def test_successors_of_a_refused_commit_are_refused_whatever_their_version(
        self, open_tier: OpenTier
    ) -> None:
        """Another worker's version 2 wins; ours fails, and our pipelined 3, 4, 5 fail with it."""
        tier = await open_tier()
        chain = chain_of(5)
        theirs = next_record(chain[0], {"n": -1})
        assert await outcome(tier, create("a", chain[0])) is Outcome.APPLIED
        assert await outcome(tier, update("a", chain[0], theirs)) is Outcome.APPLIED
        requests = [update("a", old, new) for old, new in pairwise(chain)]
        assert rec.version_of(requests[1].record) == rec.version_of(theirs) + 1
        assert await outcomes(tier, *requests) == [Outcome.CONFLICT] * 4
        assert (await loaded(tier, "a")).record == theirs

    async def test_a_chain_of_commits_in_one_batch_is_applied_in_order(
        self, open_tier: OpenTier
    ) -> None:
        """Among commits to other sessions, each of which stands for itself."""
        tier = await open_tier()
        chain = chain_of(200)
        requests: list[Request] = [create("m", chain[0])]
        for n, (old, new) in enumerate(pairwise(chain)):
            name = f"{'az'[n % 2]}{n}"
            requests += [
                create(name, new_record({})),
                update(name, old, new),
                update("m", old, new),
            ]
        expected = [APPLIED.outcome] + [Outcome.APPLIED, Outcome.CONFLICT, Outcome.APPLIED] * 199
        found = await outcomes(tier, *requests)
        assert len(found) == len(expected)
        # Not the lists themselves: the difference of two long ones can take minutes to draw.
        wrong = {
            n: pair for n, pair in enumerate(zip(found, expected, strict=True)) if len({*pair}) > 1
        }
        assert not wrong, f"of {len(expected)} requests (found, expected): {wrong}"
        assert (await loaded(tier, "m")).record == chain[-1]

    async def test_calls_of_one_worker_are_applied_in_their_order(
        self, open_tier: OpenTier
    ) -> None:
        """Though each is made before the one before it has been answered."""
        tier = await open_tier()
        chain = chain_of(40)
        calls = [create("a", chain[0])]
        calls += [update("a", old, new, whole=True) for old, new in pairwise(chain)]
        found = await asyncio.gather(*(outcome(tier, call) for call in calls))
        assert found == [Outcome.APPLIED] * len(calls)
        assert (await loaded(tier, "a")).record == chain[-1]

    async def test_of_two_writers_no_increment_is_lost(self, open_tier: OpenTier) -> None:
        """Each reads, adds one, and tries again when the other was first."""
        writers = [await open_tier(), await open_tier()]
        await created(writers[0], "a", {"n": 0})

        async def count_up(tier: RemoteTier) -> None:
            for _ in range(20):
                while True:
                    old = (await loaded(tier, "a")).record
                    new = next_record(old, {"n": data_of(old)["n"] + 1})
                    found = await outcome(tier, update("a", old, new))
                    if found is Outcome.APPLIED:
                        break
                    assert found is Outcome.CONFLICT

        await asyncio.gather(*map(count_up, writers))
        record = (await loaded(writers[0], "a")).record
        assert (data_of(record), rec.version_of(record)) == ({"n": 40}, 41)

    async def test_two_writers_on_the_same_sessions_in_another_order_do_not_block_each_other(
        self, open_tier: OpenTier
    ) -> None:
        """Batches over the same sessions, forwards and backwards at the same time."""
        writers = [await open_tier(), await open_tier()]
        names = [f"s{n}" for n in range(40)]
        records = {name: new_record({"n": 0}) for name in names}
        assert (
            await writers[0].commit([create(*item) for item in records.items()]) == [APPLIED] * 40
        )
        for _ in range(5):
            batches = [
                [
                    update(name, records[name], next_record(records[name], {"n": n}))
                    for name in order
                ]
                for n, order in enumerate((names, names[::-1]))
            ]
            results = await asyncio.gather(
                *(outcomes(tier, *batch) for tier, batch in zip(writers, batches, strict=True))
            )
            for name in names:
                pair = [
                    (found[batch.index(put)], put)
                    for found, batch in zip(results, batches, strict=True)
                    for put in batch
                    if put.session_id == name
                ]
                assert sorted(each.name for each, _ in pair) == ["APPLIED", "CONFLICT"]
                records[name] = next(put.record for each, put in pair if each is Outcome.APPLIED)
        for name in names:
            assert (await loaded(writers[1], name)).record == records[name]

    async def test_of_many_workers_that_create_one_session_one_succeeds(
        self, open_tier: OpenTier
    ) -> None:
        """The others are told what lives there."""
        tiers = [await open_tier() for _ in range(3)]
        found = await asyncio.gather(
            *(each.commit([create("a", new_record({"n": 0}))]) for each in tiers for _ in range(5))
        )
        outcomes_of_all = sorted(result.outcome.name for [result] in found)
        assert outcomes_of_all == ["APPLIED"] + ["CONFLICT"] * 14
        record = (await loaded(tiers[0], "a")).record
        told = {result.stored for [result] in found if result.outcome is Outcome.CONFLICT}
        assert told == {Stored(True, 1, rec.incarnation_of(record), rec.commit_of(record))}

    async def test_a_missing_session_takes_no_update(self, open_tier: OpenTier) -> None:
        """And a refused one does not bring it about."""
        tier = await open_tier()
        old = new_record({"n": 0})
        new = next_record(old, {"n": 1})
        requests: list[Request] = [
            update("a", old, new),
            update("a", old, new, whole=True),
            touch("a", old, 1, 2),
        ]
        assert await outcomes(tier, *requests) == [Outcome.MISSING] * 3
        assert await tier.load("a") is None

    # --- lost replies ---------------------------------------------------------------------------

    async def test_a_repeated_commit_is_recognised_and_changes_nothing(
        self, open_tier: OpenTier
    ) -> None:
        """Whoever sends it again: a worker that was started again has another connection."""
        tier, other = await open_tier(), await open_tier()
        first = new_record({"n": 0})
        second = next_record(first, {"n": 1})
        requests: list[Request] = [create("a", first), update("a", first, second)]
        assert await tier.commit(requests) == [APPLIED] * 2
        for each in (tier, other):
            again = await each.commit(requests)
            assert [result.outcome for result in again] == [Outcome.ALREADY_APPLIED] * 2
            assert all(result.is_stored for result in again)
            stored = Stored(True, 2, rec.incarnation_of(first), rec.commit_of(second))
            assert again[0].stored == stored
        assert (await loaded(tier, "a")).record == second

    async def test_the_last_32_commits_are_recognised(self, open_tier: OpenTier) -> None:
        """What is older conflicts: it is not applied twice either."""
        tier = await open_tier()
        chain = chain_of(IDS_REMEMBERED + 8)
        assert await outcome(tier, create("a", chain[0])) is Outcome.APPLIED
        requests = [update("a", old, new) for old, new in pairwise(chain)]
        assert await tier.commit(requests) == [APPLIED] * len(requests)
        again = await outcomes(tier, *requests)
        assert again[-IDS_REMEMBERED:] == [Outcome.ALREADY_APPLIED] * IDS_REMEMBERED
        assert set(again[:-IDS_REMEMBERED]) <= {Outcome.CONFLICT}
        assert (await loaded(tier, "a")).record == chain[-1]

    async def test_what_may_have_been_applied_and_forgotten_is_told(
        self, open_tier: OpenTier
    ) -> None:
        """A put whose base is among the remembered ids, and which is not, was never applied."""
        tier = await open_tier()
        chain = chain_of(IDS_REMEMBERED + 8)
        requests: list[Request] = [create("a", chain[0])]
        requests += [update("a", old, new) for old, new in pairwise(chain)]
        assert await tier.commit(requests) == [APPLIED] * len(requests)
        await created(tier, "b", {"n": 0})

        def built_on(base: bytes) -> Put:
            return update("a", base, next_record(base, {"n": "of another worker"}))

        certain = [
            built_on(chain[-2]),
            built_on(chain[-IDS_REMEMBERED]),
            create("b", new_record({"n": 1})),
        ]
        in_doubt = [
            requests[1],
            built_on(chain[-IDS_REMEMBERED - 1]),
            create("a", new_record({"n": 1})),
        ]
        results = await tier.commit([*certain, *in_doubt])
        assert [result.outcome for result in results] == [Outcome.CONFLICT] * 6
        assert [result.may_be_forgotten for result in results] == [False] * 3 + [True] * 3
        assert await outcome(tier, end("a")) is Outcome.APPLIED
        results = await tier.commit([built_on(chain[-2]), built_on(chain[2])])
        assert [result.outcome for result in results] == [Outcome.TERMINATED] * 2
        assert [result.may_be_forgotten for result in results] == [False, True]

    async def test_commits_are_recognised_over_an_end_and_a_new_beginning(
        self, open_tier: OpenTier
    ) -> None:
        """However many there were before."""
        tier = await open_tier()
        for commits in (1, 5, 8, 9, 17, 40):
            name = f"s{commits}"
            chain = chain_of(commits)
            requests: list[Request] = [create(name, chain[0])]
            requests += [
                update(name, old, new, whole=not n % 3)
                for n, (old, new) in enumerate(pairwise(chain))
            ]
            ending = end(name)
            anew = new_record({"n": 0, "m": 1})
            last = next_record(anew, {"n": 1, "m": 2})
            requests += [ending, create(name, anew), update(name, anew, last)]
            assert await tier.commit(requests) == [APPLIED] * len(requests)
            again = await outcomes(tier, *requests)
            known = min(IDS_REMEMBERED, len(requests))
            assert again[-known:] == [Outcome.ALREADY_APPLIED] * known
            assert set(again[:-known]) <= {Outcome.CONFLICT}
            found = await loaded(tier, name)
            assert found.record == last
            ids = [rec.commit_of(each) for each in chain]
            ids += [ending.commit, rec.commit_of(anew), rec.commit_of(last)]
            assert found.history == tuple(ids[::-1][:IDS_REMEMBERED])

    async def test_after_a_crash_between_any_two_calls_another_worker_goes_on(
        self, open_tier: OpenTier
    ) -> None:
        """It does not know whether the last call was answered, and sends that one again."""
        crashing, successor = await open_tier(), await open_tier()
        for cut in range(9):
            name = f"s{cut}"
            first = new_record({"n": 0})
            second = next_record(first, {"n": 1})
            third = next_record(second, {"n": 2})
            anew = new_record({"n": 9})
            calls: list[Request] = [
                create(name, first),
                update(name, first, second),
                touch(name, second, _wall() + 1, _wall() + 9000),
                update(name, second, third, whole=True),
                end(name),
                create(name, anew),
                touch(name, anew, _wall() + 2, NEVER),
                update(name, anew, next_record(anew, {"n": 10})),
            ]
            for call in calls[:cut]:
                assert await outcome(crashing, call) is Outcome.APPLIED
            if cut:
                [again] = await successor.commit([calls[cut - 1]])
                assert again.is_stored, "what was applied is recognised"
            for call in calls[cut:]:
                assert await outcome(successor, call) is Outcome.APPLIED
            record = (await loaded(successor, name)).record
            assert (data_of(record), rec.version_of(record)) == ({"n": 10}, 2)

    async def test_a_commit_that_is_cancelled_anywhere_is_decided_by_sending_it_again(
        self, open_tier: OpenTier
    ) -> None:
        """It was applied or not; sent again it is applied, once."""
        tier, other = await open_tier(), await open_tier()
        record = await created(tier, "a", {"n": 0})
        for steps in range(_STEPS):
            new = next_record(record, {"n": steps + 1})
            request = update("a", record, new)
            async with cancelled_after(steps, tier.commit([request])):
                found = await outcome((tier, other)[steps % 2], request)
            assert found in (Outcome.APPLIED, Outcome.ALREADY_APPLIED)
            record = new
            assert (await loaded(tier, "a")).record == record
        assert rec.version_of(record) == _STEPS + 1

    async def test_no_answer_reaches_another_caller(self, open_tier: OpenTier) -> None:
        """Calls are cancelled anywhere, and others asked behind them."""
        tier = await open_tier()
        records = [await created(tier, f"s{n}", {"n": n}) for n in range(_STEPS)]
        for steps in range(_STEPS):
            async with cancelled_after(steps, tier.load("s0")):
                found = await asyncio.gather(*(loaded(tier, f"s{n}") for n in range(1, 4)))
            assert [each.record for each in found] == records[1:4]

    # --- ends -----------------------------------------------------------------------------------

    async def test_a_terminated_session_leaves_a_tombstone_that_takes_nothing(
        self, open_tier: OpenTier
    ) -> None:
        """Neither updates nor its creation come late."""
        tier = await open_tier()
        record = await created(tier, "a", {"n": 0})
        ending = end("a")
        assert await outcome(tier, ending) is Outcome.APPLIED
        tombstone = Stored(False, 1, rec.incarnation_of(record), ending.commit)
        history = (ending.commit, rec.commit_of(record))
        assert await tier.load("a") == tombstone._replace(history=history)
        assert await tier.stored(["a"]) == [tombstone]
        late: list[Request] = [
            update("a", record, next_record(record, {"n": 1})),
            update("a", record, next_record(record, {"n": 1}), whole=True),
            touch("a", record, _wall(), _wall() + 99),
            create("a", new_record({"n": 1}, incarnation=rec.incarnation_of(record))),
            end("a"),
        ]
        for result in await tier.commit(late):
            assert (result.outcome, result.stored) == (Outcome.TERMINATED, tombstone)
        assert await outcome(tier, ending) is Outcome.ALREADY_APPLIED
        assert await tier.load("a") == tombstone._replace(history=history)
        assert await listed(tier) == []

    async def test_a_session_is_created_anew_over_a_tombstone(self, open_tier: OpenTier) -> None:
        """Late repetitions of what the first incarnation was are recognised, or refused."""
        tier = await open_tier()
        first = await created(tier, "a", {"n": 0, "old": 1})
        ending = end("a")
        again = new_record({"n": 9})
        assert await tier.commit([ending, create("a", again)]) == [APPLIED] * 2
        assert (await loaded(tier, "a")).record == again
        living = Stored(True, 1, rec.incarnation_of(again), rec.commit_of(again))
        assert await tier.stored(["a"]) == [living], "nothing of the first one is left"
        late: list[Request] = [
            create("a", first),
            ending,
            update("a", first, next_record(first, {"n": 1})),
        ]
        expected = [Outcome.ALREADY_APPLIED, Outcome.ALREADY_APPLIED, Outcome.CONFLICT]
        assert await outcomes(tier, *late) == expected
        assert (await loaded(tier, "a")).record == again

    async def test_an_end_may_be_limited_to_an_incarnation_or_a_commit(
        self, open_tier: OpenTier
    ) -> None:
        """Anything else that lives there stays."""
        tier = await open_tier()
        first = await created(tier, "a", {"n": 0})
        second = next_record(first, {"n": 1})
        assert await outcome(tier, update("a", first, second)) is Outcome.APPLIED
        incarnation = rec.incarnation_of(first)
        assert await outcome(tier, end("a", incarnation=new_id())) is Outcome.CONFLICT
        assert await outcome(tier, end("a", base=rec.commit_of(first))) is Outcome.CONFLICT
        assert (await loaded(tier, "a")).record == second
        assert await outcome(tier, end("a", incarnation, rec.commit_of(second))) is Outcome.APPLIED

    async def test_ending_a_missing_session_leaves_a_tombstone_all_the_same(
        self, open_tier: OpenTier
    ) -> None:
        """So a creation of that incarnation that is still on its way comes too late."""
        tier = await open_tier()
        record = new_record({"n": 0})
        ending = end("a", rec.incarnation_of(record))
        assert await outcome(tier, ending) is Outcome.MISSING
        assert await outcome(tier, ending) is Outcome.MISSING, "the same answer when repeated"
        assert await outcome(tier, create("a", record)) is Outcome.TERMINATED
        assert await outcome(tier, create("a", new_record({"n": 1}))) is Outcome.APPLIED

    async def test_a_tombstone_is_forgotten_after_its_retention(self, open_tier: OpenTier) -> None:
        """And its id is free again."""
        tier = await open_tier(tombstone_seconds=0.05)
        record = await created(tier, "a", {"n": 0})
        assert await outcome(tier, end("a")) is Outcome.APPLIED
        await gone(tier, "a")
        assert await outcome(tier, create("a", record)) is Outcome.APPLIED

    # --- time -----------------------------------------------------------------------------------

    async def test_a_session_expires_by_its_deadline(self, open_tier: OpenTier) -> None:
        """Then there is nothing, and its id is free."""
        tier = await open_tier()
        record = new_record({"n": 0})
        assert await outcome(tier, create("a", record, ttl_seconds=0.1)) is Outcome.APPLIED
        await gone(tier, "a")
        assert await tier.stored(["a"]) == [None]
        assert await listed(tier) == []
        assert await outcome(tier, update("a", record, next_record(record, {}))) is Outcome.MISSING
        assert await outcome(tier, touch("a", record, _wall(), NEVER)) is Outcome.MISSING
        anew = await created(tier, "a", {"n": 1})
        assert (await loaded(tier, "a")).record == anew
        assert await outcome(tier, create("b", record, ttl_seconds=0.1)) is Outcome.APPLIED
        await gone(tier, "b")
        assert await outcome(tier, end("b")) is Outcome.MISSING

    async def test_a_session_whose_time_is_over_does_not_live_for_a_moment(
        self, open_tier: OpenTier
    ) -> None:
        """A creation, an update or a renewal that comes too late."""
        tier = await open_tier()
        assert await outcome(tier, create("a", new_record({}), ttl_seconds=-1)) is Outcome.APPLIED
        assert await tier.load("a") is None
        old = await created(tier, "b", {"n": 0})
        late = update("b", old, next_record(old, {"n": 1}))._replace(deadline=_wall() - 1)
        assert await outcome(tier, late) is Outcome.APPLIED
        assert await tier.load("b") is None
        record = await created(tier, "c", {"n": 0})
        now = _wall()
        assert await outcome(tier, touch("c", record, now, now - 1)) is Outcome.APPLIED
        assert await tier.load("c") is None
        assert await listed(tier) == []

    async def test_a_touch_moves_the_deadline_and_never_the_last_access_back(
        self, open_tier: OpenTier
    ) -> None:
        """It makes no new version."""
        tier = await open_tier()
        record = await created(tier, "a", {"n": 0})
        now = _wall()
        assert await outcome(tier, touch("a", record, now + 5, now + 60)) is Outcome.APPLIED
        assert await outcome(tier, touch("a", record, now + 4, now + 50)) is Outcome.APPLIED
        found = await loaded(tier, "a")
        assert (found.record, found.accessed, found.deadline) == (record, now + 5, now + 60)
        assert await outcome(tier, touch("a", record, now + 6, NEVER)) is Outcome.APPLIED
        assert (await loaded(tier, "a")).deadline == NEVER

    async def test_a_touch_of_another_version_is_refused(self, open_tier: OpenTier) -> None:
        """It may be older than what is stored."""
        tier = await open_tier()
        old = await created(tier, "a", {"n": 0})
        new = next_record(old, {"n": 1})
        assert await outcome(tier, update("a", old, new)) is Outcome.APPLIED
        before = await loaded(tier, "a")
        assert await outcome(tier, touch("a", old, _wall() + 5, NEVER)) is Outcome.CONFLICT
        assert await loaded(tier, "a") == before

    # --- ids ------------------------------------------------------------------------------------

    async def test_any_session_id_is_a_plain_key(self, open_tier: OpenTier) -> None:
        """None of them reaches another one, by itself or as a prefix."""
        tier = await open_tier()
        records = {name: await created(tier, name, {"id": name}) for name in HOSTILE_IDS}
        for name, record in records.items():
            assert (await loaded(tier, name)).record == record
            for prefix in (name, name + "x", name[:1]):
                expected = sorted(each for each in HOSTILE_IDS if each.startswith(prefix))
                assert sorted(await listed(tier, prefix)) == expected
        assert sorted(await listed(tier)) == sorted(HOSTILE_IDS)
        for name in HOSTILE_IDS[::2]:
            assert await outcome(tier, end(name)) is Outcome.APPLIED
        assert sorted(await listed(tier)) == sorted(HOSTILE_IDS[1::2])

    async def test_a_scan_finds_all_live_sessions_by_prefix_and_nothing_else(
        self, open_tier: OpenTier
    ) -> None:
        """More of them than a page of any tier has."""
        tier = await open_tier()
        names = [f"user{n % 7}:{n}" for n in range(3000)]
        await tier.commit([create(name, new_record({"n": 0})) for name in names])
        await tier.commit([end(name) for name in names[::10]])
        living = set(names) - set(names[::10])
        assert set(await listed(tier)) == living
        some = {name for name in living if name.startswith("user3:")}
        assert set(await listed(tier, "user3:")) == some
        assert await listed(tier, "user9") == []

    async def test_a_scan_finds_what_lives_all_the_while_though_others_end(
        self, open_tier: OpenTier
    ) -> None:
        """Each page that has come is ended, but for its last id."""
        tier = await open_tier()
        names = {f"s{n}" for n in range(3000)}
        await tier.commit([create(name, new_record({"n": 0})) for name in sorted(names)])
        found: set[str] = set()
        ended: set[str] = set()
        async for page in tier.scan("s"):
            found.update(page)
            some = names.intersection(page[:-1]) - ended
            ended |= some
            await tier.commit([end(name) for name in some])
        assert names - ended <= found

    # --- the tier itself ------------------------------------------------------------------------

    async def test_the_epoch_is_one_for_all_workers_and_stays(self, open_tier: OpenTier) -> None:
        """Also when they come at the same time."""
        tiers = [await open_tier() for _ in range(3)]
        epochs = await asyncio.gather(*(tier.epoch() for tier in tiers for _ in range(2)))
        assert len(set(epochs)) == 1
        assert epochs[0]
        await created(tiers[0], "a", {})
        assert await (await open_tier()).epoch() == epochs[0]

    async def test_a_ping_tells_how_long_it_took(self, open_tier: OpenTier) -> None:
        """In seconds."""
        assert 0 < await (await open_tier()).ping() < _PATIENCE_SECONDS

    async def test_closing_twice_does_no_harm(self, open_tier: OpenTier) -> None:
        """Also while it listens, and without a word to the listener."""
        tier = await open_tier()
        heard = await self._listening(tier)
        await tier.close()
        await tier.close()
        await asyncio.sleep(0)
        assert heard.events == ["connected"]

    # --- announcements --------------------------------------------------------------------------

    @staticmethod
    async def _listening(tier: RemoteTier) -> Heard:
        heard = Heard()
        await tier.subscribe(heard)
        await until(lambda: heard.events == ["connected"], "the listener is told of the connection")
        return heard

    async def test_a_listener_is_told_the_epoch(self, open_tier: OpenTier) -> None:
        """The one that the tier tells who asks."""
        tier = await open_tier()
        heard = await self._listening(tier)
        assert heard.epochs == [await tier.epoch()]

    async def test_commits_of_another_worker_are_announced_in_order_and_own_ones_are_not(
        self, open_tier: OpenTier
    ) -> None:
        """Creations, updates and ends; a renewal is none of it."""
        tier, other = await open_tier(), await open_tier()
        own, heard = await self._listening(tier), await self._listening(other)
        chain = chain_of(5)
        ending = end("ü\n {")
        await tier.commit([create("ü\n {", chain[0]), create("other", new_record({}))])
        for old, new in pairwise(chain):
            await tier.commit([update("ü\n {", old, new)])
        await tier.commit([touch("ü\n {", chain[-1], _wall(), NEVER), ending])
        await until(lambda: len(heard.announcements) >= 7, "all commits are announced")
        mine = [item for item in heard.announcements if item.session_id == "ü\n {"]
        expected = [(rec.version_of(record), rec.commit_of(record), False) for record in chain]
        expected.append((5, ending.commit, True))
        assert [(item.version, item.commit, item.ended) for item in mine] == expected
        assert {item.worker for item in heard.announcements} == {tier.worker}
        assert own.announcements == []

    async def test_commits_of_one_batch_are_announced_in_order(self, open_tier: OpenTier) -> None:
        """With an end among them, and a new beginning."""
        tier = await open_tier()
        heard = await self._listening(await open_tier())
        chain, anew, ending = chain_of(30), chain_of(30), end("a")
        requests: list[Request] = [create("a", chain[0])]
        requests += [update("a", old, new) for old, new in pairwise(chain)]
        requests += [ending, create("a", anew[0])]
        requests += [update("a", old, new) for old, new in pairwise(anew)]
        assert await tier.commit(requests) == [APPLIED] * len(requests)
        await until(lambda: len(heard.announcements) >= len(requests), "all are announced")
        expected = [rec.commit_of(each) for each in chain]
        expected += [ending.commit, *(rec.commit_of(each) for each in anew)]
        assert [item.commit for item in heard.announcements] == expected

    async def test_the_end_of_a_missing_session_is_announced(self, open_tier: OpenTier) -> None:
        """Another worker may still have a copy of what the tier has lost."""
        tier = await open_tier()
        heard = await self._listening(await open_tier())
        ending = end("a", new_id())
        assert await outcome(tier, ending) is Outcome.MISSING
        await until(lambda: bool(heard.announcements), "it is announced")
        [told] = heard.announcements
        assert (told.session_id, told.commit, told.ended) == ("a", ending.commit, True)

    async def test_what_is_announced_is_there(self, open_tier: OpenTier) -> None:
        """Whoever looks when it hears of a commit finds that one, or a later one."""
        tier, other = await open_tier(), await open_tier()
        heard = _Looking(other)
        await other.subscribe(heard)
        await until(lambda: heard.events == ["connected"], "the listener is told of the connection")
        chain = chain_of(20)
        assert await outcome(tier, create("a", chain[0])) is Outcome.APPLIED
        for old, new in pairwise(chain):
            assert await outcome(tier, update("a", old, new)) is Outcome.APPLIED
        await until(lambda: len(heard.announcements) >= len(chain), "all are announced")
        for told, found in zip(
            heard.announcements, await asyncio.gather(*heard.looks), strict=True
        ):
            assert isinstance(found, RemoteSession), f"version {told.version} is there"
            assert told.commit in found.history, f"version {told.version} is there"

    async def test_what_is_refused_or_repeated_is_not_announced(self, open_tier: OpenTier) -> None:
        """Nothing has changed. Only announcements of one session have an order."""
        tier = await open_tier()
        heard = await self._listening(await open_tier())
        first = new_record({"n": 0})
        second = next_record(first, {"n": 1})
        last = next_record(second, {"n": 2})
        requests: list[Request] = [create("a", first), update("a", first, second)]
        await tier.commit(requests)
        await tier.commit([*requests, update("a", first, next_record(first, {}))])
        await tier.commit([update("a", second, last)])
        expected = [rec.commit_of(record) for record in (first, second, last)]
        await until(
            lambda: expected[-1] in [item.commit for item in heard.announcements],
            "the last commit is announced",
        )
        assert [item.commit for item in heard.announcements] == expected

    async def test_each_of_many_commits_is_announced(self, open_tier: OpenTier) -> None:
        """More than fits into one message, with ids as long as they may be."""
        tier = await open_tier()
        heard = await self._listening(await open_tier())
        names = [f"{n:04}" + "x" * 508 for n in range(300)]
        await tier.commit([create(name, new_record({})) for name in names])
        await until(lambda: len(heard.announcements) >= len(names), "all are announced")
        assert sorted(item.session_id for item in heard.announcements) == names
