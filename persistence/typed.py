"""Typed sessions: objects of the application in and out, plain MessagePack in between.

A `Schema` is one class for a whole session, whose attributes are the session's fields, or a mapping
of field names to types. msgspec Structs, dataclasses and pydantic models will do, also inside each
other and inside lists and dicts. What is stored is what a plain session has: maps, lists and
values; so an older or a newer class, or no class at all, can read it.

When the class has changed since a session was written:

- a field that was added gets its default;
- a field that was removed is kept and ignored, also when the object is written back;
- a field whose type has changed: the class' ``migrate`` hook is asked, if it has one: a class
  method or static method that gets what is stored, plain, and returns what is to be read instead.
  Without one, or if that does not fit either: `SchemaMismatch`. Nothing stored is changed by
  reading.

Text is no number and the other way round: a value of another kind than the type says is never
converted silently (pydantic models convert what pydantic converts, unless they are strict).
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from typing import Annotated, Any, Final, NamedTuple, Union, get_args, get_origin, get_type_hints
from uuid import UUID

from persistence import record as rec
from persistence.errors import InvalidArgument, SchemaMismatch, printable

_MSGSPEC_PLACE: Final = re.compile(r"`\$((?:[.\[][^`]*)?)`$")
_STEP: Final = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_MISSING: Final = re.compile(r"missing required field `([^`]+)`")


class Loaded(NamedTuple):
    """An object made of what is stored.

    Attributes:
        value: the object; a dict of objects for a schema of single fields.
        was_migrated: whether the class' ``migrate`` had a part in it.
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
        self._fields: dict[str, Any] = {}
        if isinstance(given, Mapping):
            if not given or not all(type(name) is str for name in given):
                raise InvalidArgument("schema: must map field names (str) to types")
            self._fields = dict(given)
        elif isinstance(given, type) and _kind(given) is not None:
            self._whole = given
        else:
            raise InvalidArgument(
                f"schema = {printable(given)}: must be a msgspec Struct, a dataclass or a pydantic "
                "model, or a mapping of field names to types"
            )

    @property
    def is_whole(self) -> bool:
        """Whether it is one class for all fields that it knows."""
        return self._whole is not None

    # --- in -----------------------------------------------------------------------------------

    def plain_data(self, data: object) -> Mapping[Any, Any]:
        """Return the fields of a session that `data`, an object or a mapping, stands for.

        Raises:
            InvalidArgument: it is neither a mapping nor an object of the schema.
        """
        if self.is_whole_object(data):
            return self.dump(data)
        if isinstance(data, Mapping):
            return {name: plain(value) for name, value in data.items()}
        wanted = "a mapping" if self._whole is None else f"a {self._whole.__name__} or a mapping"
        raise InvalidArgument(f"data is a {type(data).__name__}: must be {wanted}")

    def plain_value(self, value: object) -> Any:
        """Return what one field's value, an object or a plain one, is stored as."""
        return plain(value)

    def dump(self, value: Any) -> dict[str, Any]:
        """Return the fields that an object stands for, plain."""
        dumped = plain(value)
        assert isinstance(dumped, dict), "a schema's object is a map"
        return dumped

    # --- out ----------------------------------------------------------------------------------

    def names(self, stored: Sequence[str]) -> list[str]:
        """Return which of the stored fields are read: with single fields typed, all of them."""
        if self._whole is None:
            return list(stored)
        known = _names(self._whole)
        return [name for name in stored if name in known]

    def load(self, session_id: str, data: Mapping[str, Any]) -> Loaded:
        """Return the object, or the dict of objects, that stored fields stand for.

        Raises:
            SchemaMismatch: a field is of another type than it is to be, or missing.
        """
        if self._whole is not None:
            return _load(session_id, (), self._whole, dict(data))
        found = {}
        was_migrated = False
        for name, value in data.items():
            loaded = Loaded(value, False)
            if name in self._fields:
                loaded = _load(session_id, (name,), self._fields[name], value)
            found[name] = loaded.value
            was_migrated = was_migrated or loaded.was_migrated
        return Loaded(found, was_migrated)

    def is_whole_object(self, value: object) -> bool:
        """Whether `value` is an object of the one class for all fields."""
        return self._whole is not None and isinstance(value, self._whole)

    def open(self, session_id: str, draft: MutableMapping[str, Any]) -> TypedDraft:
        """Return the object of a session that is being edited."""
        return TypedDraft(self, session_id, draft)


class TypedDraft:
    """An object and the draft that it was made of.

    Attributes:
        value: the object, to be changed.
    """

    def __init__(self, schema: Schema, session_id: str, draft: MutableMapping[str, Any]) -> None:
        self._schema = schema
        self._draft = draft
        stored = {name: draft[name] for name in schema.names(list(draft))}
        self.value, self._was_migrated = schema.load(session_id, stored)
        self._before = {} if self._was_migrated else _packed(schema.dump(self.value))

    def write(self, value: Any = None) -> None:
        """Write into the draft what has changed in the object, or all that differs in `value`.

        Fields that the schema does not know stay. A default that was only filled in is not
        written.
        """
        dumped = self._schema.dump(self.value if value is None else value)
        if not self._schema.is_whole:
            for name in [name for name in self._draft if name not in dumped]:
                del self._draft[name]
        for name, packed in _packed(dumped).items():
            if self._before.get(name) != packed:
                self._draft[name] = dumped[name]

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


# --- objects to plain values ----------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Return `value` with each object in it as a map, and each enumeration as its value."""
    kind: Any = type(value)
    if kind in _LEAVES:
        return value
    if kind is dict:
        return {plain(key): plain(each) for key, each in value.items()}
    if kind in _SEQUENCES:
        return kind(map(plain, value))
    if isinstance(value, Enum):
        return plain(value.value)
    shape = _kind(kind)
    if shape == "pydantic":
        return plain(value.model_dump(by_alias=True))
    if shape is not None:
        found = {stored: plain(getattr(value, name)) for stored, name in _names(kind).items()}
        return {**_tag(kind), **found}
    return value  # `pack_value` says what it thinks of it


_LEAVES: Final = frozenset({str, int, float, bool, type(None), bytes, bytearray, datetime, date})
_SEQUENCES: Final = frozenset({list, tuple, set, frozenset})


@lru_cache(maxsize=1024)
def _kind(kind: Any) -> str | None:
    """Return which of the three kinds of classes it is; None: none of them."""
    if not isinstance(kind, type):
        return None
    msgspec = sys.modules.get("msgspec")  # whoever has a Struct has loaded it
    if msgspec is not None and issubclass(kind, msgspec.Struct):
        return "msgspec"
    if hasattr(kind, "model_validate") and hasattr(kind, "model_dump"):
        return "pydantic"
    return "dataclass" if is_dataclass(kind) else None


@lru_cache(maxsize=1024)
def _names(kind: Any) -> dict[str, str]:
    """Return the names under which the attributes of a class are stored -> those attributes."""
    shape = _kind(kind)
    if shape == "msgspec":
        structs = sys.modules["msgspec"].structs
        return {each.encode_name: each.name for each in structs.fields(kind)}
    if shape == "pydantic":
        items = kind.model_fields.items()
        return {each.alias or name: name for name, each in items}
    return {each.name: each.name for each in fields(kind) if each.init}


def _tag(kind: type) -> dict[str, Any]:
    """Return what tells one Struct of a union from the others."""
    config = getattr(kind, "__struct_config__", None)
    return {} if config is None or config.tag is None else {config.tag_field: config.tag}


# --- plain values to objects ----------------------------------------------------------------------


class _Mismatch(Exception):
    """A value is not what its type says.

    Attributes:
        path: where, from the top of what was converted.
        is_missing: there is no value, and no default.
        said: what the library said.
    """

    def __init__(self, path: tuple[Any, ...], said: str, *, is_missing: bool = False) -> None:
        self.path = path
        self.said = said
        self.is_missing = is_missing


def _load(session_id: str, at: tuple[Any, ...], wanted: Any, value: Any) -> Loaded:
    """Return the object that a plain value stands for, migrated if it has to be."""
    try:
        return Loaded(_converted(wanted, value), False)
    except _Mismatch as mismatch:
        first = mismatch
    migrate = getattr(wanted, "migrate", None)
    if not callable(migrate):
        raise _refusal(session_id, at, wanted, value, first) from None
    migrated = migrate(value)
    try:
        return Loaded(_converted(wanted, migrated), True)
    except _Mismatch as mismatch:
        raise _refusal(session_id, at, wanted, migrated, mismatch) from None


def _refusal(
    session_id: str, at: tuple[Any, ...], wanted: Any, value: Any, mismatch: _Mismatch
) -> SchemaMismatch:
    place = "".join(
        f"[{each}]" if isinstance(each, int) else f".{each}" for each in (*at, *mismatch.path)
    )
    stored = "nothing" if mismatch.is_missing else _name(type(_value_at(value, mismatch.path)))
    hint = _hint_at(wanted, mismatch.path)
    asked = mismatch.said if hint is None else _name(hint)
    return SchemaMismatch(session_id, place.lstrip("."), stored, asked, _name(wanted))


def _converted(wanted: Any, value: Any) -> Any:
    """Return `value` as what `wanted` says.

    Raises:
        _Mismatch: it is something else.
    """
    if _has_struct(wanted):
        return _by_msgspec(wanted, value)
    shape = _kind(wanted)
    if shape is not None and isinstance(value, Mapping):
        known = _names(wanted)
        value = {name: each for name, each in value.items() if name in known}
    made = _by_pydantic(wanted, value)
    if shape != "pydantic":
        _check_kinds(value, plain(made), ())
    return made


def _by_msgspec(wanted: Any, value: Any) -> Any:
    msgspec = sys.modules["msgspec"]
    try:
        return msgspec.convert(value, wanted, str_keys=False)
    except msgspec.ValidationError as error:
        said = str(error)
    place = _MSGSPEC_PLACE.search(said)
    steps = _STEP.findall(place[1]) if place else []
    path: tuple[Any, ...] = tuple(
        name or (int(index) if index.isdigit() else index) for name, index in steps
    )
    missing = _MISSING.search(said)
    if missing:
        raise _Mismatch((*path, missing[1]), said, is_missing=True)
    raise _Mismatch(path, said)


def _by_pydantic(wanted: Any, value: Any) -> Any:
    from pydantic import (  # noqa: PLC0415 - for those who have a schema
        PydanticUndefinedAnnotation,
        PydanticUserError,
        ValidationError,
    )

    try:
        return _adapter(wanted).validate_python(value)
    except (PydanticUserError, PydanticUndefinedAnnotation) as error:
        said = str(error).partition("\n")[0]
        raise InvalidArgument(
            f"schema: {_name(wanted)} has a type that objects cannot be made of: {said}"
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    raise _Mismatch(first["loc"], first["msg"], is_missing=first["type"] == "missing")


@lru_cache(maxsize=1024)
def _adapter(wanted: Any) -> Any:
    from pydantic import TypeAdapter  # noqa: PLC0415 - as above

    return TypeAdapter(wanted)


def _has_struct(wanted: Any) -> bool:
    if _kind(wanted) == "msgspec":
        return True
    return any(map(_has_struct, get_args(wanted)))


def _check_kinds(before: Any, after: Any, path: tuple[Any, ...]) -> None:
    """Refuse what was converted from one kind of value into another.

    Raises:
        _Mismatch: naming the first such place.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        for name, each in before.items():
            if name in after:
                _check_kinds(each, after[name], (*path, name))
    elif isinstance(before, list | tuple) and isinstance(after, list | tuple):
        for place, (each, now) in enumerate(zip(before, after, strict=False)):
            _check_kinds(each, now, (*path, place))
    elif _kind_of_value(before) != _kind_of_value(after) and not (
        type(before) is int and type(after) is float
    ):
        raise _Mismatch(path, f"{_name(type(after))}")


def _kind_of_value(value: Any) -> object:
    if isinstance(value, list | tuple | set | frozenset):
        return "several"
    if isinstance(value, bytes | bytearray):
        return bytes
    for kind in (bool, int, float, str, datetime, date, time, timedelta, UUID, Decimal, dict):
        if isinstance(value, kind):
            return kind
    return type(value)


# --- what is said about a mismatch ----------------------------------------------------------------


def _name(kind: Any) -> str:
    if isinstance(kind, type) and not get_args(kind):
        return kind.__qualname__
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", str(kind))


def _value_at(value: Any, path: tuple[Any, ...]) -> Any:
    """Return the value at `path`, as far as there is one."""
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return value
    return value


def _hint_at(wanted: Any, path: tuple[Any, ...]) -> Any:
    """Return the type that is wanted at `path`; None: it cannot be told."""
    for step in path:
        wanted = _hint_of(_without_none(wanted), step)
        if wanted is None:
            return None
    return wanted


def _hint_of(wanted: Any, step: Any) -> Any:
    """Return the type of one element of what is wanted."""
    if _kind(wanted) is not None:
        try:
            return get_type_hints(wanted).get(_names(wanted).get(step, step))
        except (NameError, TypeError):
            return None
    arguments = get_args(wanted)
    if not arguments:
        return None
    origin = get_origin(wanted)
    if origin is dict or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return arguments[1]
    if origin is tuple and isinstance(step, int) and len(arguments) > step:
        return arguments[0] if arguments[-1] is ... else arguments[step]
    return arguments[0]


def _without_none(wanted: Any) -> Any:
    if get_origin(wanted) is Annotated:
        return _without_none(get_args(wanted)[0])
    if get_origin(wanted) in (Union, types.UnionType):
        some = [each for each in get_args(wanted) if each is not type(None)]
        return some[0] if len(some) == 1 else wanted
    return wanted
