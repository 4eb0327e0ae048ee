"""What resident sessions cost the process."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.contender import Metrics, check
from benchmarks.engine.opened import DURABILITY, Engine, every, fill, wrong_sessions
from benchmarks.resident import Growth

_TASKS = 64
"""Few: each creation under way holds a session's live objects and a task, some 8 KB that are not
the sessions' and stay in the process. The peer makes one session after the other."""


@dataclass
class Resident(Engine):
    """All sessions in memory; the budget is twice what they need."""

    session_count: int
    fresh_process: bool = True
    durability: str = DURABILITY["never"]

    async def open(self, directory: Path) -> None:
        memory_bytes = self.session_count * 2000
        await self.open_state(directory, memory_bytes=memory_bytes, fsync="never")

    async def measure(self) -> Metrics:
        growth = Growth()
        await fill(self.state, self.session_count, _TASKS)
        metrics = growth.metrics(self.session_count)
        samples = every(self.session_count, 1000)
        check(not await wrong_sessions(self.state, samples), "sessions are not as created")
        return metrics
