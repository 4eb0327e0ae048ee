"""Every workload runs at tiny sizes, and what comes back is what was stored."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cli
from benchmarks.catalogue import WORKLOADS, chosen, fitting
from benchmarks.cli import main
from benchmarks.runner import Result, run
from benchmarks.sizes import FULL, QUICK, STANDARD, Sizes
from benchmarks.workload import Workload

PEERS = ("zict", "lmdb", "rocksdict", "diskcache", "cashews")
"""What comes with the extra 'bench'."""


def _run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    report = tmp_path / "report.json"
    code = main(
        ["--tiny", "--directory", str(tmp_path / "bench"), "--json", str(report), *arguments]
    )
    return code, json.loads(report.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run has told of a workload that tells the same each time."""
    code, report = _run(tmp_path_factory.mktemp("measured"), "--only", "hit-ratio")
    assert code == 0
    return report


@pytest.fixture
def _few_collections(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Here a full collection goes over thousands of tests; what measures it unfreezes them."""
    monkeypatch.setattr("benchmarks.resident._COLLECTIONS", 1)
    yield
    gc.freeze()


@pytest.mark.usefixtures("_few_collections")
@pytest.mark.parametrize("name", [workload.name for workload in WORKLOADS])
def test_every_contender_of_a_workload_has_a_number(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = _run(tmp_path, "--only", name)
    (workload,) = report["workloads"]
    assert {row["contender"] for row in workload["rows"] if _is_at_fault(row)} == set()
    for row in workload["rows"]:
        assert row["failure"] or row["metrics"], row
        assert all(metric["samples"] for metric in row["metrics"].values()), row
    engine = [row for row in workload["rows"] if row["role"] == "engine"]
    assert any(row["metrics"] for row in engine)
    if all(row["failure"] is None for row in workload["rows"]):
        assert all(bar["passed"] is not None for bar in workload["bars"])
    assert code == 0
    assert f"{name}: " in capsys.readouterr().out


def _is_at_fault(row: dict[str, Any]) -> bool:
    """Whether a row has no number though all that it needs is installed."""
    if row["failure"] is None:
        return False
    reason = row["failure"]["reason"]
    missing = [peer for peer in PEERS if find_spec(peer) is None]
    excused = any(f"{peer} cannot be imported" in reason for peer in missing)
    return not (excused or "this version has no policy" in reason)


def test_lag_is_sampled_beside_every_workload_that_is_not_about_it_or_about_size() -> None:
    silent = {workload.name for workload in WORKLOADS if not workload.observed}
    assert silent == {
        "memory",
        "hit-ratio",
        "loop-lag",
        "busy-checkpoint",
        "growth",
        "growth-index",
    }


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
    assert [workload.name for workload in chosen(["hot-"])] == [
        "hot-get",
        "hot-get-many",
        "hot-field",
        "hot-whole",
    ]


def test_a_whole_name_chooses_only_its_workload() -> None:
    assert [workload.name for workload in chosen(["update", "open"])] == ["update", "open"]


def test_a_workload_that_takes_long_is_left_out_unless_it_is_named() -> None:
    assert "growth-index" not in {each.name for each in fitting([], QUICK)}
    assert [each.name for each in fitting(["growth-index"], QUICK)] == ["growth-index"]
    assert "growth-index" in {each.name for each in fitting([], FULL)}


def test_a_run_is_compared_with_the_json_of_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], measured: dict[str, Any]
) -> None:
    report = copy.deepcopy(measured)
    old = tmp_path / "old.json"
    old.write_text(json.dumps(report), encoding="utf-8")
    code, _ = _run(tmp_path, "--only", "hit-ratio", "--compare", str(old))
    assert code == 0, "the same keys hit the same"
    assert "20 figures compared, 0 worse" in capsys.readouterr().out
    report["workloads"][0]["rows"][0]["metrics"]["50%"]["samples"] = [1000.0]
    old.write_text(json.dumps(report), encoding="utf-8")
    assert main(["compare", str(old), str(tmp_path / "report.json")]) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--only", "scan"], "the runs have no workload in common"),
        (["--quick", "--only", "hit-ratio"], "the sizes of the runs differ"),
    ],
)
def test_a_run_that_could_not_be_compared_is_not_begun(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    measured: dict[str, Any],
    arguments: list[str],
    reason: str,
) -> None:
    (tmp_path / "report.json").write_text(json.dumps(measured), encoding="utf-8")
    capsys.readouterr()
    if "--quick" not in arguments:
        arguments = ["--tiny", *arguments]
    assert main(["run", *arguments, "--compare", str(tmp_path / "report.json")]) == 2
    seen = capsys.readouterr()
    assert reason in seen.err
    assert seen.out == "", "nothing was measured"


@pytest.mark.parametrize("share", ["-1", "1", "nan", "much"])
def test_a_tolerance_is_a_share(share: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "--tolerance", share])
    assert ended.value.code == 2


def test_what_was_done_before_an_interruption_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(workload: Workload, *about: Any) -> Result:
        if workload.name == "hit-ratio":
            raise KeyboardInterrupt
        return run(workload, *about)

    monkeypatch.setattr(cli, "run", interrupted)
    code, report = _run(tmp_path, "--only", "scan", "--only", "hit-ratio")
    assert code == 130
    assert [workload["name"] for workload in report["workloads"]] == ["scan"]
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"], "no files of its own"
    assert main(["--tiny", "--directory", str(tmp_path / "bench"), "--only", "hit-ratio"]) == 130


@pytest.mark.parametrize("option", ["--json", "--html"])
@pytest.mark.parametrize("place", [".", "missing/report"])
def test_a_report_that_cannot_be_written_ends_a_run_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, place: str
) -> None:
    assert main(["--tiny", "--only", "hit-ratio", option, str(tmp_path / place)]) == 2
    seen = capsys.readouterr()
    assert str(tmp_path) in seen.err
    assert seen.out == "", "nothing was measured"


@pytest.mark.parametrize("sizes", [QUICK, STANDARD, FULL])
def test_a_buffer_of_zict_has_the_memory_that_the_engine_has(sizes: Sizes) -> None:
    (workload,) = chosen(["relaxed-update"])
    rows = {row.name: row for row in workload.contenders(sizes)}
    buffered: Any = rows["zict.Buffer over File"]
    assert buffered.store.resident_count >= sizes.update_sessions, "the engine has all in memory"
    engine: Any = rows["persistence"]
    assert buffered.update_count == engine.update_count
