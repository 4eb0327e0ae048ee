"""The key ring: which keys there are, which one is the newest, and what is derived from each.

A key is 32 random bytes. Its id is derived from it, so it can neither be mixed up nor forgotten.
What is sealed or signed names the key by its id; the newest key seals and signs, all others only
open and validate. No key is ever used itself: each purpose has its own key, derived from it, so
that a token never opens as a record, nor a record as a token.

Nothing here prints a key: neither a representation nor an error contains one.
"""

from __future__ import annotations

import binascii
import hmac
import re
import secrets
from collections.abc import Iterable
from hashlib import sha256
from typing import Final

from persistence.errors import ConfigError
from persistence.sealer import KEY_ID_BYTES

KEY_BYTES: Final = 32
MAX_KEYS: Final = 1000
_ID_LABEL: Final = b"persistence key id"
_PURPOSE_LABEL: Final = b"persistence purpose "
_HEX: Final = re.compile(r"[0-9a-fA-F]{64}")
_BASE64: Final = re.compile(r"[A-Za-z0-9+/_-]{43}=?")
_ALLOWED: Final = (
    "a key is 32 random bytes as 64 hexadecimal digits or as base64, for example what "
    "'openssl rand -hex 32' prints"
)


class KeyRing:
    """Some keys, the newest last.

    Args:
        keys: 32 bytes each, the newest last; at least one.

    Attributes:
        newest: id of the newest key.
    """

    def __init__(self, keys: Iterable[bytes]) -> None:
        self._keys = {key_id(key): key for key in keys}
        assert self._keys, "a ring has a key"
        self.newest = next(reversed(self._keys))

    def __contains__(self, wanted: bytes) -> bool:
        return wanted in self._keys

    @property
    def ids(self) -> list[bytes]:
        """The ids of all keys, the newest last."""
        return list(self._keys)

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(each.hex() for each in self._keys)})"

    def derived(self, wanted: bytes, purpose: bytes) -> bytes | None:
        """Return the key for `purpose` of the key with id `wanted`; None: there is none."""
        key = self._keys.get(wanted)
        return None if key is None else derive(key, _PURPOSE_LABEL + purpose)

    def learn(self, other: KeyRing) -> None:
        """Take over the keys of another ring, to open with: the newest one stays the newest."""
        self._keys = {**other._keys, **self._keys}


def derive(key: bytes, label: bytes) -> bytes:
    """Return 32 bytes that follow from `key` and `label`, and tell nothing of the key."""
    return hmac.digest(key, label, "sha256")


def key_id(key: bytes) -> bytes:
    """Return the id of a key."""
    return sha256(_ID_LABEL + key).digest()[:KEY_ID_BYTES]


def new_key() -> bytes:
    """Return a new key."""
    return secrets.token_bytes(KEY_BYTES)


def parse_keys(text: str, where: str) -> list[bytes]:
    """Return the keys in `text`, the newest last.

    Keys are separated by white space or commas; what follows a ``#`` on its line is a comment.

    Args:
        text: what a file or a variable holds.
        where: which one, for messages.

    Raises:
        ConfigError: it holds none, one twice, too many, or something else. It says which entry is
            wrong, and never what is in it.
    """
    lines = [line.partition("#")[0] for line in text.splitlines()]
    words = " ".join(lines).replace(",", " ").split()
    if not words:
        raise ConfigError(f"{where} holds no key: {_ALLOWED}")
    if len(words) > MAX_KEYS:
        raise ConfigError(f"{where} holds {len(words)} keys: at most {MAX_KEYS} are allowed")
    keys = []
    for number, word in enumerate(words, 1):
        key = _parsed(word)
        if key is None:
            raise ConfigError(f"{where}: entry {number} is no key: {_ALLOWED}")
        if key in keys:
            raise ConfigError(f"{where}: entry {number} is there a second time; leave one out")
        keys.append(key)
    return keys


def _parsed(word: str) -> bytes | None:
    if _HEX.fullmatch(word):
        return bytes.fromhex(word)
    if not _BASE64.fullmatch(word):
        return None
    text = word.rstrip("=").replace("-", "+").replace("_", "/") + "="
    try:
        key = binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error:
        return None
    # Of the last character two bits are not used; a mistyped one must not pass for the right one.
    if len(key) != KEY_BYTES or binascii.b2a_base64(key, newline=False).decode() != text:
        return None
    return key


def format_keys(keys: Iterable[bytes]) -> str:
    """Return the text of a key file: one key a line, the newest last."""
    lines = ["# Keys of the persistence engine, the newest last. Keep them secret, and keep them."]
    lines += [f"{key.hex()}  # {key_id(key).hex()}" for key in keys]
    return "\n".join(lines) + "\n"
