"""``persistence replay``: access logs as a session workload, verified at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Final

import typer

from persistence.cli import screen
from persistence.cli.failure import EXIT_FAILED, EXIT_OK, CommandError
from persistence.cli.options import JsonOption, size_option
from persistence.cli.replay_model import ReplayOptions, ReplayProgress, ReplayReport
from persistence.cli.replay_policies import check_plot, compare_policies, draw, print_curves
from persistence.cli.replayer import replay
from persistence.cli.running import run
from persistence.cli.screen import format_bytes, say

_STORING: Final = (
    "directory",
    "segment",
    "fsync",
    "resume",
    "concurrency",
    "redis",
    "redis_write",
    "namespace",
    "workers",
)
"""Parameters of `command` that say how sessions are stored, and mean nothing where none is."""


def command(  # noqa: PLR0913, PLR0917 - one argument for each option
    context: typer.Context,
    logs: Annotated[
        list[Path],
        typer.Argument(
            metavar="LOG", help="Access logs, plain or .gz/.xz/.bz2, replayed in this order."
        ),
    ],
    memory: Annotated[
        int, size_option("--memory", "Budget of the memory tier (of each worker).")
    ] = "256KiB",  # type: ignore[assignment]
    policy: Annotated[
        str,
        typer.Option(
            metavar="lru|sieve|s3fifo|adaptive|all",
            help="Eviction policy of the memory tier; all: compare them, and store nothing.",
        ),
    ] = "lru",
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the comparison: .png, .svg, .pdf."),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(help="Where the sessions are kept; else a temporary directory, removed."),
    ] = None,
    segment: Annotated[int, size_option("--segment", "Size of the log's segments.")] = "1MiB",  # type: ignore[assignment]
    fsync: Annotated[
        str, typer.Option(metavar="always|interval|never", help="When the log is synced to disk.")
    ] = "always",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted replay in --directory.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many requests.")] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, max=4096, help="Requests in flight at most.")
    ] = 64,
    redis: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Share the sessions through this Redis; verified there."),
    ] = None,
    redis_write: Annotated[
        str, typer.Option(metavar="through|behind", help="When Redis learns of an update.")
    ] = "through",
    namespace: Annotated[
        str | None,
        typer.Option(help="In Redis; else that of the replay to resume, or a fresh one."),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, max=64, help="Processes that share the sessions through Redis.")
    ] = 1,
    as_json: JsonOption = False,
) -> int:
    """Replay access logs as a session workload, then verify every session.

    A session is a client address with a user agent. Each request renews its session (for seven
    days), appends to a history of 20, and updates counters and the last URL, in one atomic
    update. At the end every session is read again and compared with a plain computation over the
    same logs: the exit code is 0 only when all are equal, and 1 when no line is a request. With
    --redis every session is also read from Redis and compared, and with --workers each request
    goes to a random worker. What is in Redis stays there, for seven days.

    With --policy all nothing is stored: each eviction policy is simulated on the log, in budgets
    from one percent to all of what its sessions need, and in that of --memory if it is given, so
    that a budget can be chosen.
    """
    if policy == "all":
        useless = [name for name in _STORING if _is_given(context, name)]
        if useless:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in useless)
            raise CommandError(f"--policy all stores nothing: leave out {names}")
        budget = memory if _is_given(context, "memory") else None
        return _compare(logs, limit, budget, plot, as_json)
    if plot is not None:
        raise CommandError("--plot draws a comparison of the policies: it needs --policy all")
    if resume and directory is None:
        raise CommandError("--resume needs the --directory of the replay to go on with")
    with _directory(directory) as where, screen.status_line(is_quiet=as_json) as show:
        options = ReplayOptions(
            logs=tuple(logs),
            directory=where,
            memory_bytes=memory,
            policy=policy,
            segment_bytes=segment,
            fsync=fsync,
            resume=resume,
            limit=limit,
            concurrency=concurrency,
            redis_url=redis,
            redis_write=redis_write,
            namespace=namespace,
            workers=workers,
        )
        report = run(replay(options, _shown(show)))
    if as_json:
        screen.print_json(asdict(report))
    else:
        _print(report)
    if not report.requests and report.skipped_lines:
        screen.note(
            f"0 of {report.skipped_lines:,} lines are requests: is this an access log in Common or "
            "Combined Log Format?"
        )
        return EXIT_FAILED
    return EXIT_OK if report.verified else EXIT_FAILED


def _is_given(context: typer.Context, name: str) -> bool:
    """Tell whether a parameter is on the command line, be it with the value that is its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _compare(
    logs: list[Path], limit: int | None, memory: int | None, plot: Path | None, as_json: bool
) -> int:
    if plot is not None:
        check_plot(plot)
    with screen.status_line(is_quiet=as_json) as show:
        curves = compare_policies(logs, limit, memory, show)
    if plot is not None:
        draw(curves, plot)
    if as_json:
        screen.print_json(asdict(curves))
    else:
        print_curves(curves)
    return EXIT_OK


@contextmanager
def _directory(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with TemporaryDirectory(prefix="persistence-replay-") as temporary:
        yield Path(temporary)


def _shown(show: Callable[[str], None] | None) -> Callable[[ReplayProgress], None] | None:
    if show is None:
        return None

    def watch(progress: ReplayProgress) -> None:
        what = "requests" if progress.stage == "replay" else "sessions verified"
        show(
            f"{progress.done:,} {what}, {progress.per_second:,.0f}/s | "
            f"sessions: {progress.in_memory:,} in memory, {progress.on_disk:,} on disk | "
            f"{progress.spilled:,} spilled, {progress.restored:,} restored"
        )

    return watch


def _print(report: ReplayReport) -> None:
    screen.print_table("Replay", _rows(report))
    for line in report.differences:
        say(line)
    if not report.verified:
        say(f"NOT VERIFIED: {report.differing_sessions:,} sessions differ; the first are above.")


def _rows(report: ReplayReport) -> Iterator[tuple[str, str]]:
    yield "requests", f"{report.requests:,}"
    if report.resumed_at or report.applied != report.requests:
        yield "… applied by this run", f"{report.applied:,} (resumed at {report.resumed_at:,})"
    yield "lines skipped", f"{report.skipped_lines:,}"
    yield "sessions", f"{report.sessions:,}"
    yield "… in memory", f"{report.in_memory:,}"
    yield "… on disk only", f"{report.on_disk:,}"
    yield "spilled", f"{report.spilled:,}"
    yield "restored", f"{report.restored:,}"
    yield "memory, peak", format_bytes(report.memory_peak_bytes)
    yield "memory, budget", format_bytes(report.memory_budget_bytes)
    yield "log on disk", f"{format_bytes(report.disk_bytes)} in {report.segments:,} segments"
    yield "compactions", f"{report.compactions:,}"
    yield "time", f"{report.seconds:.2f} s"
    yield "requests per second", f"{report.requests_per_second:,.0f}"
    if report.namespace is not None:
        yield "workers", f"{report.workers:,}"
        yield "updates retried after a conflict", f"{report.conflicts_retried:,}"
        yield "namespace in Redis", report.namespace
        yield "sessions compared in Redis", f"{report.redis_sessions:,}"
    yield "sessions verified", "all equal" if report.verified else "NO"
