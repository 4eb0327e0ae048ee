"""Real processes, killed with SIGKILL at named points and at random times, life after life.

One directory lives through all of it, so that kills hit openings after kills, merges, checkpoints
and clean closes. Each life begins with a comparison of every session with its history.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Final

from persistence import StateConfig, StateManager
from persistence.disk.inspect import scan_directory
from tests import encryption
from tests.crash_nursery import SESSIONS
from tests.crashes import History, Nursery, check_by_opening, work_and_check
from tests.faults.killpoints import POINTS

_LIFE_SECONDS: Final = 0.5
"""At most, for one that is killed at a random time."""
_POINT_SECONDS: Final = 6.0
"""For a worker that is to reach a point."""
_MOST_TIMES: Final = 3
_MODES: Final = ("always", "always", "interval", "never")


class Kills:
    """Kills workers on a directory and checks what is left.

    Args:
        nursery: raises them.
        directory: where they work.
        seed: of the times and the order.

    Attributes:
        at: how many died at each point.
        at_random: how many at a random time.
        acknowledged: how many updates they were told are done.
    """

    def __init__(self, nursery: Nursery, directory: Path, seed: int) -> None:
        self.at: Counter[str] = Counter()
        self.at_random = 0
        self._nursery = nursery
        self._directory = directory
        self._random = Random(seed)
        self._histories = {session_id: History() for session_id in SESSIONS}
        self._made: list[str] = []
        self._lives = 0

    @property
    def total(self) -> int:
        """How many were killed."""
        return self.at.total() + self.at_random

    @property
    def acknowledged(self) -> int:
        """How many updates were acknowledged."""
        return sum(history.acknowledged for history in self._histories.values())

    def next_point(self) -> str:
        """Return a point that has been hit least."""
        least = min(self.at[name] for name in POINTS)
        return self._random.choice([name for name in POINTS if self.at[name] == least])

    def one(self, point: str | None) -> None:
        """Raise a worker and kill it: at a point if it gets there, else after a random time."""
        if point is not None and point.startswith("torn tail"):
            self._live({"kill": ["append torn", 1], "seconds": _POINT_SECONDS})
        elif point == "snapshot used up":
            self._live({"closes": True, "seconds": 2 * _LIFE_SECONDS})
        if point is None:
            self._live({"closes": self._random.random() < 0.25})
            return
        is_at_opening = point.startswith(("torn tail", "recovery", "lock", "snapshot"))
        order: dict[str, Any] = {
            "kill": [point, 1 if is_at_opening else self._random.randint(1, _MOST_TIMES)],
            "seconds": _POINT_SECONDS,
        }
        if point.startswith("snapshot") and point != "snapshot used up":
            order |= {"closes": True, "seconds": 2 * _LIFE_SECONDS}
        if "chunk" in point or "checkpoint" in point:
            order["checkpoints"] = True
        self._live(order)

    def _live(self, wanted: dict[str, Any]) -> None:
        self._lives += 1
        order = {
            "directory": str(self._directory),
            "disk": {"fsync": self._random.choice(_MODES)},
            "filler_bytes": 6_000,
            "run": self._lives,
            "seconds": self._random.uniform(0.01, _LIFE_SECONDS),
            "closes": False,
            "checkpoints": self._random.random() < 0.3,
            **wanted,
        }
        others: list[list[Any]] = []
        code, _ = work_and_check(self._nursery, order, self._histories, others)
        assert code in (None, 0), f"a worker failed: {order}"
        reached = [words[1] for words in others if words[0] == "point"]
        self._made += [words[1] for words in others if words[0] == "made"]
        if reached:
            self.at[reached[0]] += 1
        elif code is None:
            self.at_random += 1

    def run(self, kills: int, go_on: Callable[[], bool] = lambda: True) -> None:
        """Kill so many workers: three of four at a point."""
        start = self.total
        while self.total - start < kills and go_on():
            self.one(self.next_point() if self._random.random() < 0.75 else None)

    async def check(self, scratch: Path) -> None:
        """Look at everything once more, as whoever verifies and restores does; in a copy."""
        reports = [report for report, _ in scan_directory(str(self._directory))]
        assert not any(report.damages for report in reports), "a kill damages nothing"
        await check_by_opening(self._directory, scratch / "copy", self._histories)
        if self._made:
            await self._check_checkpoints(scratch / "restored")

    async def _check_checkpoints(self, directory: Path) -> None:
        shutil.copytree(self._directory, directory)
        store = Path(f"{self._directory}-checkpoints")
        shutil.copytree(store, f"{directory}-checkpoints")
        disk = {"disk": {"path": str(directory)}}
        config = StateConfig.model_validate({**disk, **encryption.sections()})
        async with StateManager(config=config) as state:
            listed = {info.id: info for info in await state.list_checkpoints()}
            assert max(self._made) in listed, "an acknowledged checkpoint is there"
            assert all(info.problem is None for info in listed.values())
            for checkpoint_id in sorted(listed):
                restored = await state.restore_checkpoint(checkpoint_id)
                assert (restored.id, restored.skipped) == (checkpoint_id, ())
                assert len(await state.get_active_sessions()) == restored.sessions
