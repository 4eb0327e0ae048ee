"""What commands print: tables and JSON on stdout, progress and notes on stderr.

rich is imported where it is used: a command that prints JSON does not pay for it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import typer

from persistence.clock import SystemClock

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_PROGRESS_SECONDS: Final = 5.0


def say(text: str) -> None:
    """Print a line on stdout."""
    typer.echo(text)


def print_json(value: Any) -> None:
    """Print `value` on stdout as exactly one JSON object."""
    say(json.dumps(value, indent=2))


def note(text: str) -> None:
    """Print a line on stderr."""
    typer.echo(text, err=True)


def escaped(text: str) -> str:
    """Return `text` with whatever a terminal would obey, or a line would end at, escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def format_bytes(size_bytes: float) -> str:
    """Return `size_bytes` with two or three digits: ``812 B``, ``1.4 KiB``, ``256 KiB``."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _is_seen() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _console(stderr: bool = False) -> Console:
    from rich.console import Console  # noqa: PLC0415 - see above

    # No highlighting and no markup: session ids and file names come from outside.
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print a table of names and values on stdout."""
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(title=Text(title), title_justify="left", show_header=False, box=None)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    _console().print(table)


def print_columns(
    headers: Sequence[str], rows: Iterable[Sequence[str]], right: Container[str] = ()
) -> None:
    """Print a table with a line for each row, however long, so that it can be cut and searched.

    Args:
        headers: of the columns.
        rows: as many cells each; they are escaped.
        right: headers of the columns that are aligned to the right.
    """
    lines = [list(headers), *([escaped(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.rjust(width) if header in right else cell.ljust(width)
            for header, width, cell in zip(headers, widths, line, strict=True)
        ]
        say("  ".join(cells).rstrip())


@contextmanager
def status_line(is_quiet: bool) -> Iterator[Callable[[str], None] | None]:
    """Yield a function that shows a changing line on stderr; None where nobody would see it.

    On a terminal the line is rewritten in place. Elsewhere it is printed every few seconds,
    unless `is_quiet`.
    """
    if _is_seen():
        console = _console(stderr=True)
        with console.status("…") as status:
            yield status.update
    elif is_quiet:
        yield None
    else:
        yield _plain_status()


def _plain_status() -> Callable[[str], None]:
    clock = SystemClock()
    shown = clock.monotonic()

    def show(text: str) -> None:
        nonlocal shown
        if clock.monotonic() - shown >= _PLAIN_PROGRESS_SECONDS:
            shown = clock.monotonic()
            note(text)

    return show


@contextmanager
def progress_bar(label: str, total: int, is_quiet: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances a bar on stderr, shown on a terminal only."""
    with progress_of(label, is_quiet) as show:
        done = 0

        def advance(amount: int) -> None:
            nonlocal done
            done += amount
            show(done, total)

        show(0, total)
        yield advance


@contextmanager
def progress_of(label: str, is_quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that is told how many bytes of how many are done.

    A bar on stderr shows it, on a terminal only. It may go back, and the total may change.
    """
    if is_quiet or not _is_seen():
        yield lambda _done, _total: None
        return
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
