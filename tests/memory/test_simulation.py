from __future__ import annotations

import array
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from persistence.memory.adaptive import MARGIN, SHADOW_KEYS, Shadows, full_house
from persistence.memory.simulation import SimulatedCache, simulated

DATA = Path(__file__).parents[3] / "shared/data"


def apache() -> list[str]:
    with gzip.open(DATA / "web-apache_logs.log.gz", "rt", errors="surrogateescape") as lines:
        return [line.split(" ", 1)[0] for line in lines]


def web12() -> list[str]:
    numbers = array.array("i", lzma.decompress((DATA / "web-cache2k-web12.trace.xz").read_bytes()))
    return list(map(str, numbers))  # in the wrong order of bytes, which is as good as any name


def mooncake() -> list[str]:
    with gzip.open(DATA / "kv-mooncake-conversation_trace.jsonl.gz", "rt") as lines:
        return [str((json.loads(line)["hash_ids"] * 2)[1]) for line in lines]


Published = dict[int, tuple[float, float, float]]
TRACES: dict[str, tuple[Callable[[], list[str]], Published]] = {
    "apache": (
        apache,
        {1: (0.710, 0.718, 0.724), 10: (0.792, 0.792, 0.793), 25: (0.810, 0.808, 0.807)},
    ),
    "web12": (
        web12,
        {1: (0.398, 0.404, 0.410), 10: (0.685, 0.717, 0.723), 25: (0.777, 0.791, 0.794)},
    ),
    "mooncake": (
        mooncake,
        {1: (0.012, 0.014, 0.029), 10: (0.291, 0.146, 0.235), 25: (0.376, 0.321, 0.364)},
    ),
}
"""For each trace: hit ratios of LRU, SIEVE and S3-FIFO in a cache of so many percent of its keys,
measured with other people's implementations."""


@pytest.mark.skipif(not DATA.exists(), reason="the traces are not here")
@pytest.mark.parametrize("trace", TRACES)
def test_on_real_traces_each_policy_hits_what_is_known_and_adaptive_what_the_best_one_hits(
    trace: str,
) -> None:
    read, published = TRACES[trace]
    keys = [(key, 1) for key in read()]
    distinct = len(set(keys))
    for percent in (1, 5, 10, 25, 50):
        size = round(distinct * percent / 100)
        found = [simulated(name, size, keys).ratio for name in ("lru", "sieve", "s3fifo")]
        if percent in published:
            assert found == pytest.approx(published[percent], abs=0.005), percent
        assert simulated("adaptive", size, keys).ratio >= max(found) - 0.01, percent


def test_a_budget_is_kept_and_a_key_that_is_larger_than_it_is_all_there_is() -> None:
    cache = SimulatedCache("lru", 100)
    for number in range(20):
        assert not cache.ask(str(number), 30)
        assert cache.used_bytes <= 100
    assert cache.ask("19", 40)  # it has grown
    assert cache.used_bytes <= 100
    assert not cache.ask("large", 1000)
    assert cache.used_bytes == 1000
    assert not cache.ask("19", 30)
    assert cache.used_bytes == 30


def test_keys_leave_from_the_threshold_down_to_the_target() -> None:
    cache = SimulatedCache("lru", 100, 0.8, 0.5)
    for number in range(8):
        cache.ask(str(number), 10)
    assert cache.used_bytes == 80
    assert not cache.ask("8", 10)
    assert cache.used_bytes == 50
    assert not cache.ask("3", 10)
    assert cache.ask("4", 10), "the newest five had stayed"


def test_hits_and_bytes_are_counted_apart() -> None:
    ratio = simulated("lru", 1000, [("a", 100), ("b", 10), ("a", 100), ("c", 10)])
    assert (ratio.requests, ratio.hits) == (4, 1)
    assert ratio.ratio == 0.25
    assert ratio.byte_ratio == pytest.approx(100 / 220)
    nothing = simulated("lru", 1000, [])
    assert (nothing.ratio, nothing.byte_ratio) == (0.0, 0.0)


def loop_and_scan(rounds: int) -> list[str]:
    """A few keys again and again, and between them many that never come again: LRU loses them."""
    asked: list[str] = []
    for number in range(rounds):
        asked += [f"hot {n}" for n in range(30)] * 2
        asked += [f"once {number} {n}" for n in range(100)]
    return asked


def test_adaptive_leaves_lru_where_another_policy_hits_more() -> None:
    ratio = simulated("adaptive", 100, [(key, 1) for key in loop_and_scan(100)])
    assert ratio.policy in {"sieve", "s3fifo"}
    assert ratio.ratio > simulated("lru", 100, [(key, 1) for key in loop_and_scan(100)]).ratio


def test_adaptive_stays_where_nothing_is_better() -> None:
    assert simulated("adaptive", 100, [(str(n % 80), 1) for n in range(20_000)]).policy == "lru"


def test_shadows_of_a_large_cache_look_at_a_sample_of_the_keys() -> None:
    shadows = Shadows(50 * SHADOW_KEYS, "lru")
    assert shadows.rate == 64
    for number in range(100_000):
        shadows.observe(str(number))
    assert all(len(shadow) <= SHADOW_KEYS for _, shadow in shadows._shadows)
    assert len(shadows._shadows[0][1]) > 0


def test_shadows_are_made_anew_when_the_cache_holds_other_numbers_of_keys() -> None:
    shadows = Shadows(1000, "lru")
    assert shadows.fits(600)
    assert not shadows.fits(400)
    assert not shadows.fits(2100)
    assert full_house(10, 500, 5000) == 100
    assert full_house(0, 0, 100) >= 1


def test_a_policy_that_is_hardly_better_is_not_moved_to() -> None:
    shadows = Shadows(100, "lru")
    shadows._hits = {"lru": 1000.0, "sieve": 1000.0 * (1 + MARGIN / 2), "s3fifo": 0.0}
    shadows._end_window()
    assert shadows.policy == "lru"
    shadows._hits["sieve"] = shadows._hits["lru"] * (1 + MARGIN * 2)
    shadows._end_window()
    assert shadows.policy == "sieve"
