"""Runs workers that are told to stop: one order a line on stdin, their reports on stdout.

An order is ``{"directory": …, "url": …, "kind": …, "seconds": …, "signals": […]}``, and where its
checkpoints go, "store". A child is forked and runs `persistence.worker.run`; after `seconds` from
the moment at which it is open (or from its first report of the word "after") it gets the signals,
one after the other. `seconds` null: none; negative: while it is opening.

The child writes a JSON array a line, in one call each: ``["open"]``, ``["done", session, count]``
for each acknowledged update, and what its kind says. The parent adds ``["end", code, seconds from
the first signal to the end]``.

Forked, because imports would be most of such a short life.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

from persistence import SessionDraft, StateConfig, StateManager, worker

TASKS = 8


def report(*words: Any) -> None:
    os.write(1, json.dumps(words).encode() + b"\n")


def add_one(data: SessionDraft) -> None:
    data["n"] = data.get("n", 0) + 1


async def busy(state: StateManager) -> None:
    """Update sessions until cancelled."""
    report("open")

    async def count_up(number: int) -> None:
        sid = f"session {number}"
        await state.get_or_create_session(sid)
        while True:
            session = await state.update_session(sid, add_one)
            report("done", sid, session["n"])

    await asyncio.gather(*map(count_up, range(TASKS)))


async def brief(state: StateManager) -> None:
    """End by itself."""
    report("open")
    report("frozen", gc.get_freeze_count())
    await state.create_session(session_id="brief")


async def failing(state: StateManager) -> None:
    """Raise."""
    report("open")
    await state.create_session(session_id="failing")
    raise RuntimeError("as asked")


async def exiting(state: StateManager) -> None:
    """Call `sys.exit`."""
    report("open")
    await state.create_session(session_id="exiting")
    sys.exit(3)


async def exiting_aside(state: StateManager) -> None:
    """Let another task call `sys.exit`."""
    aside = asyncio.create_task(exiting(state))
    try:
        await asyncio.Event().wait()
    finally:
        report("ended in order", aside.done())


async def stubborn(state: StateManager) -> None:
    """Take no notice of being cancelled."""
    report("open")
    await state.create_session(session_id="stubborn")
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            report("cancelled")


async def editing(state: StateManager) -> None:
    """Hold an edit for good, and another one that ends when it is cancelled."""
    await state.create_session(session_id="held")
    holding = asyncio.create_task(_hold(state))
    report("open")
    await asyncio.Event().wait()
    await holding


async def _hold(state: StateManager) -> None:
    async with state.edit("held"):
        await asyncio.Event().wait()


_KINDS = (busy, brief, failing, exiting, exiting_aside, stubborn, editing)
KINDS = {each.__name__: each for each in _KINDS}


def work(order: dict[str, Any]) -> None:
    config = StateConfig.model_validate(
        {
            "disk": {"path": order["directory"], "segment_bytes": "256KiB"},
            "redis": {"timeout_seconds": 1},
            "shutdown": {"grace_seconds": order.get("grace_seconds", 10)},
            "checkpoint": {"store": order.get("store", "auto")},
        }
    )
    worker.run(KINDS[order["kind"]], config, url=order["url"])
    report("frozen", gc.get_freeze_count())


def raise_child(order: dict[str, Any]) -> tuple[int, float]:
    reports, childs_reports = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 4
        try:
            os.dup2(childs_reports, 1)
            work(order)
            code = 0
        except SystemExit as wanted:
            code = int(wanted.code or 0)
        except BaseException:  # noqa: BLE001 - a child must not return into its parent's loop
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(childs_reports)
    seconds = order["seconds"]
    started = None
    first = json.dumps([order.get("after", "open")])[:-1].encode()
    if seconds is not None and seconds < 0:
        time.sleep(-seconds)
        started = _signal(pid, order["signals"])
    with os.fdopen(reports, "rb", 0) as lines:
        for line in _passed_on(lines):
            if started is None and seconds is not None and line.startswith(first):
                _later(seconds, pid, order["signals"])
                started = time.monotonic() + seconds
    _, status = os.waitpid(pid, 0)
    took = 0.0 if started is None else time.monotonic() - started
    return os.waitstatus_to_exitcode(status), took


def _passed_on(lines: Any) -> Any:
    rest = b""
    while chunk := lines.read(1 << 16):
        os.write(1, chunk)
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole


def _later(seconds: float, pid: int, signals: list[str]) -> None:
    """Send signals after `seconds`, while the parent goes on reading."""
    if os.fork() == 0:
        time.sleep(seconds)
        _signal(pid, signals)
        os._exit(0)


def _signal(pid: int, signals: list[str]) -> float:
    started = time.monotonic()
    for number, name in enumerate(signals):
        if number:
            time.sleep(0.05)
        try:
            os.kill(pid, signal.Signals[name])
        except ProcessLookupError:
            break
    return started


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for line in sys.stdin:
        order = json.loads(line)
        code, took = raise_child(order)
        report("end", code, took)
        while True:  # the sender of signals
            try:
                os.waitpid(-1, os.WNOHANG)
                break
            except ChildProcessError:
                break


if __name__ == "__main__":
    main()
