"""Sealed payloads: what an encrypted directory has in the place of plain ones.

Sealed is the payload of a put, after its compression. It is bound to everything that says what it
is: directory, sequence number, session id, incarnation, commit and base, how it is compressed. So
a payload that was moved to another session, another version or another directory does not open,
and neither does one of this session's past in the place of a later one.

In the clear are the frame's header and key: session ids, times, sizes, the 31-bit tag of the user
id, and commit ids. In an encrypted directory a plain put is refused: nobody can slip one in.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from persistence.disk.format import (
    FRAME_HEADER_BYTES,
    PATCH_BASE_BYTES,
    PUT,
    RECORD_IDS_BYTES,
    SEALED,
    Frame,
    FrameType,
    decode_frame,
    decompress,
    encode_again,
    is_intact,
    restamp,
)
from persistence.sealer import Sealer

NOT_SEALED_HERE: Final = "the stored bytes are not what this directory's keys have sealed"

_ABOUT: Final = Struct("<16sQBI48s")  # with the key behind it
_OF_PATCH: Final = 1 << 7  # among the flags that a payload is bound to
_GROUP: Final = slice(1)  # of the incarnation
_FRONT: Final = Struct("<4sBBHIIQQ48s")  # of a frame, see `format.FRAME_HEADER_FIELDS`
_pack_about = _ABOUT.pack
_unpack_front = _FRONT.unpack_from


class RecordCodec:
    """Seals and opens the payloads of one directory.

    Args:
        sealer: does it.
        directory_id: of the directory.
    """

    def __init__(self, sealer: Sealer, directory_id: bytes) -> None:
        self.sealer = sealer
        self._directory_id = directory_id

    def _about(self, sequence: int, flags: int, raw_bytes: int, ids: bytes, key: bytes) -> bytes:
        """Return what a payload is bound to. `flags` are without `SEALED`."""
        return _pack_about(self._directory_id, sequence, flags, raw_bytes, ids) + key

    def seal(
        self,
        payload: bytes | memoryview,
        key: bytes,
        sequence: int,
        ids: bytes,
        flags: int,
        raw_bytes: int,
    ) -> bytes:
        """Return a put's payload as it is stored in an encrypted directory.

        Args:
            payload: compressed, if `flags` says so.
            key: session id as UTF-8.
            sequence: of the frame.
            ids: incarnation, commit and base.
            flags: of the frame, but for `SEALED`.
            raw_bytes: of the frame.
        """
        about = self._about(sequence, flags, raw_bytes, ids, key)
        return self.sealer.seal(payload, about, ids[_GROUP])

    def seal_patch(
        self,
        payload: bytes,
        key: bytes,
        sequence: int,
        ids: bytes,
        flags: int,
        raw_bytes: int,
        base: bytes,
    ) -> bytes:
        """Return a patch's payload as it is stored behind `base`, to which it is bound as well."""
        about = self._about(sequence, flags | _OF_PATCH, raw_bytes, ids, base + key)
        return self.sealer.seal(payload, about, ids[_GROUP])

    def patch_of(self, frame: Frame) -> bytes | None:
        """Return the payload of a patch behind where its base is; None: it does not open."""
        base, payload = frame.payload[:PATCH_BASE_BYTES], frame.payload[PATCH_BASE_BYTES:]
        opened = self._open(frame, payload, _OF_PATCH, base)
        return None if opened is None else decompress(frame.flags, opened, frame.raw_bytes)

    def open(self, frame: Frame) -> bytes | None:
        """Return the payload of a put, still compressed if it is; None: it does not open."""
        return self._open(frame, frame.payload)

    def _open(self, frame: Frame, payload: bytes, kind: int = 0, base: bytes = b"") -> bytes | None:
        if not frame.flags & SEALED:
            return None
        flags, ids = frame.flags & ~SEALED | kind, frame.ids
        about = self._about(frame.sequence, flags, frame.raw_bytes, ids, base + frame.key)
        return self.sealer.open(payload, about, ids[_GROUP])

    def opened(self, frame: Frame) -> Frame | None:
        """Return a put as it would be in a plain directory; None: it does not open."""
        payload = self.open(frame)
        if payload is None:
            return None
        return frame._replace(payload=payload, flags=frame.flags & ~SEALED)

    def record_of(self, frame: Frame) -> bytes | None:
        """Return the record of a put; None: it does not open, or not decompress."""
        payload = self.open(frame)
        if payload is None:
            return None
        raw = decompress(frame.flags, payload, frame.raw_bytes)
        return None if raw is None else b"".join((frame.incarnation, frame.commit, raw))

    def read_put(self, data: bytes, key: bytes, salt_checksum: int) -> bytes | None:
        """Return the record of a put frame of `key`; `data` is exactly the frame.

        None when anything is not as it should be.
        """
        start = FRAME_HEADER_BYTES + len(key)
        if not is_intact(data, salt_checksum) or data[FRAME_HEADER_BYTES:start] != key:
            return None
        # From here on it is what was written: the frame ends where its header says.
        _, kind, flags, key_bytes, _, raw_bytes, sequence, _, ids = _unpack_front(data)
        if kind != PUT or not flags & SEALED or key_bytes != len(key):
            return None
        flags &= ~SEALED
        about = self._about(sequence, flags, raw_bytes, ids, key)
        payload = self.sealer.open(data[start:-4], about, ids[_GROUP])
        raw = None if payload is None else decompress(flags, payload, raw_bytes)
        return None if raw is None else ids[:RECORD_IDS_BYTES] + raw

    def reseal(self, data: bytes, old_salt_checksum: int, new_salt_checksum: int) -> bytes | None:
        """Move a frame to a segment with another salt, sealed with the newest key.

        It stays as long as it is. None: its checksum is wrong, or it does not open.
        """
        frame = decode_frame(data, 0, old_salt_checksum)
        if not isinstance(frame, Frame) or frame.length != len(data):
            return None
        if frame.type != FrameType.PUT:
            return restamp(data, old_salt_checksum, new_salt_checksum)
        payload = self.open(frame)
        if payload is None:
            return None
        flags = frame.flags & ~SEALED
        sealed = self.seal(payload, frame.key, frame.sequence, frame.ids, flags, frame.raw_bytes)
        return encode_again(frame._replace(payload=sealed), new_salt_checksum)
