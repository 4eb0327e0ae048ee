"""What the read-only commands ask of a directory before they look into its segments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from persistence.cli.failure import CommandError
from persistence.disk.filenames import (
    CONFLICTS,
    LOCK,
    MANIFEST,
    OUTBOX,
    QUARANTINE,
    parse_segment,
)
from persistence.disk.journal import entries_in
from persistence.sharing.outbox import has_shared

_KERNEL_LOCKS: Final = Path("/proc/locks")


def require_directory(directory: Path) -> None:
    """Check that `directory` is one that the engine may have written.

    Raises:
        CommandError: it does not exist, is no directory, or holds neither manifest nor segment.
    """
    if not directory.exists():
        raise CommandError(f"{directory} does not exist")
    if not directory.is_dir():
        raise CommandError(f"{directory} is not a directory")
    if not (directory / MANIFEST).exists() and not segment_bytes(directory):
        raise CommandError(f"{directory} is not a directory of this engine: nothing of it is there")


def segment_bytes(directory: Path) -> dict[str, int]:
    """Return the size of each segment file, by name."""
    return {
        entry.name: entry.stat().st_size
        for entry in os.scandir(directory)
        if parse_segment(entry.name) is not None
    }


def quarantine_bytes(directory: Path) -> list[int]:
    """Return the size of each quarantined piece."""
    try:
        return [entry.stat().st_size for entry in os.scandir(directory / QUARANTINE)]
    except FileNotFoundError:
        return []


def conflict_records(directory: Path) -> list[bytes]:
    """Return the entries of the versions that are kept because the shared tier refused them."""
    path = directory / CONFLICTS
    return entries_in(path.read_bytes()) if path.is_file() else []


def shares_sessions(directory: Path) -> bool:
    """Return whether a worker has shared the directory's sessions."""
    path = directory / OUTBOX
    return path.is_file() and has_shared(path.read_bytes())


def is_open_elsewhere(directory: Path) -> bool:
    """Whether a process holds the directory's lock; False where the kernel does not tell.

    Asked of the kernel's list, not by trying the lock: even a moment's shared lock of ours would
    turn away an engine that opens the directory in that moment.
    """
    try:
        found = (directory / LOCK).stat()
        lines = _KERNEL_LOCKS.read_text("ascii").splitlines()
    except OSError:
        return False
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    return any(_is_lock_on(line.split(), device) for line in lines)


def _is_lock_on(words: list[str], device: str) -> bool:
    # "1: FLOCK  ADVISORY  WRITE 4321 08:01:131073 0 EOF"; a waiting one has "->" in between.
    return words[1:2] == ["FLOCK"] and device in words
