"""The demo, shortened, and the ledger that judges it."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from persistence.cli import demo, demo_parent
from persistence.cli.demo_workload import ACK, Ledger, count_up, data_of
from persistence.cli.failure import CommandError
from tests.cli.command import Command


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_the_demo_loses_nothing_and_leaves_nothing_behind(
    command: Command, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "KILLS", 2)
    monkeypatch.setattr(demo_parent, "_LOAD_SECONDS", (0.1, 0.3))
    monkeypatch.setattr(demo_parent, "_MEASURE_SECONDS", 0.05)
    result = command("demo")
    assert result.code == 0, result
    assert "Every acknowledged update is there." in result.out
    assert result.err.count("SIGKILL after") == 2
    assert list(temporary.iterdir()) == []


def test_a_loss_is_told_and_fails(
    command: Command, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Ledger.take

    def take_and_overstate(ledger: Ledger, acknowledgements: bytes) -> None:
        take(ledger, acknowledgements)
        if 0 <= ledger.counts[5] < 1_000_000:
            ledger.counts[5] += 1_000_000

    monkeypatch.setattr(demo, "KILLS", 1)
    monkeypatch.setattr(demo_parent, "_LOAD_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(demo_parent, "_MEASURE_SECONDS", 0.01)
    monkeypatch.setattr(Ledger, "take", take_and_overstate)
    result = command("demo")
    assert result.code == 1
    assert "LOST: 1 sessions" in result.out
    assert "player-00005: holds" in result.out


def test_a_worker_that_ends_by_itself_is_an_error(
    command: Command, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    result = command("demo")
    assert result.code == 1
    assert "the worker ended by itself, with exit code 1" in result.err
    assert list(temporary.iterdir()) == []


def test_a_silent_worker_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_parent, "_SILENCE_SECONDS", 0.01)
    read, write = os.pipe()
    with (
        os.fdopen(read, "rb", buffering=0) as pipe,
        os.fdopen(write, "wb"),
        pytest.raises(CommandError, match="no progress"),
    ):
        next(demo_parent._chunks(pipe))


def acked(*counts: tuple[int, int]) -> Ledger:
    ledger = Ledger.of(3)
    ledger.take(b"".join(ACK.pack(number, count) for number, count in counts))
    return ledger


def test_the_ledger_accepts_what_was_acknowledged_or_submitted_next() -> None:
    ledger = acked((0, 0), (0, 1), (1, 0))
    assert ledger.acknowledged == 3
    assert not ledger.is_complete()
    assert ledger.check(0, data_of(0, 1)) is None
    assert ledger.check(1, data_of(1, 1)) is None
    assert ledger.check(2, None) is None
    assert ledger.check(2, data_of(2, 0)) is None
    assert ledger.counts == [1, 1, 0]
    assert ledger.is_complete()


def test_the_ledger_sees_losses_and_phantoms() -> None:
    ledger = acked((0, 5))
    assert "missing, 5 was acknowledged" in (ledger.check(0, None) or "")
    assert "holds 4" in (ledger.check(0, data_of(0, 4)) or "")
    assert "holds 7" in (ledger.check(0, data_of(0, 7)) or "")
    assert "holds None" in (ledger.check(0, {}) or "")
    assert "not those of count 5" in (ledger.check(0, {**data_of(0, 5), "payload": "x"}) or "")
    assert "not those of count 5" in (ledger.check(0, {**data_of(0, 5), "more": 1}) or "")
    assert "holds 1" in (ledger.check(1, data_of(1, 1)) or "")


def test_the_worker_counts_from_any_count_to_the_next() -> None:
    data = data_of(3, 7)
    count_up(data, number=3)
    assert data == data_of(3, 8)
