"""Where a command takes the keys of an encrypted directory from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from persistence import SecurityConfig, StateConfig
from persistence.cli.failure import CommandError
from persistence.config import ENV_PREFIX
from persistence.disk.filenames import MANIFEST, MANIFEST_COPY
from persistence.disk.inspect import keys_of

KeyFileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Of an encrypted directory: the workers' security.key_file. Without it "
        "PERSISTENCE_SECURITY__KEY_FILE or PERSISTENCE_SECURITY__SECRET_KEYS may say the keys.",
    ),
]
_PREFIX: Final = f"{ENV_PREFIX}SECURITY"


def of_environment() -> SecurityConfig:
    """Return what the environment says; nothing but that is read for it.

    Raises:
        ConfigError: it is wrong.
    """
    if any(name.upper().startswith(_PREFIX) for name in os.environ):
        return StateConfig.load().security
    return SecurityConfig()


def source_of(key_file: Path | None) -> dict[str, Any]:
    """Return the fields that say where keys are: those of the option, or of the environment.

    Raises:
        CommandError: the file is not there. No command makes one in passing.
        ConfigError: the environment is wrong.
    """
    if key_file is None:
        found = of_environment()
        if found.key_file:
            return {"key_file": found.key_file}
        return {"secret_keys": found.secret_keys}
    if not key_file.is_file():
        raise CommandError(
            f"{key_file} is no file with keys; 'persistence keys create FILE' makes one"
        )
    return {"key_file": str(key_file.absolute())}


def security_for(directory: Path, key_file: Path | None) -> SecurityConfig:
    """Return how `directory` is encrypted, if it is; a new one is if `key_file` is given.

    Raises:
        CommandError: it is, and the keys are not given; or it is not, and they are.
        DirectoryNotUsable: not a directory of the engine.
    """
    source = source_of(key_file)
    is_new = not any((directory / name).exists() for name in (MANIFEST, MANIFEST_COPY))
    if is_new:
        return SecurityConfig(encrypt=True, **source) if key_file else SecurityConfig()
    keys = keys_of(str(directory))
    if not keys:
        if key_file is not None:
            raise CommandError(f"{directory} is not encrypted: leave --key-file out")
        return SecurityConfig()
    if not any(source.values()):
        raise CommandError(
            f"{directory} is encrypted (key {', '.join(each.hex() for each in keys)}): give the "
            "keys: --key-file FILE, or PERSISTENCE_SECURITY__SECRET_KEYS in the environment"
        )
    return SecurityConfig(encrypt=True, **source)
