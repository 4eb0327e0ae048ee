"""`StateManager`: decides, delegates, and is the only module that knows all tiers."""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from threading import get_ident
from types import TracebackType
from typing import Any, Final, Self

from persistence import record as rec
from persistence.access import Access, SessionHandle, check_client
from persistence.arguments import (
    check_count_or_none,
    check_duration,
    check_switch_or_none,
    check_text,
    check_text_or_none,
    check_ttl,
    check_utf8,
    refused,
)
from persistence.checkpoint.catalogue import CheckpointInfo
from persistence.checkpoint.create import OnProgress
from persistence.checkpoint.restore import RestoredInfo, StagedRestore
from persistence.clock import Clock, SystemClock
from persistence.commit import Commit, committed
from persistence.config import RedisConfig, StateConfig
from persistence.disk.files import Files
from persistence.disk.format import Frame
from persistence.disk.threads import undisturbed
from persistence.errors import (
    ConfigError,
    ConflictError,
    DiskFull,
    InvalidArgument,
    ManagerClosed,
    Overtaken,
    PersistenceError,
    SessionExists,
    SessionLimitReached,
    SessionNotFound,
    WrongEventLoop,
)
from persistence.expiry import life_of
from persistence.facilities import Facilities
from persistence.ids import CommitIds, check_session_id, new_session_id
from persistence.memory.budget import SHRINK_ABOVE, MemoryReader, effective_budget_bytes
from persistence.record import NEVER, RENEWS
from persistence.residency import Residency
from persistence.rotation import Tiers as Rotating
from persistence.session import (
    MAX_REQUESTS,
    USER_ID,
    Changes,
    ClientInfo,
    Data,
    Session,
    SessionDraft,
    SessionMetadata,
    check_metadata,
)
from persistence.sharing.sharing import Sharing
from persistence.shutdown import Grace
from persistence.stats import Latencies, Stats
from persistence.tiers import Tiers
from persistence.updates import (
    Change,
    Edit,
    Updates,
    packed_data,
    ttl_change,
    whole_change,
)
from persistence.watching.stream import Watch
from persistence.watching.watching import MAX_PENDING, Watching

_log = logging.getLogger("persistence")

_EDITS_SHARE: Final = 0.5  # of what is left of a shutdown's time
_LIMIT_CLEANUP_SECONDS: Final = 1.0  # at the limit, look for expired sessions this often
_open_managers: weakref.WeakSet[StateManager] = weakref.WeakSet()


class StateManager(Facilities):
    """Keeps sessions: hot ones in memory, every update in a crash-safe log, cold ones on disk.

    ::

        async with StateManager(config=StateConfig.load("config/worker.toml")) as state:
            sid = await state.create_session(user_id="ada", data={"cart": {"items": []}})
            await state.update_session(sid, lambda data: data["cart"]["items"].append(1))
            session = await state.get_session(sid)

    All methods are coroutines of the event loop that opened the manager. What an awaited update
    survives is fixed by ``disk.fsync`` (see `commit`). A cancelled call only stops waiting: an
    update that was submitted is decided all the same.

    Args:
        url: URL of the shared tier (see ``docs/redis.md``); it overrides ``redis.url``.
        config: the configuration; default: all defaults. No environment is read.
        clock: where time comes from; default: the machine's clocks.
        files: system calls on files; default: the system's. A seam for fault injection.
        schema: what sessions are to the application: a msgspec Struct, a dataclass or a pydantic
            model for all fields, or a mapping of field names to types. `create_session` and its kin
            take such objects then, and `get_typed` and its kin return them.

    Raises:
        ConfigError: the URL is wrong.
        InvalidArgument: an argument is something else than it must be.
    """

    def __init__(
        self,
        url: str | None = None,
        config: StateConfig | None = None,
        *,
        clock: Clock | None = None,
        files: Files | None = None,
        schema: object = None,
    ) -> None:
        _check_arguments(url, config, clock)
        self.config = StateConfig() if config is None else config
        if url:
            redis = RedisConfig(**{**self.config.redis.model_dump(), "url": url})
            self.config = self.config.model_copy(update={"redis": redis})
        self._clock: Clock = clock or SystemClock()
        self._watching = Watching(self._brought)
        self._tiers = Tiers(self.config, self._clock, files, self._check_open, self._watching)
        self._misses = 0
        self._rss_bytes = 0
        self._memory_reader = MemoryReader()
        self._background: list[asyncio.Task[None]] = []
        self._is_open = False
        self._gate: asyncio.Event | None = None
        self._commit_ids = CommitIds()
        self._grace = Grace(self.config.shutdown.grace_seconds, self._clock)
        self._closing: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop
        self._thread = 0
        self._no_limit_cleanup_before = -NEVER
        self._why_closed = "the manager is not open; use it with 'async with' or await open()"
        self._sharing: Sharing | None = None
        self._access: Access | None = None
        self._resident: Callable[[str], Session | None] = self._refuse
        self._restore_now: Callable[[str], Session | None] = self._refuse
        self._make_facilities(self.config, self._clock, files, schema)

    # --- opening and closing ------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Lock and recover the directory and start the background work.

        Raises:
            DirectoryLocked: another process or manager holds the directory.
            DirectoryNotUsable: newer format, foreign, damaged, read-only, not a directory.
            DiskFull: there is no space to create or repair it.
            ConfigError: the shared tier can never work like this.
            RemoteUnavailable: it is away, and ``redis.on_outage`` is ``"fail"``.
            ManagerClosed: it was opened before.
        """
        if self._is_open or self._closing is not None:
            raise ManagerClosed("a manager is opened once; make another one")
        await self._tiers.open()
        self._rotations = self._tiers.rotations
        try:
            self._take_tiers()
            await self._open_facilities(sync=self.config.disk.fsync == "always")
        except BaseException:
            await self._tiers.close()
            raise
        self._tiers.before_settling = self._requests.store_all
        self._start_background()
        self._keeper.start()
        self._loop = asyncio.get_running_loop()
        self._thread = get_ident()
        self._is_open = True
        self._let_in()
        _open_managers.add(self)
        await self._rotations.settle(self._living_or_none, self.terminate_session)

    def _take_tiers(self) -> None:
        """Work with the tiers as they are now."""
        tiers = self._tiers
        self._time, self._disk, self._keeper = tiers.time, tiers.disk, tiers.keeper
        self._memory, self._residency = tiers.memory, tiers.residency
        self._commits, self._updates = tiers.commits, tiers.updates
        self._listing, self._sharing = tiers.listing, tiers.sharing
        self._attach_facilities()

    def _let_in(self) -> None:
        """Open the short ways to sessions that are here."""
        self._resident = self._memory.access
        self._restore_now = self._residency.restore_now
        if self._sharing is not None:
            self._resident = partial(_if_current, self._sharing, self._memory.access)
            self._restore_now = partial(_if_current, self._sharing, self._residency.restore_now)

    def _keep_out(self) -> None:
        """Close the short ways: who comes now waits in `_ready`."""
        self._resident = self._restore_now = _not_here

    def _start_background(self) -> None:
        every: list[tuple[str, Callable[[], Awaitable[None]]]] = [
            ("renewals", self._sweep),
            ("requests", self._requests.store_due),
        ]
        if self.config.session.cleanup_interval_seconds:
            every.append(("cleanup", self._clean_up))
        if self.config.memory.check_interval_seconds:
            every.append(("memory", self._watch_memory))
        self._background = [
            asyncio.create_task(_forever(name, step), name=f"persistence-{name}")
            for name, step in every
        ]

    async def close(self, *, grace_seconds: float | None = None) -> None:
        """Refuse new work, let running edits finish, sync, deliver, seal.

        What may take long (running edits, the shared tier) has ``shutdown.grace_seconds``; what is
        acknowledged is in the log in any case. Idempotent; concurrent calls wait for the same end,
        and cancelling one does not cut the closing short.

        Args:
            grace_seconds: at most so many seconds instead, also for a close that is under way;
                0: at once.

        Raises:
            InvalidArgument: `grace_seconds` is no duration; it goes on as it was.
        """
        if grace_seconds is not None:
            check_duration("grace_seconds", grace_seconds)
        if self._closing is None:
            if not self._is_open:
                return
            self._check_open()  # of this event loop
            self._closing = asyncio.create_task(self._close(), name="persistence-close")
        if grace_seconds is not None:
            self._grace.limit(grace_seconds)
        await asyncio.shield(self._closing)

    def start_grace(self) -> None:
        """Let the grace period of the close that will follow begin now, and end all watches."""
        self._grace.begin()
        self._watching.close()

    async def _close(self) -> None:
        self._grace.begin()
        self._is_open = False
        self._why_closed = "the manager is closed"
        self._resident = self._refuse
        self._restore_now = self._refuse
        _open_managers.discard(self)
        # First of all: what is open may be what keeps its readers from ending, and so a server.
        await self._watching.closed()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._grace.spend(self._updates.locks.all_free(), "running edits", _EDITS_SHARE)
        await self._finish_facilities(self._grace)
        await self._rotations.close()
        try:
            await self._tiers.finish(self._grace)
        finally:
            await self._close_facilities()
            await self._tiers.close()
            await self._requests.gone()

    def _refuse(self, session_id: object = None) -> Any:
        raise ManagerClosed(self._why_closed)

    def _check_open(self) -> None:
        if not self._is_open:
            self._refuse()
        # Not get_running_loop(): on some Pythons that asks the system for the process each time.
        if get_ident() != self._thread or not self._loop.is_running():
            raise WrongEventLoop(
                "this manager was opened in another event loop: use persistence.sync.StateManager, "
                "which any thread can use, or hand the call to that loop "
                "(asyncio.run_coroutine_threadsafe), or open one of your own with its own disk.path"
            )

    async def _ready(self) -> None:
        """Raise ManagerClosed if it is closed; wait while a checkpoint is being put in place."""
        self._check_open()
        while self._gate is not None:
            await self._gate.wait()
            self._check_open()

    async def _current_updates(self) -> Updates:
        await self._ready()
        return self._updates

    def _forked(self) -> None:
        """In the child of a fork: this manager belongs to the parent."""
        self._is_open = False
        self._resident = self._refuse
        self._why_closed = (
            "this manager was opened by another process; after a fork, open one of your own "
            "with its own disk.path"
        )
        self._disk.abandon()

    # --- creating -----------------------------------------------------------------------------

    async def create_session(
        self,
        user_id: str | None = None,
        metadata: SessionMetadata | None = None,
        ttl_seconds: float | None = None,
        data: Data | None = None,
        session_id: str | None = None,
        *,
        max_requests: int | None = None,
        auto_renew: bool | None = None,
    ) -> str:
        """Create a session; return its id once that is as durable as ``disk.fsync`` says.

        Args:
            user_id: whose it is.
            metadata: about the client.
            ttl_seconds: None: the configured TTL; 0: never expires.
            data: the first fields; with a schema, an object of it will do.
            session_id: default: a fresh random one of 128 bits.
            max_requests: its own request limit; None: the configured one.
            auto_renew: whether an access moves the deadline; None: as configured.

        Raises:
            SessionExists: the id belongs to a live session, which is left unchanged.
            SessionLimitReached: ``session.max_sessions`` are alive.
            InvalidArgument, InvalidSessionId, ValueNotSerializable, ValueTooLarge: nothing was
            written.
            DiskFull, WriteOutcomeUnknown: see `commit`.
        """
        commit = await self._create(
            session_id,
            user_id,
            metadata,
            ttl_seconds,
            data,
            max_requests=max_requests,
            auto_renew=auto_renew,
        )
        return commit.session_id

    async def _create(
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
        """Do what `create_session` says; return the acknowledged commit."""
        await self._ready()
        if session_id is None:
            session_id = new_session_id()
        key = check_session_id(session_id)
        meta = _packed_meta(user_id, metadata, max_requests)
        fields = packed_data({} if data is None else self._plain_data(data))
        ttl = self.config.session.ttl_seconds if ttl_seconds is None else check_ttl(ttl_seconds)
        check_switch_or_none("auto_renew", auto_renew)
        renews = self.config.session.auto_renew if auto_renew is None else auto_renew
        if self._residency.has_copy(session_id):
            await self._bring_here(session_id)  # it may have ended elsewhere
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
        self._census.last_created = session_id
        return commit

    async def _check_session_limit(self) -> None:
        """Make room among the sessions if there is none; not each time, for it looks at all."""
        limit = self.config.session.max_sessions
        if not limit or self._session_count() < limit:
            return
        if self._time.now() >= self._no_limit_cleanup_before:
            self._no_limit_cleanup_before = self._time.now() + _LIMIT_CLEANUP_SECONDS
            if await self._listing.remove_expired():
                self._no_limit_cleanup_before = -NEVER
        self._refuse_over_limit()

    def _refuse_over_limit(self) -> None:
        """Raise SessionLimitReached if there is no room for one more. Never awaits."""
        limit = self.config.session.max_sessions
        if limit and self._session_count() >= limit:
            raise SessionLimitReached(
                f"{limit} sessions are alive, which is session.max_sessions; "
                "terminate some or raise the limit"
            )

    def _session_count(self) -> int:
        return len(self._disk.index) + len(self._residency.unlisted) + self._commits.creating

    async def get_or_create_session(
        self, /, session_id: str | None = None, **create: Any
    ) -> Session:
        """Return the live session `session_id`, creating it under that very id if it is missing.

        Args:
            session_id: None: create one with a fresh id.
            create: what `create_session` takes, for the case that it is created.
        """
        while True:
            if session_id is not None:
                session = await self.get_session(session_id)
                if session is not None:
                    return session
            try:
                created = await self._create(session_id, **create)
            except SessionExists:
                # Somebody else is creating it: readers see it once that is decided.
                assert session_id is not None, "a fresh id exists nowhere"
                await self._commits.decided(session_id)
                continue
            # Not read again: its time may be over already, however short that is.
            return self._updates.view(created)

    # --- reading ------------------------------------------------------------------------------

    async def get_session(
        self, session_id: str, *, fresh: bool = False, renew: bool = True
    ) -> Session | None:
        """Return a view of a live session, or None: missing, expired or terminated.

        Renews the TTL if the session renews. A cold session comes back into memory.

        Args:
            session_id: which one.
            fresh: ask the shared tier, if there is one.
            renew: False: look at it without counting that as an access.

        Raises:
            InvalidSessionId: not a non-empty string of at most 512 bytes of UTF-8.
            CorruptionError: its stored bytes are damaged; they are never returned.
            WrongEventLoop: called in another thread than the one that opened the manager.
        """
        # Costs a read one part in twenty; but a read moves the session in the tables of the memory
        # tier, and an update that is being acknowledged meanwhile would find it in no place.
        if get_ident() != self._thread:
            self._check_open()
        if fresh:
            await self._ready()
            check_session_id(session_id)
            await self._bring_here(session_id, fresh=True)
        if not renew:
            return await self._peek(session_id)
        try:
            session = self._resident(session_id)
            if session is None:
                session = self._restore_now(session_id)
        except TypeError:  # not hashable, so no session id: _get_cold says it better
            session = None
        if session is not None:
            return session
        return await self._get_cold(session_id)

    async def _get_cold(self, session_id: str) -> Session | None:
        await self._ready()
        key = check_session_id(session_id)
        await self._bring_here(session_id)
        base = await self._residency.acknowledged_base(session_id, key)
        if base is None:
            self._misses += 1
            return None
        session = self._memory.access(session_id)
        if session is not None:
            self._memory.hits -= 1  # it was not
            return session
        return self._updates.access_uncached(session_id, key, base)

    async def _peek(self, session_id: str) -> Session | None:
        """Return a view, neither counting that as an access nor restoring a cold session."""
        await self._ready()
        key = check_session_id(session_id)
        if not await self.has_session(session_id):
            return None  # it has been brought here, if it lives elsewhere
        record = await self._residency.peek(session_id, key)
        if record is None:
            return None
        if session_id in self._memory:
            accessed, life = self._memory.times(session_id)
            cap = self._memory.cap(session_id)
        else:
            row = self._disk.index.get(self._disk.fingerprint(key))
            if row is None:
                return None
            ttl_seconds, flags = rec.ttl_and_flags_of(record)
            accessed, cap = row.accessed, row.cap
            life = life_of(ttl_seconds, flags & RENEWS, row.deadline)
        return Session.view(session_id, record, accessed, life, cap, self._time)

    async def has_session(self, session_id: str) -> bool:
        """Whether the session is alive. Renews nothing and reads nothing from disk."""
        await self._ready()
        key = check_session_id(session_id)
        await self._bring_here(session_id)
        deadline = self._residency.acknowledged_deadline(session_id, key)
        if deadline is None:
            return False
        if deadline > self._time.now():
            return True
        # Who is told that it is over must not see it come back.
        return not await self._residency.expire(session_id, key)

    async def _bring_here(self, session_id: str, *, fresh: bool = False) -> None:
        """Let what is here of a session be what the shared tier has, if there is one."""
        while self._sharing is not None:
            try:
                await self._sharing.current(session_id, fresh=fresh)
                break
            except ConflictError:  # a checkpoint is being put in place: ask again behind it
                await self._ready()

    async def _brought(self, session_id: str) -> None:
        await self._ready()
        await self._bring_here(session_id)

    # --- watching -----------------------------------------------------------------------------

    def watch(
        self,
        session_id: str | None = None,
        *,
        after: int | None = None,
        max_pending: int = MAX_PENDING,
    ) -> Watch:
        """Listen to changes, from now on: ``async for change in state.watch(sid)``.

        Of a session, its versions come in order, each once and those of other workers included;
        what a slow reader or an outage leaves out is counted in the next change. The stream ends
        behind the change that ends the session, and when the manager closes. Watching renews
        nothing. See ``docs/watching.md``.

        Args:
            session_id: which session; None: all of them. Of what other workers do to those, only
                the version is told, and what an outage leaves out is told as a ``gap``.
            after: the version that was seen last: if there is another one by now, that comes first.
            max_pending: changes that wait for the reader at most; then they are merged.

        Raises:
            InvalidArgument, InvalidSessionId: an argument is something else than it must be.
            ManagerClosed: it is not open, or closing.
        Raises (when the first change is asked for):
            SessionNotFound: missing, expired or terminated.
            CorruptionError: its stored bytes are damaged.
        """
        self._check_open()
        return self._watching.watch(session_id, after, max_pending)

    # --- updating -----------------------------------------------------------------------------

    async def update_session_data(self, session_id: str, field: str, value: Any) -> Session:
        """Set one field; return the new version once it is durable.

        Raises:
            SessionNotFound: missing, expired or terminated.
            ValueNotSerializable, ValueTooLarge: nothing was written.
            ConflictError: this task holds the session's edit.
            DiskFull, WriteOutcomeUnknown: see `commit`.
        """
        await self._ready()
        packed = rec.pack_value(self._plain_value(value), rec.check_field_name(field))

        def change(record: bytes) -> Changes:
            if field in rec.field_names(record):
                return Changes({field: packed})
            return Changes({}, {**rec.packed_fields(record), field: packed})

        return await self._updates.apply(session_id, Change(change))

    async def update_session(
        self, session_id: str, function: Callable[[SessionDraft], object]
    ) -> Session:
        """Call `function` with a mutable draft of the data, and commit what it changed.

        `function` is synchronous and its result is ignored (one that has to be awaited is refused:
        that is what `edit` is for); it may be called again when another
        worker's commit came first. If it raises, nothing is written. If it changes nothing, there
        is no new version.

        Raises:
            SessionNotFound, ValueNotSerializable, ValueTooLarge, ConflictError, DiskFull,
            WriteOutcomeUnknown: as `update_session_data`.
        """
        self._check_open()
        if not callable(function):
            raise refused("function", function, "a function that takes the draft and changes it")
        if self._gate is not None:
            await self._ready()
        updates = self._updates
        made = updates.made_now(session_id, function)
        if not isinstance(made, Commit):
            if made is None:
                return await updates.by_function(session_id, function)
            return await updates.unchanged(session_id, check_session_id(session_id), made)
        assert made.done is not None, "submitted to be waited for"
        try:
            await made.done
        except Overtaken:
            return await updates.by_function(session_id, function)
        return updates.view(made)

    async def replace_session(
        self, session_id: str, data: Data, ttl_seconds: float | None = None
    ) -> Session:
        """Replace all fields, and the TTL unless it is None, at once.

        With a schema, an object of it will do for `data`.

        Raises:
            SessionNotFound, ValueNotSerializable, ValueTooLarge, ConflictError, DiskFull,
            WriteOutcomeUnknown: as `update_session_data`.
        """
        await self._ready()
        return await self._updates.apply(
            session_id, whole_change(self._plain_data(data), ttl_seconds)
        )

    async def update_session_metadata(self, /, session_id: str, **changes: Any) -> Session:
        """Change metadata: `client_ip`, `user_agent`, `source`, `attributes`.

        If it changes nothing, there is no new version.

        Raises:
            TypeError: a name that is no metadata.
            InvalidArgument: a value of a wrong type.
            SessionNotFound, ValueNotSerializable, ValueTooLarge, ConflictError, DiskFull,
            WriteOutcomeUnknown: as `update_session_data`.
        """
        await self._ready()
        check_metadata(**changes)

        def change_meta(record: bytes) -> bytes:
            return rec.pack_meta({**rec.meta_of(record), **changes})

        def no_data(record: bytes) -> Changes | None:
            is_same = change_meta(record) == rec.packed_meta(record)
            return None if is_same else Changes({})

        return await self._updates.apply(session_id, Change(no_data, change_meta))

    async def set_ttl(self, session_id: str, ttl_seconds: float) -> bool:
        """Set a session's TTL, from now on; the data and the version stay as they are.

        Returns:
            False if the session is not there.

        Raises:
            ConflictError: this task holds the session's edit.
            DiskFull, WriteOutcomeUnknown: see `commit`.
        """
        await self._ready()
        change = ttl_change(ttl_seconds)
        try:
            await self._updates.apply(session_id, change)
        except SessionNotFound:
            return False
        return True

    def edit(self, session_id: str) -> Edit:
        """Edit a session: ``async with state.edit(sid) as draft``. All or nothing.

        One editor at a time per session, first come, first served; other writers wait too. Nested
        changes are noticed. Leaving the block commits and waits until that is durable; an
        exception inside it leaves no trace.

        Raises (on entering):
            SessionNotFound: missing, expired or terminated.
            ConflictError: this task holds the session's edit already.
        Raises (on leaving):
            SessionNotFound: it was terminated meanwhile.
            ConflictError: the version it was made of was in flight and could not be written.
            ValueNotSerializable, ValueTooLarge, DiskFull, WriteOutcomeUnknown: as
            `update_session_data`.
        """
        self._check_open()
        return Edit(self._current_updates, session_id)

    # --- ending -------------------------------------------------------------------------------

    async def terminate_session(self, session_id: str) -> bool:
        """End a session now, without waiting for its editor; return whether it was alive.

        Idempotent. An edit under way then fails with SessionNotFound when it commits.

        Raises:
            DiskFull, WriteOutcomeUnknown: it may still be there; see `commit`.
        """
        while True:
            await self._ready()
            try:
                return await self._terminate_once(session_id, check_session_id(session_id))
            except Overtaken:
                continue  # it has ended and begun anew elsewhere: end that

    async def _terminate_once(self, session_id: str, key: bytes) -> bool:
        await self._bring_here(session_id)
        while not self._residency.is_alive(session_id, key):
            if session_id not in self._commits.tails:
                await self._residency.expire_if_over(session_id, key)
                return False
            # Its end is on its way. Be sure of it: should that fail, it is still alive.
            await self._commits.decided(session_id)
        await committed(self._residency.submit_delete(session_id, key))
        return True

    async def cleanup_expired(self) -> int:
        """Remove the sessions whose time is over; return how many.

        They are absent for everybody from their deadline on; this frees their space. Those that
        listings and `compact` have removed since the last call count too.

        Raises:
            DiskFull, WriteOutcomeUnknown: the end of some could not be logged; see `commit`.
        """
        await self._ready()
        return await self._listing.remove_expired() + self._listing.take_untold()

    async def cleanup_old_sessions(self, max_age_seconds: float) -> int:
        """Remove the sessions that nobody has accessed for `max_age_seconds`; return how many.

        Expired ones are removed, and counted, with them.

        Raises:
            DiskFull, WriteOutcomeUnknown: the end of some could not be logged; see `commit`.
        """
        await self._ready()
        age = check_duration("max_age_seconds", max_age_seconds)
        return await self._listing.remove_idle(age)

    # --- tokens and access --------------------------------------------------------------------

    @property
    def _token_access(self) -> Access:
        """What issues and validates tokens, made when it is first needed."""
        if self._access is None:
            tiers = self._tiers
            self._access = Access(
                _SessionsOf(self),
                tiers.keys.tokens(tiers.disk.secret, is_shared=tiers.shares_sessions),
                self.config.security.token_ttl_seconds,
                self._clock.wall,
                tiers.learn_keys,
            )
        return self._access

    def issue_token(
        self, session_id: str, client: ClientInfo, *, ttl_seconds: float | None = None
    ) -> str:
        """Return a token that opens one session, for one client; see ``docs/security.md``.

        Synchronous: where the session is in no cache, the event loop waits for one read of it.

        Args:
            session_id: a live session of this worker: one that it has made, or read before.
            client: whom it is for; only the same address and program may use it.
            ttl_seconds: for how long; 0: as long as the session; None: as configured
                (``security.token_ttl_seconds``).

        Raises:
            SessionNotFound: missing, expired or terminated.
            InvalidArgument: `client` or `ttl_seconds` is something else.
            ConflictError: a checkpoint is being put in place: try again.
            CorruptionError: its stored bytes are damaged.
        """
        self._check_open()
        if self._gate is not None:
            raise ConflictError("a checkpoint is being put in place; issue the token behind it")
        key = check_session_id(session_id)
        whom = check_client(client)
        ttl = None if ttl_seconds is None else check_ttl(ttl_seconds)
        record = self._residency.record_now(session_id, key)
        if record is None:
            raise SessionNotFound(session_id)
        return self._token_access.issue(session_id, record, whom, ttl)

    async def validate_token(self, token: str, client: ClientInfo) -> str:
        """Return the id of the session that a token opens for `client`. Renews nothing.

        Asynchronous: whether the session still lives is looked up, on disk and in the shared tier
        where it has to be.

        Raises:
            TokenInvalid: it is damaged, expired, revoked or another client's. It never says which.
            InvalidArgument: `client` is no ClientInfo.
        """
        whom = check_client(client)
        await self._ready()
        return (await self._token_access.claims_of(token, whom)).session_id

    async def open_session(self, session_id: str, token: str, client: ClientInfo) -> SessionHandle:
        """Return a handle through which this session can be reached, and no other.

        Each of its calls looks again whether the token still holds.

        Raises:
            TokenInvalid: the token is not valid, or another session's.
            InvalidArgument: `client` is no ClientInfo.
        """
        whom = check_client(client)
        check_session_id(session_id)
        await self._ready()
        return await self._token_access.open_session(session_id, token, whom)

    async def rotate_session_id(self, session_id: str) -> str:
        """Move a session to a fresh id, and return that; the old id and its tokens are no more.

        To be done whenever a client's rights change, at a login first of all: an id that somebody
        knew before is worth nothing then. Data, metadata, version, requests, scratch directory and
        lifetime stay; the TTL starts anew if the session renews; live resources are closed. A crash
        meanwhile leaves one of the two.

        Raises:
            SessionNotFound: missing, expired or terminated.
            ConflictError: this task holds the session's edit.
            DiskFull: it has kept its id.
            WriteOutcomeUnknown: one of the two ids lives; see `commit`.
        """
        check_session_id(session_id)
        while True:
            await self._ready()
            await self._requests.store(session_id)  # what is counted moves with the session
            tiers = Rotating(self._updates, self._residency, self._commits)
            under_way = self._requests.entries.get(session_id)
            try:
                new_id = await self._rotations.rotate(tiers, session_id)
            except Overtaken:
                continue  # on the version that another worker has made
            self._requests.follow(under_way, new_id)
            return new_id

    async def _living_or_none(self, session_id: str) -> bytes | None:
        """Return the incarnation id of a live session; renews nothing."""
        await self._ready()
        await self._bring_here(session_id)
        key = check_session_id(session_id)
        base = await self._residency.acknowledged_base(session_id, key, access=False)
        return None if base is None else rec.incarnation_of(base[0])

    # --- listing ------------------------------------------------------------------------------

    async def get_active_sessions(self, *, namespace: bool = False) -> list[str]:
        """Return the ids of this worker's live sessions, in no order; see `iter_sessions`.

        Args:
            namespace: those of all workers instead, as the shared tier has them.
        """
        return [session_id async for session_id in self.iter_sessions(namespace=namespace)]

    async def iter_sessions(
        self, prefix: str = "", *, namespace: bool = False
    ) -> AsyncIterator[str]:
        """Yield the ids of this worker's live sessions that start with `prefix`, in no order.

        A session that is alive all the while is yielded exactly once, whatever is written
        meanwhile. Renews nothing.

        Args:
            prefix: what ids have to start with.
            namespace: ask the shared tier for the sessions of all workers instead. Takes memory
                for every id.

        Raises:
            ConfigError: `namespace` asks for the shared tier, which is not configured.
            RemoteUnavailable: it does not answer.
        """
        await self._ready()
        check_text("prefix", prefix)
        if namespace and self._sharing is None:
            raise ConfigError(
                "namespace=True asks the shared tier, but redis.url is not set or redis.write is "
                "'checkpoint'"
            )
        ids = self._listing.ids(prefix)
        if namespace and self._sharing is not None:
            ids = self._sharing.ids(prefix)
        async for session_id in ids:
            yield session_id

    async def find_sessions(self, *, user_id: str) -> list[str]:
        """Return the ids of the live sessions of a user, in no order. Renews nothing.

        Damaged sessions are left out and logged: nobody can tell whose they are.
        """
        await self._ready()
        check_text("user_id", user_id)
        return await self._listing.of_user(user_id)

    # --- tiers --------------------------------------------------------------------------------

    async def spill_session(self, session_id: str) -> bool:
        """Let a session leave memory now; False if it is not there.

        Raises:
            DiskFull: it is not in the log yet, and the disk is full; it stays in memory.
        """
        await self._ready()
        key = check_session_id(session_id)
        if not self._residency.is_alive(session_id, key):
            await self._residency.expire_if_over(session_id, key)
            return False
        await self._residency.spill(session_id, key)
        return True

    async def restore_session(self, session_id: str) -> bool:
        """Bring a session into memory now, without renewing it; False if it is not there.

        Raises:
            CorruptionError: its stored bytes are damaged.
        """
        await self._ready()
        key = check_session_id(session_id)
        await self._bring_here(session_id)
        return await self._residency.acknowledged_base(session_id, key, access=False) is not None

    async def flush(self) -> None:
        """Wait until every update so far, and every due renewal, is synced; in every mode.

        Raises:
            WriteOutcomeUnknown: a sync failed.
        """
        await self._ready()
        await self._tiers.settle()

    async def compact(self) -> None:
        """Compact until there is nothing left that pays; it also happens by itself.

        Expired sessions are removed first.
        """
        await self._ready()
        try:
            self._listing.untold(await self._listing.remove_expired())
        except DiskFull as error:  # compacting is what helps
            _log.warning("compacting with expired sessions still there: %s", error)
        self._disk.compactor.wake()
        await self._disk.compactor.settle()

    async def stats(self) -> Stats:
        """Return numbers about the engine; cheap enough to be asked every second.

        Looks at about 256 sessions at most for what is said of their ages and sizes; see `census`.
        """
        await self._ready()
        memory, residency, commits = self._memory, self._residency, self._commits
        disk = self._disk.stats()
        sessions = disk.sessions + len(residency.unlisted)
        population = await self._census.look()
        return Stats(
            sessions=sessions,
            in_memory=len(memory),
            on_disk=max(0, sessions - len(memory)),
            memory_used_bytes=memory.used_bytes,
            memory_peak_bytes=memory.peak_bytes,
            memory_policy=memory.policy,
            memory_budget_bytes=self.config.memory.max_bytes,
            memory_effective_budget_bytes=memory.budget_bytes,
            rss_bytes=self._rss_bytes,
            hits=memory.hits,
            hit_rate=memory.hits / max(1, memory.hits + residency.restored),
            misses=self._misses,
            restored=residency.restored,
            spilled=residency.spilled,
            spill_failures=residency.spill_failures,
            expired=residency.expired,
            touches=residency.touches,
            commits=commits.committed,
            batches=commits.batches,
            pending_bytes=commits.pending_bytes,
            commit_seconds=Latencies.of(commits.latencies_seconds),
            disk=disk,
            checkpoints=self._keeper.stats(),
            sharing=None if self._sharing is None else self._sharing.stats(),
            requests=self._requests.stats(),
            population=population,
            resources=len(self._resources),
            scratch_directories=0 if self._scratch is None else len(self._scratch),
        )

    # --- checkpoints --------------------------------------------------------------------------

    async def create_checkpoint(
        self, reason: str = "manual", *, on_progress: OnProgress | None = None
    ) -> CheckpointInfo:
        """Make a restore point of everything that is acknowledged now; see ``docs/checkpoints.md``.

        Updates go on meanwhile. It is incremental where it can be.

        Args:
            reason: any text; it is shown in lists.
            on_progress: called now and then with how far it is.

        Raises:
            InvalidArgument: `reason` is no text, or none that UTF-8 can hold.
            RemoteUnavailable, DiskFull, DirectoryNotUsable: the store fails; what was there stays.
            WriteOutcomeUnknown: the log takes no more writes.
        """
        await self._ready()
        return await self._keeper.create(check_utf8("reason", reason), on_progress)

    async def list_checkpoints(self) -> list[CheckpointInfo]:
        """Return all restore points of the store, also those of other workers, oldest first."""
        await self._ready()
        return await self._keeper.list()

    async def delete_checkpoint(self, checkpoint_id: str) -> None:
        """Delete a restore point.

        Raises:
            CheckpointNotFound: there is none of that id.
            InvalidArgument: it is no str.
        """
        await self._ready()
        await self._keeper.delete(check_text("checkpoint_id", checkpoint_id))

    async def restore_checkpoint(
        self, checkpoint_id: str = "latest", *, on_progress: OnProgress | None = None
    ) -> RestoredInfo:
        """Replace all sessions by those of a restore point.

        Everything is fetched and verified first; then, at once, the state is the restored one.
        Sessions that were created since are gone, also from the shared tier. Deadlines are
        absolute times. An update under way fails with ConflictError, and nothing of it is left.

        Args:
            checkpoint_id: which one, or "latest". If it is damaged, the one before is taken.
            on_progress: called now and then with how far it is.

        Raises:
            CheckpointNotFound: there is none of that id.
            CheckpointDamaged: it is damaged, and so are all before it; nothing was changed.
            DiskFull, RemoteUnavailable: nothing was changed.
            InvalidArgument: it is no str.
        """
        await self._ready()
        staged = await self._keeper.restore(
            check_text("checkpoint_id", checkpoint_id),
            self._restored_ids,
            self._time.skew(),
            self.config.disk.segment_bytes,
            self._install,
            on_progress,
        )
        return staged.info

    def _restored_ids(self, frame: Frame) -> bytes:
        """A restored session is a new incarnation: nothing built on another one is accepted."""
        return self._commit_ids.next() + self._commit_ids.next() + frame.commit

    async def _install(self, staged: StagedRestore) -> None:
        """Put a restored state in place: nobody is let in while the tiers are exchanged."""
        gate = self._gate = asyncio.Event()
        self._keep_out()
        try:
            # Half of it would be an index of segments that are gone.
            await undisturbed(self._tiers.exchange(staged))
        finally:
            self._take_tiers()
            self._let_in()
            self._gate = None
            gate.set()
        await self._replaced_all()

    # --- background ---------------------------------------------------------------------------

    async def _sweep(self) -> None:
        await self._residency.next_sweep()
        await self._residency.record_renewals()

    async def _clean_up(self) -> None:
        await asyncio.sleep(self.config.session.cleanup_interval_seconds)
        await self.cleanup_expired()

    async def _watch_memory(self) -> None:
        await asyncio.sleep(self.config.memory.check_interval_seconds)
        pressure = await self._disk.threads.read(self._memory_reader.read)
        self._rss_bytes = pressure.rss_bytes
        configured = self.config.memory.max_bytes
        current = self._memory.budget_bytes
        if pressure.used_fraction > SHRINK_ABOVE:
            # A budget that is not used up shrinks from what is used, or it would not bite at once.
            current = min(current, max(self._memory.used_bytes, 1))
        budget = effective_budget_bytes(configured, current, pressure)
        if budget != self._memory.budget_bytes:
            _log.info(
                "memory budget is %d bytes, was %d: %s uses %d of %d",
                budget,
                self._memory.budget_bytes,
                pressure.source,
                pressure.anonymous_bytes,
                pressure.limit_bytes,
            )
            self._residency.set_budget(budget)


class _SessionsOf:
    """What `access` needs of a manager."""

    def __init__(self, manager: StateManager) -> None:
        self._manager = manager
        self.bring_here = manager._bring_here
        self.get_session = manager.get_session
        self.plain_data = manager._plain_data
        self.plain_value = manager._plain_value

    async def current(self) -> tuple[Updates, Residency]:
        """Return the tiers as they are now."""
        await self._manager._ready()
        return self._manager._updates, self._manager._residency


def _not_here(session_id: str) -> Session | None:
    return None


def _check_arguments(url: object, config: object, clock: object) -> None:
    """Check what a manager is made with: the two are easily mixed up."""
    if isinstance(url, StateConfig):
        raise InvalidArgument(
            "url is a StateConfig: config is the second argument, StateManager(config=...)"
        )
    check_text_or_none("url", url)
    if config is not None and not isinstance(config, StateConfig):
        raise refused(
            "config", config, "a StateConfig (StateConfig.model_validate makes one of a dict)"
        )
    if clock is not None and not all(
        callable(getattr(clock, name, None)) for name in ("wall", "monotonic")
    ):
        raise refused("clock", clock, "a Clock, with wall() and monotonic(), or None")


def _packed_meta(
    user_id: str | None, metadata: SessionMetadata | None, max_requests: int | None
) -> bytes:
    """Check and pack what is stored about a session beside its fields."""
    if metadata is not None and not isinstance(metadata, SessionMetadata):
        raise refused("metadata", metadata, "a SessionMetadata or None")
    return rec.pack_meta(
        {
            USER_ID: check_text_or_none("user_id", user_id),
            MAX_REQUESTS: check_count_or_none("max_requests", max_requests),
            **(metadata or SessionMetadata()).packed_parts(),
        }
    )


def _if_current(
    sharing: Sharing, look: Callable[[str], Session | None], session_id: str
) -> Session | None:
    """Look for a session here only if what is here is what the shared tier has."""
    return look(session_id) if sharing.is_current(session_id) else None


async def _forever(name: str, step: Callable[[], Awaitable[None]]) -> None:
    """Run a background step again and again; an error in one is logged and not the end."""
    while True:
        try:
            await step()
        except PersistenceError as error:
            _log.warning("background work '%s': %s", name, error)
            await asyncio.sleep(1)
        except Exception:  # noqa: BLE001 - logged; the next round tries again
            _log.exception("background work '%s' failed", name)
            await asyncio.sleep(1)


def _after_fork_in_child() -> None:
    for manager in list(_open_managers):
        manager._forked()
    _open_managers.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
