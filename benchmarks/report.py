"""A run's results as tables for people and as JSON for programs. Rows that we lose are shown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TextIO

from benchmarks.bars import paired
from benchmarks.contender import ENGINE, Metric
from benchmarks.optional import UnavailableError, load
from benchmarks.runner import Result, Row

_PASSED = {True: "PASS", False: "FAIL", None: "n/a"}
_STYLE = {True: "bold green", False: "bold red", None: "yellow"}

Cells = list[str]

_WIDTH = 120  # of what is written to a file or a pipe


class Printer:
    """Prints tables: with rich where it is installed, else as aligned plain text."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out = out or sys.stdout
        try:
            self._tables = load("rich.table")
            console = load("rich.console").Console
        except UnavailableError:
            self._console = None
        else:
            width = None if out.isatty() else _WIDTH
            self._console = console(file=out, highlight=False, width=width)

    def table(self, title: str, header: Cells, rows: list[Cells], text_columns: int) -> None:
        """Print one table; the first `text_columns` columns are text, the others numbers."""
        if self._console is None:
            self._plain_table(title, header, rows, text_columns)
            return
        self.line(title, "bold")
        table = self._tables.Table()
        for number, name in enumerate(header):
            table.add_column(
                name, justify="left" if number < text_columns else "right", overflow="fold"
            )
        for row in rows:
            table.add_row(*row)
        self._console.print(table)

    def _plain_table(self, title: str, header: Cells, rows: list[Cells], text_columns: int) -> None:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        self.line(title)
        for row in [header, ["-" * width for width in widths], *rows]:
            cells = [
                cell.ljust(width) if number < text_columns else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            self.line("  ".join(cells).rstrip())

    def line(self, text: str, style: str = "") -> None:
        """Print one line, in `style` where the terminal can."""
        if self._console is None:
            print(text, file=self._out)
        else:
            self._console.print(text, style=style, markup=False, soft_wrap=True)


def print_environment(printer: Printer, environment: dict[str, str]) -> None:
    """Print what the numbers were taken on."""
    printer.table("Measured on", ["what", ""], [list(item) for item in environment.items()], 2)


def print_result(printer: Printer, result: Result) -> None:
    """Print one workload: its rows, then why some have no number, then its bars."""
    workload = result.workload
    header = ["contender", "survives"]
    for metric in workload.metrics:
        header += _heading(metric, len(workload.metrics) == 1)
    rows = [_cells(row, result) for row in result.rows]
    printer.table(f"{workload.name}: {workload.definition}", header, rows, 2)
    for row in result.rows:
        if row.failure is not None:
            printer.line(f"  {row.contender} {row.failure.kind}: {row.failure.reason}", "yellow")
    for verdict in result.verdicts:
        text = f"  {_PASSED[verdict.passed]}  {verdict.claim}: {verdict.measured}"
        printer.line(text, _STYLE[verdict.passed])
    printer.line(f"  took {result.seconds:.0f} s\n")


def _heading(metric: Metric, alone: bool) -> Cells:
    """Return the headings of one metric; alone in its table it has room for its spread."""
    name = metric.unit.strip() if alone else f"{metric.name}, {metric.unit.strip()}"
    return [name, "min to max", f"{ENGINE} is"] if alone else [name.removesuffix(", ")]


def _cells(row: Row, result: Result) -> Cells:
    metrics = result.workload.metrics
    cells = [row.contender, row.durability]
    for metric in metrics:
        values = row.values(metric.name)
        cells.append(_number(row.medians()[metric.name]) if values else "-")
        if len(metrics) == 1:
            spread = f"{_number(min(values))} to {_number(max(values))}" if values else ""
            cells += [spread, _ratio(metric, row, result) if values else ""]
    return cells


def _ratio(metric: Metric, row: Row, result: Result) -> str:
    """Say how many times as fast, or as small, the first row is than this one."""
    ours, theirs = result.rows[0].values(metric.name), row.values(metric.name)
    if row is result.rows[0] or not ours:
        return ""
    ratio = paired(ours, theirs, lambda our, their: our / their)
    return f"{ratio if metric.higher_is_better else 1 / ratio:.2f} ×"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3g}"


def as_json(
    environment: dict[str, str], sizes: dict[str, Any], results: Sequence[Result]
) -> dict[str, Any]:
    """Return the whole run as one object of plain types."""
    return {
        "environment": environment,
        "sizes": sizes,
        "workloads": [_workload_json(result) for result in results],
    }


def _workload_json(result: Result) -> dict[str, Any]:
    workload = result.workload
    return {
        "name": workload.name,
        "definition": workload.definition,
        "seconds": result.seconds,
        "rows": [_row_json(row, workload.metrics) for row in result.rows],
        "bars": [asdict(verdict) for verdict in result.verdicts],
    }


def _row_json(row: Row, metrics: Sequence[Metric]) -> dict[str, Any]:
    medians = row.medians()
    return {
        "contender": row.contender,
        "durability": row.durability,
        "failure": asdict(row.failure) if row.failure else None,
        "metrics": {
            metric.name: {
                "unit": metric.unit.strip(),
                "median": medians[metric.name],
                "samples": row.values(metric.name),
            }
            for metric in metrics
            if metric.name in medians
        },
    }
