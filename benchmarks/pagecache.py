"""The kernel's page cache, which "warm" in a workload's definition speaks of."""

from __future__ import annotations

from pathlib import Path

_CHUNK_BYTES = 2**20


def warm(directory: Path) -> None:
    """Read every file below `directory` once: a kernel may reclaim what lay idle for a while."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(_CHUNK_BYTES):
                    pass
