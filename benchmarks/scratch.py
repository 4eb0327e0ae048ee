"""Directories for the runs: on a real disk, and gone afterwards."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEFAULT = Path(".bench")
"""Below the current directory: a system's temporary directory is often in memory."""


class Scratch:
    """Where a run keeps its files. A context manager that removes everything it made."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._made_base = False

    def __enter__(self) -> Scratch:
        self._made_base = not self._base.exists()
        self._base.mkdir(parents=True, exist_ok=True)
        # Its own subdirectory: two runs at once do not remove each other's files.
        self.path = Path(tempfile.mkdtemp(prefix="run-", dir=self._base))
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._made_base:
            try:
                self._base.rmdir()
            except OSError:
                return  # another run uses it, or somebody keeps files in it

    @contextmanager
    def directory(self, name: str) -> Iterator[Path]:
        """Make a directory for one workload, removed at the end of the block."""
        path = self.path / name
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
