"""Plain values to objects.

Each class reads its own attributes, by the names under which they are stored, and makes its object
of them. So classes of all libraries can be inside each other, and each is asked for its own
``migrate`` hook.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Mapping,
    MutableMapping,
    MutableSequence,
    MutableSet,
    Sequence,
)
from collections.abc import Set as AbstractSet
from functools import cached_property, lru_cache
from typing import Annotated, Any, Final, NamedTuple, Union, get_args, get_origin

from persistence.errors import InvalidArgument
from persistence.typed.classes import (
    Attribute,
    Kind,
    attributes,
    computed_names,
    forbids_extras,
    is_opaque,
    is_unset_type,
    kind_of,
    older_names,
    tag_of,
    unwrapped,
)
from persistence.typed.direct import Make, direct_maker, has_class
from persistence.typed.dumping import LEAVES, plain
from persistence.typed.leaves import (
    ByMsgspec,
    ByPydantic,
    Reader,
    Run,
    Untouched,
    hint_at,
    validated,
    value_at,
)
from persistence.typed.mismatch import MISSING, Mismatch, raised, type_name

Leaf = Callable[..., Reader]
"""Makes the reader of values that have no objects in them."""

_SEQUENCES: Final[Mapping[Any, Callable[[Iterable[Any]], Any]]] = {
    **dict.fromkeys((list, Sequence, MutableSequence, Collection, Iterable), list),
    **dict.fromkeys((set, AbstractSet, MutableSet), set),
    frozenset: frozenset,
    tuple: tuple,
}
_USUAL: Final = LEAVES - {bytearray}  # which libraries make no objects of
_MAPPINGS: Final = (dict, Mapping, MutableMapping)


def reader_of(wanted: Any, leaf: Leaf = ByPydantic) -> Reader:
    """Return what reads values of a type.

    Args:
        wanted: the type.
        leaf: makes the reader of what has no objects in it.
    """
    wanted = unwrapped(wanted)
    if kind_of(wanted) is not None:
        return class_reader(wanted)
    if isinstance(wanted, type) and wanted in _USUAL:
        return _ValueReader(wanted, leaf(wanted))
    if not any(map(has_class, get_args(wanted))):
        return leaf(wanted)
    origin: Any = get_origin(wanted)
    if origin is Annotated:
        return _constrained(wanted, leaf)
    if origin in (Union, types.UnionType):
        return _UnionReader(wanted, leaf)
    if origin in _SEQUENCES:
        return _SequenceReader(wanted, leaf)
    return _MappingReader(wanted, leaf) if origin in _MAPPINGS else leaf(wanted)


@lru_cache(maxsize=1024)
def class_reader(wanted: Any) -> ClassReader:
    """Return what reads objects of a class, which may be one of a generic one: ``Box[int]``."""
    return ClassReader(wanted)


# --- classes --------------------------------------------------------------------------------------


class _Field(NamedTuple):
    attribute: Attribute
    reader: Reader


class ClassReader:
    """Reads objects of one class.

    Args:
        wanted: the class.
    """

    def __init__(self, wanted: Any) -> None:
        self._wanted = wanted
        self._class = get_origin(wanted) or wanted
        self._name = type_name(self._class)
        self._kind = kind_of(wanted)
        self._migrate = _migrate_hook(self._class)
        self._hook = f"{self._name}.migrate"
        self._tag = tag_of(self._class)
        self._older_names = older_names(self._class)
        self._opaque = ByPydantic(wanted, converts=True) if is_opaque(self._class) else None

    @cached_property
    def _direct(self) -> Make | None:
        return direct_maker(self._wanted)

    @cached_property
    def fields(self) -> Mapping[str, _Field]:
        """The attributes by the names under which they are stored, and what reads them."""
        if self._opaque is not None:
            return {}
        leaf: Leaf = ByPydantic
        if self._kind is Kind.STRUCT:
            leaf = ByMsgspec
        elif self._kind is Kind.MODEL:
            leaf = Untouched
        return {
            each.stored: _Field(each, reader_of(each.wanted, leaf))
            for each in attributes(self._wanted)
        }

    def distance(self, value: Mapping[Any, Any]) -> tuple[int, int]:
        """Return how far `value` is from what is stored of an object of the class."""
        known = {**self._tag, **self.fields}.keys()
        return len(value.keys() - known), len(known - value.keys())

    def read(self, value: Any, run: Run) -> Any:
        """Return the object that `value` stands for; see `Reader`."""
        if self._direct is not None:
            try:
                return self._direct(value)
            except Exception:  # noqa: BLE001, S110 - what is wrong is found out below
                pass
        try:
            return self._made(value, run)
        except Mismatch as mismatch:
            mismatch.owner = mismatch.owner or self._name
            if self._migrate is None or not run.may_migrate:
                raise
            stored = mismatch
        try:
            migrated = self._migrate(plain(value))  # a copy: it may be changed in place
        except Exception as error:
            raise stored.after(self._hook, raised(self._hook, error)) from error
        return self._made_of_migrated(migrated, stored, run)

    def _made_of_migrated(self, migrated: Any, stored: Mismatch, run: Run) -> Any:
        try:
            made = self._made(migrated, run)
        except Mismatch as mismatch:
            if not mismatch.path and mismatch.fault is None:
                returned = f"{self._hook} returned {mismatch.stored_type}"
                raise stored.after(self._hook, returned) from None
            mismatch.owner = mismatch.owner or self._name
            mismatch.hook = mismatch.hook or self._hook
            raise
        run.was_migrated = True
        return made

    def _made(self, value: Any, run: Run) -> Any:
        if self._opaque is not None:
            return self._opaque.read(value, run)
        if not isinstance(value, Mapping) or not self._has_tag(value):
            raise Mismatch(value, self._wanted)
        if self._older_names:
            value = self._renamed(value)
        found = {}
        stored = ""
        try:
            for stored, field in self.fields.items():
                if stored in value:
                    found[field.attribute.name] = field.reader.read(value[stored], run)
        except Mismatch as mismatch:
            mismatch.path = (stored, *mismatch.path)
            raise
        for missing in self._required:
            if missing.name not in found:
                raise Mismatch(MISSING, missing.wanted, (missing.stored,))
        return self._make(found, value)

    def _renamed(self, value: Mapping[Any, Any]) -> Mapping[Any, Any]:
        older = {now: value[name] for name, now in self._older_names.items() if name in value}
        return {**older, **value}

    def _has_tag(self, value: Mapping[Any, Any]) -> bool:
        return all(value.get(name, tag) == tag for name, tag in self._tag.items())

    @cached_property
    def _required(self) -> Sequence[Attribute]:
        return [field.attribute for field in self.fields.values() if field.attribute.is_required]

    def _make(self, found: Mapping[str, Any], value: Mapping[Any, Any]) -> Any:
        """Return the object that has these attributes; refuse what its class refuses."""
        try:
            if self._kind in (Kind.STRUCT, Kind.DATACLASS):
                return self._class(**found)
            return self._validated(found, value)
        except (Mismatch, InvalidArgument, RecursionError):
            raise
        except Exception as error:
            fault = raised(f"making a {self._name} of it", error)
            raise Mismatch(value, self._wanted, fault=fault) from error

    def _validated(self, found: Mapping[str, Any], value: Mapping[Any, Any]) -> Any:
        given = self._extras(value)
        for attribute, _ in self.fields.values():
            if attribute.name in found:
                _put(given, attribute.entry, found[attribute.name])
        try:
            return validated(lambda: self._validate(given), self._wanted, given)
        except Mismatch as mismatch:
            self._locate(mismatch, value)
            raise

    @cached_property
    def _validate(self) -> Callable[[Any], Any]:
        from pydantic import TypeAdapter  # noqa: PLC0415 - for those who have a schema

        validate: Callable[[Any], Any] = TypeAdapter(self._wanted).validate_python
        return validate

    def _extras(self, value: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return what no attribute is stored as: a model may have validators that look for it."""
        if self._kind is not Kind.MODEL or forbids_extras(self._class):
            return {}
        known = self.fields.keys() | computed_names(self._class)
        known |= {each.entry[0] for each, _ in self.fields.values()}
        return {name: each for name, each in value.items() if name not in known}

    def _locate(self, mismatch: Mismatch, value: Mapping[Any, Any]) -> None:
        """Name the place where it is stored, not that at which pydantic looked for it."""
        for stored, (attribute, _) in self.fields.items():
            for entry in (attribute.entry, (attribute.name,)):
                if mismatch.path[: len(entry)] == entry:
                    path = mismatch.path[len(entry) :]
                    mismatch.path = (stored, *path)
                    if stored not in value:
                        mismatch.value = MISSING
                    elif mismatch.value is not MISSING:
                        mismatch.value = value_at(value, mismatch.path)
                    mismatch.wanted = hint_at(attribute.wanted, path) or mismatch.wanted
                    return


def _migrate_hook(kind: Any) -> Callable[[Any], Any] | None:
    """Return what the class offers for older data; a method of its objects is something else."""
    found = inspect.getattr_static(kind, "migrate", None)
    return kind.migrate if isinstance(found, classmethod | staticmethod) else None


def _put(given: dict[Any, Any], entry: tuple[Any, ...], value: Any) -> None:
    *way, last = entry
    for step in way:
        given = given.setdefault(step, {})
    given[last] = value


class _ValueReader:
    """Reads values of a class that are stored as they are: the usual one needs no library."""

    def __init__(self, wanted: type, others: Reader) -> None:
        self._wanted = wanted
        self._others = others

    def read(self, value: Any, run: Run) -> Any:
        return value if type(value) is self._wanted else self._others.read(value, run)


# --- what classes are in --------------------------------------------------------------------------


class _SequenceReader:
    """Reads lists, tuples and sets."""

    def __init__(self, wanted: Any, leaf: Leaf) -> None:
        self._wanted = wanted
        self._make = _SEQUENCES[get_origin(wanted)]
        arguments = get_args(wanted)
        self._each = [reader_of(each, leaf) for each in arguments if each is not ...]
        self._has_length = self._make is tuple and arguments[-1] is not ...

    def read(self, value: Any, run: Run) -> Any:
        is_one = isinstance(value, list | tuple | set | frozenset)
        if not is_one or (self._has_length and len(value) != len(self._each)):
            raise Mismatch(value, self._wanted)
        readers = self._each if self._has_length else self._each * len(value)
        found: list[Any] = []
        try:
            for reader, each in zip(readers, value, strict=True):
                found.append(reader.read(each, run))
        except Mismatch as mismatch:
            mismatch.path = (len(found), *mismatch.path)
            raise
        return self._make(found)


class _MappingReader:
    """Reads dicts."""

    def __init__(self, wanted: Any, leaf: Leaf) -> None:
        self._wanted = wanted
        key, each = get_args(wanted)
        self._key, self._each = leaf(key), reader_of(each, leaf)

    def read(self, value: Any, run: Run) -> Any:
        if not isinstance(value, Mapping):
            raise Mismatch(value, self._wanted)
        found = {}
        name = None
        try:
            for name, each in value.items():
                found[self._key.read(name, run)] = self._each.read(each, run)
        except Mismatch as mismatch:
            mismatch.path = (name, *mismatch.path)
            raise
        return found


class _UnionReader:
    """Reads what is of one type or another.

    Of several classes the one is taken whose attributes are most like what is stored.
    """

    def __init__(self, wanted: Any, leaf: Leaf) -> None:
        self._wanted = wanted
        members = [each for each in get_args(wanted) if not is_unset_type(each)]  # never stored
        self._has_none = type(None) in members
        members = [each for each in members if each is not type(None)]
        self._with_class = [reader_of(each, leaf) for each in members if has_class(each)]
        others = tuple(each for each in members if not has_class(each))
        self._others = [leaf(Union[others])] if others else []  # noqa: UP007 - of a tuple

    def read(self, value: Any, run: Run) -> Any:
        if value is None and self._has_none:
            return None
        readers = [*self._with_class, *self._others]
        if isinstance(value, Mapping):
            readers.sort(key=lambda reader: _distance(reader, value))
        if run.may_migrate and len(readers) > 1:
            try:  # what fits as it is comes first
                return self._first(readers, value, Run(may_migrate=False))
            except Mismatch:
                pass
        return self._first(readers, value, run)

    def _first(self, readers: Sequence[Reader], value: Any, run: Run) -> Any:
        failed: list[Mismatch] = []
        for reader in readers:
            try:
                return reader.read(value, run)
            except Mismatch as mismatch:
                failed.append(mismatch)
        closest = max(failed, key=lambda mismatch: len(mismatch.path))
        if closest.path or closest.fault or closest.hook:
            raise closest
        raise Mismatch(value, self._wanted)


def _distance(reader: Reader, value: Mapping[Any, Any]) -> tuple[int, int]:
    return reader.distance(value) if isinstance(reader, ClassReader) else (len(value), 0)


class _Constrained:
    """Reads what has to fit more than its type."""

    def __init__(self, inner: Reader, rest: Reader) -> None:
        self._inner = inner
        self._rest = rest

    def read(self, value: Any, run: Run) -> Any:
        return self._rest.read(self._inner.read(value, run), run)


def _constrained(wanted: Any, leaf: Leaf) -> Reader:
    bare, *constraints = get_args(wanted)
    inner = reader_of(bare, leaf)
    if leaf is Untouched or isinstance(inner, _UnionReader):
        return inner  # pydantic looks at it with its model; a union's are names for its members
    container = get_origin(bare)
    outside: Any = container if container in (*_SEQUENCES, *_MAPPINGS) else Any
    return _Constrained(inner, leaf(Annotated[(outside, *constraints)], converts=True))
