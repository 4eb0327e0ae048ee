"""A worker elsewhere takes over everything from a checkpoint; the next one ships what changed.

With ``FULL_SIZE=1`` 100,000 sessions.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from persistence import StateConfig, StateManager
from persistence.record import ID_BYTES
from tests.checkpoint.support import records_in
from tests.engine import config_for
from tests.full_size import full_or
from tests.redis_servers import RedisServer

SESSIONS = full_or(100_000, 3_000)
AT_ONCE = 1000


def make_data(number: int, dice: random.Random) -> dict[str, Any]:
    """Return about 600 bytes that compress like text does."""
    words = " ".join(f"{dice.randrange(10**6):06d}" for _ in range(60))
    return {
        "number": number,
        "user": f"user{number}",
        "cart": {"items": [number] * 5},
        "log": words,
    }


def parts(numbers: range) -> Iterator[range]:
    for start in range(numbers.start, numbers.stop, AT_ONCE):
        yield numbers[start - numbers.start : start - numbers.start + AT_ONCE]


async def payloads_in(state: StateManager) -> dict[str, tuple[bytes, float]]:
    """Return every byte of every session but its identity, which a restore renews, and deadline."""
    await state.flush()
    return {
        sid: (record[2 * ID_BYTES :], deadline)
        for sid, (record, deadline) in (await records_in(state)).items()
    }


@pytest.mark.timeout(900)
async def test_a_worker_in_another_directory_restores_every_byte_and_ships_little_more(
    own_server: RedisServer, tmp_path: Path
) -> None:
    def config(name: str) -> StateConfig:
        return config_for(
            tmp_path / name,
            redis={"url": own_server.url, "write": "checkpoint"},
            session={"ttl_seconds": 86_400, "cleanup_interval_seconds": 0},
            disk={"fsync": "never"},
            memory={"max_bytes": 16 * 2**20},
            shutdown={"checkpoint": False},
        )

    dice = random.Random(3)
    async with StateManager(config=config("a")) as a:
        for part in parts(range(SESSIONS)):
            await asyncio.gather(
                *(a.create_session(session_id=f"s{n}", data=make_data(n, dice)) for n in part)
            )
        full = await a.create_checkpoint()
        assert (full.kind, full.sessions) == ("full", SESSIONS)
        expected = await payloads_in(a)
    assert len(expected) == SESSIONS
    async with StateManager(config=config("b")) as b:
        restored = await b.restore_checkpoint("latest")
        assert (restored.id, restored.sessions, restored.skipped) == (full.id, SESSIONS, ())
        skew = b._time.skew() - a._time.skew()  # their time bases are their own
        found = await payloads_in(b)
        assert found.keys() == expected.keys()
        for sid, (payload, deadline) in expected.items():
            assert found[sid][0] == payload
            assert abs(found[sid][1] + skew - deadline) < 1
        await b.create_checkpoint()  # full: a restore renews all identities
        changed = dice.sample(range(SESSIONS), SESSIONS // 100)
        for start in range(0, len(changed), AT_ONCE):
            await asyncio.gather(
                *(
                    b.update_session_data(f"s{n}", "number", -n)
                    for n in changed[start : start + AT_ONCE]
                )
            )
        third = await b.create_checkpoint()
        assert (third.kind, third.sessions) == ("incremental", SESSIONS)
        assert third.bytes <= 0.03 * full.bytes
        expected = await payloads_in(b)
    async with StateManager(config=config("c")) as c:
        assert (await c.restore_checkpoint("latest")).id == third.id
        found = await payloads_in(c)
        assert {sid: payload for sid, (payload, _) in found.items()} == {
            sid: payload for sid, (payload, _) in expected.items()
        }
