from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistence.observe.digest import MAX_CENTROIDS, WORKER_CENTROIDS, Digest

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


def steps(share: float) -> Callable[[random.Random], float]:
    """Return durations of which a share takes a hundred times as long as the others."""

    def duration(rng: random.Random) -> float:
        return 1 + 0.1 * rng.random() if rng.random() < share else 0.01 + 0.001 * rng.random()

    return duration


SHAPES: dict[str, Callable[[random.Random], float]] = {
    "lognormal": lambda rng: rng.lognormvariate(-3, 1),
    "exponential": lambda rng: rng.expovariate(100),
    "heavy tail": lambda rng: 0.01 * rng.paretovariate(1.5),
    "1 % misses": steps(0.01),
    "3 % misses": steps(0.03),
    "5 % misses": steps(0.05),
    "6 % misses": steps(0.06),
}
RANK_ERRORS = {0.5: 0.03, 0.95: 0.03, 0.99: 0.01}


def stored(values: list[float], max_centroids: int) -> Digest:
    """Return the digest of values that came some at a time, and was stored now and then."""
    known, news = Digest(max_centroids), Digest(max_centroids)
    for start in range(0, len(values), 64):
        news.add(values[start : start + 64])
        if start % 512 == 448:
            known.merge(news)
            known, news = Digest.unpack(known.pack(), max_centroids), Digest(max_centroids)
    known.merge(news)
    return known


def rank_error(values: list[float], share: float, found: float) -> float:
    """Return how far the rank of a value is from what was asked for."""
    exact = sorted(values)
    low, high = bisect_left(exact, found) / len(exact), bisect_right(exact, found) / len(exact)
    return max(0.0, low - share, share - high)


@pytest.mark.parametrize("count", [200, 1000, 10_000])
@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_are_as_near_as_promised_whatever_the_shape(shape: str, count: int) -> None:
    for seed in range(3):
        rng = random.Random(seed)
        values = [SHAPES[shape](rng) for _ in range(count)]
        for max_centroids, sharper in ((MAX_CENTROIDS, 1), (WORKER_CENTROIDS, 4)):
            digest = stored(values, max_centroids)
            for share, most in RANK_ERRORS.items():
                error = rank_error(values, share, digest.quantile(share))
                assert error <= max(most / sharper, 1 / count), (seed, share, error)


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
