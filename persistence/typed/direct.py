"""Objects that one library makes by itself, in one call: some ten times as fast.

It can where all classes are of that library, and are stored under the names that it looks for. What
it refuses is read attribute by attribute (see `loading`), which finds out why, and asks the
``migrate`` hooks. So a library must never take here what it would have to convert, unless it is a
model of pydantic's, which asks for that.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from typing import Any, Final, Union, get_args, get_origin
from uuid import UUID

from persistence.errors import InvalidArgument
from persistence.typed.classes import (
    Kind,
    attributes,
    computed_names,
    is_opaque,
    keeps_extras,
    kind_of,
    unwrapped,
)

Make = Callable[[Any], Any]
"""Makes an object of plain values; raises whatever it likes where it cannot."""

_AS_THEY_ARE: Final = (bytes, bytearray, datetime, date, time, timedelta, UUID, Decimal)


def direct_maker(wanted: Any) -> Make | None:
    """Return what makes objects of a class in one call; None: its library alone cannot."""
    kind = kind_of(wanted)
    if kind not in (Kind.STRUCT, Kind.MODEL):
        return None
    try:
        if not _is_of_one_library(wanted, kind, set()):
            return None
    except InvalidArgument:  # the long way says it
        return None
    if kind is Kind.STRUCT:
        # To msgspec those are native to the format, so it makes none of them of text or numbers.
        convert = sys.modules["msgspec"].convert
        make = partial(convert, type=wanted, builtin_types=_AS_THEY_ARE, str_keys=False)
        return partial(_made_without_decimals, make)
    from pydantic import TypeAdapter  # noqa: PLC0415 - for those who have a schema

    validate: Make = TypeAdapter(wanted).validate_python
    return validate


def _made_without_decimals(make: Make, value: Any) -> Any:
    """Return what `make` makes of a value, in which msgspec would take a Decimal for a float."""
    if _has_decimal(value):
        raise TypeError("a Decimal goes the long way")
    return make(value)


def _has_decimal(value: Any) -> bool:
    kind = type(value)
    if kind is dict:
        return any(map(_has_decimal, value.values()))
    if kind in (list, tuple, set, frozenset):
        return any(map(_has_decimal, value))
    return kind is Decimal


def _is_of_one_library(wanted: Any, kind: Kind, seen: set[Any]) -> bool:
    wanted = unwrapped(wanted)
    found = kind_of(wanted)
    if found is not None:
        if wanted in seen:
            return True
        seen.add(wanted)
        return (
            found is kind
            and _is_read_as_it_is_stored(wanted)
            and all(_is_of_one_library(each.wanted, kind, seen) for each in attributes(wanted))
        )
    inner = get_args(wanted)
    origin = get_origin(wanted)
    if origin in (Union, types.UnionType) and sum(map(has_class, inner)) > 1:
        return False  # which of them it is, each library guesses in a way of its own
    if origin is Iterable and has_class(wanted):
        return False  # of which msgspec makes nothing
    return all(_is_of_one_library(each, kind, seen) for each in inner)


def has_class(wanted: Any) -> bool:
    """Whether there are objects of classes in what is wanted."""
    wanted = unwrapped(wanted)
    return kind_of(wanted) is not None or any(map(has_class, get_args(wanted)))


def _is_read_as_it_is_stored(wanted: Any) -> bool:
    kind = get_origin(wanted) or wanted
    if is_opaque(kind) or keeps_extras(kind) or computed_names(kind):
        return False
    if kind_of(kind) is Kind.STRUCT:
        return True
    for each in kind.model_fields.values():
        if hasattr(each.validation_alias, "choices") or each.init is False:
            return False  # it takes names that may be those of something else that is stored
    return all(each.entry == (each.stored,) for each in attributes(wanted))
