from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.contender import WrongResultError
from benchmarks.fleet import FleetUpdate, Member


class Counter(Member):
    """Counts in a file, by appending."""

    def __init__(self, *, forgets: bool = False) -> None:
        self.forgets = forgets

    async def open(self, directory: Path, number: int, session_count: int) -> None:
        self._path = directory / "count"
        self._pid = os.getpid()
        with self._path.open("ab"):
            pass

    async def update(self, keys: list[str]) -> None:
        with self._path.open("ab") as file:
            file.write(b"." * (len(keys) - self.forgets))

    async def visits(self, keys: list[str]) -> int:
        return self._path.stat().st_size

    async def close(self) -> None:
        return


async def test_each_member_is_a_process_and_no_update_is_lost(tmp_path: Path) -> None:
    fleet = FleetUpdate(Counter(), 3, 10, 2)
    await fleet.open(tmp_path)
    try:
        metrics = await fleet.measure()
    finally:
        await fleet.close()
    assert metrics["rate"] > 0
    assert (tmp_path / "count").stat().st_size == 10


async def test_a_lost_update_is_a_wrong_result(tmp_path: Path) -> None:
    fleet = FleetUpdate(Counter(forgets=True), 3, 10, 0)
    await fleet.open(tmp_path)
    with pytest.raises(WrongResultError, match="1 updates were lost"):
        await fleet.measure()
    await fleet.close()
