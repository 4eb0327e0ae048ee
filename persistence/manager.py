"""`StateManager`: the public API. Each method checks, delegates, returns.

How it is put together is in `assembly`; what the engine does is in the rooms below.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from threading import get_ident
from typing import Any

from persistence.access import SessionHandle, check_client
from persistence.arguments import check_duration, check_text, check_ttl, check_utf8, refused
from persistence.assembly import Assembly, checked_config
from persistence.checkpoint.catalogue import CheckpointInfo
from persistence.checkpoint.create import OnProgress
from persistence.checkpoint.restore import RestoredInfo, StagedRestore
from persistence.clock import Clock
from persistence.commit import Commit
from persistence.config import StateConfig
from persistence.disk.files import Files
from persistence.disk.threads import undisturbed
from persistence.errors import (
    ConfigError,
    ConflictError,
    DiskFull,
    ManagerClosed,
    Overtaken,
    SessionNotFound,
)
from persistence.ids import check_session_id, plain_id
from persistence.lifecycle import wrong_loop
from persistence.memory.budget import MemoryReader
from persistence.memory.watch import MemoryWatch
from persistence.session import (
    ClientInfo,
    Data,
    Session,
    SessionDraft,
    SessionMetadata,
    check_metadata,
)
from persistence.stats import Stats
from persistence.summary import summary
from persistence.updates import Edit, field_change, metadata_change, ttl_change, whole_change
from persistence.watching.stream import Watch
from persistence.watching.watching import MAX_PENDING

_log = logging.getLogger("persistence")


class StateManager(Assembly):
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
        checked = checked_config(url, config, clock)
        memory_watch = MemoryWatch(MemoryReader(), checked.memory.max_bytes)
        super().__init__(checked, clock, files, schema, memory_watch)

    # --- opening and closing ------------------------------------------------------------------

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
        await self._open()

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
        """Let the grace period of the close that will follow begin now, and end all watches.

        A signal handler may call it at any time, in the thread of the event loop. Like `close`, it
        does nothing to a manager that is not open.

        Raises:
            WrongEventLoop: called in another thread than the one that opened the manager.
        """
        if not self._is_open:
            return
        if get_ident() != self._thread:
            raise wrong_loop()
        self._grace.begin()
        # Not here: a handler may have interrupted whoever is at work on the streams this moment.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._watching.close)

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
        commit = await self._lives.create(
            session_id,
            user_id,
            metadata,
            ttl_seconds,
            data,
            max_requests=max_requests,
            auto_renew=auto_renew,
        )
        self._census.last_created = commit.session_id
        return commit.session_id

    async def get_or_create_session(
        self, /, session_id: str | None = None, **create: Any
    ) -> Session:
        """Return the live session `session_id`, creating it under that very id if it is missing.

        Args:
            session_id: None: create one with a fresh id.
            create: what `create_session` takes, for the case that it is created.
        """
        session, is_new = await self._lives.get_or_create(session_id, self.get_session, create)
        if is_new:
            self._census.last_created = session.id
        return session

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
            await self._lookup.bring_fresh(session_id)
        if not renew:
            return await self._lookup.peek(session_id)
        try:
            session = self._resident(session_id)
            if session is None:
                self._check_open()
                session_id = plain_id(session_id)
                if not self._turns.take():
                    await self._begin()
                    session = self._resident(session_id)
                if session is None:
                    session = self._restore_now(session_id)
        except TypeError:  # not hashable, so no session id: the long way says it better
            session = None
        if session is not None:
            return session
        return await self._lookup.cold(session_id)

    async def has_session(self, session_id: str) -> bool:
        """Whether the session is alive. Renews nothing and reads nothing from disk."""
        return await self._lookup.has(session_id)

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
        if session_id is not None:
            session_id = plain_id(session_id)
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
        await self._begin()
        # Not by `_plain_value`: this is a hot path.
        if self._schema is not None:
            value = self._schema.plain_value(session_id, field, value)
        return await self._updates.apply(session_id, field_change(field, value))

    async def update_session(
        self, session_id: str, function: Callable[[SessionDraft], object]
    ) -> Session:
        """Call `function` with a mutable draft of the data, and commit what it changed.

        `function` is synchronous and its result is ignored (one that has to be awaited is refused:
        that is what `edit` is for); it may be called again when another
        worker's commit came first. If it raises, nothing is written. If it changes nothing, there
        is no new version. If it writes to the session in another way than by the draft (where the
        event loop starts tasks eagerly, one that it makes may), that is kept, and ConflictError is
        raised.

        Raises:
            SessionNotFound, ValueNotSerializable, ValueTooLarge, ConflictError, DiskFull,
            WriteOutcomeUnknown: as `update_session_data`.
        """
        self._check_open()
        if not callable(function):
            raise refused("function", function, "a function that takes the draft and changes it")
        if self._gate is not None or not self._turns.take():
            await self._begin()
        if type(session_id) is not str:  # `plain_id`, without the call
            session_id = plain_id(session_id)
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
        await self._begin()
        return await self._updates.apply(
            session_id, whole_change(self._plain_data(session_id, data), ttl_seconds)
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
        await self._begin()
        check_metadata(**changes)
        return await self._updates.apply(session_id, metadata_change(changes))

    async def set_ttl(self, session_id: str, ttl_seconds: float) -> bool:
        """Set a session's TTL, from now on; the data and the version stay as they are.

        Returns:
            False if the session is not there.

        Raises:
            ConflictError: this task holds the session's edit.
            DiskFull, WriteOutcomeUnknown: see `commit`.
        """
        await self._begin()
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
        return await self._lives.terminate(session_id)

    async def cleanup_expired(self) -> int:
        """Remove the sessions whose time is over; return how many.

        They are absent for everybody from their deadline on; this frees their space. Those that
        listings and `compact` have removed since the last call count too. Those whose time another
        worker has made shorter are removed soon after, and do not count.

        Raises:
            DiskFull, WriteOutcomeUnknown: the end of some could not be logged; see `commit`.
        """
        await self._ready()
        if self._sharing is not None:
            await self._sharing.follow_what_is_over()
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
        session_id = plain_id(session_id)
        key = check_session_id(session_id)
        whom = check_client(client)
        ttl = None if ttl_seconds is None else check_ttl(ttl_seconds)
        record = self._residency.record_now(session_id, key)
        if record is None and self._sharing is not None:
            raise SessionNotFound(
                session_id, "if another worker has it, bring it here with get_session() first"
            )
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
        session_id = plain_id(session_id)
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
        session_id = plain_id(session_id)
        check_session_id(session_id)
        return await self._rotate(session_id)

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
        session_id = plain_id(session_id)
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
        return await self._lookup.restore(session_id) is not None

    async def flush(self) -> None:
        """Wait until every update so far, and every due renewal, is synced; in every mode.

        Raises:
            WriteOutcomeUnknown: a sync failed.
        """
        await self._begin()
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
        return summary(
            self._tiers,
            population=await self._census.look(),
            budget_bytes=self.config.memory.max_bytes,
            rss_bytes=self._memory_watch.rss_bytes,
            misses=self._lookup.misses,
            requests=self._requests.stats(),
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
        await self._begin()
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
