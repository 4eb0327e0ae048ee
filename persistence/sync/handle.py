"""One session, reached with a token, from any thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from persistence.access import SessionHandle as AsyncHandle
from persistence.errors import Overtaken
from persistence.session import Session, SessionDraft
from persistence.sync.blocks import Block
from persistence.sync.loop import LoopThread
from persistence.updates import change_draft


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

    def terminate(self) -> None:
        """End it; every token for it ends with it."""
        self._thread.run(self._handle.terminate)
