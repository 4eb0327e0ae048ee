"""Values without objects in them, converted by the library that their class belongs to.

Libraries convert: text to dates, or to bytes. Here whatever became another kind of value is
refused, unless it is a model of pydantic's that asks for it.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import cached_property
from typing import Annotated, Any, Final, Protocol, Union, get_args, get_origin, get_type_hints
from uuid import UUID

from persistence.errors import InvalidArgument
from persistence.typed.classes import kind_of, stored_names
from persistence.typed.dumping import plain
from persistence.typed.mismatch import MISSING, Mismatch, type_name

_MSGSPEC_PLACE: Final = re.compile(r"`\$((?:[.\[][^`]*)?)`$")
_STEP: Final = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_SEVERAL: Final = (list, tuple, set, frozenset)


class Run:
    """One reading of stored values.

    Args:
        may_migrate: whether ``migrate`` hooks are asked.

    Attributes:
        was_migrated: whether one had a part in it.
    """

    def __init__(self, *, may_migrate: bool) -> None:
        self.may_migrate = may_migrate
        self.was_migrated = False


class Reader(Protocol):
    """Makes of plain values what one type says."""

    def read(self, value: Any, run: Run) -> Any:
        """Return what `value` stands for.

        Raises:
            Mismatch: it is something else.
            InvalidArgument: the type is none that objects can be made of.
        """


class Untouched:
    """Values that pydantic converts later, with the model that they belong to."""

    def __init__(self, wanted: Any) -> None:
        """Take whatever is wanted."""

    def read(self, value: Any, _: Run) -> Any:
        """Return the value."""
        return value


class _Leaf:
    """Values of one type.

    Args:
        wanted: the type.
        converts: whether another kind of value may come of it.
    """

    def __init__(self, wanted: Any, *, converts: bool = False) -> None:
        self._wanted = wanted
        self._converts = converts


class ByPydantic(_Leaf):
    """Values of dataclasses, and of single fields; see `_Leaf`."""

    @cached_property
    def _adapter(self) -> Any:
        from pydantic import TypeAdapter  # noqa: PLC0415 - for those who have a schema

        return TypeAdapter(self._wanted)

    def read(self, value: Any, _: Run) -> Any:
        """Return what `value` stands for; see `Reader`."""
        made = validated(lambda: self._adapter.validate_python(value), self._wanted, value)
        if not self._converts:
            check_kinds(value, made, self._wanted)
        return made


class ByMsgspec(_Leaf):
    """Values of Structs; see `_Leaf`."""

    def read(self, value: Any, _: Run) -> Any:
        """Return what `value` stands for; see `Reader`."""
        msgspec = sys.modules["msgspec"]
        try:
            made = msgspec.convert(value, self._wanted, str_keys=False)
        except msgspec.ValidationError as error:
            raise _mismatch_at(value, self._wanted, _path_in(str(error)), str(error)) from None
        except TypeError as error:
            raise no_objects_of(self._wanted, str(error)) from error
        if not self._converts:
            check_kinds(value, made, self._wanted)
        return made


def validated(validate: Any, wanted: Any, value: Any) -> Any:
    """Return what pydantic makes of `value`.

    Raises:
        Mismatch: it is something else.
        InvalidArgument: pydantic cannot make objects of `wanted`.
    """
    from pydantic import (  # noqa: PLC0415 - as above
        PydanticUndefinedAnnotation,
        PydanticUserError,
        ValidationError,
    )

    try:
        return validate()
    except (PydanticUserError, PydanticUndefinedAnnotation) as error:
        raise no_objects_of(wanted, str(error).partition("\n")[0]) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    found = _mismatch_at(value, wanted, tuple(first["loc"]), first["msg"])
    if first["type"] == "missing":
        found.value = MISSING
    raise found


def no_objects_of(wanted: Any, said: str) -> InvalidArgument:
    """Return the error for a type that no library makes objects of."""
    return InvalidArgument(
        f"schema: {type_name(wanted)} has a type that objects cannot be made of: {said}"
    )


def _path_in(said: str) -> tuple[Any, ...]:
    """Return the path that a message of msgspec ends with."""
    place = _MSGSPEC_PLACE.search(said)
    steps = _STEP.findall(place[1]) if place else []
    return tuple(name or (int(index) if index.isdigit() else index) for name, index in steps)


# --- kinds of values ------------------------------------------------------------------------------


def check_kinds(before: Any, made: Any, wanted: Any) -> None:
    """Refuse what was converted from one kind of value into another.

    Raises:
        Mismatch: naming the first such place.
    """
    if made is before:
        return
    path = _path_to_another_kind(before, plain(made), ())
    if path is not None:
        found = _mismatch_at(before, wanted, path, type_name(type(made)))
        found.said = "it would have to be converted"
        raise found


def _path_to_another_kind(before: Any, after: Any, path: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        if not _same_kinds(before, after):
            return path
        pairs: Iterable[Any] = (
            (name, before[name], after[name]) for name in before if name in after
        )
    elif isinstance(before, list | tuple) and isinstance(after, list | tuple):
        pairs = zip(range(len(before)), before, after, strict=False)
    elif isinstance(before, _SEVERAL) and isinstance(after, _SEVERAL):
        return None if _same_kinds(before, after) else path
    else:
        return None if _same_kind(before, after) else path
    for step, each, now in pairs:
        found = _path_to_another_kind(each, now, (*path, step))
        if found is not None:
            return found
    return None


def _same_kinds(before: Iterable[Any], after: Iterable[Any]) -> bool:
    """Whether elements without an order, or keys, are of the same kinds."""
    allowed = {_kind_of_value(each) for each in before}
    return all(
        _kind_of_value(each) in allowed or (type(each) is float and int in allowed)
        for each in after
    )


def _same_kind(before: Any, after: Any) -> bool:
    is_widened = type(before) is int and type(after) is float
    return is_widened or _kind_of_value(before) == _kind_of_value(after)


def _kind_of_value(value: Any) -> object:
    if isinstance(value, _SEVERAL):
        return "several"
    if isinstance(value, bytes | bytearray):
        return bytes
    for kind in (bool, int, float, str, datetime, date, time, timedelta, UUID, Decimal, dict):
        if isinstance(value, kind):
            return kind
    return type(value)


# --- places ---------------------------------------------------------------------------------------


def _mismatch_at(value: Any, wanted: Any, path: tuple[Any, ...], said: str) -> Mismatch:
    hint = hint_at(wanted, path)
    found = Mismatch(value_at(value, path), said if hint is None else hint, path)
    found.said = said
    return found


def value_at(value: Any, path: tuple[Any, ...]) -> Any:
    """Return the value at `path`, as far as there is one."""
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return value
    return value


def hint_at(wanted: Any, path: tuple[Any, ...]) -> Any:
    """Return the type that is wanted at `path`; None: it cannot be told."""
    for step in path:
        wanted = _hint_of(_without_none(wanted), step)
        if wanted is None:
            return None
    return wanted


def _hint_of(wanted: Any, step: Any) -> Any:
    """Return the type of one element of what is wanted."""
    if kind_of(wanted) is not None:
        try:
            return get_type_hints(wanted).get(stored_names(wanted).get(step, step))
        except (NameError, TypeError):
            return None
    arguments = get_args(wanted)
    if not arguments:
        return None
    origin = get_origin(wanted)
    if isinstance(origin, type) and issubclass(origin, Mapping):
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
