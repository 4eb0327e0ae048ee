"""Tests that have a short form, which every run executes, and a long one at the size promised.

The long form is chosen with ``FULL_SIZE=1`` in the environment; it takes minutes.
"""

from __future__ import annotations

import os
from typing import Final

IS_FULL: Final = os.environ.get("FULL_SIZE") == "1"


def full_or(full: int, short: int) -> int:
    """Return the size that was asked for."""
    return full if IS_FULL else short
