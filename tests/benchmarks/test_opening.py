"""What the workload "open" measures is the opening, and nothing that comes before any first one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import opened
from benchmarks.engine.opening import Build, Opening
from benchmarks.peers.driven import Reopen
from benchmarks.peers.sqlite import Sqlite


async def test_the_engine_is_imported_before_its_opening_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Build(20)
    await build.open(tmp_path)
    await build.measure()
    await build.close()
    directories: list[Path] = []
    make = opened._manager

    def noted(directory: Path, **options: Any) -> Any:
        directories.append(directory)
        return make(directory, **options)

    monkeypatch.setattr(opened, "_manager", noted)
    opening = Opening("after a clean close", 20)
    await opening.open(tmp_path)
    assert directories == [tmp_path / "empty"]
    assert set(await opening.measure()) == {"seconds", "rss"}
    assert directories == [tmp_path / "empty", tmp_path]
    await opening.close()


@dataclass
class NotedSqlite(Sqlite):
    directories: list[str] = field(default_factory=list)

    def connect(self, directory: Path) -> None:
        self.directories.append(directory.name)
        super().connect(directory)


async def test_a_peer_is_imported_before_its_opening_is_measured(tmp_path: Path) -> None:
    for _ in range(2):  # a process of its own each time, and the directory of the one before
        store = NotedSqlite()
        reopening = Reopen(store, 20)
        await reopening.open(tmp_path)
        before = len(store.directories)
        assert before
        await reopening.measure()
        assert store.directories[before:] == ["SQLite-(WAL)"]
        await reopening.close()
