"""Results as tables on a terminal. Rows that we lose are shown, and marked."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console
from rich.table import Table

from benchmarks.contender import ENGINE
from benchmarks.results import BarResult, Distribution, RowResult, RunResult, Unit, WorkloadResult

LEGEND = """Medians of interleaved repetitions, each contender in a process of its own; ratios are
medians of the ratios within a repetition. 'survives': what a write survives once acknowledged.
'called': how asyncio code calls it: await, inline (a blocking call on the loop), to_thread. Event
loop: by how much a task that was due was late while the contender worked, one sample per ms."""

PASSED = {True: "PASS", False: "FAIL", None: "n/a"}
_STYLE = {True: "bold green", False: "bold red", None: "yellow"}

AHEAD = "◀ ahead"
"""Marks a peer's row that is better than the engine's."""

Cells = list[str]

_WIDTH = 140  # of what is written to a file or a pipe


class Printer:
    """Prints to a terminal, or a file or pipe."""

    def __init__(self, out: TextIO | None = None) -> None:
        out = out or sys.stdout
        self._console = Console(
            file=out, highlight=False, markup=False, width=None if out.isatty() else _WIDTH
        )

    def table(self, header: Cells, rows: list[Cells], text_columns: int, marked: set[int]) -> None:
        """Print one table; the first `text_columns` columns are text, the others numbers."""
        table = Table()
        for number, name in enumerate(header):
            table.add_column(
                name, justify="left" if number < text_columns else "right", overflow="fold"
            )
        for number, row in enumerate(rows):
            table.add_row(*row, style="bold yellow" if number in marked else None)
        self._console.print(table)

    def line(self, text: str, style: str = "") -> None:
        """Print one line; it is not cut, whatever the width."""
        self._console.print(text, style=style or None, soft_wrap=True)


def print_environment(printer: Printer, environment: dict[str, str], idle: Distribution) -> None:
    """Print what the numbers are taken on."""
    for name, value in (environment | {"idle event loop": described(idle)}).items():
        printer.line(f"{name:>18}  {value}")
    printer.line("")


def described(lag: Distribution) -> str:
    """Say what a distribution is, in one line."""
    return (
        f"late by p50 {number(lag.p50)}, p99 {number(lag.p99)}, p99.9 {number(lag.p99_9)}, "
        f"max {number(lag.max)} ms ({lag.count:,} samples)"
    )


def print_workload(printer: Printer, workload: WorkloadResult) -> None:
    """Print one workload: its table, why rows are missing, its bars."""
    printer.line(f"{workload.name}: {workload.definition}", "bold")
    marked = {n for n, row in enumerate(workload.rows) if workload.is_lost(row)}
    printer.table(heading(workload), [cells(workload, row) for row in workload.rows], 3, marked)
    for row in workload.rows:
        if row.failure is not None:
            printer.line(f"  {row.contender} {row.failure.kind}: {row.failure.reason}", "yellow")
    for bar in workload.bars:
        printer.line(f"  {bar_text(bar)}", _STYLE[bar.passed])
    printer.line(f"  took {workload.seconds:.0f} s\n")


def bar_text(bar: BarResult) -> str:
    """Say whether a bar was reached, in one line."""
    return f"{PASSED[bar.passed]}  {bar.claim}: {bar.measured}"


def heading(workload: WorkloadResult) -> Cells:
    """Return the headings of a workload's table."""
    first, *others = workload.units
    titles = ["contender", "survives", "called", _title(first)]
    titles += [f"{ENGINE} is"] if others else ["min to max", f"{ENGINE} is"]
    titles += [_title(unit) for unit in others]
    if any(row.lag for row in workload.rows):
        titles += ["loop p50", "p99", "p99.9", "max, ms"]
    return titles


def _title(unit: Unit) -> str:
    if unit.name == "rate":
        return unit.unit
    return f"{unit.name}, {unit.unit}" if unit.unit else unit.name


def cells(workload: WorkloadResult, row: RowResult) -> Cells:
    """Return the cells of a row, under `heading`."""
    first, *others = workload.units
    texts = [row.contender, row.durability, row.called, _median(row, first)]
    if not others:  # a table of one metric has room for its spread
        samples = row.samples(first.name)
        texts.append(f"{number(min(samples))} to {number(max(samples))}" if samples else "")
    texts.append(_advantage(workload, row))
    texts += [_median(row, unit) for unit in others]
    if any(each.lag for each in workload.rows):
        lag = row.lag
        values = (lag.p50, lag.p99, lag.p99_9, lag.max) if lag else ()
        texts += [number(value) for value in values] or [""] * 4
    return texts


def _median(row: RowResult, unit: Unit) -> str:
    found = row.metrics.get(unit.name)
    return number(found.median) if found else "-"


def _advantage(workload: WorkloadResult, row: RowResult) -> str:
    advantage = workload.advantage(row)
    if advantage is None or row.role == "engine":
        return ""
    mark = f" {AHEAD}" if workload.is_lost(row) else " of limit" if row.role == "limit" else ""
    return f"{times(advantage)}{mark}"


def number(value: float) -> str:
    """Write a number with three digits or more."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3g}"


def times(factor: float | None) -> str:
    """Write how many times as good the engine is; a small factor is not rounded to nothing."""
    if factor is None:
        return ""
    return f"{factor:.2f} ×" if factor >= 0.1 else f"{factor:.2g} ×"


def lost_rows(run: RunResult) -> list[tuple[WorkloadResult, RowResult]]:
    """Return the rows of peers that are ahead of the engine's."""
    return [
        (workload, row)
        for workload in run.workloads
        for row in workload.rows
        if workload.is_lost(row)
    ]
