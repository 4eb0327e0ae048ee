from __future__ import annotations

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from persistence.memory.policies import least_recently_used

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
