from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from benchmarks.bars import Bar, Kind
from benchmarks.contender import (
    NOTHING,
    PROCESS_CRASH,
    RATE,
    SYNCED,
    Contender,
    Metrics,
    WrongResultError,
    check,
)
from benchmarks.engine.lifecycle import Scan
from benchmarks.engine.shared import FullCheckpoint, RestoreCheckpoint
from benchmarks.engine.update import LoneUpdate
from benchmarks.isolation import Command, Isolated
from benchmarks.optional import UnavailableError, load
from benchmarks.runner import Result, run
from benchmarks.scratch import Scratch
from benchmarks.sizes import TINY, Sizes
from benchmarks.workload import Workload


@dataclass
class Steady(Contender):
    name: str
    rate: float
    fresh_process: bool = False

    async def open(self, directory: Path) -> None:
        self.measured = 0
        (directory / "opened").touch()

    async def measure(self) -> Metrics:
        self.measured += 1
        return {"rate": self.rate + self.measured, "pid": float(os.getpid())}


@dataclass
class WrongAtTheEnd(Steady):
    async def close(self) -> None:
        check(False, "not everything was there")


@dataclass
class Server(Contender):
    """Has something that stays when nobody ends it."""

    name: str = "server"
    signals: bool = False

    async def open(self, directory: Path) -> None:
        self.lock = directory / "running"
        self.lock.touch()

    async def measure(self) -> Metrics:
        if self.signals:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)
        return {"rate": 1.0}

    async def close(self) -> None:
        self.lock.unlink()


@dataclass
class Broken(Contender):
    name: str

    async def open(self, directory: Path) -> None:
        if self.name == "missing":
            load("a_module_that_nobody_has")

    async def measure(self) -> Metrics:
        if self.name == "wrong":
            raise WrongResultError("it said 5")
        if self.name == "dead":
            os._exit(3)
        raise ValueError("boom")


def _run(
    tmp_path: Path, *contenders: Contender, repetitions: int = 3, sizes: Sizes = TINY
) -> Result:
    def chosen(sizes: Sizes) -> list[Contender]:
        return list(contenders)

    workload = Workload(
        "hot-get",
        (RATE,),
        chosen,
        (Bar("rate", Kind.RATIO_AT_LEAST, 1.5, "slow", ours="quick"),),
        repetitions=lambda sizes: repetitions,
    )
    with Scratch(tmp_path / "bench") as scratch:
        return run(workload, sizes, scratch, lambda text: None)


def test_each_contender_measures_in_a_process_of_its_own(tmp_path: Path) -> None:
    result = _run(tmp_path, Steady("quick", 200), Steady("slow", 100))
    quick, slow = result.rows
    assert quick.values("rate") == [202, 203, 204]  # the first is not recorded
    assert slow.values("rate") == [102, 103, 104]
    pids = {*quick.values("pid"), *slow.values("pid"), os.getpid()}
    assert len(pids) == 3
    assert [verdict.passed for verdict in result.verdicts] == [True]
    assert not result.broken


def test_what_takes_long_is_repeated_no_more_than_its_median_needs(tmp_path: Path) -> None:
    in_a_hurry = replace(TINY, repeated_seconds=0.0)
    result = _run(tmp_path, Steady("quick", 200), repetitions=9, sizes=in_a_hurry)
    assert result.rows[0].values("rate") == [202, 203, 204]


def test_a_fresh_contender_gets_a_new_process_each_time(tmp_path: Path) -> None:
    result = _run(tmp_path, Steady("quick", 200, fresh_process=True))
    assert result.rows[0].values("rate") == [201, 201, 201]
    assert len(set(result.rows[0].values("pid"))) == 3


def test_what_is_observed_of_a_fresh_contender_is_its_last_repetition(tmp_path: Path) -> None:
    result = _run(tmp_path, Steady("quick", 200, fresh_process=True), repetitions=1)
    assert result.rows[0].values("rate") == [201]
    assert result.rows[0].observed is not None
    wrong = _run(tmp_path, WrongAtTheEnd("quick", 200, fresh_process=True))
    assert wrong.rows[0].values("rate") == []


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("missing", "unavailable", "a_module_that_nobody_has cannot be imported"),
        ("wrong", "wrong", "it said 5"),
        ("dead", "crashed", "its process ended with 3"),
        ("raising", "crashed", "ValueError: boom"),
    ],
)
def test_a_contender_that_fails_says_why_and_the_others_go_on(
    tmp_path: Path, name: str, kind: str, reason: str
) -> None:
    result = _run(tmp_path, Steady("quick", 200), Broken(name), repetitions=1)
    failure = result.rows[1].failure
    assert failure is not None
    assert failure.kind == kind
    assert reason in failure.reason
    assert result.rows[0].values("rate") == [202]
    assert result.broken is (kind != "unavailable")
    assert result.verdicts[0].passed is None


@dataclass
class WrongLater(Steady):
    async def measure(self) -> Metrics:
        metrics = await super().measure()
        check(self.measured < 3, "it said 5")
        return metrics


def test_a_contender_that_answers_wrongly_once_has_no_number(tmp_path: Path) -> None:
    result = _run(tmp_path, WrongLater("quick", 200), Steady("slow", 100))
    assert result.rows[0].values("rate") == []
    assert result.rows[1].values("rate") == [102, 103, 104]
    assert [verdict.passed for verdict in result.verdicts] == [None]
    assert result.broken


def test_a_contender_is_closed_when_the_runner_has_died(tmp_path: Path) -> None:
    host = Isolated(Server(), tmp_path)
    assert host.ask(Command("open")) == {}
    assert (tmp_path / "running").exists()
    host._pipe.close()
    host._process.join(60)
    assert host._process.exitcode == 0
    assert not (tmp_path / "running").exists()


def test_a_contender_is_closed_when_it_is_interrupted_at_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    host = Isolated(Server(signals=True), tmp_path)
    assert host.ask(Command("open")) == {}
    host._pipe.send(Command("measure"))
    host._process.join(60)
    assert host._process.exitcode == 0
    assert not (tmp_path / "running").exists()
    assert "Traceback" not in capfd.readouterr().err


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    _run(tmp_path, Steady("quick", 200), repetitions=1)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_somebody_else_uses_stays(tmp_path: Path) -> None:
    base = tmp_path / "bench"
    base.mkdir()
    (base / "notes").touch()
    _run(tmp_path, Steady("quick", 200), repetitions=1)
    assert [path.name for path in base.iterdir()] == ["notes"]


def test_a_missing_module_is_a_reason_not_a_crash() -> None:
    with pytest.raises(UnavailableError, match="cannot be imported"):
        load("a_module_that_nobody_has")


def test_the_event_loop_lag_is_what_a_sleep_took_too_long() -> None:
    from benchmarks.lag import lag_metrics, sample_lag

    metrics = lag_metrics(asyncio.run(sample_lag(20)))
    assert 0 <= metrics["p50"] <= metrics["p99"] <= metrics["p99.9"] <= metrics["max"]


async def test_no_row_of_the_engine_claims_more_than_its_log_keeps(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="claims too much"):
        await LoneUpdate(1).open_state(tmp_path, fsync="never")


@pytest.mark.parametrize(
    ("contender", "durability"),
    [(Scan(1), PROCESS_CRASH), (FullCheckpoint(1), NOTHING), (RestoreCheckpoint(1), SYNCED)],
)
def test_a_row_survives_what_it_is_configured_to(contender: Contender, durability: str) -> None:
    assert contender.durability == durability
