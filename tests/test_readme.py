"""README.md does what it says: its code runs, its commands print what it shows.

So do the pages that what was once in it has moved to: the commands, the API and the configuration.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from persistence import StateConfig, StateManager, errors
from persistence.errors import ConfigError, PersistenceError
from persistence.facilities import Facilities

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
SHELL = {"sh", "bash", "shell"}
FIRST_COMMANDS = [
    "python3 -m venv .venv && .venv/bin/pip install -q . && .venv/bin/persistence demo",
    "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && "
    ".venv/bin/pytest -q -n 3 -m 'not alone' && .venv/bin/pytest -q -m alone",
]
PLANNED: set[str] = set()
"""Errors that nothing raises yet, so the page of the API does not list them."""


class Block(NamedTuple):
    """One fenced block: the language of its fence, the line it starts on, and what is in it."""

    language: str
    line: int
    text: str


def blocks(page: str) -> list[Block]:
    found = re.finditer(r"^```(\w*)[ \t]*\n(.*?)^```[ \t]*$", page, re.MULTILINE | re.DOTALL)
    return [Block(match[1], page.count("\n", 0, match.start()) + 1, match[2]) for match in found]


def of(*languages: str, page: str = README) -> list[Block]:
    return [block for block in blocks(page) if block.language in languages]


def named(block: Block) -> str:
    return f"line {block.line}"


def is_program(block: Block) -> bool:
    return "asyncio.run(" in block.text


@pytest.fixture
def environ() -> dict[str, str]:
    """The environment of a newcomer, with the package on the path."""
    kept = {name: text for name, text in os.environ.items() if "PERSISTENCE_" not in name}
    return {**kept, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A directory that looks like a clone where README looks, and may be written to."""
    for name in ("config", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


# --- the first screen ---------------------------------------------------------------------------


def test_the_first_two_shell_blocks_are_one_line_each() -> None:
    first = [block.text for block in of(*SHELL)][:2]
    assert [text.splitlines() for text in first] == [[command] for command in FIRST_COMMANDS]


# --- code ---------------------------------------------------------------------------------------


def test_the_first_program_is_the_quickstart() -> None:
    program = next(block.text for block in of("python"))
    example = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")
    assert example.endswith(program)
    before = ast.parse(example.removesuffix(program)).body
    assert [type(statement) for statement in before] == [ast.Expr], "only a docstring comes before"


@pytest.mark.parametrize("block", [block for block in of("python") if is_program(block)], ids=named)
def test_a_program_prints_what_is_shown_below_it(
    block: Block, clone: Path, environ: dict[str, str]
) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", block.text],
        cwd=clone,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    shown = next(item.text for item in of("console") if item.line > block.line)
    assert ran.stdout == shown.partition("\n")[2]


@pytest.mark.parametrize(
    "block", [block for block in of("python") if not is_program(block)], ids=named
)
async def test_a_fragment_runs_inside_a_manager(
    block: Block, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clone)
    for name in [name for name in os.environ if "PERSISTENCE_" in name]:
        monkeypatch.delenv(name)
    code = compile(block.text, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    async with StateManager() as state:
        data = {"cart": [], "page": "/book/dune"}
        sid = await state.create_session(user_id="ada", data=data)
        result = eval(code, {"state": state, "sid": sid})
        if inspect.iscoroutine(result):
            await result


def test_the_configuration_shown_is_one(tmp_path: Path) -> None:
    [shown] = of("toml", page=CONFIGURATION)
    file = tmp_path / "worker.toml"
    file.write_text(shown.text, encoding="utf-8")
    config = StateConfig.load(file)
    assert config.memory.max_bytes == 256 * 2**20
    assert config.disk.fsync == "interval"


def test_the_fault_shown_is_the_one_that_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    [shown] = of("text", page=CONFIGURATION)
    monkeypatch.setenv("PERSISTENCE_MEMORY__MAX_BYTES", "lots")
    with pytest.raises(ConfigError) as caught:
        StateConfig.load()
    assert str(caught.value) == shown.text.strip()


# --- commands -----------------------------------------------------------------------------------


def test_the_commands_print_what_is_shown(clone: Path, environ: dict[str, str]) -> None:
    """In order, in one directory: each goes on with what the one before has left."""
    run: list[str] = []
    demos: list[str] = []
    for block in [*of("console"), *of("console", page=COMMANDS)]:
        prompt, _, shown = block.text.partition("\n")
        program, *words = shlex.split(prompt.removeprefix("$ "))
        if program != "persistence":
            continue
        if words == ["demo"]:  # it has tests of its own
            demos.append(shown)
            continue
        ran = subprocess.run(
            [sys.executable, "-m", "persistence.cli", *words],
            cwd=clone,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout
        assert labels(ran.stdout) == labels(shown), prompt
        run.append(words[0])
    assert run == ["replay", "inspect", "verify", "export", "import"]
    assert len(demos) == 2
    assert len(set(demos)) == 1, "both pages show the same one"


def test_every_command_is_in_both_pages() -> None:
    helped = subprocess.run(
        [sys.executable, "-m", "persistence.cli", "--help"],
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
    )
    commands = re.findall(r"^\W*(\w+)  ", helped.stdout.partition("Commands")[2], re.MULTILINE)
    assert len(commands) == 8
    table = re.findall(r"^\| `(\w+)", section("Command line"), re.MULTILINE)
    headings = re.findall(r"^## (\w+)$", COMMANDS, re.MULTILINE)
    assert sorted(table) == sorted(headings) == sorted(commands)


PROGRESS: Final = re.compile(r"^[\d,]+ (requests|sessions verified), [\d,]+/s \|")
"""How far a replay is: on a slow machine."""


def labels(output: str) -> list[str]:
    """Return what the lines say, without the values that another machine may have."""
    lines = [line for line in output.splitlines() if not PROGRESS.search(line)]
    texts = (line.strip().partition("  ")[0] for line in lines)
    return [re.sub(r"[\d,.]+( [KMG]?i?B)?", "0", text) for text in texts]


# --- facts --------------------------------------------------------------------------------------


def test_every_method_in_the_table_exists_and_none_is_missing() -> None:
    public = {name for name in vars(StateManager) if not name.startswith("_")}
    assert methods_in(section("Methods", API)) == public - {"open", "close"}
    some = methods_in(section("Reading and writing"))
    assert len(some) > 8
    assert some < public


def methods_in(text: str) -> set[str]:
    """Return the methods in the rows of the tables of a text."""
    rows = re.findall(r"^\| .*", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)\(", row)}


def test_every_method_beside_storing_is_in_its_table() -> None:
    public = {name for name in vars(Facilities) if not name.startswith("_")}
    assert methods_in(section("Methods beside storing", API)) == public


def test_every_facility_that_readme_names_exists() -> None:
    text = section("Requests, live resources, typed sessions")
    named = set(re.findall(r"`(?:async with )?state\.(\w+)\(", text))
    assert named >= {"request", "resources", "scratch_dir", "edit_typed"}
    assert named <= set(vars(Facilities))


def test_every_error_is_in_the_table() -> None:
    listed = set(re.findall(r"^\| `(\w+)`", section("Errors", API), re.MULTILINE))
    raised = {
        name
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, PersistenceError)
    }
    assert listed == raised - PLANNED - {"PersistenceError"}


def test_the_base_class_beside_an_error_is_its_own() -> None:
    pairs = re.findall(r"^\| `(\w+)` \((\w+)\)", section("Errors", API), re.MULTILINE)
    assert pairs
    for name, base in pairs:
        assert base in {kind.__name__ for kind in getattr(errors, name).__mro__}


def section(title: str, page: str = README) -> str:
    _, found, rest = page.partition(f"\n## {title}\n")
    assert found, title
    return rest.partition("\n## ")[0]
