"""The memory budget: how much memory this process may use, and how much of it sessions get.

Two halves. `MemoryReader` finds out which limit is closest to being reached, and from that alone
`effective_budget_bytes` decides what the budget is for the next interval.

Which limit counts. A worker can be stopped by its cgroup, by any ancestor of it (the pod around the
container), by an rlimit, or by the machine being full. Taking the least of them is what dask's
workers do; here it is the least *headroom*: a pod at 95 % of its large limit is closer to the end
than a container in it at 20 % of its small one. The two agree wherever usage is the same.

What counts as used. Anonymous memory, not ``memory.current`` or ``usage_in_bytes``: these include
the page cache of our own log, which the kernel takes back whenever it needs it, so a busy disk tier
would look like a full memory.

Why in steps. The idea is that of the memory monitor in CacheLib: shrink and regrow by a bounded
step per check. Freed bytes come back to the kernel late or never (the allocator keeps them), so a
controller that shrinks by all it misses, at once, empties the cache before the first effect shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, NamedTuple

import psutil

SHRINK_ABOVE: Final = 0.90
"""Used share of the limit above which the budget shrinks."""
REGROW_BELOW: Final = 0.80
"""Used share of the limit below which it grows back; between the two it stays as it is."""
STEP_DIVISOR: Final = 8
"""A step is the configured budget divided by this."""
FLOOR_DIVISOR: Final = 16
"""The budget never falls below the configured one divided by this."""

_NO_LIMIT_BYTES: Final = 2**60
"""From here on a number means "none": v1 reports the largest page count, 2**63 less a page."""

ReadText = Callable[[str], str | None]
"""Returns the text of a small file below /proc or /sys; None: it is not there or not readable."""


@dataclass(frozen=True, slots=True)
class MemoryPressure:
    """How close the process is to the limit that it would hit first.

    Attributes:
        limit_bytes: that limit.
        anonymous_bytes: what is used of it and cannot be reclaimed, by everybody it applies to.
        rss_bytes: resident set of this process.
        source: which limit it is, for people: a cgroup's file, ``RLIMIT_AS``, ``host``.
    """

    limit_bytes: int
    anonymous_bytes: int
    rss_bytes: int
    source: str = ""

    @property
    def used_fraction(self) -> float:
        """Used share of the limit; 0.0 without a limit."""
        return self.anonymous_bytes / self.limit_bytes if self.limit_bytes > 0 else 0.0


def effective_budget_bytes(
    configured_bytes: int, current_bytes: int, pressure: MemoryPressure
) -> int:
    """Return the budget for the next interval.

    Above `SHRINK_ABOVE` of the limit it is one step less than `current_bytes`, below `REGROW_BELOW`
    at most one step more, in between the same. A step of regrowth is no larger than the room up to
    `SHRINK_ABOVE`, so that a budget which is used up at once does not swing.

    Args:
        configured_bytes: ``memory.max_bytes``; never exceeded.
        current_bytes: the result of the previous call, at first `configured_bytes`.
        pressure: what `MemoryReader.read` returned.
    """
    floor_bytes = max(1, configured_bytes // FLOOR_DIVISOR)
    step_bytes = max(1, configured_bytes // STEP_DIVISOR)
    if pressure.used_fraction > SHRINK_ABOVE:
        current_bytes -= step_bytes
    elif pressure.used_fraction < REGROW_BELOW:
        room_bytes = int(pressure.limit_bytes * SHRINK_ABOVE) - pressure.anonymous_bytes
        has_limit = pressure.limit_bytes > 0
        current_bytes += min(step_bytes, room_bytes) if has_limit else step_bytes
    effective_bytes = max(floor_bytes, min(current_bytes, configured_bytes))
    assert floor_bytes <= effective_bytes <= max(configured_bytes, floor_bytes), effective_bytes
    return effective_bytes


class ProcessMemory(NamedTuple):
    """Sizes of this process in bytes: resident, address space, and private data."""

    rss_bytes: int
    virtual_bytes: int
    data_bytes: int


class Constraint(NamedTuple):
    """One limit, what is used of it (both in bytes), and its name."""

    limit_bytes: int
    used_bytes: int
    source: str


class CgroupLevel(NamedTuple):
    """A directory of a memory cgroup, and whether its files have the names of version 2."""

    directory: str
    is_v2: bool


class _Mount(NamedTuple):
    root: PurePosixPath
    mount_point: PurePosixPath
    is_v2: bool


def cgroup_levels(cgroup_text: str, mountinfo_text: str) -> list[CgroupLevel]:
    """Return the memory cgroup of a process and all its ancestors that are visible, it first.

    Both versions may be mounted at once, with the memory controller in either (the hybrid layout
    of systemd): the levels of both are returned, and those without the controller have no limits.

    Args:
        cgroup_text: ``/proc/<pid>/cgroup``.
        mountinfo_text: ``/proc/<pid>/mountinfo``.
    """
    paths = dict(_cgroup_paths(cgroup_text))
    return [
        CgroupLevel(str(directory), mount.is_v2)
        for mount in _cgroup_mounts(mountinfo_text)
        if mount.is_v2 in paths
        for directory in _levels(mount, paths[mount.is_v2])
    ]


def _cgroup_paths(cgroup_text: str) -> Iterator[tuple[bool, PurePosixPath]]:
    """Yield (is version 2, path in the hierarchy) of the hierarchies that may limit memory."""
    for line in cgroup_text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield True, PurePosixPath(path)
        elif "memory" in controllers.split(","):
            yield False, PurePosixPath(path)


def _cgroup_mounts(mountinfo_text: str) -> Iterator[_Mount]:
    # 35 31 0:32 <root> <mount point> <options> [<optional> ...] - <type> <source> <super options>
    for line in mountinfo_text.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 6 or len(kind) < 3:
            continue
        is_v2 = kind[0] == "cgroup2"
        if is_v2 or (kind[0] == "cgroup" and "memory" in kind[2].split(",")):
            yield _Mount(_unescaped(fields[3]), _unescaped(fields[4]), is_v2)


def _unescaped(field: str) -> PurePosixPath:
    # The kernel writes space, tab, newline and backslash in octal: \040.
    return PurePosixPath(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field))


def _levels(mount: _Mount, path: PurePosixPath) -> Iterator[PurePosixPath]:
    # A container may see the host's path of its cgroup while only that cgroup is mounted: the
    # mount is then the cgroup itself, or the nearest ancestor that it can see.
    below = path.relative_to(mount.root) if path.is_relative_to(mount.root) else PurePosixPath()
    if ".." in below.parts:
        below = PurePosixPath()
    yield mount.mount_point / below
    yield from (mount.mount_point / parent for parent in below.parents)


def _limit_bytes(text: str | None) -> int | None:
    """Return the number in a limit's file; None: there is no limit."""
    number = (text or "").strip()
    return _finite(int(number)) if number.isdigit() else None


def _finite(limit_bytes: int | None) -> int | None:
    is_limit = limit_bytes is not None and 0 < limit_bytes < _NO_LIMIT_BYTES
    return limit_bytes if is_limit else None


def _statistic_bytes(text: str | None, *names: str) -> int | None:
    """Return the first of `names` that a ``memory.stat`` holds; None: none of them."""
    values = dict(line.split(" ", 1) for line in (text or "").splitlines() if " " in line)
    found = next((values[name] for name in names if name in values), "")
    return int(found) if found.isdigit() else None


def read_text_file(path: str) -> str | None:
    """Return the text of the file at `path`, or None when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return None


def process_memory() -> ProcessMemory:
    """Return the sizes of the calling process."""
    info = psutil.Process().memory_info()
    # Only Linux tells the size of the data; the address space would be far too much for it.
    return ProcessMemory(info.rss, info.vms, getattr(info, "data", info.rss))


def host_memory() -> Constraint:
    """Return the machine's memory, and what of it is not available to a new program."""
    memory = psutil.virtual_memory()
    return Constraint(memory.total, memory.total - memory.available, "host")


def process_limits() -> dict[str, int]:
    """Return the soft rlimits that bound memory, in bytes by name, without the unlimited ones.

    Empty where the system has none.
    """
    try:
        import resource  # noqa: PLC0415 - not on every platform
    except ImportError:
        return {}
    limits = {
        "RLIMIT_AS": resource.getrlimit(resource.RLIMIT_AS)[0],
        "RLIMIT_DATA": resource.getrlimit(resource.RLIMIT_DATA)[0],
    }
    return {name: limit for name, limit in limits.items() if 0 < limit < _NO_LIMIT_BYTES}


class MemoryReader:
    """Reads the `MemoryPressure` on this process. A read is a dozen small files of /proc and /sys.

    Everything that touches the system is an argument, so that a test can stand in for it.

    Args:
        read_text: reads a file by its absolute path.
        own_memory: sizes of this process.
        host: the machine's memory.
        limits: rlimits in bytes, by name.
    """

    def __init__(
        self,
        *,
        read_text: ReadText = read_text_file,
        own_memory: Callable[[], ProcessMemory] = process_memory,
        host: Callable[[], Constraint] = host_memory,
        limits: Callable[[], dict[str, int]] = process_limits,
    ) -> None:
        self._read_text = read_text
        self._own_memory = own_memory
        self._host = host
        self._limits = limits
        self._cgroup_text: str | None = None
        self._levels: list[CgroupLevel] = []

    def read(self) -> MemoryPressure:
        """Return the pressure of now. Never raises for what the system does not tell."""
        own = self._own_memory()
        constraints = [*self._cgroup_constraints(own), *self._process_constraints(own)]
        host = self._host()
        # The machine's usage is mostly other people's, and a machine may well be run full as long
        # as nobody's limit is larger than it.
        if not any(constraint.limit_bytes <= host.limit_bytes for constraint in constraints):
            constraints.append(host)
        tightest = max(constraints, key=_tightness)
        return MemoryPressure(
            tightest.limit_bytes, tightest.used_bytes, own.rss_bytes, tightest.source
        )

    def _cgroup_constraints(self, own: ProcessMemory) -> Iterator[Constraint]:
        for level in self._current_levels():
            limits, used_bytes = self._version_2(level) if level.is_v2 else self._version_1(level)
            limit_bytes = min((limit for limit in limits if limit is not None), default=None)
            if limit_bytes is not None:
                used_bytes = own.rss_bytes if used_bytes is None else used_bytes
                yield Constraint(limit_bytes, used_bytes, f"cgroup {level.directory}")

    def _version_2(self, level: CgroupLevel) -> tuple[list[int | None], int | None]:
        limits = [
            _limit_bytes(self._read_text(f"{level.directory}/{name}"))
            # Above memory.high the kernel stalls the process, which for a server is the end too.
            for name in ("memory.max", "memory.high")
        ]
        if limits == [None, None]:
            return limits, None
        return limits, _statistic_bytes(self._read_text(f"{level.directory}/memory.stat"), "anon")

    def _version_1(self, level: CgroupLevel) -> tuple[list[int | None], int | None]:
        statistics = self._read_text(f"{level.directory}/memory.stat")
        limits = [
            _limit_bytes(self._read_text(f"{level.directory}/memory.limit_in_bytes")),
            # The least over all ancestors, also those that a container cannot see.
            _finite(_statistic_bytes(statistics, "hierarchical_memory_limit")),
        ]
        return limits, _statistic_bytes(statistics, "total_rss", "rss")

    def _current_levels(self) -> list[CgroupLevel]:
        # A manager such as systemd may move a running process into another cgroup. That shows
        # here, so that the long list of mounts is read only then.
        text = self._read_text("/proc/self/cgroup") or ""
        if text != self._cgroup_text:
            self._levels = cgroup_levels(text, self._read_text("/proc/self/mountinfo") or "")
            self._cgroup_text = text
        return self._levels

    def _process_constraints(self, own: ProcessMemory) -> Iterator[Constraint]:
        used = {"RLIMIT_AS": own.virtual_bytes, "RLIMIT_DATA": own.data_bytes}
        for name, limit_bytes in self._limits().items():
            yield Constraint(limit_bytes, used[name], name)


def _tightness(constraint: Constraint) -> tuple[float, int]:
    """Order constraints by the share that is used, then by size, the smallest last."""
    return constraint.used_bytes / constraint.limit_bytes, -constraint.limit_bytes
