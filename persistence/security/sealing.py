"""Sealing: AES-256-GCM with a key for each purpose and group.

Sealed bytes: id of the key (4 bytes), nonce (12), ciphertext, tag (16). Authenticated with them,
but not part of them: the key id, and whatever the caller says it is *about*.

The nonce is random, never derived: a commit that failed may be made again with other content. With
random nonces of 96 bits no key should seal more than 2**32 messages (NIST SP 800-38D). Therefore
each purpose has a key for each *group*, derived by HMAC-SHA256; records are in 256 groups, by the
first byte of their incarnation, which is random: so a key of the ring does for 2**40 of them.

`cryptography` is only loaded where something is sealed or opened: it takes some milliseconds.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

from persistence.sealer import KEY_ID_BYTES, SEAL_BYTES, key_id_of
from persistence.security.keyring import KeyRing, derive

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_NONCE_BYTES: Final = 12
_NONCE_END: Final = KEY_ID_BYTES + _NONCE_BYTES

_GROUP_LABEL: Final = b"persistence group "

RECORDS: Final = b"records"
REMOTE: Final = b"remote"
CHECKPOINTS: Final = b"checkpoints"
CONFLICTS: Final = b"conflicts"
TOKENS: Final = b"tokens"


class Sealing:
    """A `Sealer` for one purpose. Thread-safe.

    Args:
        ring: the keys; one that is added to it later opens from then on.
        purpose: what is sealed under another one does not open.
    """

    def __init__(self, ring: KeyRing, purpose: bytes) -> None:
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - see the module
        from cryptography.hazmat.primitives.ciphers.aead import (  # noqa: PLC0415
            AESGCM,
        )

        self.newest = ring.newest
        self._ring = ring
        self._purpose = purpose
        self._new_cipher = AESGCM
        self._invalid = InvalidTag
        self._ciphers: dict[bytes, AESGCM] = {}  # by key id and group

    def __repr__(self) -> str:
        return f"Sealing({self._purpose.decode()}, {self._ring!r})"

    def knows(self, key_id: bytes) -> bool:
        """Whether what was sealed with this key can be opened."""
        return key_id in self._ring

    def _cipher(self, name: bytes) -> AESGCM:
        """Return the cipher of a key and group: the id of the one, then the other.

        Raises:
            KeyError: there is no such key.
        """
        cipher = self._ciphers.get(name)
        if cipher is None:
            key = self._ring.derived(name[:KEY_ID_BYTES], self._purpose)
            if key is None:
                raise KeyError(name)
            cipher = self._new_cipher(derive(key, _GROUP_LABEL + name[KEY_ID_BYTES:]))
            self._ciphers[name] = cipher
        return cipher

    def seal(self, plain: bytes | memoryview, about: bytes, group: bytes = b"") -> bytes:
        """Seal `plain` with the newest key."""
        newest = self.newest
        nonce = secrets.token_bytes(_NONCE_BYTES)
        body = self._cipher(newest + group).encrypt(nonce, plain, newest + about)
        return b"".join((newest, nonce, body))

    def open(self, sealed: bytes | memoryview, about: bytes, group: bytes = b"") -> bytes | None:
        """Return what was sealed about the same; None: it was not, or not with a key of ours."""
        if len(sealed) < SEAL_BYTES:
            return None
        key_id = key_id_of(sealed)
        try:
            plain: bytes = self._cipher(key_id + group).decrypt(
                sealed[KEY_ID_BYTES:_NONCE_END], sealed[_NONCE_END:], key_id + about
            )
        except (KeyError, self._invalid):
            return None
        return plain
