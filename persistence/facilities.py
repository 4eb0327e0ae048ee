"""What an application needs of sessions beside storing them: the methods of `StateManager` for it.

Requests (`requests`), live resources (`resources`), scratch directories (`scratch`), typed data
(`typed`), and numbers about the sessions (`census`). Each is a room of its own that knows nothing
of the others; this puts them together for one manager.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from persistence import record as rec
from persistence.arguments import check_mapping, check_text, refused
from persistence.census import Census
from persistence.clock import Clock, EngineTime
from persistence.config import StateConfig
from persistence.disk.files import Files
from persistence.disk.tier import DiskTier
from persistence.errors import (
    CorruptionError,
    InvalidArgument,
    SessionNotFound,
)
from persistence.ids import plain_id
from persistence.lifecycle import Lifecycle
from persistence.memory.tier import MemoryTier
from persistence.observe.health import SessionHealth
from persistence.observe.metrics import RequestMetrics
from persistence.requests import Request, Requests
from persistence.residency import Residency
from persistence.resources import Resources
from persistence.rotation import Rotations
from persistence.scratch import Scratch
from persistence.session import Session, SessionDraft
from persistence.shutdown import Grace
from persistence.updates import Edit, Updates

if TYPE_CHECKING:
    from persistence.typed import Schema

_STORE_SHARE: Final = 0.5  # of what is left of a shutdown's time
_RESOURCES_SHARE: Final = 0.5


class Facilities(Lifecycle):
    """The part of `StateManager` that is not about storing.

    Args:
        config: the configuration.
        clock: time.
        files: system calls on files; None: the system's.
        schema: what sessions are to the application; see `typed`.
    """

    # Of the manager; called here.
    get_session: Callable[..., Awaitable[Session | None]]
    has_session: Callable[[str], Awaitable[bool]]
    update_session: Callable[..., Awaitable[Session]]
    edit: Callable[[str], Edit]
    _residency: Residency
    _memory: MemoryTier
    _disk: DiskTier
    _updates: Updates
    _time: EngineTime
    _rotations: Rotations

    def _make_facilities(
        self, config: StateConfig, clock: Clock, files: Files | None, schema: object
    ) -> None:
        self._schema = None if schema is None else _schema_of(schema)
        self._facility_clock = clock
        self._facility_files = files or Files()
        self._requests = Requests(
            config.session,
            clock,
            self.get_session,
            self._is_here,
            gathers=config.disk.fsync == "always" or config.redis.url is not None,
        )
        self._resources = Resources(
            self._incarnation_of, self._has_running, self._is_resident, self._watch_leaving
        )
        self._requests.on_idle = self._resources.idle
        self._scratch: Scratch | None = None
        self._census: Census

    def _attach_facilities(self) -> None:
        """Work on the tiers as they are now."""
        self._requests.attach(self._updates, self._residency, self._time)
        self._census = Census(
            self._memory, self._disk, self._residency, self._facility_clock, self._time
        )
        self._residency.on_end = self._session_ended
        self._watch_leaving(len(self._resources) > 0)

    async def _open_facilities(self, *, sync: bool) -> None:
        """Find the scratch directories, and remove those whose sessions are gone."""
        self._scratch = Scratch(self._disk, self._facility_files, sync=sync)
        self._rotations.follow = self._session_goes_on
        self._rotations.turn_back = self._session_stays
        await self._scratch.open(self._living_incarnation)

    async def _replaced_all(self) -> None:
        """All sessions are other ones now: a checkpoint was restored."""
        self._resources.release_all()
        if self._scratch is not None:
            await self._scratch.keep_only(self._living_incarnation)

    async def _finish_facilities(self, grace: Grace) -> None:
        """Store the requests and close the resources, as far as there is time for it."""
        if self._requests.entries:
            await grace.spend(self._requests.close(), "the requests of sessions", _STORE_SHARE)
        if self._resources.has_any:
            await grace.spend(self._resources.close(), "the sessions' resources", _RESOURCES_SHARE)

    async def _close_facilities(self, grace: Grace) -> None:
        """Remove the scratch directories that are left over, as far as there is time for it."""
        if self._scratch is not None:
            if self._scratch.is_busy:
                await grace.spend(self._scratch.settled(), "scratch directories to be removed")
            await self._scratch.close()

    # --- what the rooms ask and are told ------------------------------------------------------

    async def _is_here(self, session_id: str) -> bool:
        return await self.has_session(session_id)

    async def _incarnation_of(self, session_id: str) -> bytes:
        session = await self.get_session(session_id)
        if session is None:
            raise SessionNotFound(session_id)
        return rec.incarnation_of(session._record)

    async def _living_incarnation(self, session_id: str) -> bytes | None:
        """Return the incarnation of a live session without accessing it; None: there is none."""
        key = session_id.encode()
        if not self._residency.is_acknowledged(session_id, key):
            return None
        try:
            record = await self._residency.peek(session_id, key)
        except CorruptionError:
            return None
        return None if record is None else rec.incarnation_of(record)

    def _has_running(self, session_id: str) -> bool:
        entry = self._requests.entries.get(session_id)
        return entry is not None and entry.running > 0

    def _is_resident(self, session_id: str) -> bool:
        return session_id in self._memory

    def _watch_leaving(self, has_resources: bool) -> None:
        self._residency.on_leave = self._resources.left if has_resources else None

    async def _session_goes_on(self, old_id: str, new_id: str, incarnation: bytes) -> None:
        """A session is about to go on under another id, with all that is said of it here."""
        if self._scratch is not None:
            await self._scratch.follow(old_id, new_id, incarnation)
        self._requests.follow(old_id, new_id, incarnation)

    def _session_stays(self, old_id: str, new_id: str, incarnation: bytes) -> None:
        self._requests.turn_back(old_id)
        if self._scratch is not None:
            self._scratch.turn_back(old_id, new_id, incarnation)

    def _session_ended(self, session_id: str) -> None:
        self._requests.ended(session_id)
        self._resources.release(session_id)
        if self._scratch is not None:
            self._scratch.ended(session_id)

    # --- requests -----------------------------------------------------------------------------

    def request(self, session_id: str, name: str = "") -> Request:
        """Handle one request of a session: ``async with state.request(sid, "GET /page") as r``.

        Entering accesses the session (which renews it) and charges its request limit; the session
        is in ``r.session``. Leaving counts and times the request; an exception counts as its
        error (a cancellation does not), and goes on. ``r.failed(...)`` counts one that nobody
        raises.

        Args:
            session_id: whose.
            name: what it is, for `session_metrics`; a URL, say. 200 characters of it are kept.

        Raises (on entering):
            RequestLimitReached: its ``max_requests`` are used up; it was not counted.
            SessionNotFound: missing, expired or terminated.
            DiskFull, WriteOutcomeUnknown, RemoteUnavailable: the limit cannot be charged.
        """
        if type(name) is not str:
            check_text("name", name)
        return Request(self._requests, plain_id(session_id), name)

    def _request(
        self, session_id: str, name: str, get: Callable[[str], Awaitable[Session | None]]
    ) -> Request:
        """Do what `request` says, of the session that `get` returns."""
        return Request(self._requests, session_id, check_text("name", name), get)

    async def record_request(
        self,
        session_id: str,
        name: str = "",
        seconds: float = 0.0,
        *,
        error: BaseException | str | None = None,
    ) -> None:
        """Count a request that the caller has timed: what `request` does, for those without it.

        Args:
            session_id: whose.
            name: what it was.
            seconds: what it took.
            error: why it failed; None: it did not.

        Raises:
            RequestLimitReached, SessionNotFound, …: as `request` on entering; it was not counted.
            InvalidArgument: `seconds` is no duration.
        """
        await self._requests.record(plain_id(session_id), name, seconds, error)

    async def record_error(self, session_id: str, error: BaseException | str) -> None:
        """Count an error of a session that belongs to no request, or to one counted already.

        Raises:
            SessionNotFound: missing, expired or terminated.
        """
        await self._requests.record_error(plain_id(session_id), error)

    async def is_request_limit_reached(self, session_id: str) -> bool:
        """Whether the next request would raise RequestLimitReached. Renews nothing.

        Raises:
            SessionNotFound: missing, expired or terminated.
        """
        return await self._requests.is_limit_reached(plain_id(session_id))

    async def session_metrics(self, session_id: str) -> RequestMetrics:
        """Return what is known of the requests of a session. Renews nothing.

        Those of other workers are in it as far as they have stored theirs, which takes half a
        minute or so.

        Raises:
            SessionNotFound: missing, expired or terminated.
        """
        return await self._requests.metrics(plain_id(session_id))

    async def session_health(self, session_id: str) -> SessionHealth:
        """Return how a session is doing: size, tier, age, rates, and a score from 0 to 1.

        Renews nothing. ``docs/applications.md`` says what the score is made of.

        Raises:
            SessionNotFound: missing, expired or terminated.
        """
        return await self._requests.health(plain_id(session_id))

    # --- what cannot be stored ----------------------------------------------------------------

    async def resources(
        self,
        session_id: str,
        name: str,
        factory: Callable[[], Any],
        close: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Return a live resource of a session, making it if this worker has none.

        It is made once, however many ask at the same time, and closed when the session ends,
        leaves memory (unless a request of it is under way) or at shutdown; the next access makes
        another one. Accesses the session.

        Args:
            session_id: whose. No other session gets it.
            name: which one of the session's.
            factory: makes it, without arguments; may be asynchronous.
            close: gets it in the end; may be asynchronous. One that raises is logged; one that
                takes more than 10 seconds is logged and given up.

        Raises:
            SessionNotFound: missing, expired or terminated, also while it was being made.
            ManagerClosed: the manager closes.
            ConflictError: `factory` asks for what waits for it, this resource first of all, or
                writes to a session whose edit the caller holds.
            InvalidArgument: something that `factory` awaited was cancelled.
            Exception: whatever `factory` raises.
        """
        return await self._resource(plain_id(session_id), name, factory, close)

    async def _resource(
        self,
        session_id: str,
        name: str,
        factory: Callable[[], Any],
        close: Callable[[Any], Any] | None,
        only: bytes | None = None,
    ) -> Any:
        """Do what `resources` says, if the session is incarnation `only`, or that is None."""
        check_text("name", name)
        if not callable(factory):
            raise refused("factory", factory, "a function that makes the resource")
        if close is not None and not callable(close):
            raise refused("close", close, "a function that closes the resource, or None")
        return await self._resources.get(session_id, name, factory, close, only)

    async def scratch_dir(self, session_id: str) -> Path:
        """Return the path of a private directory of a session, which exists.

        It has a random name and mode 0700, is this worker's (others have their own for the same
        session), survives spilling, restarts and `rotate_session_id`, and is removed with the
        session. Accesses the session.

        Raises:
            SessionNotFound: missing, expired or terminated.
            DiskFull, WriteOutcomeUnknown: it cannot be made.
            DirectoryNotUsable: something is in its way.
        """
        return await self._scratch_dir(plain_id(session_id))

    async def _scratch_dir(self, session_id: str, only: bytes | None = None) -> Path:
        """Do what `scratch_dir` says, if the session is incarnation `only`, or that is None."""
        incarnation = await self._incarnation_of(session_id)
        if only is not None and incarnation != only:
            raise SessionNotFound(session_id)
        await self._ready()
        assert self._scratch is not None, "open"
        return Path(await self._scratch.get(session_id, incarnation))

    # --- typed --------------------------------------------------------------------------------

    def typed(self, session: Session) -> Any:
        """Return a session as the object that the manager's schema says.

        With a schema of single fields: a dict of all fields, those of the schema as objects.

        Raises:
            SchemaMismatch: a stored field is of another type; the message names both.
            InvalidArgument: the manager has no schema.
        """
        schema = self._get_schema()
        data = {name: session[name] for name in schema.names(list(session))}
        return schema.load(session.id, data).value

    async def get_typed(self, session_id: str, *, fresh: bool = False) -> Any:
        """Return what `typed` makes of `get_session`; None: missing, expired or terminated.

        Raises:
            SchemaMismatch: a stored field is of another type; the message names both.
            InvalidArgument: the manager has no schema.
        """
        self._get_schema()
        session = await self.get_session(session_id, fresh=fresh)
        return None if session is None else self.typed(session)

    async def update_typed(self, session_id: str, function: Callable[[Any], Any]) -> Session:
        """Call `function` with the session's object and commit what it changed.

        As `update_session`, which ignores what the function returns; but an object of the schema's
        class, if that is one for all fields, is stored instead.

        Raises:
            SchemaMismatch: a field is of another type, as it is stored or as it was to be written;
                nothing was written.
            InvalidArgument: the manager has no schema.
            SessionNotFound, …: as `update_session`.
        """
        return await self.update_session(session_id, self._typed_change(session_id, function))

    def _typed_change(
        self, session_id: str, function: Callable[[Any], Any]
    ) -> Callable[[SessionDraft], Any]:
        """Return the function that does to a draft what `function` does to an object."""
        schema = self._get_schema()
        if not callable(function):
            raise refused("function", function, "a function that takes the object and changes it")

        def change(draft: SessionDraft) -> Any:
            return schema.open(session_id, draft).apply(function)

        return change

    def edit_typed(self, session_id: str) -> AbstractAsyncContextManager[Any]:
        """Edit a session as an object: ``async with state.edit_typed(sid) as cart``.

        As `edit`: leaving the block commits what was changed, also inside the object.

        Raises:
            SchemaMismatch: a field is of another type, as it is stored or as it was to be written;
                nothing was written.
            InvalidArgument: the manager has no schema.
            SessionNotFound, …: as `edit`.
        """
        schema = self._get_schema()
        return _edit_typed(self.edit(session_id), session_id, schema)

    def _get_schema(self) -> Schema:
        if self._schema is None:
            raise InvalidArgument(
                "this manager has no schema: StateManager(..., schema=YourClass) gives it one"
            )
        return self._schema

    def _plain_data(self, session_id: str, data: object) -> Mapping[Any, Any]:
        """Return the fields that a caller's data for a session stand for."""
        if self._schema is not None:
            return self._schema.plain_data(session_id, data)
        return check_mapping("data", data)

    def _plain_value(self, session_id: str, field: str, value: Any) -> Any:
        """Return the value that a caller's value for a field stands for."""
        if self._schema is None:
            return value
        return self._schema.plain_value(session_id, field, value)


@asynccontextmanager
async def _edit_typed(edit: Edit, session_id: str, schema: Schema) -> AsyncIterator[Any]:
    async with edit as draft:
        opened = schema.open(session_id, draft)
        yield opened.value
        opened.write()


def _schema_of(given: object) -> Schema:
    from persistence.typed import Schema  # noqa: PLC0415 - for those who have one

    return Schema(given)
