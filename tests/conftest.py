"""Fixtures of the engine's tests."""

from __future__ import annotations

import compileall
import gc
import itertools
import os
import signal
import sys
import zlib
from bisect import bisect
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from persistence import Clock, ManualClock, StateManager
from persistence.disk.files import Files
from tests import diffs
from tests.engine import Crash, OpenTyped, ScriptedFiles, Start, config_for
from tests.postgres_servers import postgres, postgres_proxy
from tests.redis_servers import (
    cluster,
    deployment,
    deployments,
    each_server,
    own_server,
    sentinel,
    shared_server,
)
from tests.support import Points, Sampled

pytest.register_assert_rewrite("persistence.testing")  # nothing above imports it

__all__ = [
    "cluster",
    "deployment",
    "deployments",
    "each_server",
    "own_server",
    "postgres",
    "postgres_proxy",
    "sentinel",
    "shared_server",
]

_STEP_OF_POINTS = 6
_MARK = b"mark.alone"


def pytest_configure(config: pytest.Config) -> None:
    """Compile engine and tests once: for the next run, and for hundreds of child processes."""
    diffs.install()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Started in the background of a shell, where this process and each that it starts would
        # ignore what the tests send.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ:
        _begin_elsewhere(config)
        return  # the rest was done by its parent
    cache: pytest.Cache | None = getattr(config, "cache", None)  # with -p no:cacheprovider: none
    if cache is not None:
        compiled = str(cache.mkdir("compiled"))
        sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = compiled
        sys.dont_write_bytecode = False
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        if config.getoption("numprocesses", None):  # once for all of them
            for folder in ("persistence", "benchmarks"):
                compileall.compile_dir(Path(__file__).parents[1] / folder, quiet=2, workers=0)


def _begin_elsewhere(config: pytest.Config) -> None:
    """Let each process of a run that collects everything begin with another part of it.

    In a fresh clone pytest has to rewrite and compile all modules, which takes three times as long
    as the rest of collecting them. So each finds most of them compiled by the others.
    """
    here = Path(__file__).parent
    if [(config.invocation_params.dir / argument).resolve() for argument in config.args] != [here]:
        return
    found = sorted(here.rglob("test_*.py"))
    ends = list(itertools.accumulate(path.stat().st_size for path in found))
    number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    first = bisect(ends, ends[-1] * number // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    config.args[:] = map(str, found[first:] + found[:first])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Let ``-m alone`` import the few files only in which something has that mark."""
    if config.option.markexpr != "alone" or collection_path.suffix != ".py":
        return None
    return None if _MARK in collection_path.read_bytes() else True


@pytest.hookimpl(tryfirst=True)  # before any is deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow ones, so that processes that share the tests end together.

    The others come by their files, in one order in all processes (see `_begin_elsewhere`).
    """
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, str(item.path)))
    alone = {item.path for item in items if item.get_closest_marker("alone") is not None}
    unseen = sorted(str(path) for path in alone if _MARK not in path.read_bytes())
    if unseen:
        raise pytest.UsageError(f"write pytest.{_MARK.decode()} itself in {', '.join(unseen)}")


def pytest_collection_finish() -> None:
    """Let no garbage collection look at thousands of collected tests again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _alone_in_the_heap(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keep what the test run itself holds out of what is measured.

    A run that has collected thousands of tests has a heap over which one full garbage collection
    takes a third of a second. That stall is not the engine's.
    """
    if request.node.get_closest_marker("alone") is None:
        yield
        return
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what the suites of `tests/faults` can be told."""
    group = parser.getgroup("faults")
    group.addoption("--fault-seed", type=int, default=1, help="seed of the fault suites")
    group.addoption(
        "--fault-scale",
        type=float,
        default=1.0,
        help="how much more than in the short form; python -m tests.faults does it all",
    )


def below(end: int, numbers: Iterable[int]) -> Iterator[int]:
    """Yield numbers until one is not below `end`."""
    return itertools.takewhile(lambda number: number < end, numbers)


@pytest.fixture
def points(request: pytest.FixtureRequest) -> Points:
    """Give the numbers of the calls, from `start` on, at which something goes wrong.

    In the short form that is every sixth one, beginning with another one in each test, so that
    tests of one kind together see all of them; with ``--fault-scale 6`` each sees all.
    """
    step = max(1, round(_STEP_OF_POINTS / request.config.getoption("--fault-scale")))
    first = zlib.crc32(request.node.nodeid.encode()) % step
    return lambda start: itertools.count(start + first, step)


@pytest.fixture
def sampled(points: Points) -> Sampled:
    """Choose some of what could be tried, as `points` does of the calls."""
    return lambda numbers: [numbers[at] for at in below(len(numbers), points(0))]


@pytest.fixture
def clock() -> ManualClock:
    """A clock that stands still until it is told to move."""
    return ManualClock()


@pytest.fixture
def files() -> ScriptedFiles:
    """A disk that does as it is told."""
    return ScriptedFiles()


@pytest.fixture
async def start(tmp_path: Path, clock: Clock, files: ScriptedFiles) -> AsyncIterator[Start]:
    """Open managers that are closed at the end of the test.

    Called with the sections of a configuration, and `path`, `clock` or `files` where they are not
    to be those of the test.
    """
    opened: list[StateManager] = []

    async def start(
        *,
        path: Path | None = None,
        clock: Clock = clock,
        files: Files = files,
        **sections: dict[str, Any],
    ) -> StateManager:
        config = config_for(path or tmp_path / "state", **sections)
        state = StateManager(config=config, clock=clock, files=files)
        await state.open()
        opened.append(state)
        return state

    yield start
    files.open_gates()
    for state in opened:
        await state.close()


@pytest.fixture
async def state(start: Start) -> StateManager:
    """An open manager with the default configuration."""
    return await start()


@pytest.fixture
async def open_typed(
    tmp_path: Path, clock: ManualClock, files: ScriptedFiles
) -> AsyncIterator[OpenTyped]:
    """Open a manager with a schema on the test's directory, closing the one before."""
    opened: list[StateManager] = []

    async def close_all() -> None:
        while opened:
            await opened.pop().close()

    async def open_typed(schema: object) -> StateManager:
        await close_all()
        state = StateManager(
            config=config_for(tmp_path / "state"), clock=clock, files=files, schema=schema
        )
        await state.open()
        opened.append(state)
        return state

    yield open_typed
    await close_all()


@pytest.fixture
def crash(tmp_path: Path, files: ScriptedFiles) -> Crash:
    """Return the directory that a SIGKILL of a manager's process would leave at this moment."""
    numbers = itertools.count(1)

    def crash(state: StateManager) -> Path:
        return files.image(state.config.disk.path, tmp_path / f"crash {next(numbers)}")

    return crash
