"""What is stored of an object comes back, whatever names a library has for its attributes."""

from __future__ import annotations

from typing import Any

import msgspec
import pydantic
import pytest
from pydantic import AliasChoices, AliasGenerator, AliasPath, ConfigDict, Field

from persistence import StateManager
from persistence.errors import InvalidArgument
from persistence.typed import Schema
from tests.engine import OpenTyped, data_of


class SerializationAlias(pydantic.BaseModel):
    n: int = Field(0, serialization_alias="N")


class ValidationAlias(pydantic.BaseModel):
    n: int = Field(0, validation_alias="N")


class Alias(pydantic.BaseModel):
    n: int = Field(0, alias="N")


class ThreeAliases(pydantic.BaseModel):
    n: int = Field(0, alias="A", validation_alias="V", serialization_alias="S")


class Choices(pydantic.BaseModel):
    n: int = Field(0, validation_alias=AliasChoices(AliasPath("deep", "n"), "N"))


class Path(pydantic.BaseModel):
    n: int = Field(0, validation_alias=AliasPath("numbers", 1))
    m: int = Field(0, validation_alias=AliasPath("numbers", 0))


class Generated(pydantic.BaseModel):
    model_config = ConfigDict(alias_generator=str.upper)
    n: int = 0


class GeneratedApart(pydantic.BaseModel):
    model_config = ConfigDict(
        alias_generator=AliasGenerator(
            validation_alias=lambda name: f"in_{name}",
            serialization_alias=lambda name: f"out_{name}",
        )
    )
    n: int = 0


class EitherName(pydantic.BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    n: int = Field(0, alias="N")


class ForbidsMore(pydantic.BaseModel):
    model_config = ConfigDict(extra="forbid")
    n: int = Field(0, validation_alias=AliasPath("numbers", 0))

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def twice(self) -> int:
        return 2 * self.n


class ShapesItself(pydantic.BaseModel):
    n: int = 0

    @pydantic.model_serializer
    def shape(self) -> dict[str, Any]:
        return {"number": self.n}

    @pydantic.model_validator(mode="before")
    @classmethod
    def unshape(cls, data: Any) -> Any:
        return {"n": data["number"]} if "number" in data else data


class Root(pydantic.RootModel[list[int]]):
    pass


@pydantic.dataclasses.dataclass
class AliasedDataclass:
    n: int = Field(0, alias="N")


class Renamed(msgspec.Struct, rename="upper"):
    n: int = 0


class AsArray(msgspec.Struct, array_like=True):
    n: int = 0


MODELS = [
    SerializationAlias,
    ValidationAlias,
    Alias,
    ThreeAliases,
    Choices,
    Path,
    Generated,
    GeneratedApart,
    EitherName,
    ForbidsMore,
    ShapesItself,
    AliasedDataclass,
    Renamed,
    AsArray,
]


def made(kind: Any, n: int) -> Any:
    found = kind()
    found.n = n
    return found


@pytest.mark.parametrize("kind", MODELS)
async def test_a_value_comes_back_under_whatever_name_it_is_stored(
    open_typed: OpenTyped, kind: Any
) -> None:
    state = await open_typed(kind)
    sid = await state.create_session(data=made(kind, 5))
    assert await state.get_typed(sid) == made(kind, 5)
    for _ in range(2):
        async with state.edit_typed(sid) as found:
            found.n += 1
    assert (await state.get_typed(sid)).n == 7
    await state.replace_session(sid, made(kind, 8))
    assert (await state.get_typed(sid)).n == 8


@pytest.mark.parametrize("kind", MODELS)
async def test_a_value_comes_back_from_inside_other_objects(
    open_typed: OpenTyped, kind: Any
) -> None:
    class Around(pydantic.BaseModel):
        model_config = ConfigDict(arbitrary_types_allowed=True)
        one: kind
        some: list[kind]
        named: dict[str, kind | None]

    around = Around(
        one=made(kind, 1), some=[made(kind, 2)], named={"x": made(kind, 3), "none": None}
    )
    for schema, data in ((Around, around), ({"around": Around}, {"around": around})):
        state = await open_typed(schema)
        sid = await state.create_session(data=data)
        assert await state.get_typed(sid) == data


async def test_a_value_is_stored_under_the_name_that_pydantic_serializes_it_by(
    open_typed: OpenTyped,
) -> None:
    for kind, name in ((SerializationAlias, "N"), (ValidationAlias, "n"), (ThreeAliases, "S")):
        state = await open_typed(kind)
        sid = await state.create_session(data=made(kind, 5))
        assert await data_of(state, sid) == {name: 5}


async def test_a_dataclass_of_pydantic_that_was_stored_by_its_own_names_is_read(
    open_typed: OpenTyped,
) -> None:
    state = await open_typed(AliasedDataclass)
    sid = await state.create_session(data={"n": 5})
    async with state.edit_typed(sid) as found:
        assert found.n == 5
        found.n = 6
    assert (await state.get_typed(sid)).n == 6


async def test_a_root_model_comes_back_as_a_single_field(open_typed: OpenTyped) -> None:
    state = await open_typed({"root": Root})
    sid = await state.create_session(data={"root": Root([1, 2])})
    assert await data_of(state, sid) == {"root": [1, 2]}
    assert await state.get_typed(sid) == {"root": Root([1, 2])}
    with pytest.raises(InvalidArgument, match="schema = "):
        StateManager(schema=Root)


async def test_extra_fields_of_a_model_that_allows_them_come_back_and_can_be_deleted(
    open_typed: OpenTyped,
) -> None:
    class Open(pydantic.BaseModel):
        model_config = ConfigDict(extra="allow")
        n: int = 0

        @pydantic.computed_field  # type: ignore[prop-decorator]
        @property
        def twice(self) -> int:
            return 2 * self.n

    state = await open_typed(Open)
    sid = await state.create_session(data=Open(n=5, colour="red", size=3))  # type: ignore[call-arg]
    async with state.edit_typed(sid) as found:
        assert found == Open(n=5, colour="red", size=3)  # type: ignore[call-arg]
        found.colour = "blue"
        del found.size
    assert await data_of(state, sid) == {"n": 5, "twice": 10, "colour": "blue"}


def test_two_attributes_that_are_stored_under_one_name_are_refused() -> None:
    class Twice(pydantic.BaseModel):
        a: int = Field(0, serialization_alias="n")
        n: int = 0

    with pytest.raises(InvalidArgument, match="Twice has two attributes that are stored as 'n'"):
        Schema(Twice)


async def test_a_mismatch_is_named_as_it_is_stored(open_typed: OpenTyped) -> None:
    for kind, name in ((SerializationAlias, "N"), (Path, "n"), (GeneratedApart, "out_n")):
        state = await open_typed(kind)
        sid = await state.create_session(data={name: "many"})
        with pytest.raises(TypeError) as caught:
            await state.get_typed(sid)
        error: Any = caught.value
        assert (error.field, error.stored_type, error.wanted_type) == (name, "str", "int")
