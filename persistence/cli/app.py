"""The commands put together, and the one place where errors become exit codes."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Annotated, Final, NoReturn, TypeGuard

import typer

from persistence.cli import (
    checkpoints,
    demo,
    export,
    import_,
    inspect,
    keys,
    replay,
    screen,
    verify,
)
from persistence.cli.failure import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK
from persistence.cli.running import exit_code_of_signal, interruptible
from persistence.errors import PersistenceError

_PROGRAM: Final = "persistence"
_DISTRIBUTION: Final = "persistence-engine"
_TRACEBACK: Final = "--traceback"

app = typer.Typer(
    name=_PROGRAM,
    help="Session state that is as fast as memory and survives kill -9.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for name, module, summary in (
    ("demo", demo, "Kill a worker with SIGKILL: nothing is lost."),
    ("replay", replay, "Replay access logs, verify every session."),
    ("inspect", inspect, "Show what a directory holds."),
    ("verify", verify, "Check a directory for damage."),
    ("export", export, "Write a directory's sessions as JSON Lines."),
    ("import", import_, "Read sessions from JSON Lines."),
):
    app.command(name, short_help=summary)(module.command)
app.add_typer(checkpoints.commands, name="checkpoints")
app.add_typer(keys.commands, name="keys")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        screen.say(f"{_PROGRAM} {_version()}")
        raise typer.Exit


def _version() -> str:
    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "(not installed)"


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    traceback: Annotated[
        bool, typer.Option(_TRACEBACK, help="Show where an error comes from.")
    ] = False,
) -> None:
    """Session state that is as fast as memory and survives kill -9."""


def run_command(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors are printed as one line on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        with _standard_streams(), interruptible():
            code = app(words, standalone_mode=False, prog_name=_PROGRAM)
            sys.stdout.flush()
        if code == EXIT_INTERRUPTED:  # how typer passes on a KeyboardInterrupt; or as Abort
            _complain("interrupted")
            return exit_code_of_signal()
        return code if isinstance(code, int) else EXIT_OK
    except BrokenPipeError:
        # Whoever read our output (``| head``) has seen enough. The interpreter flushes stdout
        # once more at its end; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted")
        return exit_code_of_signal()
    except Exception as error:  # noqa: BLE001 (the last resort: a line instead of a traceback)
        if _TRACEBACK in words:
            traceback.print_exc()
        _complain(_message(error))
        code = getattr(error, "exit_code", EXIT_FAILED)
        return code if isinstance(code, int) and code else EXIT_FAILED


class _ClosedFile(io.RawIOBase):
    """Stands for a standard stream that whoever started us has closed (``>&-``)."""

    def __init__(self, name: str) -> None:
        self._name = name

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, _: object) -> NoReturn:
        raise OSError(errno.EBADF, f"{self._name} is closed")

    def write(self, _: object) -> NoReturn:
        raise OSError(errno.EBADF, f"{self._name} is closed")


def _closed_stream(name: str) -> io.TextIOWrapper:
    file = _ClosedFile(name)
    buffer = io.BufferedReader(file) if name == "stdin" else io.BufferedWriter(file)
    return io.TextIOWrapper(buffer)


@contextmanager
def _standard_streams() -> Iterator[None]:
    """Let no standard stream fail at what is printed.

    In the place of a closed one there is something that says so when it is used. In a locale that
    is not Unicode's, characters that it does not have are printed as escapes.
    """
    changed = [(stream, stream.errors) for stream in (sys.stdout, sys.stderr) if _is_narrow(stream)]
    for stream, _ in changed:
        stream.reconfigure(errors="backslashreplace")
    closed = [name for name in ("stdin", "stdout") if getattr(sys, name) is None]
    for name in closed:
        setattr(sys, name, _closed_stream(name))
    try:
        yield
    finally:
        for name in closed:
            setattr(sys, name, None)
        for stream, errors in changed:
            stream.reconfigure(errors=errors)


def _is_narrow(stream: object) -> TypeGuard[io.TextIOWrapper]:
    """Whether it is a stream that cannot print every character."""
    return isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf")


def _message(error: Exception) -> str:
    """Return what the user is told about `error`."""
    if hasattr(error, "format_message"):  # a wrong command line
        context = getattr(error, "ctx", None)
        path = _PROGRAM if context is None else context.command_path
        return f"{error.format_message().rstrip('.')}; see '{path} --help'"
    if isinstance(error, PersistenceError):
        return str(error)
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return reason if error.filename is None else f"{error.filename}: {reason}"
    return f"internal error: {type(error).__name__}: {error} ({_TRACEBACK} shows where)"


def _complain(message: str) -> None:
    """Print one line, whatever names from outside `message` may contain."""
    message = "; ".join(message.splitlines())
    screen.note(f"{_PROGRAM}: {screen.escaped(message)}")
