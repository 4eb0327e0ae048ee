"""Sealed hashes: what the shared tier has of a session in the place of plain values.

Sealed is each value, on its own, so that an update still sends what it changed and nothing else:
bound to session id, incarnation and the field's name. And the head but for its times, which a
renewal changes: the record's fixed part, its metadata, and the checksum of the whole record. So the
values that go with a head are those that were committed with it: an older value of one field,
which opens as well, does not fit that checksum.

In the clear are session ids, fields' names, sizes, times, versions, incarnation and commit ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from typing import Final

from persistence.sealer import Sealer, key_id_of

_LENGTHS: Final = Struct("<HI")
_HEAD: Final = b"\xffhead"
_GROUP: Final = slice(1)  # of the incarnation


class Unopened(ValueError):
    """A value is not what was sealed, or not with a key of ours."""


class FieldCodec:
    """Seals and opens the hash of one session.

    Args:
        sealer: does it.
        session_id: whose, as UTF-8.
    """

    __slots__ = ("_sealer", "_session_id")

    def __init__(self, sealer: Sealer, session_id: bytes) -> None:
        self._sealer = sealer
        self._session_id = session_id

    def _about(self, name: bytes, incarnation: bytes = b"") -> bytes:
        lengths = _LENGTHS.pack(len(self._session_id), len(name))
        return b"".join((lengths, self._session_id, name, incarnation))

    def seal(self, name: bytes, value: bytes, incarnation: bytes) -> bytes:
        """Seal the value of a field."""
        return self._sealer.seal(value, self._about(name, incarnation), incarnation[_GROUP])

    def open(self, name: bytes, value: bytes, incarnation: bytes) -> bytes:
        """Return the value of a field.

        Raises:
            Unopened: it is not what was sealed.
        """
        plain = self._sealer.open(value, self._about(name, incarnation), incarnation[_GROUP])
        if plain is None:
            raise Unopened(self._why(value, f"the value of field {name!r}"))
        return plain

    def seal_head(self, head: bytes) -> bytes:
        """Seal what a head has behind its times."""
        return self._sealer.seal(head, self._about(_HEAD))

    def open_head(self, sealed: bytes) -> bytes:
        """Return what a head has behind its times.

        Raises:
            Unopened: it is not what was sealed.
        """
        plain = self._sealer.open(sealed, self._about(_HEAD))
        if plain is None:
            raise Unopened(self._why(sealed, "its head"))
        return plain

    def _why(self, sealed: bytes, what: str) -> str:
        key_id = key_id_of(sealed)
        if self._sealer.knows(key_id):
            return f"{what} is not what was sealed for this session"
        return (
            f"{what} is not encrypted, or with another key ({key_id.hex()}) than those in "
            "security.key_file or security.secret_keys"
        )

    def missing_key(self, fields: Mapping[bytes, bytes], head_from: int) -> bool:
        """Whether a key is named that is not known, as far as the head tells."""
        head = fields.get(_HEAD, b"")[head_from:]
        return bool(head) and not self._sealer.knows(key_id_of(head))
