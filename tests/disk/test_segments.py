"""How much of the log lies behind a sequence number."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from persistence.disk.format import SegmentKind
from persistence.disk.segments import Segment, bytes_behind

LAST = 400


def segment(number: int, lowest: int, *, kind: SegmentKind = SegmentKind.LOG) -> Segment:
    return Segment(number, kind, 0, live_bytes=900, tombstone_bytes=100, lowest_sequence=lowest)


LOG = [segment(1, 1), segment(2, 101), segment(3, 201), segment(4, 301)]


def test_behind_nothing_lies_all_that_is_needed() -> None:
    assert bytes_behind(LOG, 0, LAST) == 4000


def test_behind_the_newest_frame_lies_nothing() -> None:
    assert bytes_behind(LOG, LAST, LAST) == 0
    assert bytes_behind([*LOG, segment(5, LAST + 1)], LAST, LAST) == 0


def test_a_segment_that_the_number_lies_in_counts_in_proportion() -> None:
    assert bytes_behind(LOG, 200, LAST) == 2000
    assert bytes_behind(LOG, 250, LAST) == 1500
    assert bytes_behind(reversed(LOG), 399, LAST) == 10


def test_a_merged_segment_does_not_end_where_the_log_behind_it_starts() -> None:
    merged = segment(9, 1, kind=SegmentKind.MERGED)
    assert bytes_behind([merged, segment(4, 301)], 300, LAST) == 1000
    assert bytes_behind([merged, segment(4, 301)], 0, LAST) == 2000


@given(
    st.lists(st.integers(1, LAST), max_size=8, unique=True),
    st.integers(0, LAST),
    st.integers(0, LAST),
)
def test_the_older_the_number_the_more_lies_behind_it(
    starts: list[int], one: int, other: int
) -> None:
    segments = [segment(number, lowest) for number, lowest in enumerate(starts, 1)]
    older, newer = sorted((one, other))
    assert bytes_behind(segments, older, LAST) >= bytes_behind(segments, newer, LAST)
    assert bytes_behind(segments, 0, LAST) == 1000 * len(segments)
