"""The whole error tree of the engine. This module imports nothing of the project.

::

    PersistenceError
    ├── caller's fault
    │   ├── ConfigError             a configuration field is wrong
    │   ├── InvalidArgument         an argument is of the wrong type or out of its range
    │   ├── InvalidSessionId        not a non-empty string of at most 512 bytes of UTF-8
    │   ├── ValueNotSerializable    a value cannot be stored as what it is
    │   ├── SchemaMismatch          a field is of another type than the schema says
    │   ├── ValueTooLarge           a session would exceed ``session.max_bytes``
    │   ├── SessionNotFound         missing, expired or terminated
    │   ├── SessionExists           the id belongs to a live session
    │   ├── SessionLimitReached     ``session.max_sessions`` are alive
    │   ├── RequestLimitReached     the session used up its ``max_requests``
    │   ├── ConflictError           another commit came first
    │   │   └── Overtaken           another worker's
    │   ├── TokenInvalid            a token is not valid (never says why)
    │   ├── CheckpointNotFound      no checkpoint has that id
    │   └── ManagerClosed           the manager is closed, or was opened by another process
    │       └── WrongEventLoop      a call from another event loop, or a blocking one from any
    └── the world's fault
        ├── CorruptionError         stored bytes fail their checksum
        ├── CheckpointDamaged       a checkpoint's chunk or manifest fails its checksum
        ├── DirectoryLocked         another process owns the directory
        ├── DirectoryNotUsable      newer format, foreign, read-only, not a directory
        ├── DiskFull                no space left, or ``disk.max_bytes`` reached
        ├── WriteOutcomeUnknown     a sync failed or a reply was lost: durable or not
        ├── RemoteDamaged           a key of the shared tier is foreign or damaged
        └── RemoteUnavailable       the shared tier cannot be reached or refuses to work

Every message says what happened, to which session, file and offset or key, and what to do.
Session ids come from outside: messages carry them through `printable`, which escapes them.
"""

from __future__ import annotations

_MAX_PRINTED_ID_CHARS = 80


def printable(value: object) -> str:
    """Return a session id, or what was passed for one, fit for one log line.

    Quoted, escaped to ASCII and shortened.
    """
    try:
        text = ascii(value)
    except ValueError:  # an int of more digits than Python prints, also inside something else
        return f"({type(value).__name__} too long to print)"
    if len(text) <= _MAX_PRINTED_ID_CHARS:
        return text
    return f"{text[:_MAX_PRINTED_ID_CHARS]}…({len(text)} characters)"


class PersistenceError(Exception):
    """Base of every error that this library raises on purpose."""

    def __reduce__(self) -> tuple[object, ...]:
        # A constructor makes a message of its arguments; a copy must not be made of the message.
        return _rebuilt, (type(self), self.args, dict(self.__dict__))


def _rebuilt(
    kind: type[PersistenceError], args: tuple[object, ...], attributes: dict[str, object]
) -> PersistenceError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(attributes)
    return error


def again(error: PersistenceError) -> PersistenceError:
    """Return a copy of `error`, for one more caller: an instance carries one caller's trace."""
    return _rebuilt(type(error), error.args, error.__dict__)


class ConfigError(PersistenceError, ValueError):
    """A configuration field is wrong; the message names field, value and what is allowed."""


class InvalidArgument(PersistenceError, ValueError):
    """An argument is of the wrong type or out of its range; the message says what is allowed."""


class InvalidSessionId(PersistenceError, ValueError):
    """A session id is not a non-empty string of at most 512 bytes of UTF-8."""


class ValueNotSerializable(PersistenceError, TypeError):
    """A value cannot be stored as what it is; the message names the field and the type.

    Nothing was written.
    """


class SchemaMismatch(PersistenceError, TypeError):
    """What is stored of a session, or was to be stored, is not what its schema says.

    The stored data are unchanged.

    Attributes:
        session_id: the session.
        field: the field, with the place in it: ``items[0].qty``; empty: all fields together.
        stored_type: what is stored there, or was to be, or what a ``migrate`` hook has made of it;
            "nothing" if it is missing and has no default.
        wanted_type: what the schema says.
    """

    def __init__(
        self, session_id: str, field: str, stored_type: str, wanted_type: str, reason: str
    ) -> None:
        self.session_id = session_id
        self.field = field
        self.stored_type = stored_type
        self.wanted_type = wanted_type
        place = f", field {printable(field)}" if field else ""
        super().__init__(f"session {printable(session_id)}{place}: {reason}")


class ValueTooLarge(PersistenceError, ValueError):
    """The session would exceed ``session.max_bytes``; nothing was written."""


class SessionNotFound(PersistenceError, KeyError):
    """The session is missing, expired or terminated."""

    def __init__(
        self,
        session_id: str,
        way_out: str = "create it with create_session() or get_or_create_session()",
    ) -> None:
        self.session_id = session_id
        super().__init__(
            f"session {printable(session_id)} does not exist, has expired or was terminated; "
            f"{way_out}"
        )

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class SessionExists(PersistenceError):
    """`create_session` was given the id of a live session; that session is unchanged."""

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        super().__init__(
            f"session {printable(session_id)} exists already and was left unchanged; "
            "use get_or_create_session() or another id"
        )


class SessionLimitReached(PersistenceError):
    """As many sessions as ``session.max_sessions`` allows are alive."""


class RequestLimitReached(PersistenceError):
    """The session has used up its ``max_requests``; the request was not counted."""


class ConflictError(PersistenceError):
    """Another commit came first, or a task wrote to a session whose edit it holds itself."""


class Overtaken(ConflictError):
    """Another worker's commit came first; nothing was written. `update_session` tries again."""


class TokenInvalid(PersistenceError):
    """A token is not valid. Deliberately uniform: it never says why."""


class CheckpointNotFound(PersistenceError, KeyError):
    """No checkpoint has that id."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class ManagerClosed(PersistenceError):
    """The manager, or provider, is not open: not yet, closed, or inherited through a fork."""


class WrongEventLoop(ManagerClosed):
    """A call from an event loop or thread that must not make it; the message says who may."""


class CorruptionError(PersistenceError):
    """Stored bytes fail their checksum. They are never returned as a value.

    Attributes:
        path: the file.
        offset: byte offset of the damaged frame in it.
        session_id: the session, where it is known.
    """

    def __init__(
        self, path: str, offset: int, session_id: str | None = None, reason: str = "damaged"
    ) -> None:
        self.path = path
        self.offset = offset
        self.session_id = session_id
        self.reason = reason
        whose = f", session {printable(session_id)}" if session_id is not None else ""
        super().__init__(
            f"{path} at offset {offset}{whose}: {reason}; other sessions stay readable, "
            "run 'persistence verify' on the directory for the full list"
        )


class CheckpointDamaged(PersistenceError):
    """A checkpoint's chunk or manifest fails its checksum."""


class DirectoryLocked(PersistenceError):
    """Another process (or another manager of this one) owns the directory."""


class DirectoryNotUsable(PersistenceError):
    """The directory is foreign, read-only, of a newer format, or not a directory."""


class DiskFull(PersistenceError):
    """No space for new writes. Reads and memory go on; writes resume when there is space."""


class WriteOutcomeUnknown(PersistenceError):
    """The update may or may not survive; nobody knows, so nothing is concluded from it.

    A sync to disk failed, and nothing more is written; or the shared tier took an update and its
    reply was lost, again and again.
    """


class RemoteDamaged(PersistenceError):
    """A key or row of the shared tier holds something else than a session, or a damaged one.

    It is never returned as a value and never overwritten.

    Attributes:
        key: the key, or what is in a row's primary key.
        session_id: the session, where it is known.
    """

    def __init__(
        self, key: str, reason: str, session_id: str | None = None, what: str = "Redis key"
    ) -> None:
        self.key = key
        self.session_id = session_id
        self.reason = reason
        others = "" if session_id is None else ", other sessions are not affected"
        super().__init__(
            f"{what} {printable(key)}: {reason}; it is left as it is{others}: look at it, then "
            "rename or delete it"
        )


class RemoteUnavailable(PersistenceError):
    """The shared tier cannot be reached, or answers that it cannot work now."""
