"""What counting and timing costs a request."""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path

import pytest

from persistence import StateManager
from tests.engine import config_for

TASKS = 20
REQUESTS = 25
ROUNDS = 7
SESSIONS = 100


async def serve(state: StateManager, sids: list[str]) -> float:
    """Make requests that read and update their sessions; return what one takes of the CPU."""

    async def client(number: int) -> None:
        for turn in range(REQUESTS):
            sid = sids[(number * REQUESTS + turn) % SESSIONS]
            async with state.request(sid, "POST /cart") as request:
                assert request.session["n"] >= 0
                await state.update_session(sid, lambda data: data.update(n=data["n"] + 1))

    started = time.process_time()
    await asyncio.gather(*(client(number) for number in range(TASKS)))
    return (time.process_time() - started) / (TASKS * REQUESTS)


@pytest.mark.alone
async def test_metrics_cost_no_more_than_a_quarter_of_the_throughput(tmp_path: Path) -> None:
    states = []
    for tracks in (True, False):
        session = {"track_metrics": tracks}
        config = config_for(tmp_path / str(tracks), disk={"fsync": "never"}, session=session)
        states.append(StateManager(config=config))
    async with states[0] as on, states[1] as off:
        sides = []
        for state in (on, off):
            sides.append(
                (state, [await state.create_session(data={"n": 0}) for _ in range(SESSIONS)])
            )
            await serve(*sides[-1])  # loads what is loaded at the first time
        ratios = []
        for _ in range(ROUNDS):  # interleaved, so that whatever else runs disturbs both
            with_metrics, without = [await serve(state, sids) for state, sids in sides]
            ratios.append(without / with_metrics)
    assert statistics.median(ratios) >= 0.75, ratios
