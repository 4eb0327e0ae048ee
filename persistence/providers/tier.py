"""A session provider over any shared tier (`persistence.remote.contract.RemoteTier`).

The tier brings what is hard: a write is applied once, also when its reply was lost, and only on the
version that it was built on. So a provider and workers (`StateManager`) with the same namespace
see and change the same sessions, and the workers hear of what a provider writes.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Final, Self

from persistence import record as rec
from persistence.arguments import check_ttl
from persistence.clock import Clock, SystemClock
from persistence.errors import ConflictError, printable
from persistence.expiry import WINDOWS_PER_TTL, deadline_after
from persistence.ids import CommitIds, check_session_id
from persistence.providers.contract import ProviderStats
from persistence.providers.opening import Opening
from persistence.providers.packing import (
    DEFAULT_TTL_SECONDS,
    MAX_BYTES,
    Fields,
    check_age,
    check_ttl_or_none,
    first_record,
    next_record,
    pack_fields,
    unpack_fields,
)
from persistence.record import ID_BYTES, NEVER, NO_ID
from persistence.remote.contract import (
    CommitResult,
    Delete,
    Outcome,
    Put,
    RemoteSession,
    RemoteTier,
    Request,
    Touch,
)

_TRIES: Final = 100
_LOADED_AT_ONCE: Final = 32
_IDLE_WINDOW_SECONDS: Final = 60.0


class TierProvider:
    """A `SessionProvider` whose sessions are in a shared tier. `open` it, and `close` it.

    ::

        async with TierProvider(tier) as provider:
            await provider.set_session("ada", {"cart": []}, ttl_seconds=600)

    An access is recorded when a sixteenth of the TTL has passed since the last one, or, for a
    session that never expires, a minute. `get_active_sessions`, `cleanup_old_sessions` and
    `get_stats` walk over all sessions of the namespace; `cleanup_old_sessions` reads their data.

    The first call opens it, if nobody has. It belongs to the event loop that opened it: a call from
    another one is refused with WrongEventLoop, and one after it is closed, or in the child of a
    fork, with ManagerClosed.

    Args:
        tier: a shared tier that is not open yet.
        name: for `get_stats`.
        ttl_seconds: of new sessions; 0: they never expire.
        max_bytes: of one session's packed fields.
        clock: wall time, the same as the tier's server has; default: the machine's.

    Raises:
        InvalidArgument: `ttl_seconds` is no duration.
    """

    def __init__(
        self,
        tier: RemoteTier,
        *,
        name: str = "tier",
        ttl_seconds: float = DEFAULT_TTL_SECONDS,
        max_bytes: int = MAX_BYTES,
        clock: Clock | None = None,
    ) -> None:
        self._tier = tier
        self._opening = Opening()
        self._turn = asyncio.Lock()  # of those who come before it is open
        self._name = name
        self._ttl_seconds = check_ttl(ttl_seconds)
        self._max_bytes = max_bytes
        self._wall = (clock or SystemClock()).wall
        self._commit_ids = CommitIds()
        self._reads = self._hits = self._writes = self._deletes = 0

    async def open(self) -> None:
        """Connect and check that the tier can be used. May be tried again after a failure.

        Raises:
            ConfigError: it can never work like this.
            RemoteUnavailable: it cannot be reached.
            ManagerClosed: it is closed.
        """
        self._opening.begin()
        await self._tier.open()
        self._opening.done()

    async def close(self) -> None:
        """Give all connections back; idempotent. In the child of a fork it does nothing.

        Raises:
            WrongEventLoop: it was opened in another event loop.
        """
        if self._opening.end():
            await self._tier.close()

    async def __aenter__(self) -> Self:
        try:
            await self.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _ready(self) -> None:
        """Let in who may come; the first one opens it.

        Raises:
            ManagerClosed, WrongEventLoop: see the class.
            ConfigError, RemoteUnavailable: it cannot be opened; the next call tries again.
        """
        if self._opening.is_new:
            async with self._turn:
                if self._opening.is_new:
                    await self.open()
        self._opening.check()

    # --- the seven methods ------------------------------------------------------------------------

    async def get_session(self, session_id: str) -> dict[str, Any] | None:
        """Return the session's data, or None if there is none; an access."""
        await self._ready()
        check_session_id(session_id)
        self._reads += 1
        found = await self._tier.load(session_id)
        if not isinstance(found, RemoteSession):
            return None
        self._hits += 1
        await self._renew(session_id, found)
        return unpack_fields(found.record)

    async def set_session(
        self, session_id: str, data: Mapping[str, Any], ttl_seconds: float | None = None
    ) -> None:
        """Store `data` in place of all that the session had, or create it; an access.

        Raises:
            ConflictError: others changed the session all the time.
        """
        await self._ready()
        check_session_id(session_id)
        ttl_seconds = check_ttl_or_none(ttl_seconds)
        fields = pack_fields(session_id, data, self._max_bytes)
        for _ in range(_TRIES):
            found = await self._tier.load(session_id)
            put = self._put(session_id, found, fields, ttl_seconds)
            if (await self._commit(put)).is_stored:
                self._writes += 1
                return
            # Somebody was faster; the last one wins, so once more on what there is now.
        raise ConflictError(
            f"session {printable(session_id)}: others changed it {_TRIES} times meanwhile; "
            "nothing was written: try again"
        )

    async def delete_session(self, session_id: str) -> bool:
        """End a session; return whether it was alive."""
        if not await self.has_session(session_id):
            return False  # ending it would leave a tombstone for everything that never was
        return await self._end(Delete(session_id, self._commit_ids.next()))

    async def has_session(self, session_id: str) -> bool:
        """Whether a session is alive; no access."""
        await self._ready()
        check_session_id(session_id)
        [stored] = await self._tier.stored([session_id])
        return stored is not None and stored.lives

    async def cleanup_old_sessions(self, max_age_seconds: float) -> int:
        """End the sessions that were not accessed for so long; return how many.

        One that is changed meanwhile stays.
        """
        await self._ready()
        oldest = self._wall() - check_age(max_age_seconds)
        count = 0
        async for some in self._pages():
            for session_id, found in zip(some, await self._tier.load_many(some), strict=True):
                if isinstance(found, RemoteSession) and found.accessed < oldest:
                    commit = self._commit_ids.next()
                    base = rec.commit_of(found.record)
                    count += await self._end(Delete(session_id, commit, NO_ID, base))
        return count

    async def get_active_sessions(self) -> list[str]:
        """Return the ids of all sessions that are alive, whoever made them."""
        await self._ready()
        found: dict[str, None] = {}
        async for page in self._tier.scan():
            found.update(dict.fromkeys(page))
        return list(found)

    async def get_stats(self) -> ProviderStats:
        """Return numbers; this walks over all sessions."""
        return ProviderStats(
            provider=self._name,
            sessions=len(await self.get_active_sessions()),
            reads=self._reads,
            hits=self._hits,
            writes=self._writes,
            deletes=self._deletes,
        )

    # --- requests ---------------------------------------------------------------------------------

    def _put(
        self, session_id: str, found: object, fields: Fields, ttl_seconds: float | None
    ) -> Put:
        """Return what stores `fields` on top of what was found."""
        commit = self._commit_ids.next()
        now = self._wall()
        if not isinstance(found, RemoteSession):
            ttl_seconds = self._ttl_seconds if ttl_seconds is None else ttl_seconds
            incarnation = secrets.token_bytes(ID_BYTES)
            record = first_record(incarnation, commit, now, ttl_seconds, fields)
            return Put(session_id, record, NO_ID, now, deadline_after(now, ttl_seconds))
        old = found.record
        record = next_record(old, commit, ttl_seconds, fields)
        deadline = found.deadline
        if ttl_seconds is not None or rec.flags_of(record) & rec.RENEWS:
            deadline = deadline_after(now, rec.ttl_of(record))
        deadline = min(deadline, found.cap)
        return Put(session_id, record, rec.commit_of(old), now, deadline, found.cap, old)

    async def _renew(self, session_id: str, found: RemoteSession) -> None:
        """Record an access, if the last one that was recorded is long ago."""
        record = found.record
        ttl_seconds = rec.ttl_of(record)
        window = ttl_seconds / WINDOWS_PER_TTL if ttl_seconds else _IDLE_WINDOW_SECONDS
        now = self._wall()
        if now - found.accessed < window:
            return
        deadline = found.deadline
        if rec.flags_of(record) & rec.RENEWS and deadline < NEVER:
            deadline = min(deadline_after(now, ttl_seconds), found.cap)
        # Lost, refused or overtaken by a newer version: the next access does it again.
        await self._tier.commit([Touch(session_id, rec.commit_of(record), now, deadline)])

    async def _end(self, delete: Delete) -> bool:
        ended = (await self._commit(delete)).is_stored
        self._deletes += ended
        return ended

    async def _commit(self, request: Request) -> CommitResult:
        """Commit one request; raise what became of it if that is neither yes nor no."""
        [result] = await self._tier.commit([request])
        if result.outcome in (Outcome.REFUSED, Outcome.UNKNOWN):
            assert result.error is not None, "it says why"
            raise result.error
        return result

    async def _pages(self) -> AsyncIterator[list[str]]:
        """Yield the ids of all sessions, a few at a time, each once."""
        ids = await self.get_active_sessions()
        for start in range(0, len(ids), _LOADED_AT_ONCE):
            yield ids[start : start + _LOADED_AT_ONCE]
