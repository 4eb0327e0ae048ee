"""Workers under signals, as processes: they end in order, in time, and lose nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from persistence import StateConfig, StateManager
from persistence.checkpoint.catalogue import list_checkpoints
from persistence.checkpoint.directory_store import DirectoryStore
from persistence.checkpoint.restore import restore_into
from persistence.clock import SystemClock
from persistence.disk.filenames import MANIFEST
from persistence.disk.inspect import scan_directory
from persistence.disk.segments import Damage
from persistence.disk.threads import Threads
from tests.engine import ScriptedFiles
from tests.full_size import full_or
from tests.nurseries import NurseryProcess
from tests.redis_servers import RedisServer

ROOT = Path(__file__).parents[1]
NURSERY = Path(__file__).with_name("worker_nursery.py")
ROUNDS = full_or(200, 25)


class End(NamedTuple):
    """How a worker ended: exit code, seconds since the first signal, what it reported."""

    code: int
    seconds: float
    reports: list[list[Any]]

    @property
    def counts(self) -> dict[str, int]:
        """The highest acknowledged count of each session."""
        counts: dict[str, int] = {}
        for word, *rest in self.reports:
            if word == "done":
                counts[rest[0]] = rest[1]
        return counts


class Nursery(NurseryProcess):
    """The process that raises the workers."""

    def __init__(self) -> None:
        super().__init__(NURSERY)

    def run(self, directory: Path, kind: str, seconds: float | None = 0.1, **order: Any) -> End:
        """Run a worker to its end."""
        order = {
            "directory": str(directory),
            "kind": kind,
            "seconds": seconds,
            "signals": ["SIGTERM"],
            "url": None,
            **order,
        }
        reports: list[list[Any]] = []
        for words in self.answers(order):
            if words[0] == "end":
                return End(words[1], words[2], reports)
            reports.append(words)
        raise AssertionError("unreachable: a nursery that dies raises")


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


def damages(directory: Path) -> list[Damage]:
    """Return the defects of a directory that nobody has open."""
    if not (directory / MANIFEST).exists():
        return []
    return [each for report, _ in scan_directory(str(directory)) for each in report.damages]


async def contents(directory: Path) -> dict[str, Any]:
    """Return the data of every session of a directory."""
    config = StateConfig.model_validate({"disk": {"path": directory}})
    async with StateManager(config=config, files=ScriptedFiles()) as state:
        found = {}
        async for sid in state.iter_sessions():
            session = await state.get_session(sid)
            assert session is not None
            found[sid] = dict(session.data)
        return found


async def test_a_worker_whose_coroutine_ends_closes_and_returns(
    nursery: Nursery, tmp_path: Path
) -> None:
    end = nursery.run(tmp_path, "brief", seconds=None)
    assert end.code == 0
    assert await contents(tmp_path) == {"brief": {}}


def test_garbage_collections_leave_alone_what_was_there_before_a_worker_began(
    nursery: Nursery, tmp_path: Path
) -> None:
    end = nursery.run(tmp_path, "brief", seconds=None)
    meanwhile, afterwards = [words[1] for words in end.reports if words[0] == "frozen"]
    assert meanwhile > 10_000, "the modules at least"
    assert afterwards == 0


async def test_what_the_coroutine_raises_is_raised_after_closing(
    nursery: Nursery, tmp_path: Path
) -> None:
    end = nursery.run(tmp_path, "failing", seconds=None)
    assert end.code == 4
    assert await contents(tmp_path) == {"failing": {}}


@pytest.mark.parametrize("kind", ["exiting", "exiting_aside"])
async def test_an_exit_in_the_coroutine_or_a_task_ends_a_worker_in_order(
    nursery: Nursery, tmp_path: Path, kind: str
) -> None:
    end = nursery.run(tmp_path / "state", kind, seconds=None, store=str(tmp_path / "store"))
    assert end.code == 3
    assert (["ended in order", True] in end.reports) is (kind == "exiting_aside")
    threads = Threads()
    try:
        store = DirectoryStore(str(tmp_path / "store"), threads)
        [info] = await list_checkpoints(store)
    finally:
        threads.close()
    assert (info.reason, info.sessions) == ("shutdown", 1)
    assert await contents(tmp_path / "state") == {"exiting": {}}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
async def test_a_signal_ends_a_worker_with_exit_code_0_and_nothing_is_lost(
    nursery: Nursery, tmp_path: Path, name: str
) -> None:
    end = nursery.run(tmp_path, "busy", after="done", signals=[name])
    assert end.code == 0
    found = await contents(tmp_path)
    assert end.counts
    assert all(found[sid]["n"] >= count for sid, count in end.counts.items())


@pytest.mark.timeout(900)
async def test_a_signal_at_any_moment_of_a_busy_worker_loses_nothing(
    nursery: Nursery, tmp_path: Path
) -> None:
    here, there = tmp_path / "state", tmp_path / "checkpoints"
    dice = random.Random(5)
    for number in range(ROUNDS):
        seconds = dice.random() * 0.3
        end = nursery.run(here, "busy", seconds=seconds, store=str(there))
        assert end.code == 0
        assert end.seconds < 5
        assert damages(here) == []
        found = await contents(here)
        for sid, count in end.counts.items():
            assert count <= found[sid]["n"] <= count + 1
        restored = await restored_latest(there, tmp_path / f"restored {number}")
        assert restored == found


async def restored_latest(store: Path, directory: Path) -> dict[str, Any]:
    """Return what the latest checkpoint of a shutdown has, which has to be whole."""
    threads = Threads()
    try:
        where = DirectoryStore(str(store), threads)
        infos = await list_checkpoints(where)
        assert {(info.reason, info.problem) for info in infos} == {("shutdown", None)}
        files = ScriptedFiles()  # nobody looks at it after a power loss
        info = await restore_into(
            where, str(directory), SystemClock(), fall_back=False, files=files
        )
        assert info.id == infos[-1].id
    finally:
        threads.close()
    return await contents(directory)


@pytest.mark.timeout(120)
async def test_a_signal_to_a_worker_that_shares_its_sessions_loses_nothing(
    nursery: Nursery, tmp_path: Path, shared_server: RedisServer
) -> None:
    dice = random.Random(6)
    for number in range(ROUNDS // 3):
        here = tmp_path / f"worker {number % 2}"
        end = nursery.run(here, "busy", seconds=dice.random() * 0.3, url=shared_server.url)
        assert end.code == 0
        assert end.seconds < 5
        elsewhere = tmp_path / f"look {number}"
        config = StateConfig.model_validate({"disk": {"path": elsewhere}})
        async with StateManager(shared_server.url, config) as state:
            for sid, count in end.counts.items():
                session = await state.get_session(sid, fresh=True)
                assert session is not None
                assert count <= session["n"] <= count + 1


async def test_a_signal_while_it_opens_ends_a_worker(nursery: Nursery, tmp_path: Path) -> None:
    for delay in (0.001, 0.01, 0.03):
        end = nursery.run(tmp_path, "busy", seconds=-delay)
        assert end.code in (0, -15)  # before the first line of it runs, a signal just kills it
        assert end.seconds < 5


async def test_a_coroutine_that_does_not_end_holds_a_shutdown_up_for_the_grace_period_only(
    nursery: Nursery, tmp_path: Path
) -> None:
    end = nursery.run(tmp_path, "stubborn", grace_seconds=1.0)
    assert ["cancelled"] in end.reports
    assert await contents(tmp_path) == {"stubborn": {}}
    assert end.seconds < 4


async def test_an_edit_that_does_not_end_holds_a_shutdown_up_for_the_grace_period_only(
    nursery: Nursery, tmp_path: Path
) -> None:
    end = nursery.run(tmp_path, "editing", grace_seconds=1.0)
    assert end.code == 0
    assert end.seconds < 3
    assert await contents(tmp_path) == {"held": {}}


async def test_a_second_signal_cuts_a_shutdown_short_and_leaves_the_log_in_order(
    nursery: Nursery, tmp_path: Path
) -> None:
    signals = ["SIGTERM", "SIGTERM"]
    end = nursery.run(tmp_path, "editing", grace_seconds=60.0, signals=signals)
    assert end.code == 0
    assert end.seconds < 5
    assert damages(tmp_path) == []
    assert await contents(tmp_path) == {"held": {}}
