"""The pages of docs/ name what exists, and nothing else."""

from __future__ import annotations

import ast
import inspect
import os
import re
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from persistence import (
    ClientInfo,
    DiskConfig,
    RequestMetrics,
    Session,
    SessionHealth,
    StateConfig,
    StateManager,
    Stats,
    errors,
)
from persistence.checkpoint.catalogue import CheckpointInfo
from persistence.checkpoint.create import Progress
from persistence.checkpoint.keeper import CheckpointStats
from persistence.checkpoint.restore import RestoredInfo
from persistence.disk.tier import DiskStats
from persistence.stats import PopulationStats, RequestStats, SharingStats

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
APPLICATIONS = (ROOT / "docs" / "applications.md").read_text(encoding="utf-8")
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def anchor(title: str) -> str:
    """Return the anchor that is made of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {anchor(title) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, heading = target.partition("#")
        if "://" in name:
            continue
        file = page.parent / name if name else page
        if not file.exists() or (heading and heading not in anchors(file)):
            dead.append(target)
    assert dead == []


def test_every_number_of_stats_is_explained() -> None:
    listed = re.findall(r"`([\w.]+)`", table("Numbers", column=0))
    parts = {
        "disk": DiskStats,
        "checkpoints": CheckpointStats,
        "sharing": SharingStats,
        "requests": RequestStats,
        "population": PopulationStats,
    }
    numbers = [item.name for item in fields(Stats) if item.name not in parts]
    for name, part in parts.items():
        numbers += [f"{name}.{item.name}" for item in fields(part)]
    assert sorted(listed) == sorted(numbers)


def test_every_logger_is_listed() -> None:
    listed = re.findall(r"`([\w.]+)`", table("Logging", column=0))
    used = [name for path in (ROOT / "persistence").rglob("*.py") for name in loggers(path)]
    assert sorted(listed) == sorted(set(used))  # modules may share one


def loggers(path: Path) -> list[str]:
    """Return the names that a module calls `logging.getLogger` with."""
    calls = [
        node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)
    ]
    return [
        ast.literal_eval(call.args[0])
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "getLogger"
    ]


@pytest.mark.parametrize(
    "kind", [CheckpointInfo, Progress, RequestMetrics, RestoredInfo, Session, SessionHealth]
)
def test_every_attribute_of_what_methods_return_is_in_its_table(kind: type) -> None:
    listed = re.findall(r"`(\w+)(?:\([^`]*\))?`", table(kind.__name__, column=0, page=API))
    if is_dataclass(kind):
        public = [item.name for item in fields(kind)]
    else:  # `view` makes one
        public = [name for name in vars(kind) if not name.startswith("_") and name != "view"]
    assert sorted(listed) == sorted(public)


def table(title: str, column: int, page: str = OPERATIONS) -> str:
    """Return the cells of one column of the first table below a heading."""
    _, found, rest = page.partition(f"\n## {title}\n")
    assert found, title
    rows = re.findall(r"^\|(.+)\|$", rest.partition("\n## ")[0], re.MULTILINE)
    return "\n".join(row.split("|")[column] for row in rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_field_of_the_configuration_that_is_named_exists(page: Path) -> None:
    sections = {name: set(table) for name, table in StateConfig().model_dump().items()}
    sections["disk"] |= {item.name for item in fields(DiskStats)}
    sections["memory"] |= {"max", "high"}  # files of a cgroup
    named = re.findall(
        rf"`({'|'.join(sections)})\.(\w+)", page.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert [pair for pair in named if pair[1] not in sections[pair[0]]] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_error_that_is_named_exists(page: Path) -> None:
    known = {*vars(errors), "KeyError", "TypeError", "ValueError"}
    named = re.findall(r"`([A-Z]\w+Error)`", page.read_text(encoding="utf-8"))
    assert set(named) <= known


# --- code ---------------------------------------------------------------------------------------

BLOCKS = [
    pytest.param(match[1], id=f"{page.stem}-{number}")
    for page in PAGES
    if page.parent == ROOT / "docs"  # README.md has tests of its own
    for number, match in enumerate(
        re.finditer(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL), 1
    )
]
ELSEWHERE = {
    "DIRECTORY/CONFLICTS": "sharing: it reads a file that a conflict has made",
    "as_mapping()\nsessions[": "a manager of threads",
}
"""What blocks need that the test does not give them, by what is in them."""


class Connection:
    async def aclose(self) -> None: ...


async def connect() -> Connection:
    return Connection()


@pytest.mark.parametrize("block", BLOCKS)
async def test_a_block_of_code_runs_with_what_its_page_takes_for_granted(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top_level = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    code = compile(block, "docs", "exec", flags=top_level, dont_inherit=True)
    if any(text in block for text in ELSEWHERE):
        return
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").symlink_to(ROOT / "config")
    for name in [name for name in os.environ if "PERSISTENCE_" in name]:
        monkeypatch.delenv(name)
    client = ClientInfo(ip="203.0.113.9")
    async with StateManager() as state:
        sid = await state.create_session(user_id="ada", data={"cart": []})
        given = {
            "state": state,
            "sid": sid,
            "client": client,
            "token": state.issue_token(sid, client),
            "config": StateConfig.model_validate({"disk": {"path": "another"}}),
            "StateManager": StateManager,
            "dataclass": dataclass,
            "render": lambda session: session.data,
            "connect": connect,
            "Connection": Connection,
        }
        result = eval(code, given)
        if inspect.iscoroutine(result):
            await result


async def test_the_snippet_for_web_servers_gives_each_process_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = run_block(OPERATIONS, "Under a web server")
    config = StateConfig(disk=DiskConfig(path=tmp_path / "state"))
    first = await names["open_own"](config, 2)
    second = await names["open_own"](config, 2)
    assert [Path(each.config.disk.path).name for each in (first, second)] == ["0", "1"]
    with pytest.raises(RuntimeError, match="all 2 directories are in use"):
        await names["open_own"](config, 2)
    await first.close()
    monkeypatch.setenv("PERSISTENCE_DISK__PATH", str(tmp_path / "state"))
    async with names["lifespan"](None) as given:
        assert Path(given["sessions"].config.disk.path).name == "0", "what became free"
        await given["sessions"].create_session()
    await second.close()


async def test_the_test_that_is_shown_passes(tmp_path: Path) -> None:
    names = run_block(APPLICATIONS, "In tests")
    await names["test_a_cart_lives_for_an_hour"](tmp_path)


def run_block(page: str, title: str) -> dict[str, Any]:
    """Run the first block of Python below a heading, and return the names it makes."""
    _, found, rest = page.partition(f"\n## {title}\n")
    assert found, title
    block = re.search(r"^```python\n(.*?)^```$", rest, re.MULTILINE | re.DOTALL)
    assert block
    names: dict[str, Any] = {}
    exec(compile(block[1], title, "exec", dont_inherit=True), names)
    return names
