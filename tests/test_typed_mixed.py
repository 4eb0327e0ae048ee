"""Structs, dataclasses and models inside each other, and inside lists, dicts and unions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Generic, Literal, NewType, TypeVar

import msgspec
import pydantic
import pytest
from annotated_types import MinLen

from persistence.errors import SchemaMismatch
from tests.engine import OpenTyped, data_of

T = TypeVar("T")


@dataclass
class Data:
    n: int = 1


class Struct(msgspec.Struct):
    n: int = 1


class Model(pydantic.BaseModel):
    n: int = 1


KINDS = [Data, Struct, Model]


def around(outer: Any, inner: Any) -> Any:
    """Return a class of the kind of `outer` whose attributes have objects of `inner`."""
    types = {
        "one": inner,
        "some": list[inner],
        "named": dict[str, inner],
        "pair": tuple[inner, int],
        "maybe": inner | None,
    }
    if outer is Struct:
        return msgspec.defstruct("AroundStruct", list(types.items()))
    if outer is Model:
        config = pydantic.ConfigDict(arbitrary_types_allowed=True)
        fields: Any = {name: (each, ...) for name, each in types.items()}
        return pydantic.create_model("AroundModel", __config__=config, **fields)
    return dataclass(type("AroundData", (), {"__annotations__": types}))


@pytest.mark.parametrize("outer", KINDS)
@pytest.mark.parametrize("inner", KINDS)
async def test_objects_of_one_kind_come_back_from_inside_those_of_another(
    open_typed: OpenTyped, outer: Any, inner: Any
) -> None:
    kind = around(outer, inner)
    given = kind(
        one=inner(n=5),
        some=[inner(n=6)],
        named={"x": inner(n=7)},
        pair=(inner(n=8), 1),
        maybe=inner(n=9),
    )
    state = await open_typed(kind)
    sid = await state.create_session(data=given)
    assert await state.get_typed(sid) == given
    async with state.edit_typed(sid) as found:
        found.some[0].n = 60
        found.maybe = None
    data = await data_of(state, sid)
    assert (data["some"], data["maybe"]) == ([{"n": 60}], None)


@pytest.mark.parametrize("outer", KINDS)
@pytest.mark.parametrize("inner", KINDS)
async def test_a_mismatch_inside_is_named_with_its_place_and_class(
    open_typed: OpenTyped, outer: Any, inner: Any
) -> None:
    state = await open_typed(around(outer, inner))
    good = {"n": 1}
    data = {"one": good, "some": [good], "named": {"x": good}, "pair": (good, 1), "maybe": None}
    for wrong, place in (
        ({"one": {"n": "many"}}, "one.n"),
        ({"some": [good, {"n": "many"}]}, "some[1].n"),
        ({"named": {"x": {"n": "many"}}}, "named.x.n"),
        ({"pair": ({"n": "many"}, 1)}, "pair[0].n"),
        ({"maybe": {"n": "many"}}, "maybe.n"),
    ):
        sid = await state.create_session(data={**data, **wrong})
        with pytest.raises(SchemaMismatch, match=f"{inner.__name__} wants int") as caught:
            await state.get_typed(sid)
        error = caught.value
        assert (error.field, error.stored_type, error.wanted_type) == (place, "str", "int")


Number = NewType("Number", Data)


@dataclass
class Box(Generic[T]):
    content: T
    others: list[T] = field(default_factory=list)


@dataclass
class StructBox(Box[Struct]):
    label: str = ""


K = TypeVar("K")


@dataclass
class Labelled(Box[K], Generic[K, T]):
    label: T | None = None


@dataclass
class LabelledStructBox(Labelled[Struct, Data]):
    pass


@dataclass
class Node:
    name: str
    below: list[Node] = field(default_factory=list)


@pytest.mark.parametrize(
    ("wanted", "value"),
    [
        (Sequence[Struct], [Struct(n=2)]),
        (Mapping[str, Struct], {"x": Struct(n=2)}),
        (tuple[Struct, ...], (Struct(n=2), Struct(n=3))),
        (dict[int, list[Struct]], {5: [Struct(n=2)]}),
        (Annotated[list[Struct], MinLen(1)], [Struct(n=2)]),
        (Final[Data], Data(2)),
        (Number, Data(2)),
        (Box[Struct], Box(Struct(n=2), [Struct(n=3)])),
        (Box[int], Box(2, [3])),
        (StructBox, StructBox(Struct(n=2), [Struct(n=3)], "x")),
        (Labelled[Struct, Data], Labelled(Struct(n=2), [Struct(n=3)], Data(4))),
        (LabelledStructBox, LabelledStructBox(Struct(n=2), [Struct(n=3)], Data(4))),
        (Node, Node("a", [Node("b", [Node("c")])])),
        (Struct | int, 5),
        (Struct | int, Struct(n=5)),
        (list[Struct] | Struct, [Struct(n=5)]),
    ],
    ids=str,
)
async def test_a_single_field_may_be_of_any_type_with_objects_in_it(
    open_typed: OpenTyped, wanted: Any, value: Any
) -> None:
    state = await open_typed({"x": wanted})
    sid = await state.create_session(data={"x": value})
    found = (await state.get_typed(sid))["x"]
    assert (found, type(found)) == (value, type(value))


async def test_what_an_annotation_demands_beside_the_type_is_demanded(
    open_typed: OpenTyped,
) -> None:
    state = await open_typed({"x": Annotated[list[Struct], MinLen(1)]})
    sid = await state.create_session(data={"x": []})
    with pytest.raises(SchemaMismatch, match="field 'x'"):
        await state.get_typed(sid)


@dataclass
class Cat:
    name: str = ""
    lives: int = 9


@dataclass
class Dog:
    name: str = ""
    tricks: list[str] = field(default_factory=list)


class Circle(pydantic.BaseModel):
    kind: Literal["circle"] = "circle"
    size: int = 0


class Square(pydantic.BaseModel):
    kind: Literal["square"] = "square"
    size: int = 0


@pytest.mark.parametrize(
    "wanted", [Circle | Square, Annotated[Circle | Square, pydantic.Field(discriminator="kind")]]
)
async def test_a_literal_tells_the_classes_of_a_union_apart(
    open_typed: OpenTyped, wanted: Any
) -> None:
    class Drawing(pydantic.BaseModel):
        shapes: list[wanted]

    state = await open_typed(Drawing)
    drawing = Drawing(shapes=[Square(size=1), Circle(size=2)])
    sid = await state.create_session(data=drawing)
    assert await state.get_typed(sid) == drawing


async def test_their_attributes_tell_the_classes_of_a_union_apart(open_typed: OpenTyped) -> None:
    state = await open_typed({"pets": list[Cat | Dog]})
    pets = [Dog("rex", ["sit"]), Cat("tom")]
    sid = await state.create_session(data={"pets": pets})
    assert await state.get_typed(sid) == {"pets": pets}
