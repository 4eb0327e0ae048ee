"""Which threads are the engine's own: those that must never wait for the engine.

Each says so itself when it begins. Not by its name: an application may name its threads as it
likes, and may name them after this library.

The finalizers that a garbage collection calls may be called in any thread, and may call anything.
"""

from __future__ import annotations

import threading


class _Mark(threading.local):
    is_own = False


_mark = _Mark()


def mark_own_thread() -> None:
    """Say that this thread is the engine's own, from now on."""
    _mark.is_own = True


def is_own_thread() -> bool:
    """Whether this thread is one of the engine's own."""
    return _mark.is_own
