from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import pytest

import persistence

ROOT = Path(__file__).parent.parent
DISTRIBUTION = "persistence-engine"


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project: dict[str, Any] = table["project"]
    return project


def test_the_installed_version_is_the_one_of_the_project(project: dict[str, Any]) -> None:
    assert metadata.version(DISTRIBUTION) == project["version"]


def test_the_changelog_has_an_entry_for_the_version(project: dict[str, Any]) -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {project['version']}\n" in changelog


def test_the_package_is_typed() -> None:
    assert resources.files("persistence").joinpath("py.typed").is_file()


def test_every_public_name_is_there() -> None:
    assert [name for name in persistence.__all__ if not hasattr(persistence, name)] == []
    assert len(set(persistence.__all__)) == len(persistence.__all__)


def test_the_console_script_is_the_command_line() -> None:
    [script] = [
        entry
        for entry in metadata.entry_points(group="console_scripts")
        if entry.dist is not None and entry.dist.name == DISTRIBUTION
    ]
    assert (script.name, script.value) == ("persistence", "persistence.cli:main")
    assert callable(script.load())


def test_the_licence_is_shipped(project: dict[str, Any]) -> None:
    assert project["license"] == "Apache-2.0"
    for name in project["license-files"]:
        assert (ROOT / name).read_text(encoding="utf-8").lstrip().startswith("Apache License")


def test_the_scripts_of_the_shared_tier_are_in_the_wheel(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="builds the wheel: pip install hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    scripts = (ROOT / "persistence" / "remote" / "scripts").glob("*.lua")
    assert {f"persistence/remote/scripts/{script.name}" for script in scripts} <= set(names)
    assert sum(name.endswith(".lua") for name in names) >= 2
    statements = {path.name for path in (ROOT / "persistence" / "remote" / "sql").glob("*.sql")}
    assert {f"persistence/remote/sql/{name}" for name in statements} <= set(names)
    assert statements == {"commit.sql", "schema.sql"}
