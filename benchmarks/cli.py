"""`python -m benchmarks`: the command line."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import catalogue, document, environment, html, results, scratch
from benchmarks.collected import run_result, sizes_result, workload_result
from benchmarks.compare import GONE, TOLERANCE, WORSE, NotComparableError, check_comparable, compare
from benchmarks.compare import different_machine as differences
from benchmarks.isolation import Inside, Isolated
from benchmarks.lag import sample_lag
from benchmarks.optional import UnavailableError
from benchmarks.report import (
    LEGEND,
    Printer,
    lost_rows,
    number,
    print_environment,
    print_workload,
    times,
)
from benchmarks.results import ResultsError, RunResult
from benchmarks.runner import Result, run
from benchmarks.sizes import FULL, QUICK, STANDARD, TINY, Sizes
from benchmarks.workload import Workload

_EXIT_CODES = """exit code: 0; 1 when a contender crashed or answered wrongly, when --compare finds
a regression, and with --check also when a bar was missed; 2 for a wrong command line or file; 130
when it was interrupted: --json and --html then have the workloads that were done."""

_INTERRUPTED = 130

_COMMANDS = ("run", "html", "compare", "document")

_IDLE_SECONDS = 2  # at most, for the lag of a loop on which nothing happens


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what `arguments` ask for; returns the exit code (see `--help`)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in (*_COMMANDS, "-h", "--help"):
        words.insert(0, "run")
    options = _parser().parse_args(words)
    try:
        return int(options.act(options, Printer()))
    except KeyboardInterrupt:
        print("benchmarks: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except (
        ValueError,
        OSError,
        ResultsError,
        NotComparableError,
        UnavailableError,
        document.DocumentError,
    ) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="This engine beside its peers, on this machine. The default command is run.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter
    _run_options(
        commands.add_parser(
            "run",
            help="run workloads, and print what they measured",
            description=catalogue.DEFINITIONS,
            epilog=_EXIT_CODES,
            formatter_class=raw,
        )
    )
    page = commands.add_parser("html", help="make the HTML report of an earlier run")
    page.add_argument("results", type=Path, metavar="RUN.json")
    page.add_argument("report", type=Path, metavar="FILE")
    page.set_defaults(act=_html)
    comparison = commands.add_parser("compare", help="look for regressions between two runs")
    comparison.add_argument("old", type=Path, metavar="OLD.json")
    comparison.add_argument("results", type=Path, metavar="NEW.json")
    _tolerance_option(comparison)
    comparison.set_defaults(act=_compare)
    docs = commands.add_parser("document", help="bring docs/performance.md up to date")
    docs.add_argument("results", type=Path, metavar="RUN.json")
    docs.add_argument("into", type=Path, nargs="?", default=document.DEFAULT)
    docs.set_defaults(act=_document)
    return parser


def _run_options(parser: argparse.ArgumentParser) -> None:
    how_long = parser.add_mutually_exclusive_group()
    for sizes, text in (
        (QUICK, "small sizes, two to three minutes; the bars are indicative only"),
        (FULL, "the largest sizes, in about half an hour"),
        (TINY, "only to see that everything runs"),
    ):
        how_long.add_argument(
            f"--{sizes.name}", dest="sizes", action="store_const", const=sizes, help=text
        )
    parser.set_defaults(sizes=STANDARD, act=_run)
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="run the workload NAME, or those whose name starts so; may be given several times",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a report with plots")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="fail when slower than in that run"
    )
    _tolerance_option(parser)
    parser.add_argument(
        "--directory",
        type=Path,
        default=scratch.DEFAULT,
        help="where files are written, on a real disk; emptied afterwards (default: %(default)s)",
    )
    parser.add_argument("--check", action="store_true", help="fail when a bar is missed")


def _tolerance_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        default=TOLERANCE,
        metavar="SHARE",
        help="what --compare takes for no regression yet (default: %(default)s)",
    )


def _tolerance(text: str) -> float:
    share = float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0 to below 1")
    return share


def _run(options: argparse.Namespace, printer: Printer) -> int:
    workloads = catalogue.fitting(options.only, options.sizes)
    # What cannot be done in the end is refused now, and not after half an hour.
    old = results.read(options.compare) if options.compare else None
    if old is not None:
        check_comparable(old, sizes_result(options.sizes), {each.name for each in workloads})
    for path in (options.json, options.html):
        if path is not None:
            _check_writable(path)
    if options.html is not None:
        html.available()
    measured, broken, interrupted = _measure(options, printer, workloads)
    if options.json is not None:
        options.json.write_text(measured.as_json(), encoding="utf-8")
    if options.html is not None:
        options.html.write_text(html.render(measured), encoding="utf-8")
    missed = _summarize(printer, measured)
    if interrupted:
        raise KeyboardInterrupt
    regressed = old is not None and _regressed(printer, old, measured, options.tolerance)
    return 1 if broken or regressed or (options.check and missed) else 0


def _check_writable(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{path} is a directory, or in none")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written")


def _measure(
    options: argparse.Namespace, printer: Printer, workloads: Sequence[Workload]
) -> tuple[RunResult, bool, bool]:
    """Run the workloads.

    Returns what was measured, whether anything went wrong, and whether it was interrupted after
    at least one workload was done.
    """
    sizes: Sizes = options.sizes
    found: list[Result] = []
    interrupted = False
    with scratch.Scratch(options.directory) as directory:
        described = environment.describe(directory.path)
        described["sizes"] = _described(sizes)
        idle = asyncio.run(sample_lag(min(_IDLE_SECONDS * 500, sizes.lag_samples)))
        print_environment(printer, described, run_result(described, sizes, idle, []).idle)
        printer.line(LEGEND)
        _warn(printer, directory.path, sizes)
        hosts = Inside if sizes is TINY else Isolated
        try:
            for workload in workloads:
                found.append(run(workload, sizes, directory, _progress, hosts))
                _progress("")
                print_workload(printer, workload_result(found[-1]))
        except KeyboardInterrupt:
            if not found:
                raise
            interrupted = True
    broken = any(each.broken for each in found)
    return run_result(described, sizes, idle, found), broken, interrupted


def _html(options: argparse.Namespace, printer: Printer) -> int:
    options.report.write_text(html.render(results.read(options.results)), encoding="utf-8")
    printer.line(f"{options.report} is written.")
    return 0


def _compare(options: argparse.Namespace, printer: Printer) -> int:
    old, new = results.read(options.old), results.read(options.results)
    return int(_regressed(printer, old, new, options.tolerance))


def _document(options: argparse.Namespace, printer: Printer) -> int:
    for path in document.write(results.read(options.results), options.into):
        printer.line(f"{path} is written.")
    return 0


def _described(sizes: Sizes) -> str:
    numbers = {name: value for name, value in asdict(sizes).items() if name != "name"}
    return f"{sizes.name}: " + ", ".join(f"{name} {value}" for name, value in numbers.items())


def _warn(printer: Printer, directory: Path, sizes: Sizes) -> None:
    if not environment.is_disk(directory):
        printer.line("This is no disk: durable rows mean nothing. Give --directory.", "bold red")
    if sizes not in (STANDARD, FULL):
        printer.line("Small sizes: the bars are meant for the default ones.", "yellow")


def _progress(text: str) -> None:
    """Show one changing line on a terminal, nothing elsewhere."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[2K{text}")
        sys.stderr.flush()


def _summarize(printer: Printer, measured: RunResult) -> int:
    """Say how many bars and rows are won and lost; return how many bars were missed."""
    bars = [bar for workload in measured.workloads for bar in workload.bars]
    passed = sum(bar.passed is True for bar in bars)
    missed = sum(bar.passed is False for bar in bars)
    printer.line(f"{passed} bars reached, {missed} missed, {len(bars) - passed - missed} open.")
    lost = lost_rows(measured)
    printer.line(f"{len(lost)} rows of peers are ahead{':' if lost else '.'}")
    for workload, row in lost:
        printer.line(f"  {workload.name}: {row.contender}, {times(workload.advantage(row))}")
    return missed


def _regressed(printer: Printer, old: RunResult, new: RunResult, tolerance: float) -> bool:
    """Print what has changed since an older run; return whether anything became worse."""
    for difference in differences(old, new):
        printer.line(f"Another machine? {difference}", "yellow")
    changes = compare(old, new, tolerance)
    for change in changes:
        if change.kind != "same":
            bad = change.kind in {WORSE, GONE}
            text = (
                f"{change.kind}: {change.workload}, {change.metric} of {change.contender}: "
                f"{number(change.old)} before, {number(change.new)} now; {change.factor:.2f} × as "
                f"good, the peers {change.drift:.2f} ×"
            )
            printer.line(text, "bold red" if bad else "green")
    worse = sum(change.kind in {WORSE, GONE} for change in changes)
    printer.line(f"{len(changes)} figures compared, {worse} worse.")
    return worse > 0
