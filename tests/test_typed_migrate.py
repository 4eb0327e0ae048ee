"""Each class is asked for its own ``migrate`` hook, and what a hook does wrong is said."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import pydantic
import pytest

from persistence.errors import SchemaMismatch
from tests.engine import OpenTyped, data_of


def migrated(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "amount": int(data["amount"])}


@dataclass
class DataPrice:
    amount: int = 0

    @classmethod
    def migrate(cls, data: dict[str, Any]) -> dict[str, Any]:
        return migrated(data)


class StructPrice(msgspec.Struct):
    amount: int = 0

    @staticmethod
    def migrate(data: dict[str, Any]) -> dict[str, Any]:
        return migrated(data)


class ModelPrice(pydantic.BaseModel, strict=True):
    amount: int = 0

    @classmethod
    def migrate(cls, data: dict[str, Any]) -> dict[str, Any]:
        return migrated(data)


OLD = {"amount": "12"}
PRICES = [DataPrice, StructPrice, ModelPrice]


@pytest.mark.parametrize("price", PRICES)
async def test_the_hook_of_a_class_inside_is_asked(open_typed: OpenTyped, price: Any) -> None:
    @dataclass
    class Shop:
        one: price
        maybe: price | None = None
        some: list[price] = field(default_factory=list)
        named: dict[str, price] = field(default_factory=dict)

    Shop.__annotations__ = {
        "one": price,
        "maybe": price | None,
        "some": list[price],
        "named": dict[str, price],
    }
    old = {"one": OLD, "maybe": OLD, "some": [OLD, {"amount": 5}], "named": {"x": OLD}}
    new = Shop(price(amount=12), price(amount=12), [price(amount=12), price(amount=5)], {})
    new.named["x"] = price(amount=12)
    state = await open_typed(Shop)
    sid = await state.create_session(data=old)
    assert await state.get_typed(sid) == new
    assert await data_of(state, sid) == old  # reading changes nothing
    async with state.edit_typed(sid) as shop:
        shop.maybe = None
    data = await data_of(state, sid)
    assert data["some"] == [{"amount": 12}, {"amount": 5}]  # the edit stores what was migrated


@pytest.mark.parametrize("price", PRICES)
async def test_the_hook_is_asked_in_any_type_of_a_single_field(
    open_typed: OpenTyped, price: Any
) -> None:
    for wanted, stored, read in (
        (price, OLD, price(amount=12)),
        (price | None, OLD, price(amount=12)),
        (price | int, OLD, price(amount=12)),
        (list[price], [OLD], [price(amount=12)]),
        (dict[str, list[price]], {"x": [OLD]}, {"x": [price(amount=12)]}),
    ):
        state = await open_typed({"x": wanted})
        sid = await state.create_session(data={"x": stored})
        assert await state.get_typed(sid) == {"x": read}


async def test_the_hook_around_is_asked_where_that_inside_does_not_help(
    open_typed: OpenTyped,
) -> None:
    @dataclass
    class Shop:
        price: Any = None

        @classmethod
        def migrate(cls, data: dict[str, Any]) -> dict[str, Any]:
            return {"price": {"amount": -1}}

    Shop.__annotations__["price"] = DataPrice
    state = await open_typed(Shop)
    sid = await state.create_session(data={"price": {"amount": "twelve"}})
    assert await state.get_typed(sid) == Shop(DataPrice(-1))


@pytest.mark.parametrize("price", PRICES)
async def test_a_hook_that_raises_is_an_error_that_names_it(
    open_typed: OpenTyped, price: Any
) -> None:
    class Raises(price):  # type: ignore[misc]
        @classmethod
        def migrate(cls, data: dict[str, Any]) -> dict[str, Any]:
            data["amount"] = 0  # a copy: nothing that is stored changes
            raise KeyError("currency")

    for schema, data, place in (
        (Raises, OLD, "amount"),
        ({"x": list[Raises]}, {"x": [OLD]}, "x[0].amount"),
    ):
        state = await open_typed(schema)
        sid = await state.create_session(session_id=f"the {place}", data=data)
        for call in (state.get_typed(sid), state.update_typed(sid, lambda _: None)):
            with pytest.raises(SchemaMismatch) as caught:
                await call
            error = caught.value
            assert (error.session_id, error.field) == (sid, place)
            assert (error.stored_type, error.wanted_type) == ("str", "int")
            assert "Raises.migrate raised KeyError: 'currency'" in str(error).replace(
                "<locals>.", ""
            )
            assert "the stored data are unchanged" in str(error)
            assert isinstance(error.__cause__, KeyError)
        assert await data_of(state, sid) == data


@pytest.mark.parametrize("price", PRICES)
async def test_a_hook_that_returns_no_object_is_an_error_about_what_is_stored(
    open_typed: OpenTyped, price: Any
) -> None:
    class ReturnsNone(price):  # type: ignore[misc]
        @classmethod
        def migrate(cls, data: dict[str, Any]) -> None:
            data["amount"] = 0

    state = await open_typed(ReturnsNone)
    sid = await state.create_session(data=OLD)
    with pytest.raises(SchemaMismatch, match=r"migrate returned NoneType") as caught:
        await state.get_typed(sid)
    assert (caught.value.field, caught.value.stored_type) == ("amount", "str")
    assert await data_of(state, sid) == OLD


async def test_a_method_of_the_objects_is_no_hook(open_typed: OpenTyped) -> None:
    @dataclass
    class Bird:
        n: int = 0

        def migrate(self) -> None:
            raise AssertionError("it was called")

    state = await open_typed(Bird)
    sid = await state.create_session(data={"n": "many"})
    with pytest.raises(SchemaMismatch, match="stored is str"):
        await state.get_typed(sid)


async def test_the_advice_names_the_class_whose_hook_would_be_asked(
    open_typed: OpenTyped,
) -> None:
    state = await open_typed({"x": list[DataPrice | None], "n": int})
    sid = await state.create_session(data={"n": "many"})
    with pytest.raises(SchemaMismatch, match="the schema wants int") as caught:
        await state.get_typed(sid)
    assert "migrate" not in str(caught.value)
