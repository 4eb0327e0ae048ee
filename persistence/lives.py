"""How sessions begin and end: creation under the limit on sessions, and termination."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from persistence import record as rec
from persistence.arguments import (
    check_count_or_none,
    check_switch_or_none,
    check_text_or_none,
    check_ttl,
    refused,
)
from persistence.commit import Commit, committed
from persistence.config import SessionConfig
from persistence.errors import Overtaken, SessionExists, SessionLimitReached, SessionNotFound
from persistence.ids import check_session_id, new_session_id, plain_id
from persistence.lookup import Lookup
from persistence.record import NEVER
from persistence.session import MAX_REQUESTS, USER_ID, Data, Session, SessionMetadata
from persistence.tiers import Tiers
from persistence.updates import packed_data

_LIMIT_CLEANUP_SECONDS: Final = 1.0  # at the limit, look for expired sessions this often


class Lives:
    """Creates and ends sessions.

    Args:
        config: what a session is unless its creator says otherwise, and how many there may be.
        begin: raises ManagerClosed; waits for a turn, and while a checkpoint is being put in place.
        lookup: brings here what lives elsewhere.
        plain_data: returns the fields that a caller's data for a session stand for.
    """

    def __init__(
        self,
        config: SessionConfig,
        begin: Callable[[], Awaitable[None]],
        lookup: Lookup,
        plain_data: Callable[[str, object], Mapping[Any, Any]],
    ) -> None:
        self._config = config
        self._begin = begin
        self._lookup = lookup
        self._plain_data = plain_data
        self._no_limit_cleanup_before = -NEVER
        self._limit_cleanup = asyncio.Lock()

    def attach(self, tiers: Tiers) -> None:
        """Work on the tiers as they are now."""
        self._time, self._disk, self._residency = tiers.time, tiers.disk, tiers.residency
        self._commits, self._updates, self._listing = tiers.commits, tiers.updates, tiers.listing

    # --- beginning ----------------------------------------------------------------------------

    async def create(
        self,
        session_id: str | None,
        user_id: str | None = None,
        metadata: SessionMetadata | None = None,
        ttl_seconds: float | None = None,
        data: Data | None = None,
        *,
        max_requests: int | None = None,
        auto_renew: bool | None = None,
    ) -> Commit:
        """Do what `StateManager.create_session` says; return the acknowledged commit."""
        await self._begin()
        session_id = new_session_id() if session_id is None else plain_id(session_id)
        key = check_session_id(session_id)
        meta = _packed_meta(user_id, metadata, max_requests)
        fields = packed_data({} if data is None else self._plain_data(session_id, data))
        ttl = self._config.ttl_seconds if ttl_seconds is None else check_ttl(ttl_seconds)
        check_switch_or_none("auto_renew", auto_renew)
        renews = self._config.auto_renew if auto_renew is None else auto_renew
        if self._residency.has_copy(session_id):
            await self._lookup.bring_here(session_id)  # it may have ended elsewhere
        if self._residency.is_alive(session_id, key):
            raise SessionExists(session_id)
        await self._check_session_limit()
        await self._updates.admit()
        # From here to the submission nothing awaits, so two creations cannot both succeed.
        if self._residency.is_alive(session_id, key):
            raise SessionExists(session_id)
        self._refuse_over_limit()
        commit = self._updates.create(
            session_id,
            key,
            fields=fields,
            meta=meta,
            user_id=user_id,
            ttl_seconds=ttl,
            renews=renews,
        )
        await committed(commit)
        return commit

    async def get_or_create(
        self,
        session_id: str | None,
        get: Callable[[str], Awaitable[Session | None]],
        create: Mapping[str, Any],
    ) -> tuple[Session, bool]:
        """Return the live session `session_id`, and whether it had to be created.

        Args:
            session_id: None: create one with a fresh id.
            get: returns a live session.
            create: what `create` takes.
        """
        if session_id is not None:
            session_id = plain_id(session_id)
        while True:
            if session_id is not None:
                session = await get(session_id)
                if session is not None:
                    return session, False
            try:
                created = await self.create(session_id, **create)
            except SessionExists:
                # Somebody else is creating it: readers see it once that is decided.
                assert session_id is not None, "a fresh id exists nowhere"
                await self._commits.decided(session_id)
                continue
            # Not read again: its time may be over already, however short that is.
            return self._updates.view(created), True

    async def _check_session_limit(self) -> None:
        """Make room among the sessions if there is none; not each time, for it looks at all."""
        limit = self._config.max_sessions
        if not limit or self._session_count() < limit:
            return
        async with self._limit_cleanup:  # who comes meanwhile waits for the room that it makes
            is_over = self._session_count() >= limit
            if is_over and self._time.now() >= self._no_limit_cleanup_before:
                self._no_limit_cleanup_before = self._time.now() + _LIMIT_CLEANUP_SECONDS
                if await self._listing.remove_expired():
                    self._no_limit_cleanup_before = -NEVER
        self._refuse_over_limit()

    def _refuse_over_limit(self) -> None:
        """Raise SessionLimitReached if there is no room for one more. Never awaits."""
        limit = self._config.max_sessions
        if limit and self._session_count() >= limit:
            raise SessionLimitReached(
                f"{limit} sessions are alive, which is session.max_sessions; "
                "terminate some or raise the limit"
            )

    def _session_count(self) -> int:
        return len(self._disk.index) + len(self._residency.unlisted) + self._commits.creating

    # --- ending -------------------------------------------------------------------------------

    async def terminate(self, session_id: str) -> bool:
        """End a session; return whether it was alive. See `StateManager.terminate_session`."""
        session_id = plain_id(session_id)
        while True:
            await self._begin()
            try:
                return await self._terminate_once(session_id, check_session_id(session_id))
            except Overtaken:
                continue  # it has ended and begun anew elsewhere: end that

    async def _terminate_once(self, session_id: str, key: bytes) -> bool:
        await self._lookup.bring_here(session_id)
        while not self._residency.is_alive(session_id, key):
            if session_id not in self._commits.tails:
                await self._residency.expire_if_over(session_id, key)
                return False
            # Its end is on its way. Be sure of it: should that fail, it is still alive.
            await self._commits.decided(session_id)
        await committed(self._residency.submit_delete(session_id, key))
        return True

    async def take(self, session_id: str) -> Session | None:
        """End a session, and return it as it was in the end; None: it was not alive.

        Of several calls of this worker one gets it, and what it gets is the last version.

        Raises:
            InvalidSessionId, CorruptionError: it is still what it was.
            DiskFull, WriteOutcomeUnknown: it may still be there; see `commit`.
        """
        session_id = plain_id(session_id)
        key = check_session_id(session_id)
        while True:
            await self._begin()
            await self._lookup.bring_here(session_id)
            try:
                (record, life, cap), accessed = await self._residency.aside_base(session_id, key)
            except SessionNotFound:
                if session_id not in self._commits.tails:
                    await self._residency.expire_if_over(session_id, key)
                    return None
                # As when it is terminated: should its end fail, it is still alive.
                await self._commits.decided(session_id)
                continue
            try:
                # Nothing has been awaited since it was looked at: it is this version that ends.
                await committed(self._residency.submit_delete(session_id, key, exact=True))
            except (Overtaken, SessionNotFound):
                continue  # another worker has made a newer one, or ended it
            return Session.view(session_id, record, accessed, (life, cap, self._time))


_BARE_META: Final = rec.pack_meta({})


def _packed_meta(
    user_id: str | None, metadata: SessionMetadata | None, max_requests: int | None
) -> bytes:
    """Check and pack what is stored about a session beside its fields."""
    if user_id is None and metadata is None and max_requests is None:
        return _BARE_META
    if metadata is not None and not isinstance(metadata, SessionMetadata):
        raise refused("metadata", metadata, "a SessionMetadata or None")
    return rec.pack_meta(
        {
            USER_ID: check_text_or_none("user_id", user_id),
            MAX_REQUESTS: check_count_or_none("max_requests", max_requests),
            **(metadata or SessionMetadata()).packed_parts(),
        }
    )
