from __future__ import annotations

import pytest

from persistence import ManualClock
from persistence.clock import EngineTime
from persistence.memory.ordered import OrderedTier
from persistence.memory.tier import charge
from persistence.record import NEVER
from tests.engine import KIB, MIB, Start, memory_of
from tests.memory.test_simulation import loop_and_scan

RECORD = b"x" * 600
NAMES = ["sieve", "s3fifo", "adaptive"]


def tier_of(policy: str, max_bytes: int = 64 * KIB) -> OrderedTier:
    clock = ManualClock()
    return OrderedTier(policy, max_bytes, clock, EngineTime(clock))


def ask(tier: OrderedTier, session_id: str) -> bool:
    """Do what a read does: access, or bring in, and spill what is too much."""
    if tier.access(session_id) is not None:
        return True
    tier.put_noted(session_id, RECORD, 0.0, NEVER, NEVER)
    while tier.used_bytes > tier.budget_bytes:
        for victim in tier.victims(tier.budget_bytes, 32):
            tier.take(victim)
    return False


@pytest.mark.parametrize("policy", NAMES)
def test_a_victim_that_does_not_leave_is_named_again(policy: str) -> None:
    tier = tier_of(policy)
    for number in range(10):
        tier.put(str(number), RECORD, 0.0, NEVER)
    first = tier.victims(tier.used_bytes - 1, 100)
    assert len(first) == 1
    tier.check()
    assert set(tier.victims(-1, 100)) == {str(number) for number in range(10)}
    tier.check()


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize("max_bytes", [64 * KIB, 32 * MIB])
def test_victims_free_what_is_asked_for_and_no_more_than_one_session(
    policy: str, max_bytes: int
) -> None:
    tier = tier_of(policy, max_bytes)
    for number in range(1000):
        tier.put(str(number), RECORD, 0.0, NEVER)
    wanted = tier.used_bytes - 100 * charge("10", RECORD)
    victims = tier.victims(wanted, 10_000)
    assert len(victims) == len(set(victims))
    freed = sum(charge(name, RECORD) for name in victims)
    assert 100 * charge("10", RECORD) <= freed < 101 * charge("100", RECORD)
    assert len(tier.victims(-1, 7)) == 7


def test_sessions_that_are_asked_for_stay_under_sieve() -> None:
    tier = tier_of("sieve")
    tier.put("hot", RECORD, 0.0, NEVER)
    for number in range(500):
        assert ask(tier, "hot")
        ask(tier, f"once {number}")
    tier.check()


def test_an_update_counts_once_as_asked_for() -> None:
    tier = tier_of("s3fifo")
    for number in range(20):
        tier.put(str(number), RECORD, 0.0, NEVER)
    assert tier.renew("0") is not None
    tier.put("0", RECORD, 0.0, NEVER)
    assert tier.renew("1") is not None
    assert tier.renew("1") is not None
    assert tier.victims(tier.used_bytes - 1, 1) == ["0"], "asked for once: not enough to stay"
    tier.take("0")
    assert tier.victims(tier.used_bytes - 1, 1) == ["2"], "1 has moved to the main queue"


def test_the_adaptive_tier_moves_to_the_policy_that_hits_more() -> None:
    tier = tier_of("adaptive", 100 * charge("once 00 00", RECORD))
    asked = loop_and_scan(100)
    hits = sum(ask(tier, session_id) for session_id in asked)
    assert tier.policy in {"sieve", "s3fifo"}
    lru = tier_of("lru", 100 * charge("once 00 00", RECORD))
    assert hits > sum(ask(lru, session_id) for session_id in asked)
    tier.check()


def test_the_shards_of_the_adaptive_tier_follow_one_by_one() -> None:
    tier = tier_of("adaptive", 32 * MIB)
    for number in range(2000):
        tier.put(str(number), RECORD, 0.0, NEVER)
    assert tier._adviser is not None
    tier._adviser.policy = "sieve"
    moved = [tier._names.count("sieve")]
    while moved[-1] < tier.shards:
        tier.victims(tier.used_bytes - 1, 1)
        moved.append(tier._names.count("sieve"))
        assert moved[-1] - moved[-2] <= 1
        assert len(moved) < 100
    tier.check()
    assert len(set(tier.victims(-1, 10_000))) == 2000


@pytest.mark.parametrize("policy", NAMES)
async def test_an_engine_under_another_policy_keeps_its_budget_and_every_value(
    start: Start, policy: str
) -> None:
    state = await start(memory={"max_bytes": 64 * KIB, "policy": policy})
    for number in range(250):
        await state.create_session(session_id=str(number), data={"n": number, "x": "y" * 300})
    for number in [*range(0, 250, 3), *range(50)]:
        await state.update_session_data(str(number), "n", -number)
        assert (await state.stats()).memory_used_bytes <= 64 * KIB
    await state.terminate_session("7")
    for number in range(250):
        session = await state.get_session(str(number))
        assert (session is None) == (number == 7)
        if session is not None:
            assert session["n"] == (-number if number % 3 == 0 or number < 50 else number)
    memory_of(state).check()
    stats = await state.stats()
    assert stats.memory_policy == (policy if policy != "adaptive" else stats.memory_policy)
    assert stats.restored > 0
