"""Whose frame it was, where a frame's header is destroyed.

The header's checksum fails, so nothing that it says can be trusted, the session id behind it
included. But where the frame began is known, it is where the one before it ended, and so is where
its key began. If the bytes there, at some length, are the id of a session that the index knows by
an *older* frame, then this was that session's newer one: 128 bits of its fingerprint agree. Its
older version must not be shown as if nothing had happened, so reads are led to the damage.

The frame may have been a renewal, without which the session is what it was; but one bit tells it
from a tombstone, and a session that has ended must not come back.

Only in log segments, where sequence numbers rise from frame to frame: the frame before says which
rows are older. In a merged one nothing does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from persistence.disk.format import (
    FRAME_HEADER_BYTES,
    FRAME_OVERHEAD_BYTES,
    INDEX_ROW,
    MAX_KEY_BYTES,
)
from persistence.disk.index import Fingerprints, Index
from persistence.record import NEVER

SUSPECT_BYTES: Final = FRAME_HEADER_BYTES + MAX_KEY_BYTES
_KEY_BYTES: Final = slice(6, 8)


class Suspect(NamedTuple):
    """A place in a log segment where a frame began whose header is destroyed.

    Attributes:
        segment: number of the segment.
        offset: where the frame began.
        sequence: that of the frame before it, plus one: it had this one or a higher one.
        data: the first `SUSPECT_BYTES` there, fewer at the end of the file.
    """

    segment: int
    offset: int
    sequence: int
    data: bytes


def lead_to_damage(suspect: Suspect, index: Index, fingerprints: Fingerprints) -> bytes | None:
    """Let the row of the session whose frame this was point to it; return the session's key.

    None when no session is known by an older frame: it is gone, or another one's id was destroyed
    as well. To be called when the index holds everything else.
    """
    for end in _key_ends(suspect.data):
        key = suspect.data[FRAME_HEADER_BYTES:end]
        fingerprint = fingerprints.of(key)
        known = index.sequence(fingerprint)
        if known is not None and known < suspect.sequence:
            length = FRAME_OVERHEAD_BYTES + len(key)  # at least
            place = (suspect.segment, suspect.offset, length, 0)
            times = (0.0, NEVER, NEVER)
            index.load_newer(INDEX_ROW.pack(fingerprint, suspect.sequence, *times, *place))
            return key
    return None


def _key_ends(data: bytes) -> Iterator[int]:
    """Yield where the key may end: first where the header says, which may be right after all."""
    if len(data) > FRAME_HEADER_BYTES:
        said = FRAME_HEADER_BYTES + int.from_bytes(data[_KEY_BYTES], "little")
        if FRAME_HEADER_BYTES < said <= len(data):
            yield said
        yield from range(len(data), FRAME_HEADER_BYTES, -1)
