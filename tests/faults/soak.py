"""Hours of mixed work with a kill every 30 seconds: nothing is lost, and nothing grows.

The worker is that of the kills (`tests.crash_nursery`): creations, updates, edits, ends, spills and
checkpoints in a small memory. Every second it says how many files it has open and how much memory
it takes; both must be flat within a life, and from the first life to the last.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from statistics import median
from typing import Final

from persistence.disk.inspect import scan_directory
from tests.crash_nursery import SESSIONS
from tests.crashes import History, Nursery, check_by_opening, work_and_check

_WARM_SECONDS: Final = 8
"""After which a life has its caches and its allocator's arenas."""
_MORE_FILES: Final = 6
_MORE_BYTES: Final = 16 * 2**20
_MOST_DISK_BYTES: Final = 64 * 2**20


class Soak:
    """One directory through many lives.

    Args:
        nursery: raises the workers.
        directory: where they work.
        seed: of what they do.

    Attributes:
        lives: how many there were.
    """

    def __init__(self, nursery: Nursery, directory: Path, seed: int) -> None:
        self.lives = 0
        self._nursery = nursery
        self._directory = directory
        self._random = Random(seed)
        self._run = seed * 10_000
        self._histories = {session_id: History() for session_id in SESSIONS}
        self._ends: list[tuple[float, float]] = []
        self._largest = 0

    def __str__(self) -> str:
        done = sum(history.acknowledged for history in self._histories.values())
        if not self._ends:
            return f"{self.lives} lives, {done} acknowledged updates"
        files, memory = self._ends[-1]
        first_files, first_memory = self._ends[0]
        return (
            f"{self.lives} lives, {done} acknowledged updates, open files {first_files:.0f} -> "
            f"{files:.0f}, memory {first_memory / 2**20:.1f} -> {memory / 2**20:.1f} MiB, "
            f"at most {self._largest / 2**20:.1f} MiB on disk"
        )

    def one(self, seconds: float) -> None:
        """Let a worker live so long, kill it, and look.

        Raises:
            AssertionError: something is lost, or grows.
        """
        self.lives += 1
        self._run += 1
        order = {
            "directory": str(self._directory),
            "disk": {"fsync": self._random.choice(("always", "interval"))},
            "filler_bytes": 6_000,
            "run": self._run,
            "seconds": seconds,
            "closes": False,
            "checkpoints": True,
            "measures": True,
        }
        others: list[list[object]] = []
        code, _ = work_and_check(self._nursery, order, self._histories, others)
        assert code is None, f"a worker ended by itself: {code}"
        sizes = [
            (float(str(words[1])), float(str(words[2]))) for words in others if words[0] == "size"
        ]
        self._check_sizes(sizes[_WARM_SECONDS:])
        held = sum(path.stat().st_size for path in self._directory.iterdir())
        self._largest = max(self._largest, held)
        assert held < _MOST_DISK_BYTES, f"{held} bytes on disk"

    def _check_sizes(self, sizes: list[tuple[float, float]]) -> None:
        third = len(sizes) // 3
        if not third:
            return  # a short life at the end of the time
        first, last = (
            [median(column) for column in zip(*part, strict=True)]
            for part in (
                sizes[:third],
                sizes[-third:],
            )
        )
        self._ends.append((last[0], last[1]))
        for before, what in ((first, "in one life"), (list(self._ends[0]), "since the first one")):
            assert last[0] <= before[0] + _MORE_FILES, f"open files {what}: {before[0]} {last[0]}"
            assert last[1] <= before[1] + _MORE_BYTES, f"memory {what}: {before[1]} {last[1]}"

    async def check(self, scratch: Path) -> None:
        """Look at everything once more, in a copy."""
        reports = [report for report, _ in scan_directory(str(self._directory))]
        assert not any(report.damages for report in reports), "a kill damages nothing"
        await check_by_opening(self._directory, scratch / "copy", self._histories)
