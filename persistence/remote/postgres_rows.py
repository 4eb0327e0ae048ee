"""From a request to a row of the sessions' table, and from a row to a record. Pure, over bytes.

Where the tier is encrypted, the record in a row is sealed as a whole: bound to session id,
incarnation and commit id, so that an older record, or one of another session, does not open in its
place. The checksum is that of the bytes as they are stored. In the clear are session ids, sizes,
times, versions, incarnation and commit ids.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, TypeAlias

from crc32c import crc32c

from persistence import record as rec
from persistence.record import ID_BYTES, NEVER, NO_ID, PREFIX_BYTES
from persistence.remote.contract import Delete, Put, Request, Stored, Touch
from persistence.sealer import Sealer, key_id_of

LIVES: Final = "L"
_LENGTH: Final = Struct("<H")

Row: TypeAlias = tuple[str, bytes, bytes, bytes, bytes, int, bytes | None, int, float, float, float]
"""Kind, id, commit, base, incarnation, version, record, checksum, accessed, deadline, cap."""


def id_bytes(session_id: str) -> bytes:
    """Return a session id as it is in the tables."""
    assert session_id, "the empty id is the epoch's"
    return session_id.encode()


def decode_stored(kind: str, version: int, incarnation: bytes, commit: bytes) -> Stored:
    """Return what a row says of a session."""
    return Stored(kind == LIVES, version, incarnation, commit)


class RowCodec:
    """Makes rows of requests, and records of rows.

    Args:
        sealer: seals and opens records; None: they are stored as they are.
    """

    def __init__(self, sealer: Sealer | None = None) -> None:
        self._sealer = sealer

    def row_of(self, request: Request) -> Row:
        """Return a request as ``sql/commit.sql`` takes it."""
        key = id_bytes(request.session_id)
        if type(request) is Put:
            _, record, base, accessed, deadline, cap, *_ = request
            kind = "C" if base == NO_ID else "P"
            incarnation, commit = record[:ID_BYTES], record[ID_BYTES : 2 * ID_BYTES]
            kept = record
            if self._sealer is not None:
                about = _about(key, incarnation, commit)
                kept = self._sealer.seal(record, about, incarnation[:1])
            ids = (kind, key, commit, base, incarnation, rec.version_of(record))
            return (*ids, kept, crc32c(kept), accessed, deadline, cap)
        if type(request) is Delete:
            _, commit, incarnation, base = request
            return "D", key, commit, base, incarnation, 0, None, 0, 0.0, 0.0, NEVER
        assert type(request) is Touch, "there are three kinds of requests"
        _, commit, accessed, deadline = request
        return "T", key, commit, NO_ID, NO_ID, 0, None, 0, accessed, deadline, NEVER

    def opened(self, key: bytes, stored: Stored, kept: bytes | None, checksum: int) -> bytes:
        """Return the record in a row.

        Args:
            key: the session id as UTF-8.
            stored: what else the row says.
            kept: the record as it is there.
            checksum: the one that is there.

        Raises:
            ValueError: it is not as it was written.
        """
        if kept is None:
            raise ValueError("it has no record")
        if crc32c(kept) != checksum:
            raise ValueError("its checksum is wrong")
        record = self._unsealed(key, stored, kept)
        if len(record) < PREFIX_BYTES or rec.commit_of(record) != stored.commit:
            raise ValueError("its record is of another commit, or none of this library")
        return record

    def _unsealed(self, key: bytes, stored: Stored, kept: bytes) -> bytes:
        if self._sealer is None:
            return kept
        about = _about(key, stored.incarnation, stored.commit)
        record = self._sealer.open(kept, about, stored.incarnation[:1])
        if record is not None:
            return record
        if self._sealer.knows(key_id_of(kept)):
            raise ValueError("its record is not what was sealed for this commit of this session")
        raise ValueError(
            f"its record is not encrypted, or with another key ({key_id_of(kept).hex()}) than "
            "those of this worker"
        )

    def lacks_key(self, kept: bytes | None) -> bool:
        """Whether a record says that it was sealed with a key that is not known."""
        if self._sealer is None or kept is None:
            return False
        return not self._sealer.knows(key_id_of(kept))


def _about(key: bytes, incarnation: bytes, commit: bytes) -> bytes:
    return b"".join((_LENGTH.pack(len(key)), key, incarnation, commit))
