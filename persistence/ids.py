"""Session ids and commit ids."""

from __future__ import annotations

import secrets
from typing import Final

from persistence.errors import InvalidSessionId, printable
from persistence.record import ID_BYTES

MAX_SESSION_ID_BYTES: Final = 512
_RANDOM_BYTES: Final = 16
_POOL_BYTES: Final = 256 * ID_BYTES


def new_session_id() -> str:
    """Return a new session id: 128 bits from the system's secure source, 22 characters."""
    return secrets.token_urlsafe(_RANDOM_BYTES)


def plain_id(session_id: str) -> str:
    """Return a session id as a plain `str`, if it is of a class of its own.

    Such a class may compare, hash and encode as it likes: as a key in our tables it could be
    another session's. What is no `str` at all is returned as it is, for `check_session_id`.
    """
    if type(session_id) is str or not isinstance(session_id, str):
        return session_id
    return str.__str__(session_id)  # what it is made of, whatever its own methods say


def check_session_id(session_id: object) -> bytes:
    """Return a session id as UTF-8.

    Any non-empty string of at most 512 bytes of UTF-8 is a plain key, whatever is in it.

    Raises:
        InvalidSessionId: it is something else.
    """
    if isinstance(session_id, str):
        if not session_id:
            raise InvalidSessionId("a session id must not be empty")
        try:
            key = session_id.encode()
        except UnicodeEncodeError:
            raise InvalidSessionId(
                f"session id {printable(session_id)} has lone surrogates, which UTF-8 cannot hold"
            ) from None
        if len(key) <= MAX_SESSION_ID_BYTES:
            return key
        raise InvalidSessionId(
            f"session id {printable(session_id)} has {len(key)} bytes of UTF-8; "
            f"at most {MAX_SESSION_ID_BYTES} are allowed: use a hash of it"
        )
    raise InvalidSessionId(f"a session id must be a str, not {type(session_id).__name__}")


class CommitIds:
    """Random 128-bit ids for commits and incarnations, drawn from the system in larger pieces."""

    def __init__(self) -> None:
        self._pool = b""
        self._at = 0

    def next(self) -> bytes:
        """Return an id that was never used before and never will be again."""
        at = self._at
        if at >= len(self._pool):
            self._pool = secrets.token_bytes(_POOL_BYTES)
            at = 0
        self._at = at + ID_BYTES
        return self._pool[at : at + ID_BYTES]
