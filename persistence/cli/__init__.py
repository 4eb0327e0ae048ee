"""The command line: ``persistence replay | demo | inspect | verify | export | import | …``.

Each command is a small module of its own behind `persistence.cli.app`; what it does is in modules
that know nothing of options and terminals.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from persistence.cli.failure import EXIT_INTERRUPTED

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: with 0 only when the command did what it was asked to.

    Args:
        arguments: the words behind the program's name; None: those of this process.
    """
    try:
        # Imported here: a neighbour (the parser, the replayer) should not load a terminal.
        from persistence.cli.app import run_command  # noqa: PLC0415 - as said
    except KeyboardInterrupt:  # it takes long enough to be interrupted
        sys.stderr.write("persistence: interrupted\n")
        raise SystemExit(EXIT_INTERRUPTED) from None

    raise SystemExit(run_command(arguments))
