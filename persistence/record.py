"""The packed record: a session as one immutable run of bytes. Pure functions, no IO, no clock.

A session's data is a map ``name -> value``. Each value is packed to MessagePack exactly once, when
it is written; memory, log, shared tier and checkpoints then move those same bytes, and nothing is
unpacked until somebody reads that one field. Every reader gets fresh objects.

Layout of a record, little-endian, without padding:

====== ===== ============================================================================
offset bytes meaning
====== ===== ============================================================================
0      16    incarnation id: changes when an id is created anew
16     16    commit id of the commit that wrote this record
32     8     version, unsigned: 1 at creation, +1 for each commit that changes something
40     8     created, wall seconds (float)
48     8     TTL, seconds (float); 0: never expires
56     1     flags (`RENEWS`, `WIDE`)
57     3     length of the metadata, unsigned
60     4     tag of the user id (`format.user_tag`), unsigned; 0: no user
64     ...   metadata: MessagePack map, only what is given; nothing at all when nothing is
...    2     length of the names, unsigned
...    ...   names of the fields: MessagePack strings, in the order in which they were first set
...    2 n   where each packed value ends, counted from the first one's start, unsigned
...    ...   the packed values, one behind the other
====== ===== ============================================================================

Where names or values have more than 65,535 bytes, the flag `WIDE` is set, and their length and the
ends have 4 bytes each.

Names and ends come first, so that one field is found, and one replaced, without looking at the
others. Sessions of an application have few sets of names between them; each is decoded once and
kept (`_Shape`), found again by its very bytes.

When the session was last accessed and when it expires is not part of it: that changes without a
new version, and is kept beside the record (in memory, in the index, in the frame's header).

Values are plain MessagePack; what it does not hold natively is an extension type (`ExtCode`).
Never pickle: unpacking stored bytes builds values and runs nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal, InvalidOperation
from enum import IntEnum
from functools import partial
from itertools import accumulate
from struct import Struct
from struct import error as struct_error
from struct import pack as struct_pack
from struct import unpack_from as struct_unpack
from typing import Any, Final, NamedTuple, TypeAlias
from uuid import UUID

import msgpack

from persistence.errors import ValueNotSerializable, ValueTooLarge, printable

RENEWS: Final = 1
"""Flag: an access moves the deadline (``auto_renew``)."""
WIDE: Final = 2
"""Flag: the length of the names and the ends of the values have 4 bytes instead of 2."""

ID_BYTES: Final = 16
TTL_AT: Final = 48
TTL_AND_FLAGS: Final = Struct("<dB")  # they lie side by side
FLAGS_AT: Final = 56
NO_ID: Final = bytes(ID_BYTES)
NEVER: Final = float("inf")

_PREFIX: Final = Struct("<16s16sQddII")
_TAIL: Final = Struct("<QddII")  # the prefix behind its two ids
_TAIL_AT: Final = 2 * ID_BYTES
_pack_tail = _TAIL.pack
_unpack_tail = _TAIL.unpack_from
PREFIX_BYTES: Final = _PREFIX.size
FIXED_BYTES: Final = PREFIX_BYTES + 2
"""What every record has beside metadata and fields: the prefix, and the length of the names."""
_META_BITS: Final = 8  # the word at 56 holds flags in its low byte, the metadata's length above
_WORD: Final = Struct("<I")
_unpack_word = _WORD.unpack_from
_NAMES_AT: Final = FIXED_BYTES  # and the metadata
_SHORT: Final = Struct("<H")
_unpack_short = _SHORT.unpack_from
_NARROW_MAX: Final = 2**16 - 1
_VERSION: Final = Struct("<Q")
_VERSION_AT: Final = 2 * ID_BYTES
_CREATED_AT: Final = _VERSION_AT + _VERSION.size
_pack_version = _VERSION.pack
_unpack_version = _VERSION.unpack_from
_DOUBLE: Final = Struct("<d")

_MAX_NESTED_EXTENSIONS: Final = 32
_MAX_LEVELS_IN_EXTENSION: Final = 512
_NESTING: Final = frozenset({tuple, set, frozenset})
_CONTAINERS: Final = frozenset({dict, list, tuple, set, frozenset})
_LARGE_FIELDS_BYTES: Final = 16 * 1024
_SMALL_VALUE_BYTES: Final = 1024  # cannot claim enough to matter
_KEPT_SHAPES: Final = 4096
_KEPT_SHAPE_BYTES: Final = 1024
_SECOND: Final = timedelta(seconds=1)


class ExtCode(IntEnum):
    """MessagePack extension types used for what MessagePack does not hold natively."""

    DATETIME = 1  # ISO 8601 text, with its offset
    DATE = 2  # ISO 8601 text
    UUID = 3  # 16 bytes, big-endian
    DECIMAL = 4  # text
    BIG_INT = 5  # two's complement, little-endian
    TUPLE = 6  # MessagePack array
    SET = 7  # concatenated packed elements, sorted as bytes
    FROZENSET = 8  # the same
    BYTEARRAY = 9  # the bytes


class Head(NamedTuple):
    """The fixed part of a record; `created` is in wall seconds."""

    incarnation: bytes
    commit: bytes
    version: int
    created: float
    ttl_seconds: float
    flags: int
    meta_bytes: int
    user: int

    @property
    def renews(self) -> bool:
        """Whether an access moves the deadline."""
        return bool(self.flags & RENEWS)


# --- values -----------------------------------------------------------------------------------


class _Refused(Exception):
    """Raised inside the packer's hook; becomes ValueNotSerializable with the field's name."""


def _pack_extension(depth: int, value: object) -> msgpack.ExtType:
    """Pack what MessagePack does not hold natively. Called by the packer, `depth` levels down.

    The packer is strict about types, so a tuple arrives here, and so does every subclass of a
    supported type: flattening it would bring it back as something else, so it is refused.
    """
    kind = type(value)
    if not depth and kind in _NESTING and _is_too_deep(value):
        raise _Refused("nested too deeply")
    if kind is tuple:
        return msgpack.ExtType(ExtCode.TUPLE, _packer(depth + 1)(list(value)))  # type: ignore[call-overload]
    if kind is datetime:
        return msgpack.ExtType(ExtCode.DATETIME, _datetime_text(value))  # type: ignore[arg-type]
    if kind is set or kind is frozenset:
        code = ExtCode.SET if kind is set else ExtCode.FROZENSET
        pack = _packer(depth + 1)
        # Sorted, so that equal sets are equal bytes and an unchanged set is seen as unchanged.
        return msgpack.ExtType(code, b"".join(sorted(map(pack, value))))  # type: ignore[call-overload]
    if kind is UUID:
        return msgpack.ExtType(ExtCode.UUID, value.bytes)  # type: ignore[attr-defined]
    if kind is Decimal:
        return msgpack.ExtType(ExtCode.DECIMAL, str(value).encode("ascii"))
    if kind is date:
        return msgpack.ExtType(ExtCode.DATE, value.isoformat().encode("ascii"))  # type: ignore[attr-defined]
    if kind is int:
        size = value.bit_length() // 8 + 1  # type: ignore[attr-defined]
        return msgpack.ExtType(ExtCode.BIG_INT, value.to_bytes(size, "little", signed=True))  # type: ignore[attr-defined]
    raise _Refused(f"type {_type_name(kind)}")


def _is_too_deep(value: Any) -> bool:
    """Whether a tuple or set has too many levels of anything inside it.

    The packer counts levels, but anew inside of each tuple or set; all of them together would use
    up the thread's stack, which ends the process.
    """
    if _CONTAINERS.isdisjoint(map(type, value)):
        return False  # as nearly always
    level: list[Any] = [value]
    for _ in range(_MAX_LEVELS_IN_EXTENSION):
        inner: dict[int, Any] = {}  # each once, however often it is there
        for container in level:
            parts = [*container, *container.values()] if type(container) is dict else container
            if not _CONTAINERS.isdisjoint(map(type, parts)):
                inner.update((id(each), each) for each in parts if type(each) in _CONTAINERS)
        if not inner:
            return False
        level = list(inner.values())
    return True


def _type_name(kind: type) -> str:
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"


def _datetime_text(value: datetime) -> bytes:
    try:
        offset = value.utcoffset()
    except Exception as error:  # a zone of the application's
        raise _Refused(f"a datetime whose zone raised {type(error).__name__}") from error
    if offset is None:
        raise _Refused("a naive datetime (without a time zone)")
    if offset.microseconds and abs(offset) < _SECOND:
        # `fromisoformat` takes such an offset for UTC.
        raise _Refused("a datetime with an offset of less than a second")
    return value.isoformat().encode("ascii")


class _Packers(threading.local):
    """One packer per thread and nesting level: a packer is neither re-entrant nor shared."""

    def __init__(self) -> None:
        self.by_depth = [_new_packer(0)]


def _new_packer(depth: int) -> Callable[[object], bytes]:
    pack: Callable[[object], bytes] = msgpack.Packer(
        strict_types=True, default=partial(_pack_extension, depth)
    ).pack
    return pack


_packers = _Packers()


def _packer(depth: int) -> Callable[[object], bytes]:
    if depth > _MAX_NESTED_EXTENSIONS:
        raise _Refused(f"more than {_MAX_NESTED_EXTENSIONS} tuples or sets inside each other")
    by_depth = _packers.by_depth
    if depth == len(by_depth):
        by_depth.append(_new_packer(depth))
    return by_depth[depth]


# The packer takes these natively, but they would come back as something else (bytearray and
# memoryview as bytes) or as one of our own extension types. Each leaves one of these marker bytes
# in the output, so a value without any needs no walk; text and floats may hold them by chance.
_MARKERS: Final = bytes([0xC4, 0xC5, 0xC6, 0xC7, 0xC8, 0xC9, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8])
_PLAIN: Final = frozenset({int, str, float, bool, type(None), bytes})
_REFUSED_NATIVES: Final = frozenset({memoryview, msgpack.ExtType, msgpack.Timestamp})
_LOOKALIKES: Final = _REFUSED_NATIVES | {bytearray}


def _holds_lookalikes(value: Any) -> bool:
    """Whether a value that the packer has taken is, or holds, what would come back as another type.

    Looks at the types of a container's parts all at once: floats hold markers by chance, too.
    """
    kind = type(value)
    if kind not in _CONTAINERS:
        return kind in _LOOKALIKES
    todo: list[Any] = [value]
    while todo:
        item = todo.pop()
        parts = [*item, *item.values()] if type(item) is dict else item
        kinds = set(map(type, parts))
        if kinds <= _PLAIN:
            continue
        if not _LOOKALIKES.isdisjoint(kinds):
            return True
        todo += [each for each in parts if type(each) in _CONTAINERS]
    return False


def _with_explicit_bytearrays(value: Any) -> Any:
    """Return `value` with each bytearray replaced by its extension; refuse lookalikes.

    Containers are rebuilt only where needed is not worth the code: this runs for few values.
    Without recursion: how deep a value may be must not depend on the stack of whoever stores it.
    """
    todo: list[Any] = [value]  # values, and marks at which a container's parts are all in `done`
    done: list[Any] = []
    while todo:
        item = todo.pop()
        kind = type(item)
        if kind is _Parts:
            start = len(done) - item.size
            done[start:] = [_rebuilt(item.kind, done[start:])]
        elif kind is bytearray:
            done.append(msgpack.ExtType(ExtCode.BYTEARRAY, bytes(item)))
        elif kind in _REFUSED_NATIVES:
            raise _Refused(f"type {_type_name(kind)}")
        elif kind in _CONTAINERS:
            parts = [part for pair in item.items() for part in pair] if kind is dict else [*item]
            todo.append(_Parts(kind, len(parts)))
            todo += reversed(parts)
        else:
            done.append(item)
    return done[0]


class _Parts(NamedTuple):
    kind: type
    size: int


def _rebuilt(kind: type, parts: list[Any]) -> Any:
    return dict(zip(parts[::2], parts[1::2], strict=True)) if kind is dict else kind(parts)


def pack_value(value: object, field: str) -> bytes:
    """Pack one field's value.

    Args:
        value: what MessagePack holds natively, plus aware datetime, date, UUID, Decimal, set,
            frozenset, tuple, bytearray, integers of any size, and map keys of any of these types
            that Python can hash. Subclasses are refused, not flattened.
        field: the field's name, for the error message.

    Raises:
        ValueNotSerializable: naming the field and the type.
    """
    try:
        packed = _packers.by_depth[0](value)
        is_plain = type(value) in _PLAIN or len(packed.translate(None, _MARKERS)) == len(packed)
        if not is_plain and _holds_lookalikes(value):
            packed = _packers.by_depth[0](_with_explicit_bytearrays(value))
        return packed
    except _Refused as refused:
        what = str(refused)
    except UnicodeEncodeError:
        what = "text with lone surrogates, which UTF-8 cannot hold"
    except RecursionError:
        what = "nested too deeply"
    except (ValueError, OverflowError, TypeError) as error:
        what = str(error)
    # The packer that raised may hold half a value.
    _packers.by_depth = [_new_packer(0)]
    raise ValueNotSerializable(
        f"field {printable(field)} cannot be stored: {what}; nothing was written "
        "(supported: what MessagePack holds, aware datetime, date, UUID, Decimal, set, "
        "frozenset, tuple, bytearray)"
    )


class MalformedValue(ValueError):
    """Packed bytes are not what `pack_value` writes. Callers add file, offset and session."""


def _unpack_extension(depth: int, code: int, data: bytes) -> object:
    if code == ExtCode.TUPLE:
        return tuple(_unpack_nested(data, depth))
    if code == ExtCode.DATETIME:
        return datetime.fromisoformat(data.decode("ascii"))
    if code == ExtCode.SET:
        return set(_unpack_elements(data, depth))
    if code == ExtCode.FROZENSET:
        return frozenset(_unpack_elements(data, depth))
    if code == ExtCode.UUID:
        return UUID(bytes=data)
    if code == ExtCode.DECIMAL:
        return Decimal(data.decode("ascii"))
    if code == ExtCode.DATE:
        return date.fromisoformat(data.decode("ascii"))
    if code == ExtCode.BIG_INT:
        return int.from_bytes(data, "little", signed=True)
    if code == ExtCode.BYTEARRAY:
        return bytearray(data)
    raise MalformedValue(f"unknown extension type {code}")


def _hook(depth: int) -> Callable[[int, bytes], object]:
    if depth > _MAX_NESTED_EXTENSIONS:
        raise MalformedValue(f"more than {_MAX_NESTED_EXTENSIONS} nested extensions")
    return partial(_unpack_extension, depth)


def _check_counts(packed: bytes) -> None:
    """Refuse an array that claims more elements than follow it.

    The unpacker allocates what an array claims, up to the length of the input, before it looks
    for the elements; arrays inside each other multiply that. Skipping allocates nothing.
    """
    if len(packed) <= _SMALL_VALUE_BYTES or not (b"\xdc" in packed or b"\xdd" in packed):
        return
    walker = msgpack.Unpacker(max_buffer_size=len(packed))
    walker.feed(packed)
    try:
        while walker.tell() < len(packed):
            walker.skip()
    except msgpack.OutOfData:
        raise MalformedValue("an array or a map ends too early") from None


def _unpack_nested(data: bytes, depth: int) -> list[object]:
    _check_counts(data)
    value = msgpack.unpackb(data, strict_map_key=False, ext_hook=_hook(depth + 1))
    if type(value) is not list:
        raise MalformedValue("a tuple is not stored as an array")
    return value


def _unpack_elements(data: bytes, depth: int) -> list[object]:
    _check_counts(data)
    unpacker = msgpack.Unpacker(
        strict_map_key=False, ext_hook=_hook(depth + 1), max_buffer_size=len(data) or 1
    )
    unpacker.feed(data)
    elements = []
    try:
        while unpacker.tell() < len(data):
            elements.append(unpacker.unpack())
    except msgpack.OutOfData:
        raise MalformedValue("a set ends in the middle of an element") from None
    except MalformedValue:
        raise
    except (ValueError, TypeError, InvalidOperation, OverflowError) as error:
        raise MalformedValue(f"a set holds no packed values: {error}") from error
    return elements


_unpackb = msgpack.unpackb
_hook_0 = _hook(0)


def unpack_value(packed: bytes | memoryview) -> Any:
    """Unpack one field's value into fresh objects.

    Raises:
        MalformedValue: the bytes are not a packed value. Every length in them is checked against
            what is there, so memory stays proportional to ``len(packed)``.
    """
    try:
        if len(packed) > _SMALL_VALUE_BYTES:
            packed = bytes(packed)
            _check_counts(packed)
        return _unpackb(packed, strict_map_key=False, ext_hook=_hook_0)
    except MalformedValue:
        raise
    except (ValueError, TypeError, InvalidOperation, OverflowError) as error:
        raise MalformedValue(f"not a packed value: {error}") from error


# --- records ----------------------------------------------------------------------------------


def head(record: bytes) -> Head:
    """Decode the fixed part of `record`."""
    incarnation, commit, version, created, ttl, word, user = _PREFIX.unpack_from(record)
    flags = word & (1 << _META_BITS) - 1 & ~WIDE  # which is about bytes, not about the session
    return Head(incarnation, commit, version, created, ttl, flags, word >> _META_BITS, user)


def incarnation_of(record: bytes) -> bytes:
    """Return the incarnation id of `record`."""
    return record[:16]


def commit_of(record: bytes) -> bytes:
    """Return the commit id of `record`."""
    return record[16:32]


def version_of(record: bytes) -> int:
    """Return the version of `record`."""
    version: int = _VERSION.unpack_from(record, _VERSION_AT)[0]
    return version


def created_of(record: bytes) -> float:
    """Return when the session was created, wall seconds."""
    created: float = _DOUBLE.unpack_from(record, 40)[0]
    return created


def ttl_of(record: bytes) -> float:
    """Return the TTL of `record`, seconds; 0: never expires."""
    ttl_seconds: float = _DOUBLE.unpack_from(record, TTL_AT)[0]
    return ttl_seconds


def ttl_and_flags_of(record: bytes) -> tuple[float, int]:
    """Return the TTL of `record`, seconds, and its flags."""
    ttl_seconds, flags = TTL_AND_FLAGS.unpack_from(record, TTL_AT)
    return ttl_seconds, flags


def flags_of(record: bytes) -> int:
    """Return the flags of `record`."""
    return record[FLAGS_AT]


class _Shape:
    """The names of a record's fields, decoded, and how the ends of their values are packed."""

    __slots__ = ("header", "is_wide", "names", "pack", "places", "size_bytes", "unpack")

    def __init__(self, names: tuple[str, ...], packed: bytes, *, is_wide: bool) -> None:
        ends = Struct(f"<{len(names)}{'I' if is_wide else 'H'}")
        self.names = names
        self.places = {name: place for place, name in enumerate(names)}
        self.is_wide = is_wide
        self.header = (_WORD if is_wide else _SHORT).pack(len(packed)) + packed
        self.pack = ends.pack
        self.unpack = ends.unpack_from
        self.size_bytes = ends.size


Layout: TypeAlias = tuple[_Shape, tuple[int, ...], int]
"""Where the fields of a record are: their shape, the ends of their values counted from the first
one's start, and where that is."""

# Narrow ones only: who has more than 64 KiB in a session pays for more than its names.
_shapes_by_packed: dict[bytes, _Shape] = {}
_shapes_by_names: dict[tuple[str, ...], _Shape] = {}


def _keep_shape(shapes: dict[Any, _Shape], key: bytes | tuple[str, ...], shape: _Shape) -> _Shape:
    """Keep a shape for the next record, within bounds: field names may come from outside."""
    if len(shape.header) <= _KEPT_SHAPE_BYTES and not shape.is_wide:
        if len(shapes) >= _KEPT_SHAPES:
            shapes.clear()
        shapes[key] = shape
    return shape


def _decoded_shape(packed: bytes, *, is_wide: bool = False) -> _Shape:
    """Return the shape whose names are packed in `packed`.

    Raises:
        MalformedValue: these are no different strings.
    """
    try:
        names = _unpack_elements(packed, 0)
    except ValueError as error:
        raise MalformedValue(f"the fields' names cannot be read: {error}") from error
    texts = tuple(name for name in names if type(name) is str)
    if len(texts) != len(names):
        raise MalformedValue("a field's name is not a string")
    shape = _Shape(texts, packed, is_wide=is_wide)
    if len(shape.places) != len(names):
        raise MalformedValue("two fields have the same name")
    return _keep_shape(_shapes_by_packed, packed, shape)


def _shape_of_names(names: tuple[str, ...], *, is_wide: bool) -> _Shape:
    """Return the shape of these names; a wide one if that is asked for, or they take so much.

    Raises:
        ValueNotSerializable: one of them is not a str, or is one that UTF-8 cannot hold.
    """
    for name in names:
        check_field_name(name)
    try:
        packed = b"".join(map(_packers.by_depth[0], names))
    except UnicodeEncodeError:
        _packers.by_depth = [_new_packer(0)]
        bad = next(name for name in names if not _is_utf8(name))
        raise ValueNotSerializable(
            f"field {printable(bad)} cannot be stored: its name has lone surrogates, "
            "which UTF-8 cannot hold; nothing was written"
        ) from None
    shape = _Shape(names, packed, is_wide=is_wide or len(packed) > _NARROW_MAX)
    return _keep_shape(_shapes_by_names, names, shape)


def layout_of(record: bytes) -> Layout:
    """Return where the fields of `record` are."""
    word = _unpack_word(record, FLAGS_AT)[0]
    names_at = _NAMES_AT + (word >> _META_BITS)
    if word & WIDE:
        return _wide_layout_of(record, names_at + _WORD.size - _SHORT.size)
    names_end = names_at + _unpack_short(record, names_at - 2)[0]
    packed = record[names_at:names_end]
    shape = _shapes_by_packed.get(packed) or _decoded_shape(packed)
    return shape, shape.unpack(record, names_end), names_end + shape.size_bytes


def _wide_layout_of(record: bytes, names_at: int) -> Layout:
    names_end = names_at + _unpack_word(record, names_at - 4)[0]
    shape = _decoded_shape(record[names_at:names_end], is_wide=True)
    return shape, shape.unpack(record, names_end), names_end + shape.size_bytes


def field_names(record: bytes) -> tuple[str, ...]:
    """Return the names of the fields of `record`, in the order in which they were first set."""
    return layout_of(record)[0].names


def packed_field(record: bytes, name: str) -> bytes | None:
    """Return the packed value of one field; None: there is no such field."""
    shape, ends, at = layout_of(record)  # not by `field_in`: a call is felt
    place = shape.places.get(name)
    if place is None:
        return None
    return record[at + ends[place - 1] if place else at : at + ends[place]]


def field_in(record: bytes, layout: Layout, name: str) -> bytes | None:
    """Do what `packed_field` does, where the layout of the record is at hand."""
    shape, ends, at = layout
    place = shape.places.get(name)
    if place is None:
        return None
    return record[at + ends[place - 1] if place else at : at + ends[place]]


def packed_fields(record: bytes) -> dict[str, bytes | memoryview]:
    """Return the packed value of each field, in the order in which they were first set.

    Small values are copies; of a large record the values are views into it.
    """
    shape, ends, at = layout_of(record)
    source = record if len(record) <= _LARGE_FIELDS_BYTES else memoryview(record)
    fields: dict[str, bytes | memoryview] = {}
    start = at
    for name, end in zip(shape.names, ends, strict=True):
        fields[name] = source[start : at + end]
        start = at + end
    return fields


def packed_meta(record: bytes) -> bytes:
    """Return the metadata of `record` as it is packed."""
    size = _WORD.unpack_from(record, FLAGS_AT)[0] >> _META_BITS
    return record[PREFIX_BYTES : PREFIX_BYTES + size]


def meta_of(record: bytes) -> dict[str, Any]:
    """Return the metadata of `record`: only the entries that were given."""
    packed = packed_meta(record)
    return unpack_value(packed) if packed else {}


def pack_meta(meta: Mapping[str, object]) -> bytes:
    """Pack metadata, leaving out what is None or an empty map.

    Raises:
        ValueNotSerializable: an entry cannot be stored.
        ValueTooLarge: all of it together has 16 MiB or more.
    """
    kept = {name: value for name, value in meta.items() if value is not None and value != {}}
    if not kept:
        return b""
    for name, value in kept.items():
        pack_value(value, name)
    packed = pack_value(kept, "metadata")
    if len(packed) >= 1 << 24:
        raise ValueTooLarge(
            f"the metadata would have {len(packed)} bytes, which must be less than 16 MiB; "
            "nothing was written"
        )
    return packed


def with_meta(record: bytes, commit: bytes, meta: bytes) -> bytes:
    """Return `record` with other packed metadata, by another commit; the same version."""
    version, created, ttl_seconds, word, user = _unpack_tail(record, _TAIL_AT)
    fields_at = PREFIX_BYTES + (word >> _META_BITS)
    word = word & (1 << _META_BITS) - 1 | len(meta) << _META_BITS
    tail = _pack_tail(version, created, ttl_seconds, word, user)
    return b"".join((record[:ID_BYTES], commit, tail, meta, record[fields_at:]))


def has_same_data(record: bytes, other: bytes) -> bool:
    """Whether two records are one version of one session, but for their metadata and commits."""
    return (
        record[:ID_BYTES] == other[:ID_BYTES]
        and record[_VERSION_AT : FLAGS_AT + 1] == other[_VERSION_AT : FLAGS_AT + 1]
        and record[meta_end_of(record) :] == other[meta_end_of(other) :]
    )


def assemble(  # noqa: PLR0913 - one parameter for each part of a record
    *,
    incarnation: bytes,
    commit: bytes,
    version: int,
    created: float,
    ttl_seconds: float,
    flags: int,
    user: int,
    meta: bytes,
    fields: Mapping[str, bytes | memoryview],
) -> bytes:
    """Build a record from its parts; `fields` and `meta` are packed already.

    Raises:
        ValueNotSerializable: a field's name is not a str, or is one that UTF-8 cannot hold.
    """
    shape, pieces = _field_pieces(fields)
    prefix = _PREFIX.pack(
        incarnation,
        commit,
        version,
        created,
        ttl_seconds,
        flags | (WIDE if shape.is_wide else 0) | len(meta) << _META_BITS,
        user,
    )
    return b"".join((prefix, meta, *pieces))


def meta_end_of(record: bytes) -> int:
    """Return where the fixed part and the metadata of `record` end and its fields start."""
    word: int = _WORD.unpack_from(record, FLAGS_AT)[0]
    return PREFIX_BYTES + (word >> _META_BITS)


def with_fields(start: bytes, fields: Mapping[str, bytes | memoryview]) -> bytes:
    """Return the record that begins with `start` (see `meta_end_of`) and has `fields`.

    Raises:
        MalformedValue: no record that begins like this has such fields.
    """
    is_wide = bool(start[FLAGS_AT] & WIDE)
    shape, pieces = _field_pieces(fields, is_wide=is_wide)
    if shape.is_wide != is_wide:
        raise MalformedValue("the fields are larger than the record says")
    return b"".join((start, *pieces))


def _field_pieces(
    fields: Mapping[str, bytes | memoryview], *, is_wide: bool = False
) -> tuple[_Shape, list[bytes | memoryview]]:
    """Return the shape of `fields`, and what a record has behind its metadata, in pieces."""
    names = tuple(fields)
    values = fields.values()
    ends = list(accumulate(map(len, values)))
    if is_wide or (ends and ends[-1] > _NARROW_MAX):
        shape = _shape_of_names(names, is_wide=True)
    else:
        shape = _shapes_by_names.get(names) or _shape_of_names(names, is_wide=False)
    return shape, [shape.header, shape.pack(*ends), *values]


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_field_name(name: object) -> str:
    """Return `name` if it can name a field.

    Raises:
        ValueNotSerializable: it is not a str (subclasses are refused, not flattened).
    """
    if type(name) is not str:
        raise ValueNotSerializable(
            f"field {printable(name)} cannot be stored: a field's name must be str, "
            f"not {_type_name(type(name))}; nothing was written"
        )
    return name


def successor(record: bytes, commit: bytes, fields: Mapping[str, bytes | memoryview]) -> bytes:
    """Return the next version of `record`, with other fields and all else as it was."""
    version, created, ttl_seconds, word, user = _unpack_tail(record, _TAIL_AT)
    shape, pieces = _field_pieces(fields)
    meta = record[PREFIX_BYTES : PREFIX_BYTES + (word >> _META_BITS)]
    word = word & ~WIDE | (WIDE if shape.is_wide else 0)
    tail = _pack_tail(version + 1, created, ttl_seconds, word, user)
    return b"".join((record[:ID_BYTES], commit, tail, meta, *pieces))


def patched(record: bytes, commit: bytes, changed: Mapping[str, bytes], layout: Layout) -> bytes:
    """Return the next version of `record`, with other values for some of its fields.

    What `successor` makes of all fields, in a fraction of the time, because nearly every update
    comes by here, and nearly every one changes one field. (Except that a wide record stays wide.)
    """
    shape, ends, at = layout
    if len(changed) > 1:
        return successor(record, commit, {**packed_fields(record), **changed})
    [(name, value)] = changed.items()
    place = shape.places[name]
    start, end = at + ends[place - 1] if place else at, at + ends[place]
    grown = len(value) - (end - start)
    if not grown:  # the ends stay as well
        front = record[_CREATED_AT:start]
    elif ends[-1] + grown <= _NARROW_MAX:
        moved = shape.pack(*ends[:place], *[each + grown for each in ends[place:]])
        front = record[_CREATED_AT : at - shape.size_bytes] + moved + record[at:start]
    else:
        return successor(record, commit, {**packed_fields(record), **changed})
    version = _pack_version(_unpack_version(record, _VERSION_AT)[0] + 1)
    return b"".join((record[:ID_BYTES], commit, version, front, value, record[end:]))


def changes_of(record: bytes, names: Sequence[str]) -> bytes:
    """Return what `with_changes` makes `record` of, if only the values of `names` have changed."""
    shape, ends, at = layout_of(record)
    values = []
    for name in names:
        place = shape.places[name]
        values.append(record[at + ends[place - 1] if place else at : at + ends[place]])
    chosen = tuple(names)
    # The wide form, which any values fit into; the names of narrow shapes are kept ready.
    narrow = _shapes_by_names.get(chosen) or _shape_of_names(chosen, is_wide=False)
    packed = narrow.header[_WORD.size if narrow.is_wide else _SHORT.size :]
    new_ends = struct_pack(f"<{len(values)}I", *accumulate(map(len, values)))
    tail = record[_TAIL_AT:PREFIX_BYTES]
    return b"".join((tail, _WORD.pack(len(packed)), packed, new_ends, *values))


def with_changes(record: bytes, ids: bytes, changes: bytes) -> bytes:
    """Return the later version of `record` of which `changes_of` has made `changes`.

    Args:
        record: an earlier version, with the same fields and the same metadata.
        ids: incarnation and commit id of the later one.
        changes: what has changed since then.

    Raises:
        MalformedValue: they do not fit together.
    """
    try:
        word = _unpack_word(changes, FLAGS_AT - _TAIL_AT)[0]
        names_at = _TAIL.size + _WORD.size
        names_end = names_at + _unpack_word(changes, _TAIL.size)[0]
        packed = changes[names_at:names_end]
        is_wide = len(packed) > _NARROW_MAX
        shape = _shapes_by_packed.get(packed) or _decoded_shape(packed, is_wide=is_wide)
        ends = struct_unpack(f"<{len(shape.names)}I", changes, names_end)
    except struct_error as error:
        raise MalformedValue("what has changed ends too early") from error
    fields = packed_fields(record)
    if not fields.keys() >= shape.places.keys():
        raise MalformedValue("a field has changed that was not there")
    start = at = names_end + _WORD.size * len(ends)
    for name, end in zip(shape.names, ends, strict=True):
        fields[name] = changes[start : at + end]
        start = at + end
    _, pieces = _field_pieces(fields, is_wide=bool(word & WIDE))
    return b"".join((ids, changes[: _TAIL.size], packed_meta(record), *pieces))


def validate(record: bytes) -> None:
    """Check that `record` can be decoded as far as its fields' names.

    Raises:
        MalformedValue: it cannot. (Its checksum was right, so it was written like this.)
    """
    if len(record) <= PREFIX_BYTES or PREFIX_BYTES + (head(record).meta_bytes) >= len(record):
        raise MalformedValue("a record is shorter than its own lengths say")
    try:
        _, ends, at = layout_of(record)
    except struct_error as error:
        raise MalformedValue("a record ends before its fields") from error
    if [*ends] != sorted(ends) or at + (ends[-1] if ends else 0) != len(record):
        raise MalformedValue("the fields end elsewhere than the record")
