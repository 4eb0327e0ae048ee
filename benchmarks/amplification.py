"""What storing costs beyond the data itself: bytes written, and bytes occupied."""

from __future__ import annotations

from pathlib import Path

from benchmarks.contender import Metric, Metrics
from benchmarks.optional import load

WRITTEN = Metric("written", " ×")
OCCUPIED = Metric("occupied", " ×")
METRICS = (WRITTEN, OCCUPIED)


def written_bytes(pid: int | None = None) -> int:
    """Return what a process (this one) has handed to write calls so far, from /proc/PID/io."""
    return int(load("psutil").Process(pid).io_counters().write_chars)


def occupied_bytes(directory: Path) -> int:
    """Return what the files below `directory` occupy on the disk, in whole blocks."""
    blocks = 0
    for path in directory.rglob("*"):
        try:
            blocks += path.lstat().st_blocks
        except FileNotFoundError:
            continue  # compacted away meanwhile
    return blocks * 512


def amplification(written: int, updated: int, occupied: int, live: int) -> Metrics:
    """Return both amplifications: bytes written per byte updated, occupied per live byte."""
    return {
        WRITTEN.name: written / updated if updated else 0.0,
        OCCUPIED.name: occupied / live if live else 0.0,
    }
