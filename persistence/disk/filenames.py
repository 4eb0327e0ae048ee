"""Every file name of a directory, and the one parser for them. No session id is part of any."""

from __future__ import annotations

import re
from typing import Final

MANIFEST: Final = "MANIFEST"
MANIFEST_COPY: Final = "MANIFEST.bak"
RESERVE: Final = "RESERVE"
LOCK: Final = "LOCK"
INDEX_SNAPSHOT: Final = "INDEX"
SHIPPED: Final = "SHIPPED"
STAGED: Final = "STAGED"
QUARANTINE: Final = "quarantine"
OUTBOX: Final = "OUTBOX"
CONFLICTS: Final = "CONFLICTS"
ROTATIONS: Final = "ROTATIONS"
RESTORING: Final = "RESTORING"
SCRATCH: Final = "SCRATCH"
SCRATCH_DIRECTORY: Final = "scratch"
SEGMENT_SUFFIX: Final = ".seg"
HINT_SUFFIX: Final = ".hint"
TEMPORARY_SUFFIX: Final = ".tmp"

_NAMES: Final = frozenset(
    {
        MANIFEST,
        MANIFEST_COPY,
        RESERVE,
        LOCK,
        INDEX_SNAPSHOT,
        SHIPPED,
        STAGED,
        QUARANTINE,
        OUTBOX,
        CONFLICTS,
        ROTATIONS,
        RESTORING,
        SCRATCH,
        SCRATCH_DIRECTORY,
    }
)
_NUMBERED: Final = re.compile(r"(\d{10})\.(seg|hint)", re.ASCII)
MAX_SEGMENT_NUMBER: Final = 2**32 - 1


def segment_name(number: int) -> str:
    """Return the file name of segment `number`."""
    assert 0 < number <= MAX_SEGMENT_NUMBER, number
    return f"{number:010d}{SEGMENT_SUFFIX}"


def hint_name(number: int) -> str:
    """Return the file name of the hint of segment `number`."""
    return f"{number:010d}{HINT_SUFFIX}"


def temporary_name(name: str) -> str:
    """Return the name under which `name` is written before it is renamed into place."""
    return name + TEMPORARY_SUFFIX


def quarantine_name(number: int, offset: int, length: int) -> str:
    """Return the name under which cut or damaged bytes of a segment are kept."""
    return f"{number:010d}-{offset:010d}-{length}.bytes"


def parse_segment(name: str) -> int | None:
    """Return the number of the segment with this file name, or None."""
    return _parse(name, "seg")


def parse_hint(name: str) -> int | None:
    """Return the number of the segment whose hint has this file name, or None."""
    return _parse(name, "hint")


def _parse(name: str, kind: str) -> int | None:
    match = _NUMBERED.fullmatch(name)
    if match is None or match[2] != kind:
        return None
    number = int(match[1])
    return number if 0 < number <= MAX_SEGMENT_NUMBER else None


def is_cache(name: str) -> bool:
    """Whether a file of this name is, or was to be, made again out of the log if it is lost."""
    name = name.removesuffix(TEMPORARY_SUFFIX)
    return name == INDEX_SNAPSHOT or parse_hint(name) is not None


def is_ours(name: str) -> bool:
    """Whether a file of this name is one that the engine writes."""
    if name in _NAMES:
        return True
    if name.endswith(TEMPORARY_SUFFIX):
        return is_ours(name.removesuffix(TEMPORARY_SUFFIX))
    return parse_segment(name) is not None or parse_hint(name) is not None
