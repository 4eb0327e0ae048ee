"""What ends a command early: an error in one line, and the exit codes."""

from __future__ import annotations

from typing import Final

from persistence.errors import PersistenceError

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
"""An error, damage found, or a verification that did not succeed."""
# 2, as typer has it: the command line itself is wrong.
EXIT_INTERRUPTED: Final = 130
"""Ctrl-C; what shells report for SIGINT. Other signals: see `running.exit_code_of_signal`."""


class CommandError(PersistenceError):
    """A command cannot go on; the message is all that its user sees."""
