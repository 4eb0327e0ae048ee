from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistence.memory.policies import (
    POLICIES,
    EvictionPolicy,
    Lru,
    S3Fifo,
    Sieve,
    drained,
    least_recently_used,
    make_policy,
)

ACCESSES = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 30)), max_size=80)


def test_nothing_leaves_where_nothing_is() -> None:
    assert list(least_recently_used([])) == []
    assert list(least_recently_used([{}, {}])) == []


def test_one_shard_is_its_own_order() -> None:
    assert list(least_recently_used([{}, {"b": 1.0, "a": 2.0}, {}])) == ["b", "a"]


def test_shards_are_merged_by_last_access() -> None:
    shards = [{"a": 1.0, "d": 4.0}, {"b": 2.0, "e": 5.0}, {"c": 3.0}]
    assert list(least_recently_used(shards)) == ["a", "b", "c", "d", "e"]


@given(ACCESSES)
def test_the_order_is_that_of_the_last_accesses_whatever_the_shards(
    accesses: list[tuple[int, int]],
) -> None:
    shards: list[dict[str, float]] = [{} for _ in range(8)]
    last: dict[str, float] = {}
    for time, (shard, number) in enumerate(accesses):
        name = f"{shard}:{number}"
        shards[shard].pop(name, None)
        shards[shard][name] = last[name] = float(time)
    assert list(least_recently_used(shards)) == sorted(last, key=lambda name: last[name])


def test_asking_for_a_few_looks_at_a_few() -> None:
    looked: list[str] = []

    class Watched(dict[str, float]):
        def items(self):  # type: ignore[no-untyped-def]  # noqa: ANN202 - a generator will do
            for item in super().items():
                looked.append(item[0])
                yield item

    shards = [
        Watched({f"{shard}:{number}": number * 10.0 + shard for number in range(1000)})
        for shard in range(4)
    ]
    assert len(list(islice(least_recently_used(shards), 5))) == 5
    assert len(looked) < 20


# The policies


def filled(policy: EvictionPolicy, keys: Iterable[str]) -> EvictionPolicy:
    for key in keys:
        policy.insert(key)
    return policy


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_without_keys_has_nobody_to_evict(name: str) -> None:
    policy = make_policy(name)
    with pytest.raises(KeyError):
        policy.evict()
    policy.insert("a")
    policy.remove("a")
    with pytest.raises(KeyError):
        policy.evict()


@pytest.mark.parametrize("name", POLICIES)
def test_keys_that_nobody_asks_for_leave_in_the_order_in_which_they_came(name: str) -> None:
    assert list(drained(filled(make_policy(name), "abcdef"))) == list("abcdef")


def test_lru_evicts_the_one_that_was_asked_for_the_longest_time_ago() -> None:
    policy = filled(Lru(), "abc")
    policy.hit("a")
    assert list(drained(policy)) == ["b", "c", "a"]


def test_the_hand_of_sieve_spares_the_visited_once_and_goes_on_from_there() -> None:
    policy = filled(Sieve(), "abcd")
    policy.hit("a")
    policy.hit("c")
    assert policy.evict() == "b"  # past a
    policy.insert("e")
    assert policy.evict() == "d"  # past c; a is not looked at again before the end
    policy.hit("e")
    assert policy.evict() == "a"  # past e, and round again
    assert list(drained(policy)) == ["c", "e"]


def test_a_key_that_comes_when_the_hand_of_sieve_is_at_the_end_gets_the_time_of_a_round() -> None:
    policy = filled(Sieve(), "ab")
    policy.hit("a")
    assert policy.evict() == "b"
    policy.insert("c")
    assert policy.evict() == "a"
    assert policy.evict() == "c"


def test_a_newcomer_of_s3_fifo_must_be_asked_for_twice_to_stay() -> None:
    policy = filled(S3Fifo(), "abcdefghij")
    policy.hit("a")
    policy.hit("b")
    policy.hit("b")
    assert [policy.evict() for _ in range(3)] == ["a", "c", "d"]
    assert "b" in policy


def test_a_key_that_comes_back_soon_after_its_eviction_goes_to_the_main_queue_of_s3_fifo() -> None:
    policy = filled(S3Fifo(), "abcdefghijklmnopqrst")
    assert policy.evict() == "a"
    policy.insert("a")
    assert [policy.evict() for _ in range(17)] == list("bcdefghijklmnopqr")
    assert policy.evict() == "s"
    assert sorted(drained(policy)) == ["a", "t"]


def test_the_ghosts_of_s3_fifo_are_no_more_than_its_keys() -> None:
    policy = S3Fifo()
    filled(policy, map(str, range(10)))
    for number in range(10, 1000):
        policy.evict()
        policy.insert(str(number))
    assert len(policy._ghosts) <= 10


STEPS = st.lists(
    st.tuples(st.sampled_from(["ask", "ask", "ask", "remove", "evict"]), st.integers(0, 25)),
    max_size=300,
)


@pytest.mark.parametrize("name", POLICIES)
@given(steps=STEPS)
def test_a_policy_knows_exactly_the_keys_that_are_resident(
    name: str, steps: list[tuple[str, int]]
) -> None:
    policy = make_policy(name)
    resident: set[str] = set()
    for step, number in steps:
        key = str(number)
        if step == "ask" and key in resident:
            policy.hit(key)
        elif step == "ask":
            policy.insert(key)
            resident.add(key)
        elif step == "remove" and key in resident:
            policy.remove(key)
            resident.remove(key)
        elif step == "evict" and resident:
            resident.remove(policy.evict())
        assert len(policy) == len(resident)
        assert (key in policy) == (key in resident)
    left = list(drained(policy))
    assert len(left) == len(set(left))
    assert set(left) == resident


class SlowSieve:
    """SIEVE as it is written down in the paper: one list and an index."""

    def __init__(self) -> None:
        self.queue: list[str] = []  # the oldest first
        self.visited: set[str] = set()
        self.hand = 0

    def insert(self, key: str) -> None:
        if self.hand >= len(self.queue):
            self.hand = 0
        self.queue.append(key)

    def remove(self, key: str) -> None:
        at = self.queue.index(key)
        self.queue.remove(key)
        self.visited.discard(key)
        self.hand -= at < self.hand

    def evict(self) -> str:
        while True:
            if self.hand >= len(self.queue):
                self.hand = 0
            key = self.queue[self.hand]
            if key not in self.visited:
                self.queue.pop(self.hand)
                return key
            self.visited.discard(key)
            self.hand += 1


@given(steps=STEPS)
def test_sieve_evicts_what_the_paper_says_with_removals_in_between(
    steps: list[tuple[str, int]],
) -> None:
    policy, slow = Sieve(), SlowSieve()
    for step, number in steps:
        key = str(number)
        if step == "ask" and key in policy:
            policy.hit(key)
            slow.visited.add(key)
        elif step == "ask":
            policy.insert(key)
            slow.insert(key)
        elif step == "remove" and key in policy:
            policy.remove(key)
            slow.remove(key)
        elif step == "evict" and len(policy):
            assert policy.evict() == slow.evict()


@pytest.mark.parametrize("policy", [Sieve(), S3Fifo()])
def test_sessions_that_come_and_go_by_themselves_leave_nothing_behind(
    policy: Sieve | S3Fifo,
) -> None:
    for number in range(10_000):
        policy.insert(str(number % 7))
        policy.remove(str(number % 7))
        policy.insert(f"other {number}")
        policy.remove(f"other {number}")
    queues = policy._queues
    assert len(queues.first) + len(queues.second) < 300
