"""What state the frames of a checkpoint make up: the newest sequence number of a session wins.

The frames come in any order, dead ones among them. A first walk through all of them finds each
session's newest put or tombstone, and its newest touch; a second walk picks the puts that win.

A frame that fails its checksum inside a chunk that is intact was damaged before it was shipped.
Its session is left out and named: an older state of it would be a wrong value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from persistence.checkpoint.manifest import PackedRun
from persistence.disk.format import (
    FRAME_MAGIC,
    INDEX_ROW,
    ROW_IS_DELETE,
    Corrupt,
    Frame,
    FrameType,
    Torn,
    decode_frame,
)
from persistence.disk.index import Fingerprints, Index
from persistence.disk.sealed import NOT_SEALED_HERE, RecordCodec
from persistence.errors import printable

_IS_PUT: Final = 2  # as the length in a row: not `ROW_IS_DELETE`, and no frame is that short


@dataclass(slots=True)
class Walked:
    """What a walk through one chunk has met: frames, and defects where frames should be."""

    frames: int = 0
    defects: int = 0


def walk(
    runs: list[PackedRun], walked: Walked, codec: RecordCodec | None = None
) -> Iterator[Frame | Corrupt | Torn]:
    """Yield the frames of a chunk, and the defects in it; count both in `walked`.

    Args:
        runs: what is in it.
        walked: counts.
        codec: opens sealed frames: they are yielded as in a plain directory. One that does not
            open is a defect, and so is a put that is not sealed.
    """
    for run in runs:
        data = bytes(run.frames)
        at = 0
        while at < len(data):
            found = decode_frame(data, at, run.salt_checksum)
            if isinstance(found, Frame):
                walked.frames += 1
                at += found.length
                if codec is not None and found.type == FrameType.PUT:
                    found = codec.opened(found) or _not_opened(found)
            else:
                walked.defects += 1
                length = None if isinstance(found, Torn) else found.length
                at = _next_frame(data, at + 1, run.salt_checksum) if not length else at + length
            yield found


def _not_opened(frame: Frame) -> Corrupt:
    """Return the defect of a put that does not open."""
    times = (frame.accessed, frame.deadline, frame.cap)
    return Corrupt(NOT_SEALED_HERE, frame.key, frame.length, frame.sequence, frame.type, times)


def _next_frame(data: bytes, at: int, salt_checksum: int) -> int:
    """Return where the next intact frame starts, or the end of `data`."""
    found = data.find(FRAME_MAGIC, at)
    while found >= 0 and not isinstance(decode_frame(data, found, salt_checksum), Frame):
        found = data.find(FRAME_MAGIC, found + 1)
    return found if found >= 0 else len(data)


@dataclass(slots=True)
class State:
    """The first walk: which frame of each session wins. Synchronous.

    Args:
        fingerprints: of the directory that is restored.
        frames: about how many will come.

    Attributes:
        damaged: sessions whose newest frame is damaged, as far as they are known by name.
        unnamed: how many damaged frames there are of which not even the session is known.
    """

    fingerprints: Fingerprints
    frames: int
    unnamed: int = 0
    _index: Index = field(init=False)
    _touches: dict[bytes, tuple[int, float, float]] = field(init=False, default_factory=dict)
    _damaged: dict[bytes, tuple[int, str]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._index = Index()
        self._index.reserve(self.frames)

    def note(self, found: Frame | Corrupt | Torn) -> None:
        """Take one frame, or one defect."""
        if isinstance(found, Torn):
            self.unnamed += 1
        elif isinstance(found, Frame):
            fingerprint = self.fingerprints.of(found.key)
            if found.type == FrameType.TOUCH:
                if found.sequence > self._touches.get(fingerprint, (0,))[0]:
                    times = (found.sequence, found.accessed, found.deadline)
                    self._touches[fingerprint] = times
            elif found.type == FrameType.PATCH:
                # It was shipped because no record could be made of it.
                self._note_damaged(found.key, found.sequence)
            elif found.type != FrameType.FOOTER:
                is_put = found.type == FrameType.PUT
                self._load(fingerprint, found.sequence, _IS_PUT if is_put else ROW_IS_DELETE)
        elif found.key and found.sequence is not None:
            if found.type == FrameType.TOUCH:
                return
            self._note_damaged(found.key, found.sequence)
        else:
            self.unnamed += 1

    def _note_damaged(self, key: bytes, sequence: int) -> None:
        fingerprint = self.fingerprints.of(key)
        self._load(fingerprint, sequence, ROW_IS_DELETE)
        name = printable(key.decode("utf-8", "backslashreplace"))
        self._damaged[fingerprint] = (sequence, name)

    def _load(self, fingerprint: bytes, sequence: int, length: int) -> None:
        row = INDEX_ROW.pack(fingerprint, sequence, 0.0, 0.0, 0.0, 0, 0, length, 0)
        self._index.load_newer(row)

    @property
    def damaged(self) -> list[str]:
        """Sessions whose newest frame is damaged, escaped for people."""
        return [
            name
            for fingerprint, (sequence, name) in self._damaged.items()
            if self._index.sequence(fingerprint) == sequence
        ]

    def winner(self, frame: Frame) -> tuple[bytes, Frame] | None:
        """Return (fingerprint, frame with its newest times) if this is its session's state."""
        if frame.type != FrameType.PUT:
            return None
        fingerprint = self.fingerprints.of(frame.key)
        row = self._index.get(fingerprint)
        if row is None or row.sequence != frame.sequence or row.length != _IS_PUT:
            return None
        touch = self._touches.get(fingerprint)
        if touch is not None and touch[0] > frame.sequence:
            frame = frame._replace(accessed=touch[1], deadline=touch[2])
        return fingerprint, frame
