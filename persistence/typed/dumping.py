"""Objects to plain values: maps, lists and what else can be stored."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from typing import Any, Final, NamedTuple
from uuid import UUID

from persistence.errors import ValueNotSerializable, printable
from persistence.typed.classes import Kind, is_unset_type, kind_of, stored_names, tag_of

LEAVES: Final = frozenset(
    {str, int, float, bool, type(None), bytes, bytearray, datetime, date, Decimal, UUID}
)
"""The classes of values that are stored as they are, and have nothing in them."""
_CONTAINERS: Final = frozenset({dict, list, tuple, set, frozenset})
_MAX_DEPTH: Final = 600  # what may be stored is nested less deeply


class Dumped(NamedTuple):
    """What a field's value is stored as.

    Attributes:
        value: plain.
        had_objects: whether there were objects in it, or enumerations.
    """

    value: Any
    had_objects: bool


class _Unstorable(Exception):
    """There is no plain value for an object; becomes ValueNotSerializable with the field's name."""


class _Parts(NamedTuple):
    """Stands for a container whose parts lie in front of it."""

    kind: type
    size: int


def plain(value: Any) -> Any:
    """Return a copy of `value` with each object in it as a map, each enumeration as its value."""
    return _dump(value).value


def dump_field(name: object, value: Any) -> Dumped:
    """Return what a field's value is stored as.

    Raises:
        ValueNotSerializable: it has objects that cannot be stored.
    """
    try:
        return _dump(value)
    except _Unstorable as error:
        raise ValueNotSerializable(
            f"field {printable(name)} cannot be stored: {error}; nothing was written"
        ) from error.__cause__


def dump_object(value: Any) -> dict[str, Any]:
    """Return the fields that an object stands for.

    Raises:
        ValueNotSerializable: it has objects that cannot be stored.
    """
    if kind_of(type(value)) is Kind.MODEL:
        return {name: dump_field(name, each).value for name, each in _model_fields(value).items()}
    try:
        found = _attributes_of(value)
    except _Unstorable as error:
        raise ValueNotSerializable(f"{error}; nothing was written") from error.__cause__
    return {name: dump_field(name, each).value for name, each in found.items()}


def _model_fields(model: Any) -> Mapping[Any, Any]:
    try:
        fields = _model_dump(model)
    except _Unstorable as error:
        name = next((name for name in type(model).model_fields if _fails(model, name)), "")
        raise ValueNotSerializable(
            f"field {printable(name)} cannot be stored: {error}; nothing was written"
        ) from error.__cause__
    if isinstance(fields, Mapping):
        return fields
    raise ValueNotSerializable(
        f"{type(model).__qualname__} makes a {type(fields).__name__} of itself, and a session has "
        "fields: let its serializer return a dict; nothing was written"
    )


def _fails(model: Any, name: str) -> bool:
    try:
        _model_dump(model, include={name})
    except _Unstorable:
        return True
    return False


def _model_dump(model: Any, **options: Any) -> Any:
    try:
        # Without warnings: a value of a wrong type is refused when it is to be written.
        return model.model_dump(by_alias=True, warnings=False, **options)
    except Exception as error:  # the application's serializers may raise anything
        raise _Unstorable(f"{type(model).__qualname__} cannot be dumped: {error}") from error


def _dump(value: Any) -> Dumped:
    """Return what `value` is stored as.

    Without recursion: how deep a value may be must not depend on the stack of whoever stores it.
    """
    todo: list[Any] = [value]  # values, and marks at which a container's parts are all in `done`
    done: list[Any] = []
    depth = 0
    had_objects = False
    while todo:
        item = todo.pop()
        kind = type(item)
        if kind in LEAVES:
            done.append(item)
        elif kind in _CONTAINERS:
            depth += 1
            if depth > _MAX_DEPTH:
                raise _Unstorable("nested too deeply, or in a circle")
            parts = [*item.keys(), *item.values()] if kind is dict else [*item]
            if LEAVES.issuperset(map(type, parts)):
                depth -= 1
                done.append(kind(item))
            else:
                todo.append(_Parts(kind, len(parts)))
                todo += reversed(parts)
        elif kind is _Parts:
            depth -= 1
            start = len(done) - item.size
            done[start:] = [_assembled(item.kind, done[start:])]
        else:
            stands_for = _stands_for(item)
            had_objects = had_objects or stands_for is not item
            (done if stands_for is item else todo).append(stands_for)
    return Dumped(done[0], had_objects)


def _stands_for(value: Any) -> Any:
    """Return the map or value that an object stands for; itself if it is none."""
    if isinstance(value, Enum):
        return value.value
    shape = kind_of(type(value))
    if shape is Kind.MODEL:
        return _model_dump(value)
    if shape is None:
        return value  # `pack_value` says what it thinks of it
    return _attributes_of(value)


def _attributes_of(value: Any) -> dict[str, Any]:
    kind: Any = type(value)
    names = stored_names(kind).items()
    try:
        found = {**tag_of(kind), **{stored: getattr(value, name) for stored, name in names}}
    except AttributeError as error:  # one that was deleted, or never set
        raise _Unstorable(f"an object cannot be stored: {error}") from error
    if kind_of(kind) is Kind.STRUCT:
        return {name: each for name, each in found.items() if not is_unset_type(type(each))}
    return found


def _assembled(kind: type, parts: list[Any]) -> Any:
    try:
        if kind is dict:
            half = len(parts) // 2
            return dict(zip(parts[:half], parts[half:], strict=True))
        return kind(parts)
    except TypeError as error:
        where = "as a key of a dict" if kind is dict else f"in a {kind.__name__}"
        raise _Unstorable(
            f"an object {where} is stored as a map, which cannot be there: use a list"
        ) from error
