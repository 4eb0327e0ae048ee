"""One session, reached with a token, from any thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from persistence.access import SessionHandle as AsyncHandle
from persistence.errors import Overtaken
from persistence.requests import Request
from persistence.session import Session, SessionDraft
from persistence.sync.blocks import Block, Stream
from persistence.sync.loop import LoopThread, callers_context
from persistence.sync.offload import off_loop
from persistence.updates import change_draft
from persistence.watching.changes import SessionChange
from persistence.watching.watching import MAX_PENDING


class SessionHandle:
    """The methods of `persistence.SessionHandle` without ``await``; from `open_session`.

    Args:
        thread: runs the engine's loop.
        handle: what it makes its calls with.
    """

    __slots__ = ("_handle", "_thread", "id")

    def __init__(self, thread: LoopThread, handle: AsyncHandle) -> None:
        self.id = handle.id
        self._thread = thread
        self._handle = handle

    def __repr__(self) -> str:
        return f"SessionHandle({self.id!r})"

    def get(self) -> Session:
        """Return the session as it is now."""
        return self._thread.run(self._handle.get)

    def update(self, function: Callable[[SessionDraft], object]) -> Session:
        """Change it by a function over a draft, called in this thread; return it as it is then.

        The function is called again when another worker's commit came first.
        """
        while True:
            try:
                with self.edit() as draft:
                    change_draft(draft, function)
                return self.get()
            except Overtaken:
                continue

    def update_data(self, field: str, value: Any) -> Session:
        """Set one field."""
        return self._thread.run(partial(self._handle.update_data, field, value))

    def replace(self, data: Mapping[str, Any], ttl_seconds: float | None = None) -> Session:
        """Replace all fields, and the TTL unless it is None."""
        return self._thread.run(partial(self._handle.replace, data, ttl_seconds))

    def set_ttl(self, ttl_seconds: float) -> None:
        """Set the TTL, from now on."""
        self._thread.run(partial(self._handle.set_ttl, ttl_seconds))

    def edit(self) -> Block[SessionDraft]:
        """Edit it: ``with handle.edit() as draft``; all or nothing."""
        return Block(self._thread, self._handle.edit)

    def request(self, name: str = "") -> Block[Request]:
        """Handle one request of it: ``with handle.request("GET /page") as r``."""
        return Block(self._thread, partial(self._handle.request, name))

    def resources(
        self,
        name: str,
        factory: Callable[[], Any],
        close: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Return a live resource of it; see `StateManager.resources` of this module."""
        make, end = off_loop(factory), off_loop(close, self._thread.closes)
        asking = partial(self._handle.resources, name, make, end)
        return self._thread.run(asking, callers_context())

    def scratch_dir(self) -> Path:
        """Return the path of its private directory."""
        return self._thread.run(self._handle.scratch_dir)

    def watch(
        self, *, after: int | None = None, max_pending: int = MAX_PENDING
    ) -> Stream[SessionChange]:
        """Listen to its changes: ``for change in handle.watch()``."""
        listen = partial(self._handle.watch, after=after, max_pending=max_pending)
        return Stream(self._thread, self._thread.ask(listen))

    def terminate(self) -> None:
        """End it; every token for it ends with it."""
        self._thread.run(self._handle.terminate)
