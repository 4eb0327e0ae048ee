"""Managers for threads, closed at the end of the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from persistence import Clock, ManualClock, sync
from tests.engine import ScriptedFiles, config_for

Opened = Callable[..., sync.StateManager]


@pytest.fixture
def opened(tmp_path: Path, clock: ManualClock, files: ScriptedFiles) -> Iterator[Opened]:
    """Open managers; called with the sections of a configuration, and `path` or `clock`."""
    managers: list[sync.StateManager] = []

    def opened(
        *, path: Path | None = None, clock: Clock = clock, **sections: dict[str, Any]
    ) -> sync.StateManager:
        config = config_for(path or tmp_path / "state", **sections)
        state = sync.StateManager(config=config, clock=clock, files=files)
        state.open()
        managers.append(state)
        return state

    yield opened
    files.open_gates()
    for state in managers:
        state.close()


@pytest.fixture
def state(opened: Opened) -> sync.StateManager:
    """An open manager with the default configuration."""
    return opened()
