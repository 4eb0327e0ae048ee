"""Nurseries: processes that fork workers, so that a worker costs no start of an interpreter.

A nursery is a script that reads orders from standard input and answers each with lines of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[1]


class NurseryProcess:
    """A running nursery; it ends when it is closed.

    Args:
        script: what it runs.
        arguments: of the script.
    """

    def __init__(self, script: Path, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its standard input, which ends it, and wait for that."""
        self._process.__exit__(None, None, None)

    def answers(self, order: dict[str, Any]) -> Iterator[Any]:
        """Give an order; yield what is answered, line by line, for as long as the caller asks."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            yield json.loads(line)
        raise AssertionError("the nursery died")

    def answer(self, order: dict[str, Any]) -> Any:
        """Give an order that is answered with one line; return that."""
        return next(self.answers(order))
