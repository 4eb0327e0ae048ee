"""No library converts a value into another kind of value unasked."""

from __future__ import annotations

import datetime
from dataclasses import field, make_dataclass
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec
import pytest

from persistence.errors import InvalidArgument, SchemaMismatch
from tests.engine import OpenTyped

SOME_ID = UUID(int=5)
NOON = datetime.datetime(2026, 1, 2, 12, tzinfo=datetime.UTC)


def struct_of(wanted: Any) -> Any:
    return msgspec.defstruct("Struct", [("x", wanted | None, None)])


def dataclass_of(wanted: Any) -> Any:
    return make_dataclass("Data", [("x", wanted | None, field(default=None))])


@pytest.mark.parametrize("class_of", [struct_of, dataclass_of])
@pytest.mark.parametrize(
    ("wanted", "stored"),
    [
        (bytes, "aGVsbG8="),
        (str, b"hello"),
        (datetime.date, "2026-01-02"),
        (datetime.datetime, NOON.isoformat()),
        (UUID, str(SOME_ID)),
        (UUID, SOME_ID.bytes),
        (Decimal, "9.99"),
        (Decimal, 9.5),
        (Decimal, 9),
        (int, "5"),
        (int, 5.0),
        (bool, 1),
        (list[UUID], [str(SOME_ID)]),
        (set[UUID], {str(SOME_ID)}),
        (set[int], {"5"}),
        (dict[UUID, int], {str(SOME_ID): 1}),
        (dict[str, bytes], {"x": "aGVsbG8="}),
    ],
    ids=str,
)
async def test_what_is_stored_as_another_kind_is_refused(
    open_typed: OpenTyped, class_of: Any, wanted: Any, stored: Any
) -> None:
    state = await open_typed(class_of(wanted))
    sid = await state.create_session(data={"x": stored})
    with pytest.raises(SchemaMismatch, match="field 'x"):
        await state.get_typed(sid)


@pytest.mark.parametrize("class_of", [struct_of, dataclass_of])
@pytest.mark.parametrize(
    ("wanted", "value"),
    [
        (bytes, b"hello"),
        (datetime.date, NOON.date()),
        (datetime.datetime, NOON),
        (UUID, SOME_ID),
        (Decimal, Decimal("9.99")),
        (float, 5),
        (list[float], [5, 2.5]),
        (set[float], {5, 2.5}),
        (list[UUID], [SOME_ID]),
        (set[UUID], {SOME_ID}),
        (dict[UUID, bytes], {SOME_ID: b"x"}),
        (int, 10**5000),
        (Any, {"x": [1, (2, {3})]}),
    ],
    ids=lambda each: "" if type(each) is int else str(each),
)
async def test_what_is_stored_as_that_kind_comes_back(
    open_typed: OpenTyped, class_of: Any, wanted: Any, value: Any
) -> None:
    kind = class_of(wanted)
    state = await open_typed(kind)
    sid = await state.create_session(data=kind(x=value))
    assert (await state.get_typed(sid)).x == value


async def test_a_type_that_a_struct_cannot_have_is_refused_by_its_name(
    open_typed: OpenTyped,
) -> None:
    state = await open_typed(struct_of(datetime.date | UUID))
    sid = await state.create_session(data={"x": 5})
    with pytest.raises(InvalidArgument, match="objects cannot be made of"):
        await state.get_typed(sid)
