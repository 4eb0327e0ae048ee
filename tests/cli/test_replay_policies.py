"""``persistence replay --policy all``: the curves of a log."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cli.command import Command
from tests.cli.generated import write_log


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_log(tmp_path / "access.log", 600)


def test_every_policy_has_a_curve_that_ends_where_everything_fits(
    command: Command, log: Path, temporary: Path
) -> None:
    result = command("replay", log, "--policy", "all", "--json")
    assert result.code == 0, result.err
    curves = result.json
    assert curves["requests"] == 600
    assert set(curves["policies"]) == {"lru", "sieve", "s3fifo", "adaptive"}
    most = 1 - curves["sessions"] / 600
    for points in curves["policies"].values():
        assert [point["share"] for point in points] == [0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0]
        assert points[-1]["memory_bytes"] == curves["sessions_bytes"]
        assert points[-1]["hit_ratio"] == pytest.approx(most)
        assert all(0 <= point["byte_hit_ratio"] <= 1 for point in points)
        assert points[0]["hit_ratio"] < points[-1]["hit_ratio"]
    assert list(temporary.iterdir()) == [], "nothing is stored"


def test_the_table_has_a_line_for_each_budget(command: Command, log: Path) -> None:
    result = command("replay", log, "--policy", "all", "--limit", 300)
    assert result.code == 0
    assert "300 requests" in result.out
    assert "100%" in result.out
    assert "adaptive" in result.out


def test_a_budget_that_is_given_is_tried_beside_the_others(command: Command, log: Path) -> None:
    plain = command("replay", log, "--policy", "all", "--json").json
    curves = command("replay", log, "--policy", "all", "--memory", "9KiB", "--json").json
    for name, points in curves["policies"].items():
        budgets = [point["memory_bytes"] for point in points]
        assert budgets == sorted(budgets)
        (given,) = [point for point in points if point not in plain["policies"][name]]
        assert given["memory_bytes"] == 9 * 1024
        assert given["share"] == 9 * 1024 / curves["sessions_bytes"]
    out = command("replay", log, "--policy", "all", "--memory", "1GiB").out
    assert "1.0 GiB" in out, "more than all of them need is tried as well"


def test_lines_that_are_no_requests_are_counted(command: Command, log: Path) -> None:
    with log.open("a") as file:
        file.write("no request\n")
    skipped = command("replay", log, "--policy", "all", "--json").json["skipped_lines"]
    assert skipped > 0
    assert f"no requests: {skipped}" in command("replay", log, "--policy", "all").out


@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_the_curves_are_drawn(
    command: Command, log: Path, tmp_path: Path, suffix: str, start: bytes
) -> None:
    plot = tmp_path / f"curves.{suffix}"
    assert command("replay", log, "--policy", "all", "--plot", plot).code == 0
    assert plot.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "x.svg"], "it needs --policy all"),
        (["--policy", "all", "--plot", "x.doc"], "must end in one of"),
        (["--policy", "all", "--plot", "/nowhere/x.svg"], "/nowhere/x.svg: cannot be written"),
        (["--policy", "all", "--redis", "redis://x"], "leave out"),
        (["--policy", "all", "--workers", "2"], "leave out"),
        (["--policy", "all", "--namespace", "shop"], "leave out"),
        (["--policy", "all", "--fsync", "never"], "leave out --fsync\n"),
        (["--policy", "all", "--segment", "1MiB"], "leave out --segment\n"),
        (["--policy", "all", "--concurrency", "64"], "leave out --concurrency\n"),
        (["--policy", "all", "--redis-write", "behind"], "leave out --redis-write\n"),
        (["--policy", "mru"], "memory.policy"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    command: Command, log: Path, arguments: list[str], message: str
) -> None:
    result = command("replay", log, *arguments)
    assert result.code != 0
    assert message in result.err
    assert "Traceback" not in result.err


def test_a_log_without_requests_has_no_curves(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello\n")
    result = command("replay", path, "--policy", "all")
    assert result.code == 1
    assert "no line of the log is a request" in result.err


def test_without_matplotlib_it_says_what_to_install(
    command: Command, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = command("replay", log, "--policy", "all", "--plot", "x.svg")
    assert result.code == 1
    assert "persistence-engine[plot]" in result.err


def test_the_curve_tells_what_the_engine_hits_in_that_budget(
    command: Command, tmp_path: Path
) -> None:
    log = write_log(tmp_path / "access.log", 1500, clients=200)
    budget = ["--memory", "40KiB"]
    curves = command("replay", log, "--policy", "all", *budget, "--json").json
    one_by_one = ["--concurrency", "1", "--fsync", "never"]
    report = command("replay", log, *budget, *one_by_one, "--json").json
    (told,) = [p for p in curves["policies"]["lru"] if p["memory_bytes"] == 40 * 1024]
    misses = report["sessions"] + report["restored"]
    assert 1 - misses / report["requests"] == pytest.approx(told["hit_ratio"], abs=0.02)
