"""`python -m benchmarks`: the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import catalogue, environment, scratch
from benchmarks.report import Printer, as_json, print_environment, print_result
from benchmarks.runner import Result, run
from benchmarks.sizes import FULL, QUICK, STANDARD, TINY, Sizes

_LEGEND = """Medians of interleaved repetitions, each contender in a process of its own; ratios are
medians of the ratios within a repetition. 'survives': what a write survives once acknowledged."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what `arguments` ask for; returns the exit code (see `--help`)."""
    options = _parser().parse_args(arguments)
    try:
        workloads = catalogue.chosen(options.only)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    sizes: Sizes = options.sizes
    printer = Printer()
    with scratch.Scratch(options.directory) as directory:
        described = environment.describe(directory.path)
        described["sizes"] = _described(sizes)
        print_environment(printer, described)
        printer.line(_LEGEND)
        _warn(printer, directory.path, sizes)
        results = []
        for workload in workloads:
            results.append(run(workload, sizes, directory, _progress))
            _progress("")
            print_result(printer, results[-1])
    if options.json is not None:
        report = as_json(described, asdict(sizes), results)
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return _exit_code(printer, results, bool(options.check))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=catalogue.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit code: 0; 1 when a contender crashed or answered wrongly, and with --check "
        "also when a bar was missed; 2 for a wrong command line.",
    )
    parser.add_argument("command", nargs="?", choices=["run"], default="run", help="(the default)")
    how_long = parser.add_mutually_exclusive_group()
    for sizes, text in (
        (QUICK, "small sizes, under 2 minutes; the bars are indicative only"),
        (FULL, "more repetitions and larger sizes, under 30 minutes"),
        (TINY, "only to see that everything runs"),
    ):
        how_long.add_argument(
            f"--{sizes.name}", dest="sizes", action="store_const", const=sizes, help=text
        )
    parser.set_defaults(sizes=STANDARD)
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="run the workloads whose name starts with NAME; may be given several times",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument(
        "--directory",
        type=Path,
        default=scratch.DEFAULT,
        help="where files are written, on a real disk; emptied afterwards (default: %(default)s)",
    )
    parser.add_argument("--check", action="store_true", help="fail when a bar is missed")
    return parser


def _described(sizes: Sizes) -> str:
    numbers = ", ".join(
        f"{name} {value:,}" for name, value in asdict(sizes).items() if name != "name"
    )
    return f"{sizes.name}: {numbers}"


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


def _exit_code(printer: Printer, results: Sequence[Result], check: bool) -> int:
    verdicts = [verdict for result in results for verdict in result.verdicts]
    passed = sum(verdict.passed is True for verdict in verdicts)
    missed = sum(verdict.passed is False for verdict in verdicts)
    printer.line(f"{passed} bars reached, {missed} missed, {len(verdicts) - passed - missed} open.")
    broken = any(result.broken for result in results)
    return 1 if broken or (check and missed) else 0
