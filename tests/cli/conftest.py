"""Fixtures of the command line's tests."""

from __future__ import annotations

import pytest

from tests.cli.command import Command, command_with


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line, as a function of its words."""
    return command_with(capsys)
