"""The disk tier's threads where the interpreter exits and has none for us."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from persistence import StateManager
from persistence.disk.threads import Threads
from tests.support import config


def refuse(_: threading.Thread) -> None:
    """Do what Python 3.12 does at exit."""
    raise RuntimeError("can't create new thread at interpreter shutdown")


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread can be started from now on."""
    monkeypatch.setattr(threading.Thread, "start", refuse)


@pytest.fixture
def exiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread has ended, as it has for what is called at exit."""
    monkeypatch.setattr("persistence.disk.threads.main_thread", threading.Thread)


@pytest.mark.usefixtures("no_threads", "exiting")
async def test_at_exit_calls_are_made_where_there_is_no_thread_for_them() -> None:
    threads = Threads()
    for run in (threads.write, threads.sync, threads.read):
        assert await run(threading.get_ident) == threading.get_ident()
        with pytest.raises(ZeroDivisionError):
            await run(lambda: 1 / 0)
    threads.close()


@pytest.mark.usefixtures("no_threads")
async def test_elsewhere_a_thread_that_cannot_be_started_is_an_error() -> None:
    threads = Threads()
    for run in (threads.write, threads.sync, threads.read):
        with pytest.raises(RuntimeError, match="thread"):
            await run(threading.get_ident)
    threads.close()


@pytest.mark.usefixtures("exiting")
async def test_a_log_that_was_never_synced_is_synced_and_sealed_at_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = StateManager(config=config(str(tmp_path / "state"), fsync="never"))
    await state.open()
    await state.create_session(session_id="s")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    await state.close()
    assert (tmp_path / "state" / "INDEX").exists()
