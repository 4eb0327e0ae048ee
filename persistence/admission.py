"""Those who wait for a limit to admit them: first come, first served.

They go on a few in each turn of the event loop, because waking a thousand tasks at once is a stall
of its own (as in `commit`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from persistence.errors import PersistenceError, again

_WOKEN_PER_TURN: Final = 8  # each of them may have much to do


class Waiting:
    """A queue of those who wait. Whoever has given up waiting is passed over."""

    __slots__ = ("_turns",)

    def __init__(self) -> None:
        self._turns: deque[asyncio.Future[bool]] = deque()

    def __len__(self) -> int:
        """How many wait."""
        return sum(not turn.done() for turn in self._turns)

    def join(self) -> asyncio.Future[bool]:
        """Join the queue; return what is resolved in the end: whether one is admitted."""
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        return turn

    async def admit(self, count: int) -> int:
        """Admit `count` of them, also of those who come meanwhile; return how many are left over.

        When any are left over, nobody waits, and nothing has happened since that was so.
        """
        woken = 0
        while count and self._turns:
            turn = self._turns.popleft()
            if turn.done():
                continue
            turn.set_result(True)
            count -= 1
            woken += 1
            if woken % _WOKEN_PER_TURN == 0:
                await asyncio.sleep(0)
        return count

    async def refuse(self, error: BaseException | None = None) -> None:
        """Admit none of those who wait now; with `error`, that is what they get."""
        for number in range(1, len(self._turns) + 1):
            turn = self._turns.popleft()
            if turn.done():
                continue
            if error is None:
                turn.set_result(False)
            else:
                turn.set_exception(again(error) if isinstance(error, PersistenceError) else error)
            if number % _WOKEN_PER_TURN == 0:
                await asyncio.sleep(0)

    def give_up(self) -> None:
        """Cancel those who wait: nobody serves them any more."""
        while self._turns:
            self._turns.popleft().cancel()


def is_admitted(turn: asyncio.Future[bool]) -> bool:
    """Whether a turn has come, though nobody may have gone on yet."""
    return (
        turn.done() and not turn.cancelled() and turn.exception() is None and turn.result() is True
    )
