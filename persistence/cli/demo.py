"""``persistence demo``: a worker is killed with SIGKILL, and nothing it acknowledged is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import psutil

from persistence.cli import screen
from persistence.cli.demo_parent import Outcome, load_and_kill, measure, reopen_and_check
from persistence.cli.demo_workload import EDITORS, MEMORY_BYTES, SESSIONS
from persistence.cli.failure import EXIT_FAILED, EXIT_OK
from persistence.cli.running import run
from persistence.cli.screen import format_bytes, note, say

KILLS: Final = 3
_LISTED: Final = 10


def command() -> int:
    """Kill a worker in the middle of its work, three times, and count what is lost.

    A worker process keeps more sessions than its memory budget holds, and reports every update
    once the engine has acknowledged it. It is killed with SIGKILL under full load; then the
    directory is opened again and every session is compared with what had been reported. Takes
    about ten seconds, needs no server and leaves nothing behind. The exit code is 0 only if
    nothing is lost.
    """
    outcome = Outcome()
    with TemporaryDirectory(prefix="persistence-demo-") as directory:
        note(
            f"{SESSIONS:,} sessions in a memory budget of {format_bytes(MEMORY_BYTES)}, "
            f"{EDITORS} tasks updating them, in {directory}"
        )
        file_system = _file_system(directory)
        for number in range(1, KILLS + 1):
            before = outcome.ledger.acknowledged
            load_and_kill(outcome, directory)
            lost = run(reopen_and_check(outcome, directory))
            note(
                f"kill {number} of {KILLS}: SIGKILL after "
                f"{outcome.ledger.acknowledged - before:,} acknowledgements; reopened in "
                f"{outcome.opened_seconds[-1] * 1000:.0f} ms, {lost:,} sessions lost"
            )
        run(measure(outcome, directory))
    screen.print_table("This machine", _rows(outcome, file_system))
    for line in outcome.wrong[:_LISTED]:
        say(line)
    if outcome.wrong:
        say(f"LOST: {len(outcome.wrong):,} sessions are not what was acknowledged.")
        return EXIT_FAILED
    say("Every acknowledged update is there.")
    return EXIT_OK


def _file_system(directory: str) -> str:
    """Return the kind of file system that holds `directory`: a RAM disk syncs in no time."""
    parents = {str(parent) for parent in (Path(directory), *Path(directory).parents)}
    mounts = [part for part in psutil.disk_partitions(all=True) if part.mountpoint in parents]
    kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"
    return f"{kind} (a RAM disk: syncs cost nothing)" if kind == "tmpfs" else kind


def _rows(outcome: Outcome, file_system: str) -> Iterator[tuple[str, str]]:
    yield "sessions", f"{SESSIONS:,}"
    yield "memory budget", format_bytes(MEMORY_BYTES)
    yield "log on disk", format_bytes(outcome.disk_bytes)
    yield "file system", file_system
    yield "updates acknowledged", f"{outcome.ledger.acknowledged:,}"
    yield "… durable updates per second", f"{outcome.updates / outcome.load_seconds:,.0f}"
    yield "SIGKILLs under full load", f"{outcome.kills:,}"
    yield "sessions lost or wrong", f"{len(outcome.wrong):,}"
    yield "reopened in", " / ".join(f"{s * 1000:.0f}" for s in outcome.opened_seconds) + " ms"
    yield "get, hot", f"{outcome.hot_get_seconds * 1e6:.1f} µs"
    yield "get, cold (restored from disk)", f"{outcome.cold_restore_seconds * 1e6:.0f} µs"
    yield "durable update, alone", f"{outcome.durable_update_seconds * 1e3:.2f} ms"
