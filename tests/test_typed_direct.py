"""Objects that their library makes in one call are those that are made attribute by attribute."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Generic, TypeVar

import msgspec
import pytest
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    computed_field,
    model_validator,
)

from persistence.typed import loading
from persistence.typed.direct import direct_maker
from persistence.typed.leaves import Run
from persistence.typed.loading import class_reader
from persistence.typed.mismatch import Mismatch

T = TypeVar("T")


class Item(msgspec.Struct):
    name: str
    price: Decimal = Decimal(0)
    tags: set[str] = set()


class Cart(msgspec.Struct, rename="camel"):
    items: list[Item] = []
    last_seen: datetime | None = None
    raw: bytes = b""
    share: float = 0.0
    inner: Cart | None = None


class Box(msgspec.Struct, Generic[T]):
    content: T


class ItemModel(BaseModel):
    name: str
    price: Decimal = Decimal(0)


class CartModel(BaseModel):
    model_config = ConfigDict(extra="forbid")
    items: list[ItemModel] = []
    owner: str = Field("", alias="user")


@dataclass
class Plain:
    name: str = ""
    items: list[int] = field(default_factory=list)


class Mixed(msgspec.Struct):
    plain: Plain


class Chosen(BaseModel):
    n: int = Field(0, validation_alias=AliasChoices("n", "m"))


class Renamed(BaseModel):
    n: int = Field(0, serialization_alias="N")


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class Computing(BaseModel):
    @computed_field  # type: ignore[prop-decorator]  # as pydantic's documents say
    @property
    def twice(self) -> int:
        return 2


class Former(BaseModel):
    n: int = 0

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, value: Any) -> Any:
        return {"n": value["old"], **value} if "old" in value else value


class ByName(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    new: int = Field(0, alias="neu")


class OneOf(BaseModel):
    it: ItemModel | Renamed


@pytest.mark.parametrize("wanted", [Item, Cart, Box[int], Box[Item], ItemModel, CartModel])
def test_classes_of_one_library_are_made_in_one_call(wanted: Any) -> None:
    assert direct_maker(wanted) is not None


@pytest.mark.parametrize(
    "wanted", [Plain, Mixed, Box[Plain], Chosen, Renamed, Open, Computing, OneOf]
)
def test_what_is_stored_otherwise_than_its_library_looks_for_it_is_not(wanted: Any) -> None:
    assert direct_maker(wanted) is None


NOW = datetime(2026, 1, 31, tzinfo=UTC)
ITEM = {"name": "book", "price": Decimal("9.99"), "tags": {"a"}}
STORED: list[tuple[Any, Any]] = [
    (Cart, {}),
    (Cart, {"items": [ITEM, {"name": "pen"}], "lastSeen": NOW, "raw": b"x", "share": 1}),
    (Cart, {"items": (ITEM,), "inner": {"raw": bytearray(b"y")}, "gone": 1}),
    (Cart, {"items": [{"name": "pen", "tags": ["a", "b"]}]}),
    (Cart, {"items": [{"price": Decimal(1)}]}),
    (Cart, {"raw": "eA=="}),
    (Cart, {"lastSeen": "2026-01-31T00:00:00Z"}),
    (Cart, {"items": [{"name": "pen", "price": "9.99"}]}),
    (Cart, {"share": True}),
    (Cart, {"share": Decimal("0.1")}),
    (Cart, {"share": 0.5, "items": [{"name": "pen", "price": Decimal(1)}]}),
    (Cart, {"inner": []}),
    (Cart, {"last_seen": NOW}),
    (Box[int], {"content": 1}),
    (Box[int], {"content": 1.0}),
    (CartModel, {"user": "ada", "items": [{"name": "pen", "price": Decimal(1)}]}),
    (CartModel, {"items": [{"name": "pen", "price": "1.5"}]}),
    (CartModel, {"items": [{"name": 5}]}),
    (CartModel, {"gone": 1, "user": "ada"}),
    (CartModel, {"owner": "ada"}),
    (CartModel, {"user": None}),
    (Former, {"n": 1, "old": 5}),
    (Former, {"old": 5}),
    (ByName, {"new": 5}),
    (ByName, {"neu": 4, "new": 5}),
]


@pytest.mark.parametrize(("wanted", "stored"), STORED)
def test_either_way_the_same_comes_of_what_is_stored(
    monkeypatch: pytest.MonkeyPatch, wanted: Any, stored: Any
) -> None:
    def read() -> Any:
        class_reader.cache_clear()
        try:
            return class_reader(wanted).read(stored, Run(may_migrate=True))
        except Mismatch as mismatch:
            return mismatch.path, mismatch.stored_type, mismatch.wanted
        finally:
            class_reader.cache_clear()

    assert direct_maker(wanted) is not None
    either_way = read()
    monkeypatch.setattr(loading, "direct_maker", lambda _: None)
    assert read() == either_way
