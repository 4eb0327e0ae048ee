"""The simulated shared tier answers as the real one: the same requests, the same replies."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random

from persistence import record as rec
from persistence.record import NO_ID
from persistence.remote.contract import CommitResult, Delete, Request
from tests.faults.simredis import Server
from tests.redis_servers import RedisServer
from tests.remote.conftest import Open, open_tier
from tests.remote.sessions import create, new_id, new_record, next_record, touch, update

__all__ = ["open_tier"]

REQUESTS = 400
NAMES = ("a", "b", "c")


class _Requests:
    """Makes requests of every kind: right, late, repeated, built on what was refused."""

    def __init__(self, chance: Random) -> None:
        self._chance = chance
        self._records = {name: [new_record({"n": 0})] for name in NAMES}
        self._sent: list[Request] = []

    def next(self) -> Request:
        if self._sent and self._chance.random() < 0.15:
            return self._chance.choice(self._sent)
        request = self._fresh()
        self._sent.append(request)
        return request

    def _fresh(self) -> Request:
        name = self._chance.choice(NAMES)
        records = self._records[name]
        kind = self._chance.random()
        record = records[-1] if self._chance.random() < 0.8 else self._chance.choice(records)
        if kind < 0.2:
            records.append(new_record({"n": len(records)}))
            return create(name, records[-1])
        if kind < 0.7:
            records.append(next_record(record, {"n": len(records)}))
            return update(name, record, records[-1])
        if kind < 0.85:
            return touch(name, record, time.time() + self._chance.random(), time.time() + 999)
        incarnation = self._chance.choice([NO_ID, rec.incarnation_of(record)])
        base = self._chance.choice([NO_ID, NO_ID, rec.commit_of(record)])
        return Delete(name, new_id(), incarnation, base)


def _plain(result: CommitResult) -> tuple[object, object]:
    return result.outcome, result.stored


async def test_the_simulated_tier_answers_as_a_real_server(
    open_tier: Open,
    each_server: RedisServer,
    fault_seed: int,
    scaled: Callable[[int], int],
) -> None:
    tier = await open_tier(each_server.url)
    chance = Random(fault_seed)
    server = Server(time.time, chance.randbytes)
    requests = _Requests(chance)
    seen = set()
    left = scaled(REQUESTS)
    while left > 0:
        batch = [requests.next() for _ in range(chance.randrange(1, 8))]
        left -= len(batch)
        real = await tier.commit(batch)
        simulated, _ = server.commit(batch, b"w" * 16)
        assert list(map(_plain, real)) == list(map(_plain, simulated)), batch
        seen |= {result.outcome for result in real}
        for name in NAMES:
            assert await tier.load(name) == server.load(name)
    assert len(seen) == 5, "every outcome that a server gives"
