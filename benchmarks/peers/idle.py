"""An event loop that does nothing else: the lag that the machine itself causes."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.contender import Contender, Metrics
from benchmarks.lag import lag_metrics, sample_lag


@dataclass
class IdleLoop(Contender):
    """Sample the lag of an otherwise idle loop."""

    sample_count: int
    name: str = "idle loop"
    is_limit: bool = True

    async def open(self, directory: Path) -> None:
        return

    async def measure(self) -> Metrics:
        return lag_metrics(await sample_lag(self.sample_count))
