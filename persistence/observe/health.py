"""How a session is doing: one number from 0 (in trouble) to 1 (well), and what it is made of.

The score is the product of three parts, each from 0 to 1:

- *errors*: 1 - the share of requests of the last minute or so that failed;
- *time*: 1 while more than a quarter of its TTL (and of its lifetime) is left, then falling to 0 at
  its end;
- *size*: 1 up to half of ``session.max_bytes``, then falling to 0.5 at the limit.

So a score below 0.5 means that requests fail or that it is about to end; size alone never does it.
Pure functions: no clock, no IO.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Final

_ENDING_SHARE: Final = 0.25


@dataclass(frozen=True, slots=True)
class SessionHealth:
    """How one session is doing.

    Attributes:
        session_id: which one.
        score: 0 to 1; see `observe.health` for what it is made of.
        tier: where it is: "memory", or "disk" when it has to be read from there.
        bytes: what its newest version takes, packed.
        age_seconds: since it was created.
        idle_seconds: since it was last accessed.
        left_seconds: until it ends if nobody accesses it; infinity: never.
        requests: how many have ended.
        running: how many are under way in this worker.
        requests_per_second: over the last minute, about.
        errors: how many requests failed.
        error_rate: their share of all, 0 to 1.
        recent_error_rate: of the last minute, about, 0 to 1.
    """

    session_id: str
    score: float
    tier: str
    bytes: int
    age_seconds: float
    idle_seconds: float
    left_seconds: float
    requests: int
    running: int
    requests_per_second: float
    errors: int
    error_rate: float
    recent_error_rate: float


def score(
    *,
    recent_error_rate: float,
    left_seconds: float,
    life_seconds: float,
    lifetime_left_seconds: float = inf,
    lifetime_seconds: float = inf,
    bytes_share: float,
) -> float:
    """Return the score of a session.

    Args:
        recent_error_rate: share of recent requests that failed, 0 to 1.
        left_seconds: until it ends if nobody accesses it.
        life_seconds: what that can be, right after an access; infinity: it never ends.
        lifetime_left_seconds: until it ends however often it is accessed.
        lifetime_seconds: what that was when it was created; infinity: there is no such end.
        bytes_share: its size, as a share of what it may have.
    """
    errors = 1.0 - min(1.0, max(0.0, recent_error_rate))
    time = min(
        _time_part(left_seconds, life_seconds), _time_part(lifetime_left_seconds, lifetime_seconds)
    )
    size = 1.0 - max(0.0, min(1.0, bytes_share) - 0.5)
    return errors * time * size


def _time_part(left_seconds: float, of_seconds: float) -> float:
    ending_seconds = of_seconds * _ENDING_SHARE
    if 0 < ending_seconds < inf:  # the least number there is has no tenth
        return min(1.0, max(0.0, left_seconds) / ending_seconds)
    return 1.0
