from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

from benchmarks.peers.hits import next_uses, optimal_hits


def test_the_next_use_of_each_access_is_where_its_key_comes_again() -> None:
    assert next_uses([7, 8, 7, 7]) == [2, 5, 3, 7]


def test_with_room_for_all_keys_only_first_accesses_miss() -> None:
    assert optimal_hits([1, 2, 3, 1, 2, 3, 1], 3) == 4


def test_a_scan_does_not_push_out_what_comes_again() -> None:
    assert optimal_hits([1, 2, 3, 4, 5, 1], 1) == 1


def test_no_choice_of_victims_is_better() -> None:
    chance = random.Random(5)
    for _ in range(50):
        keys = [chance.randrange(4) for _ in range(9)]
        room = chance.randrange(1, 4)
        assert optimal_hits(keys, room) == _best_of_all(tuple(keys), room)


def _best_of_all(keys: Sequence[int], room: int) -> int:
    """Try every set of keys that can be kept."""

    @cache
    def best(position: int, kept: frozenset[int]) -> int:
        if position == len(keys):
            return 0
        key = keys[position]
        choices = [kept | {key}] if len(kept | {key}) <= room else []
        choices += [(kept | {key}) - {victim} for victim in kept | {key}]
        fitting = [choice for choice in choices if len(choice) <= room]
        return (key in kept) + max(best(position + 1, choice) for choice in fitting)

    return best(0, frozenset())
