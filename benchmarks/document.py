"""The generated part of docs/performance.md, and the pictures beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from benchmarks import plots, report
from benchmarks.report import number
from benchmarks.results import RowResult, RunResult, WorkloadResult

BEGIN: Final = "<!-- generated: python -m benchmarks document RUN.json -->"
END: Final = "<!-- end of what is generated -->"

DEFAULT: Final = Path("docs/performance.md")

PICTURED: Final = (
    "hot-get",
    "update",
    "cold-restore",
    "mixed",
    "mixed-half",
    "conversation",
    "hit-ratio",
    "growth",
)
"""The workloads whose pictures are in the document; the HTML report has all of them."""


class DocumentError(Exception):
    """The document has no place for what is generated."""


def write(run: RunResult, path: Path) -> list[Path]:
    """Replace the generated part of the document at `path`, and its pictures; return what it wrote.

    Raises:
        DocumentError: the document has no such part, and nothing was written.
        UnavailableError: pictures cannot be drawn here, and nothing was written.
    """
    plots.available()
    text = path.read_text(encoding="utf-8")
    begin, end = text.find(BEGIN), text.find(END)
    if not 0 <= begin < end:
        raise DocumentError(f"{path} has no lines {BEGIN!r} and {END!r}, in this order")
    directory = path.with_suffix("")
    pictures = _pictures(run)
    generated = "\n\n".join((BEGIN, markdown(run, list(pictures), directory.name), ""))
    directory.mkdir(exist_ok=True)
    written = [path]
    for name, svg in pictures.items():
        written.append(directory / name)
        written[-1].write_text(svg, encoding="utf-8")
    path.write_text(text[:begin] + generated + text[end:], encoding="utf-8")
    return written


def _pictures(run: RunResult) -> dict[str, str]:
    found = {"overview.svg": plots.overview(run)}
    for workload in run.workloads:
        if workload.name in PICTURED:
            for place, svg in enumerate(plots.pictures(workload, run.idle)):
                found[f"{workload.name}{f'-{place + 1}' if place else ''}.svg"] = svg
    return found


def markdown(run: RunResult, pictures: list[str], directory: str) -> str:
    """Return the generated part: where it was measured, the main table, what is lost, all rows."""
    parts = [
        f"Taken {run.created}, sizes `{run.sizes['name']}`.",
        _table(["", ""], [list(each) for each in _environment(run).items()], 2),
        "### In one table",
        _main_table(run),
        "### Where a peer is ahead",
        _lost(run),
        "### Bars",
        _bars(run),
        "### Pictures",
        "\n\n".join(f"![{Path(name).stem}]({directory}/{name})" for name in pictures),
        "### All rows",
        *(_details(workload) for workload in run.workloads),
    ]
    return "\n\n".join(parts)


def _environment(run: RunResult) -> dict[str, str]:
    return run.environment | {"idle event loop": report.described(run.idle)}


def _main_table(run: RunResult) -> str:
    """A row per workload: the engine, the best peer that is as durable, the best of all."""
    header = ["workload", "persistence", "best peer as durable", "persistence is"]
    header += ["best peer of all", "persistence is", "loop p99.9"]
    return _table(header, [row for each in run.workloads for row in _main_rows(each)], 1)


def _main_rows(workload: WorkloadResult) -> list[list[str]]:
    sizes = sorted({row.size for row in workload.rows}, key=lambda size: size or 0)
    return [row for size in sizes for row in _main_row(workload, size)]


def _main_row(workload: WorkloadResult, size: float | None) -> list[list[str]]:
    rows = [row for row in workload.rows if row.size == size and row.metrics]
    ours = next((row for row in rows if row.role == "engine"), None)
    if ours is None:
        return []
    unit = workload.units[0]
    peers = [row for row in rows if row.role == "peer" and workload.advantage(row) is not None]
    peers.sort(key=lambda row: workload.advantage(row) or 0.0)
    durable = [row for row in peers if _rank(row) >= _rank(ours)]
    name = workload.name if size is None else f"{workload.name}, {size:,.0f} {workload.size_unit}"
    cells = [name, f"{number(ours.metrics[unit.name].median)} {unit.unit}"]
    for best in (durable[:1], peers[:1]):
        cells += _best(workload, best[0]) if best else ["–", ""]
    cells.append(f"{number(ours.lag.p99_9)} ms" if ours.lag else "")
    return [cells]


def _best(workload: WorkloadResult, row: RowResult) -> list[str]:
    value = number(row.metrics[workload.units[0].name].median)
    ratio = report.times(workload.advantage(row))
    return [f"{row.contender}: {value}", f"**{ratio}**" if workload.is_lost(row) else ratio]


def _rank(row: RowResult) -> int:
    return ("nothing", "process crash", "power loss").index(row.durability)


def _lost(run: RunResult) -> str:
    rows = [
        [
            workload.name if row.size is None else f"{workload.name}, {row.size:,.0f}",
            row.contender,
            row.durability,
            report.times(workload.advantage(row)),
        ]
        for workload, row in report.lost_rows(run)
    ]
    if not rows:
        return "Nowhere in this run."
    return _table(["workload", "peer", "survives", "persistence is"], rows, 3)


def _bars(run: RunResult) -> str:
    rows = [
        [workload.name, bar.claim, bar.measured, report.PASSED[bar.passed]]
        for workload in run.workloads
        for bar in workload.bars
    ]
    return _table(["workload", "bar", "measured", ""], rows, 2) if rows else "None."


def _details(workload: WorkloadResult) -> str:
    rows = [report.cells(workload, row) for row in workload.rows]
    missing = [
        f"{row.contender}: {row.failure.reason}" for row in workload.rows if row.failure is not None
    ]
    table = _table(report.heading(workload), rows, 3)
    title = f"**{workload.name}**: {workload.definition}"
    return "\n\n".join([title, table, *missing])


def _table(header: list[str], rows: list[list[str]], text_columns: int) -> str:
    rule = ["---" if column < text_columns else "---:" for column in range(len(header))]
    lines = [header, rule, *([_escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
