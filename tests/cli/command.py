"""Runs the command line inside the test's process, the way a shell would see it."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from persistence.cli.app import run_command
from persistence.disk.filenames import LOCK


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def assert_refused(self, *words: str, code: int = 1) -> None:
        """One line on stderr that says all of `words`, nothing on stdout, the exit code."""
        assert self.code == code, self
        assert self.out == ""
        assert self.err.startswith("persistence: ")
        assert self.err.count("\n") == 1
        assert "internal error" not in self.err
        for word in words:
            assert word in self.err


Command = Callable[..., Result]


def command_with(capsys: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs the command line with the given words."""

    def run(*words: object) -> Result:
        capsys.readouterr()
        code = run_command([str(word) for word in words])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory, as a worker that has it open does."""
    with (directory / LOCK).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
