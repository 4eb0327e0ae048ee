from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.results import ResultsError, read
from tests.benchmarks.runs import row, run, workload

ENGINE = row("persistence", 100.0, 200.0, 300.0, role="engine")


def test_results_come_back_from_their_json(tmp_path: Path) -> None:
    made = run(workload(ENGINE, row("LMDB", 50.0, 100.0, 100.0)))
    path = tmp_path / "run.json"
    path.write_text(made.as_json(), encoding="utf-8")
    assert read(path) == made
    assert json.loads(made.as_json())["schema_version"] == 1


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"schema_version": None}, "schema_version"),
        ({"workloads": [{"name": "update"}]}, "workloads.0.definition"),
    ],
)
def test_a_file_of_another_version_is_refused(
    tmp_path: Path, change: dict[str, object], place: str
) -> None:
    path = tmp_path / "run.json"
    content = json.loads(run(workload(ENGINE)).as_json()) | change
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ResultsError, match=place):
        read(path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["sizes"], {}),
        (["idle", "count"], 0),
        (["workloads", 0, "units"], []),
        (["workloads", 0, "rows", 0, "durability"], "most things"),
        (["workloads", 0, "rows", 0, "metrics", "rate", "samples"], []),
    ],
)
def test_a_file_of_which_no_report_can_be_made_is_refused(
    tmp_path: Path, place: list[str | int], value: object
) -> None:
    content = json.loads(run(workload(ENGINE)).as_json())
    part = content
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ResultsError, match=r"\.".join(map(str, place))):
        read(path)


def test_a_file_without_a_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    content = json.loads(run(workload(ENGINE)).as_json())
    del content["schema_version"]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ResultsError, match="schema_version: Field required"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(ResultsError, match=r"run\.json"):
        read(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"nothing\.json"):
        read(tmp_path / "nothing.json")


def test_the_advantage_is_the_median_of_the_ratios_of_the_repetitions() -> None:
    slow = row("LMDB", 50.0, 100.0, 300.0)
    assert workload(ENGINE, slow).advantage(slow) == 2.0


def test_where_less_is_better_the_advantage_is_the_inverse() -> None:
    slow = row("LMDB", 200.0, 400.0, 600.0)
    found = workload(ENGINE, slow, better="less")
    assert found.advantage(slow) == 2.0
    assert not found.is_lost(slow)


def test_a_peer_that_is_ahead_is_a_lost_row() -> None:
    fast = row("dict", 1000.0, 1000.0, 1000.0)
    found = workload(ENGINE, fast, row("missing"))
    assert [each.contender for each in found.rows if found.is_lost(each)] == ["dict"]


def test_a_limit_is_never_a_lost_row() -> None:
    limit = row("bare write", 1000.0, 1000.0, 1000.0, role="limit")
    assert not workload(ENGINE, limit).is_lost(limit)


def test_rows_are_compared_with_the_engine_at_the_same_size() -> None:
    small, large = (
        ENGINE.model_copy(update={"size": size, "contender": f"persistence, {size}"})
        for size in (10.0, 100.0)
    )
    peer = row("LMDB", 100.0, 100.0, 100.0).model_copy(update={"size": 100.0})
    assert workload(small, large, peer).reference(peer) is large
