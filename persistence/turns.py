"""How much is done in one turn of the event loop: a burst of calls is spread over several.

Most calls of this engine do their work without waiting for anything: a read from the page cache, a
version that is built and submitted. `asyncio` runs all tasks that are ready before it looks at
anything else, so a thousand handlers that become ready together would keep a timer, or another
connection, waiting until the last of them is through; and one task that reads sessions in a loop
would never let go. So only so many calls begin in a turn. Those behind them begin in the next ones,
in the order in which they came. (Tokio's cooperative budgeting is the same idea, for each task.)

What is in memory is read in a microsecond or two, and does not count.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

CALLS_PER_TURN: Final = 16
"""A call takes 20 to 60 microseconds: about a millisecond in all. Twice as many make reading from
disk in a row a tenth faster, as each turn asks the system what is ready, and others wait twice as
long."""


class Turns:
    """Counts the calls of a turn. Made, and used, on its event loop.

    Invariant: no call begins before one that waits. While calls wait, `_end` is scheduled; should
    there be no memory for that, the next call schedules it.

    Args:
        most: calls in a turn.
    """

    __slots__ = ("_called", "_ends", "_left", "_loop", "_most", "_waiting")

    def __init__(self, most: int = CALLS_PER_TURN) -> None:
        self._loop = asyncio.get_running_loop()
        self._most = most
        self._left = most
        self._called = 0  # how many of those that waited begin in the next turn
        self._ends = False  # whether `_end` is scheduled
        self._waiting: deque[asyncio.Future[None]] = deque()

    def take(self) -> bool:
        """Whether a call may begin now; then it counts. Else `enter`."""
        if not self._ends:
            self._loop.call_soon(self._end)
            self._ends = True
        if self._waiting or self._called or self._left <= 0:
            return False
        self._left -= 1
        return True

    async def enter(self) -> None:
        """Begin a call, in this turn or the first one with room; behind all that came before."""
        if self.take():
            return
        waiting = self._loop.create_future()
        self._waiting.append(waiting)
        await waiting

    def _end(self) -> None:
        """End a turn; call those that begin in the next one."""
        self._left = self._most - self._called
        self._ends = False  # until it is certain: scheduling may fail for want of memory
        if self._called or self._waiting:
            self._loop.call_soon(self._end)
            self._ends = True
        self._called = 0
        while self._waiting and self._called < self._most:
            waiting = self._waiting[0]
            if not waiting.done():  # else its caller has given up
                waiting.set_result(None)
                self._called += 1
            self._waiting.popleft()
