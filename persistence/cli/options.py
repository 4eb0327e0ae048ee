"""Options that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from persistence.config import parse_bytes
from persistence.errors import ConfigError

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")
]
DirectoryArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="A directory of the engine (disk.path).")
]

STANDARD_STREAM: Final = Path("-")
"""Stands for stdin or stdout in the place of a file, as it does for most commands."""


def size_option(name: str, help_text: str) -> Any:
    """Return an option that takes a size such as ``256KiB``."""
    return typer.Option(name, parser=_size, metavar="SIZE", help=help_text)


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


_DEEP: Final = 10_000


@contextmanager
def deep_values() -> Iterator[None]:
    """Let JSON nest as deep as a record can, for which the interpreter's default is too low.

    A record nests 511 levels, and each may become three of JSON (tag, list of pairs, pair).
    """
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, _DEEP))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
