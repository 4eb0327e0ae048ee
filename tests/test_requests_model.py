"""Random work on a few sessions with limits, compared with a count of what was admitted."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from persistence import ManualClock, StateManager
from persistence.errors import DiskFull, RequestLimitReached
from tests.engine import Crash, ScriptedFiles, Start

LIMITS = {"few": 20, "many": 300, "unlimited": 0}
STEPS = 120


class Workload:
    """Requests, and everything that may come between them.

    Attributes:
        admitted: requests that were admitted, by session.
        failed: of these, the ones that failed.
    """

    def __init__(self, rng: random.Random, clock: ManualClock, files: ScriptedFiles) -> None:
        self.rng = rng
        self.admitted: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self._clock = clock
        self._files = files

    async def request(self, state: StateManager, sid: str) -> None:
        fails = self.rng.random() < 0.2
        try:
            async with state.request(sid, "r"):
                self.admitted[sid] += 1
                if self.rng.random() < 0.5:
                    await state.update_session(sid, lambda data: data.update(n=data["n"] + 1))
                if fails:
                    self.failed[sid] += 1
                    self._fail()
        except (RequestLimitReached, ValueError):
            return

    def _fail(self) -> None:
        raise ValueError("bad")

    async def requests(self, state: StateManager, sid: str) -> None:
        count = self.rng.randrange(1, 12)
        await asyncio.gather(*(self.request(state, sid) for _ in range(count)))

    async def edit(self, state: StateManager, sid: str) -> None:
        async with state.edit(sid) as draft:
            draft["n"] += 1
            await self.record(state, sid)
            if self.rng.random() < 0.3:
                await state.flush()

    async def record(self, state: StateManager, sid: str) -> None:
        try:
            await state.record_request(sid, "r", 0.1)
        except RequestLimitReached:
            return
        self.admitted[sid] += 1

    async def full_disk(self, state: StateManager, sid: str) -> None:
        self._files.full = True
        try:
            await self.record(state, sid)
        except DiskFull:
            pass
        finally:
            self._files.full = False

    async def store(self, state: StateManager, sid: str) -> None:
        self._clock.advance(self.rng.choice((1.0, 6.0, 40.0)))
        await state._requests.look()

    async def flush(self, state: StateManager, sid: str) -> None:
        await state.flush()

    async def spill(self, state: StateManager, sid: str) -> None:
        await state.spill_session(sid)

    async def step(self, state: StateManager) -> None:
        """Do two things at the same time, of the same session or of two."""
        work = (self.requests, self.requests, self.edit, self.record, self.store, self.spill)
        chosen = [self.rng.choice(work), self.rng.choice(work)]
        await asyncio.gather(*(each(state, self.rng.choice([*LIMITS])) for each in chosen))
        if self.rng.random() < 0.1:
            await self.full_disk(state, self.rng.choice([*LIMITS]))


async def begin(state: StateManager) -> None:
    for sid, limit in LIMITS.items():
        await state.create_session(session_id=sid, data={"n": 0}, max_requests=limit)


@pytest.mark.parametrize("seed", range(3))
async def test_every_request_is_counted_once(
    start: Start, clock: ManualClock, files: ScriptedFiles, seed: int
) -> None:
    rng = random.Random(seed)
    work = Workload(rng, clock, files)
    state = await start()
    await begin(state)
    for _ in range(STEPS):
        await work.step(state)
        if rng.random() < 0.03:
            await state.close()
            state = await start()
    for _ in range(2):
        for sid, limit in LIMITS.items():
            found = await state.session_metrics(sid)
            assert (found.requests, found.errors) == (work.admitted[sid], work.failed[sid]), sid
            assert found.running == 0
            if limit:
                assert work.admitted[sid] <= limit
        await state.close()
        state = await start()
    for _ in range(3):
        await asyncio.gather(*(work.request(state, "few") for _ in range(30)))
    assert work.admitted["few"] == LIMITS["few"]


@pytest.mark.parametrize("seed", range(3))
async def test_kills_never_let_more_through_than_the_limit(
    start: Start,
    crash: Crash,
    clock: ManualClock,
    files: ScriptedFiles,
    tmp_path: Path,
    seed: int,
) -> None:
    rng = random.Random(seed)
    work = Workload(rng, clock, files)
    state = await start()
    await begin(state)
    for _ in range(STEPS // 2):
        await work.step(state)
        if rng.random() < 0.1:
            state = await start(path=crash(state))
        for sid, limit in LIMITS.items():
            found = await state.session_metrics(sid)
            assert found.requests <= work.admitted[sid]
            if limit:
                assert found.requests <= found.admitted <= limit
                assert work.admitted[sid] <= limit
