from __future__ import annotations

import gc
import random
from struct import error as StructError  # noqa: N812 - the module calls it `error`
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from persistence.disk.format import INDEX_ROW, INDEX_ROW_BYTES, ROW_RENEWS, USER_BITS
from persistence.disk.index import _EMPTY, SHARDS, Fingerprints, Index, Row

NEVER = float("inf")


def fingerprint_of(shard: int, bits: int, rest: int = 0) -> bytes:
    """Return a fingerprint that belongs to `shard`; `bits` choose the bucket in it."""
    return (bits * SHARDS + shard).to_bytes(6, "little") + rest.to_bytes(10, "little")


def row_of(fingerprint: bytes, **values: Any) -> Row:
    plain = Row(
        fingerprint=fingerprint,
        sequence=1,
        accessed=1.0,
        deadline=NEVER,
        cap=NEVER,
        segment=1,
        offset=64,
        length=500,
        user=0,
    )
    return plain._replace(**values)


def packed(*rows: Row) -> list[bytes]:
    return [INDEX_ROW.pack(*row) for row in rows]


def index_of(*rows: Row) -> Index:
    index = Index()
    index.put(packed(*rows))
    return index


def all_rows(index: Index) -> dict[bytes, Row]:
    rows = [row for shard in index.filled_shards() for row in index.rows_of_shard(shard)]
    found = {row.fingerprint: row for row in rows}
    assert len(found) == len(rows), "a fingerprint is in more than one row"
    return found


def assert_every_row_is_found(index: Index) -> None:
    for fingerprint, row in all_rows(index).items():
        assert index.get(fingerprint) == row


# Few shards, so that buckets fill and double; few fingerprints, so that they meet again.
FINGERPRINTS = st.builds(
    fingerprint_of, st.sampled_from([0, 1, SHARDS - 1]), st.integers(0, 40), st.integers(0, 1)
)
TIMES = st.sampled_from([0.0, 0.5, 1.0, 2.0, 100.0, NEVER])
ROWS = st.builds(
    Row,
    fingerprint=FINGERPRINTS,
    sequence=st.integers(0, 20) | st.integers(0, 2**64 - 1),
    accessed=TIMES.filter(lambda time: time != NEVER),
    deadline=TIMES,
    cap=TIMES,
    segment=st.integers(1, 4) | st.just(2**32 - 1),
    offset=st.integers(0, 3) | st.just(2**32 - 1),
    length=st.integers(0, 1000),
    user=st.integers(0, 3).map(lambda user: user | ROW_RENEWS) | st.integers(0, 3),
)


class IndexBesideDict(RuleBasedStateMachine):
    """The index and a plain dict, in lock-step."""

    def __init__(self) -> None:
        super().__init__()
        self.index = Index()
        self.model: dict[bytes, Row] = {}

    @rule(rows=st.lists(ROWS, max_size=40))
    def put(self, rows: list[Row]) -> None:
        replaced: dict[int, int] = {}
        for row in rows:
            old = self.model.get(row.fingerprint)
            if old is not None:
                replaced[old.segment] = replaced.get(old.segment, 0) + old.length
            self.model[row.fingerprint] = row
        assert self.index.put(packed(*rows)) == replaced

    @rule(batches=st.lists(st.lists(ROWS, max_size=40), max_size=4))
    def load(self, batches: list[list[Row]]) -> None:
        """As recovery does: rows of several segments, in any order, then all shards settled."""
        for rows in batches:
            for row in rows:
                old = self.model.get(row.fingerprint)
                if old is None or old.sequence < row.sequence:
                    self.model[row.fingerprint] = row
            self.index.load_newer(b"".join(packed(*rows)))
        self._settle()

    @rule()
    def _settle(self) -> None:
        live: dict[int, int] = {}
        for shard in range(SHARDS):
            self.index.settle(shard, 8, live)
        expected: dict[int, int] = {}
        for fingerprint, row in self.model.items():
            expected[row.segment] = expected.get(row.segment, 0) + row.length
            if row.user & ROW_RENEWS and row.deadline < row.cap:
                granted = row.deadline + (row.deadline - row.accessed) / 8
                self.model[fingerprint] = row._replace(deadline=min(granted, row.cap))
        assert live == expected

    @rule(seconds=st.sampled_from([0.0, 1.5, -2.5]))
    def shift_times(self, seconds: float) -> None:
        for shard in range(SHARDS):
            self.index.shift_times(shard, seconds)
        self.model = {
            fingerprint: row._replace(
                accessed=row.accessed + seconds,
                deadline=row.deadline + seconds,
                cap=row.cap + seconds,
            )
            for fingerprint, row in self.model.items()
        }

    @rule(fingerprint=FINGERPRINTS)
    def remove(self, fingerprint: bytes) -> None:
        assert self.index.remove(fingerprint) == self.model.pop(fingerprint, None)

    @rule(fingerprint=FINGERPRINTS, accessed=TIMES, deadline=TIMES)
    def touch(self, fingerprint: bytes, accessed: float, deadline: float) -> None:
        before = self.model.get(fingerprint)
        found = self.index.touch(fingerprint, accessed, deadline)
        assert found == (None if before is None else before.accessed)
        if before is not None:
            self.model[fingerprint] = before._replace(accessed=accessed, deadline=deadline)

    @rule(fingerprint=FINGERPRINTS, source=ROWS, goal=ROWS)
    def move_from_elsewhere(self, fingerprint: bytes, source: Row, goal: Row) -> None:
        self._move(fingerprint, (source.segment, source.offset), goal)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), goal=ROWS)
    def move(self, data: st.DataObject, goal: Row) -> None:
        row = self.model[data.draw(st.sampled_from(sorted(self.model)))]
        self._move(row.fingerprint, (row.segment, row.offset), goal)

    def _move(self, fingerprint: bytes, source: tuple[int, int], goal: Row) -> None:
        row = self.model.get(fingerprint)
        fits = row is not None and (row.segment, row.offset) == source
        target = (goal.segment, goal.offset)
        needed = row.live_bytes if row is not None and fits else None
        assert self.index.move(fingerprint, source, target, goal.length) == needed
        if row is not None and fits:
            self.model[fingerprint] = row._replace(
                segment=target[0], offset=target[1], length=goal.length
            )

    @rule()
    def through_a_snapshot(self) -> None:
        image = memoryview(b"".join(self.index.images()))
        again = Index()
        at = 0
        for shard in range(SHARDS):
            at = again.load_image(shard, image, at)
        assert at == len(image)
        self.index = again

    @rule(now=TIMES, idle_since=TIMES)
    def expired(self, now: float, idle_since: float) -> None:
        found = [
            row
            for shard in range(SHARDS)
            for row in self.index.expired_in_shard(shard, now, idle_since)
        ]
        expected = [
            row for row in self.model.values() if row.deadline <= now or row.accessed < idle_since
        ]
        assert sorted(found) == sorted(expected)

    @rule(user=st.integers(0, 3))
    def of_a_user(self, user: int) -> None:
        found = [row for shard in range(SHARDS) for row in self.index.user_in_shard(shard, user)]
        expected = [row for row in self.model.values() if row.user & USER_BITS == user]
        assert sorted(found) == sorted(expected)

    @rule(fingerprint=FINGERPRINTS)
    def look_up(self, fingerprint: bytes) -> None:
        row = self.model.get(fingerprint)
        assert self.index.get(fingerprint) == row
        assert self.index.place(fingerprint) == (None if row is None else (row.segment, row.offset))
        assert self.index.sequence(fingerprint) == (None if row is None else row.sequence)

    @invariant()
    def they_are_equal(self) -> None:
        assert len(self.index) == len(self.model)
        assert all_rows(self.index) == self.model
        assert not _EMPTY, "all indexes share it"
        assert_every_row_is_found(self.index)


TestIndexBesideDict = pytest.mark.filterwarnings("default")(IndexBesideDict.TestCase)
TestIndexBesideDict.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_growth_keeps_every_row_in_the_bucket_of_its_fingerprint() -> None:
    chance = random.Random(7)
    index = Index()
    rows = [row_of(fingerprint_of(5, chance.randrange(2**30), n), sequence=n) for n in range(2000)]
    for row in rows:
        index.put(packed(row))
    shard = index._shards[5]
    assert len(shard) >= 2000 / 16
    assert len(shard) & (len(shard) - 1) == 0
    for number, bucket in enumerate(shard):
        for fingerprint, *_ in INDEX_ROW.iter_unpack(bucket):
            assert (int.from_bytes(fingerprint[:6], "little") >> 10) % len(shard) == number
    assert all_rows(index) == {row.fingerprint: row for row in rows}
    assert all(len(other) == 1 for other in index._shards[:5]), "only one shard has grown"


def test_many_rows_of_one_bucket_are_all_found() -> None:
    # The same 48 low bits, so no doubling separates them.
    rows = [row_of(fingerprint_of(3, 1, rest), offset=rest) for rest in range(200)]
    index = index_of(*rows)
    assert_every_row_is_found(index)
    for row in rows[::2]:
        assert index.remove(row.fingerprint) == row
    assert all_rows(index) == {row.fingerprint: row for row in rows[1::2]}


@pytest.mark.parametrize("shift", range(1, INDEX_ROW_BYTES))
def test_bytes_that_lie_across_columns_are_not_taken_for_a_fingerprint(shift: int) -> None:
    # Two rows of one bucket: the bytes at `shift` of what they are together look like a third.
    chance = random.Random(shift)
    while True:
        first = row_of(
            fingerprint_of(9, 0, chance.getrandbits(80)),
            sequence=chance.getrandbits(64),
            accessed=chance.random(),
            deadline=chance.random(),
            cap=chance.random(),
            segment=chance.getrandbits(32),
            offset=chance.getrandbits(32),
            length=chance.getrandbits(32),
            user=chance.getrandbits(32),
        )
        second = first._replace(fingerprint=fingerprint_of(9, 0, chance.getrandbits(80)))
        third = b"".join(packed(first, second))[shift : shift + 16]
        if third not in (first.fingerprint, second.fingerprint):
            break
    index = index_of(first, second)
    bits = int.from_bytes(third[:6], "little")
    # Look the third one up where it would be found if it were taken for one.
    index._shards[bits % SHARDS] = index._shards[9]
    index._counts[bits % SHARDS] = 2
    assert index.get(third) is None
    assert index.place(third) is None
    assert index.sequence(third) is None
    assert index.touch(third, 0.0, 0.0) is None
    assert index.move(third, (first.segment, first.offset), (1, 1), 1) is None
    assert index.remove(third) is None
    assert sorted(index.rows_of_shard(9)) == sorted([first, second])
    new = row_of(third)
    assert index.put(packed(new)) == {}
    assert index.get(third) == new
    assert sorted(index.rows_of_shard(9)) == sorted([first, second, new])


def test_a_place_is_prepared_for_many_rows_and_loading_them_moves_none() -> None:
    index = Index()
    index.reserve(100_000)
    buckets = [len(shard) for shard in index._shards]
    key = Fingerprints(bytes(16))
    rows = [row_of(key.of(str(n).encode()), sequence=n) for n in range(50_000)]
    index.load_newer(b"".join(packed(*rows)))
    for shard in range(SHARDS):
        index.settle(shard, 8, {})
    assert [len(shard) for shard in index._shards] == buckets
    assert len(index) == 50_000
    assert_every_row_is_found(index)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 400))
def test_an_image_that_is_none_is_refused(image: bytes, at: int) -> None:
    index = Index()
    try:
        end = index.load_image(0, memoryview(image), at)
    except (ValueError, StructError):
        assert len(index) == 0
    else:
        assert at < end <= len(image)


def test_an_image_that_is_cut_is_refused() -> None:
    rows = [row_of(fingerprint_of(0, number)) for number in range(100)]
    image = next(iter(index_of(*rows).images()))
    index = Index()
    for end in range(len(image)):
        with pytest.raises((ValueError, StructError)):
            index.load_image(0, memoryview(image[:end]), 0)
        assert len(index) == 0


def test_shards_that_are_full_after_loading_are_doubled() -> None:
    rows = [row_of(fingerprint_of(5, number), sequence=number) for number in range(2000)]
    index = Index()
    index.load_newer(b"".join(packed(*rows)))
    for shard in range(SHARDS):
        index.settle(shard, 8, {})
    assert 2000 / 16 <= len(index._shards[5]) < 2000 / 4
    assert all_rows(index) == {row.fingerprint: row for row in rows}
    assert_every_row_is_found(index)


def test_fingerprints_depend_on_the_key_and_spread_over_the_shards() -> None:
    one, other = Fingerprints(bytes(16)), Fingerprints(b"\x01" * 16)
    ids = [f"session {number}".encode() for number in range(20_000)]
    found = [one.of(sid) for sid in ids]
    assert found == [one.of(sid) for sid in ids]
    assert all(len(fingerprint) == 16 for fingerprint in found)
    assert len(set(found)) == len(ids)
    assert not set(found) & {other.of(sid) for sid in ids}
    shards = [0] * SHARDS
    for fingerprint in found:
        shards[int.from_bytes(fingerprint[:6], "little") % SHARDS] += 1
    assert max(shards) < 60
    assert min(shards) > 0


def test_the_garbage_collector_tracks_nothing_per_session() -> None:
    key = Fingerprints(bytes(16))
    index = Index()
    index.reserve(40_000)
    gc.collect()
    before = len(gc.get_objects())
    index.put(packed(*(row_of(key.of(str(number).encode())) for number in range(20_000))))
    gc.collect()
    assert len(gc.get_objects()) - before < 100
