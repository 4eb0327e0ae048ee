"""Counts up in one session: ``counting_process.py URL DIRECTORY SESSION TIMES [TIMEOUT]``.

A real worker. Says when it is open, and waits for a line on stdin before it counts. With TIMEOUT,
the seconds that the shared tier has to answer, it never goes on alone: what was refused is done
again, and in the end it says of how many updates nobody knows.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from persistence import StateManager
from persistence.errors import RemoteUnavailable, WriteOutcomeUnknown
from tests.engine import config_for
from tests.sharing.support import add_one


async def count(
    url: str, directory: Path, session_id: str, times: int, timeout_seconds: float | None
) -> None:
    redis: dict[str, Any] = {}
    if timeout_seconds is not None:
        redis = {
            "timeout_seconds": timeout_seconds,
            "heartbeat_seconds": timeout_seconds,
            "on_outage": "fail",
        }
    async with StateManager(url, config_for(directory, redis=redis)) as state:
        sys.stdout.write("open\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.readline)
        unknown = 0
        for _ in range(times):
            unknown += await counted(state, session_id, refusals=timeout_seconds is not None)
    if timeout_seconds is not None:
        sys.stdout.write(f"{unknown}\n")


async def counted(state: StateManager, session_id: str, *, refusals: bool) -> bool:
    """Count up once; return whether nobody knows if that was done."""
    while True:
        try:
            await state.update_session(session_id, add_one)
        except RemoteUnavailable:
            if not refusals:
                raise
            await asyncio.sleep(0.05)
        except WriteOutcomeUnknown:
            if not refusals:
                raise
            return True
        else:
            return False


if __name__ == "__main__":
    seconds = float(sys.argv[5]) if len(sys.argv) > 5 else None
    asyncio.run(count(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), seconds))
