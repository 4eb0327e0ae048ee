"""Tokens for sessions, and the one session that a token opens.

A token holds as long as its session does: it names the incarnation, which ends with the session,
also when that is created anew under the same id, and when its id is rotated. Whether the session
lives is looked up each time, in memory, on disk and in the shared tier.

A `SessionHandle` checks the token's session at every call, on the very version that the call reads
or builds on: nothing can come between the check and what it is for.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persistence import record as rec
from persistence.arguments import check_text_or_none, refused
from persistence.commit import committed
from persistence.errors import Overtaken, SessionNotFound
from persistence.ids import check_session_id
from persistence.record import NEVER
from persistence.session import Changes, ClientInfo, Session, SessionDraft
from persistence.updates import (
    Change,
    Edit,
    Updates,
    drafted,
    ttl_change,
    whole_change,
)
from persistence.watching.stream import Permit, Watch
from persistence.watching.watching import MAX_PENDING

if TYPE_CHECKING:
    from persistence.requests import Request
    from persistence.residency import Residency
    from persistence.sealer import Sealer
    from persistence.security.tokens import Claims


def check_client(client: object) -> ClientInfo:
    """Return `client` if it is a `ClientInfo` of texts.

    Raises:
        InvalidArgument: it is something else.
    """
    if not isinstance(client, ClientInfo):
        raise refused("client", client, "a ClientInfo(ip=..., user_agent=...)")
    check_text_or_none("client.ip", client.ip)
    check_text_or_none("client.user_agent", client.user_agent)
    return client


@dataclass(frozen=True, slots=True)
class Sessions:
    """What access needs of the manager.

    Attributes:
        current: returns the tiers, when the manager is open and no checkpoint is being put in
            place.
        bring_here: lets what is here of a session be what the shared tier has.
        get_session: returns a view of a live session, and renews it.
        request: handles a request of the session that a function returns.
        resource: returns a live resource of a session if it is that incarnation.
        scratch_dir: returns the scratch directory of a session if it is that incarnation.
        watch: listens to a session as far as a permit lets it.
        plain_data: returns the fields of an object of the manager's schema, or of a mapping.
        plain_value: returns what is stored of a field's value, which may be an object.
    """

    current: Callable[[], Awaitable[tuple[Updates, Residency]]]
    bring_here: Callable[[str], Awaitable[None]]
    get_session: Callable[[str], Awaitable[Session | None]]
    request: Callable[
        [str, str, Callable[[str], Awaitable[Session | None]]],
        AbstractAsyncContextManager[Request, Any],
    ]
    resource: Callable[
        [str, str, Callable[[], Any], Callable[[Any], Any] | None, bytes], Awaitable[Any]
    ]
    scratch_dir: Callable[[str, bytes], Awaitable[Path]]
    watch: Callable[[str, int | None, int, Permit], Watch]
    plain_data: Callable[[str, object], Mapping[Any, Any]]
    plain_value: Callable[[str, str, Any], Any]


class Access:
    """Issues and validates tokens. Every method runs on the event loop.

    Args:
        sessions: the manager's.
        sealer: makes and reads tokens.
        default_ttl_seconds: of tokens; 0: as long as the session.
        wall: wall time, seconds.
        learn: looks for new keys.
    """

    def __init__(
        self,
        sessions: Sessions,
        sealer: Sealer,
        default_ttl_seconds: float,
        wall: Callable[[], float],
        learn: Callable[[], Awaitable[None]],
    ) -> None:
        from persistence.security import tokens  # noqa: PLC0415 - who has no tokens loads nothing

        self._tokens = tokens
        self._sessions = sessions
        self._sealer = sealer
        self._default_ttl_seconds = default_ttl_seconds
        self._wall = wall
        self._learn = learn

    def issue(
        self, session_id: str, record: bytes, client: ClientInfo, ttl_seconds: float | None
    ) -> str:
        """Return a token for the session that has this record."""
        now = self._wall()
        ttl = self._default_ttl_seconds if ttl_seconds is None else ttl_seconds
        claims = self._tokens.Claims(
            session_id,
            rec.incarnation_of(record),
            now,
            now + ttl if ttl else NEVER,
            self._tokens.fingerprint(client),
        )
        return self._tokens.issue(self._sealer, claims)

    async def claims_of(self, token: object, client: ClientInfo) -> Claims:
        """Return what a token says, once its session is known to live.

        Raises:
            TokenInvalid: it is not valid.
        """
        key_id = self._tokens.key_id_in(token)
        if key_id is not None and not self._sealer.knows(key_id):
            await self._learn()
        claims = self._tokens.read(self._sealer, token, client, self._wall())
        await self.check(claims)
        return claims

    async def check(self, claims: Claims) -> None:
        """See that a token has not expired, and that its session lives. Renews nothing.

        Raises:
            TokenInvalid: it is not valid any more.
        """
        session_id = claims.session_id
        key = check_session_id(session_id)
        _, residency = await self._sessions.current()
        await self._sessions.bring_here(session_id)
        base = await residency.acknowledged_base(session_id, key, access=False)
        if base is None or not self.opens(claims, base[0]):
            raise self._tokens.invalid()

    def opens(self, claims: Claims, record: bytes) -> bool:
        """Whether a token, unless it has expired, is for the session that has this record."""
        return rec.incarnation_of(record) == claims.incarnation and not self.is_over(claims)

    def is_over(self, claims: Claims) -> bool:
        """Whether a token has expired."""
        return self._wall() >= claims.expires

    async def open_session(
        self, session_id: str, token: object, client: ClientInfo
    ) -> SessionHandle:
        """Return what reaches one session only.

        Raises:
            TokenInvalid: the token is not valid, or another session's.
        """
        claims = await self.claims_of(token, client)
        if claims.session_id != session_id:
            raise self._tokens.invalid()
        return SessionHandle(self, self._sessions, claims)

    def refuse(self) -> Exception:
        """Return the error for whatever is wrong."""
        return self._tokens.invalid()


class SessionHandle:
    """One session, reached with a token: ``await state.open_session(session_id, token, client)``.

    It has no way to any other session. Each call raises `TokenInvalid` once the token has expired,
    or the session has ended, also when one with the same id was created since. Otherwise the
    methods do what those of the manager do, and raise the same.

    Attributes:
        id: of the session.
    """

    __slots__ = ("_access", "_claims", "_sessions", "id")

    def __init__(self, access: Access, sessions: Sessions, claims: Claims) -> None:
        self.id = claims.session_id
        self._access = access
        self._sessions = sessions
        self._claims = claims

    def __repr__(self) -> str:
        return f"SessionHandle({self.id!r})"

    async def get(self) -> Session:
        """Return the session as it is now; see `StateManager.get_session`."""
        await self._access.check(self._claims)
        session = await self._sessions.get_session(self.id)
        if session is None or not self._access.opens(self._claims, session._record):
            raise self._access.refuse()
        return session

    async def update(self, function: Callable[[SessionDraft], object]) -> Session:
        """Change it by a function over a draft; see `StateManager.update_session`."""
        return await self._apply(Change(lambda record: drafted(record, function)))

    async def update_data(self, field: str, value: Any) -> Session:
        """Set one field. If it is that already, there is no new version."""
        plain = self._sessions.plain_value(self.id, field, value)
        return await self.update(lambda data: data.update({field: plain}))

    async def replace(self, data: Mapping[str, Any], ttl_seconds: float | None = None) -> Session:
        """Replace all fields, and the TTL unless it is None; see `StateManager.replace_session`."""
        return await self._apply(
            whole_change(self._sessions.plain_data(self.id, data), ttl_seconds)
        )

    async def set_ttl(self, ttl_seconds: float) -> None:
        """Set the TTL, from now on; see `StateManager.set_ttl`."""
        await self._apply(ttl_change(ttl_seconds))

    @asynccontextmanager
    async def edit(self) -> AsyncIterator[SessionDraft]:
        """Edit it: all or nothing; see `StateManager.edit`."""
        await self._access.check(self._claims)
        editing = Edit(self._updates, self.id)
        try:
            async with editing as draft:
                self._check(editing.record)
                yield draft
        except SessionNotFound as error:
            raise self._ended(error) from None

    @asynccontextmanager
    async def request(self, name: str = "") -> AsyncIterator[Request]:
        """Handle one request of it: ``async with handle.request("GET /page") as r``.

        See `StateManager.request`.
        """

        async def get(_: str) -> Session:
            return await self.get()

        try:
            async with self._sessions.request(self.id, name, get) as request:
                yield request
        except SessionNotFound as error:
            raise self._ended(error) from None

    async def resources(
        self,
        name: str,
        factory: Callable[[], Any],
        close: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Return a live resource of it; see `StateManager.resources`."""
        await self._access.check(self._claims)
        try:
            return await self._sessions.resource(
                self.id, name, factory, close, self._claims.incarnation
            )
        except SessionNotFound as error:
            raise self._ended(error) from None

    async def scratch_dir(self) -> Path:
        """Return the path of its private directory; see `StateManager.scratch_dir`."""
        await self._access.check(self._claims)
        try:
            return await self._sessions.scratch_dir(self.id, self._claims.incarnation)
        except SessionNotFound as error:
            raise self._ended(error) from None

    def watch(self, *, after: int | None = None, max_pending: int = MAX_PENDING) -> Watch:
        """Listen to its changes: ``async for change in handle.watch()``; see `StateManager.watch`.

        Asking for a change, `Watch.waiting` too, raises `TokenInvalid` once the token has expired,
        and where the session had ended before. An end that it hears of is a change like others, and
        ends the stream. Of another session under the same id it hears nothing.
        """
        access, claims = self._access, self._claims
        permit = Permit(claims.incarnation, partial(access.is_over, claims), access.refuse)
        return self._sessions.watch(self.id, after, max_pending, permit)

    async def terminate(self) -> None:
        """End it; every token for it ends with it."""
        key = check_session_id(self.id)
        while True:
            await self._access.check(self._claims)
            _, residency = await self._sessions.current()
            try:
                self._check((await residency.base(self.id, key))[0])
            except SessionNotFound as error:
                raise self._ended(error) from None
            try:
                # Nothing has been awaited since it was looked at.
                await committed(residency.submit_delete(self.id, key))
            except Overtaken:
                continue  # it has ended, and perhaps begun anew, elsewhere
            return

    async def _updates(self) -> Updates:
        return (await self._sessions.current())[0]

    def _check(self, record: bytes) -> None:
        if not self._access.opens(self._claims, record):
            raise self._access.refuse()

    async def _apply(self, change: Change) -> Session:
        """Apply a change to the versions of this very session only."""
        await self._access.check(self._claims)

        def checked(record: bytes) -> Changes | None:
            self._check(record)
            return change.data(record)

        updates, _ = await self._sessions.current()
        try:
            return await updates.apply(self.id, replace(change, data=checked))
        except SessionNotFound as error:
            raise self._ended(error) from None

    def _ended(self, error: SessionNotFound) -> Exception:
        """Return what to raise instead of `error`, unless the caller's own code raised it."""
        return self._access.refuse() if error.session_id == self.id else error
