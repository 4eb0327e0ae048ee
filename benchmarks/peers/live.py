"""Sessions as live Python objects in a dict: what most workers do today."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks import payloads
from benchmarks.contender import Contender, Metrics, check
from benchmarks.optional import load
from benchmarks.resident import Growth


@dataclass
class LiveObjects(Contender):
    """`{session id: decoded session}`, each decoded from its bytes as if it had come in."""

    session_count: int
    name: str = "live objects in a dict"
    fresh_process: bool = True

    async def open(self, directory: Path) -> None:
        msgpack = load("msgpack")
        self._pack, self._unpack = msgpack.packb, msgpack.unpackb

    async def measure(self) -> Metrics:
        growth = Growth()
        sessions = {
            payloads.session_id(index): self._unpack(self._pack(payloads.session(index)))
            for index in range(self.session_count)
        }
        metrics = growth.metrics(self.session_count)
        check(len(sessions) == self.session_count, "sessions went missing")
        return metrics
