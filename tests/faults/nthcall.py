"""A run of 500 operations in which the n-th call on the disk fails, for every n.

The run includes rotations, merges, checkpoints, restores, kills with their recoveries, and clean
closes. A call fails with an errno, or takes only a part of what it was given; once, or every call
of that kind from then on, or every call of any kind.

`check` makes a run for one failure. `explore` does the same for many: at each call copies of the
process (`os.fork`) go on, one after the other, each with one of the failures of that call, while
the process itself waits, and then goes on without any. So what is before a failure is done once.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Final, NamedTuple, NoReturn
from unittest.mock import patch
from weakref import WeakSet

from tests.disk.memoryfiles import Call, Fault, MemoryFiles, fail
from tests.faults.simulation import stepped
from tests.faults.world import World, check_checkpoints, check_image

OPERATIONS: Final = 500
_SESSIONS: Final = tuple(f"s{number}" for number in range(10))
_OF_A_SESSION: Final = {
    "create": 5,
    "update": 10,
    "replace": 4,
    "edit": 3,
    "terminate": 2,
    "ttl": 1,
    "read": 3,
    "spill": 3,
    "restore": 1,
}
_OTHERS: Final = {
    "burst": 1.5,
    "rotate": 0.5,
    "flush": 0.7,
    "list": 0.4,
    "clean": 0.3,
    "expire": 0.5,
    "compact": 0.4,
    "checkpoint": 0.3,
    "crash": 0.25,
    "reopen": 0.2,
    "goback": 0.1,
}
WEIGHTS: Final = {**_OF_A_SESSION, **_OTHERS}

ERRNOS: Final = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR, errno.EMFILE)
SHORT: Final = 0
"""In the place of an errno: the call takes or gives only a part."""
HOW_LONG: Final = ("once", "kind", "all")
_MODES: Final = {SHORT: 2, errno.EDQUOT: 1, errno.EINTR: 1}
"""How many of `HOW_LONG`. A call that is interrupted for ever is tried again for ever; a quota is
a full disk by another name."""
_OPENING: Final = (
    "create",
    "list_directory",
    "open_lock",
    "open_read",
    "open_write",
    "sync_directory",
)
"""The calls that need a new descriptor."""
_COUNTED: Final = ("write_at", "read_at", "read_cached")


class Failure(NamedTuple):
    """Which call fails, and how.

    Attributes:
        nth: counted from 1, over all calls of all lives.
        number: the errno, or `SHORT`.
        how_long: "once"; "kind": every call of that name from then on; "all": every call.
    """

    nth: int
    number: int
    how_long: str

    def __str__(self) -> str:
        name = errno.errorcode[self.number] if self.number else "short"
        return f"call {self.nth}: {name}, {self.how_long}"


def script(seed: int, operations: int = OPERATIONS) -> list[str]:
    """Return the steps of a run, each kind among them; the same for the same seed."""
    chance = Random(seed)
    others = operations - len(WEIGHTS)
    names = [*WEIGHTS, *chance.choices(list(WEIGHTS), list(WEIGHTS.values()), k=others)]
    chance.shuffle(names)
    return [
        f"{name} {chance.choice(_SESSIONS)}" if name in _OF_A_SESSION else name for name in names
    ]


class _Breaker:
    """The fault of a `Failure`, over all lives.

    Args:
        failure: which one.
        calls: how many calls there have been.

    Attributes:
        calls: how many calls there were.
        hit: the call that failed first.
    """

    def __init__(self, failure: Failure, calls: int = 0) -> None:
        self.failure = failure
        self._random = Random(failure.nth)
        self.calls = calls
        self.hit: Call | None = None

    def __call__(self, files: MemoryFiles, call: Call) -> int | None:
        self.calls += 1
        failure = self.failure
        if self.calls < failure.nth:
            return None
        if self.calls == failure.nth:
            self.hit = call
        elif not self._goes_on(call):
            return None
        if failure.number != SHORT:
            fail(failure.number, call.operation)(files, call)
        if call.operation in _COUNTED and call.size > 1:
            return self._random.randrange(1, call.size)
        return None

    def _goes_on(self, call: Call) -> bool:
        """Whether a call behind the first that failed fails too."""
        assert self.hit is not None
        how_long = self.failure.how_long
        return how_long == "all" or (how_long == "kind" and call.operation == self.hit.operation)


def count_calls(seed: int) -> list[str]:
    """Return the name of every call of a run in which nothing fails."""
    names: list[str] = []

    def note(_: MemoryFiles, call: Call) -> None:
        names.append(call.operation)

    asyncio.run(_run(seed, note))
    return names


async def _run(seed: int, fault: Fault) -> World:
    world = World(seed)
    world.has_failed = isinstance(fault, _Breaker)
    world.faults.append(fault)
    await world.run(script(seed))
    return world


def failures(calls: list[str]) -> Iterator[Failure]:
    """Return every failure of a run that makes these calls."""
    for nth, name in enumerate(calls, 1):
        for number in (*ERRNOS, SHORT):
            if number == SHORT and name not in _COUNTED:
                continue
            if number == errno.EMFILE and name not in _OPENING:
                continue
            for how_long in HOW_LONG[: _MODES.get(number, 3)]:
                yield Failure(nth, number, how_long)


def check(seed: int, failure: Failure) -> list[str]:
    """Run with a failure; assert that nothing is lost or wrong; return what callers were told."""
    with stepped():
        return asyncio.run(_check(seed, failure))


async def _check(seed: int, failure: Failure) -> list[str]:
    breaker = _Breaker(failure)
    return await _check_end(await _run(seed, breaker), breaker)


async def _check_end(world: World, breaker: _Breaker) -> list[str]:
    """Look at what a run with a failure has left."""
    assert breaker.hit is not None, "there is such a call"
    failure = breaker.failure
    world.faults.clear()
    world.has_failed = False
    await world.die()
    # Where no sync ever succeeds, a power loss brings back segments that were given up as soon as
    # they were made. Not each of them can be told from one whose content is lost.
    never_synced = failure.how_long != "once" and breaker.hit.operation.startswith("sync")
    scattered = world.files.after_power_loss(Random(failure.nth))
    await check_image(world, scattered, may_report_damage=never_synced)
    await check_image(world, world.files.after_power_loss())
    await check_checkpoints(world, world.files.after_kill())
    assert await world.open(), world.refusals
    await world.run(["update s0", "create s1", "compact", "checkpoint", "list", "reopen", "list"])
    return world.refusals


# --- many failures of one run ---------------------------------------------------------------------

Report = Callable[[Failure, str], bool]
"""Gets a failure and what went wrong, empty: nothing. Returns whether to go on."""


def explore(seed: int, failures: Iterable[Failure], report: Report) -> None:
    """Do what `check` does for each of `failures`, and report on each."""
    branches = _Branches(seed, failures, report)
    is_frozen = gc.get_freeze_count() > 0  # by a test run
    # A manager lets go of its files in the child of a fork. These are to work on there.
    with stepped(), patch("persistence.lifecycle._open_managers", _Nobody()):
        try:
            asyncio.run(_explore(seed, branches))
        finally:
            if not is_frozen:
                gc.unfreeze()


async def _explore(seed: int, branches: _Branches) -> None:
    loop = asyncio.get_running_loop()
    with patch.object(loop, "time", lambda: time.monotonic() - branches.waited_seconds):
        try:
            await branches.world.run(script(seed))
            branches.check_complete()
            if branches.breaker is not None:
                await _check_end(branches.world, branches.breaker)
        except BaseException:
            if branches.breaker is None:
                raise
            branches.leave(traceback.format_exc())
        if branches.breaker is not None:
            branches.leave("")


class _Nobody(WeakSet[object]):
    def add(self, item: object) -> None:
        """Do not take it in."""


class _Branches:
    """The fault of a run that has none; copies of its process have one each.

    Args:
        seed: of the run.
        failures: of all calls.
        report: told of each failure, in the process that goes on.

    Attributes:
        world: the one that runs.
        breaker: the fault, in a copy.
        waited_seconds: how long this process has waited for its copies.
    """

    def __init__(self, seed: int, failures: Iterable[Failure], report: Report) -> None:
        self._of: dict[int, list[Failure]] = defaultdict(list)
        for failure in failures:
            self._of[failure.nth].append(failure)
        self._report = report
        self._calls = 0
        self._goes_on = True
        self._told = -1
        self.breaker: _Breaker | None = None
        self.waited_seconds = 0.0
        self.world = World(seed)
        self.world.faults.append(self)

    def __call__(self, files: MemoryFiles, call: Call) -> int | None:
        if self.breaker is None:
            self._calls += 1
            for failure in self._of.pop(self._calls, ()):
                if self._goes_on and self._is_copy(failure):
                    break
        return None if self.breaker is None else self.breaker(files, call)

    def _is_copy(self, failure: Failure) -> bool:
        """Let a copy go on with a failure, and wait for its end; True: this is the copy."""
        loop = asyncio.get_running_loop()
        started = time.monotonic()
        told, tells = os.pipe()
        gc.freeze()  # else a collection in the copy writes to every page, and so copies it
        copy = os.fork()
        if not copy:
            os.close(told)
            asyncio._set_running_loop(loop)  # it knows its process by the number
            self._told = tells
            self.breaker = _Breaker(failure, self._calls - 1)
            self.world.has_failed = True
            return True
        os.close(tells)
        with os.fdopen(told, "rb") as pipe:
            text = pipe.read().decode()
        _, status = os.waitpid(copy, 0)
        self.waited_seconds += time.monotonic() - started
        self._goes_on = self._report(failure, text or (status and f"ended with {status}") or "")
        return False

    def check_complete(self) -> None:
        """Assert, in the process that goes on, that there was every call that was to fail."""
        if self.breaker is None and self._goes_on:
            assert not self._of, f"no such calls: {sorted(self._of)}"

    def leave(self, text: str) -> NoReturn:
        """End a copy. Nothing of its parent's is tidied up."""
        with os.fdopen(self._told, "wb") as pipe:
            pipe.write(text.encode())
        os._exit(0)
