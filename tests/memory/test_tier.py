from __future__ import annotations

import copy
import gc
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persistence import ManualClock
from persistence.clock import EngineTime
from persistence.memory.ordered import make_memory_tier
from persistence.memory.tier import (
    ENTRY_OVERHEAD_BYTES,
    MemoryTier,
    charge,
    deadline_of,
    shard_count,
)
from persistence.record import NEVER, NO_ID, assemble, pack_value
from tests.engine import KIB, MIB

TTL = 100.0


def record(value: Any = None) -> bytes:
    """Return a record with one field. The tier itself never looks into records."""
    return assemble(
        incarnation=NO_ID,
        commit=NO_ID,
        version=1,
        created=0.0,
        ttl_seconds=0.0,
        flags=0,
        user=0,
        meta=b"",
        fields={"value": pack_value(value, "value")},
    )


def tier_with(
    clock: ManualClock,
    max_bytes: int = 64 * KIB,
    default_life: float = NEVER,
    policy: str = "lru",
) -> MemoryTier:
    return make_memory_tier(policy, max_bytes, clock, EngineTime(clock), default_life)


def recent(tier: MemoryTier, since: float) -> list[str]:
    """Return who was accessed after `since`."""
    return [name for number in range(tier.shards) for name in tier.accessed_since(number, since)]


def now_of(clock: ManualClock) -> float:
    return EngineTime(clock).now()


# Accounting


def test_a_session_is_charged_with_its_record_its_id_and_a_fixed_overhead() -> None:
    assert charge("abc", b"12345") == 5 + 3 + ENTRY_OVERHEAD_BYTES


@pytest.mark.parametrize(
    ("max_bytes", "shards"),
    [
        (1, 1),
        (64 * KIB, 1),
        (4 * MIB, 1),
        (8 * MIB, 2),
        (12 * MIB, 4),
        (100 * MIB, 32),
        (2**30, 256),
        (2**40, 256),
    ],
)
def test_shards_are_a_power_of_two_of_at_most_256(max_bytes: int, shards: int) -> None:
    assert shard_count(max_bytes) == shards


def test_replacing_a_session_charges_the_difference(clock: ManualClock) -> None:
    tier = tier_with(clock)
    tier.put("a", record("x" * 1000), 0.0, NEVER)
    assert tier.used_bytes == charge("a", record("x" * 1000))
    tier.put("a", record("x" * 10), 0.0, NEVER)
    assert tier.used_bytes == charge("a", record("x" * 10))
    assert tier.peak_bytes == charge("a", record("x" * 1000))
    assert len(tier) == 1
    tier.check()


def test_removing_a_session_gives_back_all_of_it(clock: ManualClock) -> None:
    tier = tier_with(clock)
    first = record("first")
    tier.put("a", first, 0.0, TTL, cap=50.0)
    assert tier.remove("a") == first
    assert tier.remove("a") is None
    assert "a" not in tier
    assert (len(tier), tier.used_bytes) == (0, 0)
    tier.check()


def test_clear_drops_everything(clock: ManualClock) -> None:
    tier = tier_with(clock, 8 * MIB)
    for number in range(100):
        tier.put(str(number), record(number), 0.0, TTL, cap=1e9)
    tier.clear()
    assert (len(tier), tier.used_bytes) == (0, 0)
    tier.check()


# Reading


def test_an_access_returns_a_view_with_the_time_of_this_access(clock: ManualClock) -> None:
    tier = tier_with(clock)
    tier.put("a", record({"x": [1]}), now_of(clock), TTL)
    clock.advance(40)
    session = tier.access("a")
    assert session is not None
    assert session["value"] == {"x": [1]}
    assert session.last_accessed.timestamp() == clock.wall()
    assert session.expires_at is not None
    assert session.expires_at.timestamp() == clock.wall() + TTL
    assert tier.times("a") == (now_of(clock), TTL)
    assert tier.hits == 1


def test_peeking_is_no_access(clock: ManualClock) -> None:
    tier = tier_with(clock)
    then = now_of(clock)
    first = record(1)
    tier.put("a", first, then, TTL)
    clock.advance(TTL * 2)
    assert tier.peek("a") == first
    assert tier.times("a") == (then, TTL)
    assert tier.hits == 0


def test_what_is_not_there_is_none(clock: ManualClock) -> None:
    tier = tier_with(clock)
    assert tier.access("a") is None
    assert tier.peek("a") is None
    with pytest.raises(KeyError):
        tier.times("a")
    with pytest.raises(KeyError):
        tier.deadline("a")


@pytest.mark.parametrize("default_life", [NEVER, TTL])
def test_an_access_at_the_deadline_finds_nothing_and_renews_nothing(
    clock: ManualClock, default_life: float
) -> None:
    tier = tier_with(clock, default_life=default_life)
    tier.put("a", record(), now_of(clock), TTL)
    deadline = tier.deadline("a")
    clock.advance(TTL)
    assert tier.access("a") is None
    assert tier.deadline("a") == deadline
    assert (len(tier), tier.hits) == (1, 0)
    tier.check()


def test_a_negative_life_is_a_deadline_that_no_access_moves(clock: ManualClock) -> None:
    tier = tier_with(clock, default_life=TTL)
    deadline = now_of(clock) + TTL
    tier.put("a", record(), now_of(clock), -deadline)
    clock.advance(TTL - 1)
    assert tier.access("a") is not None
    assert tier.deadline("a") == deadline
    clock.advance(1)
    assert tier.access("a") is None


def test_looking_at_what_is_alive_is_no_access(clock: ManualClock) -> None:
    tier = tier_with(clock)
    then = now_of(clock)
    first = record(1)
    tier.put("a", first, then, TTL, cap=then + 150)
    clock.advance(TTL - 1)
    assert tier.live("a") == (first, TTL, then + 150)
    assert tier.live("b") is None
    clock.advance(1)
    assert tier.live("a") is None
    assert tier.times("a") == (then, TTL)
    assert tier.hits == 0


def test_a_cap_ends_what_an_access_would_have_renewed(clock: ManualClock) -> None:
    tier = tier_with(clock)
    cap = now_of(clock) + 150
    tier.put("a", record(), now_of(clock), TTL, cap)
    clock.advance(90)
    assert tier.access("a") is not None
    assert tier.deadline("a") == cap
    clock.advance(60)
    assert tier.access("a") is None


def test_a_new_version_with_the_usual_life_forgets_the_old_one(clock: ManualClock) -> None:
    tier = tier_with(clock, default_life=TTL)
    tier.put("a", record(), now_of(clock), 5.0)
    tier.put("a", record(), now_of(clock), TTL)
    assert tier.deadline("a") == now_of(clock) + TTL
    tier.check()


def test_views_tell_the_terms_of_their_own_session_and_share_the_usual_ones(
    clock: ManualClock,
) -> None:
    tier = tier_with(clock, default_life=TTL)
    cap = now_of(clock) + 30
    tier.put("usual", record(), now_of(clock), TTL)
    tier.put("longer", record(), now_of(clock), 2 * TTL)
    tier.put("capped", record(), now_of(clock), TTL, cap)
    views = {name: tier.access(name) for name in ("usual", "longer", "capped")}
    left = {}
    for name, view in views.items():
        assert view is not None
        assert view.expires_at is not None
        left[name] = (view.expires_at - view.last_accessed).total_seconds()
        copied = copy.copy(view)
        assert (copied.expires_at, copied.lifetime_ends_at) == (
            view.expires_at,
            view.lifetime_ends_at,
        )
    assert left == {"usual": TTL, "longer": 2 * TTL, "capped": pytest.approx(30)}
    again = tier.look("usual", 0.0)
    assert again is not None
    assert again._terms is tier._terms


def test_a_new_version_without_a_cap_forgets_the_old_one(clock: ManualClock) -> None:
    tier = tier_with(clock)
    tier.put("a", record(), now_of(clock), NEVER, cap=now_of(clock) + 5)
    tier.put("a", record(), now_of(clock), NEVER)
    assert tier.cap("a") == tier.deadline("a") == NEVER
    tier.check()


def test_a_version_that_was_submitted_before_a_read_does_not_take_back_its_renewal(
    clock: ManualClock,
) -> None:
    tier = tier_with(clock)
    submitted = now_of(clock)
    tier.put("a", record(1), submitted, TTL)
    clock.advance(30)
    assert tier.access("a") is not None
    tier.put("a", record(2), submitted, TTL)
    assert tier.times("a")[0] == now_of(clock)


# Who leaves


def test_victims_are_the_least_recently_used_and_just_enough(clock: ManualClock) -> None:
    tier = tier_with(clock)
    for name in "abcde":
        clock.advance(1)
        tier.put(name, record(name), now_of(clock), NEVER)
    clock.advance(1)
    tier.access("a")
    each = charge("a", record("a"))
    assert tier.victims(5 * each, 10) == []
    assert tier.victims(5 * each - 1, 10) == ["b"]
    assert tier.victims(3 * each, 10) == ["b", "c"]
    assert tier.victims(0, 10) == ["b", "c", "d", "e", "a"]
    assert tier.victims(0, 2) == ["b", "c"]


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["put", "late put", "access", "remove", "restore", "wait"]),
        st.integers(0, 15),
        st.integers(0, 300),
    ),
    max_size=120,
)


class Model:
    """What the tier must say: last use in an order, last access in seconds, bytes."""

    def __init__(self) -> None:
        self.accessed: dict[str, float] = {}
        self.nbytes: dict[str, int] = {}

    def put(self, name: str, stored: bytes, accessed: float) -> None:
        self.accessed[name] = max(accessed, self.accessed.get(name, 0.0))
        self.nbytes[name] = charge(name, stored)

    def remove(self, name: str) -> None:
        self.accessed.pop(name, None)
        self.nbytes.pop(name, None)


def compare(tier: MemoryTier, model: Model, since: float) -> None:
    tier.check()
    assert len(tier) == len(model.nbytes)
    assert tier.used_bytes == sum(model.nbytes.values())
    assert {name: tier.times(name)[0] for name in model.nbytes} == model.accessed
    order = tier.victims(-1, 10_000)
    assert set(order) == model.nbytes.keys()
    found = recent(tier, since)
    assert len(found) == len(set(found))
    newer = {name for name, accessed in model.accessed.items() if accessed > since}
    assert newer <= set(found), "a renewal would never be recorded"
    assert all(model.accessed[name] >= since for name in found)


@settings(max_examples=150, deadline=None)
@given(
    operations=OPERATIONS,
    max_bytes=st.sampled_from([64 * KIB, 32 * MIB]),
    policy=st.sampled_from(["lru", "sieve", "s3fifo", "adaptive"]),
)
def test_accounting_and_accesses_are_exact_after_any_operations(
    operations: list[tuple[str, int, int]], max_bytes: int, policy: str
) -> None:
    clock = ManualClock()
    tier = tier_with(clock, max_bytes, policy=policy)
    model = Model()
    earlier = since = now_of(clock)
    for kind, number, size in operations:
        name = f"session {number}"
        stored = record("x" * size)
        now = now_of(clock)
        if kind == "put":
            tier.put(name, stored, now, NEVER)
            model.put(name, stored, now)
        elif kind in ("late put", "restore"):
            # Acknowledged long after its submission; or read back without being accessed.
            tier.put(name, stored, earlier, NEVER)
            model.put(name, stored, earlier)
        elif kind == "access":
            found = tier.access(name)
            assert (found is not None) == (name in model.nbytes)
            if found is not None:
                model.accessed[name] = now
        elif kind == "remove":
            assert (tier.remove(name) is not None) == (name in model.nbytes)
            model.remove(name)
        else:
            clock.advance(size)
            earlier, since = since, now_of(clock) - size / 2
        compare(tier, model, since)


@settings(max_examples=150, deadline=None)
@given(
    operations=st.lists(
        st.tuples(st.sampled_from(["put", "access", "remove"]), st.integers(0, 30)), max_size=150
    ),
    max_bytes=st.sampled_from([64 * KIB, 32 * MIB]),
)
def test_the_order_in_which_sessions_leave_is_exactly_that_of_their_last_use(
    operations: list[tuple[str, int]], max_bytes: int
) -> None:
    clock = ManualClock()
    tier = tier_with(clock, max_bytes)
    used: dict[str, float] = {}
    for kind, number in operations:
        clock.advance(1)
        name = f"session {number}"
        if kind == "put":
            tier.put(name, record(), now_of(clock), NEVER)
            used[name] = clock.wall()
        elif kind == "access":
            if tier.access(name) is not None:
                used[name] = clock.wall()
        else:
            tier.remove(name)
            used.pop(name, None)
    order = tier.victims(-1, 10_000)
    assert order == sorted(used, key=lambda name: used[name])


# What it costs the process


def filled(clock: ManualClock, count: int) -> MemoryTier:
    tier = tier_with(clock, 256 * MIB, default_life=TTL)
    rng = random.Random(count)
    for number in range(count):
        life = rng.choice((TTL, 50.0))
        tier.put(f"session {number}", record(number), now_of(clock), life, cap=1e9)
    for number in range(0, count, 3):
        tier.access(f"session {number}")
    return tier


def test_the_number_of_tracked_objects_does_not_grow_with_the_sessions(
    clock: ManualClock,
) -> None:
    tiers = []
    counts = []
    for sessions in (0, 20_000):
        gc.collect()
        before = len(gc.get_objects())
        tiers.append(filled(clock, sessions))
        gc.collect()
        counts.append(len(gc.get_objects()) - before)
    assert len(tiers[1]) == 20_000
    assert counts[1] <= counts[0] + 10


def tables(tier: MemoryTier) -> list[dict[Any, Any]]:
    """Return every dict that the tier is made of, however deep."""
    found: list[dict[Any, Any]] = []
    seen: set[int] = set()
    pending: list[Any] = [getattr(tier, "__dict__", tier)]
    while pending:
        item = pending.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            found.append(item)
            if gc.is_tracked(item):
                pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item
        elif type(item).__module__ == MemoryTier.__module__:
            pending += [
                getattr(item, name, None)
                for kind in type(item).__mro__
                for name in getattr(kind, "__slots__", ())
            ]
    return found


def test_no_table_with_sessions_in_it_is_tracked(clock: ManualClock) -> None:
    tier = filled(clock, 5_000)
    large = [table for table in tables(tier) if len(table) > 20]
    assert sum(map(len, large)) >= 10_000
    assert not any(gc.is_tracked(table) for table in large)


def test_no_table_holds_more_than_its_share_of_the_sessions(clock: ManualClock) -> None:
    tier = filled(clock, 20_000)
    assert max(map(len, tables(tier))) < 20_000 / tier.shards * 1.5


# Going through


def test_every_session_is_in_one_shard(clock: ManualClock) -> None:
    tier = filled(clock, 1_000)
    found = [name for number in range(tier.shards) for name in tier.ids_of_shard(number)]
    assert sorted(found) == sorted(f"session {number}" for number in range(1_000))


def test_recent_accesses_are_found_whatever_their_order(clock: ManualClock) -> None:
    tier = tier_with(clock, 32 * MIB)
    for number in range(1_000):
        tier.put(str(number), record(), now_of(clock), NEVER)
    before = now_of(clock)
    since = before + 0.5
    clock.advance(1)
    for number in range(0, 1_000, 100):
        tier.access(str(number))
    tier.put("read back", record(), before, NEVER)
    assert set(recent(tier, since)) == {str(number) for number in range(0, 1_000, 100)}


@pytest.mark.parametrize(
    ("accessed", "life", "deadline"),
    [(10.0, 5.0, 15.0), (10.0, NEVER, NEVER), (10.0, -12.0, 12.0), (20.0, -12.0, 12.0)],
)
def test_a_life_says_when_a_session_expires(accessed: float, life: float, deadline: float) -> None:
    assert deadline_of(accessed, life) == deadline


def test_check_notices_wrong_accounts(clock: ManualClock) -> None:
    tier = tier_with(clock)
    tier.put("a", record(), 0.0, NEVER)
    tier.used_bytes += 1
    with pytest.raises(AssertionError):
        tier.check()


@pytest.mark.parametrize(("session_id", "size"), [("a" * 9, 9), ("ü" * 9, 18), ("😀" * 128, 512)])
def test_an_id_is_charged_with_its_bytes(clock: ManualClock, session_id: str, size: int) -> None:
    tier = tier_with(clock)
    assert charge(session_id, b"") == size + ENTRY_OVERHEAD_BYTES
    for leave in (tier.remove, tier.take, lambda name: tier.shed([name])):
        tier.put_noted(session_id, record("x"), 0.0, NEVER, NEVER)
        tier.check()
        leave(session_id)
        tier.put(session_id, record("x"), 0.0, NEVER)
        tier.check()
        tier.remove(session_id)
        assert tier.used_bytes == 0


# --- from other threads


@pytest.mark.parametrize("life", [TTL, -(1_700_000_000.0 + TTL)])
@pytest.mark.parametrize("cap", [NEVER, 1_700_000_000.0 + TTL / 2])
def test_a_look_shows_what_an_access_shows_and_changes_nothing(
    clock: ManualClock, life: float, cap: float
) -> None:
    tier = tier_with(clock)
    now = clock.wall()
    tier.put("a", record(1), now, life, cap)
    tier.put("b", record(2), now, NEVER)
    clock.advance(1)
    looked = tier.look("a", 10)
    assert tier.times("a")[0] == now
    accessed = tier.access("a")
    assert looked is not None
    assert accessed is not None
    for name in ("data", "last_accessed", "expires_at", "lifetime_ends_at"):
        assert getattr(looked, name) == getattr(accessed, name)
    assert tier.look("c", 10) is None
    clock.advance(TTL)
    assert tier.look("a", 10) is None
    assert tier.look("b", 10) is not None


def test_a_look_leaves_out_what_is_near_its_deadline(clock: ManualClock) -> None:
    tier = tier_with(clock, default_life=TTL)
    tier.put("a", record(), clock.wall(), TTL)
    clock.advance(TTL - 11)
    assert tier.look("a", 10) is not None
    clock.advance(2)
    assert tier.look("a", 10) is None
    assert tier.access("a") is not None


@pytest.mark.parametrize("policy", ["lru", "sieve", "s3fifo", "adaptive"])
def test_a_noted_access_counts_as_one(clock: ManualClock, policy: str) -> None:
    noted, accessed = tier_with(clock, policy=policy), tier_with(clock, policy=policy)
    for name in ("a", "b", "c"):
        for tier in (noted, accessed):
            tier.put(name, record(), clock.wall(), NEVER)
        clock.advance(1)
    noted.note("a", clock.wall())
    accessed.access("a")
    noted.note("gone", clock.wall())
    assert noted.times("a")[0] == clock.wall()
    noted.check()
    assert noted.victims(-1, 3) == accessed.victims(-1, 3)


def test_a_note_that_is_older_than_the_last_access_changes_nothing(clock: ManualClock) -> None:
    tier = tier_with(clock)
    for name in ("a", "b"):
        tier.put(name, record(), clock.wall(), NEVER)
        clock.advance(1)
    tier.note("a", 0.0)
    assert tier.times("a")[0] == clock.wall() - 2
    assert tier.victims(-1, 3) == ["a", "b"]
