from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistence.errors import RequestLimitReached
from persistence.limits import MAX_BLOCK, MIN_BLOCK, block_size, refuse_request

COUNTS = st.integers(0, 10**12)


@given(COUNTS, st.integers(0, 10_000))
def test_a_block_is_never_more_than_what_is_left(left: int, waiting: int) -> None:
    assert 0 <= block_size(left, waiting) <= left


@given(st.integers(1, 10**12), st.integers(0, 10_000))
def test_there_is_a_block_as_long_as_anything_is_left(left: int, waiting: int) -> None:
    assert block_size(left, waiting) >= 1


@given(COUNTS, st.integers(0, 10_000))
def test_a_block_is_enough_for_all_who_wait_if_there_is_so_much(left: int, waiting: int) -> None:
    assert block_size(left, waiting) >= min(left, waiting)


@given(COUNTS)
def test_a_block_for_one_is_bounded(left: int) -> None:
    assert block_size(left, 1) <= max(MIN_BLOCK, MAX_BLOCK)


def test_nothing_is_left_beyond_the_limit() -> None:
    assert block_size(-5, 3) == 0  # the limit of a session was higher when it was charged


def test_a_limit_is_used_up_in_few_blocks() -> None:
    left, blocks = 1000, 0
    while left:
        left -= block_size(left, 1)
        blocks += 1
    assert blocks < 40


def test_a_refusal_names_session_limit_and_the_way_out() -> None:
    with pytest.raises(RequestLimitReached, match=r"'a\\nb' has used up its 7 requests .* limit"):
        refuse_request("a\nb", 7)
