"""``persistence keys``: make and rotate a file with keys, and show which there are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from persistence.cli.failure import EXIT_OK, CommandError
from persistence.cli.screen import say
from persistence.keys import add_key, create_keys, read_keys
from persistence.security.keyring import key_id

commands = typer.Typer(
    help="Make, rotate and show the file with the keys (security.key_file).",
    short_help="Make, rotate and show a file with keys.",
    rich_markup_mode=None,
)
_FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The file with the keys.")]
_KEEP: Final = "Keep a copy in a safe place: what is encrypted cannot be read without it."


@commands.command("create", short_help="Make a file with one fresh key.")
def create(file: _FileArgument) -> int:
    """Make a file with one fresh key, that only its owner can read. It must not exist yet."""
    if not create_keys(str(file)):
        raise CommandError(f"{file} exists already and was left as it is; to add a key: rotate")
    say(f"{file}: key {key_id(read_keys(str(file))[-1]).hex()}. {_KEEP}")
    return EXIT_OK


@commands.command("rotate", short_help="Add a fresh key, the newest from now on.")
def rotate(file: _FileArgument) -> int:
    """Add a fresh key. Workers use it once they are restarted, one after the other.

    The older ones stay in the file: what was made with them is still valid. When an old one may go
    is said in docs/security.md.
    """
    say(f"{file}: key {add_key(str(file)).hex()} is the newest now. {_KEEP}")
    return EXIT_OK


@commands.command("list", short_help="Show the ids of the keys.")
def show(file: _FileArgument) -> int:
    """Show the ids of the keys in a file, the newest last; never a key."""
    for key in read_keys(str(file)):
        say(key_id(key).hex())
    return EXIT_OK
