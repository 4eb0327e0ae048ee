"""What every shared tier does: on each version of the server, Sentinel and Cluster."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

import pytest

from persistence import record as rec
from persistence.record import NEVER, NO_ID
from persistence.remote.contract import (
    APPLIED,
    IDS_REMEMBERED,
    Outcome,
    Put,
    RemoteSession,
    Request,
    Stored,
)
from persistence.remote.redis import RedisTier
from tests.redis_servers import Group
from tests.remote.conftest import Open
from tests.remote.sessions import (
    create,
    data_of,
    end,
    new_id,
    new_record,
    next_record,
    touch,
    update,
)

ODD_IDS = ["a", "with space", "{tag}", "}{", "*?[x]\\^-", "ü" * 200, "a\nb\0c", "x" * 512, "../etc"]


async def outcome(tier: RedisTier, request: Request) -> Outcome:
    [result] = await tier.commit([request])
    return result.outcome


async def loaded(tier: RedisTier, session_id: str) -> RemoteSession:
    found = await tier.load(session_id)
    assert isinstance(found, RemoteSession), found
    return found


async def gone(tier: RedisTier, session_id: str) -> None:
    """Wait for the server's clock to end it."""
    async with asyncio.timeout(5):
        while await tier.load(session_id) is not None:  # noqa: ASYNC110 - nobody here can tell
            await asyncio.sleep(0.01)


async def created(tier: RedisTier, session_id: str, data: dict[str, object]) -> bytes:
    record = new_record(data)
    assert await outcome(tier, create(session_id, record)) is Outcome.APPLIED
    return record


async def test_a_session_comes_back_byte_for_byte_with_its_times(tier: RedisTier) -> None:
    data = {"cart": {"items": [1, 2]}, "": None, "ü": "x" * 100, "state": b"\xff", "big": [0] * 999}
    record = new_record(data)
    now = time.time()
    put = Put("a", record, NO_ID, now, now + 60.5, now + 600)
    assert await tier.commit([put]) == [APPLIED]
    history = (rec.commit_of(record),)
    assert await tier.load("a") == RemoteSession(record, now, now + 60.5, now + 600, history)
    assert data_of(record) == data


async def test_what_never_was_is_none(tier: RedisTier) -> None:
    assert await tier.load("a") is None
    assert await tier.stored(["a", "b"]) == [None, None]
    assert await tier.load_many([]) == []
    assert await tier.stored([]) == []
    assert await tier.commit([]) == []


@pytest.mark.parametrize("whole", [False, True])
async def test_an_update_is_applied_on_the_commit_it_was_built_on(
    tier: RedisTier, whole: bool
) -> None:
    old = await created(tier, "a", {"a": 1, "b": "x" * 100, "c": 3})
    new = next_record(old, {"c": 3, "d": [4], "b": "y" * 100})
    assert await outcome(tier, update("a", old, new, whole=whole)) is Outcome.APPLIED
    assert (await loaded(tier, "a")).record == new
    [stored] = await tier.stored(["a"])
    assert stored == Stored(True, 2, rec.incarnation_of(new), rec.commit_of(new))


async def test_the_order_of_fields_survives_when_only_the_order_changes(tier: RedisTier) -> None:
    old = await created(tier, "a", {"a": 1, "b": 2})
    new = next_record(old, {"b": 2, "a": 1})
    assert await outcome(tier, update("a", old, new)) is Outcome.APPLIED
    assert (await loaded(tier, "a")).record == new


async def test_an_update_on_another_base_is_refused_and_told_what_is_stored(
    tier: RedisTier,
) -> None:
    first = await created(tier, "a", {"n": 0})
    theirs, ours = next_record(first, {"n": 1}), next_record(first, {"n": 2})
    assert await outcome(tier, update("a", first, theirs)) is Outcome.APPLIED
    [result] = await tier.commit([update("a", first, ours)])
    assert result.outcome is Outcome.CONFLICT
    assert result.stored == Stored(True, 2, rec.incarnation_of(first), rec.commit_of(theirs))
    assert not result.is_stored
    assert (await loaded(tier, "a")).record == theirs


async def test_successors_of_a_refused_commit_are_refused_whatever_their_version(
    tier: RedisTier,
) -> None:
    """Another worker's version 2 wins; ours fails, and our pipelined 3, 4, 5 fail with it."""
    first = await created(tier, "a", {"n": 0})
    theirs = next_record(first, {"n": -1})
    chain = [first]
    for n in range(1, 5):
        chain.append(next_record(chain[-1], {"n": n}))
    assert await outcome(tier, update("a", first, theirs)) is Outcome.APPLIED
    requests = [update("a", old, new) for old, new in pairwise(chain)]
    assert rec.version_of(requests[1].record) == rec.version_of(theirs) + 1
    results = await tier.commit(requests)
    assert [result.outcome for result in results] == [Outcome.CONFLICT] * 4
    assert (await loaded(tier, "a")).record == theirs


async def test_a_chain_of_commits_in_one_batch_is_applied_in_order(tier: RedisTier) -> None:
    chain = [new_record({"n": 0})]
    for n in range(1, 300):  # more than one run of the script takes
        chain.append(next_record(chain[-1], {"n": n}))
    updates = [update("a", old, new) for old, new in pairwise(chain)]
    results = await tier.commit([create("a", chain[0]), *updates])
    assert results == [APPLIED] * 300
    assert (await loaded(tier, "a")).record == chain[-1]


async def test_a_repeated_commit_is_recognised_and_changes_nothing(tier: RedisTier) -> None:
    first = new_record({"n": 0})
    second = next_record(first, {"n": 1})
    requests: list[Request] = [create("a", first), update("a", first, second)]
    assert await tier.commit(requests) == [APPLIED] * 2
    again = await tier.commit(requests)
    assert [result.outcome for result in again] == [Outcome.ALREADY_APPLIED] * 2
    assert all(result.is_stored for result in again)
    assert again[0].stored == Stored(True, 2, rec.incarnation_of(first), rec.commit_of(second))
    assert (await loaded(tier, "a")).record == second


async def test_the_last_32_commits_are_recognised(tier: RedisTier) -> None:
    chain = [await created(tier, "a", {"n": 0})]
    for n in range(1, 40):
        chain.append(next_record(chain[-1], {"n": n}))
    requests = [update("a", old, new) for old, new in pairwise(chain)]
    assert await tier.commit(requests) == [APPLIED] * 39
    again = [result.outcome for result in await tier.commit(requests)]
    assert again == [Outcome.CONFLICT] * 7 + [Outcome.ALREADY_APPLIED] * 32


@pytest.mark.parametrize("commits", [5, 8, 9, 17, 40])
async def test_commits_are_recognised_however_the_session_went_on(
    tier: RedisTier, commits: int
) -> None:
    """Their ids move from place to place; an end and a re-creation take them along."""
    chain = [await created(tier, "a", {"n": 0})]
    for n in range(1, commits):
        chain.append(next_record(chain[-1], {"n": n}))
    requests: list[Request] = [update("a", old, new) for old, new in pairwise(chain)]
    # Whole ones and ones of two fields go other ways through the script.
    requests[2::3] = [
        request._replace(old=None) for request in requests[2::3] if isinstance(request, Put)
    ]
    assert await tier.commit(requests) == [APPLIED] * (commits - 1)
    ended = end("a")
    anew = new_record({"n": 0, "m": 1})
    last = next_record(anew, {"n": 1, "m": 2})
    assert await tier.commit([ended]) == [APPLIED]
    assert await tier.commit([create("a", anew), update("a", anew, last)]) == [APPLIED] * 2
    requests += [ended, create("a", anew), update("a", anew, last)]
    outcomes = [result.outcome for result in await tier.commit(requests)]
    known = min(IDS_REMEMBERED, len(requests))
    # What is forgotten is an update of an incarnation that has ended, on a session that lives.
    assert outcomes[-known:] == [Outcome.ALREADY_APPLIED] * known
    assert set(outcomes[:-known]) <= {Outcome.CONFLICT}
    found = await tier.load("a")
    assert isinstance(found, RemoteSession)
    assert found.record == last


async def test_a_creation_conflicts_with_a_live_session(tier: RedisTier) -> None:
    record = await created(tier, "a", {"n": 0})
    [result] = await tier.commit([create("a", new_record({"n": 1}))])
    assert result.outcome is Outcome.CONFLICT
    assert result.stored is not None
    assert result.stored.commit == rec.commit_of(record)


async def test_of_many_workers_that_create_one_session_one_succeeds(
    tier: RedisTier, open_tier: Open, deployment: Group
) -> None:
    tiers = [tier, await open_tier(deployment.url), await open_tier(deployment.url)]
    results = await asyncio.gather(
        *(each.commit([create("a", new_record({"n": 0}))]) for each in tiers for _ in range(5))
    )
    assert sorted(result[0].outcome.name for result in results) == ["APPLIED"] + ["CONFLICT"] * 14


async def test_a_missing_session_takes_no_update(tier: RedisTier) -> None:
    old = new_record({"n": 0})
    new = next_record(old, {"n": 1})
    requests: list[Request] = [
        update("a", old, new),
        update("a", old, new, whole=True),
        touch("a", old, 1, 2),
    ]
    results = await tier.commit(requests)
    assert [result.outcome for result in results] == [Outcome.MISSING] * 3
    assert await tier.load("a") is None


async def test_a_terminated_session_leaves_a_tombstone_that_takes_nothing(tier: RedisTier) -> None:
    record = await created(tier, "a", {"n": 0})
    ending = end("a")
    assert await outcome(tier, ending) is Outcome.APPLIED
    tombstone = Stored(False, 1, rec.incarnation_of(record), ending.commit)
    assert await tier.load("a") == tombstone
    assert await tier.stored(["a"]) == [tombstone]
    late: list[Request] = [
        update("a", record, next_record(record, {"n": 1})),
        update("a", record, next_record(record, {"n": 1}), whole=True),
        touch("a", record, time.time(), time.time() + 99),
        create("a", new_record({"n": 1}, incarnation=rec.incarnation_of(record))),
        end("a"),
    ]
    for result in await tier.commit(late):
        assert (result.outcome, result.stored) == (Outcome.TERMINATED, tombstone)
    assert await outcome(tier, ending) is Outcome.ALREADY_APPLIED
    assert await tier.load("a") == tombstone


async def test_a_session_is_created_anew_over_a_tombstone(tier: RedisTier) -> None:
    first = await created(tier, "a", {"n": 0, "old": 1})
    ending = end("a")
    again = new_record({"n": 9})
    assert await tier.commit([ending, create("a", again)]) == [APPLIED] * 2
    assert (await loaded(tier, "a")).record == again
    # Late repetitions of what the first incarnation was are recognised, or refused.
    late: list[Request] = [
        create("a", first),
        ending,
        update("a", first, next_record(first, {"n": 1})),
    ]
    outcomes = [result.outcome for result in await tier.commit(late)]
    assert outcomes == [Outcome.ALREADY_APPLIED, Outcome.ALREADY_APPLIED, Outcome.CONFLICT]
    assert (await loaded(tier, "a")).record == again


async def test_an_end_may_be_limited_to_an_incarnation_or_a_commit(tier: RedisTier) -> None:
    first = await created(tier, "a", {"n": 0})
    second = next_record(first, {"n": 1})
    assert await outcome(tier, update("a", first, second)) is Outcome.APPLIED
    incarnation = rec.incarnation_of(first)
    assert await outcome(tier, end("a", incarnation=new_id())) is Outcome.CONFLICT
    assert await outcome(tier, end("a", base=rec.commit_of(first))) is Outcome.CONFLICT
    assert await outcome(tier, end("a", incarnation, rec.commit_of(second))) is Outcome.APPLIED


async def test_ending_a_missing_session_leaves_a_tombstone_all_the_same(tier: RedisTier) -> None:
    record = new_record({"n": 0})
    ending = end("a", rec.incarnation_of(record))
    assert await outcome(tier, ending) is Outcome.MISSING
    assert await outcome(tier, ending) is Outcome.MISSING  # the same answer when it is repeated
    assert await outcome(tier, create("a", record)) is Outcome.TERMINATED
    assert await outcome(tier, create("a", new_record({"n": 1}))) is Outcome.APPLIED


async def test_a_tombstone_is_forgotten_after_its_retention(
    open_tier: Open, deployment: Group
) -> None:
    tier = await open_tier(deployment.url, tombstone_seconds=0.05)
    await created(tier, "a", {"n": 0})
    assert await outcome(tier, end("a")) is Outcome.APPLIED
    await gone(tier, "a")


async def test_a_session_expires_by_its_deadline(tier: RedisTier) -> None:
    record = new_record({"n": 0})
    assert await outcome(tier, create("a", record, ttl_seconds=0.1)) is Outcome.APPLIED
    await gone(tier, "a")
    assert await outcome(tier, update("a", record, next_record(record, {}))) is Outcome.MISSING
    # A creation that comes late does not live for a moment.
    assert await outcome(tier, create("b", new_record({}), ttl_seconds=-1)) is Outcome.APPLIED
    assert await tier.load("b") is None


async def test_a_touch_moves_the_deadline_and_never_the_last_access_back(tier: RedisTier) -> None:
    record = await created(tier, "a", {"n": 0})
    now = time.time()
    assert await outcome(tier, touch("a", record, now + 5, now + 60)) is Outcome.APPLIED
    assert await outcome(tier, touch("a", record, now + 4, now + 50)) is Outcome.APPLIED
    found = await loaded(tier, "a")
    assert (found.record, found.accessed, found.deadline) == (record, now + 5, now + 60)
    assert await outcome(tier, touch("a", record, now + 6, NEVER)) is Outcome.APPLIED
    assert (await loaded(tier, "a")).deadline == NEVER


async def test_a_touch_of_another_version_is_refused(tier: RedisTier) -> None:
    old = await created(tier, "a", {"n": 0})
    new = next_record(old, {"n": 1})
    assert await outcome(tier, update("a", old, new)) is Outcome.APPLIED
    before = await loaded(tier, "a")
    assert await outcome(tier, touch("a", old, time.time() + 5, NEVER)) is Outcome.CONFLICT
    assert await loaded(tier, "a") == before


@pytest.mark.parametrize("session_id", ODD_IDS)
async def test_any_session_id_is_a_plain_key(tier: RedisTier, session_id: str) -> None:
    record = await created(tier, session_id, {"id": session_id})
    assert (await loaded(tier, session_id)).record == record
    assert [page async for page in tier.scan(session_id)] == [[session_id]]
    assert [page async for page in tier.scan(session_id + "x")] == []


async def test_a_scan_finds_all_live_sessions_by_prefix_and_nothing_else(
    tier: RedisTier, open_tier: Open, deployment: Group
) -> None:
    names = [f"user{n % 7}:{n}" for n in range(3000)]
    await tier.commit([create(name, new_record({"n": 0})) for name in names])
    await tier.commit([end(name) for name in names[::10]])
    other = await open_tier(deployment.url, namespace="test*")
    await created(other, "user1:other", {})
    living = set(names) - set(names[::10])
    assert {name async for page in tier.scan() for name in page} == living
    some = {name for name in living if name.startswith("user3:")}
    assert {name async for page in tier.scan("user3:") for name in page} == some
    assert {name async for page in other.scan() for name in page} == {"user1:other"}


async def test_many_are_loaded_and_looked_at_in_the_order_asked(tier: RedisTier) -> None:
    records = {f"s{n}": new_record({"n": n}) for n in range(400)}
    await tier.commit([create(name, record) for name, record in records.items()])
    await tier.commit([end("s3")])
    names = [*reversed(records), "nobody"]
    for name, found, state in zip(
        names, await tier.load_many(names), await tier.stored(names), strict=True
    ):
        if name == "nobody":
            assert (found, state) == (None, None)
        elif name == "s3":
            assert found == state
        else:
            assert isinstance(found, RemoteSession)
            assert found.record == records[name]
            assert state is not None
            assert state.commit == rec.commit_of(records[name])


async def test_a_session_of_ten_thousand_fields_and_one_of_ten_megabytes(tier: RedisTier) -> None:
    wide = await created(tier, "wide", {f"field{n}": n for n in range(10_000)})
    narrow = next_record(wide, {f"field{n}": n + 1 for n in range(5_000, 10_000)})
    large = await created(tier, "large", {"blob": bytes(10 * 2**20), "n": 1})
    assert await outcome(tier, update("wide", wide, narrow)) is Outcome.APPLIED
    assert (await loaded(tier, "wide")).record == narrow
    assert (await loaded(tier, "large")).record == large


async def test_the_epoch_stays_until_the_content_is_lost(
    tier: RedisTier, deployment: Group
) -> None:
    epoch = await tier.epoch()
    assert await tier.epoch() == epoch
    deployment.empty()
    assert await tier.epoch() != epoch


async def test_a_ping_tells_how_long_it_took(tier: RedisTier) -> None:
    assert 0 < await tier.ping() < 5
