"""Forks and the end of the interpreter, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from persistence import CheckpointConfig, DiskConfig, StateConfig, StateManager

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 30

BEGIN = """
import gc, os, sys, threading, time
from persistence import CheckpointConfig, DiskConfig, StateConfig, sync
from persistence.errors import ManagerClosed

config = StateConfig(
    disk=DiskConfig(path=sys.argv[1] + "/state"),
    checkpoint=CheckpointConfig(store=sys.argv[1] + "/store"),
)
state = sync.StateManager(config=config)
state.open()
sid = state.get_or_create_session(session_id="s", data={"n": 0}).id
def add_one(data):
    data["n"] += 1
"""


def run(program: str, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {name: text for name, text in os.environ.items() if "PERSISTENCE_" not in name}
    return subprocess.run(
        [sys.executable, "-c", BEGIN + program, str(directory), *arguments],
        env={**environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


async def counted(directory: Path) -> int:
    """Return what is in the log, and see that it was sealed and a checkpoint was made."""
    assert (directory / "state" / "INDEX").exists(), "the last thing that an orderly close writes"
    config = StateConfig(
        disk=DiskConfig(path=str(directory / "state")),
        checkpoint=CheckpointConfig(store=str(directory / "store")),
    )
    async with StateManager(config=config) as state:
        assert [each.kind for each in await state.list_checkpoints()]
        session = await state.get_session("s")
        assert session is not None
        return int(session["n"])


async def test_at_exit_everything_is_closed_in_order(tmp_path: Path) -> None:
    ended = run("state.update_session(sid, add_one)\nprint('end')", tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "end\n", "")
    assert await counted(tmp_path) == 1


async def test_an_exception_that_ends_the_program_closes_it_too(tmp_path: Path) -> None:
    ended = run("state.update_session(sid, add_one)\nraise SystemExit(3)", tmp_path)
    assert (ended.returncode, ended.stderr) == (3, "")
    assert await counted(tmp_path) == 1


async def test_threads_that_outlive_the_main_program_work_on_until_they_end(tmp_path: Path) -> None:
    """The interpreter waits for them. By then it has ended all executors, and reads are cold."""
    program = """
main = threading.main_thread()
def work():
    main.join()
    for _ in range(5):
        state.spill_session(sid)
        state.update_session(sid, add_one)
    state.compact()
    print("worked")
threading.Thread(target=work).start()
"""
    ended = run(program, tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "worked\n", "")
    assert await counted(tmp_path) == 5


async def test_a_close_that_hangs_does_not_hold_up_the_end_of_the_process(tmp_path: Path) -> None:
    program = """
state._manager._resources._timeout_seconds = 0.1
state.resources(sid, "page", object, lambda page: threading.Event().wait())
state.update_session(sid, add_one)
if "--close" in sys.argv:
    state.close()
print("end")
"""
    for count, arguments in enumerate(([], ["--close"]), 1):
        ended = run(program, tmp_path, *arguments)
        assert (ended.returncode, ended.stdout) == (0, "end\n")
        assert "given up" in ended.stderr
        assert await counted(tmp_path) == count


async def test_the_child_of_a_fork_is_refused_and_its_parent_goes_on(tmp_path: Path) -> None:
    program = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
stop = threading.Event()
def work():
    while not stop.is_set():
        state.update_session(sid, add_one)
worker = threading.Thread(target=work)
worker.start()
stream = state.watch(sid)
sessions = state.as_mapping()
for _ in range(3):
    child = os.fork()
    if child == 0:
        calls = [
            lambda: state.get_session(sid),
            lambda: state.update_session(sid, add_one),
            lambda: state.edit(sid).__enter__(),
            lambda: state.has_session(sid),
            lambda: sessions["s"],
            lambda: next(stream),
            lambda: list(state.iter_sessions()),
        ]
        for number, call in enumerate(calls):
            try:
                call()
            except ManagerClosed as error:
                assert "fork" in str(error), error
            else:
                os._exit(100 + number)
        stream.close()
        state.close()
        own = StateConfig(disk=DiskConfig(path=sys.argv[1] + "/child"))
        with sync.StateManager(config=own) as mine:
            mine.create_session()
        if _ == 0:
            sys.exit(0)  # with all that is done at exit
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
before = state.get_session(sid)["n"]
stop.set()
worker.join()
print(state.update_session(sid, add_one)["n"] > before)
"""
    ended = run(program, tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "True\n"
    assert await counted(tmp_path) > 0
