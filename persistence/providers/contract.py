"""What a session provider does. `persistence.testing.provider_contract` tests one.

A provider keeps sessions for an application: whole, by their id, with a TTL. It promises:

1. A session is stored and read as a whole. Of two writers that set the same session at the same
   time, the last one wins; no reader sees a mixture.
2. What is read is the reader's own: changing it changes nothing that is stored, and changing what
   was given to `set_session` afterwards changes nothing either.
3. The TTL runs from the last access, which is `set_session` or `get_session`. From its deadline on
   a session is absent for every method. A provider may record an access only when a sixteenth of
   the TTL has passed since the last one that it recorded.
4. Any non-empty string of at most 512 bytes of UTF-8 is a session id, and a plain key: it is no
   path and no pattern, and reaches no other session.
5. What it cannot store it refuses by name, and changes nothing.

Every method may raise `RemoteUnavailable` (it certainly did nothing) or, where it writes,
`WriteOutcomeUnknown`, if there is a server behind it; then every method also raises `ManagerClosed`
where the provider is closed, and `WrongEventLoop` in another event loop than the one that opened
it. Each may be cancelled at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypedDict


class ProviderStats(TypedDict):
    """Numbers about a provider. A provider may add some of its own.

    Attributes:
        provider: which kind it is, for example "redis".
        sessions: how many are alive, whoever made them.
        reads: calls of `get_session` since this object was made.
        hits: how many of them found a session.
        writes: calls of `set_session` that succeeded.
        deletes: sessions that `delete_session` and `cleanup_old_sessions` of this object ended.
    """

    provider: str
    sessions: int
    reads: int
    hits: int
    writes: int
    deletes: int


class SessionProvider(Protocol):
    """A place for sessions."""

    async def get_session(self, session_id: str) -> dict[str, Any] | None:
        """Return the session's data, or None if there is none; an access.

        Raises:
            InvalidSessionId: it can be no id of a session.
            RemoteDamaged: what is stored is damaged.
        """

    async def set_session(
        self, session_id: str, data: Mapping[str, Any], ttl_seconds: float | None = None
    ) -> None:
        """Store `data` in place of all that the session had, or create it; an access.

        Args:
            session_id: whose.
            data: field names and values; what can be a value is in docs/api.md.
            ttl_seconds: 0: never expires. None: the TTL that the session has, or the provider's
                default for a new one.

        Raises:
            InvalidSessionId: it can be no id of a session.
            InvalidArgument: `data` is no mapping, or `ttl_seconds` no duration.
            ValueNotSerializable: a field cannot be stored; the message names it.
            ValueTooLarge: all of it is larger than the provider takes.
        """

    async def delete_session(self, session_id: str) -> bool:
        """End a session; return whether it was alive.

        Raises:
            InvalidSessionId: it can be no id of a session.
        """

    async def has_session(self, session_id: str) -> bool:
        """Whether a session is alive; no access.

        Raises:
            InvalidSessionId: it can be no id of a session.
        """

    async def cleanup_old_sessions(self, max_age_seconds: float) -> int:
        """End the sessions that were not accessed for so long; return how many.

        Args:
            max_age_seconds: since the last access that was recorded (see above).

        Raises:
            InvalidArgument: it is no duration.
        """

    async def get_active_sessions(self) -> list[str]:
        """Return the ids of all sessions that are alive, each once, in no order."""

    async def get_stats(self) -> ProviderStats:
        """Return numbers; counting the sessions may take a walk over all of them."""
