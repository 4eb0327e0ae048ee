"""From the configuration to the keys: read from a file or given, made where there are none.

Without a configured source the key for tokens is derived from a secret of the directory, its
fingerprint key: tokens then hold for this directory only, and for as long as it exists. Encryption
always needs a source of its own: a key that lies beside what it encrypts protects nothing.

A key file that is missing is made with a fresh key, readable for its owner only. Where several
workers start at once, one of them makes it. In front of an encrypted directory it is not made: the
right one is lost, and another would not help.

A worker signs and seals with the key that was the newest when it opened. Keys that others have
added since are learned when one is met.
"""

from __future__ import annotations

import logging
import os
from typing import Final

from persistence.clock import Clock
from persistence.config import SecurityConfig
from persistence.disk.directory import read_manifest
from persistence.disk.files import Files, create_key_file, read_key_file, replace_key_file
from persistence.disk.threads import Threads, undisturbed
from persistence.errors import ConfigError, DirectoryNotUsable
from persistence.sealer import Sealer, Seals
from persistence.security.keyring import (
    KeyRing,
    derive,
    format_keys,
    key_id,
    new_key,
    parse_keys,
)

_log = logging.getLogger("persistence.security")

_LOOK_AGAIN_SECONDS: Final = 1.0
_OTHERS: Final = 0o007
_TOKEN_LABEL: Final = b"persistence directory token key"


class Keys:
    """The keys of one manager.

    Args:
        config: where they come from.
        ring: what was read; None: no source is configured.
        clock: time.

    Attributes:
        seals: seal what is stored; None: it is not encrypted.
    """

    def __init__(self, config: SecurityConfig, ring: KeyRing | None, clock: Clock) -> None:
        self.seals: Seals | None = None
        self._config = config
        self._ring = ring
        self._monotonic = clock.monotonic
        self._not_before = clock.monotonic()
        self._tokens: Sealer | None = None

    def __repr__(self) -> str:
        return f"Keys({self._ring!r})"

    @classmethod
    async def load(cls, config: SecurityConfig, directory: str, clock: Clock) -> Keys:
        """Read the keys that `config` names, or make them.

        Args:
            config: where they come from.
            directory: that may be encrypted already.
            clock: time.

        Raises:
            ConfigError: they cannot be read, or are no keys. The message shows none of them.
        """
        if config.secret_keys is None and config.key_file is None:
            return cls(config, None, clock)
        threads = Threads()  # the file may be on a network file system
        try:
            return await undisturbed(threads.read(cls._loaded, config, directory, clock))
        finally:
            threads.close()

    @classmethod
    def _loaded(cls, config: SecurityConfig, directory: str, clock: Clock) -> Keys:
        """Read the keys, and load `cryptography`: that takes longer than the loop should wait."""
        if config.secret_keys is not None:
            ring = KeyRing(parse_keys(config.secret_keys, "security.secret_keys"))
        else:
            assert config.key_file is not None, "one of the two"
            # Absolute from here on: the process may go to another directory meanwhile.
            path = os.path.abspath(config.key_file)
            config = config.model_copy(update={"key_file": path})
            ring = _from_file(config, directory)
        keys = cls(config, ring, clock)
        keys._load_ciphers()
        return keys

    def _load_ciphers(self) -> None:
        """Make what seals and opens, and load what that needs."""
        assert self._ring is not None, "there are keys"
        if self._config.encrypt:
            self.seals = seals_of(self._ring)
        self._tokens = _sealing(self._ring)

    def tokens(self, directory_secret: bytes, *, is_shared: bool) -> Sealer:
        """Return what makes and reads tokens.

        Args:
            directory_secret: what to derive the key from where none is configured.
            is_shared: other workers have the same sessions, and another secret.
        """
        if self._tokens is None:
            if is_shared:
                _log.warning(
                    "tokens of this worker are not valid for the others: set security.key_file or "
                    "security.secret_keys to the same keys for all of them"
                )
            self._ring = KeyRing([derive(directory_secret, _TOKEN_LABEL)])
            self._tokens = _sealing(self._ring)
        return self._tokens

    async def learn(self, threads: Threads) -> None:
        """Look for keys that were added to the file since, now and then: one is not known."""
        if self._config.key_file is None or self._monotonic() < self._not_before:
            return
        self._not_before = self._monotonic() + _LOOK_AGAIN_SECONDS
        assert self._ring is not None, "it was read from the file"
        try:
            self._ring.learn(await threads.read(read_ring, self._config.key_file))
        except (ConfigError, OSError) as error:
            _log.warning("the keys could not be read again: %s", error)


def _sealing(ring: KeyRing) -> Sealer:
    """Return what seals and opens tokens."""
    from persistence.security.sealing import (  # noqa: PLC0415 - loads `cryptography`
        TOKENS,
        Sealing,
    )

    return Sealing(ring, TOKENS)


def seals_of(ring: KeyRing) -> Seals:
    """Return what seals with these keys."""
    from persistence.security.sealing import (  # noqa: PLC0415 - loads `cryptography`
        CHECKPOINTS,
        CONFLICTS,
        RECORDS,
        REMOTE,
        Sealing,
    )

    records, remote, checkpoints, conflicts = (
        Sealing(ring, purpose) for purpose in (RECORDS, REMOTE, CHECKPOINTS, CONFLICTS)
    )
    return Seals(records, remote, checkpoints, conflicts)


def read_ring(path: str) -> KeyRing:
    """Read a key file.

    Raises:
        OSError: it cannot be read.
        ConfigError: it holds no keys.
    """
    return KeyRing(read_keys(path))


def read_keys(path: str) -> list[bytes]:
    """Read the keys in a file, the newest last.

    Raises:
        OSError: it cannot be read.
        ConfigError: it holds no keys.
    """
    data, mode = read_key_file(path)
    if mode & _OTHERS:
        _log.warning("%s: other users may read these keys (mode %o): chmod 600", path, mode & 0o777)
    return parse_keys(data.decode("ascii", "replace"), path)


def create_keys(path: str) -> bool:
    """Make a key file with a fresh key; False: there is one, and it was left as it is.

    Raises:
        OSError: it cannot be made.
    """
    return create_key_file(path, format_keys([new_key()]).encode())


def add_key(path: str) -> bytes:
    """Add a fresh key to a key file, the newest from now on; return its id.

    Raises:
        OSError: it cannot be read or replaced; then it is as it was.
        ConfigError: it holds no keys.
    """
    keys = [*read_keys(path), new_key()]
    replace_key_file(path, format_keys(keys).encode())
    return key_id(keys[-1])


def seals_for(config: SecurityConfig) -> Seals | None:
    """Return what seals as `config` says, without a manager; None: nothing does.

    Raises:
        ConfigError: the keys cannot be read.
    """
    if not config.encrypt:
        return None
    if config.secret_keys is not None:
        return seals_of(KeyRing(parse_keys(config.secret_keys, "security.secret_keys")))
    assert config.key_file is not None, "the configuration has been checked"
    try:
        return seals_of(read_ring(config.key_file))
    except OSError as error:
        raise ConfigError(
            f"security.key_file: {config.key_file} cannot be read: {error.strerror or error}"
        ) from None


def _from_file(config: SecurityConfig, directory: str) -> KeyRing:
    path = config.key_file
    assert path is not None, "looked at before"
    try:
        try:
            return read_ring(path)
        except FileNotFoundError:
            if config.encrypt and _is_encrypted(directory):
                raise ConfigError(
                    f"security.key_file: {path} is missing and {directory} is encrypted: bring "
                    "the file back; without it the directory cannot be read"
                ) from None
            if create_keys(path):
                _log.warning("%s: made with a fresh key; keep a copy of it in a safe place", path)
            return read_ring(path)
    except OSError as error:
        raise ConfigError(
            f"security.key_file: {path} cannot be read or made: {error.strerror or error}"
        ) from None


def _is_encrypted(directory: str) -> bool:
    try:
        return bool(read_manifest(Files(), os.path.abspath(directory))[0].keys)
    except (OSError, DirectoryNotUsable):
        return False  # there is none yet, or opening it says what is wrong
