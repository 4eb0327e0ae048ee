"""``persistence verify``: every checksum of a directory, read-only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from persistence.cli import screen
from persistence.cli.directory import is_open_elsewhere, require_directory, segment_bytes
from persistence.cli.failure import EXIT_FAILED, EXIT_OK
from persistence.cli.key_source import KeyFileOption, security_for, source_of
from persistence.cli.options import DirectoryArgument, JsonOption
from persistence.cli.screen import format_bytes, say
from persistence.disk.inspect import cache_warnings, keys_of, scan_directory
from persistence.errors import printable
from persistence.keys import seals_for
from persistence.sealer import Sealer, Seals


@dataclass(slots=True)
class Findings:
    """What a verification found; its fields are those of ``--json``.

    Attributes:
        torn_bytes: of an append that a crash interrupted. That is no damage: nobody was told that
            it is there, and the next opening cuts it off.
        damages: one map of path, offset, session_id (null where it is not known) and reason each.
        warnings: one map of path and reason for each damaged cache: nothing is lost by it, the log
            is read instead, so it does not count for the exit code.
        is_open_elsewhere: a process has the directory open; torn bytes may be its next append.
        is_encrypted: its records are sealed.
        was_opened: all records were decoded, not only their checksums checked.
    """

    directory: str
    segments: int = 0
    bytes: int = 0
    frames: int = 0
    torn_bytes: int = 0
    damages: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, str]] = field(default_factory=list)
    is_open_elsewhere: bool = False
    is_encrypted: bool = False
    was_opened: bool = True


def command(
    directory: DirectoryArgument, as_json: JsonOption = False, key_file: KeyFileOption = None
) -> int:
    """Check every frame of a directory, without changing or locking anything.

    The exit code is 1 when acknowledged data is damaged, and each damaged place is listed. A torn
    tail, what a crash leaves of an unfinished append, is mentioned and is no damage; so is a
    damaged hint or index snapshot, which are made again from the log. What an encrypted directory
    holds is opened too where the keys are given.
    """
    require_directory(directory)
    seals = _seals(directory, key_file)
    total = sum(segment_bytes(directory).values())
    with screen.progress_bar("verify", total, is_quiet=as_json) as advance:
        findings = check(directory, advance, None if seals is None else seals.records)
    if as_json:
        screen.print_json(asdict(findings))
    else:
        for line in _lines(findings):
            say(line)
    return EXIT_FAILED if findings.damages else EXIT_OK


def _seals(directory: Path, key_file: Path | None) -> Seals | None:
    """Return what opens the records of `directory`, if it is encrypted and the keys are given."""
    if key_file is None and not any(source_of(None).values()):
        return None
    return seals_for(security_for(directory, key_file))


def check(
    directory: Path, advance: Callable[[int], None], sealer: Sealer | None = None
) -> Findings:
    """Verify `directory`; `advance` is told the bytes of each segment that is done."""
    findings = Findings(str(directory), is_open_elsewhere=is_open_elsewhere(directory))
    findings.is_encrypted = bool(keys_of(str(directory)))
    findings.was_opened = sealer is not None or not findings.is_encrypted
    for report, _ in scan_directory(str(directory), sealer):
        findings.segments += report.number > 0  # 0: the manifest
        findings.bytes += report.bytes
        findings.frames += report.frames
        findings.torn_bytes += report.torn_bytes
        findings.damages += [
            {
                "path": str(damage.path),
                "offset": damage.offset,
                "session_id": damage.session_id,
                "reason": damage.reason,
            }
            for damage in report.damages
        ]
        advance(report.bytes)
    if not findings.is_open_elsewhere:  # else they change while one looks
        findings.warnings = [
            {"path": path, "reason": reason} for path, reason in cache_warnings(str(directory))
        ]
    return findings


def _lines(findings: Findings) -> Iterator[str]:
    for damage in findings.damages:
        sid = damage["session_id"]
        whose = "" if sid is None else f", session {printable(sid)}"
        yield f"{damage['path']} at offset {damage['offset']}{whose}: {damage['reason']}"
    for warning in findings.warnings:
        yield f"Warning: {warning['path']}: {warning['reason']}."
    if findings.is_open_elsewhere:
        yield "Open in another process: this is the state of a moment."
    if findings.torn_bytes:
        yield (
            f"Torn tail of {format_bytes(findings.torn_bytes)}: an append that was never "
            "acknowledged; the next opening cuts it off. This is no damage."
        )
    if not findings.was_opened:
        yield (
            "Encrypted: checksums were checked, and records were not opened; --key-file FILE "
            "checks them as well."
        )
    verdict = f"DAMAGED in {len(findings.damages):,} places" if findings.damages else "Intact"
    yield (
        f"{verdict}: {findings.segments:,} segments, {format_bytes(findings.bytes)}, "
        f"{findings.frames:,} frames."
    )
