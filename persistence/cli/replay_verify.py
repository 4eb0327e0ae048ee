"""Compares what is kept with what the log makes, wherever it is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, TypeAlias

from persistence import StateManager
from persistence.cli.fold import Fold, differences
from persistence.cli.replay_model import ReplayReport
from persistence.cli.replay_run import LogReader, in_slices
from persistence.cli.replay_sessions import CURSOR_ID, Cursor
from persistence.clock import SystemClock
from persistence.errors import printable

Read: TypeAlias = Callable[[str], Awaitable[Mapping[str, Any] | None]]
"""Returns the data of a session as one place has it; None: it has none."""
Wrong: TypeAlias = dict[str, list[str]]
"""How sessions differ, in words, by id."""

_LISTED_DIFFERENCES: Final = 20
_READS_AT_ONCE: Final = 64
_AGAIN_SECONDS: Final = 0.1


class Expected:
    """What must be there at the end: the sessions that the log makes, and the cursor.

    Args:
        fold: over the whole log.
        cursor: as it was at the beginning.
        requests: how many there are in the log.
    """

    def __init__(self, fold: Fold, cursor: Cursor, requests: int) -> None:
        self._fold = fold
        self._cursor = {**cursor, "watermark": requests}

    @staticmethod
    async def of(reader: LogReader, cursor: Cursor) -> Expected:
        """Return what the requests of `reader` make."""
        fold = Fold()
        async for request in in_slices(reader):
            fold.add(request)
        return Expected(fold, cursor, reader.requests)

    def ids(self) -> set[str]:
        """Return the ids of the sessions, without the cursor's."""
        return self._fold.ids()

    def data(self, sid: str) -> Mapping[str, Any] | None:
        """Return the data that a session must hold; None: there must be no such session."""
        return self._cursor if sid == CURSOR_ID else self._fold.data(sid)


async def verify_here(state: StateManager, expected: Expected, step: Callable[[], None]) -> Wrong:
    """Read every session of a manager again, one after the other."""
    wrong: Wrong = {}
    there = set()
    async for sid in in_slices(sorted(expected.ids() | await _listed(state))):
        session = await state.get_session(sid)
        if session is not None:
            there.add(sid)
        found = list(differences(expected.data(sid), session.data if session else None))
        if found:
            wrong[sid] = found
        step()
    # Only now: those that were in Redis only have come here.
    for sid in sorted(there - await _listed(state)):
        wrong.setdefault(sid, []).append("is not listed")
    return wrong


async def _listed(state: StateManager) -> set[str]:
    return {sid async for sid in state.iter_sessions() if sid != CURSOR_ID}


async def compare(
    expected: Expected, ids: Iterable[str], read: Read, step: Callable[[], None]
) -> Wrong:
    """Read sessions, many at once, and return those that differ."""
    wrong: Wrong = {}
    waiting = iter(sorted(ids))

    async def work() -> None:
        for sid in waiting:
            found = list(differences(expected.data(sid), await read(sid)))
            if found:
                wrong[sid] = found
            step()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(_READS_AT_ONCE):
                group.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return wrong


async def compare_patiently(
    expected: Expected,
    ids: Iterable[str],
    read: Read,
    step: Callable[[], None],
    patience_seconds: float,
) -> Wrong:
    """Compare, and read again what differs as long as less and less of it does.

    What one worker writes is elsewhere a message's delay later; what it wrote while Redis was away
    or ``redis.write`` is ``"behind"``, a delivery later.

    Args:
        expected: what must be there.
        ids: of the sessions to read.
        read: reads one.
        step: called for each session when it was first read.
        patience_seconds: how long to wait for one more session to become right.
    """
    clock = SystemClock()
    wrong = await compare(expected, ids, read, step)
    moved = clock.monotonic()
    while wrong and clock.monotonic() - moved < patience_seconds:
        await asyncio.sleep(_AGAIN_SECONDS)
        still = await compare(expected, wrong, read, lambda: None)
        if len(still) < len(wrong):
            moved = clock.monotonic()
        wrong = still
    return wrong


def conclude(report: ReplayReport, wrong: Mapping[str, Wrong]) -> None:
    """Fill in the verdict.

    Args:
        report: gets it.
        wrong: what differs, by place; the name of a place is put behind the session's.
    """
    report.differing_sessions = len({sid for found in wrong.values() for sid in found})
    report.differences = [
        f"session {printable(sid)}{place}: {what}"
        for place, found in wrong.items()
        for sid, texts in found.items()
        for what in texts
    ][:_LISTED_DIFFERENCES]
    report.verified = not report.differing_sessions
