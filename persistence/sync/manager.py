"""`StateManager` for threads: the methods of `persistence.StateManager` without ``await``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Coroutine
from functools import partial, wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, cast

from persistence.arguments import check_duration, refused
from persistence.clock import Clock
from persistence.commit import Commit
from persistence.config import StateConfig
from persistence.disk.files import Files
from persistence.errors import ManagerClosed, Overtaken, SessionNotFound
from persistence.ids import plain_id
from persistence.manager import StateManager as AsyncManager
from persistence.requests import Request
from persistence.session import ClientInfo, Session, SessionDraft
from persistence.sync.blocks import Block, Stream
from persistence.sync.glance import Glances
from persistence.sync.handle import SessionHandle
from persistence.sync.loop import LoopThread, callers_context, refuse_event_loop, running_loop
from persistence.sync.mapping import SessionMapping
from persistence.sync.offload import off_loop
from persistence.updates import Edit, change_draft, drafted
from persistence.watching.changes import SessionChange
from persistence.watching.watching import MAX_PENDING

P = ParamSpec("P")
T = TypeVar("T")


def _blocking(
    method: Callable[Concatenate[AsyncManager, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[StateManager, P], T]:
    """Return a method that waits for what the asynchronous one does."""

    @wraps(method)
    def call(self: StateManager, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._on_loop().run(partial(method, self._manager, *args, **kwargs))

    return cast(Callable[Concatenate["StateManager", P], T], call)


class StateManager:
    """Keeps sessions, for programs of threads; see `persistence.StateManager` and docs/threads.md.

    ::

        from persistence import sync

        with sync.StateManager(config=StateConfig.load("config/worker.toml")) as state:
            sid = state.create_session(user_id="ada", data={"cart": {"items": []}})
            state.update_session(sid, lambda data: data["cart"]["items"].append(1))
            session = state.get_session(sid)

    Usable from any thread, and from several at once. The engine runs on an event loop in a thread
    of its own. A call of a thread that runs an event loop itself is refused with WrongEventLoop: it
    would hold up that loop. A thread that is interrupted (Ctrl-C) stops waiting; an update that was
    submitted is decided all the same. What is still open at exit is closed then.

    Args:
        url, config, clock, files, schema: as for `persistence.StateManager`.

    Raises:
        ConfigError, InvalidArgument: as there.
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
        self._thread: LoopThread | None = None
        self._manager = AsyncManager(url, config, clock=clock, files=files, schema=schema)
        self._glances = Glances(self._manager)
        self._look = self._glances.look
        self.config = self._manager.config

    # --- opening and closing ------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def open(self) -> None:
        """Start the thread, lock and recover the directory; see `persistence.StateManager.open`."""
        refuse_event_loop()
        if self._thread is not None:
            raise ManagerClosed("a manager is opened once; make another one")
        finish = partial(_finish, self._manager, self._glances)
        thread = self._thread = LoopThread(finish, self._glances.catch_up)
        try:
            thread.run(self._manager.open)
        except BaseException:
            thread.end(None)
            raise
        thread.post(partial(self._glances.start, thread.loop))

    def close(self, *, grace_seconds: float | None = None) -> None:
        """Refuse new work, let running edits finish, sync, deliver, seal; end the thread.

        Waits until that is done. Only where one of the engine's own threads calls it (a garbage
        collection may), it returns at once, and the closing goes on. Idempotent.

        Args:
            grace_seconds: at most so many seconds for what may take long, also for a close that is
                under way; None: ``shutdown.grace_seconds``.

        Raises:
            InvalidArgument: `grace_seconds` is no duration; it goes on as it was.
        """
        if grace_seconds is not None:
            check_duration("grace_seconds", grace_seconds)
        if self._thread is not None:
            self._thread.end(grace_seconds)

    def __del__(self) -> None:
        thread = getattr(self, "_thread", None)
        if thread is not None and thread.is_open:
            warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=2)
            thread.end_soon()

    def _on_loop(self) -> LoopThread:
        if self._thread is None:
            raise ManagerClosed("the manager is not open; use it with 'with' or call open()")
        return self._thread

    def start_grace(self) -> None:
        """Let the grace period of the close that will follow begin now, and end all watches.

        It waits for nothing, so any thread may call it, and any signal handler at any time. Like
        `close`, it does nothing to a manager that is not open.
        """
        # Not `ask`: a handler may have interrupted this very thread while it was handing over a
        # call, and would wait for what only that thread can go on with.
        if self._thread is not None:
            self._thread.post(self._manager.start_grace)

    # --- reading ------------------------------------------------------------------------------

    def get_session(
        self, session_id: str, *, fresh: bool = False, renew: bool = True
    ) -> Session | None:
        """Return a view of a live session; see `persistence.StateManager.get_session`.

        One that is in memory is read right here, without the engine's thread.
        """
        if renew and not fresh and running_loop() is None:
            try:
                session = self._look(session_id)
            except TypeError:  # not hashable, so no session id: the long way says it better
                session = None
            if session is not None:
                return session
        read = partial(self._manager.get_session, session_id, fresh=fresh, renew=renew)
        return self._on_loop().run(read)

    # --- updating -----------------------------------------------------------------------------

    def update_session(
        self, session_id: str, function: Callable[[SessionDraft], object]
    ) -> Session:
        """Change a draft by a function; see `persistence.StateManager.update_session`.

        `function` is called in this thread, and again when another thread's or worker's commit came
        first; then it waits for its turn, as an edit does.
        """
        refuse_event_loop()
        self._on_loop()
        session_id = plain_id(session_id)
        if not callable(function):
            raise refused("function", function, "a function that takes the draft and changes it")
        updated = self._try_update(session_id, function)
        if updated is not None:
            return updated
        while True:
            try:
                return self._update_in_edit(session_id, function)
            except Overtaken:
                continue

    def _try_update(
        self, session_id: str, function: Callable[[SessionDraft], object]
    ) -> Session | None:
        """Change what is newest; None: it was not any more, or something has to be waited for."""
        if not self._manager._is_open:
            return None
        updates = self._manager._tiers.updates
        try:
            record = updates.newest(session_id)
        except TypeError:  # not hashable
            return None
        if record is None or session_id in updates.locks:
            return None
        changes = drafted(record, function)
        if changes is None:
            return self._on_loop().run(partial(self._manager.update_session, session_id, _nothing))
        made: list[Commit] = []

        def submit() -> object:
            self._manager._check_open()
            if self._manager._gate is not None or self._manager._tiers.updates is not updates:
                return None
            commit = updates.submit_on(session_id, record, changes)
            if commit is None:
                return None
            made.append(commit)
            return commit.done

        try:
            self._on_loop().ask(submit)
        except Overtaken:
            return None
        return updates.view(made[0]) if made else None

    def _update_in_edit(
        self, session_id: str, function: Callable[[SessionDraft], object]
    ) -> Session:
        block = self.edit(session_id)
        with block as draft:
            change_draft(draft, function)
        edit = block.inner
        assert isinstance(edit, Edit), "made by `edit`"
        if edit.commit is not None:
            return self._manager._tiers.updates.view(edit.commit)
        session = self.get_session(session_id)
        if session is None:
            raise SessionNotFound(session_id)
        return session

    def edit(self, session_id: str) -> Block[SessionDraft]:
        """Edit a session: ``with state.edit(sid) as draft``; see `persistence.StateManager.edit`.

        Until the block ends, other threads' writes to this session wait; this thread's own are
        refused with ConflictError.
        """
        return Block(self._on_loop(), partial(self._manager.edit, session_id))

    def edit_typed(self, session_id: str) -> Block[Any]:
        """Edit a session as an object: ``with state.edit_typed(sid) as cart``; see `edit`."""
        return Block(self._on_loop(), partial(self._manager.edit_typed, session_id))

    def typed(self, session: Session) -> Any:
        """Return a session as an object; see `persistence.StateManager.typed`."""
        return self._manager.typed(session)

    def update_typed(self, session_id: str, function: Callable[[Any], Any]) -> Session:
        """Change an object by a function, which is called in this thread; see `update_session`."""
        return self.update_session(session_id, self._manager._typed_change(session_id, function))

    # --- requests and what cannot be stored ---------------------------------------------------

    def request(self, session_id: str, name: str = "") -> Block[Request]:
        """Handle one request: ``with state.request(sid, "GET /page") as r``.

        See `persistence.StateManager.request`.
        """
        return Block(self._on_loop(), partial(self._manager.request, session_id, name))

    def resources(
        self,
        session_id: str,
        name: str,
        factory: Callable[[], Any],
        close: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Return a live resource of a session; see `persistence.StateManager.resources`.

        `factory` and `close` are called in a thread of their own each, and may block there, ask for
        other resources, too. Coroutine functions run on the engine's loop. `factory` has the
        context variables of whoever asked first.
        """
        thread = self._on_loop()
        make, end = off_loop(factory), off_loop(close, thread.closes)
        asking = partial(self._manager.resources, session_id, name, make, end)
        return thread.run(asking, callers_context())

    # --- watching and listing -----------------------------------------------------------------

    def watch(
        self,
        session_id: str | None = None,
        *,
        after: int | None = None,
        max_pending: int = MAX_PENDING,
    ) -> Stream[SessionChange]:
        """Listen to changes: ``for change in state.watch(sid)``; see `persistence.StateManager`.

        Waits for each change; ``close()`` of what this returns, from any thread, ends that.
        """
        listen = partial(self._manager.watch, session_id, after=after, max_pending=max_pending)
        thread = self._on_loop()
        return Stream(thread, thread.ask(listen))

    def iter_sessions(self, prefix: str = "", *, namespace: bool = False) -> Stream[str]:
        """Yield the ids of live sessions; see `persistence.StateManager.iter_sessions`."""
        refuse_event_loop()
        thread = self._on_loop()
        return Stream(thread, self._manager.iter_sessions(prefix, namespace=namespace))

    # --- tokens and access --------------------------------------------------------------------

    def issue_token(
        self, session_id: str, client: ClientInfo, *, ttl_seconds: float | None = None
    ) -> str:
        """Return a token that opens one session; see `persistence.StateManager.issue_token`."""
        issue = partial(self._manager.issue_token, session_id, client, ttl_seconds=ttl_seconds)
        return cast(str, self._on_loop().ask(issue))

    def open_session(self, session_id: str, token: str, client: ClientInfo) -> SessionHandle:
        """Return a handle for one session; see `persistence.StateManager.open_session`."""
        thread = self._on_loop()
        opening = partial(self._manager.open_session, session_id, token, client)
        return SessionHandle(thread, thread.run(opening))

    validate_token = _blocking(AsyncManager.validate_token)
    rotate_session_id = _blocking(AsyncManager.rotate_session_id)

    # --- all of them --------------------------------------------------------------------------

    def as_mapping(self) -> SessionMapping:
        """Return all sessions as a mutable mapping: id -> dict of the session's fields."""
        return SessionMapping(self)

    def _take(self, session_id: str) -> Session | None:
        """End a session and return its last version; None: it was not alive."""
        return self._on_loop().run(partial(self._manager._lives.take, session_id))

    # --- what only has to be waited for -------------------------------------------------------

    create_session = _blocking(AsyncManager.create_session)
    get_or_create_session = _blocking(AsyncManager.get_or_create_session)
    has_session = _blocking(AsyncManager.has_session)
    update_session_data = _blocking(AsyncManager.update_session_data)
    replace_session = _blocking(AsyncManager.replace_session)
    update_session_metadata = _blocking(AsyncManager.update_session_metadata)
    set_ttl = _blocking(AsyncManager.set_ttl)
    terminate_session = _blocking(AsyncManager.terminate_session)
    cleanup_expired = _blocking(AsyncManager.cleanup_expired)
    cleanup_old_sessions = _blocking(AsyncManager.cleanup_old_sessions)
    get_active_sessions = _blocking(AsyncManager.get_active_sessions)
    find_sessions = _blocking(AsyncManager.find_sessions)
    spill_session = _blocking(AsyncManager.spill_session)
    restore_session = _blocking(AsyncManager.restore_session)
    flush = _blocking(AsyncManager.flush)
    compact = _blocking(AsyncManager.compact)
    stats = _blocking(AsyncManager.stats)
    record_request = _blocking(AsyncManager.record_request)
    record_error = _blocking(AsyncManager.record_error)
    is_request_limit_reached = _blocking(AsyncManager.is_request_limit_reached)
    session_metrics = _blocking(AsyncManager.session_metrics)
    session_health = _blocking(AsyncManager.session_health)
    scratch_dir = _blocking(AsyncManager.scratch_dir)
    get_typed = _blocking(AsyncManager.get_typed)
    create_checkpoint = _blocking(AsyncManager.create_checkpoint)
    list_checkpoints = _blocking(AsyncManager.list_checkpoints)
    delete_checkpoint = _blocking(AsyncManager.delete_checkpoint)
    restore_checkpoint = _blocking(AsyncManager.restore_checkpoint)


def _nothing(draft: SessionDraft) -> None:
    """Change nothing."""


async def _finish(manager: AsyncManager, glances: Glances, grace_seconds: float | None) -> None:
    glances.stop()
    await manager.close(grace_seconds=grace_seconds)
