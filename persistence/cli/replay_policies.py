"""``persistence replay --policy all``: what each eviction policy would hit in which budget.

Nothing is stored: the log is folded into its sessions, whose sizes grow as in a replay, and each
policy is simulated on the order in which they are asked for. A budget is what ``memory.max_bytes``
would be: as there, sessions leave from 80 % of it down to 70 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Final

from persistence.cli import screen
from persistence.cli.accesslog import Request
from persistence.cli.failure import CommandError
from persistence.cli.replay_run import LogReader
from persistence.cli.screen import format_bytes
from persistence.cli.workload import TTL_SECONDS, apply_request, metadata_of, session_id
from persistence.config import MemoryConfig
from persistence.memory.ordered import ADAPTIVE
from persistence.memory.policies import POLICIES
from persistence.memory.simulation import simulated
from persistence.memory.tier import charge
from persistence.record import ID_BYTES, assemble, pack_meta, pack_value

NAMES: Final = (*POLICIES, ADAPTIVE)
SHARES: Final = (0.01, 0.02, 0.05, 0.10, 0.25, 0.50, 1.0)
"""The budgets, as shares of the one in which no session leaves."""
_MEMORY: Final = MemoryConfig()


@dataclass(frozen=True, slots=True)
class Point:
    """What one policy hits in one budget; ratios are in 0..1."""

    memory_bytes: int
    share: float
    hit_ratio: float
    byte_hit_ratio: float


@dataclass(slots=True)
class Curves:
    """What ``--policy all --json`` prints.

    Attributes:
        requests: of the log.
        skipped_lines: that are no requests.
        sessions: that the log makes.
        sessions_bytes: the budget that they need to be in memory, all of them, all the time.
        policies: the curve of each policy, by ascending budget.
    """

    requests: int
    skipped_lines: int
    sessions: int
    sessions_bytes: int
    policies: dict[str, list[Point]]


class _Asked:
    """The sessions that were asked for, in order, with the bytes each needed at that time.

    `peak_bytes` is what all of them needed when they needed most: a session may become smaller.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._bytes = 0
        self.requests: list[tuple[str, int]] = []
        self.sizes: dict[str, int] = {}
        self._data: dict[str, dict[str, Any]] = {}
        self._meta: dict[str, bytes] = {}
        self._ids: dict[str, str] = {}

    def add(self, position: int, request: Request) -> None:
        sid = session_id(request)
        sid = self._ids.setdefault(sid, sid)  # one string object each, however often it is asked
        data = self._data.setdefault(sid, {})
        if sid not in self._meta:
            self._meta[sid] = pack_meta(metadata_of(request).packed_parts())
        apply_request(data, position, request)
        size = charge(sid, _record(self._meta[sid], data))
        self._bytes += size - self.sizes.get(sid, 0)
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        self.sizes[sid] = size
        self.requests.append((sid, size))


def _record(meta: bytes, data: Mapping[str, Any]) -> bytes:
    """Return a record of the size that a session has in memory."""
    some_id = bytes(ID_BYTES)
    return assemble(
        incarnation=some_id,
        commit=some_id,
        version=1,
        created=0.0,
        ttl_seconds=TTL_SECONDS,
        flags=0,
        user=0,
        meta=meta,
        fields={name: pack_value(value, name) for name, value in data.items()},
    )


def compare_policies(
    logs: Sequence[Path],
    limit: int | None,
    memory_bytes: int | None,
    show: Callable[[str], None] | None,
) -> Curves:
    """Simulate every policy on the logs, in budgets from one percent to all of what they need.

    Args:
        logs: access logs, in order.
        limit: stop after so many requests.
        memory_bytes: another budget to try, beside those.
        show: called with a line that says how far it is.

    Raises:
        CommandError: a log cannot be read, or no line of it is a request.
    """
    asked, skipped = _read(logs, limit)
    if not asked.requests:
        raise CommandError("no line of the log is a request in Common or Combined Log Format")
    total_bytes = ceil(asked.peak_bytes / _MEMORY.spill_threshold)
    curves = Curves(len(asked.requests), skipped, len(asked.sizes), total_bytes, {})
    budgets = _budgets(total_bytes, memory_bytes)
    for name in NAMES:
        points = curves.policies[name] = []
        for budget_bytes, share in budgets:
            if show is not None:
                show(f"{name}: {share:.0%} of {format_bytes(total_bytes)}")
            points.append(_point(name, budget_bytes, share, asked))
    return curves


def _budgets(total_bytes: int, memory_bytes: int | None) -> list[tuple[int, float]]:
    """Return (budget, its share of `total_bytes`), by ascending budget."""
    budgets = [(max(1, round(total_bytes * share)), share) for share in SHARES]
    if memory_bytes is not None:
        budgets.append((memory_bytes, memory_bytes / total_bytes))
    return sorted(budgets)


def _read(logs: Sequence[Path], limit: int | None) -> tuple[_Asked, int]:
    asked = _Asked()
    reader = LogReader(tuple(logs), limit)
    for position, request in enumerate(reader):
        asked.add(position, request)
    return asked, reader.skipped_lines


def _point(name: str, budget_bytes: int, share: float, asked: _Asked) -> Point:
    leaving = (_MEMORY.spill_threshold, _MEMORY.spill_target)
    ratio = simulated(name, budget_bytes, asked.requests, *leaving)
    return Point(budget_bytes, share, ratio.ratio, ratio.byte_ratio)


# --- showing --------------------------------------------------------------------------------------


def print_curves(curves: Curves) -> None:
    """Print a table: a row for each budget, hit ratio and byte hit ratio for each policy."""
    sessions, needed = curves.sessions, format_bytes(curves.sessions_bytes)
    screen.say(f"{curves.requests:,} requests of {sessions:,} sessions, which need {needed}")
    if curves.skipped_lines:
        screen.say(f"lines skipped, because they are no requests: {curves.skipped_lines:,}")
    screen.say("hit ratio (byte hit ratio) of each policy in a memory.max_bytes of:")
    screen.print_columns(["memory", "share", *NAMES], _rows(curves), right={"memory", "share"})


def _rows(curves: Curves) -> Iterator[list[str]]:
    for points in zip(*(curves.policies[name] for name in NAMES), strict=True):
        memory = format_bytes(points[0].memory_bytes)
        yield [
            memory,
            f"{points[0].share:.0%}",
            *(f"{p.hit_ratio:.3f} ({p.byte_hit_ratio:.3f})" for p in points),
        ]


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be drawn, before anything is computed.

    Raises:
        CommandError: matplotlib is not installed, or does not know the suffix.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise CommandError(
            "--plot needs matplotlib: pip install 'persistence-engine[plot]'"
        ) from error
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise CommandError(f"--plot {path}: must end in one of .{', .'.join(sorted(known))}")


def draw(curves: Curves, path: Path) -> None:
    """Draw hit ratio and byte hit ratio against memory, a line for each policy.

    Raises:
        CommandError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, and slow to import

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("hit_ratio", "byte_hit_ratio"), strict=True):
        for name, points in curves.policies.items():
            memory = [point.memory_bytes / 2**20 for point in points]
            axes.plot(memory, [getattr(point, what) for point in points], marker="o", label=name)
        axes.set_xscale("log")
        axes.set_xlabel("memory.max_bytes, MiB")
        axes.set_ylabel(what.replace("_", " "))
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    figure.suptitle(f"{curves.requests:,} requests of {curves.sessions:,} sessions")
    try:
        figure.savefig(path)
    except OSError as error:
        raise CommandError(f"{path}: cannot be written: {error.strerror}") from error
