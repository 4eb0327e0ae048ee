"""Counts up in one session: ``counting_process.py URL DIRECTORY SESSION TIMES``, a real worker.

Says when it is open, and waits for a line on stdin before it counts.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from persistence import StateManager
from tests.engine import config_for
from tests.sharing.support import add_one


async def count(url: str, directory: Path, session_id: str, times: int) -> None:
    async with StateManager(url, config_for(directory)) as state:
        sys.stdout.write("open\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.readline)
        for _ in range(times):
            await state.update_session(session_id, add_one)


if __name__ == "__main__":
    asyncio.run(count(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
