"""Runs workers that are killed: one order a line on stdin, their reports on stdout.

An order is ``{"directory": …, "disk": {…}, "filler_bytes": …, "run": …, "seconds": …, "closes":
…}``. A child is forked, works in that directory, and is killed with SIGKILL after `seconds`. With
`closes` it closes its manager after half of that time, so that the kill may hit the closing.
`disk` is what its `DiskConfig` says otherwise than here; records hold up to `filler_bytes` more
than their counters. What an order may say besides:

- ``"kill": [point, n]``: the child kills itself when it is at one of `faults.killpoints` for the
  n-th time; first it writes ``["point", point]``,
- ``"checkpoints": true``: it makes one checkpoint after the other, beside its directory, and writes
  ``["made", id]`` for each,
- ``"endures": true``: when its disk fails, it ends as if nothing had happened.

The child writes a JSON array a line, each in one call, so that a kill leaves whole lines only:

- ``["found", session, state]`` for each session, once it is open and before it changes anything,
- ``["try", session, state]`` before a call that would bring the session into that state,
- ``["done", session, state]`` after that call returned.

A state is ``[generation, count]``, or null: there is no such session. A last line ``["end", code]``
comes from the parent; the code is null if the child was killed.

Forked, because imports would be most of such a short life.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import signal
import sys
import traceback
from itertools import count
from pathlib import Path
from typing import Any

from persistence import SessionDraft, StateConfig, StateManager
from persistence.errors import PersistenceError
from tests import encryption
from tests.faults.killpoints import KillingFiles

SESSIONS = [f"session {number}" for number in range(24)]

State = list[int] | None


def report(*words: Any) -> None:
    os.write(1, json.dumps(words).encode() + b"\n")


class Worker:
    """Changes sessions for as long as it lives."""

    def __init__(self, state: StateManager, run: int, filler_bytes: int) -> None:
        self._state = state
        self._filler_bytes = filler_bytes
        self._rng = random.Random(run)
        self._generations = count(run * 1_000_000)

    async def found(self, session_id: str) -> State:
        session = await self._state.get_session(session_id)
        return None if session is None else [session["generation"], session["count"]]

    async def work(self, session_id: str) -> None:
        """Change one session, which is this task's own, again and again."""
        now = await self.found(session_id)
        report("found", session_id, now)
        while True:
            now = await self._change(session_id, now)
            if self._rng.random() < 0.1:
                await self._state.spill_session(session_id)
            await asyncio.sleep(self._rng.random() * 0.003)

    async def _change(self, session_id: str, now: State) -> State:
        if now is None:
            return await self._create(session_id)
        dice = self._rng.random()
        if dice < 0.04:
            return await self._end(session_id)
        if dice < 0.5:
            # Several in flight: the second is built on the first before that is durable.
            steps = [[now[0], now[1] + step] for step in range(1, self._rng.randrange(2, 6))]
            await asyncio.gather(*(self._add(session_id, step) for step in steps))
            return steps[-1]
        return await self._add(session_id, [now[0], now[1] + 1], edits=dice < 0.7)

    async def _create(self, session_id: str) -> State:
        then = [next(self._generations), 0]
        report("try", session_id, then)
        data = {"generation": then[0], "count": 0, "filler": b""}
        await self._state.create_session(session_id=session_id, data=data)
        report("done", session_id, then)
        return then

    async def _end(self, session_id: str) -> State:
        report("try", session_id, None)
        assert await self._state.terminate_session(session_id)
        report("done", session_id, None)
        return None

    async def _add(self, session_id: str, then: list[int], *, edits: bool = False) -> State:
        filler = self._rng.randbytes(int(self._filler_bytes * self._rng.random() ** 3))

        def add(draft: SessionDraft) -> None:
            draft["count"] += 1
            draft["filler"] = filler

        report("try", session_id, then)
        if edits:
            async with self._state.edit(session_id) as draft:
                add(draft)
        else:
            session = await self._state.update_session(session_id, add)
            then = [session["generation"], session["count"]]
        report("done", session_id, then)
        return then


async def make_checkpoints(state: StateManager) -> None:
    """Make one after the other."""
    while True:
        report("made", (await state.create_checkpoint()).id)
        await asyncio.sleep(0.01)


async def work(order: dict[str, Any]) -> None:
    try:
        await live(order)
    except PersistenceError:
        if not order.get("endures"):
            raise


async def live(order: dict[str, Any]) -> None:
    config = StateConfig.model_validate(
        {
            "memory": {"max_bytes": "32KiB"},
            "disk": {
                "path": order["directory"],
                "flush_interval_seconds": 0.05,
                "segment_bytes": "64KiB",
                "queue_bytes": "32KiB",
                "compaction_bytes_per_second": 0,
                **order["disk"],
            },
            "checkpoint": {"keep": 2},
            **encryption.sections(),
        }
    )
    files = None
    if "kill" in order:
        point, nth = order["kill"]
        files = KillingFiles(point, nth, report)
    state = StateManager(config=config, files=files)
    await state.open()
    worker = Worker(state, order["run"], order["filler_bytes"])
    tasks = [asyncio.create_task(worker.work(session_id)) for session_id in SESSIONS]
    if order.get("checkpoints"):
        tasks.append(asyncio.create_task(make_checkpoints(state)))
    ended, _ = await asyncio.wait(
        tasks,
        timeout=order["seconds"] / 2 if order["closes"] else None,
        return_when=asyncio.FIRST_EXCEPTION,
    )
    for task in ended:
        task.result()  # raises what it raised
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await state.close()


def raise_child(order: dict[str, Any]) -> int | None:
    # The end of the pipe that only the child holds closes with its life, however that ends.
    life, own_life = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 4
        try:
            asyncio.run(work(order))
            code = 0
        except BaseException:  # noqa: BLE001 - a child must not return into its parent's loop
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(own_life)
    has_ended = bool(select.select([life], [], [], order["seconds"])[0])
    os.close(life)
    if not has_ended:
        os.kill(pid, signal.SIGKILL)  # not waited for yet, so the number is still the child's
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if code == -signal.SIGKILL else code


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        assert Path(order["directory"]).parent.is_dir()
        report("end", raise_child(order))


if __name__ == "__main__":
    main()
