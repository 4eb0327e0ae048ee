"""Hints (one per sealed segment) and the index snapshot (one, at a clean close).

Both are caches: a checksum, the directory's id, and a digest of the segments they cover. When
anything does not fit, they are ignored and the log is scanned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from struct import Struct
from struct import error as StructError  # noqa: N812 - the module's name for it is `error`
from typing import Final, NamedTuple

from persistence.disk.filenames import INDEX_SNAPSHOT, hint_name, temporary_name
from persistence.disk.files import Files, read_all, replace_file
from persistence.disk.format import INDEX_ROW_BYTES, covered_by, decode_cache, encode_cache_header
from persistence.disk.index import SHARDS, Index
from persistence.disk.segments import Segment

_COVERED = Struct("<QQI")
_SEGMENT_COLUMN: Final = slice(12, None, INDEX_ROW_BYTES // 4)  # in rows as 32-bit numbers
_SNAPSHOT_HEADER = Struct("<QQ")  # last sequence, number of segments
_SNAPSHOT_SEGMENT = Struct("<QQQ")  # live, tombstone, touch bytes; in the segments' order


def covers(segments: Iterable[Segment]) -> bytes:
    """Return the digest of what is covered: each segment's number, length and salt.

    The salt tells a segment from an older one that had the same number and length.
    """
    covered = sorted((item.number, item.length, item.salt_checksum) for item in segments)
    return hashlib.sha256(b"".join(_COVERED.pack(*item) for item in covered)).digest()


def write_hint(
    files: Files,
    directory: str,
    directory_id: bytes,
    *,
    segment: Segment,
    skew: float,
    rows: bytes | bytearray,
) -> None:
    """Write the hint of a sealed segment, durably replacing an older one."""
    name = hint_name(segment.number)
    header = encode_cache_header(directory_id, covers([segment]), skew, rows)
    replace_file(files, directory, name, temporary_name(name), header, rows)


def read_hint(
    files: Files, directory: str, directory_id: bytes, segment: Segment
) -> tuple[float, memoryview] | None:
    """Return (skew, rows) of a segment's hint if it is intact and covers the whole segment.

    Raises:
        OSError: it is there and cannot be read.
    """
    try:
        data = read_all(files, f"{directory}/{hint_name(segment.number)}")
    except FileNotFoundError:
        return None
    decoded = decode_cache(data, directory_id, covers([segment]))
    if decoded is None or len(decoded[1]) % INDEX_ROW_BYTES:
        return None
    return decoded


class Guard(NamedTuple):
    """A hint as it is, whether or not it still describes its segment.

    Attributes:
        skew: seconds to add to its rows' times to get wall time.
        rows: what had been in the segment when it was sealed.
        covered: the digest of the segment that it describes.
    """

    skew: float
    rows: memoryview
    covered: bytes


def read_guard(files: Files, directory: str, directory_id: bytes, number: int) -> Guard | None:
    """Return the intact hint of a segment that is damaged or gone; None: there is none.

    Segment numbers are never used twice, so it is of that very segment. It tells which sessions
    were in it: reads of them must meet the damage, and ended sessions must not come back.
    """
    try:
        data = read_all(files, f"{directory}/{hint_name(number)}")
    except OSError:
        return None
    covered = covered_by(data)
    decoded = None if covered is None else decode_cache(data, directory_id, covered)
    if covered is None or decoded is None or len(decoded[1]) % INDEX_ROW_BYTES:
        return None
    skew, rows = decoded
    segments = rows.cast("I")[_SEGMENT_COLUMN] if rows else ()
    return Guard(skew, rows, covered) if all(item == number for item in segments) else None


def is_intact_cache(files: Files, directory: str, name: str) -> bool:
    """Whether the checksums of a cache are right, whatever it describes."""
    try:
        data = read_all(files, f"{directory}/{name}")
    except OSError:
        return False
    covered = covered_by(data)
    return covered is not None and decode_cache(data, data[16:32], covered) is not None


def write_snapshot(
    files: Files,
    directory: str,
    directory_id: bytes,
    *,
    index: Index,
    segments: Iterable[Segment],
    last_sequence: int,
) -> None:
    """Write the snapshot of the whole index, whose times must be wall time by now."""
    ordered = sorted(segments, key=lambda item: item.number)
    counts = [
        _SNAPSHOT_SEGMENT.pack(item.live_bytes, item.tombstone_bytes, item.touch_bytes)
        for item in ordered
    ]
    start = _SNAPSHOT_HEADER.pack(last_sequence, len(ordered))
    body = b"".join((start, *counts, *index.images()))
    header = encode_cache_header(directory_id, covers(ordered), 0.0, body)
    name = INDEX_SNAPSHOT
    replace_file(files, directory, name, temporary_name(name), header, body)


def read_snapshot(
    files: Files, directory: str, directory_id: bytes, segments: Iterable[Segment]
) -> tuple[Index, int, list[tuple[int, int, int]]] | None:
    """Return the index, the last sequence and each segment's (live, tombstone, touch) bytes.

    None unless the snapshot is intact and covers exactly `segments`.
    """
    try:
        data = read_all(files, f"{directory}/{INDEX_SNAPSHOT}")
    except OSError:
        return None
    decoded = decode_cache(data, directory_id, covers(segments))
    if decoded is None:
        return None
    try:
        return _decode_snapshot(decoded[1])
    except (ValueError, StructError):
        return None


def _decode_snapshot(body: memoryview) -> tuple[Index, int, list[tuple[int, int, int]]] | None:
    last_sequence, count = _SNAPSHOT_HEADER.unpack_from(body, 0)
    at = _SNAPSHOT_HEADER.size
    behind = at + count * _SNAPSHOT_SEGMENT.size
    counts = list(_SNAPSHOT_SEGMENT.iter_unpack(body[at:behind]))
    at = behind
    index = Index()
    for shard in range(SHARDS):
        at = index.load_image(shard, body, at)
    return (index, last_sequence, counts) if at == len(body) else None
