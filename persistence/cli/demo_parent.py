"""The demo's parent: lets a worker run, kills it, opens what it left and checks it."""

from __future__ import annotations

import os
import random
import selectors
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from statistics import median
from typing import IO, Final

from persistence import StateManager
from persistence.cli.demo_workload import ACK, SESSIONS, Ledger, config, count_up, session_name
from persistence.cli.failure import CommandError
from persistence.clock import SystemClock

_LOAD_SECONDS: Final = (1.5, 2.5)
_SILENCE_SECONDS: Final = 10.0
_SILENCES: Final = 2  # in a row: a machine that was suspended wakes up with one behind it
_MEASURE_SECONDS: Final = 0.5
_MEASURED_SESSIONS: Final = 200
_READ_BYTES: Final = 8192 * ACK.size

_clock = SystemClock()


@dataclass(slots=True)
class Outcome:
    """What the demo has found so far.

    Attributes:
        updates: acknowledged under full load, in `load_seconds`; creations do not count.
        opened_seconds: time of each reopening after a kill, until the first session was served.
        wrong: sessions that are not what was acknowledged, in words.
    """

    ledger: Ledger = field(default_factory=lambda: Ledger.of(SESSIONS))
    kills: int = 0
    updates: int = 0
    load_seconds: float = 0.0
    opened_seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    disk_bytes: int = 0
    hot_get_seconds: float = 0.0
    cold_restore_seconds: float = 0.0
    durable_update_seconds: float = 0.0


# --- load and kill ----------------------------------------------------------------------------


def load_and_kill(outcome: Outcome, directory: str) -> None:
    """Let a worker run until it is under full load, and kill it at a random moment of that.

    Raises:
        CommandError: the worker ended by itself, or stopped making progress.
    """
    words = [sys.executable, "-m", "persistence.cli.demo_worker", directory, str(SESSIONS)]
    # In a session of its own: a Ctrl-C in the terminal is for the parent, which ends the worker.
    worker = subprocess.Popen(  # noqa: S603 - our own interpreter and module
        words, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
    )
    assert worker.stdout is not None
    load = _Load(outcome.ledger, random.SystemRandom().uniform(*_LOAD_SECONDS))
    try:
        if load.is_over(_chunks(worker.stdout)):
            worker.kill()
            outcome.kills += 1
            load.take(worker.stdout.read())  # told before it died, so acknowledged
        else:
            raise CommandError(f"the worker ended by itself, with exit code {worker.wait()}")
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()
    outcome.updates += load.updates
    outcome.load_seconds += load.seconds


class _Load:
    """The acknowledgements of one worker, and how long it has been under full load."""

    def __init__(self, ledger: Ledger, wanted_seconds: float) -> None:
        self._ledger = ledger
        self._wanted_seconds = wanted_seconds
        self._rest = b""
        self._started: float | None = None
        self._at_start = 0
        self.seconds = 0.0

    @property
    def updates(self) -> int:
        return self._ledger.acknowledged - self._at_start

    def is_over(self, chunks: Iterator[bytes]) -> bool:
        """Take chunks until the load has lasted; False when the chunks end before."""
        for chunk in chunks:
            self.take(chunk)
            now = _clock.monotonic()
            if self._started is None:
                # Creating the sessions comes first, and is another kind of load.
                if self._ledger.is_complete():
                    self._started, self._at_start = now, self._ledger.acknowledged
            else:
                self.seconds = now - self._started
                if self.seconds >= self._wanted_seconds:
                    return True
        return False

    def take(self, chunk: bytes) -> None:
        data = self._rest + chunk
        whole = len(data) - len(data) % ACK.size
        self._ledger.take(data[:whole])
        self._rest = data[whole:]


def _chunks(pipe: IO[bytes]) -> Iterator[bytes]:
    """Yield what comes out of the pipe until its end."""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if not any(selector.select(_SILENCE_SECONDS) for _ in range(_SILENCES)):
                seconds = _SILENCE_SECONDS * _SILENCES
                raise CommandError(f"the worker made no progress for {seconds:.0f} s")
            chunk = os.read(pipe.fileno(), _READ_BYTES)
            if not chunk:
                return
            yield chunk


# --- reopen, check, measure -------------------------------------------------------------------


async def reopen_and_check(outcome: Outcome, directory: str) -> int:
    """Open what the killed worker left and compare every session; return how many are wrong."""
    started = _clock.monotonic()
    async with StateManager(config=config(directory)) as state:
        await state.get_session(session_name(0))
        outcome.opened_seconds.append(_clock.monotonic() - started)
        wrong = []
        listed = {sid async for sid in state.iter_sessions()}
        for number in range(SESSIONS):
            sid = session_name(number)
            listed.discard(sid)
            session = await state.get_session(sid)
            reason = outcome.ledger.check(number, session.data if session else None)
            if reason is not None:
                wrong.append(f"{sid}: {reason}")
        wrong += [f"{sid!a}: was never created" for sid in sorted(listed)]
        outcome.disk_bytes = (await state.stats()).disk.total_bytes
    outcome.wrong += wrong
    return len(wrong)


async def measure(outcome: Outcome, directory: str) -> None:
    """Measure single operations, one after the other, on the sessions that are there."""
    async with StateManager(config=config(directory)) as state:
        numbers = range(_MEASURED_SESSIONS)

        async def get(number: int) -> None:
            session = await state.get_session(session_name(number))
            assert session is not None
            assert session["count"] >= 0  # reads the field: what a caller does with a session

        async def spill(number: int) -> None:
            await state.spill_session(session_name(number))

        async def update(number: int) -> None:
            await state.update_session(session_name(number), partial(count_up, number=number))

        for number in numbers:
            await get(number)
        outcome.hot_get_seconds = await _median_seconds(get, numbers)
        outcome.cold_restore_seconds = await _median_seconds(get, numbers, before=spill)
        outcome.durable_update_seconds = await _median_seconds(update, numbers)


async def _median_seconds(
    operation: Callable[[int], Awaitable[None]],
    numbers: range,
    before: Callable[[int], Awaitable[None]] | None = None,
) -> float:
    """Return the median time of `operation`, over `numbers` again and again for a while."""
    taken: list[float] = []
    end = _clock.monotonic() + _MEASURE_SECONDS
    for number in cycle(numbers):
        if before is not None:
            await before(number)
        started = _clock.monotonic()
        await operation(number)
        ended = _clock.monotonic()
        taken.append(ended - started)
        if ended >= end:
            break
    return median(taken)
