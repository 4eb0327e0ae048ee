"""All sessions as a mapping: id -> dict of the session's fields."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, MutableMapping, ValuesView
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from persistence.errors import InvalidSessionId, SessionExists, SessionNotFound
from persistence.ids import check_session_id

if TYPE_CHECKING:
    from persistence.sync.manager import StateManager

Data = dict[str, Any]
T = TypeVar("T")

_NOTHING: Final[Any] = object()


class SessionMapping(MutableMapping[str, Data]):
    """The live sessions of one manager, each as a dict of its own.

    What it returns is the caller's: a fresh dict of fresh values each time. So
    ``sessions[sid]["cart"].append(1)`` changes nothing; put the dict back, or use `update_session`,
    which is safe beside other writers. Setting an item replaces all fields of a session, or creates
    it under that id with the configured TTL; deleting one terminates it.

    `setdefault`, `pop` and `popitem` are one step each, whatever others do: of the threads that pop
    a session, one gets it, as it was in the end.

    Reading an item renews the session, as `get_session` does; all that goes over many sessions, and
    ``in``, does not. Sessions may come and go during an iteration: what lives all the while is
    there exactly once, and `items` and `values` leave out what is gone when its turn comes. Length
    and equality count, and read, all sessions.
    """

    def __init__(self, state: StateManager) -> None:
        self._state = state

    def __getitem__(self, session_id: str) -> Data:
        session = self._looked_up(session_id, renew=True)
        if session is None:
            raise KeyError(session_id)
        return session

    def _looked_up(self, session_id: str, *, renew: bool) -> Data | None:
        hash(session_id)  # who has no hash is no key, as in any mapping
        try:
            session = self._state.get_session(session_id, renew=renew)
        except InvalidSessionId:
            return None
        return None if session is None else session.data

    def __setitem__(self, session_id: str, data: Mapping[str, Any]) -> None:
        while True:
            try:
                self._state.replace_session(session_id, data)
                return
            except SessionNotFound:
                pass
            try:
                self._state.create_session(session_id=session_id, data=data)
                return
            except SessionExists:
                continue  # somebody else has created it in between

    def __delitem__(self, session_id: str) -> None:
        hash(session_id)
        try:
            was_there = self._state.terminate_session(session_id)
        except InvalidSessionId:
            was_there = False
        if not was_there:
            raise KeyError(session_id)

    def __contains__(self, session_id: object) -> bool:
        hash(session_id)
        if not isinstance(session_id, str):
            return False
        try:
            return self._state.has_session(session_id)
        except InvalidSessionId:
            return False

    def __iter__(self) -> Iterator[str]:
        return self._state.iter_sessions()

    def __len__(self) -> int:
        return len(self._state.get_active_sessions())

    def __bool__(self) -> bool:
        return next(iter(self), None) is not None

    def __repr__(self) -> str:
        return f"<SessionMapping of {self._state!r}>"

    def items(self) -> ItemsView[str, Data]:
        """Return a view of ids and data; going over it renews nothing."""
        return _Items(self)

    def values(self) -> ValuesView[Data]:
        """Return a view of the data; going over it renews nothing."""
        return _Values(self)

    def setdefault(self, session_id: str, default: Mapping[str, Any] | None = None) -> Data:
        """Return a session's data; where there is none, create it with `default` (None: empty)."""
        check_session_id(session_id)  # None would be a fresh id
        data = {} if default is None else default
        return self._state.get_or_create_session(session_id, data=data).data

    @overload
    def pop(self, session_id: str, /) -> Data: ...
    @overload
    def pop(self, session_id: str, /, default: Data) -> Data: ...
    @overload
    def pop(self, session_id: str, /, default: T) -> Data | T: ...
    def pop(self, session_id: str, /, default: Any = _NOTHING) -> Any:
        """Terminate a session and return its data; where there is none, return `default`.

        Raises:
            KeyError: there is none, and no default.
        """
        data = self._taken(session_id)
        if data is not None:
            return data
        if default is _NOTHING:
            raise KeyError(session_id)
        return default

    def popitem(self) -> tuple[str, Data]:
        """Terminate any session; return its id and data.

        Raises:
            KeyError: there is none.
        """
        with self._state.iter_sessions() as session_ids:
            for session_id in session_ids:
                data = self._taken(session_id)
                if data is not None:
                    return session_id, data
        raise KeyError("there is no session")

    def _taken(self, session_id: str) -> Data | None:
        hash(session_id)
        try:
            session = self._state._take(session_id)
        except InvalidSessionId:
            return None
        return None if session is None else session.data

    def clear(self) -> None:
        """Terminate all sessions that there are now."""
        for session_id in self:
            self._state.terminate_session(session_id)

    def _pairs(self) -> Iterator[tuple[str, Data]]:
        for session_id in self:
            data = self._looked_up(session_id, renew=False)
            if data is not None:
                yield session_id, data


class _Items(ItemsView[str, Data]):
    _mapping: SessionMapping

    def __iter__(self) -> Iterator[tuple[str, Data]]:
        return self._mapping._pairs()


class _Values(ValuesView[Data]):
    _mapping: SessionMapping

    def __iter__(self) -> Iterator[Data]:
        return (data for _, data in self._mapping._pairs())

    def __contains__(self, value: object) -> bool:
        return any(data == value for data in self)
