"""Every workload runs at tiny sizes, and what comes back is what was stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.catalogue import WORKLOADS, chosen
from benchmarks.cli import main

pytest.importorskip("zict", reason="zict is a peer; it comes with the extra 'bench'")
pytest.importorskip("lmdb", reason="lmdb is a peer; it comes with the extra 'bench'")


def _run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    report = tmp_path / "report.json"
    code = main(
        ["--tiny", "--directory", str(tmp_path / "bench"), "--json", str(report), *arguments]
    )
    return code, json.loads(report.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [workload.name for workload in WORKLOADS])
def test_every_contender_of_a_workload_has_a_number(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = _run(tmp_path, "--only", name)
    (workload,) = report["workloads"]
    assert {row["contender"]: row["failure"] for row in workload["rows"]} == {
        row["contender"]: None for row in workload["rows"]
    }
    for row in workload["rows"]:
        assert row["metrics"], row
        assert all(metric["samples"] for metric in row["metrics"].values()), row
    assert all(bar["passed"] is not None for bar in workload["bars"])
    assert code == 0
    assert f"{name}: " in capsys.readouterr().out


def test_every_workload_is_defined_in_one_line() -> None:
    for workload in WORKLOADS:
        assert workload.definition
        assert "\n" not in workload.definition


def test_a_workload_that_does_not_exist_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--tiny", "--directory", str(tmp_path), "--only", "nonsense"]) == 2
    assert "there is no workload 'nonsense'" in capsys.readouterr().err


def test_a_prefix_chooses_several_workloads() -> None:
    assert [workload.name for workload in chosen(["hot"])] == ["hot-get", "hot-field", "hot-whole"]
