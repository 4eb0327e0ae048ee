"""An event loop whose time is simulated: nothing waits, and a seed has one outcome.

Where a real loop would sleep until the next timer, this one sets its clock to that timer. There
are no files, sockets or threads in it. A loop with nothing left to wait for is a program that
hangs, and one whose time stands still is a program that spins: both are failures.
"""

from __future__ import annotations

import asyncio
from asyncio import base_events
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any, Final, TypeVar

T = TypeVar("T")

_MOST_TURNS: Final = 100_000


class Stuck(AssertionError):
    """What runs on the loop hangs, or never lets time pass."""


class Life:
    """A process, as far as the loop knows it: the tasks that were begun in its name.

    Attributes:
        tasks: those tasks.
        is_over: it is dead.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_over = False
        self.tasks: list[asyncio.Task[Any]] = []

    def running(self) -> list[asyncio.Task[Any]]:
        """Return the tasks that have not ended, in the order in which they began."""
        self.tasks = [task for task in self.tasks if not task.done()]
        return self.tasks


LIFE: Final[ContextVar[Life | None]] = ContextVar("LIFE", default=None)
"""In whose name something is done: it is inherited by the tasks that it begins."""


class _Selector:
    """Waits for nothing but time."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self._loop = loop
        self._turns = 0

    def select(self, timeout: float | None) -> list[Any]:
        """Let `timeout` seconds pass, at once."""
        if timeout is None:
            raise Stuck("nothing is left to wait for: it hangs")
        if timeout <= 0:
            self._turns += 1
            if self._turns > _MOST_TURNS:
                raise Stuck(f"{_MOST_TURNS} turns of the loop, and no time has passed: it spins")
        else:
            self._turns = 0
            self._loop.now += timeout
        return []

    def close(self) -> None:
        """Nothing to close."""


class SimulatedLoop(base_events.BaseEventLoop):
    """See the module.

    Attributes:
        now: process time, seconds.
        complaints: what nobody was told: errors of tasks and futures that were never looked at.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.complaints: list[str] = []
        self._selector = _Selector(self)
        self.set_task_factory(_begin)  # type: ignore[arg-type]  # it takes what tasks take
        self.set_exception_handler(self._complain)

    def time(self) -> float:
        """Return process time, seconds."""
        return self.now

    def _process_events(self, event_list: list[Any]) -> None:
        del event_list

    def _write_to_self(self) -> None:
        """Nobody sleeps, so nobody has to be woken."""

    def run_in_executor(  # type: ignore[override]  # of what is run here nothing is awaited twice
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Run `func` at once."""
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - handed on
            done.set_exception(error)
        return done

    def _complain(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "was destroyed" in context["message"]:
            return  # of a process that was killed; what a close leaves behind is looked for there
        error = context.get("exception")
        about = context.get("task") or context.get("future")
        self.complaints.append(f"{context['message']}: {error!r} {about!r}")


def _begin(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any
) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
    life = LIFE.get()
    if life is not None:
        life.tasks.append(task)
        if life.is_over:
            task.cancel()  # what a dead process would begin
    return task


def run(main: Callable[[SimulatedLoop], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine on a loop of its own.

    Raises:
        Stuck: it hangs or spins.
    """
    loop = SimulatedLoop()
    try:
        return loop.run_until_complete(main(loop))
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        for _ in range(20):
            if not asyncio.all_tasks(loop):
                break
            loop.run_until_complete(asyncio.sleep(0))
        loop.close()


class SimulatedClock:
    """The clock of one machine on a simulated loop.

    Args:
        loop: whose time it shows.
        wall_seconds: Unix time when the loop's time is 0.
    """

    def __init__(self, loop: SimulatedLoop, wall_seconds: float = 1_700_000_000.0) -> None:
        self._loop = loop
        self._wall = wall_seconds

    def wall(self) -> float:
        """Return the wall time, Unix seconds."""
        return self._wall + self._loop.now

    def monotonic(self) -> float:
        """Return the process time, seconds."""
        return self._loop.now

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward, or back."""
        self._wall += seconds
