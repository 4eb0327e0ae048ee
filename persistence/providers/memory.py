"""Sessions in this process's memory: for tests, and where a restart may forget.

Each session is one run of packed bytes, as everywhere in this library: so what is read is the
reader's own, and what a caller changes afterwards is not stored.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from persistence import record as rec
from persistence.arguments import check_ttl
from persistence.clock import Clock, SystemClock
from persistence.expiry import deadline_after
from persistence.ids import CommitIds, check_session_id
from persistence.providers.contract import ProviderStats
from persistence.providers.packing import (
    DEFAULT_TTL_SECONDS,
    MAX_BYTES,
    check_age,
    check_ttl_or_none,
    first_record,
    next_record,
    pack_fields,
    unpack_fields,
)
from persistence.record import ID_BYTES

_PURGE_ABOVE: Final = 1000


class _Kept(NamedTuple):
    """A session; times are process time, seconds."""

    record: bytes
    accessed: float
    deadline: float


class MemoryProvider:
    """A `SessionProvider` without a server. Its methods never wait.

    Expired sessions are freed when there are twice as many as were alive at the last look.

    Args:
        ttl_seconds: of new sessions; 0: they never expire.
        max_bytes: of one session's packed fields.
        clock: process time; default: the machine's.

    Raises:
        InvalidArgument: `ttl_seconds` is no duration.
    """

    def __init__(
        self,
        *,
        ttl_seconds: float = DEFAULT_TTL_SECONDS,
        max_bytes: int = MAX_BYTES,
        clock: Clock | None = None,
    ) -> None:
        self._ttl_seconds = check_ttl(ttl_seconds)
        self._max_bytes = max_bytes
        self._clock = clock or SystemClock()
        self._sessions: dict[str, _Kept] = {}
        self._purge_at = _PURGE_ABOVE
        self._commit_ids = CommitIds()
        self._reads = self._hits = self._writes = self._deletes = 0

    async def get_session(self, session_id: str) -> dict[str, Any] | None:
        """Return the session's data, or None if there is none; an access."""
        check_session_id(session_id)
        self._reads += 1
        kept = self._alive(session_id)
        if kept is None:
            return None
        self._hits += 1
        self._keep(session_id, kept.record)
        return unpack_fields(kept.record)

    async def set_session(
        self, session_id: str, data: Mapping[str, Any], ttl_seconds: float | None = None
    ) -> None:
        """Store `data` in place of all that the session had, or create it; an access."""
        check_session_id(session_id)
        ttl_seconds = check_ttl_or_none(ttl_seconds)
        fields = pack_fields(session_id, data, self._max_bytes)
        commit = self._commit_ids.next()
        kept = self._alive(session_id)
        if kept is None:
            ttl_seconds = self._ttl_seconds if ttl_seconds is None else ttl_seconds
            incarnation, created = secrets.token_bytes(ID_BYTES), self._clock.wall()
            record = first_record(incarnation, commit, created, ttl_seconds, fields)
        else:
            record = next_record(kept.record, commit, ttl_seconds, fields)
        self._keep(session_id, record)
        self._writes += 1
        if len(self._sessions) > self._purge_at:
            self._purge()

    async def delete_session(self, session_id: str) -> bool:
        """End a session; return whether it was alive."""
        check_session_id(session_id)
        was_alive = self._alive(session_id) is not None
        self._sessions.pop(session_id, None)
        self._deletes += was_alive
        return was_alive

    async def has_session(self, session_id: str) -> bool:
        """Whether a session is alive; no access."""
        check_session_id(session_id)
        return self._alive(session_id) is not None

    async def cleanup_old_sessions(self, max_age_seconds: float) -> int:
        """End the sessions that were not accessed for so long; return how many."""
        oldest = self._clock.monotonic() - check_age(max_age_seconds)
        self._purge()
        old = [name for name, kept in self._sessions.items() if kept.accessed < oldest]
        for session_id in old:
            del self._sessions[session_id]
        self._deletes += len(old)
        return len(old)

    async def get_active_sessions(self) -> list[str]:
        """Return the ids of all sessions that are alive."""
        self._purge()
        return list(self._sessions)

    async def get_stats(self) -> ProviderStats:
        """Return numbers."""
        self._purge()
        return ProviderStats(
            provider="memory",
            sessions=len(self._sessions),
            reads=self._reads,
            hits=self._hits,
            writes=self._writes,
            deletes=self._deletes,
        )

    def _alive(self, session_id: str) -> _Kept | None:
        kept = self._sessions.get(session_id)
        return kept if kept is not None and kept.deadline > self._clock.monotonic() else None

    def _keep(self, session_id: str, record: bytes) -> None:
        now = self._clock.monotonic()
        deadline = deadline_after(now, rec.ttl_of(record))
        self._sessions[session_id] = _Kept(record, now, deadline)

    def _purge(self) -> None:
        """Free what has expired."""
        now = self._clock.monotonic()
        for session_id in [name for name, kept in self._sessions.items() if kept.deadline <= now]:
            del self._sessions[session_id]
        self._purge_at = 2 * len(self._sessions) + _PURGE_ABOVE
