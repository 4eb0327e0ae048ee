"""The engine's threads without threads and its random bytes without chance: a seed, one outcome.

`stepped` lets everything that the engine would do in its threads happen on the event loop: at once,
or, with a seed, some turns of the loop later, so that what runs beside it gets in between. Calls of
the writer stay in their order, and so do those of the syncer, which come between them anywhere;
others overtake each other as they would in several threads.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from random import Random
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

from persistence.disk.threads import Threads, Told

P = ParamSpec("P")
T = TypeVar("T")

_MOST_TURNS = 3


class SteppedThreads(Threads):
    """Runs every call on the event loop.

    Args:
        chance: how many turns of the loop a call takes; None: it is done when it is asked for.
    """

    def __init__(self, chance: Random | None = None) -> None:
        super().__init__()
        self._chance = chance
        self._writes: deque[Callable[[], None]] = deque()
        self._syncs: deque[Callable[[], None]] = deque()
        self._reads: deque[Callable[[], None]] = deque()

    def write(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        return self._begin(self._writes, partial(call, *args, **kwargs))

    def write_and_tell(self, told: Told[T], call: Callable[[], T]) -> None:
        self._begin(self._writes, call).add_done_callback(partial(_tell, told))

    def sync(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        return self._begin(self._syncs, partial(call, *args, **kwargs))

    def read(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        return self._begin(self._reads, partial(call, *args, **kwargs))

    def _begin(self, queue: deque[Callable[[], None]], call: Callable[[], T]) -> asyncio.Future[T]:
        self._check_open()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        if self._chance is None:
            _run(call, done)
            return done
        queue.append(partial(_run, call, done))
        self._wait(loop, queue, self._chance.randint(0, _MOST_TURNS))
        return done

    def _wait(self, loop: asyncio.AbstractEventLoop, queue: deque[Any], turns: int) -> None:
        if turns:
            loop.call_soon(self._wait, loop, queue, turns - 1)
        else:
            loop.call_soon(self._run_next, queue)

    def _run_next(self, queue: deque[Callable[[], None]]) -> None:
        if queue:  # else `close` was faster
            if queue is self._reads and self._chance is not None:
                queue.rotate(self._chance.randint(0, 1))
            queue.popleft()()

    def close(self) -> None:
        """End what is under way, and take nothing more."""
        for queue in (self._writes, self._syncs, self._reads):
            while queue:
                queue.popleft()()
        super().close()


def _run(call: Callable[[], T], done: asyncio.Future[T]) -> None:
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001 - handed to whoever awaits the call
        if not done.done():
            done.set_exception(
                RuntimeError(repr(error)) if isinstance(error, StopIteration) else error
            )
            done.exception()  # who has gone meanwhile does not want to hear of it
    else:
        if not done.done():
            done.set_result(result)


def _tell(told: Told[T], done: asyncio.Future[T]) -> None:
    error = done.exception()
    told(None if error is not None else done.result(), error)


@contextmanager
def stepped(seed: int | None = None) -> Iterator[None]:
    """Let what happens in this block be the same each time.

    Disk tiers that are opened in it run without threads; ids and salts are made of a seed.

    Args:
        seed: also lets calls take some turns of the loop; None: each is done at once.
    """
    chance = None if seed is None else Random(seed)
    ids = Random(seed)
    if seed is None:
        ids.seed(0)
    with (
        patch("persistence.disk.tier.Threads", lambda: SteppedThreads(chance)),
        patch("secrets.token_bytes", ids.randbytes),
    ):
        yield
