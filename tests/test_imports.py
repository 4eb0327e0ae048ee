"""Who may import whom, and who may touch the system: read from the source, without running it.

Imports point one way, from the bottom up::

    errors, clock, config, record, session, slices, tasks, turns, admission, sealer, lifecycle, ...
        memory | disk | remote | limits | security | observe      (none of them imports another)
            checkpoint | commit | providers | entries
                renewals | keys | stats
                spilling
                residency
                    sharing | scratch | watching
                        updates | listing | census
                            rotation
                                tiers | requests
                                    access | lookup | summary
                                    lives
                                    facilities
                                    assembly
                                    manager
                                        exports
                                            persistence/__init__.py     (the public names)
                                                sync, worker, cli, testing
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "persistence"

FLOORS: dict[str, int] = {
    **dict.fromkeys(
        ("errors", "clock", "config", "record", "session", "slices", "tasks", "turns"), 0
    ),
    **dict.fromkeys(("arguments", "ids", "locks", "expiry", "shutdown", "sealer", "admission"), 0),
    **dict.fromkeys(("resources", "typed", "background", "lifecycle", "own_threads"), 0),
    **dict.fromkeys(("memory", "disk", "remote", "limits", "security", "observe"), 1),
    **dict.fromkeys(("checkpoint", "commit", "providers", "entries"), 2),
    **dict.fromkeys(("renewals", "keys", "stats"), 3),
    "spilling": 4,
    "residency": 5,
    **dict.fromkeys(("sharing", "scratch", "watching"), 6),
    **dict.fromkeys(("updates", "listing", "census"), 7),
    "rotation": 8,
    **dict.fromkeys(("tiers", "requests"), 9),
    **dict.fromkeys(("access", "lookup", "summary"), 10),
    "lives": 11,
    "facilities": 12,
    "assembly": 13,
    "manager": 14,
    "exports": 15,
    "": 16,
    **dict.fromkeys(("sync", "worker", "cli", "testing"), 17),
}
"""Floor of each room: the first part of a module's name below the package."""
OPEN_FLOORS = (0, 17)
"""On these, rooms may import each other, as long as there is no cycle."""

FILE_USERS = (
    "disk.files",
    "memory.budget",
    "config",
    "cli",
    "facilities",
    "access",
    "sync.handle",
)
"""The only modules that open files or name paths: the seam of the disk tier; /proc; TOML; the
user's files; and his scratch directories, which handles name too."""
CLOCK_USERS = ("clock",)
PURE = ("record", "disk.format", "memory.policies", "security.tokens")
"""Bytes in, bytes out: no event loop, no files, no time."""

LATE_MODULES = ("remote.postgres",)
"""Modules whose names begin so are imported late themselves: an extra may stand at their top."""

IMPURE_MODULES = {"asyncio", "io", "os", "pathlib", "persistence.clock", "socket", "time"}
FILE_MODULES = {"aiofiles", "fcntl", "glob", "mmap", "shutil", "tempfile"}
OS_WITHOUT_FILES = {
    "PathLike",
    "cpu_count",
    "environ",
    "fsdecode",
    "fsencode",
    "fspath",
    "getpid",
    "path",
    "register_at_fork",
    "strerror",
    "sysconf",
    "urandom",
}
PATHS_WITHOUT_FILES = {
    "abspath",
    "basename",
    "commonpath",
    "dirname",
    "isabs",
    "join",
    "normpath",
    "relpath",
    "sep",
    "splitext",
}


class Module(NamedTuple):
    """A module by its name below the package ("disk.files"; "" is the package), and its source."""

    name: str
    tree: ast.Module
    is_package: bool


class Import(NamedTuple):
    """One imported module, by its full name."""

    target: str
    line: int
    is_deferred: bool


PATHS = sorted(path.relative_to(ROOT / PACKAGE) for path in (ROOT / PACKAGE).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.parent.parts if is_package(path) else path.with_suffix("").parts)


def is_package(path: Path) -> bool:
    return path.name == "__init__.py"


NAMES = {f"{PACKAGE}.{name_of(path)}".rstrip(".") for path in PATHS}


@cache
def modules() -> list[Module]:
    """Return all of the package's, read once: when the first test asks, not at each collection."""
    return [
        Module(name_of(path), ast.parse((ROOT / PACKAGE / path).read_bytes()), is_package(path))
        for path in PATHS
    ]


def module_of(name: str, source: str, *, is_package: bool = False) -> Module:
    return Module(name, ast.parse(source), is_package)


# Reading imports


def imports_of(module: Module, names: set[str] = NAMES) -> Iterator[Import]:
    """Yield all imports of `module`, also those in functions and for type checking only."""
    at_once = {id(node) for node in module.tree.body}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute_base(module, node)
            targets = [
                # A name may be a submodule or something in the module.
                name if (name := f"{base}.{alias.name}") in names else base
                for alias in node.names
            ]
        else:
            continue
        for target in targets:
            yield Import(target, node.lineno, id(node) not in at_once)


def absolute_base(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    here = f"{PACKAGE}.{module.name}".rstrip(".").split(".")
    up = node.level - 1 if module.is_package else node.level
    return ".".join([*here[: len(here) - up], *([node.module] if node.module else [])])


def is_ours(target: str) -> bool:
    return target == PACKAGE or target.startswith(f"{PACKAGE}.")


def room_of(name: str) -> str:
    return name.partition(".")[0]


def below_package(target: str) -> str:
    return target.removeprefix(PACKAGE).removeprefix(".")


# The rules. Each returns what it objects to, as "module:line: what".


def wrong_directions(module: Module, names: set[str] = NAMES) -> list[str]:
    room = room_of(module.name)
    return [
        f"{module.name}:{found.line}: must not import {found.target}"
        for found in imports_of(module, names)
        if is_ours(found.target) and not may_import(room, room_of(below_package(found.target)))
    ]


def may_import(room: str, other: str) -> bool:
    if room == other:
        return True
    if room not in FLOORS or other not in FLOORS or room == "errors":
        return False
    if FLOORS[room] == FLOORS[other]:
        return FLOORS[room] in OPEN_FLOORS
    return FLOORS[room] > FLOORS[other]


def file_uses(module: Module) -> list[str]:
    if is_one_of(module.name, FILE_USERS):
        return []
    return [
        *objections(module, imported_file_modules(module)),
        *objections(module, (use for use in uses(module.tree) if touches_files(use.name))),
    ]


def clock_uses(module: Module) -> list[str]:
    if is_one_of(module.name, CLOCK_USERS):
        return []
    imported = (Use(found.target, found.line) for found in imports_of(module))
    return [
        *objections(module, (use for use in imported if use.name == "time")),
        *objections(module, (use for use in uses(module.tree) if tells_time(use.name))),
    ]


def impurities(module: Module) -> list[str]:
    if not is_one_of(module.name, PURE):
        return []
    imported = (Use(found.target, found.line) for found in imports_of(module))
    return objections(module, (use for use in imported if use.name in IMPURE_MODULES))


def undeclared(module: Module, declared: set[str], extras: set[str]) -> list[str]:
    """Return imports of what nothing declares; what only an extra declares is imported late."""
    known = declared | set(sys.stdlib_module_names) | {PACKAGE}
    is_late = module.name.startswith(LATE_MODULES)
    return [
        f"{module.name}:{found.line}: {found.target}"
        for found in imports_of(module)
        if found.target.partition(".")[0]
        not in (known | extras if is_late or found.is_deferred else known)
    ]


class Use(NamedTuple):
    """A dotted name in the source ("os.path.join"; calls in it are written as "()")."""

    name: str
    line: int


def objections(module: Module, found: Iterator[Use]) -> list[str]:
    return [f"{module.name}:{use.line}: {use.name}" for use in found]


def is_one_of(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == known or name.startswith(f"{known}.") for known in allowed)


def imported_file_modules(module: Module) -> Iterator[Use]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in FILE_MODULES | {"pathlib"}:
                    yield Use(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if imports_file_access(node.module or "", alias.name):
                    yield Use(f"{node.module}.{alias.name}", node.lineno)


def imports_file_access(module: str, name: str) -> bool:
    if module == "pathlib":
        return not name.startswith("Pure")
    return module in FILE_MODULES or touches_files(f"{module}.{name}")


def touches_files(name: str) -> bool:
    head, _, rest = name.partition(".")
    if head == "os":
        part, _, below = rest.partition(".")
        return part not in OS_WITHOUT_FILES | {""} or (
            part == "path" and below not in PATHS_WITHOUT_FILES | {""}
        )
    return name in {"open", "io.open", "builtins.open"}


def tells_time(name: str) -> bool:
    # Reading the clock through the event loop, or through datetime, is reading the clock.
    return re.search(r"\bdate(time)?\.(now|utcnow|today)$|loop(\(\))?\.time$", name) is not None


def uses(tree: ast.Module) -> Iterator[Use]:
    """Yield every longest dotted name that the source reads."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and id(node) not in inner:
            name = dotted(node)
            if name:
                yield Use(name, node.lineno)


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Call):
        return f"{dotted(node.func)}()"
    return ""


# The project


def found_by(rule: Callable[[Module], list[str]]) -> str:
    """Return what a rule objects to in the whole package, a line each."""
    return "\n".join(objection for module in modules() for objection in rule(module))


def test_the_package_is_found() -> None:
    assert {"persistence.errors", "persistence.clock", "persistence.config"} <= NAMES


def test_every_module_has_a_room() -> None:
    without = {name_of(path) for path in PATHS if room_of(name_of(path)) not in FLOORS}
    assert without == set(), "give each a floor here, which is a decision of design"


def test_the_table_of_floors_in_the_docs_is_this_one() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", page, re.MULTILINE)
    named = [(room, int(floor)) for floor, cell in rows for room in re.findall(r"`(.+?)`", cell)]
    expected = {name or f"{PACKAGE}/__init__.py": floor for name, floor in FLOORS.items()}
    assert sorted(named) == sorted(expected.items())


def test_imports_point_down() -> None:
    assert found_by(wrong_directions) == ""


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        f"{PACKAGE}.{module.name}".rstrip("."): {
            found.target
            for found in imports_of(module)
            if is_ours(found.target) and not found.is_deferred
        }
        for module in modules()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_only_the_few_that_may_touch_files() -> None:
    assert found_by(file_uses) == ""


def test_only_the_clock_tells_the_time() -> None:
    assert found_by(clock_uses) == ""


def test_pure_modules_know_no_loop_no_files_and_no_time() -> None:
    assert found_by(impurities) == ""


def test_only_declared_dependencies_are_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    declared, optional = import_names(project["dependencies"]), import_names(extras)
    assert found_by(lambda module: undeclared(module, declared, optional)) == ""


def import_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in requirements}


# The rules themselves: what each of them catches, and what it lets through


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("memory.tier", "from persistence.disk import index"),
        ("memory.tier", "import persistence.disk.index"),
        ("memory.tier", "from persistence import disk"),
        ("memory.tier", "from ..disk import index"),
        ("memory.tier", "from .. import disk"),
        ("memory.tier", "def late():\n    from persistence.remote.redis import Redis"),
        ("memory.tier", "if TYPE_CHECKING:\n    from persistence.manager import StateManager"),
        ("disk.tier", "from persistence.commit import CommitQueue"),
        ("disk.tier", "from persistence import StateManager"),
        ("commit", "from persistence.manager import StateManager"),
        ("commit", "from persistence.checkpoint.create import create"),
        ("manager", "from persistence.sync import StateManager"),
        ("errors", "from persistence.clock import Clock"),
        ("session", "from persistence.memory.tier import MemoryTier"),
        ("newroom.thing", "from persistence import errors"),
    ],
)
def test_an_import_upwards_or_sideways_is_caught(name: str, source: str) -> None:
    names = NAMES | {"persistence.disk", "persistence.memory", "persistence.disk.index"}
    assert len(wrong_directions(module_of(name, source), names)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("memory.tier", "from persistence.memory.budget import MemoryReader\nfrom . import budget"),
        ("disk.tier", "from persistence import errors\nfrom persistence.clock import Clock"),
        ("session", "from persistence import record"),
        ("commit", "from persistence.disk.tier import DiskTier"),
        ("manager", "from persistence.commit import Q\nfrom persistence.memory.tier import T"),
        ("cli.app", "from persistence import StateManager\nfrom persistence.disk import verify"),
        ("errors", "from enum import Enum"),
    ],
)
def test_an_import_downwards_passes(name: str, source: str) -> None:
    assert wrong_directions(module_of(name, source)) == []


def test_relative_imports_are_resolved_from_a_module_and_from_a_package() -> None:
    in_module = imports_of(module_of("disk.tier", "from .index import Index"), set())
    in_package = imports_of(module_of("disk", "from .index import I", is_package=True), set())
    assert [found.target for found in (*in_module, *in_package)] == ["persistence.disk.index"] * 2


@pytest.mark.parametrize(
    "source",
    [
        "open('x')",
        "handle = open",
        "import io\nio.open('x')",
        "import os\nos.fsync(3)",
        "import os\nos.path.exists('x')",
        "import os\nreplace = os.replace",
        "from os import fsync",
        "from os.path import getsize",
        "from pathlib import Path",
        "import pathlib",
        "import mmap",
        "from tempfile import mkdtemp",
        "def late():\n    import shutil",
    ],
)
def test_a_touch_of_files_is_caught(source: str) -> None:
    assert len(file_uses(module_of("disk.tier", source))) == 1
    assert file_uses(module_of("disk.files", source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.path.join('a', os.fspath(b))\nos.getpid()",
        "files.open('x')\nself.open()\nstate.open(1)",
        "def open_tier(): ...",
        "from pathlib import PurePosixPath",
        "from os import PathLike",
    ],
)
def test_what_only_looks_like_a_file_passes(source: str) -> None:
    assert file_uses(module_of("disk.tier", source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "from time import monotonic",
        "from datetime import datetime\ndatetime.now(UTC)",
        "import datetime\ndatetime.datetime.utcnow()",
        "from datetime import date\ndate.today()",
        "loop.time()",
        "self._loop.time()",
        "asyncio.get_running_loop().time()",
    ],
)
def test_a_reading_of_the_clock_is_caught(source: str) -> None:
    assert len(clock_uses(module_of("cli.app", source))) == 1
    assert clock_uses(module_of("clock", source)) == []


def test_the_injected_clock_passes() -> None:
    source = "self._clock.monotonic()\nnow = engine_time.now()\ndatetime.fromtimestamp(wall, UTC)"
    assert clock_uses(module_of("manager", source)) == []


@pytest.mark.parametrize(
    "source", ["import asyncio", "import os", "from persistence.clock import Clock"]
)
def test_an_impure_import_in_a_pure_module_is_caught(source: str) -> None:
    assert len(impurities(module_of("disk.format", source))) == 1
    assert impurities(module_of("disk.tier", source)) == []


def test_an_undeclared_dependency_is_caught() -> None:
    module = module_of(
        "manager",
        "import lmdb\nimport msgpack\nfrom zict.lru import LRU\nimport re\n"
        "def late():\n    import lmdb",
    )
    assert undeclared(module, {"msgpack"}, {"lmdb"}) == ["manager:1: lmdb", "manager:3: zict.lru"]


# What an import costs its user

OF_SOME = {
    "redis",
    "asyncpg",
    "typer",
    "rich",
    "pydantic_settings",
    "aiofiles",
    "fastdigest",
    "msgspec",
}


def test_the_library_loads_nothing_that_only_some_of_its_users_need() -> None:
    # A fresh interpreter: here, other tests have loaded everything.
    program = (
        "import persistence, persistence.providers, persistence.testing.provider_contract, sys; "
        f"import persistence.testing.remote_tier_contract; print({OF_SOME!r} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "set()"


def test_a_manager_without_a_shared_tier_loads_no_client_of_one(tmp_path: Path) -> None:
    program = f"""
import asyncio, sys
from persistence import DiskConfig, StateConfig, StateManager

async def work():
    config = StateConfig(disk=DiskConfig(path={str(tmp_path / "d")!r}))
    async with StateManager(config=config) as state:
        await state.create_session()
        await state.create_checkpoint()

asyncio.run(work())
print("redis" in sys.modules or "asyncpg" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "False"
