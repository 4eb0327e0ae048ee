"""What the providers of this library do beyond the contract."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, cast

import pytest

from persistence import Clock, ManualClock, SystemClock
from persistence.config import RedisConfig
from persistence.errors import (
    ConfigError,
    ConflictError,
    InvalidArgument,
    ManagerClosed,
    RemoteUnavailable,
    ValueTooLarge,
    WriteOutcomeUnknown,
    WrongEventLoop,
)
from persistence.providers import (
    MemoryProvider,
    PostgresProvider,
    RedisProvider,
    SessionProvider,
    TierProvider,
)
from persistence.record import NEVER
from persistence.remote.contract import (
    CommitResult,
    Outcome,
    Put,
    RemoteSession,
    RemoteTier,
    Request,
    Stored,
    Touch,
)
from persistence.remote.redis import RedisTier
from persistence.testing.remote_tier_contract import created, loaded
from persistence.testing.sessions import create, new_record
from tests.postgres_servers import new_namespace
from tests.redis_servers import HOST, RedisServer, free_port

SEVEN = {
    "get_session",
    "set_session",
    "delete_session",
    "has_session",
    "cleanup_old_sessions",
    "get_active_sessions",
    "get_stats",
}


def test_the_contract_has_seven_methods_and_nothing_else() -> None:
    assert {name for name in vars(SessionProvider) if not name.startswith("_")} == SEVEN


@pytest.mark.parametrize("kind", [MemoryProvider, TierProvider, RedisProvider, PostgresProvider])
def test_every_provider_has_them(kind: type) -> None:
    assert all(hasattr(kind, name) for name in SEVEN)


# --- in memory ------------------------------------------------------------------------------------


async def test_expired_sessions_are_freed_though_nobody_asks_for_them() -> None:
    clock = ManualClock()
    provider = MemoryProvider(ttl_seconds=10, clock=clock)
    for n in range(5000):
        await provider.set_session(f"s{n}", {"n": n})
        clock.advance(1)
    assert len(provider._sessions) < 1100


async def test_a_jump_of_the_wall_clock_ends_no_session_in_memory() -> None:
    clock = ManualClock()
    provider = MemoryProvider(ttl_seconds=10, clock=clock)
    await provider.set_session("a", {"n": 1})
    clock.jump_wall(864_000)
    assert await provider.get_session("a") == {"n": 1}
    clock.jump_wall(-864_000)
    clock.advance(10)
    assert await provider.get_session("a") is None


async def test_a_session_that_is_too_large_is_refused_and_the_old_one_stays() -> None:
    provider = MemoryProvider(max_bytes=100)
    await provider.set_session("a", {"n": "x" * 98})
    with pytest.raises(ValueTooLarge, match="at most 100 are allowed"):
        await provider.set_session("a", {"n": "x" * 99})
    assert await provider.get_session("a") == {"n": "x" * 98}


def test_a_wrong_default_ttl_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="ttl_seconds"):
        MemoryProvider(ttl_seconds=-1)
    with pytest.raises(InvalidArgument, match="ttl_seconds"):
        RedisProvider("redis://localhost", ttl_seconds=cast(Any, "60"))


# --- over a shared tier ---------------------------------------------------------------------------


@pytest.fixture
async def tier(shared_server: RedisServer) -> AsyncIterator[RedisTier]:
    settings: dict[str, Any] = {"namespace": new_namespace(), "timeout_seconds": 10}
    tier = RedisTier(RedisConfig(url=shared_server.url, **settings), SystemClock())
    await tier.open()
    yield tier
    await tier.close()


async def opened(tier: object, clock: Clock | None = None) -> TierProvider:
    provider = TierProvider(cast(RemoteTier, tier), clock=clock)
    await provider.open()
    return provider


async def test_ending_what_never_was_leaves_nothing_behind(tier: RedisTier) -> None:
    provider = await opened(tier)
    for n in range(5):
        assert await provider.delete_session(f"s{n}") is False
    assert await tier.stored([f"s{n}" for n in range(5)]) == [None] * 5


async def test_user_metadata_and_a_fixed_end_of_a_workers_session_stay(tier: RedisTier) -> None:
    record = new_record({"n": 1}, flags=0, ttl_seconds=60.0)
    put = create("a", record, ttl_seconds=60.0)
    put = put._replace(cap=put.deadline + 5)
    assert (await tier.commit([put]))[0].is_stored
    provider = await opened(tier, ManualClock(put.accessed + 30))
    await provider.set_session("a", {"n": 2})
    found = await loaded(tier, "a")
    assert found.deadline == put.deadline, "its deadline is fixed"
    await provider.set_session("a", {"n": 3}, ttl_seconds=1000)
    found = await loaded(tier, "a")
    assert found.deadline == found.cap == put.cap, "no TTL exceeds the end of its lifetime"
    assert found.record[:16] == record[:16]
    assert b"ada" in found.record


async def test_an_access_is_recorded_once_a_sixteenth_of_the_ttl_has_passed(
    tier: RedisTier,
) -> None:
    record = await created(tier, "a", {"n": 1})
    start = (await loaded(tier, "a")).accessed
    clock = ManualClock(start)
    provider = await opened(tier, clock)
    clock.advance(3600 / 16 - 1)
    await provider.get_session("a")
    assert (await loaded(tier, "a")).accessed == start
    clock.advance(2)
    await provider.get_session("a")
    found = await loaded(tier, "a")
    assert (found.record, found.accessed) == (record, clock.wall())
    assert found.deadline == clock.wall() + 3600


class Scripted:
    """A tier that answers as it is told.

    Args:
        outcomes: of commits, one after the other; the last one again and again.
    """

    def __init__(self, *outcomes: CommitResult) -> None:
        self.outcomes = list(outcomes)
        self.asked: list[Request] = []
        self.opened = self.closed = self.refuses = 0
        self.session = RemoteSession(new_record({"n": 1}), 0.0, NEVER, NEVER)

    async def open(self) -> None:
        await asyncio.sleep(0)
        if self.refuses:
            self.refuses -= 1
            raise RemoteUnavailable("as if")
        self.opened += 1

    async def close(self) -> None:
        self.closed += 1

    async def load(self, session_id: str) -> RemoteSession:
        return self.session

    async def stored(self, session_ids: Sequence[str]) -> list[Stored]:
        return [Stored(True, 1, bytes(16), bytes(16)) for _ in session_ids]

    async def commit(self, requests: Sequence[Request]) -> list[CommitResult]:
        self.asked += requests
        return [self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]]


@pytest.mark.parametrize("outcome", [Outcome.CONFLICT, Outcome.TERMINATED, Outcome.MISSING])
async def test_a_write_that_was_overtaken_is_done_again(outcome: Outcome) -> None:
    tier = Scripted(CommitResult(outcome), CommitResult(outcome), CommitResult(Outcome.APPLIED))
    await (await opened(tier)).set_session("a", {"n": 2})
    assert len(tier.asked) == 3
    ids = {request.record[16:32] for request in tier.asked if isinstance(request, Put)}
    assert len(ids) == 3, "another attempt is another commit"


async def test_a_write_that_is_overtaken_all_the_time_ends() -> None:
    provider = await opened(Scripted(CommitResult(Outcome.CONFLICT)))
    with pytest.raises(ConflictError, match="others changed it"):
        await provider.set_session("a", {"n": 2})


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (Outcome.REFUSED, RemoteUnavailable("away")),
        (Outcome.UNKNOWN, WriteOutcomeUnknown("lost")),
    ],
)
async def test_what_a_tier_does_not_decide_is_raised(
    outcome: Outcome, error: RemoteUnavailable
) -> None:
    provider = await opened(Scripted(CommitResult(outcome, None, error)))
    with pytest.raises(type(error)):
        await provider.set_session("a", {"n": 2})
    with pytest.raises(type(error)):
        await provider.delete_session("a")


async def test_an_access_that_cannot_be_recorded_does_not_hinder_reading() -> None:
    error = RemoteUnavailable("away")
    tier = Scripted(CommitResult(Outcome.REFUSED, None, error))
    assert await (await opened(tier)).get_session("a") == {"n": 1}
    assert [type(request) for request in tier.asked] == [Touch]


# --- who may call it ------------------------------------------------------------------------------


def calls_of(provider: TierProvider) -> list[Callable[[], Coroutine[Any, Any, object]]]:
    return [
        partial(provider.get_session, "a"),
        partial(provider.set_session, "a", {"n": 2}),
        partial(provider.delete_session, "a"),
        partial(provider.has_session, "a"),
        partial(provider.cleanup_old_sessions, 0),
        provider.get_active_sessions,
        provider.get_stats,
    ]


def in_a_loop_of_its_own(call: Callable[[], Coroutine[Any, Any, object]]) -> object:
    return asyncio.run(call())


async def test_those_who_come_before_it_is_open_open_it_once() -> None:
    for number in range(4):
        tier = Scripted(CommitResult(Outcome.APPLIED))
        provider = TierProvider(cast(RemoteTier, tier))
        call = calls_of(provider)[number]
        await asyncio.gather(call(), call())
        assert tier.opened == 1
        await provider.close()


async def test_what_could_not_be_opened_is_opened_by_the_next_call() -> None:
    tier = Scripted(CommitResult(Outcome.APPLIED))
    tier.refuses = 1
    provider = TierProvider(cast(RemoteTier, tier))
    with pytest.raises(RemoteUnavailable):
        await provider.get_session("a")
    assert await provider.get_session("a") == {"n": 1}
    await provider.close()


async def test_once_it_is_closed_every_call_is_refused() -> None:
    tier = Scripted(CommitResult(Outcome.APPLIED))
    provider = TierProvider(cast(RemoteTier, tier))
    async with provider:
        assert await provider.get_session("a") == {"n": 1}
        await provider.open()  # again, which is no harm
    await provider.close()
    asked = len(tier.asked)
    for call in [*calls_of(provider), provider.open]:
        with pytest.raises(ManagerClosed, match="is closed; make another one"):
            await call()
    assert len(tier.asked) == asked


def test_another_event_loop_is_refused_with_the_way_out() -> None:
    tier = Scripted(CommitResult(Outcome.APPLIED))
    provider = TierProvider(cast(RemoteTier, tier))

    async def first() -> None:
        await provider.open()
        for call in [*calls_of(provider), provider.open, provider.close]:
            with pytest.raises(WrongEventLoop, match=r"persistence\.sync"):
                await asyncio.to_thread(in_a_loop_of_its_own, call)
        assert (tier.asked, tier.closed) == ([], 0)
        assert await provider.get_session("a") == {"n": 1}
        await provider.close()

    asyncio.run(first())
    asyncio.run(provider.close())  # it is closed already, which is no harm
    assert tier.closed == 1


async def test_the_child_of_a_fork_is_refused_and_leaves_its_parent_the_connections(
    shared_server: RedisServer,
) -> None:
    async with RedisProvider(shared_server.url, namespace=new_namespace()) as provider:
        await provider.set_session("a", {"n": 1})
        child = os.fork()
        if not child:
            os._exit(_refused_in_child(provider))
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert await provider.get_session("a") == {"n": 1}


def _refused_in_child(provider: RedisProvider) -> int:
    """Return how many calls were not refused, in an event loop of the child's own."""
    asyncio._set_running_loop(None)

    async def count() -> int:
        refused = 0
        calls = calls_of(provider)
        for call in calls:
            try:
                await call()
            except ManagerClosed as error:
                refused += "make one of your own" in str(error)
        await provider.close()
        return len(calls) - refused

    return asyncio.run(count())


# --- by URL ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "url", "reason"),
    [
        (RedisProvider, "postgresql://host/shop", "needs the URL of a Redis"),
        (RedisProvider, "", "needs the URL of a Redis"),
        (PostgresProvider, "redis://host", "needs the URL of a database"),
        (PostgresProvider, "postgresql://host", "name of the database"),
        (PostgresProvider, "host", "must be a URL"),
    ],
)
def test_a_url_of_something_else_is_refused(kind: Any, url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        kind(url)


@pytest.mark.parametrize(
    "make",
    [
        lambda port: RedisProvider(f"redis://{HOST}:{port}", timeout_seconds=0.5),
        lambda port: PostgresProvider(f"postgresql://a@{HOST}:{port}/b", timeout_seconds=0.5),
    ],
    ids=["redis", "postgres"],
)
async def test_a_server_that_is_away_is_said_to_be(make: Any) -> None:
    with pytest.raises(RemoteUnavailable):
        async with make(free_port()):
            pass
