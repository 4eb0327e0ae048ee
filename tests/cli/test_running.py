"""Signals that ask a command to end let it clean up first."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from persistence.cli.running import interruptible, run

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_cancels_the_work_and_lets_it_close(number: signal.Signals) -> None:
    steps: list[str] = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), number)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            steps.append("closed")

    with pytest.raises(KeyboardInterrupt):
        run(work())
    assert steps == ["closed"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_outside_of_a_loop_is_an_interrupt(number: signal.Signals) -> None:
    def signalled() -> None:
        with interruptible():
            os.kill(os.getpid(), number)
            signal.pause()

    with pytest.raises(KeyboardInterrupt):
        signalled()


def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]

    async def work() -> int:
        return 5

    assert run(work()) == 5
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_cancellation_of_its_own_is_no_interrupt() -> None:
    async def work() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        run(work())
