"""Runs workers that make checkpoints until they are killed: one order a line on stdin.

An order is ``{"directory": …, "url": …, "namespace": …, "seconds": …}``. A child is forked; it
opens the directory, changes sessions and makes one checkpoint after the other; `seconds` after it
began with the first one it gets SIGKILL. The parent answers with a JSON object a line: ``made``,
the ids of the checkpoints that the child saw made, and ``code``, how it ended.

Each session's value is the number of a round, the same in all of them at a checkpoint: round `n` is
complete before a checkpoint with the reason ``n`` is made.

Forked, because imports would be most of such a short life.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
import traceback
from typing import Any

from persistence import StateConfig, StateManager
from persistence.checkpoint import create, plan

SESSIONS = 16
CHUNK_BYTES = 2048  # so that a kill falls between the chunks of one checkpoint


def report(*words: Any) -> None:
    os.write(1, json.dumps(words).encode() + b"\n")


async def work(order: dict[str, Any]) -> None:
    config = StateConfig.model_validate(
        {
            "disk": {"path": order["directory"], "segment_bytes": "256KiB", "fsync": "never"},
            "redis": {
                "url": order["url"],
                "namespace": order["namespace"],
                "write": "checkpoint",
            },
            "checkpoint": {"keep": 3},
        }
    )
    async with StateManager(config=config) as state:
        session = await state.get_or_create_session("session 0")
        number = session.get("n", 0)
        while True:
            number += 1
            await asyncio.gather(*(set_round(state, each, number) for each in range(SESSIONS)))
            report("making", number)
            info = await state.create_checkpoint(str(number))
            report("made", info.id)


async def set_round(state: StateManager, each: int, number: int) -> None:
    sid = f"session {each}"
    await state.get_or_create_session(sid)
    async with state.edit(sid) as draft:
        draft["n"] = number
        draft["noise"] = random.randbytes(3000)


def raise_child(order: dict[str, Any]) -> dict[str, Any]:
    reports_fd, childs_reports = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(childs_reports, 1)
            asyncio.run(work(order))
        except BaseException:  # noqa: BLE001 - a child must not return into its parent's loop
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(4)
    os.close(childs_reports)
    with os.fdopen(reports_fd, "rb") as lines:
        lines.readline()
        time.sleep(order["seconds"])
        os.kill(pid, signal.SIGKILL)
        reports = [json.loads(line) for line in lines]
    _, status = os.waitpid(pid, 0)
    made = [words[1] for words in reports if words[0] == "made"]
    return {"made": made, "code": os.waitstatus_to_exitcode(status)}


def main() -> None:
    for module in (create, plan):
        vars(module)["CHUNK_BYTES"] = CHUNK_BYTES
    for line in sys.stdin:
        print(json.dumps(raise_child(json.loads(line))), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
