from __future__ import annotations

import enum
import math
import string
import sys
import tracemalloc
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from struct import pack as struct_pack
from typing import Any
from uuid import UUID

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from persistence import record as rec
from persistence.errors import ValueNotSerializable, ValueTooLarge
from persistence.record import (
    PREFIX_BYTES,
    RENEWS,
    ExtCode,
    MalformedValue,
    pack_value,
    unpack_value,
)

# Values of every kind

OFFSETS = (
    st.timedeltas(timedelta(hours=-23, minutes=-59), timedelta(hours=23, minutes=59))
    .filter(lambda offset: not offset or abs(offset) >= timedelta(seconds=1))
    .map(timezone)
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**300), 2**300),
    st.floats(),
    st.text(),
    st.binary(),
    st.datetimes(timezones=OFFSETS | st.timezones()),
    st.dates(),
    st.uuids(),
    st.decimals().filter(lambda value: not value.is_snan()),
)
KEYS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4).map(tuple) | st.frozensets(inner, max_size=4),
    max_leaves=8,
)
VALUES = st.recursive(
    SCALARS | KEYS | st.sets(KEYS, max_size=4) | st.binary().map(bytearray),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=5)
    ),
    max_leaves=20,
)


def told_apart(value: Any) -> object:
    """Return something that is equal for two values only if they are the same, type by type."""
    kind = type(value)
    if kind in (list, tuple):
        return kind, [told_apart(item) for item in value]
    if kind in (set, frozenset):
        return kind, sorted((told_apart(item) for item in value), key=repr)
    if kind is dict:
        return kind, [(told_apart(key), told_apart(item)) for key, item in value.items()]
    if kind is datetime:
        # Zones come back as the offset they stood for.
        return kind, value.replace(tzinfo=None, fold=0), value.utcoffset()
    if kind is float:
        return kind, math.isnan(value) or value, math.copysign(1, value)
    if kind is Decimal:
        return kind, value.as_tuple()
    return kind, value


@settings(max_examples=150, deadline=None)
@given(VALUES)
@example({(1, ("a", frozenset({2})), b"x"): [bytearray(b"y"), {None: {True, 0.5}}]})
@example([math.nan, -0.0, math.inf, Decimal("NaN"), Decimal("-0.00"), Decimal("1E+9999")])
def test_every_value_comes_back_as_what_it_was(value: object) -> None:
    again = unpack_value(pack_value(value, "field"))
    assert told_apart(again) == told_apart(value)


@pytest.mark.parametrize("bits", [7, 8, 31, 32, 63, 64, 65, 127, 128, 1000, 100_000])
def test_integers_of_any_size_come_back(bits: int) -> None:
    for value in (2**bits - 1, 2**bits, 2**bits + 1):
        for number in (value, -value):
            assert told_apart(unpack_value(pack_value(number, "n"))) == (int, number)


@pytest.mark.parametrize(
    "value",
    [
        datetime(2024, 2, 29, 23, 59, 59, 999_999, UTC),
        datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=-12))),
        datetime(9999, 12, 31, tzinfo=timezone(timedelta(hours=5, minutes=45))),
        datetime(2024, 1, 1, tzinfo=timezone(timedelta(seconds=-1))),
        datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=1, seconds=2, microseconds=3))),
    ],
)
def test_a_datetime_keeps_its_offset_to_the_microsecond(value: datetime) -> None:
    again = unpack_value(pack_value(value, "at"))
    assert (again, again.utcoffset()) == (value, value.utcoffset())


@settings(deadline=None)
@given(st.lists(KEYS, max_size=12), st.randoms())
def test_equal_sets_are_equal_bytes(elements: list[Any], random: Any) -> None:
    one = set(elements)
    shuffled = list(one)
    random.shuffle(shuffled)
    filling = {f"filling {number}" for number in range(1000)}
    other: set[Any] = set(filling)  # a table of another size, so of another order
    other.update(shuffled)
    other -= filling - one
    assert other == one
    assert pack_value(one, "s") == pack_value(other, "s")
    assert pack_value(frozenset(one), "s") == pack_value(frozenset(other), "s")
    assert pack_value({"a": [(one,)]}, "s") == pack_value({"a": [(other,)]}, "s")


@settings(deadline=None)
@given(VALUES)
def test_packing_twice_gives_the_same_bytes(value: object) -> None:
    packed = pack_value(value, "field")
    assert pack_value(value, "field") == packed
    assert pack_value(unpack_value(packed), "field") == packed


def test_every_reader_gets_fresh_objects() -> None:
    packed = pack_value({"list": [1], "bytes": bytearray(b"x"), "set": {1}}, "field")
    first, second = unpack_value(packed), unpack_value(packed)
    first["list"].append(2)
    first["bytes"].extend(b"y")
    first["set"].add(2)
    del first["list"]
    assert second == {"list": [1], "bytes": bytearray(b"x"), "set": {1}}
    assert unpack_value(packed) == second


@pytest.mark.parametrize("wrap", [list, tuple, lambda items: {"key": items[0]}])
def test_a_bytearray_stays_one_in_every_container(wrap: Callable[[list[Any]], Any]) -> None:
    value = wrap([wrap([bytearray(b"\x00\xff")])])
    assert told_apart(unpack_value(pack_value(value, "f"))) == told_apart(value)


def test_a_value_that_holds_a_marker_by_chance_is_not_packed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(value: object) -> object:
        raise AssertionError(f"{value!r} was rebuilt")

    value = {"price": 5e-324, "items": [["\u00c4", ({1.5}, None)], {"n": 0xC4, b"\xc7": -200}]}
    packed = pack_value(value, "field")
    assert any(mark in packed for mark in rec._MARKERS)
    monkeypatch.setattr(rec, "_with_explicit_bytearrays", refuse)
    assert pack_value(value, "field") == packed
    with pytest.raises(AssertionError, match="was rebuilt"):
        pack_value([value, [{"deep": [bytearray(b"x")]}]], "field")


def test_a_bytearray_is_copied_when_it_is_packed() -> None:
    buffer = bytearray(b"before")
    packed = pack_value([buffer], "f")
    buffer[:] = b"behind"
    assert unpack_value(packed) == [bytearray(b"before")]


# What is refused


class Text(str):
    __slots__ = ()


class Number(int):
    pass


class Real(float):
    pass


class Raw(bytes):
    pass


class Buffer(bytearray):
    pass


class Array(list[Any]):
    pass


class Table(dict[Any, Any]):
    pass


class Pair(tuple[Any, ...]):
    __slots__ = ()


class Bag(set[Any]):
    pass


class FrozenBag(frozenset[Any]):
    pass


class Moment(datetime):
    pass


class Day(date):
    pass


class Money(Decimal):
    pass


class Id(UUID):
    pass


class Colour(enum.IntEnum):
    RED = 1


class Flag(enum.StrEnum):
    ON = "on"


Point = namedtuple("Point", "x y")

SUBCLASSES = [
    Text("a"),
    Number(1),
    Number(2**80),
    Real(1.5),
    Raw(b"a"),
    Buffer(b"a"),
    Array([1]),
    Table(a=1),
    Pair((1,)),
    Bag([1]),
    FrozenBag([1]),
    Moment(2024, 1, 1, tzinfo=UTC),
    Day(2024, 1, 1),
    Money("1.5"),
    Id(int=1),
    Colour.RED,
    Flag.ON,
    Point(1, 2),
    OrderedDict(a=1),
    defaultdict(list),
]
LOOKALIKES = [
    memoryview(b"abc"),
    msgpack.ExtType(ExtCode.UUID, bytes(16)),
    msgpack.ExtType(99, b""),
    msgpack.Timestamp(0),
]
FOREIGN = [object(), 1j, range(3), time(1), timedelta(1), len, int, Exception("x")]


def type_name(value: object) -> str:
    """An id for a parameter that is the same in every process."""
    return type(value).__name__


def wrapped(value: Any) -> list[Any]:
    """Return `value` in each place where a value can be."""
    places: list[Any] = [value, [value], (1, (value,)), {"key": value}, [bytearray(b"x"), value]]
    try:
        hash(value)
    except TypeError:
        return places
    return [*places, {value}, frozenset({value}), {value: 1}, {(value,): 1}]


@pytest.mark.parametrize("value", [*SUBCLASSES, *LOOKALIKES, *FOREIGN], ids=type_name)
def test_a_subclass_or_a_foreign_type_is_refused_wherever_it_is(value: object) -> None:
    name = type(value).__qualname__
    for place in wrapped(value):
        with pytest.raises(ValueNotSerializable, match=rf"^field 'cart' .*\b{name}\b"):
            pack_value(place, "cart")


@pytest.mark.parametrize("place", [lambda v: v, lambda v: [v], lambda v: {v}, lambda v: {v: 1}])
def test_a_naive_datetime_is_refused(place: Callable[[datetime], object]) -> None:
    class Nowhere(tzinfo):
        def utcoffset(self, _: datetime | None) -> None:
            return None

        def dst(self, _: datetime | None) -> None:
            return None

        def tzname(self, _: datetime | None) -> str:
            return "nowhere"

    naive = datetime(2024, 1, 1)
    for value in (naive, naive.replace(tzinfo=Nowhere())):
        with pytest.raises(ValueNotSerializable, match=r"^field 'at' .*naive datetime"):
            pack_value(place(value), "at")


def test_an_offset_that_would_come_back_as_another_is_refused() -> None:
    for microseconds in (1, -1, 999_999):
        zone = timezone(timedelta(microseconds=microseconds))
        with pytest.raises(ValueNotSerializable, match=r"^field 'at' .*less than a second"):
            pack_value(datetime(2024, 1, 1, tzinfo=zone), "at")


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc80" * 3])
def test_lone_surrogates_are_refused(text: str) -> None:
    for place in wrapped(text):
        with pytest.raises(ValueNotSerializable, match=r"^field 'name' .*surrogates"):
            pack_value(place, "name")


def endless(wrap: Callable[[list[Any]], Any]) -> list[Any]:
    inner: list[Any] = []
    inner.append(wrap(inner))
    return inner


@pytest.mark.parametrize(
    "value",
    [
        endless(lambda inner: inner),
        endless(lambda inner: (inner,)),
        endless(lambda inner: {"again": inner}),
        endless(lambda inner: [bytearray(b"x"), inner]),
    ],
    ids=["list", "tuple", "dict", "list and bytearray"],
)
def test_a_value_that_holds_itself_is_refused(value: object) -> None:
    with pytest.raises(ValueNotSerializable, match=r"^field 'loop' "):
        pack_value(value, "loop")


def nested(levels: int, wrap: Callable[[Any], Any], inner: Any = 1) -> Any:
    for _ in range(levels):
        inner = wrap(inner)
    return inner


def spine(value: Any) -> tuple[list[type], Any]:
    """Return the types of nested containers of one element each, and what is in the innermost."""
    kinds = []
    while isinstance(value, list | tuple | dict):
        kinds.append(type(value))
        value = value["k"] if isinstance(value, dict) else value[0]
    return kinds, value


@pytest.mark.parametrize("inner", [1, b"\xc4", bytearray(b"x")], ids=["int", "bytes", "bytearray"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda value: [value],
        lambda value: {"k": value},
        lambda value: (value,),
        lambda value: [(value,)],
        lambda value: [[[[(value,)]]]],
    ],
    ids=["list", "dict", "tuple", "list of tuples", "deep lists of tuples"],
)
def test_any_depth_is_either_refused_or_comes_back(wrap: Callable[[Any], Any], inner: Any) -> None:
    accepted = refused = 0
    for levels in (1, 2, 31, 32, 33, 60, 120, 300, 480, 511, 512, 513, 1023, 1024, 1025, 5000):
        value = nested(levels, wrap, inner)
        try:
            packed = pack_value(value, "deep")
        except ValueNotSerializable as error:
            assert str(error).startswith("field 'deep' ")  # noqa: PT017
            refused += 1
            continue
        # Comparing them with == would recurse as deep.
        assert spine(unpack_value(packed)) == spine(value)
        accepted += 1
    assert accepted >= 3
    assert refused >= 1


def test_levels_inside_of_tuples_count_together() -> None:
    """The packer begins to count anew in each of them, and the thread's stack does not."""

    def lists_around(value: Any) -> Any:
        return (nested(90, lambda inner: [inner], value),)

    assert unpack_value(pack_value(nested(5, lists_around), "deep")) == nested(5, lists_around)
    for times in (6, 30):
        with pytest.raises(ValueNotSerializable, match="nested too deeply"):
            pack_value(nested(times, lists_around), "deep")
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(ValueNotSerializable, match="nested too deeply"):
        pack_value((circle,), "circle")


@pytest.mark.parametrize("inner", [(1,), {1}, bytearray(b"x")], ids=["tuple", "set", "bytearray"])
def test_how_deep_a_value_may_be_does_not_depend_on_who_stores_it(inner: Any) -> None:
    value = nested(500, lambda value: {"k": value}, inner)

    def from_deep_down(levels: int) -> bytes:
        return from_deep_down(levels - 1) if levels else pack_value(value, "deep")

    assert from_deep_down(sys.getrecursionlimit() - 200) == pack_value(value, "deep")


def test_a_stack_that_is_used_up_is_not_taken_for_damage() -> None:
    packed = pack_value(nested(32, lambda value: (value,)), "deep")

    def from_deep_down() -> None:
        unpack_value(packed)
        from_deep_down()

    with pytest.raises(RecursionError):
        from_deep_down()


def test_a_refused_value_leaves_nothing_behind_in_the_packer() -> None:
    good = {"a": [1, (2, {3})]}
    before = pack_value(good, "f")
    for bad in (*SUBCLASSES, *LOOKALIKES, *FOREIGN, "\ud800", endless(lambda inner: (inner,))):
        for place in ([1, 2, bad], (1, [bad]), {"a": 1, "b": (2, bad)}):
            with pytest.raises(ValueNotSerializable):
                pack_value(place, "f")
            assert pack_value(good, "f") == before


def test_the_message_names_a_field_with_any_name_on_one_line() -> None:
    with pytest.raises(ValueNotSerializable) as caught:
        pack_value(object(), "a\nb\ud800\u202e")
    assert str(caught.value).startswith("field 'a\\nb\\ud800\\u202e' ")
    assert str(caught.value).isascii()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [1, b"a", None, Text("a"), ("a",)])
def test_a_field_name_must_be_exactly_a_str(name: object) -> None:
    with pytest.raises(ValueNotSerializable, match="name must be str, not"):
        rec.check_field_name(name)


def test_a_field_name_that_cannot_even_be_printed_is_refused() -> None:
    with pytest.raises(ValueNotSerializable, match="name must be str, not int"):
        rec.check_field_name(10**5000)


# Hostile bytes

PACKED = VALUES.map(lambda value: pack_value(value, "field"))
MUTATIONS = st.lists(
    st.tuples(st.integers(0, 10_000), st.integers(0, 255), st.sampled_from("rid")), max_size=6
)


def mutated(packed: bytes, mutations: list[tuple[int, int, str]]) -> bytes:
    """Replace, insert or delete single bytes."""
    data = bytearray(packed)
    for place, byte, what in mutations:
        at = place % (len(data) + 1)
        data[at : at + (what != "i")] = b"" if what == "d" else bytes([byte])
    return bytes(data)


def read_or_refuse(packed: bytes) -> None:
    try:
        unpack_value(packed)
    except MalformedValue:
        return


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_a_value_or_malformed(data: bytes) -> None:
    read_or_refuse(data)
    for code in range(-1, 12):
        read_or_refuse(msgpack.packb(msgpack.ExtType(code & 127, data)))


@settings(max_examples=150, deadline=None)
@given(PACKED, MUTATIONS)
def test_damaged_values_are_a_value_or_malformed(
    packed: bytes, mutations: list[tuple[int, int, str]]
) -> None:
    read_or_refuse(mutated(packed, mutations))


@settings(deadline=None)
@given(PACKED)
def test_a_value_that_is_cut_or_has_something_behind_it_is_malformed(packed: bytes) -> None:
    for end in range(len(packed)):
        with pytest.raises(MalformedValue):
            unpack_value(packed[:end])
    with pytest.raises(MalformedValue):
        unpack_value(packed + b"\xc0")


def extension(code: int, data: bytes) -> bytes:
    return b"\xc9" + struct_pack(">IB", len(data), code) + data


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        extension(99, b""),  # an unknown type
        extension(ExtCode.UUID, bytes(15)),
        extension(ExtCode.DECIMAL, b"one"),
        extension(ExtCode.DECIMAL, b"1E+99999999999999999999"),
        extension(ExtCode.DECIMAL, "١".encode()),
        extension(ExtCode.DATE, b"2024-13-01"),
        extension(ExtCode.DATETIME, b"yesterday"),
        extension(ExtCode.TUPLE, b"\x01"),  # no array
        extension(ExtCode.TUPLE, b"\x91"),
        extension(ExtCode.SET, b"\x92\x01"),  # half an element
        extension(ExtCode.SET, b"\x90"),  # an element that cannot be hashed
        extension(ExtCode.FROZENSET, b"\x80"),
        b"\x81\x90\x01",  # a list as a key
        b"\x81" + extension(ExtCode.BYTEARRAY, b"x") + b"\x01",
        b"\xa1\xff",  # no UTF-8
        b"\xc1",  # never used
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\x91" * 100_000,
    ],
)
def test_bytes_that_nobody_packed_are_malformed(packed: bytes) -> None:
    with pytest.raises(MalformedValue):
        unpack_value(packed)


def tuples_in_tuples(levels: int) -> bytes:
    packed = b"\x90"
    for _ in range(levels):
        packed = b"\x91" + extension(ExtCode.TUPLE, packed)
    return packed


def test_extensions_inside_each_other_are_bounded() -> None:
    unpack_value(tuples_in_tuples(30))
    with pytest.raises(MalformedValue, match="nested extensions"):
        unpack_value(tuples_in_tuples(40))


def bomb(inner: bytes, arrays: int, extensions: int) -> bytes:
    """Arrays inside each other, each of which claims as many elements as there are bytes."""
    for _ in range(extensions):
        inner = extension(ExtCode.TUPLE, inner)
        claim = struct_pack(">I", len(inner) + 5 * arrays)
        inner = (b"\xdd" + claim) * arrays + inner
    return inner


@pytest.mark.parametrize(
    "packed",
    [
        b"\xdd" + struct_pack(">I", 2**20) + b"\xc0" * 1000,
        bomb(b"\xc0" * 500, 100, 1),
        bomb(b"\xc0" * 60_000, 500, 1),
        bomb(b"\xc0" * 60_000, 500, 30),
        b"\xdc\xff\xff" * 500 + b"\xc0" * 70_000,
        extension(ExtCode.SET, b"\xdd" + struct_pack(">I", 60_000) + b"\xc0" * 100_000),
        extension(ExtCode.FROZENSET, b"\xdd\x00\x01\x00\x00" * 500 + b"\xc0" * 100_000),
    ],
    ids=lambda packed: str(len(packed)),
)
def test_what_claims_to_be_large_takes_memory_in_proportion_to_its_bytes(packed: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(MalformedValue):
            unpack_value(packed)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 40 * len(packed) + 2**20


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=40), min_size=16, max_size=60))
def test_large_arrays_that_hold_what_they_claim_come_back(value: list[list[int]]) -> None:
    assert unpack_value(pack_value(value * 20, "f")) == value * 20


# Records

PARTS: dict[str, Any] = {
    "incarnation": bytes(range(16)),
    "commit": bytes(range(16, 32)),
    "version": 7,
    "created": 1.5,
    "ttl_seconds": 4.5,
    "flags": RENEWS,
    "user": 12345,
    "meta": b"",
    "fields": {},
}
NAMES = st.text(max_size=40)
FIELDS = st.dictionaries(NAMES, st.binary(max_size=300), max_size=20)


def record_with(**parts: Any) -> bytes:
    return rec.assemble(**{**PARTS, **parts})


@settings(deadline=None)
@given(FIELDS, st.dictionaries(st.text(max_size=8), st.text(min_size=1, max_size=50), max_size=4))
def test_a_record_gives_back_its_parts(fields: dict[str, bytes], meta: dict[str, str]) -> None:
    record = record_with(fields=fields, meta=rec.pack_meta(meta))
    head = rec.head(record)
    assert {name: getattr(head, name) for name in PARTS if hasattr(head, name)} == {
        name: part for name, part in PARTS.items() if hasattr(head, name)
    }
    assert head.user == PARTS["user"]
    assert head.renews
    assert rec.flags_of(record) == PARTS["flags"]
    assert rec.incarnation_of(record) == PARTS["incarnation"]
    assert rec.commit_of(record) == PARTS["commit"]
    assert rec.version_of(record) == PARTS["version"]
    assert rec.created_of(record) == PARTS["created"]
    assert rec.ttl_and_flags_of(record) == (PARTS["ttl_seconds"], PARTS["flags"])
    assert rec.meta_of(record) == meta
    assert list(rec.packed_fields(record).items()) == list(fields.items())
    rec.validate(record)


@settings(deadline=None)
@given(FIELDS, FIELDS)
def test_a_successor_is_what_assembling_its_parts_gives(
    before: dict[str, bytes], fields: dict[str, bytes]
) -> None:
    meta = rec.pack_meta({"source": "web"})
    record = record_with(fields=before, meta=meta)
    expected = record_with(fields=fields, meta=meta, version=PARTS["version"] + 1)
    next_id = bytes(range(32, 48))
    assert rec.successor(record, next_id, fields) == expected[:16] + next_id + expected[32:]


@settings(deadline=None)
@given(FIELDS, st.data())
def test_a_patched_record_is_what_assembling_its_parts_gives(
    before: dict[str, bytes], data: st.DataObject
) -> None:
    some = st.sampled_from(list(before)) if before else st.nothing()
    changed = data.draw(st.dictionaries(some, st.binary(max_size=300), max_size=len(before)))
    meta = rec.pack_meta({"source": "web"})
    record = record_with(fields=before, meta=meta)
    expected = record_with(
        fields={**before, **changed},
        meta=meta,
        commit=bytes(range(32, 48)),
        version=PARTS["version"] + 1,
    )
    layout = rec.layout_of(record)
    if changed:
        assert rec.patched(record, bytes(range(32, 48)), changed, layout) == expected
    assert [rec.packed_field(expected, name) for name in before] == [
        *{**before, **changed}.values()
    ]
    assert rec.packed_field(record, "no such field" * 4) is None


def test_a_patch_of_one_field_may_keep_its_size_or_not() -> None:
    fields = {"a": b"11", "b": b"222", "c": b"3"}
    record = record_with(fields=fields)
    for name, value in fields.items():
        for new in (b"", b"x" * len(value), b"x" * 300):
            patched = rec.patched(record, bytes(16), {name: new}, rec.layout_of(record))
            assert rec.packed_fields(patched) == {**fields, name: new}
            rec.validate(patched)


@pytest.mark.parametrize("meta_bytes", [0, 80_000])
@pytest.mark.parametrize(
    "fields",
    [
        {"a": bytes(65_535), "b": b""},
        {"a": bytes(65_535), "b": b"1"},
        {"a": b"1", "b": bytes(200_000), "c": b"3"},
        {"n" * 65_532: b"1"},
        {"n" * 65_533: b"1", "m": b"2"},
        {f"{number}": bytes(number % 7) for number in range(70_000)},
    ],
    ids=["narrow", "values", "one value", "narrow names", "names", "many"],
)
def test_a_record_is_wide_only_where_it_has_to_be(
    fields: dict[str, bytes], meta_bytes: int, request: pytest.FixtureRequest
) -> None:
    meta = rec.pack_meta({"attributes": "x" * meta_bytes})
    record = record_with(fields=fields, meta=meta)
    assert bool(record[rec.FLAGS_AT] & rec.WIDE) == ("narrow" not in request.node.name)
    assert rec.head(record).flags == PARTS["flags"]
    assert rec.packed_fields(record) == fields
    assert rec.packed_field(record, next(iter(fields))) == next(iter(fields.values()))
    assert rec.with_fields(record[: rec.meta_end_of(record)], fields) == record
    assert rec.meta_of(record) == {"attributes": "x" * meta_bytes}
    rec.validate(record)


def test_a_record_that_grows_becomes_wide_and_one_that_shrinks_may_stay_so() -> None:
    fields = {"a": b"1", "b": b"2", "c": b"3"}
    record = record_with(fields=fields)
    for name, size in [("b", 65_533), ("a", 2), ("b", 5), ("c", 65_536), ("c", 0)]:
        fields[name] = bytes(size)
        record = rec.patched(record, bytes(16), {name: fields[name]}, rec.layout_of(record))
        rec.validate(record)
        assert rec.packed_fields(record) == fields
        assert rec.with_fields(record[: rec.meta_end_of(record)], fields) == record
    assert record[rec.FLAGS_AT] & rec.WIDE
    assert not rec.successor(record, bytes(16), fields)[rec.FLAGS_AT] & rec.WIDE


def test_fields_that_do_not_fit_the_beginning_of_a_record_are_malformed() -> None:
    start = record_with()[:PREFIX_BYTES]
    with pytest.raises(MalformedValue, match="larger than the record says"):
        rec.with_fields(start, {"a": bytes(70_000)})


def test_shapes_are_kept_within_bounds() -> None:
    for number in range(10_000):
        record = record_with(fields={f"n{number}": b"\x01"})
        assert rec.packed_field(record, f"n{number}") == b"\x01"
    record = record_with(fields={"n" * 5000: b"\x01"})
    assert rec.field_names(record) == ("n" * 5000,)
    for shapes in (rec._shapes_by_names, rec._shapes_by_packed):
        assert len(shapes) <= 4096
        assert max(map(len, shapes)) < 5000


def test_values_of_a_large_record_are_views_and_those_of_a_small_one_copies() -> None:
    small = rec.packed_fields(record_with(fields={"a": bytes(100)}))
    large = rec.packed_fields(record_with(fields={"a": bytes(100_000)}))
    assert type(small["a"]) is bytes
    assert type(large["a"]) is memoryview


def test_more_fields_than_fit_in_the_shortest_map_header_come_back() -> None:
    for count in (0, 15, 16, 17, 65_535, 65_536):
        fields = {f"f{number}": b"\x01" for number in range(count)}
        assert rec.packed_fields(record_with(fields=fields)) == fields


@pytest.mark.parametrize("payload", [500, 50_000])
def test_a_record_that_is_cut_or_has_something_behind_it_is_malformed(payload: int) -> None:
    record = record_with(fields={"a": b"\x01", "b": bytes(payload)}, meta=rec.pack_meta({"s": "w"}))
    rec.validate(record)
    for end in (*range(PREFIX_BYTES + 20), len(record) - payload, len(record) - 1):
        with pytest.raises(MalformedValue):
            rec.validate(record[:end])
    with pytest.raises(MalformedValue):
        rec.validate(record + b"\0")


@pytest.mark.parametrize(
    "fields",
    [b"\x01", b"\x90", b"\xc0", b"\x81\x01\xc4\x00", b"\x81\xa1a", b"\x81\xa1\xff\xc4\x00", b""],
)
@pytest.mark.parametrize("padding", [0, 50_000])
def test_fields_that_are_no_map_of_names_are_malformed(fields: bytes, padding: int) -> None:
    start = record_with()[:PREFIX_BYTES]
    with pytest.raises(MalformedValue):
        rec.validate(start + fields + bytes(padding))


def test_metadata_that_is_empty_takes_no_bytes() -> None:
    assert rec.pack_meta({"user_id": None, "source": None, "attributes": {}}) == b""
    assert rec.meta_of(record_with()) == {}


def test_metadata_that_cannot_be_stored_names_its_entry() -> None:
    with pytest.raises(ValueNotSerializable, match=r"^field 'source' "):
        rec.pack_meta({"client_ip": "1.2.3.4", "source": object()})
    with pytest.raises(ValueTooLarge, match="less than 16 MiB"):
        rec.pack_meta({"attributes": "x" * 2**24})


def test_a_field_name_with_lone_surrogates_is_named() -> None:
    with pytest.raises(ValueNotSerializable, match=r"^field 'a\\ud800' .*surrogates"):
        record_with(fields={"good": b"\x01", "a\ud800": b"\x01"})
    assert rec.packed_fields(record_with(fields={"good": b"\x01"})) == {"good": b"\x01"}


# Threads


def test_values_are_packed_and_unpacked_in_several_threads_at_once() -> None:
    values = [
        {"n": number, "t": ((number,), [number] * 50, {number, -number}), "s": string.printable}
        for number in range(200)
    ]
    expected = [pack_value(value, "f") for value in values]

    def work(_: int) -> list[bytes]:
        packed = []
        for value in values:
            with pytest.raises(ValueNotSerializable):
                pack_value([value, object()], "f")
            packed.append(pack_value(value, "f"))
            assert unpack_value(packed[-1]) == value
        return packed

    with ThreadPoolExecutor(8) as pool:
        assert all(packed == expected for packed in pool.map(work, range(16)))
