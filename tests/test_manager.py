"""The public methods one by one: results, errors, what they leave behind."""

from __future__ import annotations

import asyncio
import copy
import pickle
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from persistence import ManualClock, Session, SessionDraft, SessionMetadata, StateManager, Stats
from persistence.errors import (
    ConfigError,
    ConflictError,
    DirectoryLocked,
    DiskFull,
    InvalidSessionId,
    PersistenceError,
    SessionExists,
    SessionLimitReached,
    SessionNotFound,
    ValueNotSerializable,
    ValueTooLarge,
)
from persistence.listing import Listing
from tests.engine import (
    KIB,
    Crash,
    ScriptedFiles,
    Start,
    commits_of,
    config_for,
    contents,
    data_of,
    directory_of,
    disk_of,
    loop_steps,
    memory_of,
    names_in,
    outcomes,
)

EVERY_TYPE: dict[str, Any] = {
    "none": None,
    "bool": True,
    "int": -7,
    "big int": 2**200,
    "float": 1.5,
    "text": "grüße 😀",
    "bytes": b"\0\xff",
    "bytearray": bytearray(b"ab"),
    "list": [1, [2, [3]]],
    "tuple": (1, (2,)),
    "set": {3, 1, 2},
    "frozenset": frozenset({"a", "b"}),
    "dict": {"a": {1: "int key", (1, 2): "tuple key"}},
    "datetime": datetime(2024, 5, 6, 7, 8, 9, 10, timezone(timedelta(hours=5, minutes=30))),
    "date": date(2024, 5, 6),
    "uuid": UUID("12345678123456781234567812345678"),
    "decimal": Decimal("1.10"),
}

BAD_IDS: list[Any] = ["", "x" * 513, "ü" * 257, "\udc80", None, 7, b"a", ("a",), ["a"], {}]

hot_and_cold = pytest.mark.parametrize("cold", [False, True], ids=["hot", "cold"])


async def get(state: StateManager, session_id: str = "a") -> Session:
    session = await state.get_session(session_id)
    assert session is not None
    return session


class Foreign:
    """Something that cannot be stored."""


# Creating


async def test_a_created_session_is_there_with_all_that_was_given(
    state: StateManager, clock: ManualClock
) -> None:
    metadata = SessionMetadata(
        "203.0.113.9", "curl/8", "web", {"tenant": "acme", "plan": [1, (2,)]}
    )
    session_id = await state.create_session(
        user_id="ada",
        metadata=metadata,
        ttl_seconds=600,
        data={"cart": {"items": []}},
        max_requests=5,
        auto_renew=False,
    )
    session = await get(state, session_id)
    assert session.id == session_id
    assert session.user_id == "ada"
    assert session.metadata == metadata
    assert session.version == 1
    assert session.data == {"cart": {"items": []}}
    assert session.created_at == datetime.fromtimestamp(clock.wall(), UTC)
    assert session.last_accessed == session.created_at
    assert session.expires_at == session.created_at + timedelta(seconds=600)
    assert session.created_at.tzinfo is UTC
    assert (session.ttl_seconds, session.max_requests, session.auto_renew) == (600, 5, False)


async def test_everything_may_be_left_out(state: StateManager) -> None:
    session = await get(state, await state.create_session())
    assert session.user_id is None
    assert session.metadata == SessionMetadata()
    assert session.data == {}
    assert session.max_requests is None
    assert session.auto_renew


async def test_an_id_that_is_not_given_is_a_fresh_one(state: StateManager) -> None:
    made = {await state.create_session() for _ in range(50)}
    assert len(made) == 50
    assert all(len(session_id) == 22 for session_id in made)


@pytest.mark.parametrize(
    "session_id", ["../../x", "a/b", "\0", "\n", " ", "*", "ü" * 256, "x" * 512, "{a}", "😀"]
)
async def test_any_text_is_a_plain_key_and_never_a_path(
    start: Start, session_id: str, tmp_path: Path
) -> None:
    state = await start()
    around = names_in(tmp_path)
    names = names_in(directory_of(state))
    assert await state.create_session(session_id=session_id, data={"x": 1}) == session_id
    await state.spill_session(session_id)
    assert await data_of(state, session_id) == {"x": 1}
    assert await state.get_active_sessions() == [session_id]
    assert names_in(tmp_path) == around
    assert names_in(directory_of(state)) - names <= {"0000000001.seg", "RESERVE"}
    await state.close()
    assert await contents(await start()) == {session_id: {"x": 1}}


@pytest.mark.parametrize("session_id", BAD_IDS, ids=lambda item: ascii(item)[:20])
async def test_what_is_no_session_id_is_refused_everywhere(
    state: StateManager, session_id: Any
) -> None:
    async def in_edit() -> None:
        async with state.edit(session_id):
            pass

    calls: list[Awaitable[Any]] = [
        state.get_session(session_id),
        state.has_session(session_id),
        state.update_session_data(session_id, "x", 1),
        state.update_session(session_id, list),
        state.update_session_metadata(session_id, source="x"),
        state.replace_session(session_id, {}),
        state.set_ttl(session_id, 1),
        state.terminate_session(session_id),
        state.spill_session(session_id),
        state.restore_session(session_id),
        in_edit(),
    ]
    if session_id is not None:
        calls.append(state.create_session(session_id=session_id))
        calls.append(state.get_or_create_session(session_id))
    for error in await outcomes(calls):
        assert isinstance(error, InvalidSessionId)
    assert await state.get_active_sessions() == []


async def test_the_id_of_a_live_session_is_refused_and_the_session_unchanged(
    state: StateManager, clock: ManualClock
) -> None:
    await state.create_session("ada", session_id="a", data={"x": 1}, ttl_seconds=100)
    clock.advance(10)
    with pytest.raises(SessionExists) as caught:
        await state.create_session("bob", session_id="a", data={"x": 2}, ttl_seconds=7)
    assert caught.value.session_id == "a"
    await state.spill_session("a")
    with pytest.raises(SessionExists):
        await state.create_session(session_id="a")
    session = await get(state)
    assert (session.user_id, session.data, session.version) == ("ada", {"x": 1}, 1)
    assert session.ttl_seconds == 100


async def test_of_1000_concurrent_creations_of_one_id_exactly_one_succeeds(
    start: Start,
) -> None:
    state = await start(disk={"queue_bytes": 8 * KIB})  # with back-pressure
    results = await outcomes(
        state.create_session(session_id="a", data={"number": number}) for number in range(1000)
    )
    winners = [number for number, result in enumerate(results) if result == "a"]
    assert len(winners) == 1
    assert sum(isinstance(result, SessionExists) for result in results) == 999
    session = await get(state)
    assert session.data == {"number": winners[0]}
    assert session.version == 1


async def test_a_creation_on_top_of_a_termination_in_flight_is_a_new_session(
    state: StateManager, files: ScriptedFiles
) -> None:
    await state.create_session(session_id="a", data={"old": 1})
    files.syncs.hold()
    ending = asyncio.create_task(state.terminate_session("a"))
    await files.syncs.reached()
    creating = asyncio.create_task(state.create_session(session_id="a", data={"new": 1}))
    await loop_steps(3)
    files.open_gates()
    assert await outcomes([ending, creating]) == [True, "a"]
    assert await data_of(state, "a") == {"new": 1}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("cart", Foreign(), ["'cart'", "Foreign"]),
        ("cart", {"deep": [{"deeper": Foreign()}]}, ["'cart'", "Foreign"]),
        ("when", datetime(2024, 1, 1), ["'when'", "naive datetime"]),
        ("text", "\udc80", ["'text'", "surrogates"]),
        ("call", print, ["'call'", "builtin_function_or_method"]),
        (7, 1, ["field 7", "must be str"]),
        ("\udc80", 1, ["surrogates"]),
    ],
)
async def test_a_value_that_cannot_be_stored_is_named_and_nothing_is_written(
    state: StateManager, files: ScriptedFiles, name: Any, value: Any, words: list[str]
) -> None:
    await state.create_session(session_id="a", data={"x": 1})
    before = files.calls.copy()

    async def in_edit() -> None:
        async with state.edit("a") as draft:
            draft["x"] = 2
            draft[name] = value

    def change(draft: SessionDraft) -> None:
        draft["x"] = 2
        draft[name] = value

    calls: list[Awaitable[Any]] = [
        state.create_session(data={"x": 2, name: value}),
        state.update_session_data("a", name, value),
        state.update_session("a", change),
        state.replace_session("a", {"x": 2, name: value}),
        in_edit(),
    ]
    for error in await outcomes(calls):
        assert isinstance(error, ValueNotSerializable)
        assert all(word in str(error) for word in words)
    assert await contents(state) == {"a": {"x": 1}}
    assert (await get(state)).version == 1
    assert files.calls["write_at"] == before["write_at"]


async def test_metadata_that_cannot_be_stored_is_refused(state: StateManager) -> None:
    with pytest.raises(ValueNotSerializable, match="attributes"):
        await state.create_session(metadata=SessionMetadata(attributes={"a": Foreign()}))
    assert await state.get_active_sessions() == []


async def test_values_of_every_type_come_back_as_what_they_were(start: Start, crash: Crash) -> None:
    state = await start()
    await state.create_session(session_id="a", data=EVERY_TYPE)

    def assert_same(data: dict[str, Any]) -> None:
        assert data == EVERY_TYPE
        assert {name: type(value) for name, value in data.items()} == {
            name: type(value) for name, value in EVERY_TYPE.items()
        }
        assert data["datetime"].utcoffset() == EVERY_TYPE["datetime"].utcoffset()
        assert str(data["decimal"]) == "1.10"

    assert_same(await data_of(state, "a"))
    await state.spill_session("a")
    assert_same(await data_of(state, "a"))
    assert_same(await data_of(await start(path=crash(state)), "a"))


async def test_reading_every_type_in_an_update_is_no_change(state: StateManager) -> None:
    await state.create_session(session_id="a", data=EVERY_TYPE)
    session = await state.update_session("a", lambda data: [data[name] for name in data])
    assert session.version == 1


async def test_a_session_may_be_as_large_as_the_limit_and_not_larger(start: Start) -> None:
    state = await start(session={"max_bytes": 10 * KIB})
    await state.create_session(session_id="a", data={"x": b"1" * (9 * KIB)})
    calls: list[Awaitable[Any]] = [
        state.create_session(data={"x": b"1" * (10 * KIB)}),
        state.update_session_data("a", "y", b"2" * KIB),
        state.update_session("a", lambda data: data.update(x=b"1" * (11 * KIB))),
        state.replace_session("a", {"x": b"1" * (11 * KIB)}),
        state.update_session_metadata("a", attributes={"y": "2" * KIB}),
    ]
    for error in await outcomes(calls):
        assert isinstance(error, ValueTooLarge)
        assert "session.max_bytes is 10240" in str(error)
    assert await state.get_active_sessions() == ["a"]
    assert (await get(state)).version == 1


async def test_the_limit_is_for_fields_and_metadata_and_nothing_else(start: Start) -> None:
    state = await start(session={"max_bytes": 100})
    packed = len(b"\xa1x" + bytes(2) + b"\xc4\x5f")  # the name, where its value ends, its head
    await state.create_session(session_id="a", data={"x": b"1" * (100 - packed)})
    with pytest.raises(ValueTooLarge, match=r"would have 101 bytes .* is 100;"):
        await state.update_session_data("a", "x", b"1" * (101 - packed))
    smallest = await start(path=directory_of(state) / "other", session={"max_bytes": 1})
    await smallest.create_session(session_id="empty")


# The limit on sessions


async def test_at_the_limit_not_every_refusal_looks_through_all_sessions(
    start: Start, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = await start(session={"max_sessions": 2})
    looks = []
    real = Listing.remove_expired

    async def counted(listing: Listing) -> int:
        looks.append(clock.wall())
        return await real(listing)

    monkeypatch.setattr(Listing, "remove_expired", counted)
    for _ in range(2):
        await state.create_session(ttl_seconds=10)
    for _ in range(20):
        with pytest.raises(SessionLimitReached):
            await state.create_session()
    assert len(looks) == 1
    clock.advance(10)
    for _ in range(2):
        await state.create_session()
    assert len(looks) == 2


async def test_all_who_come_at_once_wait_for_the_room_that_expired_sessions_leave(
    start: Start, clock: ManualClock
) -> None:
    state = await start(session={"max_sessions": 10})
    for _ in range(10):
        await state.create_session(ttl_seconds=10)
    clock.advance(10)
    made = await asyncio.gather(*[state.create_session() for _ in range(10)])
    assert sorted(await state.get_active_sessions()) == sorted(made)
    with pytest.raises(SessionLimitReached):
        await state.create_session()


async def test_no_more_sessions_than_the_limit(start: Start) -> None:
    state = await start(session={"max_sessions": 3})
    made = [await state.create_session() for _ in range(3)]
    await state.spill_session(made[0])
    with pytest.raises(SessionLimitReached, match=r"3 sessions are alive.*session\.max_sessions"):
        await state.create_session()
    await state.terminate_session(made[1])
    await state.create_session()
    with pytest.raises(SessionLimitReached):
        await state.create_session()


async def test_expired_sessions_do_not_count_for_the_limit(
    start: Start, clock: ManualClock
) -> None:
    state = await start(session={"max_sessions": 3})
    for _ in range(3):
        await state.create_session(ttl_seconds=10)
    clock.advance(10)
    for _ in range(3):
        await state.create_session()
    with pytest.raises(SessionLimitReached):
        await state.create_session()


async def test_the_limit_is_exact_under_concurrent_creations(start: Start) -> None:
    state = await start(session={"max_sessions": 50})
    results = await outcomes(state.create_session() for _ in range(200))
    assert sum(isinstance(result, str) for result in results) == 50
    assert sum(isinstance(result, SessionLimitReached) for result in results) == 150
    assert len(await state.get_active_sessions()) == 50


async def test_at_the_limit_an_existing_id_is_still_said_to_exist(start: Start) -> None:
    state = await start(session={"max_sessions": 1})
    await state.create_session(session_id="a")
    with pytest.raises(SessionExists):
        await state.create_session(session_id="a")
    assert (await state.get_or_create_session("a")).id == "a"


async def test_a_cancelled_creation_counts_for_the_limit(
    start: Start, files: ScriptedFiles
) -> None:
    state = await start(session={"max_sessions": 20})
    files.syncs.hold()
    tasks = [asyncio.create_task(state.create_session()) for _ in range(20)]
    await files.syncs.reached()
    for task in tasks:
        task.cancel()
    await outcomes(tasks)
    more = [asyncio.create_task(state.create_session()) for _ in range(20)]
    await loop_steps(3)
    files.open_gates()
    assert all(isinstance(error, SessionLimitReached) for error in await outcomes(more))
    await state.flush()
    assert len(await state.get_active_sessions()) == 20


async def test_a_failed_creation_does_not_count_for_the_limit(
    start: Start, files: ScriptedFiles
) -> None:
    state = await start(session={"max_sessions": 2})
    files.full = True
    await outcomes(state.create_session() for _ in range(2))
    files.full = False
    for _ in range(2):
        await state.create_session()


async def test_the_limit_is_never_reached_by_sessions_that_come_and_go(start: Start) -> None:
    state = await start(session={"max_sessions": 40})

    async def one_after_the_other(steps: int) -> None:
        for _ in range(20):
            session_id = await state.create_session()
            await loop_steps(steps)
            await state.terminate_session(session_id)

    await asyncio.gather(*(one_after_the_other(number % 4) for number in range(40)))
    assert await state.get_active_sessions() == []


# Get or create


async def test_a_missing_session_is_created_under_that_very_id(state: StateManager) -> None:
    session = await state.get_or_create_session(
        "a", user_id="ada", data={"x": 1}, ttl_seconds=7, metadata=SessionMetadata(source="web")
    )
    assert (session.id, session.user_id, session.data, session.version) == ("a", "ada", {"x": 1}, 1)
    assert (session.ttl_seconds, session.metadata.source) == (7, "web")


@hot_and_cold
async def test_a_session_that_is_there_is_returned_as_it_is(
    state: StateManager, cold: bool
) -> None:
    await state.create_session("ada", session_id="a", data={"x": 1})
    if cold:
        await state.spill_session("a")
    session = await state.get_or_create_session("a", user_id="bob", data={"x": 2})
    assert (session.user_id, session.data, session.version) == ("ada", {"x": 1}, 1)


async def test_without_an_id_there_is_always_a_new_session(state: StateManager) -> None:
    sessions = [await state.get_or_create_session(user_id="ada") for _ in range(3)]
    assert len({session.id for session in sessions}) == 3
    assert all(session.user_id == "ada" for session in sessions)


@pytest.mark.timeout(20)
async def test_of_1000_concurrent_get_or_create_one_creates_and_all_get_it(
    state: StateManager,
) -> None:
    sessions = await asyncio.gather(
        *(state.get_or_create_session("a", data={"number": number}) for number in range(1000))
    )
    assert len({session["number"] for session in sessions}) == 1
    assert {session.version for session in sessions} == {1}
    assert await state.get_active_sessions() == ["a"]
    assert (await state.stats()).disk.sessions == 1


@pytest.mark.timeout(20)
async def test_get_or_create_while_others_terminate_always_ends_with_a_session(
    state: StateManager,
) -> None:
    async def get_it() -> None:
        for _ in range(30):
            assert (await state.get_or_create_session("a")).id == "a"

    async def end_it() -> None:
        for _ in range(30):
            await state.terminate_session("a")
            await loop_steps(2)

    await asyncio.gather(*(get_it() for _ in range(5)), *(end_it() for _ in range(3)))


# Reading


@pytest.mark.parametrize("fresh", [False, True])
async def test_a_missing_session_is_none(state: StateManager, fresh: bool) -> None:
    assert await state.get_session("a", fresh=fresh) is None
    assert not await state.has_session("a")
    assert (await state.stats()).misses == 1


async def test_a_session_is_true_even_without_fields(state: StateManager) -> None:
    await state.create_session(session_id="a")
    assert bool(await state.get_session("a")), "`if session:` would take it for missing"


async def test_fields_are_read_like_those_of_a_mapping(state: StateManager) -> None:
    await state.create_session(session_id="a", data={"x": 1, "none": None, "y": [2]})
    session = await get(state)
    assert session["x"] == 1
    assert session.get("x") == 1
    assert session.get("none", 5) is None
    assert session.get("missing") is None
    assert session.get("missing", 5) == 5
    assert list(session) == session.keys() == ["x", "none", "y"]
    assert dict(session.data) == {"x": 1, "none": None, "y": [2]}
    assert len(session) == 3
    assert "none" in session
    assert "missing" not in session
    with pytest.raises(KeyError):
        session["missing"]


async def test_a_view_lists_its_values_and_items_like_a_dict(state: StateManager) -> None:
    await state.create_session(session_id="a", data={"x": [1], "y": (2,)})
    session = await get(state)
    assert session.values() == [[1], (2,)]
    assert session.items() == [("x", [1]), ("y", (2,))]
    assert session.items()[0][1] is not session.items()[0][1]


async def test_a_draft_shows_its_fields_and_no_values(state: StateManager) -> None:
    await state.create_session(session_id="a", data={"x": "secret"})
    async with state.edit("a") as draft:
        draft["y"] = 1
        assert repr(draft) == "<SessionDraft, fields ['x', 'y']>"
    assert repr(draft) == "<SessionDraft of an edit that has ended>"


async def test_a_view_tells_when_its_lifetime_ends(start: Start) -> None:
    state = await start(session={"max_lifetime_seconds": 5000})
    await state.create_session(session_id="a", ttl_seconds=0)
    session = await get(state)
    assert session.lifetime_ends_at == session.created_at + timedelta(seconds=5000)
    assert session.expires_at == session.lifetime_ends_at
    unlimited = await start(path=directory_of(state) / "other")
    await unlimited.create_session(session_id="a")
    assert (await get(unlimited)).lifetime_ends_at is None


async def test_every_reader_gets_fresh_objects(state: StateManager) -> None:
    await state.create_session(session_id="a", data={"cart": {"items": [1]}})
    session = await get(state)
    session["cart"]["items"].append(2)
    session.data["cart"]["items"].append(3)
    session.metadata.attributes["x"] = 1
    assert session["cart"] == {"items": [1]}
    assert session["cart"] is not session["cart"]
    assert await data_of(state, "a") == {"cart": {"items": [1]}}
    assert (await get(state)).metadata.attributes == {}


async def test_what_was_given_may_be_changed_afterwards(state: StateManager) -> None:
    data = {"cart": {"items": [1]}}
    await state.create_session(session_id="a", data=data)
    data["cart"]["items"].append(2)
    items = [5]
    await state.update_session_data("a", "items", items)
    items.append(6)
    assert await data_of(state, "a") == {"cart": {"items": [1]}, "items": [5]}


async def test_a_view_is_immutable_and_stays_at_its_version(state: StateManager) -> None:
    await state.create_session(session_id="a", data={"x": 1})
    before = await get(state)
    await state.update_session_data("a", "x", 2)
    assert (before["x"], before.version) == (1, 1)
    with pytest.raises(TypeError):
        before["x"] = 3  # type: ignore[index]
    await state.terminate_session("a")
    assert before.data == {"x": 1}


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))],
    ids=["copy", "deepcopy", "pickle"],
)
@pytest.mark.parametrize("field_count", [1, 500], ids=["small", "large"])
async def test_a_view_that_has_been_read_can_be_copied_and_pickled(
    state: StateManager, copied: Callable[[Session], Session], field_count: int
) -> None:
    sid = await state.create_session(data={f"f{n}": "x" * 20 for n in range(field_count)})
    view = await state.get_session(sid)
    assert view is not None
    assert view["f0"] == "x" * 20  # of a large one, where the fields are is known from here on
    made = copied(view)
    assert (made.id, made["f0"], made.data) == (sid, view["f0"], view.data)
    assert (made.last_accessed, made.expires_at) == (view.last_accessed, view.expires_at)


async def test_readers_see_acknowledged_versions_only(
    state: StateManager, files: ScriptedFiles
) -> None:
    await state.create_session(session_id="a", data={"x": 1})
    files.syncs.hold()
    tasks = [
        asyncio.create_task(state.update_session_data("a", "x", 2)),
        asyncio.create_task(state.create_session(session_id="b")),
    ]
    await files.syncs.reached()
    assert (await get(state)).data == {"x": 1}
    assert await state.get_session("b") is None
    assert not await state.has_session("b")
    assert await state.get_active_sessions() == ["a"]
    files.open_gates()
    await asyncio.gather(*tasks)
    assert (await get(state)).data == {"x": 2}
    assert await state.has_session("b")


@hot_and_cold
async def test_a_session_in_the_middle_of_its_termination_is_still_whole(
    state: StateManager, files: ScriptedFiles, cold: bool
) -> None:
    await state.create_session(session_id="a", data={"x": 1})
    if cold:
        await state.spill_session("a")
    files.syncs.hold()
    ending = asyncio.create_task(state.terminate_session("a"))
    await files.syncs.reached()
    assert (await get(state)).data == {"x": 1}
    files.open_gates()
    assert await ending
    assert await state.get_session("a") is None


# Setting one field


@hot_and_cold
async def test_setting_a_field_returns_the_new_version(
    state: StateManager, clock: ManualClock, cold: bool
) -> None:
    await state.create_session("ada", session_id="a", data={"x": 1, "y": 2})
    clock.advance(5)
    if cold:
        await state.spill_session("a")
    session = await state.update_session_data("a", "x", {"z": [3]})
    assert isinstance(session, Session)
    assert (session.id, session.version, session.user_id) == ("a", 2, "ada")
    assert session.data == {"x": {"z": [3]}, "y": 2}
    assert session.last_accessed.timestamp() == clock.wall()
    assert session.created_at.timestamp() == clock.wall() - 5
    again = await get(state)
    assert (again.version, again.data) == (2, session.data)


async def test_a_new_field_comes_last(state: StateManager) -> None:
    await state.create_session(session_id="a", data={"x": 1, "y": 2})
    await state.update_session_data("a", "z", 3)
    session = await state.update_session_data("a", "x", 4)
    assert list(session) == ["x", "y", "z"]
    assert session.version == 3


# Updating with a function


@hot_and_cold
async def test_an_update_commits_what_its_function_changed(state: StateManager, cold: bool) -> None:
    await state.create_session(session_id="a", data={"cart": {"items": [1]}, "old": 1, "kept": 2})
    if cold:
        await state.spill_session("a")

    def change(data: SessionDraft) -> str:
        data["cart"]["items"].append(2)  # noticed although nothing was assigned
        data["new"] = {"x": 1}
        del data["old"]
        return "ignored"

    session = await state.update_session("a", change)
    assert session.version == 2
    assert session.data == {"cart": {"items": [1, 2]}, "kept": 2, "new": {"x": 1}}
    assert await data_of(state, "a") == session.data


@pytest.mark.parametrize(
    "function",
    [
        lambda data: None,
        lambda data: data["cart"],
        lambda data: data.update(x=1),
        lambda data: data["cart"].append(2) or data["cart"].pop(),
        lambda data: data.update(new=1) or data.pop("new"),
        lambda data: data.pop("x") and data.update(x=1),
        list,
        dict,
    ],
)
async def test_an_update_that_changes_nothing_is_no_new_version(
    state: StateManager, files: ScriptedFiles, function: Any
) -> None:
    await state.create_session(session_id="a", data={"x": 1, "cart": [1]})
    writes = files.calls["write_at"]
    session = await state.update_session("a", function)
    assert (session.version, session.data) == (1, {"x": 1, "cart": [1]})
    assert files.calls["write_at"] == writes


async def test_a_function_that_raises_leaves_no_trace(
    state: StateManager, files: ScriptedFiles
) -> None:
    await state.create_session(session_id="a", data={"cart": [1]})
    writes = files.calls["write_at"]

    def change(data: SessionDraft) -> None:
        data["cart"].append(2)
        data["new"] = 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await state.update_session("a", change)
    session = await get(state)
    assert (session.version, session.data) == (1, {"cart": [1]})
    assert files.calls["write_at"] == writes


async def test_a_draft_is_of_no_use_after_its_update(state: StateManager) -> None:
    await state.create_session(session_id="a", data={"read": 1, "unread": 2})
    kept: list[SessionDraft] = []

    def change(data: SessionDraft) -> None:
        assert data["read"] == 1
        kept.append(data)

    await state.update_session("a", change)
    draft = kept[0]
    uses: list[Any] = [
        lambda: draft["read"],
        lambda: draft["unread"],
        lambda: draft.get("read"),
        lambda: draft.update(read=5),
        lambda: draft.pop("read"),
        lambda: list(draft),
        lambda: "read" in draft,
        lambda: len(draft),
    ]
    for use in uses:
        with pytest.raises(ConflictError, match="this edit has ended"):
            use()
    assert await data_of(state, "a") == {"read": 1, "unread": 2}


async def test_what_was_taken_out_of_a_draft_is_a_copy_of_its_own(state: StateManager) -> None:
    await state.create_session(session_id="a", data={"cart": [1]})
    kept: list[Any] = []
    await state.update_session("a", lambda data: kept.append(data["cart"]))
    kept[0].append(2)
    assert await data_of(state, "a") == {"cart": [1]}


async def test_1000_concurrent_increments_are_all_counted(start: Start) -> None:
    state = await start(disk={"queue_bytes": 16 * KIB})
    await state.create_session(session_id="a", data={"count": 0})

    def increment(data: SessionDraft) -> None:
        data["count"] += 1

    sessions = await asyncio.gather(*(state.update_session("a", increment) for _ in range(1000)))
    assert sorted(session["count"] for session in sessions) == list(range(1, 1001))
    assert sorted(session.version for session in sessions) == list(range(2, 1002))
    assert (await get(state)).data == {"count": 1000}


# Replacing


@hot_and_cold
async def test_a_replacement_leaves_nothing_of_the_old_data(
    state: StateManager, cold: bool
) -> None:
    await state.create_session("ada", SessionMetadata(source="web"), data={"x": 1}, session_id="a")
    if cold:
        await state.spill_session("a")
    session = await state.replace_session("a", {"y": [2]})
    assert (session.data, session.version) == ({"y": [2]}, 2)
    assert (session.user_id, session.metadata.source) == ("ada", "web")
    assert (await state.replace_session("a", {})).data == {}


# Metadata


@hot_and_cold
async def test_metadata_changes_entry_by_entry(state: StateManager, cold: bool) -> None:
    first = SessionMetadata("203.0.113.9", "curl/8", "web", {"tenant": "acme"})
    await state.create_session("ada", first, data={"x": 1}, session_id="a", max_requests=9)
    if cold:
        await state.spill_session("a")
    session = await state.update_session_metadata("a", source="app", client_ip=None)
    assert session.version == 2
    assert session.metadata == SessionMetadata(None, "curl/8", "app", {"tenant": "acme"})
    assert (session.user_id, session.data, session.max_requests) == ("ada", {"x": 1}, 9)
    session = await state.update_session_metadata("a", attributes={"plan": ("pro", 2)})
    assert session.metadata.attributes == {"plan": ("pro", 2)}
    assert (await get(state)).metadata == session.metadata


@pytest.mark.parametrize("name", ["user_id", "sauce", "max_requests"])
async def test_what_is_no_metadata_is_refused(state: StateManager, name: str) -> None:
    await state.create_session(session_id="a")
    with pytest.raises(TypeError, match=f"'{name}' is not session metadata"):
        await state.update_session_metadata("a", **{name: "x"})
    assert (await get(state)).version == 1


# Sessions that are not there


async def test_changes_of_a_missing_session_are_refused(state: StateManager) -> None:
    async def in_edit() -> None:
        async with state.edit("a"):
            raise AssertionError("must not get in")

    calls: list[Awaitable[Any]] = [
        state.update_session_data("a", "x", 1),
        state.update_session("a", lambda data: data.update(x=1)),
        state.update_session_metadata("a", source="x"),
        state.replace_session("a", {}),
        in_edit(),
    ]
    for error in await outcomes(calls):
        assert isinstance(error, SessionNotFound)
        assert error.session_id == "a"
    assert not await state.set_ttl("a", 5)
    assert not await state.spill_session("a")
    assert not await state.restore_session("a")
    assert not await state.terminate_session("a")
    assert await state.get_active_sessions() == []


# Ending


@hot_and_cold
async def test_a_terminated_session_is_absent_at_once_and_for_good(
    start: Start, crash: Crash, cold: bool
) -> None:
    state = await start()
    await state.create_session("ada", session_id="a", data={"x": 1})
    if cold:
        await state.spill_session("a")
    assert await state.terminate_session("a") is True
    assert await state.terminate_session("a") is False
    assert await state.get_session("a") is None
    assert not await state.has_session("a")
    assert await state.get_active_sessions() == []
    assert await state.find_sessions(user_id="ada") == []
    image = crash(state)
    await state.close()
    assert await contents(await start()) == {}
    assert await contents(await start(path=image)) == {}


async def test_concurrent_terminations_agree_on_who_ended_it(state: StateManager) -> None:
    await state.create_session(session_id="a")
    results = await asyncio.gather(*(state.terminate_session("a") for _ in range(100)))
    assert results.count(True) == 1
    assert await state.get_session("a") is None


async def test_a_termination_that_says_false_says_so_when_the_end_is_durable(
    state: StateManager, files: ScriptedFiles
) -> None:
    await state.create_session(session_id="a")
    files.syncs.hold()
    tasks = [asyncio.create_task(state.terminate_session("a")) for _ in range(2)]
    await files.syncs.reached()
    await loop_steps(5)
    assert not any(task.done() for task in tasks)
    files.open_gates()
    assert await asyncio.gather(*tasks) == [True, False]


async def test_no_late_write_brings_a_terminated_session_back(
    state: StateManager, files: ScriptedFiles
) -> None:
    await state.create_session(session_id="a", data={"x": 1})
    files.syncs.hold()
    early = asyncio.create_task(state.update_session_data("a", "x", 2))
    await files.syncs.reached()
    ending = asyncio.create_task(state.terminate_session("a"))
    await loop_steps(3)
    late = asyncio.create_task(state.update_session_data("a", "x", 3))
    await loop_steps(3)
    files.open_gates()
    results = await outcomes([early, ending, late])
    assert isinstance(results[0], Session)
    assert results[1] is True
    assert isinstance(results[2], SessionNotFound)
    assert await state.get_session("a") is None


@pytest.mark.parametrize("seed", range(3))
async def test_a_session_created_again_has_nothing_of_the_old_one(start: Start, seed: int) -> None:
    rng = random.Random(seed)
    state = await start(memory={"max_bytes": 4 * KIB})
    for generation in range(40):
        await state.create_session(session_id="a", data={"generation": generation})
        for _ in range(rng.randrange(3)):
            await state.update_session_data("a", f"own {generation}", "x" * rng.randrange(2000))
        if rng.random() < 0.5:
            await state.spill_session("a")
        session = await get(state)
        assert session["generation"] == generation
        assert set(session) <= {"generation", f"own {generation}"}
        assert await state.terminate_session("a")


# Memory and disk


async def test_spilling_and_restoring_move_a_session_and_change_nothing(
    state: StateManager, clock: ManualClock
) -> None:
    await state.create_session(session_id="a", data={"x": 1}, ttl_seconds=100)
    clock.advance(10)
    assert await state.spill_session("a") is True
    stats = await state.stats()
    assert (stats.in_memory, stats.on_disk, stats.spilled) == (0, 1, 1)
    assert stats.memory_used_bytes == 0
    assert await state.spill_session("a") is True  # it is there, and where it should be
    assert (await state.stats()).spilled == 1
    assert await state.restore_session("a") is True
    assert await state.restore_session("a") is True
    stats = await state.stats()
    assert (stats.in_memory, stats.on_disk, stats.restored) == (1, 0, 1)
    clock.advance(89)
    assert await state.has_session("a")
    clock.advance(1)
    assert not await state.has_session("a"), "neither of them is an access"


async def test_a_session_with_an_update_in_flight_is_spilled_in_its_new_version(
    state: StateManager, files: ScriptedFiles
) -> None:
    await state.create_session(session_id="a", data={"x": 1})
    files.syncs.hold()
    update = asyncio.create_task(state.update_session_data("a", "x", 2))
    await files.syncs.reached()
    spill = asyncio.create_task(state.spill_session("a"))
    await loop_steps(3)
    files.open_gates()
    assert (await asyncio.gather(update, spill))[1] is True
    assert (await state.stats()).in_memory == 0
    assert await data_of(state, "a") == {"x": 2}


async def test_stats_tell_what_happened(start: Start) -> None:
    state = await start(memory={"max_bytes": 64 * KIB})
    for number in range(10):
        await state.create_session(session_id=str(number))
    await state.update_session_data("1", "x", 1)
    await state.get_session("1")
    await state.get_session("missing")
    await state.spill_session("2")
    await state.get_session("2")
    await state.spill_session("3")
    stats = await state.stats()
    assert isinstance(stats, Stats)
    assert (stats.sessions, stats.in_memory, stats.on_disk) == (10, 9, 1)
    assert (stats.hits, stats.misses, stats.spilled, stats.restored) == (1, 1, 2, 1)
    assert stats.commits == 11
    assert 1 <= stats.batches <= 11
    assert stats.pending_bytes == 0
    assert stats.memory_budget_bytes == stats.memory_effective_budget_bytes == 64 * KIB
    assert stats.memory_used_bytes == memory_of(state).used_bytes > 0
    assert stats.memory_peak_bytes >= stats.memory_used_bytes
    assert stats.disk.sessions == 10
    assert stats.disk.live_bytes > 0
    assert stats.as_dict()["disk"]["sessions"] == 10
    assert stats.commit_seconds.p50 <= stats.commit_seconds.p95 <= stats.commit_seconds.p99


@pytest.mark.parametrize("fsync", ["always", "interval", "never"])
async def test_a_flush_syncs_in_every_mode(start: Start, files: ScriptedFiles, fsync: str) -> None:
    state = await start(disk={"fsync": fsync, "flush_interval_seconds": 3600})
    await state.create_session(session_id="a")
    before = files.calls["sync_data"]
    assert before == (1 if fsync == "always" else 0)
    await state.flush()
    assert files.calls["sync_data"] == 1
    await state.flush()
    assert files.calls["sync_data"] == 1, "nothing new, nothing to sync"


async def test_compaction_frees_what_is_dead_and_keeps_what_lives(start: Start) -> None:
    state = await start(disk={"segment_bytes": 64 * KIB, "compaction_bytes_per_second": 0})
    rng = random.Random(5)
    for _ in range(10):
        for number in range(20):
            name = str(number)
            await state.get_or_create_session(name)
            await state.update_session_data(name, "x", rng.randbytes(1000))
    expected = await contents(state)
    await state.compact()
    disk = (await state.stats()).disk
    assert disk.compactions > 0
    assert disk.total_bytes < 3 * disk.live_bytes + 2 * 64 * KIB
    for number in range(20):
        await state.spill_session(str(number))
    assert await contents(state) == expected
    await state.close()
    assert await contents(await start(disk={"segment_bytes": 64 * KIB})) == expected


# The directory


async def test_what_was_acknowledged_is_there_after_closing_and_after_a_crash(
    start: Start, crash: Crash
) -> None:
    state = await start()
    await state.create_session("ada", SessionMetadata(source="web"), data={"x": 1}, session_id="a")
    await state.update_session_data("a", "y", [2])
    await state.create_session(session_id="b")
    before = await get(state)
    image = crash(state)
    await state.close()
    for path in (None, image):
        again = await start(path=path) if path else await start()
        session = await get(again)
        assert (session.version, session.data, session.user_id) == (2, {"x": 1, "y": [2]}, "ada")
        assert session.metadata == before.metadata
        assert session.created_at == before.created_at
        assert await again.find_sessions(user_id="ada") == ["a"]
        assert sorted(await again.get_active_sessions()) == ["a", "b"]


async def test_a_second_manager_on_the_same_directory_is_refused(start: Start) -> None:
    state = await start()
    await state.create_session(session_id="a")
    with pytest.raises(DirectoryLocked):
        await start()
    assert await state.has_session("a")
    await state.close()
    assert await (await start()).has_session("a")


@pytest.mark.parametrize(
    "url",
    [
        "redis://host:99999",
        "redis://host/shop",
        "redis://host/0?retries=5",
        "redis+sentinel://host",
        "postgresql://host",
    ],
)
async def test_a_wrong_url_is_refused_before_there_is_a_directory(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=r"redis\.url"):
        await StateManager(url, config_for(tmp_path / "state")).open()
    assert names_in(tmp_path) == set()


async def test_questions_to_a_shared_tier_that_is_not_configured_are_refused(
    state: StateManager,
) -> None:
    with pytest.raises(ConfigError, match="namespace=True"):
        await state.get_active_sessions(namespace=True)
    with pytest.raises(ConfigError, match="namespace=True"):
        [name async for name in state.iter_sessions(namespace=True)]


# A full disk


async def test_a_full_disk_refuses_new_writes_and_serves_reads(
    start: Start, files: ScriptedFiles, crash: Crash
) -> None:
    state = await start()
    for name in ("hot", "cold"):
        await state.create_session("ada", session_id=name, data={"x": 1})
    await state.spill_session("cold")
    files.full = True

    async def in_edit() -> None:
        async with state.edit("hot") as draft:
            draft["x"] = 3

    calls: list[Awaitable[Any]] = [
        state.create_session(session_id="new"),
        state.update_session_data("hot", "x", 2),
        state.update_session_data("cold", "x", 2),
        in_edit(),
        state.terminate_session("cold"),
    ]
    for error in await outcomes(calls):
        assert isinstance(error, DiskFull)
    assert await contents(state) == {"hot": {"x": 1}, "cold": {"x": 1}}
    assert sorted(await state.find_sessions(user_id="ada")) == ["cold", "hot"]
    assert await state.spill_session("hot")
    assert await data_of(state, "hot") == {"x": 1}
    assert (await get(state, "hot")).version == 1
    files.full = False
    assert (await state.update_session_data("hot", "x", 3)).version == 2
    assert await contents(await start(path=crash(state))) == {"hot": {"x": 3}, "cold": {"x": 1}}


@pytest.mark.parametrize("how", ["update", "edit"])
async def test_what_an_update_in_flight_said_already_is_only_said_when_that_is_durable(
    state: StateManager, files: ScriptedFiles, how: str
) -> None:
    """Setting what is set already changes nothing, but that it is set has to be true."""
    await state.create_session(session_id="a", data={"x": 1})

    async def set_again() -> Session | None:
        if how == "update":
            return await state.update_session("a", lambda data: data.update(x=2))
        async with state.edit("a") as draft:
            draft["x"] = 2
        return None

    for fails in (True, False):
        files.writes.hold()
        update = asyncio.create_task(state.update_session_data("a", "x", 2))
        await files.writes.reached()
        again = asyncio.create_task(set_again())
        await loop_steps(5)
        assert not again.done()
        files.full = fails
        files.open_gates()
        results = await outcomes([update, again])
        files.full = False
        assert [isinstance(result, DiskFull) for result in results] == [fails, fails]
    assert await data_of(state, "a") == {"x": 2}


async def test_of_two_terminations_on_a_full_disk_none_says_that_there_is_nothing(
    state: StateManager, files: ScriptedFiles
) -> None:
    await state.create_session(session_id="a")
    files.full = True
    results = await outcomes([state.terminate_session("a"), state.terminate_session("a")])
    assert all(isinstance(result, DiskFull) for result in results)
    assert await state.has_session("a")
    files.full = False
    assert await state.terminate_session("a")


async def test_a_limit_on_the_log_lets_sessions_end_and_then_takes_new_ones(
    start: Start,
) -> None:
    rng = random.Random(1)
    state = await start(
        disk={"max_bytes": 300 * KIB, "segment_bytes": 64 * KIB, "compaction_bytes_per_second": 0}
    )
    made: list[str] = []
    result: Any = None
    while not isinstance(result, PersistenceError):
        (result,) = await outcomes([state.create_session(data={"x": rng.randbytes(8 * KIB)})])
        made.append(result)
    assert type(result).__name__ == "DiskFull"
    assert "disk.max_bytes is 307200" in str(result)
    made.pop()
    assert len(made) > 25
    for session_id in made[5:]:
        assert await state.terminate_session(session_id)
    await state.flush()
    await state.compact()
    await state.create_session(session_id="new", data={"x": 1})
    assert set(await state.get_active_sessions()) == {*made[:5], "new"}
    assert disk_of(state).total_bytes < 300 * KIB


async def test_a_terminated_session_stays_ended_when_its_last_update_did_not_fit(
    start: Start, files: ScriptedFiles
) -> None:
    state = await start(disk={"max_bytes": 100 * KIB, "compression": "none"})
    await state.create_session(session_id="a", data={"x": 1})
    await state.create_session(session_id="b")
    files.syncs.hold()
    other = asyncio.create_task(state.update_session_data("b", "x", 1))
    await files.syncs.reached()
    too_large = asyncio.create_task(state.update_session_data("a", "x", b"1" * (200 * KIB)))
    await loop_steps(2)
    ending = asyncio.create_task(state.terminate_session("a"))
    await loop_steps(2)
    files.syncs.let_pass(1)
    await asyncio.wait([too_large])
    late = asyncio.create_task(state.update_session_data("a", "y", 2))
    await loop_steps(5)
    files.open_gates()
    assert isinstance(await other, Session)
    results = await outcomes([too_large, ending, late])
    assert type(results[0]).__name__ == "DiskFull"
    if results[1] is True:
        assert isinstance(results[2], SessionNotFound)
        assert not await state.has_session("a")
    else:  # it was built on an update that failed
        assert type(results[1]).__name__ == "DiskFull"
        assert await state.has_session("a")
    assert not commits_of(state).tails
