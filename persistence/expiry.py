"""TTLs, deadlines and renewals: pure arithmetic, in seconds.

An access moves the deadline of a renewing session in memory only. It is recorded in the log (a
small touch frame) when the last access crosses into another *window* of a sixteenth of the TTL.
At any time less than an eighth of the TTL is therefore unrecorded, and recovery grants that eighth.
"""

from __future__ import annotations

from typing import Final

from persistence.record import NEVER

WINDOWS_PER_TTL: Final = 16
_IDLE_WINDOW_SECONDS: Final = 3600.0
_NO_LIFE_SECONDS: Final = 1e-300  # a sixteenth of the shortest float is nothing
_MIN_SWEEP_SECONDS: Final = 0.05
_MAX_SWEEP_SECONDS: Final = 30.0


def life_of(ttl_seconds: float, renews: bool | int, deadline: float) -> float:
    """Return the *life* of a session, as the memory tier keeps it.

    Positive: a TTL that runs from the last access (infinite: never expires). Negative: a fixed
    deadline with its sign changed.
    """
    if not ttl_seconds or deadline == NEVER:
        return NEVER
    return ttl_seconds if renews else -deadline


def deadline_after(accessed: float, ttl_seconds: float) -> float:
    """Return the deadline of a session with this TTL that was accessed then."""
    return accessed + ttl_seconds if ttl_seconds else NEVER


def must_record(before: float, accessed: float, life: float) -> bool:
    """Whether the move of the last access from `before` to `accessed` has to be logged."""
    window = life / WINDOWS_PER_TTL if _NO_LIFE_SECONDS < life < NEVER else _IDLE_WINDOW_SECONDS
    return accessed // window != before // window


def sweep_seconds(shortest_ttl_seconds: float) -> float:
    """Return how often to look for renewals to record: a sixteenth of the shortest TTL in use."""
    return min(_MAX_SWEEP_SECONDS, max(_MIN_SWEEP_SECONDS, shortest_ttl_seconds / WINDOWS_PER_TTL))
