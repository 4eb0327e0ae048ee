"""The kernel's page cache, which "warm" and "dropped" in a workload's definition speak of."""

from __future__ import annotations

import os
from pathlib import Path

_CHUNK_BYTES = 2**20


def warm(directory: Path) -> None:
    """Read every file below `directory` once: a kernel may reclaim what lay idle for a while."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(_CHUNK_BYTES):
                    pass


def drop(directory: Path) -> None:
    """Let the kernel forget every file below `directory`: the next read goes to the disk.

    It keeps what a process has mapped into its memory: close that before. (Not its whole cache, as
    `drop_caches` would: other programs of the machine need theirs.)
    """
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                os.fsync(file.fileno())  # dirty pages would stay
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
