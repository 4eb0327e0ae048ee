"""Pictures of results, as SVG. Drawn with matplotlib; text stays text, so that they are small."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from benchmarks.optional import load
from benchmarks.results import Distribution, RowResult, RunResult, Unit, WorkloadResult

_COLOURS = {"engine": "#1b7f5c", "peer": "#5b6f95", "limit": "#b9b2a3"}
_LINE_STYLES = ("-", "--", ":", "-.")
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "benchmarks",  # the same results give the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_LOG_SCALE_FROM = 30  # times between the shortest and the longest bar
_LEAST_MS = 1e-3


def pictures(workload: WorkloadResult, idle: Distribution) -> list[str]:
    """Draw a workload: bars of what matters, or its curve, and its distributions."""
    if not any(row.metrics for row in workload.rows):
        return []
    if workload.size_unit:
        return [_drawn(lambda figure: _growth(figure, workload), 9, _growth_height(workload))]
    if all(unit.unit.startswith("%") for unit in workload.units):
        return [_drawn(lambda figure: _hits(figure, workload), 7, 4)]
    measured = [row for row in workload.rows if row.samples(workload.units[0].name)]
    found = [_drawn(lambda figure: _bars(figure, workload, measured), 9, 0.9 + 0.3 * len(measured))]
    if any(row.lag or row.latency for row in measured):
        found.append(_drawn(lambda figure: _distributions(figure, measured, idle), 9, 3.6))
    return found


def available() -> None:
    """Make sure that pictures can be drawn.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    load("matplotlib")


def _drawn(draw: Callable[[Any], None], width: float, height: float) -> str:
    """Return the SVG element of a figure of that many inches."""
    matplotlib = load("matplotlib")
    figure_type = load("matplotlib.figure").Figure  # no pyplot: nothing global, no window system
    with matplotlib.rc_context(_STYLE):
        figure = figure_type(figsize=(width, height), layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _bars(figure: Any, workload: WorkloadResult, rows: list[RowResult]) -> None:
    unit = workload.units[0]
    axes = figure.add_subplot()
    values = [row.metrics[unit.name].median for row in rows]
    spans = [row.samples(unit.name) for row in rows]
    low = [value - min(span) for value, span in zip(values, spans, strict=True)]
    high = [max(span) - value for value, span in zip(values, spans, strict=True)]
    places = range(len(rows))
    axes.barh(
        places,
        values,
        xerr=[low, high],
        color=[_COLOURS[row.role] for row in rows],
        error_kw={"ecolor": "#333333", "elinewidth": 0.8},
        height=0.7,
    )
    axes.set_yticks(places, [_label(row) for row in rows])
    axes.invert_yaxis()
    if min(values) > 0 and max(values) > _LOG_SCALE_FROM * min(values):
        axes.set_xscale("log")
    better = "more is better" if unit.higher_is_better else "less is better"
    axes.set_xlabel(f"{unit.name} {unit.unit} ({better}; the line: min to max)")


def _label(row: RowResult) -> str:
    return f"{row.contender} [{row.durability}]"


def _distributions(figure: Any, rows: list[RowResult], idle: Distribution) -> None:
    left, right = figure.subplots(1, 2)
    _tails(left, [(row, row.latency) for row in rows], "latency of a request, ms")
    _tails(right, [(row, row.lag) for row in rows], "event loop late by, ms")
    right.plot(*_tail(idle), color="black", linewidth=0.8, linestyle=":", label="idle machine")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7, frameon=False)


def _tails(axes: Any, rows: list[tuple[RowResult, Distribution | None]], title: str) -> None:
    palette = load("matplotlib").color_sequences["tab20"]
    for number, (row, seen) in enumerate(rows):
        if seen is None:
            continue
        ours = row.role == "engine"
        axes.plot(
            *_tail(seen),
            color=_COLOURS["engine"] if ours else palette[number % len(palette)],
            linewidth=2 if ours else 1,
            linestyle=_LINE_STYLES[number % len(_LINE_STYLES)] if ours else "-",
            label=f"{row.contender} ({row.called})",
        )
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks([0.5, 0.1, 0.01, 0.001], ["p50", "p90", "p99", "p99.9"])
    axes.minorticks_off()
    axes.set_title(title, fontsize=9)


def _tail(seen: Distribution) -> tuple[list[float], list[float]]:
    """Return the share of samples that took longer, and how long; as far as there are samples."""
    least_share = 1 / seen.count
    points = [(1 - share, ms) for share, ms in seen.points if 1 - share >= least_share]
    points.append((least_share, seen.max))
    shares, lengths = zip(*points, strict=True)
    return list(shares), [max(_LEAST_MS, length) for length in lengths]


def _hits(figure: Any, workload: WorkloadResult) -> None:
    axes = figure.add_subplot()
    shares = [unit.name for unit in workload.units]
    for number, row in enumerate(row for row in workload.rows if row.metrics):
        hits = [row.metrics[share].median for share in shares]
        style = _LINE_STYLES[number % len(_LINE_STYLES)]
        axes.plot(shares, hits, style, marker=".", color=_COLOURS[row.role], label=row.contender)
    axes.set_xlabel("memory, share of all keys")
    axes.set_ylabel("accesses that hit, %")
    axes.legend(fontsize=8, frameon=False)


def _growth_height(workload: WorkloadResult) -> float:
    return 2.4 * ((len(workload.units) + 2) // 3)


def _growth(figure: Any, workload: WorkloadResult) -> None:
    rows = (len(workload.units) + 2) // 3
    grid = figure.subplots(rows, 3, squeeze=False)
    flat = [axes for line in grid for axes in line]
    for axes, unit in zip(flat, workload.units, strict=False):
        _curves(axes, workload, unit)
    for axes in flat[len(workload.units) :]:
        axes.set_axis_off()
    handles, labels = flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def _curves(axes: Any, workload: WorkloadResult, unit: Unit) -> None:
    series: dict[str, list[RowResult]] = {}
    for row in workload.rows:
        if row.samples(unit.name):
            series.setdefault(row.series, []).append(row)
    for number, (name, rows) in enumerate(series.items()):
        axes.plot(
            [row.size for row in rows],
            [row.metrics[unit.name].median for row in rows],
            _LINE_STYLES[number % len(_LINE_STYLES)],
            marker=".",
            color=_COLOURS[rows[0].role],
            label=name,
        )
    sizes = sorted({row.size for rows in series.values() for row in rows if row.size})
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title(f"{unit.name}, {unit.unit}" if unit.unit else unit.name, fontsize=9)
    axes.set_xlabel(workload.size_unit, fontsize=8)


def overview(run: RunResult) -> str:
    """Draw, for each workload, how many times as good the engine is as each peer."""
    points = [
        (number, advantage, workload.is_lost(row))
        for number, workload in enumerate(run.workloads)
        for row in workload.rows
        if row.role == "peer" and (advantage := workload.advantage(row)) is not None
    ]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.axvline(1, color="#333333", linewidth=0.8)
        for lost, colour in ((False, _COLOURS["engine"]), (True, "#c0392b")):
            chosen = [(place, value) for place, value, is_lost in points if is_lost is lost]
            places, values = zip(*chosen, strict=True) if chosen else ((), ())
            axes.plot(values, places, "o", color=colour, markersize=4)
        axes.set_yticks(range(len(run.workloads)), [each.name for each in run.workloads])
        axes.set_ylim(len(run.workloads) - 0.5, -0.5)
        axes.set_xscale("log")
        axes.set_xlabel("this engine is so many times as good as a peer (one dot each)")

    return _drawn(draw, 9, 1 + 0.22 * len(run.workloads))
