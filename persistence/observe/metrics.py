"""Requests of a session, counted and timed: what is kept, how it is stored and shown.

A `Tally` holds some requests; two of them add up to one (`Tally.add`), whatever sessions and
workers they are of. What this worker has not stored yet is a tally in memory; what is stored is one
in the session's metadata, as plain MessagePack (`Tally.parts`), beside the limit's high-water mark.

Recent rates decay exponentially: a request counts `exp(-age / RECENT_SECONDS)`, so that the sum is
about the number of requests of the last `RECENT_SECONDS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from math import exp, inf
from typing import Any, Final

from persistence.observe.digest import Digest

RECENT_SECONDS: Final = 60.0
MAX_NAME_CHARS: Final = 200
MAX_ERROR_CHARS: Final = 300


def error_text(error: object) -> str:
    """Return an error as it is kept: its type and its message, shortened."""
    try:
        said = str(error)
    except Exception:  # noqa: BLE001 - it is the application's, and not to stand in for its error
        said = "(its message cannot be shown)"
    text = f"{type(error).__name__}: {said}" if isinstance(error, BaseException) else said
    return text[:MAX_ERROR_CHARS].encode("utf-8", "replace").decode()


def name_text(name: str) -> str:
    """Return a request's name as it is kept."""
    return name[:MAX_NAME_CHARS].encode("utf-8", "replace").decode()


class Tally:
    """Some requests of a session. Times are wall seconds.

    Attributes:
        requests: how many have ended.
        errors: how many of them, or beside them, failed.
        total_seconds: what they took.
        first_at, last_at: when the first and the last one ended; 0.0: there was none.
        last_name: of the last one.
        last_error, last_error_at: the last failure, and when; "": there was none.
        recent_requests, recent_errors: decayed, as of `last_at`.
        digest: how long they took.
    """

    __slots__ = (
        "digest",
        "errors",
        "first_at",
        "last_at",
        "last_error",
        "last_error_at",
        "last_name",
        "recent_errors",
        "recent_requests",
        "requests",
        "total_seconds",
    )

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0
        self.total_seconds = 0.0
        self.first_at = 0.0
        self.last_at = 0.0
        self.last_name = ""
        self.last_error = ""
        self.last_error_at = 0.0
        self.recent_requests = 0.0
        self.recent_errors = 0.0
        self.digest = Digest()

    def __bool__(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.requests or self.errors)

    def ended(self, durations: Sequence[float], name: str, now: float) -> None:
        """Take in requests that ended until `now`, the last one of this name."""
        self._age(now)
        self.requests += len(durations)
        self.recent_requests += len(durations)
        self.total_seconds += sum(durations)
        self.last_name = name
        self.digest.add(durations)

    def failed(self, error: str, now: float) -> None:
        """Take in a failure."""
        self._age(now)
        self.errors += 1
        self.recent_errors += 1
        self.last_error = error
        self.last_error_at = now

    def _age(self, now: float) -> None:
        if not self:
            self.first_at = now
        else:
            faded = _faded(now - self.last_at)
            self.recent_requests *= faded
            self.recent_errors *= faded
        self.last_at = max(self.last_at, now)

    def add(self, other: Tally, now: float = inf) -> None:
        """Take in what another one has.

        Args:
            other: what is taken in.
            now: what either says to be later was timed by a clock that has been set back since. It
                would count as the newest until the clock gets there, and what happens as nothing.
        """
        if not other:
            return
        self._end_by(now)
        other._end_by(now)
        if not self:
            self.first_at, self.last_at = other.first_at, other.last_at
        last_at = max(self.last_at, other.last_at)
        mine, others = _faded(last_at - self.last_at), _faded(last_at - other.last_at)
        self.recent_requests = self.recent_requests * mine + other.recent_requests * others
        self.recent_errors = self.recent_errors * mine + other.recent_errors * others
        if other.requests and other.last_at >= self.last_at:
            self.last_name = other.last_name
        if other.last_error_at >= self.last_error_at and other.last_error:
            self.last_error, self.last_error_at = other.last_error, other.last_error_at
        self.requests += other.requests
        self.errors += other.errors
        self.total_seconds += other.total_seconds
        self.first_at = min(self.first_at, other.first_at)
        self.last_at = last_at
        self.digest.merge(other.digest)

    def _end_by(self, now: float) -> None:
        """Let nothing in it be later than `now`."""
        if self.last_at <= now:
            return
        faded = _faded(self.last_at - now)  # nobody knows how old it is
        self.recent_requests *= faded
        self.recent_errors *= faded
        self.first_at = min(self.first_at, now)
        self.last_at = now
        self.last_error_at = min(self.last_error_at, now)

    def parts(self) -> list[object]:
        """Return what is stored of it."""
        return [
            self.requests,
            self.errors,
            self.total_seconds,
            self.first_at,
            self.last_at,
            self.last_name,
            self.last_error,
            self.last_error_at,
            self.recent_requests,
            self.recent_errors,
            self.digest.pack(),
        ]

    @staticmethod
    def of_parts(parts: Any) -> Tally:
        """Return the tally of which `parts` was stored; an empty one of what nobody wrote so."""
        tally = Tally()
        try:
            (
                tally.requests,
                tally.errors,
                tally.total_seconds,
                tally.first_at,
                tally.last_at,
                tally.last_name,
                tally.last_error,
                tally.last_error_at,
                tally.recent_requests,
                tally.recent_errors,
                packed,
                *_,  # of a later version
            ) = parts
            tally.digest = Digest.unpack(packed)
        except (TypeError, ValueError):
            return Tally()
        return tally

    def requests_per_second(self, now: float) -> float:
        """Return the recent rate, as of `now`."""
        return self.recent_requests * _faded(abs(now - self.last_at)) / RECENT_SECONDS

    def recent_error_rate(self) -> float:
        """Return the share of recent requests that failed, 0 to 1."""
        return _share(self.recent_errors, self.recent_requests)


def _faded(age_seconds: float) -> float:
    return exp(-max(0.0, age_seconds) / RECENT_SECONDS)


def _share(errors: float, requests: float) -> float:
    """Return the share of errors; those beside requests do not make it more than all."""
    return min(1.0, errors / max(requests, errors)) if errors else 0.0


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """The requests of one session, of all workers as far as they have stored theirs.

    Attributes:
        requests: how many have ended.
        running: how many are under way in this worker.
        errors: how many failed.
        error_rate: their share, 0 to 1.
        last_name: of the request that ended last; "": there was none.
        last_at: when that was, aware UTC; None: there was none.
        last_error: the last failure, type and message; "": there was none.
        last_error_at: when that was, aware UTC; None: there was none.
        total_seconds: what all of them took.
        average_seconds: what one of them took; 0.0: there was none.
        p50_seconds, p95_seconds, p99_seconds: percentiles, from a t-digest.
        requests_per_second: over the last minute, about.
        max_requests: the limit; 0: none.
        admitted: requests that the limit has been charged with, with what workers hold in reserve
            for the next ones; 0 where there is no limit.
    """

    requests: int
    running: int
    errors: int
    error_rate: float
    last_name: str
    last_at: datetime | None
    last_error: str
    last_error_at: datetime | None
    total_seconds: float
    average_seconds: float
    p50_seconds: float
    p95_seconds: float
    p99_seconds: float
    requests_per_second: float
    max_requests: int
    admitted: int


def metrics_of(
    tally: Tally, now: float, shown: Any, *, running: int, max_requests: int, admitted: int
) -> RequestMetrics:
    """Return what a tally says; `shown` makes a datetime of wall seconds."""
    quantile = tally.digest.quantile
    return RequestMetrics(
        requests=tally.requests,
        running=running,
        errors=tally.errors,
        error_rate=_share(tally.errors, tally.requests),
        last_name=tally.last_name,
        last_at=shown(tally.last_at) if tally.last_at else None,
        last_error=tally.last_error,
        last_error_at=shown(tally.last_error_at) if tally.last_error_at else None,
        total_seconds=tally.total_seconds,
        average_seconds=tally.total_seconds / tally.requests if tally.requests else 0.0,
        p50_seconds=quantile(0.50),
        p95_seconds=quantile(0.95),
        p99_seconds=quantile(0.99),
        requests_per_second=tally.requests_per_second(now),
        max_requests=max_requests,
        admitted=admitted,
    )
