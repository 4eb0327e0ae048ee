"""Operations in which the n-th allocation of memory fails, for every n.

CPython has a hook for that, made for its own tests. Each attempt is a process of its own, with a
disk in memory and without threads, so that the n-th allocation is the same one each time. What an
operation may come to is in `Ending`; afterwards the process is as good as killed, and what is on
its disk must be the state before the operation or the one behind it.

`asyncio` itself does not survive every failure: its loop may end with the error, and a task may
never be woken, because the call that would do it found no memory. Nobody can mend that from
outside, so it counts as a crash: the caller hears nothing, and the disk is whole.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import importlib.util
import json
import os
from collections.abc import Awaitable, Callable
from enum import StrEnum
from functools import cache
from typing import Any, Final

from persistence import ManualClock, SessionDraft, StateManager, errors
from tests.disk.memoryfiles import MemoryFiles
from tests.faults.simulation import stepped
from tests.support import config, opened

_TURNS: Final = 300
"""Of the event loop. Nothing waits for a thread or a device, so what has not ended then, hangs."""
_IDLE_SECONDS: Final = 1.0
_SECONDS: Final = 20
"""An attempt takes a fiftieth of a second; one that takes so long, hangs without a turn."""
_DATA: Final = {"n": 1, "filler": "x" * 30}
_SESSIONS: Final = ("resident", "cold", "new")
_SURE: Final = 40
"""So many attempts in a row without a failure: the operation has fewer allocations than that."""


class Ending(StrEnum):
    """What became of an operation."""

    DONE = "done"  # as if nothing had failed: it is on the disk, and the engine goes on
    REFUSED = "refused"  # MemoryError: whole or not at all, and the engine goes on
    STOPPED = "done, then stopped"  # it is on the disk; nothing more is taken
    UNKNOWN = "outcome unknown"  # as after a failed sync: nothing more is taken
    LOOP_DIED = "the event loop ended"
    NOT_WOKEN = "a task was not woken"


class Wrong(AssertionError):
    """An operation came to something else."""


def _bump(draft: SessionDraft) -> None:
    draft["n"] += 1


async def _create(state: StateManager) -> None:
    await state.create_session(session_id="new", data=_DATA)


async def _update(state: StateManager) -> None:
    await state.update_session("resident", _bump)


async def _update_cold(state: StateManager) -> None:
    await state.update_session("cold", _bump)


async def _replace(state: StateManager) -> None:
    await state.replace_session("resident", {"other": [1, 2, 3]})


async def _edit(state: StateManager) -> None:
    async with state.edit("resident") as draft:
        draft["more"] = {"a": 1}


async def _read_cold(state: StateManager) -> None:
    session = await state.get_session("cold")
    assert session is not None
    assert session.data == _DATA


async def _spill(state: StateManager) -> None:
    await state.spill_session("resident")


async def _terminate(state: StateManager) -> None:
    await state.terminate_session("resident")


OPERATIONS: Final[dict[str, Callable[[StateManager], Awaitable[None]]]] = {
    "create": _create,
    "update": _update,
    "update cold": _update_cold,
    "replace": _replace,
    "edit": _edit,
    "read cold": _read_cold,
    "spill": _spill,
    "terminate": _terminate,
}


def _is_not_woken(state: StateManager) -> bool:
    """Whether asyncio found no memory to let a task go on that can."""
    idle = [each for each in asyncio.all_tasks() if each is not asyncio.current_task()]
    waiting = [getattr(each, "_fut_waiter", None) for each in idle]
    if any(future is None or future.done() for future in waiting):
        return True
    work = state._commits._work
    return work.is_set() and any(not each.done() for each in work._waiters)


async def _take_turns(task: asyncio.Future[Any]) -> None:
    for _ in range(_TURNS):
        if task.done():
            break
        await asyncio.sleep(0)


def is_here() -> bool:
    """Whether this Python has the hook."""
    return importlib.util.find_spec("_testcapi") is not None


async def _contents(state: StateManager) -> dict[str, Any]:
    found = {name: await state.get_session(name) for name in _SESSIONS}
    return {name: None if session is None else session.data for name, session in found.items()}


async def _prepare(state: StateManager) -> None:
    for name in ("resident", "cold"):
        await state.create_session(session_id=name, data=_DATA)
    await state.spill_session("cold")


@cache
def before_and_after(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the disk has before and after an operation when nothing fails."""

    async def without_failure() -> tuple[dict[str, Any], dict[str, Any]]:
        async with opened(MemoryFiles()) as state:
            await _prepare(state)
            before = await _contents(state)
            await OPERATIONS[name](state)
            return before, await _contents(state)

    with stepped():
        return asyncio.run(without_failure())


class _Attempt:
    """One operation on a new engine; runs in a process of its own.

    Args:
        name: one of `OPERATIONS`.
        nth: which allocation fails; 0: none.
    """

    def __init__(self, name: str, nth: int) -> None:
        self._operation = OPERATIONS[name]
        self._nth = nth
        self._files = MemoryFiles()
        self._lost_callback = False
        self._before, self._after = before_and_after(name)

    def run(self) -> Ending:
        """Return what became of it.

        Raises:
            Wrong: something else than is allowed.
        """
        with stepped():
            # Not `asyncio.run`, which would wait for a task that nobody wakes. What is left over
            # ends with the process.
            loop = asyncio.new_event_loop()
            attempted = loop.create_task(self._attempt())
            loop.call_later(_IDLE_SECONDS, loop.stop)
            try:
                loop.run_until_complete(attempted)
            except MemoryError:
                ending = Ending.LOOP_DIED
            except RuntimeError:  # stopped by its timer: this very attempt is not woken any more
                ending = Ending.NOT_WOKEN
            else:
                ending = attempted.result()
            return asyncio.run(self._judge(ending))

    async def _attempt(self) -> Ending:
        state = StateManager(config=config(), clock=ManualClock(), files=self._files)
        await state.open()
        await _prepare(state)
        asyncio.get_running_loop().set_exception_handler(self._note)
        task = asyncio.ensure_future(self._operation(state))
        gc.disable()
        hook = importlib.import_module("_testcapi")
        if self._nth:
            hook.set_nomemory(self._nth, self._nth + 1)
        try:
            await _take_turns(task)
        finally:
            hook.remove_mem_hooks()
        return await self._ending(state, task)

    def _note(self, _: object, context: dict[str, Any]) -> None:
        """Note whether asyncio had no memory to call somebody back."""
        self._lost_callback |= "Exception in callback" in context["message"]

    async def _ending(self, state: StateManager, task: asyncio.Future[None]) -> Ending:
        error = task.exception() if task.done() else None
        # The next operation tells whether the engine goes on.
        later = asyncio.ensure_future(state.create_session(session_id="later", data=_DATA))
        await _take_turns(later)
        if not (task.done() and later.done()):
            # The callback may be the one that tells of a commit which is written alone.
            is_lost = self._lost_callback and state._commits._alone is not None
            if is_lost or _is_not_woken(state):
                return Ending.NOT_WOKEN
            raise Wrong(f"it hangs, though each task waits for something: {task!r}, {later!r}")
        is_unknown = isinstance(later.exception(), errors.WriteOutcomeUnknown)
        if isinstance(error, errors.WriteOutcomeUnknown) or (error is None and is_unknown):
            if not is_unknown:
                raise Wrong("something is written although the outcome of a write is unknown")
            return Ending.UNKNOWN if error is not None else Ending.STOPPED
        for each in (error, later.exception()):
            if each is not None and not isinstance(each, MemoryError):
                raise Wrong(f"{each!r} is no answer to a lack of memory") from each
        return Ending.DONE if error is None else Ending.REFUSED

    async def _judge(self, ending: Ending) -> Ending:
        """Look at the disk as whoever opens it after a kill."""
        async with opened(self._files.after_kill()) as state:
            found = await _contents(state)
            goes_on = ending in {Ending.DONE, Ending.REFUSED}
            if goes_on and await state.get_session("later") is None:
                raise Wrong(f"{ending}, and what was acknowledged later is lost")
        is_done = ending in {Ending.DONE, Ending.STOPPED}
        allowed = [self._after] if is_done else [self._before, self._after]
        if found not in allowed:
            raise Wrong(f"{ending}, and the disk has {found}")
        return ending


def attempt(name: str, nth: int) -> Ending:
    """Let the n-th allocation of an operation fail, in a process of its own.

    Raises:
        Wrong: it came to something that is not allowed.
    """
    before_and_after(name)  # once for all attempts: they inherit it
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        answer: list[str]
        faulthandler.dump_traceback_later(_SECONDS, exit=True)
        try:
            answer = ["ended", _Attempt(name, nth).run()]
        except BaseException as error:  # noqa: BLE001 - told to the parent
            answer = ["wrong", f"{type(error).__name__}: {error}"]
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    kind, what = json.loads(told) if told else ("wrong", "the process died")
    if kind == "wrong":
        raise Wrong(f"{name}, allocation {nth}: {what}")
    return Ending(what)


def attempts(name: str, step: slice, goes_on: Callable[[], bool]) -> list[Ending]:
    """Let the allocations of an operation fail, one in each attempt, until there are no more.

    Raises:
        Wrong: see `attempt`.
    """
    endings: list[Ending] = []
    nth, in_a_row = 1 + (step.start or 0), 0
    while in_a_row * (step.step or 1) < _SURE and goes_on():
        endings.append(attempt(name, nth))
        in_a_row = in_a_row + 1 if endings[-1] is Ending.DONE else 0
        nth += step.step or 1
    return endings
