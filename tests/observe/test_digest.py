from __future__ import annotations

import random
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistence.observe.digest import MAX_CENTROIDS, Digest

DURATIONS = st.lists(st.floats(0, 1e6, width=32), max_size=300)


def digest_of(values: list[float]) -> Digest:
    digest = Digest()
    digest.add(values)
    return digest


def test_percentiles_are_near_the_exact_ones() -> None:
    values = [random.Random(1).lognormvariate(-5, 1) for _ in range(20_000)]
    digest, exact = Digest(), sorted(values)
    for start in range(0, len(values), 64):
        digest.add(values[start : start + 64])
    for share in (0.5, 0.95, 0.99):
        assert digest.quantile(share) == pytest.approx(exact[int(share * len(exact))], rel=0.10)


def test_parts_that_are_merged_say_what_the_whole_says() -> None:
    rng = random.Random(2)
    parts = [[rng.expovariate(100) for _ in range(700)] for _ in range(20)]
    merged = Digest()
    for part in parts:
        merged.merge(digest_of(part))
    exact = sorted(value for part in parts for value in part)
    for share in (0.5, 0.95, 0.99):
        assert merged.quantile(share) == pytest.approx(exact[int(share * len(exact))], rel=0.10)


def test_few_values_are_kept_exactly() -> None:
    digest = digest_of([0.5, 0.25, 4.0])
    assert Digest.unpack(digest.pack()).pack() == digest.pack()
    assert len(digest.pack()) == 13
    assert (digest.quantile(0.0), digest.quantile(0.5), digest.quantile(1.0)) == (0.25, 0.5, 4.0)


def test_an_empty_one_has_no_percentiles_and_no_bytes() -> None:
    empty = Digest()
    empty.merge(Digest())
    assert (empty.quantile(0.5), empty.pack()) == (0.0, b"")
    assert Digest.unpack(b"").quantile(0.99) == 0.0


@given(DURATIONS)
def test_what_is_packed_is_bounded_and_comes_back(values: list[float]) -> None:
    digest = digest_of(values) if values else Digest()
    packed = digest.pack()
    assert len(packed) <= 1 + 8 * MAX_CENTROIDS
    again = Digest.unpack(packed)
    for share in (0.5, 0.95, 0.99):
        assert again.quantile(share) == pytest.approx(digest.quantile(share), rel=0.02, abs=1e-30)


@pytest.mark.parametrize(
    "packed",
    [
        b"\0",
        b"\1",
        b"\1234567",
        pack("<Bf", 2, 1.0),
        pack("<Bff", 1, 1.0, 0.0),
        pack("<Bff", 1, 1.0, float("nan")),
        pack("<Bff", 1, float("nan"), 1.0),
        pack("<Bff", 1, -1.0, 1.0),
        pack("<Bff", 1, 1.0, float("inf")),
        pack("<Bf", 1, float("inf")),
    ],
)
def test_what_is_no_digest_is_refused(packed: bytes) -> None:
    with pytest.raises(ValueError, match="not a packed digest"):
        Digest.unpack(packed)
