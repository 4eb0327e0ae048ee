"""A worker that counts in a session which it shares with other workers through Redis.

Start as many as you like, each with a name of its own; no number is printed twice::

    python examples/shared_worker.py one redis://localhost:6379
    python examples/shared_worker.py two redis://localhost:6379

The URL may be in REDIS_URL instead. Without any, a worker counts alone, in its own directory. Stop
one with Ctrl-C or SIGTERM, or kill it: the next one goes on where the last one was.
"""
# ruff: noqa: T201 - an example prints

import asyncio
import os
import sys
from functools import partial

from persistence import DiskConfig, RedisConfig, SessionDraft, StateConfig, StateManager, worker


def count(data: SessionDraft) -> None:
    """Count one: called again if another worker's update came first."""
    data["n"] += 1


async def work(name: str, state: StateManager) -> None:
    """Count until this is cancelled, which is what a signal does."""
    await state.get_or_create_session("counter", data={"n": 0})
    while True:
        session = await state.update_session("counter", count)
        print(f"{name} counted {session['n']}", flush=True)
        await asyncio.sleep(0.1)


if __name__ == "__main__":
    NAME = sys.argv[1] if len(sys.argv) > 1 else "one"
    URL = sys.argv[2] if len(sys.argv) > 2 else os.environ.get("REDIS_URL")
    CONFIG = StateConfig(
        disk=DiskConfig(path=f".persistence/shared-{NAME}"),
        redis=RedisConfig(url=URL, namespace="shared-worker"),
    )
    worker.run(partial(work, NAME), CONFIG)
    print("closed")
