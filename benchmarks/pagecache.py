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

    `POSIX_FADV_DONTNEED` works for everybody, but leaves pages that a process has mapped; where
    the kernel permits it (root), its whole cache of clean pages is dropped as well.
    """
    os.sync()  # dirty pages stay
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1", encoding="ascii")
    except OSError:
        return
