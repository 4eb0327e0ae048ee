from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

from persistence import ManualClock, StateManager
from persistence.errors import ConflictError, InvalidArgument, ManagerClosed, SessionNotFound
from persistence.resources import Resources
from tests.engine import Start, eventually, loop_steps, residency_of


class Connection:
    """A resource that knows whether it is open."""

    def __init__(self, pool: Pool, number: int) -> None:
        self._pool = pool
        self.number = number
        self.is_open = True

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        self.close()

    def close(self) -> None:
        assert self.is_open, "closed twice"
        self.is_open = False
        self._pool.closed.append(self.number)


class Pool:
    """Makes connections, and counts them."""

    def __init__(self) -> None:
        self.made: list[Connection] = []
        self.closed: list[int] = []

    async def connect(self) -> Connection:
        await asyncio.sleep(0)
        return self.connect_now()

    def connect_now(self) -> Connection:
        self.made.append(Connection(self, len(self.made)))
        return self.made[-1]

    @property
    def open(self) -> list[Connection]:
        return [each for each in self.made if each.is_open]


def resources_of(state: StateManager) -> Resources:
    return state._resources


async def connection(state: StateManager, session_id: str, pool: Pool) -> Connection:
    made: Connection = await state.resources(session_id, "db", pool.connect, Connection.aclose)
    return made


async def all_closed(state: StateManager) -> None:
    await eventually(lambda: not resources_of(state).has_any)


async def test_a_resource_is_made_once_and_found_again(state: StateManager) -> None:
    pool, sid = Pool(), await state.create_session()
    first = await connection(state, sid, pool)
    assert await connection(state, sid, pool) is first
    assert len(pool.made) == 1
    assert (await state.stats()).resources == 1


async def test_a_resource_is_made_once_under_concurrency(state: StateManager) -> None:
    pool, sid = Pool(), await state.create_session()
    found = await asyncio.gather(*(connection(state, sid, pool) for _ in range(100)))
    assert len(pool.made) == 1
    assert {id(each) for each in found} == {id(pool.made[0])}


async def test_sessions_and_names_have_resources_of_their_own(state: StateManager) -> None:
    pool = Pool()
    one, two = await state.create_session(), await state.create_session()
    found = [
        await state.resources(sid, name, pool.connect_now, Connection.close)
        for sid in (one, two)
        for name in ("db", "page")
    ]
    assert len({id(each) for each in found}) == 4


async def test_synchronous_factories_and_closes_will_do(state: StateManager) -> None:
    pool, sid = Pool(), await state.create_session()
    made = await state.resources(sid, "db", pool.connect_now, Connection.close)
    await state.terminate_session(sid)
    await all_closed(state)
    assert not made.is_open


async def test_a_resource_without_a_close_is_only_forgotten(state: StateManager) -> None:
    sid = await state.create_session()
    cache = await state.resources(sid, "cache", dict)
    assert await state.resources(sid, "cache", dict) is cache
    await state.spill_session(sid)
    assert await state.resources(sid, "cache", dict) is not cache


async def test_resources_are_closed_when_the_session_is_terminated(state: StateManager) -> None:
    pool, sid = Pool(), await state.create_session()
    await connection(state, sid, pool)
    await state.terminate_session(sid)
    await all_closed(state)
    assert not pool.open
    with pytest.raises(SessionNotFound):
        await connection(state, sid, pool)
    assert len(pool.made) == 1


async def test_resources_are_closed_when_the_session_expires(
    state: StateManager, clock: ManualClock
) -> None:
    pool, sid = Pool(), await state.create_session(ttl_seconds=10)
    await connection(state, sid, pool)
    clock.advance(11)
    assert await state.cleanup_expired() == 1
    await all_closed(state)
    assert not pool.open


async def test_resources_are_closed_when_the_session_spills_and_made_anew(
    state: StateManager,
) -> None:
    pool, sid = Pool(), await state.create_session()
    first = await connection(state, sid, pool)
    await state.spill_session(sid)
    await all_closed(state)
    assert not first.is_open
    second = await connection(state, sid, pool)
    assert second.is_open
    assert second is not first


async def test_resources_are_closed_when_memory_is_short(start: Start) -> None:
    state = await start(memory={"max_bytes": 20_000})
    pool, sid = Pool(), await state.create_session(data={"a": bytes(1000)})
    await connection(state, sid, pool)
    for _ in range(20):
        await state.create_session(data={"a": bytes(1000)})
    await all_closed(state)
    assert not pool.open


async def test_resources_are_closed_at_shutdown(start: Start) -> None:
    state = await start()
    pool = Pool()
    for _ in range(10):
        await connection(state, await state.create_session(), pool)
    await state.close()
    assert not pool.open
    assert len(pool.closed) == 10
    with pytest.raises(ManagerClosed):
        await connection(state, "any", pool)


async def test_a_request_under_way_keeps_what_it_uses(state: StateManager) -> None:
    pool, sid = Pool(), await state.create_session()
    async with state.request(sid):
        made = await connection(state, sid, pool)
        await state.spill_session(sid)
        await loop_steps(5)
        assert made.is_open
    await all_closed(state)  # the last request has ended, and the session is not in memory
    assert not made.is_open


async def test_whoever_waits_gets_a_resource_however_often_its_session_leaves_memory(
    state: StateManager,
) -> None:
    pool, sid = Pool(), await state.create_session()

    async def connect() -> Connection:
        await state.spill_session(sid)
        await loop_steps(5)
        return await pool.connect()

    async with asyncio.timeout(20):
        made = await state.resources(sid, "db", connect, Connection.aclose)
    assert len(pool.made) == 1
    assert made.is_open
    await state.spill_session(sid)  # it was brought back
    await all_closed(state)
    assert not made.is_open


async def test_what_nobody_waits_for_any_more_is_closed_where_its_session_has_left(
    state: StateManager,
) -> None:
    pool, sid, goes_on = Pool(), await state.create_session(), asyncio.Event()

    async def connect() -> Connection:
        await goes_on.wait()
        return await pool.connect()

    waiting = asyncio.create_task(state.resources(sid, "db", connect, Connection.aclose))
    await loop_steps(5)
    await state.spill_session(sid)
    waiting.cancel()
    with pytest.raises((OSError, asyncio.CancelledError)):
        await waiting
    goes_on.set()
    await eventually(lambda: pool.closed == [0])


@pytest.mark.parametrize("ends", ["fails", "cancelled"])
async def test_a_session_that_left_while_one_resource_was_not_made_has_the_others_closed(
    state: StateManager, ends: str
) -> None:
    pool, sid, goes_on = Pool(), await state.create_session(), asyncio.Event()
    await connection(state, sid, pool)

    async def fail() -> None:
        await goes_on.wait()
        raise OSError("no")

    waiting = asyncio.create_task(state.resources(sid, "page", fail))
    await loop_steps(5)
    await state.spill_session(sid)  # it keeps its resources: somebody waits for one
    assert pool.open
    if ends == "cancelled":
        waiting.cancel()
    else:
        goes_on.set()
    with pytest.raises((OSError, asyncio.CancelledError)):
        await waiting
    goes_on.set()
    await eventually(lambda: pool.closed == [0])


async def test_what_is_made_as_its_asker_gives_up_is_closed_where_its_session_has_left(
    state: StateManager,
) -> None:
    pool, sid = Pool(), await state.create_session()

    async def connect() -> Connection:
        await state.spill_session(sid)
        # When it has been made, and before who asked runs again.
        making = asyncio.current_task()
        assert making is not None
        making.add_done_callback(lambda _: waiting.cancel())
        return await pool.connect()

    waiting = asyncio.create_task(state.resources(sid, "db", connect, Connection.aclose))
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    await eventually(lambda: pool.closed == [0])


async def test_a_request_that_ends_leaves_the_resources_of_a_resident_session(
    state: StateManager,
) -> None:
    pool, sid = Pool(), await state.create_session()
    async with state.request(sid):
        made = await connection(state, sid, pool)
    await loop_steps(5)
    assert made.is_open


async def test_a_close_that_raises_harms_nobody_else(
    state: StateManager, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Any) -> None:
        raise ValueError("already gone")

    pool, sid = Pool(), await state.create_session()
    await state.resources(sid, "bad", object, fail)
    await connection(state, sid, pool)
    assert await state.terminate_session(sid)
    await all_closed(state)
    assert not pool.open
    assert "closing resource 'bad'" in caplog.text
    assert "already gone" in caplog.text
    assert resources_of(state).failed_closes == 1


@pytest.mark.parametrize("hears", [True, False], ids=["cancellable", "deaf to cancellation"])
async def test_a_close_that_hangs_is_given_up(
    state: StateManager, caplog: pytest.LogCaptureFixture, *, hears: bool
) -> None:
    let_go = asyncio.Event()

    async def hang(_: Any) -> None:
        try:
            await let_go.wait()
        except asyncio.CancelledError:
            if hears:
                raise
            await let_go.wait()

    resources_of(state)._timeout_seconds = 0.02
    pool, sid = Pool(), await state.create_session()
    other = await state.create_session()
    await state.resources(sid, "slow", object, hang)
    await connection(state, other, pool)
    await state.terminate_session(sid)
    await state.terminate_session(other)
    await state.close()
    assert not pool.open
    assert "closing resource 'slow'" in caplog.text
    assert "given up" in caplog.text
    let_go.set()
    await loop_steps(3)


async def test_the_next_one_is_made_only_after_the_last_one_is_closed(
    state: StateManager,
) -> None:
    events: list[str] = []
    may_close = asyncio.Event()

    def make() -> object:
        events.append("made")
        return object()

    async def close(_: Any) -> None:
        await may_close.wait()
        events.append("closed")

    sid = await state.create_session()
    await state.resources(sid, "lock", make, close)
    await state.spill_session(sid)
    again = asyncio.create_task(state.resources(sid, "lock", make, close))
    await loop_steps(10)
    assert not again.done()
    may_close.set()
    await again
    assert events == ["made", "closed", "made"]


async def test_a_factory_that_fails_fails_for_all_and_is_tried_again(state: StateManager) -> None:
    sid = await state.create_session()
    calls: list[int] = []

    async def connect() -> str:
        calls.append(1)
        await asyncio.sleep(0)
        if len(calls) == 1:
            raise OSError("refused")
        return "connected"

    found = await asyncio.gather(
        *(state.resources(sid, "db", connect) for _ in range(3)), return_exceptions=True
    )
    assert [str(each) for each in found] == ["refused"] * 3
    assert (await state.stats()).resources == 0
    assert await state.resources(sid, "db", connect) == "connected"


async def test_whoever_is_cancelled_while_it_is_made_leaves_it_to_the_others(
    state: StateManager,
) -> None:
    pool, sid = Pool(), await state.create_session()
    may_connect = asyncio.Event()

    async def connect() -> Connection:
        await may_connect.wait()
        return pool.connect_now()

    first, second = (
        asyncio.create_task(state.resources(sid, "db", connect, Connection.close)) for _ in range(2)
    )
    await loop_steps(5)
    first.cancel()
    await asyncio.wait([first])
    may_connect.set()
    assert (await second).is_open
    await state.close()
    assert not pool.open


async def test_what_is_made_for_a_session_that_ended_meanwhile_is_closed(
    state: StateManager,
) -> None:
    pool, sid = Pool(), await state.create_session()
    may_connect = asyncio.Event()

    async def connect() -> Connection:
        await may_connect.wait()
        return pool.connect_now()

    asking = asyncio.create_task(state.resources(sid, "db", connect, Connection.close))
    await loop_steps(5)
    await state.terminate_session(sid)
    may_connect.set()
    with pytest.raises(SessionNotFound):
        await asking
    await all_closed(state)
    assert len(pool.made) == 1
    assert not pool.open


async def hang() -> None:
    await asyncio.Event().wait()


async def test_whoever_asks_is_told_at_once_of_a_session_that_ends_while_a_factory_hangs(
    state: StateManager,
) -> None:
    resources_of(state)._timeout_seconds = 0.02  # for the close of the manager
    sid = await state.create_session()
    asking = [asyncio.create_task(state.resources(sid, "db", hang)) for _ in range(3)]
    await loop_steps(5)
    await state.terminate_session(sid)
    found = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(each) for each in found] == [SessionNotFound] * 3
    assert resources_of(state).has_any, "the factory is still running"


async def test_whoever_asks_is_told_at_once_of_a_manager_that_closes_while_a_factory_hangs(
    start: Start,
) -> None:
    state = await start()
    resources_of(state)._timeout_seconds = 0.02
    sid = await state.create_session()
    asking = asyncio.create_task(state.resources(sid, "db", hang))
    await loop_steps(5)
    closing = asyncio.create_task(state.close())
    with pytest.raises(ManagerClosed):
        await asking
    await closing


async def test_a_factory_that_is_cancelled_says_so_and_is_tried_again(state: StateManager) -> None:
    sid = await state.create_session()

    async def connect() -> None:
        inner = asyncio.create_task(hang())
        await loop_steps(1)
        inner.cancel()
        await inner

    with pytest.raises(InvalidArgument, match=r"'db' of session .* cancellation"):
        await state.resources(sid, "db", connect)
    assert await state.resources(sid, "db", lambda: "connected") == "connected"


async def test_a_factory_that_asks_for_its_own_resource_is_refused(state: StateManager) -> None:
    sid = await state.create_session()

    async def connect() -> Any:
        async with asyncio.timeout(5):
            return await asyncio.gather(state.resources(sid, "db", connect))

    with pytest.raises(ConflictError, match=r"'db' of session .* the factory of 'db' asks for it"):
        await state.resources(sid, "db", connect)
    assert (await state.stats()).resources == 0


async def test_a_close_that_asks_for_what_it_closes_is_refused(state: StateManager) -> None:
    sid = await state.create_session()
    refused: list[ConflictError] = []

    async def close(_: object) -> None:
        try:
            async with asyncio.timeout(5):
                await asyncio.gather(state.resources(sid, "db", object))
        except ConflictError as error:
            refused.append(error)

    first = await state.resources(sid, "db", object, close)
    await state.spill_session(sid)
    assert await state.resources(sid, "db", object) is not first
    [error] = refused
    assert f"'db' of session '{sid}' is being closed by whoever asks for it" in str(error)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="needs asyncio.eager_task_factory")
async def test_so_it_is_where_the_event_loop_begins_tasks_at_once(state: StateManager) -> None:
    asyncio.get_running_loop().set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009
    await test_a_factory_that_asks_for_its_own_resource_is_refused(state)


async def test_factories_that_wait_for_each_other_are_refused(state: StateManager) -> None:
    sid = await state.create_session()
    have_begun = asyncio.Barrier(2)

    async def make(other: str) -> Any:
        async with asyncio.timeout(5):
            await have_begun.wait()
            return await state.resources(sid, other, hang)

    found = await asyncio.gather(
        state.resources(sid, "a", lambda: make("b")),
        state.resources(sid, "b", lambda: make("a")),
        return_exceptions=True,
    )
    assert [type(each) for each in found] == [ConflictError] * 2


async def test_a_factory_may_ask_for_another_resource(state: StateManager) -> None:
    sid = await state.create_session()

    async def page() -> list[str]:
        return [await state.resources(sid, "browser", lambda: "browser"), "page"]

    both = [state.resources(sid, "page", page), state.resources(sid, "browser", lambda: "browser")]
    assert await asyncio.gather(*both) == [["browser", "page"], "browser"]


async def test_a_task_that_a_factory_leaves_behind_may_ask_for_its_resource(
    state: StateManager,
) -> None:
    sid = await state.create_session()
    left: list[asyncio.Task[Any]] = []

    async def reconnect() -> Any:
        await loop_steps(10)
        return await state.resources(sid, "db", hang)

    def connect() -> str:
        left.append(asyncio.create_task(reconnect()))
        return "connected"

    assert await state.resources(sid, "db", connect) == "connected"
    assert await left[0] == "connected"


async def test_a_factory_that_writes_to_a_session_whose_edit_its_caller_holds_is_refused(
    state: StateManager,
) -> None:
    sid = await state.create_session()

    async def count() -> None:
        async with asyncio.timeout(5):
            await state.update_session_data(sid, "n", 1)

    async def count_in_another() -> None:
        await state.resources(sid, "inner", count)

    for factory in (count, count_in_another):
        async with state.edit(sid):
            with pytest.raises(ConflictError, match="resource"):
                await state.resources(sid, "counter", factory)
    await state.resources(sid, "counter", count)


async def test_a_factory_waits_for_the_edit_of_somebody_who_does_not_wait_for_it(
    state: StateManager,
) -> None:
    sid = await state.create_session()

    async def count() -> str:
        await state.update_session_data(sid, "n", 1)
        return "counted"

    async with state.edit(sid) as draft:
        asking = asyncio.create_task(state.resources(sid, "counter", count))
        await loop_steps(10)
        assert not asking.done()
        draft["m"] = 1
    assert await asking == "counted"


async def test_another_session_of_the_same_id_gets_its_own(state: StateManager) -> None:
    pool = Pool()
    await state.create_session(session_id="s")
    first = await connection(state, "s", pool)
    await state.terminate_session("s")
    await state.create_session(session_id="s")
    second = await connection(state, "s", pool)
    assert second is not first
    await eventually(lambda: not first.is_open)
    assert second.is_open


async def test_a_restored_checkpoint_begins_without_resources(state: StateManager) -> None:
    pool, sid = Pool(), await state.create_session()
    first = await connection(state, sid, pool)
    await state.create_checkpoint()
    await state.restore_checkpoint()
    await eventually(lambda: not first.is_open)
    assert (await connection(state, sid, pool)).is_open


async def test_without_resources_nobody_looks_at_who_leaves_memory(state: StateManager) -> None:
    sid = await state.create_session()
    assert residency_of(state).on_leave is None
    await state.resources(sid, "cache", dict)
    assert residency_of(state).on_leave is not None
    await state.terminate_session(sid)
    assert residency_of(state).on_leave is None


@pytest.mark.parametrize(
    "arguments", [(5, dict), ("name", "no function"), ("name", dict, "no function")]
)
async def test_wrong_arguments_are_named(state: StateManager, arguments: Any) -> None:
    sid = await state.create_session()
    with pytest.raises(InvalidArgument, match=r"name|factory|close"):
        await state.resources(sid, *arguments)
