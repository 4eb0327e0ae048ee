"""A plain dict: the ceiling of what Python can do, and the floor of what it survives."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.payloads import Data
from benchmarks.peers.mapping import MappingRead
from benchmarks.peers.store import MappingStore


class PlainDict(MappingStore):
    """`{session id: live dict}`."""

    name = "dict"
    is_limit = True

    def connect(self, directory: Path) -> None:
        """See `SyncStore`."""
        self.mapping: dict[str, Data] = {}


@dataclass
class DictRead(MappingRead):
    """Reads from a dict."""

    is_limit: bool = True

    def __post_init__(self) -> None:
        self.name = "dict of packed bytes" if self.packed else "dict of live dicts"

    def make(self) -> MutableMapping[str, Any]:
        """See `MappingRead`."""
        return {}
