"""The demo's victim: a worker that updates sessions until it is killed.

Run as ``python -m persistence.cli.demo_worker DIRECTORY SESSIONS``. It writes one `ACK` to stdout
after each acknowledged update, and never ends by itself.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from functools import partial

from persistence import StateManager
from persistence.cli.demo_workload import ACK, EDITORS, config, count_up, data_of, session_name

_STDOUT = 1


def main() -> None:
    """Run the worker that the command line describes."""
    try:
        asyncio.run(_work(sys.argv[1], int(sys.argv[2])))
    except BrokenPipeError:
        os._exit(1)  # the parent is gone: nobody is left to tell


async def _work(directory: str, sessions: int) -> None:
    async with StateManager(config=config(directory)) as state, asyncio.TaskGroup() as group:
        for editor in range(EDITORS):
            group.create_task(_edit(state, range(editor, sessions, EDITORS)))


async def _edit(state: StateManager, own: range) -> None:
    """Create the sessions of one editor, then count in them for ever.

    No other editor touches them, so of each session one update at most is on its way.
    """
    for number in own:
        if not await state.has_session(session_name(number)):
            await state.create_session(session_id=session_name(number), data=data_of(number, 0))
            _tell(number, 0)
    choice = random.Random(own.start)  # noqa: S311 - a workload, not a secret
    while True:
        # Most updates go to few sessions, as in life: the square moves them to the front.
        number = own[int(choice.random() ** 2 * len(own))]
        session = await state.update_session(session_name(number), partial(count_up, number=number))
        _tell(number, session["count"])


def _tell(number: int, count: int) -> None:
    # Blocks when the parent falls behind, which is as well: it is what measures.
    os.write(_STDOUT, ACK.pack(number, count))


if __name__ == "__main__":
    main()
