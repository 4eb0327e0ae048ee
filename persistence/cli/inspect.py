"""``persistence inspect``: what a directory holds, read-only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from persistence.cli import screen
from persistence.cli.directory import (
    conflict_records,
    is_open_elsewhere,
    quarantine_bytes,
    require_directory,
)
from persistence.cli.failure import EXIT_OK
from persistence.cli.options import DirectoryArgument, JsonOption
from persistence.cli.screen import format_bytes
from persistence.disk.format import FORMAT_VERSION
from persistence.disk.inspect import inspect_directory, manifest_of
from persistence.sharing.conflicts import keys_of_conflicts


@dataclass(slots=True)
class Summary:
    """What a directory holds; its fields are those of ``--json``.

    Attributes:
        live_sessions: sessions whose newest frame is a session, expired ones included until they
            are cleaned up.
        dead_bytes: what compaction could give back: segments' bytes that no live session needs.
        deletes: delete markers (tombstones).
        torn_bytes: of an append that a crash interrupted; the next opening cuts them off.
        damages: damaged places; ``persistence verify`` lists them.
        quarantined: pieces kept aside by earlier openings.
        conflicts: versions that the shared tier refused, kept as conflict records.
        free_bytes: what its file system still takes.
        is_writable: whether this user may write to it, on a file system that takes writes.
        is_open_elsewhere: a process has the directory open, so the numbers are of a moment.
        keys: ids of the keys that it, or a conflict record in it, is encrypted with; none: it is
            not encrypted.
    """

    directory: str
    format_version: int = FORMAT_VERSION
    segments: int = 0
    sealed_segments: int = 0
    bytes: int = 0
    frames: int = 0
    puts: int = 0
    patches: int = 0
    touches: int = 0
    deletes: int = 0
    live_sessions: int = 0
    live_bytes: int = 0
    dead_bytes: int = 0
    torn_bytes: int = 0
    damages: int = 0
    quarantined: int = 0
    quarantined_bytes: int = 0
    conflicts: int = 0
    free_bytes: int = 0
    is_writable: bool = True
    is_open_elsewhere: bool = False
    keys: list[str] = field(default_factory=list)


def command(directory: DirectoryArgument, as_json: JsonOption = False) -> int:
    """Summarize a directory: segments, frames, sessions, live and dead bytes. Read-only."""
    summary = summarize(directory)
    if as_json:
        screen.print_json(asdict(summary))
    else:
        screen.print_table(str(directory), _rows(summary))
    return EXIT_OK


def summarize(directory: Path) -> Summary:
    """Return what `directory` holds.

    Raises:
        CommandError: it is not a directory of the engine.
    """
    require_directory(directory)
    pieces = quarantine_bytes(directory)
    manifest = manifest_of(str(directory))
    conflicts = conflict_records(directory)
    summary = Summary(
        str(directory),
        manifest.format_version,
        quarantined=len(pieces),
        quarantined_bytes=sum(pieces),
        conflicts=len(conflicts),
        free_bytes=shutil.disk_usage(directory).free,
        is_writable=os.access(directory, os.W_OK),
        is_open_elsewhere=is_open_elsewhere(directory),
        keys=[each.hex() for each in _keys(manifest.keys_in_use, conflicts)],
    )
    for report in inspect_directory(str(directory)):
        summary.segments += report.number > 0  # 0: the manifest
        summary.sealed_segments += report.sealed
        summary.bytes += report.bytes
        summary.frames += report.frames
        summary.puts += report.puts
        summary.patches += report.patches
        summary.touches += report.touches
        summary.deletes += report.deletes
        summary.live_sessions += report.live_sessions
        summary.live_bytes += report.live_bytes
        summary.torn_bytes += report.torn_bytes
        summary.damages += len(report.damages)
    summary.dead_bytes = summary.bytes - summary.live_bytes - summary.torn_bytes
    return summary


def _keys(of_log: list[bytes], conflicts: list[bytes]) -> list[bytes]:
    """Return the ids of the keys that are needed to read all there is."""
    if not of_log:
        return []
    # Nothing encrypts conflict records anew: they may be the last that need a key.
    return [*sorted(keys_of_conflicts(conflicts) - set(of_log)), *of_log]


def _rows(summary: Summary) -> Iterator[tuple[str, str]]:
    yield "format version", str(summary.format_version)
    if summary.keys:
        yield "encrypted with key", ", ".join(summary.keys)
    yield "segments", f"{summary.segments:,} ({summary.sealed_segments:,} sealed)"
    yield "bytes", format_bytes(summary.bytes)
    yield "… live", format_bytes(summary.live_bytes)
    yield "… dead", format_bytes(summary.dead_bytes)
    yield "live sessions", f"{summary.live_sessions:,}"
    yield "frames", f"{summary.frames:,}"
    yield "… sessions", f"{summary.puts:,}"
    yield "… patches", f"{summary.patches:,}"
    yield "… renewals", f"{summary.touches:,}"
    yield "… tombstones", f"{summary.deletes:,}"
    yield "quarantine", f"{summary.quarantined:,} ({format_bytes(summary.quarantined_bytes)})"
    yield "free space", format_bytes(summary.free_bytes)
    if summary.conflicts:
        yield "CONFLICT RECORDS", f"{summary.conflicts:,} (see docs/redis.md)"
    if not summary.is_writable:
        yield "READ-ONLY", "it cannot be opened by a worker of this user"
    if summary.torn_bytes:
        yield "torn tail", f"{format_bytes(summary.torn_bytes)}, cut off at the next opening"
    if summary.damages:
        yield "DAMAGED PLACES", f"{summary.damages:,} (see 'persistence verify')"
    if summary.is_open_elsewhere:
        yield "open", "in another process: the numbers are of a moment"
