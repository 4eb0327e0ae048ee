"""Runs replays that are killed: ``replay_nursery.py LOG [URL]``, one order a line on stdin.

An order is ``{"directory": ..., "seconds": ...}``. A child is forked, replays the log in that
directory, as the command line does with --resume (and --redis URL), and is killed with SIGKILL
after `seconds` (null: never). The answer, a line of its own, is its exit code or null if it was
killed.

Forked, because imports would be most of such a short life: each child starts with all of them done.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import sys
import traceback
from pathlib import Path

from persistence.cli.replayer import ReplayOptions, replay


def replay_into(directory: Path, log: Path, redis_url: str | None) -> int:
    options = ReplayOptions(
        logs=(log,),
        directory=directory,
        memory_bytes=16 * 1024,  # less than the sessions take
        segment_bytes=64 * 1024,
        resume=True,
        concurrency=16,
        redis_url=redis_url,
    )
    report = asyncio.run(replay(options))
    sys.stderr.write("\n".join(report.differences))
    return 0 if report.verified else 3


def raise_child(
    directory: Path, log: Path, redis_url: str | None, seconds: float | None
) -> int | None:
    # The end of the pipe that only the child holds closes with its life, however that ends.
    life, own_life = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 4
        try:
            code = replay_into(directory, log, redis_url)
        except BaseException:  # noqa: BLE001 - a child must not return into its parent's loop
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(own_life)
    has_ended = bool(select.select([life], [], [], seconds)[0])
    os.close(life)
    if not has_ended:
        os.kill(pid, signal.SIGKILL)  # not waited for yet, so the number is still the child's
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if code == -signal.SIGKILL else code


def main() -> None:
    log = Path(sys.argv[1])
    redis_url = sys.argv[2] if len(sys.argv) > 2 else None
    for line in sys.stdin:
        order = json.loads(line)
        code = raise_child(Path(order["directory"]), log, redis_url, order["seconds"])
        sys.stdout.write(f"{json.dumps(code)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
