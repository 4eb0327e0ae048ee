"""The JSON Lines form of sessions: every value comes back as what it was."""

from __future__ import annotations

import json
import math
import struct
import sys
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persistence.cli.jsonl import LineError, decode, encode, from_json, to_json
from persistence.record import pack_value

text = st.text(st.characters(exclude_categories=["Cs"]))
offsets = (
    st.integers(-86_399_999_999, 86_399_999_999).filter(lambda each: abs(each) >= 1_000_000)
    | st.integers(-86_399, 86_399).map(lambda seconds: seconds * 1_000_000)
).map(lambda microseconds: timezone(timedelta(microseconds=microseconds)))
atoms = (
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | text
    | st.binary()
    | st.dates()
    | st.datetimes(timezones=offsets)
    | st.uuids()
    | st.decimals()
)
hashables = st.recursive(
    atoms.filter(lambda atom: not isinstance(atom, Decimal) or not atom.is_snan()),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=6,
)
values = st.recursive(
    hashables | st.binary().map(bytearray) | st.sets(hashables, max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(hashables | st.sampled_from(["$date", "$map", "$"]), inner, max_size=4)
    ),
    max_leaves=20,
)


def same(left: Any, right: Any) -> bool:
    """Equal, of equal types all the way down; floats are compared by their bits."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return struct.pack("d", left) == struct.pack("d", right)
    if isinstance(left, Decimal):
        return str(left) == str(right)
    if isinstance(left, dict):
        return len(left) == len(right) and all(
            same(list(one), list(other))
            for one, other in zip(left.items(), right.items(), strict=True)
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, set | frozenset):
        # Equal sets are equal packed bytes; NaN is no equal of itself, but its bytes are.
        return pack_value(left, "x") == pack_value(right, "x")
    if isinstance(left, datetime):
        return bool(left == right) and left.utcoffset() == right.utcoffset()
    return bool(left == right)


@settings(deadline=None)
@given(st.dictionaries(text, values, max_size=4))
def test_every_value_comes_back_as_what_it_was(data: dict[str, Any]) -> None:
    line = encode({"id": "s", "data": data})
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert same(decode(line).get("data", {}), data)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ({"a": [1, None, True, 1.5, "ü"]}, {"a": [1, None, True, 1.5, "ü"]}),
        (datetime(2026, 2, 28, 1, 2, 3, 4, UTC), {"$datetime": "2026-02-28T01:02:03.000004+00:00"}),
        (date(2026, 2, 28), {"$date": "2026-02-28"}),
        (UUID(int=5), {"$uuid": "00000000-0000-0000-0000-000000000005"}),
        (Decimal("1.50"), {"$decimal": "1.50"}),
        (2**53, 2**53),
        (2**53 + 1, {"$int": "9007199254740993"}),
        (-(2**64), {"$int": "-18446744073709551616"}),
        (math.nan, {"$float": "nan"}),
        (-math.nan, {"$float": "fff8000000000000"}),
        (math.inf, {"$float": "inf"}),
        (-math.inf, {"$float": "-inf"}),
        (b"\x00\x01", {"$bytes": "AAE="}),
        (bytearray(b"\x00\x01"), {"$bytearray": "AAE="}),
        ((1, "a"), {"$tuple": [1, "a"]}),
        ({1}, {"$set": [1]}),
        (frozenset({1}), {"$frozenset": [1]}),
        ({1: "a", "b": 2}, {"$map": [[1, "a"], ["b", 2]]}),
        ({"$date": "x"}, {"$map": [["$date", "x"]]}),
        ({"$new": 1}, {"$map": [["$new", 1]]}),
        ({"$a": 1, "$b": 2}, {"$a": 1, "$b": 2}),
    ],
)
def test_the_documented_form_of_each_type(value: Any, plain: Any) -> None:
    assert to_json(value) == plain
    assert same(from_json(json.loads(json.dumps(plain))), value)


@pytest.mark.parametrize("microseconds", [1, -1, 999_999, -999_999, 1_000_001, -3_600_000_001])
def test_an_offset_comes_back_to_the_microsecond(microseconds: int) -> None:
    """Also one that no session holds: an import refuses it, and takes it for no other."""
    offset = timedelta(microseconds=microseconds)
    value = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=timezone(offset))
    assert from_json(to_json(value)).utcoffset() == offset


def test_an_integer_beyond_the_interpreters_digits_comes_back() -> None:
    value = -(1 << 100_000)
    assert from_json(to_json(value)) == value


def test_nesting_as_deep_as_a_record_holds_comes_back() -> None:
    value: Any = 1
    for _ in range(500):
        value = {1: [value]} if _ % 2 else [value]
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    try:
        assert decode(encode({"id": "s", "data": {"a": value}}))["data"]["a"] == value
    finally:
        sys.setrecursionlimit(before)


def test_a_type_that_sessions_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="complex"):
        to_json({"a": 1j})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"id":"s"\r\n', r"delimiter at column 10$"),
        (b'\xef\xbb\xbf{"id":"s"}', "not JSON"),
        (b"[]", "not a map"),
        (b"\xff{}", "not UTF-8 at byte 0"),
        (b'{"id": NaN}', "NaN"),
        (b'{"id": "s", "data": {"n": 1e400}}', "1e400 is too large for a float"),
        (b'{"id": "s", "data": {"n": ' + b"9" * 5000 + b"}}", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{}", "no id"),
        (b'{"id": 5}', "id is 5, not text"),
        (b'{"id": "s", "colour": 1}', "unknown field 'colour'"),
        (b'{"id": "s", "data": []}', r"data is \[\], not a map"),
        (b'{"id": "s", "auto_renew": 1}', "auto_renew is 1"),
        (b'{"id": "s", "ttl_seconds": true}', "ttl_seconds is True"),
        (b'{"id": "s", "data": {"a": {"$what": 1}}}', "unknown tag '\\$what'"),
        (b'{"id": "s", "data": {"a": {"$date": "2026-02-30"}}}', "date does not hold"),
        (b'{"id": "s", "data": {"a": {"$date": 5}}}', "date does not hold"),
        (b'{"id": "s", "data": {"a": {"$datetime": "2026-02-03"}}}', "datetime does not hold"),
        (b'{"id": "s", "data": {"a": {"$uuid": "x"}}}', "uuid does not hold"),
        (b'{"id": "s", "data": {"a": {"$decimal": "x"}}}', "decimal does not hold"),
        (b'{"id": "s", "data": {"a": {"$float": "1.5"}}}', "float does not hold"),
        (b'{"id": "s", "data": {"a": {"$bytes": "***"}}}', "bytes does not hold"),
        (b'{"id": "s", "data": {"a": {"$set": [[]]}}}', "set does not hold"),
        (b'{"id": "s", "data": {"a": {"$set": 5}}}', "set does not hold"),
        (b'{"id": "s", "data": {"a": {"$map": [["a"]]}}}', "map does not hold"),
        (b'{"id": "s", "data": {"a": {"$map": ["ab"]}}}', "map does not hold"),
        (b'{"id": "s", "data": {"a": {"$map": [["a", 1], ["a", 2]]}}}', "map does not hold"),
        (b'{"id": "s", "data": {"a": {"$tuple": [{"$no": 1}]}}}', "unknown tag"),
    ],
)
def test_a_wrong_line_says_what_is_wrong(line: bytes, reason: str) -> None:
    with pytest.raises(LineError, match=reason):
        decode(line)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_break_the_decoder(line: bytes) -> None:
    with suppress(LineError):
        decode(line)
