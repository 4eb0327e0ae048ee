"""What the numbers were taken on: hardware, kernel, file system, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sqlite3
import timeit
from pathlib import Path

from benchmarks import payloads, redis_server, traces

_PACKAGES = (
    "msgpack",
    "lz4",
    "crc32c",
    "zict",
    "lmdb",
    "rocksdict",
    "diskcache",
    "cashews",
    "redis",
)
_NOT_A_DISK = {"tmpfs", "ramfs"}


def describe(directory: Path) -> dict[str, str]:
    """Return what a reader needs to judge the numbers; `directory` is where they are taken."""
    return {
        "processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "memory": _memory(),
        "kernel": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "file system": _file_system(directory),
        "python": _python(),
        "packages": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        "redis-server": redis_server.version(),
        "sqlite": sqlite3.sqlite_version,
        "engine": _version("persistence-engine"),
        "load when started": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "session": f"{payloads.SESSION_BYTES} bytes of MessagePack",
        "documents": payloads.documents_source(),
        "traces": traces.sources(),
    }


def is_disk(directory: Path) -> bool:
    """Whether `directory` is on a file system that survives the power going."""
    return _mount(directory)[1] not in _NOT_A_DISK


def _python() -> str:
    """Return the interpreter and how fast it is: builds of one version differ by up to a half."""

    def nothing() -> None:
        return

    rounds = (timeit.timeit(nothing, number=100_000) for _ in range(5))
    name = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{name}, an empty call takes {min(rounds) * 1e4:.0f} ns"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown processor")


def _memory() -> str:
    size_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{size_bytes / 2**30:.1f} GiB"


def _file_system(directory: Path) -> str:
    device, kind, options = _mount(directory)
    return f"{kind} on {device} ({options})"


def _mount(directory: Path) -> tuple[str, str, str]:
    """Return (device, type, options) of the mount that holds `directory`."""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown device", "unknown file system", "unknown options"
    path = directory.resolve()
    mounts = [line.split()[:4] for line in lines]
    holding = [mount for mount in mounts if path.is_relative_to(mount[1])]
    # The longest mount point wins, and of equal ones the last: it lies over the others.
    device, _, kind, options = max(reversed(holding), key=lambda mount: len(mount[1]))
    return device, kind, options


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
