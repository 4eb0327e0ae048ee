from __future__ import annotations

import string
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistence import ClientInfo, StateManager
from persistence.errors import InvalidSessionId
from persistence.ids import MAX_SESSION_ID_BYTES, CommitIds, check_session_id, new_session_id
from tests.engine import memory_of

URL_SAFE = set(string.ascii_letters + string.digits + "-_")


# Session ids


def test_new_ids_are_22_url_safe_characters_and_never_the_same() -> None:
    made = {new_session_id() for _ in range(10_000)}
    assert len(made) == 10_000
    assert all(len(name) == 22 and set(name) <= URL_SAFE for name in made)
    assert all(check_session_id(name) == name.encode() for name in made)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=128))
def test_any_text_of_at_most_512_bytes_is_a_plain_key(text: str) -> None:
    assert check_session_id(text).decode() == text


@pytest.mark.parametrize(
    "session_id",
    ["../../etc/passwd", "/", ".", "\0", "a\nb", " ", "*?[a]{b}", "\x1b[2J", "\ufeff", "ü", "😀"],
)
def test_nothing_in_an_id_has_a_meaning(session_id: str) -> None:
    assert check_session_id(session_id) == session_id.encode()


@pytest.mark.parametrize("character", ["a", "ü", "€", "😀"])
def test_the_limit_counts_bytes_of_utf8(character: str) -> None:
    size = len(character.encode())
    most = MAX_SESSION_ID_BYTES // size
    assert len(check_session_id(character * most)) == most * size
    with pytest.raises(InvalidSessionId, match=f"{(most + 1) * size} bytes of UTF-8; at most 512"):
        check_session_id(character * (most + 1))


def test_an_empty_id_is_refused() -> None:
    with pytest.raises(InvalidSessionId, match="must not be empty"):
        check_session_id("")


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InvalidSessionId, match=r"'a\\udc80' has lone surrogates"):
        check_session_id("a\udc80")


@pytest.mark.parametrize(
    ("session_id", "kind"),
    [(None, "NoneType"), (7, "int"), (b"a", "bytes"), (["a"], "list"), (("a",), "tuple")],
)
def test_what_is_no_text_is_refused_by_the_name_of_its_type(session_id: Any, kind: str) -> None:
    with pytest.raises(InvalidSessionId, match=f"must be a str, not {kind}"):
        check_session_id(session_id)


def test_a_refused_megabyte_is_not_repeated_in_the_message() -> None:
    with pytest.raises(InvalidSessionId) as caught:
        check_session_id("\n" * 2**20)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


# Commit ids


def test_commit_ids_are_128_bits_and_never_the_same() -> None:
    ids = CommitIds()
    made = {ids.next() for _ in range(10_000)}
    assert len(made) == 10_000
    assert {len(item) for item in made} == {16}


def test_two_sources_draw_different_commit_ids() -> None:
    one, other = CommitIds(), CommitIds()
    assert {one.next() for _ in range(300)}.isdisjoint({other.next() for _ in range(300)})


class Foreign(str):
    """A str that is equal to nothing, and encodes as another one."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return b"another"


async def edited(state: StateManager, session_id: str) -> None:
    async with state.edit(session_id) as draft:
        draft["x"] = 2


async def requested(state: StateManager, session_id: str) -> None:
    async with state.request(session_id):
        pass


async def watched(state: StateManager, session_id: str) -> None:
    async with state.watch(session_id, after=0) as changes:
        await anext(changes)


async def opened(state: StateManager, session_id: str) -> None:
    client = ClientInfo()
    handle = await state.open_session(session_id, state.issue_token(session_id, client), client)
    await handle.get()


CALLS: dict[str, Callable[[StateManager, str], Awaitable[Any]]] = {
    "get": lambda state, sid: state.get_session(sid),
    "get fresh": lambda state, sid: state.get_session(sid, fresh=True),
    "look": lambda state, sid: state.get_session(sid, renew=False),
    "has": lambda state, sid: state.has_session(sid),
    "get or create": lambda state, sid: state.get_or_create_session(sid),
    "set a field": lambda state, sid: state.update_session_data(sid, "x", 2),
    "update": lambda state, sid: state.update_session(sid, lambda data: data.update(x=2)),
    "replace": lambda state, sid: state.replace_session(sid, {"x": 2}),
    "metadata": lambda state, sid: state.update_session_metadata(sid, source="app"),
    "TTL": lambda state, sid: state.set_ttl(sid, 9),
    "edit": edited,
    "spill": lambda state, sid: state.spill_session(sid),
    "restore": lambda state, sid: state.restore_session(sid),
    "request": requested,
    "record": lambda state, sid: state.record_request(sid),
    "error": lambda state, sid: state.record_error(sid, "no"),
    "metrics": lambda state, sid: state.session_metrics(sid),
    "limit": lambda state, sid: state.is_request_limit_reached(sid),
    "health": lambda state, sid: state.session_health(sid),
    "resource": lambda state, sid: state.resources(sid, "r", object),
    "scratch": lambda state, sid: state.scratch_dir(sid),
    "watch": watched,
    "token": opened,
    "rotate": lambda state, sid: state.rotate_session_id(sid),
    "terminate": lambda state, sid: state.terminate_session(sid),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
async def test_an_id_of_a_class_of_its_own_is_the_plain_string_that_it_is_made_of(
    state: StateManager, call: Callable[[StateManager, str], Awaitable[Any]]
) -> None:
    assert type(await state.create_session(session_id=Foreign("a"), data={"x": 1})) is str
    before = await state.get_session("a")
    assert before is not None
    await call(state, Foreign("a"))
    after = await state.get_session("a", renew=False)
    is_over = call in (CALLS["rotate"], CALLS["terminate"])
    assert (after is None) == is_over
    assert len(await state.get_active_sessions()) == (call is not CALLS["terminate"])
    if after is not None:
        writes = ("set a field", "update", "replace", "edit")
        assert after["x"] == (2 if call in [CALLS[name] for name in writes] else 1)
    assert {type(name) for name in memory_of(state).victims(-1, 9)} <= {str}
    assert not await state.has_session("another")
