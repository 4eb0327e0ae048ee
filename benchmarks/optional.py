"""Importing what a benchmark may lack: a missing peer skips its rows, it does not stop the run."""

from __future__ import annotations

import importlib
from typing import Any


class UnavailableError(Exception):
    """A contender cannot run on this machine; the message is the reason that the row shows."""


def load(module: str) -> Any:
    """Import `module` (untyped on purpose: most peers ship no types).

    Raises:
        UnavailableError: it is not installed, or does not import here.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{module} cannot be imported: {error}") from error
