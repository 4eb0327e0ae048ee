"""The classes that objects are made of: which there are, and what their attributes are called.

An attribute is stored under one name, and is read under that name again, whatever else a library
calls it: a Struct's encoded name, the name under which pydantic serializes, or its own name.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum, auto
from functools import lru_cache
from inspect import get_annotations
from typing import (
    Any,
    Final,
    Generic,
    NamedTuple,
    NewType,
    Protocol,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from persistence.errors import InvalidArgument
from persistence.typed.mismatch import type_name


class Kind(Enum):
    """What makes the objects of a class."""

    STRUCT = auto()
    DATACLASS = auto()
    MODEL = auto()
    MODEL_DATACLASS = auto()  # of `pydantic.dataclasses`


class Attribute(NamedTuple):
    """One attribute of a class that is stored.

    Attributes:
        name: what the class calls it.
        stored: what it is called in storage.
        wanted: its type.
        is_required: whether no object is made without it; pydantic says so of its own.
        entry: where pydantic looks for it: the steps from the top of what it validates.
    """

    name: str
    stored: str
    wanted: Any
    is_required: bool
    entry: tuple[Any, ...]


def kind_of(wanted: Any) -> Kind | None:
    """Return what kind of class it is; None: none of them."""
    wanted = get_origin(wanted) or wanted
    return _kind_of_class(wanted) if isinstance(wanted, type) else None


@lru_cache(maxsize=1024)
def _kind_of_class(kind: Any) -> Kind | None:
    msgspec = sys.modules.get("msgspec")  # whoever has a Struct has loaded it
    if msgspec is not None and issubclass(kind, msgspec.Struct):
        return Kind.STRUCT
    if hasattr(kind, "model_validate") and hasattr(kind, "model_dump"):
        return Kind.MODEL
    if is_dataclass(kind):
        is_pydantic = "__pydantic_validator__" in vars(kind)
        return Kind.MODEL_DATACLASS if is_pydantic else Kind.DATACLASS
    return None


def unwrapped(wanted: Any) -> Any:
    """Return the type that another name stands for."""
    while True:
        if isinstance(wanted, NewType):
            wanted = wanted.__supertype__
        elif get_origin(wanted) is Final:
            (wanted,) = get_args(wanted)
        elif type(wanted).__name__ == "TypeAliasType":  # from Python 3.12 on
            wanted = wanted.__value__
        else:
            return wanted


def is_unset_type(wanted: Any) -> bool:
    """Whether it is the type of msgspec's mark for an attribute that is not there."""
    msgspec = sys.modules.get("msgspec")
    return msgspec is not None and wanted is msgspec.UnsetType


def is_root_model(kind: Any) -> bool:
    """Whether it is a model of one value, which need not be a map."""
    return bool(getattr(kind, "__pydantic_root_model__", False))


def is_opaque(kind: Any) -> bool:
    """Whether only its own library knows what its objects are stored as."""
    if kind_of(kind) is not Kind.MODEL:
        return False
    return is_root_model(kind) or bool(kind.__pydantic_decorators__.model_serializers)


def keeps_extras(kind: Any) -> bool:
    """Whether its objects have what is stored under other names than those of its attributes."""
    return kind_of(kind) is Kind.MODEL and kind.model_config.get("extra") == "allow"


def forbids_extras(kind: Any) -> bool:
    """Whether no object is made of what has other names than those of its attributes."""
    return kind_of(kind) is Kind.MODEL and kind.model_config.get("extra") == "forbid"


@lru_cache(maxsize=1024)
def computed_names(kind: Any) -> frozenset[str]:
    """Return the names under which is stored what the class computes of its attributes."""
    computed = getattr(kind, "model_computed_fields", {})
    return frozenset(each.alias or name for name, each in computed.items())


def tag_of(kind: Any) -> dict[str, Any]:
    """Return what tells one Struct of a union from the others: a field and its value."""
    config = getattr(kind, "__struct_config__", None)
    return {} if config is None or config.tag is None else {config.tag_field: config.tag}


@lru_cache(maxsize=1024)
def stored_names(kind: Any) -> Mapping[str, str]:
    """Return the names under which the attributes of a class are stored -> those attributes.

    Raises:
        InvalidArgument: two attributes would be stored under one name.
    """
    pairs = _named(kind)
    names = dict(pairs)
    if len(names) < len(pairs):
        twice = next(stored for stored, name in pairs if names[stored] != name)
        raise InvalidArgument(
            f"schema: {type_name(kind)} has two attributes that are stored as {twice!a}: "
            "give one of them another alias"
        )
    return names


def older_names(kind: Any) -> Mapping[str, str]:
    """Return names under which attributes were stored once -> those under which they are now.

    Dataclasses of pydantic's were stored by their own names, outside of models.
    """
    if kind_of(kind) is not Kind.MODEL_DATACLASS:
        return {}
    names = stored_names(kind)
    return {name: stored for stored, name in names.items() if name not in names}


def _pydantic_fields(kind: Any) -> Mapping[str, Any]:
    is_model = kind_of(kind) is Kind.MODEL
    found: Mapping[str, Any] = kind.model_fields if is_model else kind.__pydantic_fields__
    return {name: each for name, each in found.items() if each.init is not False}


def _named(kind: Any) -> list[tuple[str, str]]:
    shape = kind_of(kind)
    if shape is Kind.STRUCT:
        return list(zip(kind.__struct_encode_fields__, kind.__struct_fields__, strict=True))
    if shape in (Kind.MODEL, Kind.MODEL_DATACLASS):
        items = _pydantic_fields(kind).items()
        return [(each.serialization_alias or name, name) for name, each in items]
    return [(each.name, each.name) for each in fields(kind) if each.init]


def attributes(wanted: Any) -> list[Attribute]:
    """Return the attributes of a class, which may be one of a generic one: ``Box[int]``.

    Raises:
        InvalidArgument: their types cannot be found.
    """
    kind = get_origin(wanted) or wanted
    try:
        described = _described(wanted, kind)
    except (NameError, TypeError, AttributeError) as error:
        raise InvalidArgument(
            f"schema: {type_name(kind)} has a type that objects cannot be made of: {error}"
        ) from error
    return [
        Attribute(name, stored, *described[name]) for stored, name in stored_names(kind).items()
    ]


def _described(wanted: Any, kind: Any) -> dict[str, tuple[Any, bool, tuple[Any, ...]]]:
    """Return of each attribute its type, `Attribute.is_required` and `Attribute.entry`."""
    shape = kind_of(kind)
    if shape is Kind.STRUCT:
        found = sys.modules["msgspec"].structs.fields(wanted)
        return {each.name: (each.type, each.required, (each.name,)) for each in found}
    if shape is Kind.DATACLASS:
        hints = get_type_hints(kind, include_extras=True)
        given = _given(wanted)
        return {
            each.name: (
                _substituted(hints[each.name], given[_annotating(kind, each.name)]),
                each.default is MISSING and each.default_factory is MISSING,
                (each.name,),
            )
            for each in fields(kind)
        }
    if shape is Kind.MODEL and not kind.__pydantic_complete__:
        kind.model_rebuild()
    config = kind.model_config if shape is Kind.MODEL else kind.__pydantic_config__
    by_alias = config.get("validate_by_alias") is not False
    return {
        name: (each.annotation, False, _entry(each, name) if by_alias else (name,))
        for name, each in _pydantic_fields(kind).items()
    }


def _entry(info: Any, name: str) -> tuple[Any, ...]:
    """Return where pydantic looks first for an attribute."""
    alias = info.validation_alias
    alias = getattr(alias, "choices", [alias])[0]
    if alias is None:
        return (name,)
    return (alias,) if isinstance(alias, str) else tuple(alias.path)


def _given(wanted: Any) -> dict[Any, dict[Any, Any]]:
    """Return what the parameters of a class, and of each class that it derives from, stand for."""
    kind = get_origin(wanted) or wanted
    own = dict(zip(getattr(kind, "__parameters__", ()), get_args(wanted), strict=False))
    found = {kind: own}
    for base in vars(kind).get("__orig_bases__", kind.__bases__):
        if get_origin(base) not in (Generic, Protocol):  # they only name the parameters
            found = {**_given(_substituted(base, own)), **found}
    return found


def _annotating(kind: Any, name: str) -> Any:
    """Return the class that says of what type an attribute is: `kind`, or one it derives from."""
    return next((each for each in kind.__mro__ if name in get_annotations(each)), kind)


def _substituted(hint: Any, given: Mapping[Any, Any]) -> Any:
    """Return a type with what the parameters of its generic class stand for."""
    if not given:
        return hint
    if isinstance(hint, TypeVar):
        return given.get(hint, hint)
    inner = getattr(hint, "__parameters__", ())
    return hint[tuple(given.get(each, each) for each in inner)] if inner else hint
