"""What callers hold: `Session` (an immutable view), `SessionDraft` (inside an edit), metadata."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Final, NamedTuple, NoReturn, Protocol, TypeAlias

from persistence import record as rec
from persistence.arguments import check_mapping, check_text_or_none
from persistence.clock import EngineTime
from persistence.errors import ConflictError

USER_ID: Final = "user_id"
MAX_REQUESTS: Final = "max_requests"
REQUESTS: Final = "requests"
"""In a record's metadata: a packed list of a limit's high-water mark and the parts of a `Tally`."""
_NOTHING: Final[frozenset[str]] = frozenset()
_LARGE_RECORD_BYTES: Final = 4096  # may have so many names that finding them is felt


class DataclassObject(Protocol):
    """An instance of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class StructObject(Protocol):
    """An instance of a msgspec Struct."""

    __struct_fields__: ClassVar[tuple[str, ...]]


class ModelObject(Protocol):
    """An instance of a pydantic model."""

    def model_dump(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return its fields."""


Data: TypeAlias = Mapping[str, Any] | DataclassObject | StructObject | ModelObject
"""The fields of a session, as a mapping; with a schema also as an object of it."""


@dataclass(frozen=True, slots=True)
class SessionMetadata:
    """Who a session belongs to, as told at its creation. All optional.

    Attributes:
        client_ip: the client's address.
        user_agent: the client's program.
        source: where the session came from ("web", "app", ...).
        attributes: anything else that can be stored as a value.
    """

    client_ip: str | None = None
    user_agent: str | None = None
    source: str | None = None
    attributes: dict[str, Any] = field(default_factory=dict)

    def packed_parts(self) -> dict[str, object]:
        """Return the entries as they are stored in a record's metadata.

        Raises:
            InvalidArgument: one of them is of a wrong type.
        """
        check_metadata(**(parts := {name: getattr(self, name) for name in _METADATA_NAMES}))
        return parts


def check_metadata(**entries: object) -> None:
    """Check entries of the metadata, some or all.

    Raises:
        TypeError: a name that is no metadata.
        InvalidArgument: a value of a wrong type.
    """
    unknown = sorted(entries.keys() - set(_METADATA_NAMES))
    if unknown:
        known = ", ".join(_METADATA_NAMES)
        raise TypeError(f"{unknown[0]!r} is not session metadata; there are {known}")
    for name, value in entries.items():
        if name != "attributes":
            check_text_or_none(name, value)
        elif value is not None:
            check_mapping(name, value)


_METADATA_NAMES: Final = tuple(item.name for item in fields(SessionMetadata))


@dataclass(frozen=True, slots=True)
class ClientInfo:
    """What a token is bound to.

    Attributes:
        ip: the client's address.
        user_agent: the client's program.
    """

    ip: str | None = None
    user_agent: str | None = None


def _datetime(wall_seconds: float) -> datetime:
    return datetime.fromtimestamp(wall_seconds, UTC)


Terms: TypeAlias = tuple[float, float, EngineTime]
"""How long a session lives, as in memory (see `memory.tier`): its life, its cap, and whose time.
Most sessions have the same, and share one."""


class Session:
    """One whole version of a session, immutable. Values are unpacked on access, fresh each time.

    ``session["cart"]``, ``session.get("cart")``, ``"cart" in session``, ``list(session)``,
    ``len(session)`` and ``dict(session.data)`` read fields; changing what they return changes
    nothing but the caller's copy. (Nothing keeps you from assigning to `id`, a plain slot because
    views are made on the hottest path; it would change nothing but this view.)
    """

    __slots__ = ("_accessed", "_layout", "_record", "_skew", "_terms", "id")

    # No __init__: views are made on the hottest path there is (`MemoryTier.access`), and an
    # empty constructor plus four assignments takes half the time of a constructor in Python.
    id: str
    _record: bytes
    _accessed: float
    _terms: Terms
    _layout: rec.Layout  # once a field of a large record has been asked for
    _skew: float  # once a time has been asked for

    @classmethod
    def view(
        cls,
        session_id: str,
        record: bytes,
        accessed: float,
        terms: Terms,
    ) -> Session:
        """Return a view of `record`. Times are engine seconds."""
        session = cls()
        session.id = session_id
        session._record = record
        session._accessed = accessed
        session._terms = terms
        return session

    def _get_layout(self) -> rec.Layout:
        """Return where the fields are; of a large record, that is worked out once."""
        record = self._record
        if len(record) <= _LARGE_RECORD_BYTES:
            return rec.layout_of(record)
        try:
            return self._layout
        except AttributeError:
            layout = self._layout = rec.layout_of(record)
            return layout

    def __getitem__(self, name: str) -> Any:
        record = self._record
        if len(record) <= _LARGE_RECORD_BYTES:
            packed = rec.packed_field(record, name)
        else:
            packed = rec.field_in(record, self._get_layout(), name)
        if packed is None:
            raise KeyError(name)
        return rec.unpack_value(packed)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of `name`, or `default` where the session has no such field."""
        packed = rec.field_in(self._record, self._get_layout(), name)
        return default if packed is None else rec.unpack_value(packed)

    def __contains__(self, name: object) -> bool:
        return name in self._get_layout()[0].places

    def __iter__(self) -> Iterator[str]:
        return iter(self._get_layout()[0].names)

    def __len__(self) -> int:
        return len(self._get_layout()[0].names)

    def __bool__(self) -> bool:
        """True, also without any field: ``if session:`` asks whether there is one."""
        return True

    def keys(self) -> list[str]:
        """Return the fields' names, in the order in which they were first set."""
        return list(self._get_layout()[0].names)

    def values(self) -> list[Any]:
        """Return the fields' values, unpacked, fresh each time."""
        return list(self.data.values())

    def items(self) -> list[tuple[str, Any]]:
        """Return the fields' names and values, unpacked, fresh each time."""
        return list(self.data.items())

    @property
    def data(self) -> dict[str, Any]:
        """All fields, unpacked: a fresh dict of fresh values each time."""
        unpack = rec.unpack_value
        return {name: unpack(packed) for name, packed in rec.packed_fields(self._record).items()}

    @property
    def version(self) -> int:
        """1 at creation, +1 for each commit. For people and ordering."""
        return rec.version_of(self._record)

    @property
    def user_id(self) -> str | None:
        """The user the session was created for."""
        return rec.meta_of(self._record).get(USER_ID)

    @property
    def metadata(self) -> SessionMetadata:
        """What was told about the client."""
        meta = rec.meta_of(self._record)
        return SessionMetadata(**{name: meta[name] for name in _METADATA_NAMES if name in meta})

    @property
    def max_requests(self) -> int | None:
        """The session's own request limit; None: the configured one."""
        return rec.meta_of(self._record).get(MAX_REQUESTS)

    @property
    def created_at(self) -> datetime:
        """When the session was created, aware UTC."""
        return _datetime(rec.created_of(self._record))

    def _shown(self, engine_seconds: float) -> datetime:
        """Return a time of this view; all of them are shown by the wall clock of one moment."""
        try:
            skew = self._skew
        except AttributeError:
            skew = self._skew = self._terms[2].skew()
        return _datetime(engine_seconds + skew)

    @property
    def last_accessed(self) -> datetime:
        """When the session was last accessed, this access included, aware UTC."""
        return self._shown(self._accessed)

    @property
    def expires_at(self) -> datetime | None:
        """When the session expires if nobody accesses it again, aware UTC; None: never."""
        life, cap, _ = self._terms
        deadline = min(self._accessed + life if life > 0 else -life, cap)
        if deadline == rec.NEVER:
            return None
        if life > 0 and deadline < cap:  # not one microsecond more or less than the TTL
            return self.last_accessed + timedelta(seconds=life)
        return self._shown(deadline)

    @property
    def lifetime_ends_at(self) -> datetime | None:
        """When the session ends at the latest, renewed or not, aware UTC; None: no such limit.

        Fixed at its creation, by ``session.max_lifetime_seconds``.
        """
        _, cap, _ = self._terms
        return None if cap == rec.NEVER else self._shown(cap)

    @property
    def ttl_seconds(self) -> float:
        """The session's TTL, seconds; 0: never expires."""
        return rec.ttl_of(self._record)

    @property
    def auto_renew(self) -> bool:
        """Whether an access moves the deadline."""
        return bool(rec.flags_of(self._record) & rec.RENEWS)

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """Return what a copy is made of, here or in another process: all but the layout.

        That cannot be pickled, and is worked out again.
        """
        names = (name for name in self.__slots__ if name != "_layout" and hasattr(self, name))
        return None, {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        return f"<Session {self.id!a} version {self.version}, fields {self.keys()}>"


class Changes(NamedTuple):
    """What an edit changed, packed.

    Attributes:
        values: the new values of fields that were there before; names and order stay.
        fields: all fields instead, where some came or went; else None.
        layout: of the record that was edited, where it is at hand.
    """

    values: dict[str, bytes]
    fields: dict[str, bytes | memoryview] | None = None
    layout: rec.Layout | None = None


_new_changes = tuple.__new__  # the constructor of a NamedTuple is a call in Python


class SessionDraft(MutableMapping[str, Any]):
    """A session's data while it is being edited: a mutable mapping, all or nothing.

    Nested changes are noticed: at the end, each field that was read is packed again and its
    bytes are compared. Exact, and without proxies.
    """

    __slots__ = ("_before", "_closed", "_layout", "_record", "_removed", "_values")

    def __init__(self, record: bytes) -> None:
        self._record = record
        self._layout = rec.layout_of(record)
        self._before: dict[str, bytes | None] = {}  # as stored, of the fields in `_values`
        self._values: dict[str, Any] = {}
        self._removed: frozenset[str] = _NOTHING
        self._closed = False

    def _refuse(self) -> NoReturn:
        raise ConflictError("this edit has ended; start another one with edit()")

    def __getitem__(self, name: str) -> Any:
        if self._closed:
            self._refuse()
        values = self._values
        if name in values:
            return values[name]
        if name in self._removed:
            raise KeyError(name)
        packed = self._before[name] = self._stored(name)
        value = values[name] = rec.unpack_value(packed)
        return value

    def _stored(self, name: str) -> bytes:
        """Return the packed value of a field before the edit.

        Raises:
            KeyError: there was no such field.
        """
        shape, ends, at = self._layout
        place = shape.places[name]
        return self._record[at + ends[place - 1] if place else at : at + ends[place]]

    def __setitem__(self, name: str, value: Any) -> None:
        if self._closed:
            self._refuse()
        if type(name) is not str:
            rec.check_field_name(name)
        values = self._values
        if name not in values:
            stored = name in self._layout[0].places
            self._before[name] = self._stored(name) if stored else None
        values[name] = value
        if self._removed:
            self._removed = self._removed - {name}

    def __delitem__(self, name: str) -> None:
        if self._closed:
            self._refuse()
        if name not in self:
            raise KeyError(name)
        self._values.pop(name, None)
        self._before.pop(name, None)
        self._removed = self._removed | {name}

    def clear(self) -> None:
        """Remove all fields."""
        if self._closed:
            self._refuse()
        self._values.clear()
        self._before.clear()
        self._removed = frozenset(self._layout[0].names)

    def __contains__(self, name: object) -> bool:
        if self._closed:
            self._refuse()
        if name in self._values:
            return True
        return name in self._layout[0].places and name not in self._removed

    def __iter__(self) -> Iterator[str]:
        if self._closed:
            self._refuse()
        stored, removed = self._layout[0].places, self._removed
        names = [name for name in stored if name not in removed]
        names += [name for name in self._values if name not in stored]
        return iter(names)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        if self._closed:
            return "<SessionDraft of an edit that has ended>"
        return f"<SessionDraft, fields {list(self)}>"

    def close(self) -> None:
        """End the draft: later access through a kept reference raises ConflictError."""
        self._closed = True

    def changes(self) -> Changes | None:
        """Return what was changed, or None: nothing.

        Raises:
            ValueNotSerializable: a value cannot be stored; names field and type.
        """
        changed: dict[str, bytes] = {}
        before = self._before
        grows = False
        for name, value in self._values.items():
            packed = rec.pack_value(value, name)
            known = before[name]
            if known != packed:
                changed[name] = packed
                grows = grows or known is None
        if not grows and not self._removed:
            return _new_changes(Changes, (changed, None, self._layout)) if changed else None
        return self._restructured(changed)

    def _restructured(self, changed: dict[str, bytes]) -> Changes | None:
        """The same where fields came or went."""
        stored = rec.packed_fields(self._record)
        fields = {name: value for name, value in stored.items() if name not in self._removed}
        if not changed and len(fields) == len(stored):
            return None  # what was removed had been new
        return Changes({}, {**fields, **changed})
