"""Every public method, cancelled at every one of its suspensions.

In the simulated world a call takes the same steps each time, so the n-th suspension can be named,
for every n until there are no more. Afterwards nothing is stuck, and what the call was to do has
happened whole or not at all; a killed process says the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any

import pytest

from persistence import StateManager, errors
from tests.faults.simloop import LIFE, Life, SimulatedLoop, run
from tests.faults.simworld import World

Call = Callable[[StateManager, str], Coroutine[Any, Any, Any]]
OLD = {"x": 1, "log": [1]}
NEW = {"x": 2, "log": [1, 2]}
MOST = 200


async def _edit(state: StateManager, sid: str) -> None:
    async with state.edit(sid) as draft:
        draft["log"].append(2)
        await asyncio.sleep(0.001)
        draft["x"] = 2


async def _iterate(state: StateManager, sid: str) -> list[str]:
    return [name async for name in state.iter_sessions(prefix=sid)]


async def _keep_and_delete(state: StateManager, sid: str) -> None:
    del sid
    info = await state.create_checkpoint()
    await state.delete_checkpoint(info.id)


CHANGES: dict[str, tuple[Call, Any]] = {
    "create_session": (lambda s, sid: s.create_session(session_id=f"{sid} new", data=NEW), NEW),
    "get_or_create_session": (lambda s, sid: s.get_or_create_session(f"{sid} new", data=NEW), NEW),
    "update_session_data": (lambda s, sid: s.update_session_data(sid, "x", 2), {**OLD, "x": 2}),
    "update_session": (lambda s, sid: s.update_session(sid, lambda d: d.update(NEW)), NEW),
    "replace_session": (lambda s, sid: s.replace_session(sid, NEW), NEW),
    "update_session_metadata": (lambda s, sid: s.update_session_metadata(sid, source="x"), OLD),
    "edit": (_edit, NEW),
    "set_ttl": (lambda s, sid: s.set_ttl(sid, 5000.0), OLD),
    "terminate_session": (lambda s, sid: s.terminate_session(sid), None),
}
OTHERS: dict[str, Call] = {
    "get_session": lambda s, sid: s.get_session(sid),
    "get_session fresh": lambda s, sid: s.get_session(sid, fresh=True),
    "get_session without renewal": lambda s, sid: s.get_session(sid, renew=False),
    "has_session": lambda s, sid: s.has_session(sid),
    "get_active_sessions": lambda s, _: s.get_active_sessions(),
    "iter_sessions": _iterate,
    "find_sessions": lambda s, sid: s.find_sessions(user_id=sid),
    "spill_session": lambda s, sid: s.spill_session(sid),
    "restore_session": lambda s, sid: s.restore_session(sid),
    "flush": lambda s, _: s.flush(),
    "compact": lambda s, _: s.compact(),
    "stats": lambda s, _: s.stats(),
    "cleanup_expired": lambda s, _: s.cleanup_expired(),
    "cleanup_old_sessions": lambda s, _: s.cleanup_old_sessions(1e6),
    "create_checkpoint": lambda s, _: s.create_checkpoint(),
    "list_checkpoints": lambda s, _: s.list_checkpoints(),
    "delete_checkpoint": _keep_and_delete,
    "restore_checkpoint": lambda s, _: s.restore_checkpoint(),
}


class CancelledAt:
    """Awaits a coroutine, and cancels its own task at the n-th suspension.

    Attributes:
        suspensions: how many there were.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any], nth: int) -> None:
        self.suspensions = 0
        self._coroutine = coroutine
        self._nth = nth

    def __await__(self) -> Generator[Any, Any, Any]:
        error: BaseException | None = None
        value = None
        while True:
            try:
                waits_for = (
                    self._coroutine.send(value) if error is None else self._coroutine.throw(error)
                )
            except StopIteration as end:
                return end.value
            error = None
            self.suspensions += 1
            if self.suspensions == self._nth:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            try:
                value = yield waits_for
            except BaseException as thrown:  # noqa: BLE001 - passed on, as the task would
                error = thrown


async def cancelled_at(call: Coroutine[Any, Any, Any], nth: int) -> tuple[Any, int]:
    """Return what a call ends with, and how often it was suspended."""
    at = CancelledAt(call, nth)

    async def main() -> Any:
        return await at

    task = asyncio.create_task(main())
    await asyncio.wait([task], timeout=60)
    assert task.done(), "it hangs"
    if task.cancelled():
        return asyncio.CancelledError(), at.suspensions
    return task.exception() or task.result(), at.suspensions


async def data_of(state: StateManager, sid: str) -> Any:
    session = await state.get_session(sid)
    return None if session is None else session.data


async def assert_nothing_is_stuck(state: StateManager) -> None:
    async with asyncio.timeout(60):
        await state.flush()
    assert state._commits.tails == {}
    assert state._commits.pending_bytes == 0
    assert len(state._updates.locks) == 0
    assert not state._residency._reading
    state._memory.check()


def in_world(kind: str, main: Callable[[World], Awaitable[None]]) -> None:
    """Run `main` in a simulated world with one worker that is open."""

    async def begin(loop: SimulatedLoop) -> None:
        world = World(1, loop, kind)
        world._budget_bytes = world._queue_bytes = 2**20
        del world.workers[1:]
        with world.patched():
            [worker] = world.workers
            assert await worker.open()
            LIFE.set(worker.life)
            await main(world)
            LIFE.set(None)
            await worker.kill()
            world.check_complaints()

    run(begin)


KINDS = ("alone", "through fail")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_cancelled_at_any_suspension_happens_whole_or_not_at_all(
    name: str, kind: str
) -> None:
    call, after = CHANGES[name]
    results: list[Any] = []

    async def main(world: World) -> None:
        [worker] = world.workers
        state = worker.state
        expected: dict[str, Any] = {}
        for nth in range(1, MOST):
            sid = f"s{nth}"
            await state.create_session(session_id=sid, data=OLD, ttl_seconds=0)
            if nth % 2:
                await state.spill_session(sid)
            result, suspensions = await cancelled_at(call(state, sid), nth)
            assert isinstance(result, asyncio.CancelledError) or not isinstance(
                result, BaseException
            ), result
            await assert_nothing_is_stuck(state)
            target, before = (f"{sid} new", None) if "create" in name else (sid, OLD)
            now = await data_of(state, target)
            assert now in (before, after)
            if not isinstance(result, BaseException):
                assert now == after
            results.append(now == after)
            expected |= {sid: await data_of(state, sid), target: now}
            if suspensions < nth:
                break
        else:
            raise AssertionError("it never ends")
        await worker.kill()
        assert await worker.open()
        for sid, data in expected.items():
            assert await data_of(worker.state, sid) == data

    in_world(kind, main)
    assert len(results) > 1, "it was cancelled at least once"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OTHERS)
def test_what_changes_nothing_changes_nothing_when_it_is_cancelled_at_any_suspension(
    name: str, kind: str
) -> None:
    async def main(world: World) -> None:
        [worker] = world.workers
        state = worker.state
        for number in range(3):
            await state.create_session("u", session_id=f"s{number}", data=OLD, ttl_seconds=0)
        await state.create_checkpoint()
        for nth in range(1, MOST):
            for number in range(3):
                await state.spill_session(f"s{number}")
            result, suspensions = await cancelled_at(OTHERS[name](state, "s1"), nth)
            ends = (asyncio.CancelledError, errors.CheckpointNotFound)
            assert isinstance(result, ends) or not isinstance(result, BaseException), result
            await assert_nothing_is_stuck(state)
            for number in range(3):
                assert await data_of(state, f"s{number}") == OLD
            if suspensions < nth:
                break
        else:
            raise AssertionError("it never ends")
        await worker.kill()
        assert await worker.open()
        assert sorted(await worker.state.get_active_sessions()) == ["s0", "s1", "s2"]

    in_world(kind, main)


@pytest.mark.parametrize("kind", KINDS)
def test_an_opening_cancelled_at_any_suspension_leaves_the_directory_to_the_next_one(
    kind: str,
) -> None:
    async def main(world: World) -> None:
        [worker] = world.workers
        await worker.state.create_session(session_id="s", data=OLD, ttl_seconds=0)
        await worker.close()
        for nth in range(1, MOST):
            LIFE.set(Life("other"))
            state = StateManager(config=world.config("w0"), clock=worker.clock, files=worker.files)
            result, suspensions = await cancelled_at(state.open(), nth)
            if not isinstance(result, BaseException):
                assert await data_of(state, "s") == OLD
                await state.close()
            assert worker.files.open_files == []
            if suspensions < nth:
                break
        assert await worker.open()
        assert await data_of(worker.state, "s") == OLD

    in_world(kind, main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closing_whose_caller_is_cancelled_at_any_suspension_ends_all_the_same(
    kind: str,
) -> None:
    async def main(world: World) -> None:
        [worker] = world.workers
        for nth in range(1, 6):
            await worker.state.create_session(session_id=f"s{nth}", data=OLD, ttl_seconds=0)
            await cancelled_at(worker.state.close(), nth)
            await worker.close()  # waits for the same end; nothing is left open
            assert await worker.open()
            LIFE.set(worker.life)
            for number in range(1, nth + 1):
                assert await data_of(worker.state, f"s{number}") == OLD

    in_world(kind, main)
