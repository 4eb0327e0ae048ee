"""Tokens: what a client shows to reach its session, and nothing else. Pure: time is passed in.

A token is URL-safe base64, without padding, of sealed claims (`sealing`) behind a version byte:

========== ===== ===============================================================================
field      bytes meaning
========== ===== ===============================================================================
version    1     1
key id     4     of the key that made it
nonce      12    random
claims     56 +  issued and expires (floats, wall seconds), incarnation id of the session (16),
                 fingerprint of the client (16), a random nonce (8), the session id as UTF-8
tag        16    proves that all of it is as it was made
========== ===== ===============================================================================

The incarnation makes a token end with its session: one that is created anew under the same id is
another one. Whatever is wrong with a token, it is refused with the same words, so that nothing is
learned by trying. Each token has one spelling: base64 that decodes to the same bytes is refused.
"""

from __future__ import annotations

import binascii
import hmac
import re
import secrets
from struct import Struct
from typing import Final, NamedTuple

from persistence.errors import TokenInvalid
from persistence.sealer import Sealer
from persistence.session import ClientInfo

VERSION: Final = b"\x01"
MAX_TOKEN_CHARS: Final = 1024
_CLAIMS: Final = Struct("<dd16s16s8s")
_FINGERPRINT_BYTES: Final = 16
_NONCE_BYTES: Final = 8
_TEXT: Final = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


class Claims(NamedTuple):
    """What a token says.

    Attributes:
        session_id: which session.
        incarnation: its incarnation id.
        issued: wall seconds.
        expires: wall seconds; it is valid before that.
        client: fingerprint of the client that it was issued to.
    """

    session_id: str
    incarnation: bytes
    issued: float
    expires: float
    client: bytes


def invalid() -> TokenInvalid:
    """Return the one error for whatever is wrong with a token."""
    return TokenInvalid(
        "the token is not valid: it is damaged, expired, revoked, or another client's; have the "
        "client authenticate again, then issue a new one"
    )


def fingerprint(client: ClientInfo) -> bytes:
    """Return 16 bytes that tell clients apart: address and program, of any length."""
    parts = [
        b"\0" if part is None else b"\1" + _utf8(part) for part in (client.ip, client.user_agent)
    ]
    message = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return hmac.digest(b"persistence client", message, "sha256")[:_FINGERPRINT_BYTES]


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # a header from outside may hold anything


def issue(sealer: Sealer, claims: Claims) -> str:
    """Return a token that says `claims`."""
    plain = _CLAIMS.pack(
        claims.issued,
        claims.expires,
        claims.incarnation,
        claims.client,
        secrets.token_bytes(_NONCE_BYTES),
    )
    return _encoded(VERSION + sealer.seal(plain + claims.session_id.encode(), VERSION))


def read(sealer: Sealer, token: object, client: ClientInfo, now: float) -> Claims:
    """Return what a token says, if it is one of ours, of this client, and has not expired.

    Whether its session lives is the caller's to find out.

    Args:
        sealer: made it.
        token: what a client showed, whatever that is.
        client: who showed it.
        now: wall seconds.

    Raises:
        TokenInvalid: it is not. It says the same whatever is wrong.
    """
    data = _decoded(token)
    plain = None if data is None else sealer.open(data[len(VERSION) :], VERSION)
    if plain is None or len(plain) <= _CLAIMS.size:
        raise invalid()
    issued, expires, incarnation, known, _ = _CLAIMS.unpack_from(plain)
    is_client = hmac.compare_digest(known, fingerprint(client))
    if not is_client or not now < expires:
        raise invalid()
    session_id = plain[_CLAIMS.size :].decode()
    return Claims(session_id, incarnation, issued, expires, known)


def key_id_in(token: object) -> bytes | None:
    """Return the id of the key that a token says it was made with, unverified; None: it is none."""
    data = _decoded(token)
    return None if data is None else data[len(VERSION) : len(VERSION) + 4]


def _encoded(data: bytes) -> str:
    text = binascii.b2a_base64(data, newline=False).decode()
    return text.rstrip("=").replace("+", "-").replace("/", "_")


def _decoded(token: object) -> bytes | None:
    """Return the bytes of a token; None: it is no text that `_encoded` makes, or too long."""
    if type(token) is not str or len(token) > MAX_TOKEN_CHARS or not _TEXT.fullmatch(token):
        return None
    padded = token.replace("-", "+").replace("_", "/") + "=" * (-len(token) % 4)
    try:
        data = binascii.a2b_base64(padded, strict_mode=True)
    except binascii.Error:
        return None
    if data[: len(VERSION)] != VERSION or _encoded(data) != token:
        return None
    return data
