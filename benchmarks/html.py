"""Results as one HTML file, which needs nothing else: no network, no script."""

from __future__ import annotations

from pathlib import Path

from benchmarks import plots, report
from benchmarks.optional import load
from benchmarks.results import RunResult

_TEMPLATE = Path(__file__).with_name("report.html.j2")


def available() -> None:
    """Make sure that a report can be made.

    Raises:
        UnavailableError: what it is made with is not installed.
    """
    load("jinja2")
    plots.available()


def render(run: RunResult) -> str:
    """Return the report of a run.

    Raises:
        UnavailableError: as `available`.
    """
    environment = load("jinja2").Environment(
        autoescape=True, undefined=load("jinja2").StrictUndefined
    )
    safe = load("markupsafe").Markup
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return str(
        template.render(
            run=run,
            legend=report.LEGEND,
            environment=run.environment | {"idle event loop": report.described(run.idle)},
            lost=report.lost_rows(run),
            peers=sum(row.role == "peer" for each in run.workloads for row in each.rows),
            heading=report.heading,
            cells=report.cells,
            bar_text=report.bar_text,
            overview=safe(plots.overview(run)),
            pictures=lambda *about: [safe(svg) for svg in plots.pictures(*about)],
        )
    )
