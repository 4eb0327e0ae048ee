"""Calls that come when they come, whatever the ones before take, beside requests in flight."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final

from benchmarks.contender import check

IN_FLIGHT: Final = 100
ARRIVALS_PER_SECOND: Final = 200
UPDATED_SHARE: Final = 0.1
"""Of the requests."""
_REQUEST_SECONDS: Final = 0.1


async def arrivals(
    chance: random.Random,
    count: int,
    arrive: Callable[[], Awaitable[float]],
    request: Callable[[], Awaitable[None]],
) -> list[float]:
    """Return what `count` calls of `arrive` returned.

    Args:
        chance: when they come.
        count: how many.
        arrive: one call, `ARRIVALS_PER_SECOND` on the average.
        request: one request; `IN_FLIGHT` of them are under way all the time.
    """

    async def request_again() -> None:
        while True:
            await request()

    beside = [asyncio.create_task(request_again()) for _ in range(IN_FLIGHT)]
    calls = []
    due = time.perf_counter()
    for _ in range(count):
        due += chance.expovariate(ARRIVALS_PER_SECOND)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        calls.append(asyncio.ensure_future(arrive()))
    results = await asyncio.gather(*calls)
    for task in beside:
        task.cancel()
    ends = await asyncio.gather(*beside, return_exceptions=True)
    check(all(isinstance(end, asyncio.CancelledError) for end in ends), f"requests: {ends}")
    return results


async def work_of_a_request(chance: random.Random) -> None:
    """Take as long as a request does beside its session: a tenth of a second, on the average."""
    await asyncio.sleep(_REQUEST_SECONDS * chance.uniform(0.0, 2.0))
