"""Signals that ask a command to end let it clean up first."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from persistence.cli import app as app_module
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


@pytest.mark.parametrize(("number", "code"), list(zip(SIGNALS, (130, 143, 129), strict=True)))
@pytest.mark.parametrize("in_loop", [True, False])
def test_the_exit_code_tells_which_signal_it_was(
    number: signal.Signals, code: int, in_loop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        os.kill(os.getpid(), number)
        await asyncio.Event().wait()

    def app(*_: object, **__: object) -> None:
        if in_loop:
            run(work())
        os.kill(os.getpid(), number)
        signal.pause()

    monkeypatch.setattr(app_module, "app", app)
    assert app_module.run_command(["demo"]) == code
    assert app_module.run_command(["demo"]) == code


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
