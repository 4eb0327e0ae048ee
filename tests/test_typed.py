from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pydantic
import pytest

from persistence import StateManager, worker
from persistence.errors import ConflictError, InvalidArgument, SchemaMismatch, SessionNotFound
from persistence.typed import Schema, plain
from tests.engine import OpenTyped as Open
from tests.engine import config_for, data_of


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class DataItem:
    name: str
    qty: int = 1


@dataclass
class DataCart:
    items: list[DataItem] = field(default_factory=list)
    total: Decimal = Decimal(0)
    colour: Colour = Colour.RED
    tags: set[str] = field(default_factory=set)
    at: datetime | None = None


class StructItem(msgspec.Struct):
    name: str
    qty: int = 1


class StructCart(msgspec.Struct):
    items: list[StructItem] = []
    total: Decimal = Decimal(0)
    colour: Colour = Colour.RED
    tags: set[str] = msgspec.field(default_factory=set)
    at: datetime | None = None


class ModelItem(pydantic.BaseModel):
    name: str
    qty: int = 1


class ModelCart(pydantic.BaseModel):
    items: list[ModelItem] = []
    total: Decimal = Decimal(0)
    colour: Colour = Colour.RED
    tags: set[str] = set()
    at: datetime | None = None


ALL = [(DataCart, DataItem), (StructCart, StructItem), (ModelCart, ModelItem)]
NAMES = ["dataclass", "msgspec", "pydantic"]
AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(("cart_type", "item_type"), ALL, ids=NAMES)
async def test_objects_go_in_and_come_out(open_typed: Open, cart_type: Any, item_type: Any) -> None:
    state = await open_typed(cart_type)
    cart = cart_type(
        items=[item_type(name="dune", qty=2)],
        total=Decimal("9.99"),
        colour=Colour.BLUE,
        tags={"a", "b"},
        at=AT,
    )
    sid = await state.create_session(data=cart)
    assert await state.get_typed(sid) == cart
    assert type(await state.get_typed(sid)) is cart_type


@pytest.mark.parametrize(("cart_type", "item_type"), ALL, ids=NAMES)
async def test_what_is_stored_is_plain(open_typed: Open, cart_type: Any, item_type: Any) -> None:
    state = await open_typed(cart_type)
    sid = await state.create_session(data=cart_type(items=[item_type(name="dune")], at=AT))
    assert await data_of(state, sid) == {
        "items": [{"name": "dune", "qty": 1}],
        "total": Decimal(0),
        "colour": "red",
        "tags": set(),
        "at": AT,
    }
    state = await open_typed(None)  # readable without any class
    assert (await data_of(state, sid))["items"] == [{"name": "dune", "qty": 1}]


@pytest.mark.parametrize(("cart_type", "item_type"), ALL, ids=NAMES)
async def test_an_edit_writes_what_changed_inside_the_object(
    open_typed: Open, cart_type: Any, item_type: Any
) -> None:
    state = await open_typed(cart_type)
    sid = await state.create_session(data=cart_type(items=[item_type(name="dune")]))
    async with state.edit_typed(sid) as cart:
        cart.items[0].qty = 5
        cart.items.append(item_type(name="emma"))
    again = await state.get_typed(sid)
    assert [(each.name, each.qty) for each in again.items] == [("dune", 5), ("emma", 1)]
    session = await state.get_session(sid)
    assert session.version == 2


@pytest.mark.parametrize(("cart_type", "item_type"), ALL, ids=NAMES)
async def test_an_edit_that_changes_nothing_writes_nothing(
    open_typed: Open, cart_type: Any, item_type: Any
) -> None:
    state = await open_typed(cart_type)
    sid = await state.create_session(data={"items": [{"name": "dune"}]})
    async with state.edit_typed(sid) as cart:
        assert cart.items[0].qty == 1
    session = await state.update_typed(sid, lambda cart: cart.items[0].name.upper())
    assert (session.version, session.data) == (1, {"items": [{"name": "dune"}]})


@pytest.mark.parametrize(("cart_type", "item_type"), ALL, ids=NAMES)
async def test_an_exception_in_an_edit_leaves_no_trace(
    open_typed: Open, cart_type: Any, item_type: Any
) -> None:
    state = await open_typed(cart_type)
    sid = await state.create_session(data=cart_type())

    async def edit() -> None:
        async with state.edit_typed(sid) as cart:
            cart.items.append(item_type(name="dune"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await edit()
    assert (await state.get_typed(sid)).items == []


@pytest.mark.parametrize(("cart_type", "item_type"), ALL, ids=NAMES)
async def test_updates_take_functions_and_replacements(
    open_typed: Open, cart_type: Any, item_type: Any
) -> None:
    state = await open_typed(cart_type)
    sid = await state.create_session(data=cart_type())
    await state.update_typed(sid, lambda cart: cart.items.append(item_type(name="dune")))
    await state.update_typed(sid, lambda _: cart_type(total=Decimal(5)))
    assert await state.get_typed(sid) == cart_type(total=Decimal(5))
    await state.replace_session(sid, cart_type(colour=Colour.BLUE))
    assert await state.get_typed(sid) == cart_type(colour=Colour.BLUE)
    await state.update_session_data(sid, "items", [item_type(name="emma")])
    assert (await state.get_typed(sid)).items == [item_type(name="emma")]
    found = await state.get_or_create_session("new", data=cart_type(total=Decimal(7)))
    assert state.typed(found).total == Decimal(7)


@pytest.mark.parametrize(
    "function",
    [
        lambda fields: fields["profile"],
        lambda fields: fields.setdefault("profile", {}),
        lambda fields: fields["cart"],
        lambda fields: {},
    ],
)
async def test_with_single_fields_what_an_update_returns_is_ignored(
    open_typed: Open, function: Callable[[Any], Any]
) -> None:
    state = await open_typed({"cart": DataCart})
    sid = await state.create_session(data={"cart": DataCart(), "profile": {"name": "ada"}, "n": 1})
    before = await data_of(state, sid)
    session = await state.update_typed(sid, function)
    assert (session.version, session.data) == (1, before)
    await state.update_typed(sid, lambda fields: fields.pop("profile"))
    assert await data_of(state, sid) == {name: before[name] for name in ("cart", "n")}


@pytest.mark.parametrize(("cart_type", "item_type"), ALL, ids=NAMES)
async def test_what_an_update_returns_is_ignored_unless_it_is_an_object_of_the_class(
    open_typed: Open, cart_type: Any, item_type: Any
) -> None:
    state = await open_typed(cart_type)
    sid = await state.create_session(data=cart_type(total=Decimal(1)))
    before = await data_of(state, sid)
    for returned in ({}, {"total": Decimal(2)}, item_type(name="dune"), 5):
        session = await state.update_typed(sid, lambda _, returned=returned: returned)
        assert (session.version, session.data) == (1, before)


@pytest.mark.parametrize(("cart_type", "item_type"), ALL, ids=NAMES)
async def test_a_field_that_was_added_gets_its_default(
    open_typed: Open, cart_type: Any, item_type: Any
) -> None:
    state = await open_typed(cart_type)
    sid = await state.create_session(data={"total": Decimal(3)})
    assert await state.get_typed(sid) == cart_type(total=Decimal(3))
    async with state.edit_typed(sid) as cart:
        cart.total = Decimal(4)
    assert await data_of(state, sid) == {"total": Decimal(4)}  # a default is not written


@pytest.mark.parametrize(("cart_type", "item_type"), ALL, ids=NAMES)
async def test_a_field_that_was_removed_is_kept_and_ignored(
    open_typed: Open, cart_type: Any, item_type: Any
) -> None:
    state = await open_typed(cart_type)
    sid = await state.create_session(data={"coupon": "X", "total": Decimal(3)})
    async with state.edit_typed(sid) as cart:
        assert not hasattr(cart, "coupon")
        cart.total = Decimal(4)
    assert await data_of(state, sid) == {"coupon": "X", "total": Decimal(4)}


@pytest.mark.parametrize(("cart_type", "item_type"), ALL, ids=NAMES)
@pytest.mark.parametrize(
    ("stored", "place", "was", "wanted"),
    [
        ({"items": 5}, "items", "int", "list"),
        ({"items": [{"name": "a"}, {"name": 7}]}, "items[1].name", "int", "str"),
        ({"items": [{"name": "a", "qty": "many"}]}, "items[0].qty", "str", "int"),
        ({"items": [{"qty": 2}]}, "items[0].name", "nothing", "str"),
        ({"colour": "green"}, "colour", "str", "Colour"),
        ({"at": "soon"}, "at", "str", "datetime"),
        ({"tags": {"a": 1}}, "tags", "dict", "set"),
    ],
)
async def test_a_type_that_changed_is_a_clear_error_and_changes_nothing(
    open_typed: Open,
    cart_type: Any,
    item_type: Any,
    stored: dict[str, Any],
    place: str,
    was: str,
    wanted: str,
) -> None:
    state = await open_typed(cart_type)
    sid = await state.create_session(session_id="the session", data=stored)
    before = (await state.get_session(sid))._record

    async def edit() -> None:
        async with state.edit_typed(sid):
            pytest.fail("was let in")

    for call in (state.get_typed(sid), state.update_typed(sid, lambda _: None), edit()):
        with pytest.raises(SchemaMismatch) as caught:
            await call
        error = caught.value
        assert (error.session_id, error.field) == ("the session", place)
        assert error.stored_type == was
        assert wanted in error.wanted_type
        for part in ("the session", place, was, wanted, "migrate"):
            assert part in str(error)
    assert (await state.get_session(sid))._record == before
    await state.update_session(sid, lambda draft: draft.clear())  # no lock was left behind


@dataclass
class OldData:
    price: str = "0"


@dataclass
class NewData:
    price: int = 0
    currency: str = "EUR"

    @classmethod
    def migrate(cls, data: dict[str, Any]) -> dict[str, Any]:
        amount, _, currency = data["price"].partition(" ")
        return {**data, "price": int(amount), "currency": currency or "EUR"}


class NewStruct(msgspec.Struct):
    price: int = 0
    currency: str = "EUR"

    @staticmethod
    def migrate(data: dict[str, Any]) -> dict[str, Any]:
        return NewData.migrate(data)


class NewModel(pydantic.BaseModel):
    price: int = 0
    currency: str = "EUR"

    @classmethod
    def migrate(cls, data: dict[str, Any]) -> dict[str, Any]:
        return NewData.migrate(data)


@pytest.mark.parametrize("new_type", [NewData, NewStruct, NewModel], ids=NAMES)
async def test_a_type_that_changed_goes_through_the_migrate_hook(
    open_typed: Open, new_type: Any
) -> None:
    state = await open_typed(OldData)
    sid = await state.create_session(data=OldData("12 USD"))
    state = await open_typed(new_type)
    assert await state.get_typed(sid) == new_type(price=12, currency="USD")
    assert await data_of(state, sid) == {"price": "12 USD"}  # reading changes nothing
    async with state.edit_typed(sid) as data:
        data.currency = "CHF"
    assert await data_of(state, sid) == {"price": 12, "currency": "CHF"}


@pytest.mark.parametrize("new_type", [NewData, NewStruct, NewModel], ids=NAMES)
async def test_a_hook_that_does_not_help_is_a_clear_error(open_typed: Open, new_type: Any) -> None:
    class Unhelpful(new_type):  # type: ignore[misc]
        @classmethod
        def migrate(cls, data: dict[str, Any]) -> dict[str, Any]:
            return {"price": [data["price"]]}

    state = await open_typed(Unhelpful)
    sid = await state.create_session(data={"price": "12 USD"})
    with pytest.raises(SchemaMismatch) as caught:
        await state.get_typed(sid)
    assert (caught.value.field, caught.value.stored_type) == ("price", "list")


@pytest.mark.parametrize(("cart_type", "item_type"), ALL, ids=NAMES)
async def test_single_fields_can_have_types(
    open_typed: Open, cart_type: Any, item_type: Any
) -> None:
    schema = {"cart": cart_type, "seen": list[item_type], "visits": int}
    state = await open_typed(schema)
    sid = await state.create_session(
        data={"cart": cart_type(), "seen": [item_type(name="dune")], "note": "plain"}
    )
    found = await state.get_typed(sid)
    assert found == {"cart": cart_type(), "seen": [item_type(name="dune")], "note": "plain"}
    async with state.edit_typed(sid) as fields:
        fields["cart"].items.append(item_type(name="emma"))
        fields["visits"] = 1
        del fields["note"]
    data = await data_of(state, sid)
    assert data["cart"]["items"] == [{"name": "emma", "qty": 1}]
    assert data["visits"] == 1
    assert "note" not in data
    await state.update_session_data(sid, "cart", cart_type(total=Decimal(2)))
    assert (await state.get_typed(sid))["cart"].total == Decimal(2)
    await state.update_session_data(sid, "visits", "many")
    with pytest.raises(SchemaMismatch) as caught:
        await state.get_typed(sid)
    assert (caught.value.field, caught.value.stored_type) == ("visits", "str")
    assert caught.value.wanted_type == "int"


async def test_numbers_and_text_are_not_converted_into_each_other(open_typed: Open) -> None:
    @dataclass
    class Numbers:
        n: int = 0
        x: float = 0.0
        flag: bool = False

    state = await open_typed(Numbers)
    for wrong in ({"n": "5"}, {"n": 5.5}, {"n": True}, {"x": "5"}, {"flag": 1}, {"n": Decimal(5)}):
        sid = await state.create_session(data=wrong)
        with pytest.raises(SchemaMismatch):
            await state.get_typed(sid)
    sid = await state.create_session(data={"x": 5})  # an int is a float
    assert await state.get_typed(sid) == Numbers(x=5.0)


async def test_names_in_storage_may_differ_from_those_of_the_class(open_typed: Open) -> None:
    class Renamed(msgspec.Struct, rename="camel"):
        first_name: str = ""

    class Aliased(pydantic.BaseModel):
        first_name: str = pydantic.Field("", alias="firstName")

    for made in (Renamed(first_name="ada"), Aliased(firstName="ada")):
        state = await open_typed(type(made))
        sid = await state.create_session(data=made)
        assert await data_of(state, sid) == {"firstName": "ada"}
        async with state.edit_typed(sid) as person:
            person.first_name = "bob"
        assert (await state.get_typed(sid)).first_name == "bob"


async def test_a_model_that_forbids_more_fields_ignores_removed_ones(open_typed: Open) -> None:
    class Strict(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        n: int = 0

    state = await open_typed(Strict)
    sid = await state.create_session(data={"n": 1, "gone": 2})
    assert await state.get_typed(sid) == Strict(n=1)


async def test_unions_of_structs_keep_their_tags(open_typed: Open) -> None:
    class Cat(msgspec.Struct, tag=True):
        lives: int = 9

    class Dog(msgspec.Struct, tag=True):
        tricks: list[str] = []

    state = await open_typed({"pet": Cat | Dog})
    sid = await state.create_session(data={"pet": Dog(tricks=["sit"])})
    assert (await state.get_typed(sid))["pet"] == Dog(tricks=["sit"])


async def test_errors_of_the_session_come_first(open_typed: Open) -> None:
    state = await open_typed(DataCart)
    assert await state.get_typed("nobody") is None
    with pytest.raises(SessionNotFound):
        await state.update_typed("nobody", lambda _: None)
    sid = await state.create_session(data=DataCart())
    async with state.edit_typed(sid):
        with pytest.raises(ConflictError):
            await state.update_typed(sid, lambda cart: cart.items.append(DataItem("x")))


async def test_a_function_to_be_awaited_is_refused(open_typed: Open) -> None:
    state = await open_typed(DataCart)
    sid = await state.create_session(data=DataCart())

    async def change(_: DataCart) -> None:
        return None

    with pytest.raises(InvalidArgument, match="awaitable"):
        await state.update_typed(sid, change)
    with pytest.raises(InvalidArgument, match="function"):
        await state.update_typed(sid, None)


async def test_without_a_schema_there_is_nothing_typed(open_typed: Open) -> None:
    state = await open_typed(None)
    sid = await state.create_session()
    session = await state.get_session(sid)
    assert session is not None
    with pytest.raises(InvalidArgument, match="schema"):
        state.typed(session)
    with pytest.raises(InvalidArgument, match="schema"):
        state.edit_typed(sid)
    with pytest.raises(InvalidArgument, match="schema"):
        await state.get_typed(sid)
    with pytest.raises(InvalidArgument, match="schema"):
        await state.update_typed(sid, lambda _: None)


@pytest.mark.parametrize("schema", [5, "Cart", int, dict, {}, {1: int}, [DataCart], DataCart()])
def test_what_is_no_schema_is_refused(schema: object) -> None:
    with pytest.raises(InvalidArgument, match="schema"):
        StateManager(schema=schema)


def test_a_schema_that_cannot_even_be_printed_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="too long to print"):
        StateManager(schema=10**5000)


@pytest.mark.parametrize("data", [5, "text", [1], DataItem("x")])
async def test_what_is_no_object_of_the_schema_is_refused(open_typed: Open, data: object) -> None:
    state = await open_typed(DataCart)
    with pytest.raises(InvalidArgument, match="data is a"):
        await state.create_session(data=data)


def test_plain_values_stay_what_they_are() -> None:
    value = {"a": [1, (2.5, {3}), frozenset({"x"})], 5: b"x", "u": UUID(int=1), "d": Decimal(1)}
    assert plain(value) == value


def test_a_schema_reads_only_the_fields_it_knows() -> None:
    assert Schema(DataCart).names(["items", "coupon", "total"]) == ["items", "total"]


def test_a_worker_can_have_a_schema(tmp_path: Path) -> None:
    found: list[DataCart] = []

    async def main(state: StateManager) -> None:
        sid = await state.create_session(data=DataCart(total=Decimal(3)))
        found.append(await state.get_typed(sid))

    worker.run(main, config_for(tmp_path / "state"), schema=DataCart)
    assert found == [DataCart(total=Decimal(3))]


async def test_a_type_that_nothing_can_be_made_of_is_refused_by_its_name(open_typed: Open) -> None:
    @dataclass
    class Raw:
        body: bytearray = field(default_factory=bytearray)

    for schema in (Raw, {"body": 5}):
        state = await open_typed(schema)
        sid = await state.create_session(data={"body": bytearray(b"x")})
        with pytest.raises(InvalidArgument, match="schema: "):
            await state.get_typed(sid)
        assert await data_of(state, sid) == {"body": bytearray(b"x")}
