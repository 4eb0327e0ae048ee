"""What changes with the number of sessions.

=============== ===============================================================================
growth          create, update, restore, list and open 10,000 to 1,000,000 sessions, not synced
growth-index    create and open up to 3,000,000 small sessions, none of them in memory
=============== ===============================================================================

"written" and "occupied" are as in the mixed workloads; "open" is after a clean close.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from benchmarks.bars import Bar, Kind
from benchmarks.contender import ENGINE, Contender, Metric
from benchmarks.engine import growth
from benchmarks.peers.growth import Growth
from benchmarks.peers.lmdb import Lmdb
from benchmarks.peers.sqlite import Sqlite
from benchmarks.sizes import Sizes
from benchmarks.workload import Workload

_defined = partial(Workload, definitions=__doc__)

_TIMES_TEN = 11
"""What ten times the sessions may cost."""

_INDEX = (Metric("create", "/s", higher_is_better=True), growth.OPEN, Metric("rss", " B/session"))


def _growth(sizes: Sizes) -> list[Contender]:
    operations = sizes.growth_operations
    return [
        *(growth.Growth(count, operations) for count in sizes.grown),
        *(
            Growth(store, count, operation_count=operations)
            for count in sizes.grown
            for store in (Lmdb(synced=False), Sqlite(synced=False))
        ),
    ]


def _index(sizes: Sizes) -> list[Contender]:
    return [growth.IndexGrowth(count) for count in sizes.grown_index]


def _bars(sizes: Sizes) -> tuple[Bar, ...]:
    """Ten times the sessions cost at most eleven times the time: per session, 11/10 of it."""
    bars: list[Bar] = []
    for fewer, more in pairwise(sizes.grown):
        pair = {"ours": f"{ENGINE}, {more:,}", "against": f"{ENGINE}, {fewer:,}"}
        slower = round(more / fewer / _TIMES_TEN, 3)
        bars += [Bar(rate.name, Kind.RATIO_AT_LEAST, slower, **pair) for rate in growth.RATES]
        bars.append(Bar(growth.OPEN.name, Kind.RATIO_AT_MOST, _TIMES_TEN, **pair))
    return tuple(bars)


WORKLOADS = (
    _defined(
        "growth",
        growth.METRICS,
        _growth,
        sized_bars=_bars,
        repetitions=lambda sizes: sizes.growth_repetitions,
        observed=False,
        size_unit="sessions",
    ),
    _defined(
        "growth-index",
        _INDEX,
        _index,
        repetitions=lambda sizes: sizes.growth_repetitions,
        observed=False,
        size_unit="sessions",
        sizes_chosen=lambda sizes: bool(sizes.grown_index),
    ),
)
