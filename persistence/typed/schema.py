"""What the fields of sessions are to the application, and an object that is being edited."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from persistence import record as rec
from persistence.errors import (
    InvalidArgument,
    ValueNotSerializable,
    printable,
)
from persistence.typed.classes import (
    computed_names,
    is_opaque,
    is_root_model,
    keeps_extras,
    kind_of,
    older_names,
    stored_names,
)
from persistence.typed.dumping import dump_field, dump_object, plain
from persistence.typed.leaves import Reader, Run
from persistence.typed.loading import class_reader, reader_of
from persistence.typed.mismatch import Mismatch, unreadable, unwritable


class Loaded(NamedTuple):
    """An object made of what is stored.

    Attributes:
        value: the object; a dict of objects for a schema of single fields.
        was_migrated: whether a ``migrate`` hook had a part in it.
    """

    value: Any
    was_migrated: bool


class Schema:
    """What the fields of sessions are to the application.

    Args:
        given: a class, or a mapping of field names to types.

    Raises:
        InvalidArgument: it is neither.
    """

    def __init__(self, given: object) -> None:
        self._whole: type | None = None
        self._fields: dict[str, Reader] = {}
        if isinstance(given, Mapping):
            if not given or not all(type(name) is str for name in given):
                raise InvalidArgument("schema: must map field names (str) to types")
            self._fields = {name: reader_of(wanted) for name, wanted in given.items()}
        elif isinstance(given, type) and kind_of(given) is not None and not is_root_model(given):
            self._whole = given
            stored_names(given)  # are not given twice
        else:
            raise InvalidArgument(
                f"schema = {printable(given)}: must be a msgspec Struct, a dataclass or a pydantic "
                "model of fields, or a mapping of field names to types"
            )

    # --- in -----------------------------------------------------------------------------------

    def plain_data(self, session_id: str, data: object) -> Mapping[Any, Any]:
        """Return the fields of a session that `data`, an object or a mapping, stands for.

        Raises:
            InvalidArgument: it is neither a mapping nor an object of the schema.
            SchemaMismatch: an object has a value of another type than the schema says.
            ValueNotSerializable: an object cannot be stored.
        """
        if self.is_whole_object(data):
            fields = dump_object(data)
            self.check(session_id, fields, [*fields])
            return fields
        if isinstance(data, Mapping):
            return {name: self.plain_value(session_id, name, each) for name, each in data.items()}
        wanted = "a mapping" if self._whole is None else f"a {self._whole.__name__} or a mapping"
        raise InvalidArgument(f"data is a {type(data).__name__}: must be {wanted}")

    def plain_value(self, session_id: str, name: Any, value: object) -> Any:
        """Return what one field's value, an object or a plain one, is stored as.

        Plain values are as those of a session without a schema: they are checked when they are
        read. Objects are checked now.

        Raises:
            SchemaMismatch: an object has a value of another type than the schema says.
            ValueNotSerializable: an object cannot be stored.
        """
        dumped = dump_field(name, value)
        reader = self._field_reader(name) if dumped.had_objects else None
        if reader is not None:
            _check(session_id, (name,), reader, dumped.value)
        return dumped.value

    def is_whole_object(self, value: object) -> bool:
        """Whether `value` is an object of the one class for all fields."""
        return self._whole is not None and isinstance(value, self._whole)

    def dump(self, value: Any) -> dict[str, Any]:
        """Return the fields that an object, or a dict of all fields, stands for.

        Raises:
            ValueNotSerializable: it cannot be stored.
        """
        if self._whole is not None:
            return dump_object(value)
        return {name: dump_field(name, each).value for name, each in value.items()}

    def check(self, session_id: str, fields: Mapping[str, Any], changed: Sequence[str]) -> None:
        """Refuse what is to be written and could not be read back.

        Args:
            session_id: the session.
            fields: all that an object, or a dict of all fields, stands for.
            changed: those that will be written.

        Raises:
            SchemaMismatch: naming field and both types.
            ValueNotSerializable: it is nested too deeply.
        """
        if self._whole is not None:
            _check(session_id, (), class_reader(self._whole), fields)
            return
        for name in changed:
            if name in self._fields:
                _check(session_id, (name,), self._fields[name], fields[name])

    def _field_reader(self, name: Any) -> Reader | None:
        if self._whole is None:
            return self._fields.get(name)
        field = class_reader(self._whole).fields.get(name)
        return None if field is None else field.reader

    # --- out ----------------------------------------------------------------------------------

    def names(self, stored: Sequence[str]) -> list[str]:
        """Return which of the stored fields are read: with single fields typed, all of them."""
        kind = self._whole
        if kind is None or keeps_extras(kind) or is_opaque(kind):
            return list(stored)
        known = {*stored_names(kind), *older_names(kind)}
        return [name for name in stored if name in known]

    def keeps(self, name: str) -> bool:
        """Whether a stored field stays when the object does not have it any more.

        A field stays that is none of the object's. With single fields typed, and with a class that
        keeps more fields than it has attributes, those that have gone were deleted.
        """
        kind = self._whole
        if kind is None:
            return False
        is_extra = name not in stored_names(kind) and name not in computed_names(kind)
        return not (is_extra and keeps_extras(kind))

    def load(self, session_id: str, data: Mapping[str, Any]) -> Loaded:
        """Return the object, or the dict of objects, that stored fields stand for.

        Raises:
            SchemaMismatch: a field is of another type than it is to be, or missing.
        """
        run = Run(may_migrate=True)
        if self._whole is not None:
            return Loaded(
                _read(session_id, (), class_reader(self._whole), data, run), run.was_migrated
            )
        found = {
            name: _read(session_id, (name,), self._fields[name], value, run)
            if name in self._fields
            else value
            for name, value in data.items()
        }
        return Loaded(found, run.was_migrated)

    def open(self, session_id: str, draft: MutableMapping[str, Any]) -> TypedDraft:
        """Return the object of a session that is being edited."""
        return TypedDraft(self, session_id, draft)


def _read(session_id: str, at: tuple[Any, ...], reader: Reader, value: Any, run: Run) -> Any:
    try:
        return reader.read(value, run)
    except Mismatch as mismatch:
        found = mismatch
    except RecursionError as error:
        found = Mismatch(value, "less", fault="what is stored is nested too deeply")
        found.__cause__ = error
    raise unreadable(session_id, at, found) from found.__cause__


def _check(session_id: str, at: tuple[Any, ...], reader: Reader, value: Any) -> None:
    try:
        # A copy: what is made of it may change what it is made of.
        reader.read(plain(value), Run(may_migrate=False))
    except Mismatch as mismatch:
        found = mismatch
    except RecursionError as error:
        raise ValueNotSerializable(
            f"session {printable(session_id)}, field {printable(at[0] if at else '')} cannot be "
            "stored: nested too deeply to be read back; nothing was written"
        ) from error
    else:
        return
    raise unwritable(session_id, at, found) from found.__cause__


class TypedDraft:
    """An object and the draft that it was made of.

    Attributes:
        value: the object, to be changed.
    """

    def __init__(self, schema: Schema, session_id: str, draft: MutableMapping[str, Any]) -> None:
        self._schema = schema
        self._session_id = session_id
        self._draft = draft
        stored = {name: draft[name] for name in schema.names(list(draft))}
        self.value, was_migrated = schema.load(session_id, stored)
        dumped = schema.dump(self.value)
        self._had = dumped.keys()
        self._before = {} if was_migrated else _packed(dumped)

    def write(self, value: Any = None) -> None:
        """Write into the draft what has changed in the object, or all that differs in `value`.

        Fields that the schema does not know stay, and those that the object does not have any more
        go. A default that was only filled in is not written.

        Raises:
            SchemaMismatch: what has changed is of another type than the schema says.
            ValueNotSerializable: it cannot be stored.
        """
        dumped = self._schema.dump(self.value if value is None else value)
        packed = _packed(dumped)
        changed = [name for name in packed if self._before.get(name) != packed[name]]
        # What the object had, and has no more: a class may leave out what is None, say.
        lost = [name for name in self._draft if name not in dumped and self._is_lost(name)]
        if changed or lost:
            self._schema.check(self._session_id, dumped, changed)
        for name in lost:
            del self._draft[name]
        for name in changed:
            self._draft[name] = dumped[name]

    def _is_lost(self, name: str) -> bool:
        return name in self._had or not self._schema.keeps(name)

    def apply(self, function: Callable[[Any], Any]) -> Any:
        """Call `function` with the object and write what it changed, or what it returned.

        Only an object of the schema's class is written instead. What else a function returns is
        ignored, also a dict: that may be one field's value, as ``fields.pop("note")`` returns.
        """
        result = function(self.value)
        if hasattr(result, "__await__"):
            return result  # to be refused
        self.write(result if self._schema.is_whole_object(result) else None)
        return None


def _packed(fields_of: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: rec.pack_value(value, name) for name, value in fields_of.items()}
