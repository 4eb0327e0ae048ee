"""Where real payloads and traces are: `BENCHMARK_DATA`, or `shared/data` beside the repository.

Nothing needs them. Without them, generated ones of the same distribution are used, and the
report says so.
"""

from __future__ import annotations

import os
from pathlib import Path

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


def path(name: str) -> Path:
    """Return where the file `name` is, if it is there."""
    return Path(os.environ.get("BENCHMARK_DATA") or _BESIDE) / name
