"""What is written as an object can be read back as one, or it is refused and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pydantic
import pytest

from persistence.errors import SchemaMismatch, ValueNotSerializable
from tests.engine import OpenTyped, data_of


@dataclass
class DataItem:
    qty: Any = 0


@dataclass
class DataCart:
    n: int = 0
    items: list[int] = field(default_factory=list)


class StructCart(msgspec.Struct):
    n: int = 0
    items: list[int] = []


class ModelCart(pydantic.BaseModel):
    n: int = 0
    items: list[int] = []


KINDS = [DataCart, StructCart, ModelCart]


def changed(cart: Any, **values: Any) -> Any:
    for name, value in values.items():
        setattr(cart, name, value)
    return cart


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("values", "place", "given", "wanted"),
    [
        ({"n": "many"}, "n", "str", "int"),
        ({"items": [1, "two"]}, "items[1]", "str", "int"),
        ({"items": None}, "items", "NoneType", "list[int]"),
    ],
)
async def test_a_value_of_a_wrong_type_is_refused_and_nothing_is_written(
    open_typed: OpenTyped, kind: Any, values: dict[str, Any], place: str, given: str, wanted: str
) -> None:
    state = await open_typed(kind)
    sid = await state.create_session(session_id="the session", data=kind(n=1))
    before = await data_of(state, sid)

    async def edit() -> None:
        async with state.edit_typed(sid) as cart:
            changed(cart, **values)

    for call in (
        state.update_typed(sid, lambda cart: changed(cart, **values) and None),
        state.update_typed(sid, lambda _: changed(kind(), **values)),
        edit(),
        state.replace_session(sid, changed(kind(), **values)),
        state.create_session(session_id="another session", data=changed(kind(), **values)),
        state.get_or_create_session("another session", data=changed(kind(), **values)),
    ):
        with pytest.raises(SchemaMismatch, match=r"session'.* nothing was written") as caught:
            await call
        error = caught.value
        assert (error.field, error.stored_type, error.wanted_type) == (place, given, wanted)
        for part in (place, given, wanted, kind.__name__):
            assert part in str(error)
    assert (await state.get_session(sid)).version == 1
    assert await data_of(state, sid) == before
    assert not await state.has_session("another session")
    await state.update_typed(sid, lambda cart: changed(cart, n=2) and None)  # and it goes on
    assert (await state.get_typed(sid)).n == 2


@pytest.mark.parametrize("kind", KINDS)
async def test_an_object_in_a_single_field_is_refused_if_it_has_a_wrong_type(
    open_typed: OpenTyped, kind: Any
) -> None:
    state = await open_typed({"cart": kind, "seen": list[kind]})
    sid = await state.create_session(data={"cart": kind()})
    for call in (
        state.update_session_data(sid, "cart", changed(kind(), n="many")),
        state.create_session(data={"cart": changed(kind(), n="many")}),
        state.update_typed(sid, lambda fields: changed(fields["cart"], n="many") and None),
        state.update_typed(sid, lambda fields: fields.update(cart=changed(kind(), n="many"))),
    ):
        with pytest.raises(SchemaMismatch, match=r"'cart\.n': str was to be written"):
            await call
    with pytest.raises(SchemaMismatch, match=r"'seen\[0\]\.n'"):
        await state.update_session_data(sid, "seen", [changed(kind(), n="many")])
    assert await state.get_typed(sid) == {"cart": kind()}


async def test_plain_values_are_checked_when_they_are_read(open_typed: OpenTyped) -> None:
    state = await open_typed(DataCart)
    sid = await state.create_session(data={"n": "many"})
    with pytest.raises(SchemaMismatch, match="stored is str"):
        await state.get_typed(sid)
    await state.update_session_data(sid, "n", 5)  # repaired without any class
    assert (await state.get_typed(sid)).n == 5


async def test_what_is_written_has_to_fit_without_the_migrate_hook(open_typed: OpenTyped) -> None:
    @dataclass
    class Price:
        amount: int = 0

        @classmethod
        def migrate(cls, data: dict[str, Any]) -> dict[str, Any]:
            return {"amount": int(data["amount"])}

    state = await open_typed(Price)
    sid = await state.create_session(data={"amount": "5"})
    with pytest.raises(SchemaMismatch, match="str was to be written"):
        await state.update_typed(sid, lambda price: changed(price, amount="6") and None)
    assert await data_of(state, sid) == {"amount": "5"}


async def test_what_a_class_refuses_to_be_made_of_is_not_written(open_typed: OpenTyped) -> None:
    @dataclass
    class Small:
        n: int = 0

        def __post_init__(self) -> None:
            if self.n > 5:
                raise RuntimeError("too large")

    state = await open_typed(Small)
    sid = await state.create_session(data=Small(5))
    with pytest.raises(SchemaMismatch, match="RuntimeError: too large; nothing was written"):
        await state.update_typed(sid, lambda small: changed(small, n=6) and None)
    await state.update_session_data(sid, "n", 7)
    with pytest.raises(SchemaMismatch, match="too large; the stored data are unchanged") as caught:
        await state.get_typed(sid)
    assert isinstance(caught.value.__cause__, RuntimeError)


class Even(pydantic.BaseModel):
    n: int = pydantic.Field(0, ge=0)

    @pydantic.model_validator(mode="after")
    def is_even(self) -> Even:
        if self.n % 2:
            raise ValueError("an odd number")
        return self


@pytest.mark.parametrize(("n", "reason"), [(3, "an odd number"), (-2, "greater than or equal")])
async def test_what_a_model_refuses_is_said(open_typed: OpenTyped, n: int, reason: str) -> None:
    state = await open_typed(Even)
    sid = await state.create_session(data=Even(n=2))
    with pytest.raises(SchemaMismatch, match=f"{reason}.*nothing was written"):
        await state.update_typed(sid, lambda even: changed(even, n=n) and None)
    await state.update_session_data(sid, "n", n)
    with pytest.raises(SchemaMismatch, match=f"{reason}.*the stored data are unchanged"):
        await state.get_typed(sid)


# What cannot be stored at all


@dataclass(frozen=True)
class Tag:
    name: str


class FrozenModel(pydantic.BaseModel, frozen=True):
    name: str


@dataclass
class Tagged:
    tags: set[Tag] = field(default_factory=set)
    counts: dict[Tag, int] = field(default_factory=dict)
    more: Any = None


class TaggedModel(pydantic.BaseModel):
    n: int = 0
    tags: set[FrozenModel] = set()


def in_a_circle() -> Any:
    one = DataItem()
    one.qty = [one]
    return one


def nested(levels: int) -> Any:
    found: Any = 0
    for _ in range(levels):
        found = DataItem([found])
    return found


def list_in_itself() -> Any:
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Tagged(tags={Tag("x")}), "tags"),
        (lambda: Tagged(counts={Tag("x"): 1}), "counts"),
        (lambda: Tagged(more=in_a_circle()), "more"),
        (lambda: Tagged(more=nested(440)), "more"),
        (lambda: Tagged(more=list_in_itself()), "more"),
        (lambda: TaggedModel(tags={FrozenModel(name="x")}), "tags"),
    ],
    ids=["set", "keys", "circle", "deep", "list in itself", "set in a model"],
)
async def test_an_object_that_cannot_be_stored_is_refused_by_its_field(
    open_typed: OpenTyped, make: Callable[[], Any], name: str
) -> None:
    given = make()
    state = await open_typed(type(given))
    sid = await state.create_session()

    async def edit() -> None:
        async with state.edit_typed(sid) as found:
            setattr(found, name, getattr(given, name))

    for call in (
        state.create_session(data=given),
        state.replace_session(sid, given),
        state.update_session_data(sid, name, getattr(given, name)),
        state.update_typed(sid, lambda _: given),
        edit(),
    ):
        with pytest.raises(ValueNotSerializable, match=rf"field '{name}'.*nothing was written"):
            await call
    assert await data_of(state, sid) == {}


@dataclass
class Tree:
    below: list[Tree] = field(default_factory=list)


async def test_what_is_nested_too_deeply_to_be_read_back_is_refused(open_typed: OpenTyped) -> None:
    state = await open_typed(Tree)
    refused = 0
    tree = Tree()
    for _ in range(300):
        tree = Tree([tree])
        try:
            sid = await state.create_session(data=tree)
        except ValueNotSerializable:
            refused += 1
        else:
            assert not refused
            assert await state.get_typed(sid) is not None
    assert refused


async def test_what_was_deleted_from_an_object_is_refused_by_its_name(
    open_typed: OpenTyped,
) -> None:
    @dataclass
    class Bare:
        must: int

    def delete(bare: Bare) -> None:
        del bare.must

    state = await open_typed(Bare)
    sid = await state.create_session(data=Bare(1))
    with pytest.raises(ValueNotSerializable, match="must"):
        await state.update_typed(sid, delete)
    assert await data_of(state, sid) == {"must": 1}


class Omitting(pydantic.BaseModel):
    """Leaves out what is None, as many APIs want it."""

    n: int = 0
    note: str | None = None

    @pydantic.model_serializer(mode="wrap")
    def dumped(self, default: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return what is stored."""
        return {name: each for name, each in default(self).items() if each is not None}


async def test_what_an_object_leaves_out_from_now_on_is_removed(open_typed: OpenTyped) -> None:
    state = await open_typed(Omitting)
    for replaced in (False, True):
        sid = await state.create_session(data=Omitting(n=1, note="call back"))
        await state.update_session(sid, lambda draft: draft.update(other="kept"))
        if replaced:
            await state.update_typed(sid, lambda cart: Omitting(n=cart.n))
        else:
            await state.update_typed(sid, lambda cart: changed(cart, note=None) and None)
        assert await data_of(state, sid) == {"n": 1, "other": "kept"}
        assert await state.get_typed(sid) == Omitting(n=1)


async def test_a_stored_field_that_the_class_never_writes_stays(open_typed: OpenTyped) -> None:
    class Excluding(pydantic.BaseModel):
        n: int = 0
        note: str | None = pydantic.Field(None, exclude=True)

    state = await open_typed(Excluding)
    sid = await state.create_session(data={"n": 1, "note": "call back"})
    await state.update_typed(sid, lambda cart: changed(cart, n=2) and None)
    assert await data_of(state, sid) == {"n": 2, "note": "call back"}


class Unsettable(msgspec.Struct):
    n: int | msgspec.UnsetType = msgspec.UNSET
    item: StructCart | msgspec.UnsetType = msgspec.UNSET
    below: list[Unsettable] = []


async def test_what_is_unset_is_not_stored(open_typed: OpenTyped) -> None:
    state = await open_typed(Unsettable)
    cart = Unsettable(below=[Unsettable(item=StructCart(n=5))])
    sid = await state.create_session(data=cart)
    below = {"item": {"n": 5, "items": []}, "below": []}
    assert await data_of(state, sid) == {"below": [below]}
    assert await state.get_typed(sid) == cart
    await state.update_typed(sid, lambda cart: changed(cart, n=1, item=StructCart()) and None)
    assert await state.get_typed(sid) == changed(cart, n=1, item=StructCart())
    await state.update_typed(sid, lambda cart: changed(cart, n=msgspec.UNSET) and None)
    assert (await state.get_typed(sid)).n is msgspec.UNSET
    await state.update_session_data(sid, "item", 5)
    with pytest.raises(SchemaMismatch, match="'item'"):
        await state.get_typed(sid)


@dataclass
class Counted:
    n: int = 1
    seen: dict[str, object] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.twice = 2 * self.n


async def test_what_is_no_part_of_making_an_object_is_not_stored(open_typed: OpenTyped) -> None:
    state = await open_typed(Counted)
    cart = Counted(2)
    cart.seen["what cannot be stored"] = object()
    sid = await state.create_session(data=cart)
    assert await data_of(state, sid) == {"n": 2}
    again = await state.get_typed(sid)
    assert (again, again.twice) == (Counted(2), 4)
