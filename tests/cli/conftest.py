"""Fixtures of the command line's tests."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from persistence.disk.files import Files
from tests.cli.command import Command, command_with


@pytest.fixture(autouse=True)
def _no_power_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the waiting for the disk: what a command does in this process needs no sync."""
    for name in ("sync", "sync_data", "sync_directory"):
        monkeypatch.setattr(Files, name, lambda *_: None)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line, as a function of its words."""
    return command_with(capsys)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which temporary directories are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder
