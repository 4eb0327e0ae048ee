"""What callers pass in the wrong type or place is refused by name, and nothing is written."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from persistence import ManualClock, SessionDraft, SessionMetadata, StateConfig, StateManager
from persistence.errors import InvalidArgument, ManagerClosed, ValueTooLarge
from tests.engine import MIB, Start, contents, data_of

Call = Callable[[StateManager], Awaitable[Any]]


def create(**arguments: Any) -> Call:
    return lambda state: state.create_session(**arguments)


async def iterated(state: StateManager, prefix: Any) -> None:
    async for _ in state.iter_sessions(prefix):
        pass


WRONG: dict[str, Call] = {
    **{
        f"{name} = {value!r}"[:40]: create(**{name: value})
        for name, values in {
            "ttl_seconds": ("10", [], True, math.nan),
            "user_id": (5, b"ada", ["ada"]),
            "max_requests": (math.nan, 1.5, True, 2**70, -1, "5"),
            "auto_renew": ("no", 1),
            "metadata": ({"client_ip": "x"}, "x"),
        }.items()
        for value in values
    },
    "ttl_seconds = (int too long to print)": create(ttl_seconds=10**5000),
    "data is a list": create(data=["x"]),
    "data is a str": lambda state: state.replace_session("a", "x"),  # type: ignore[arg-type]
    "data is a NoneType": lambda state: state.replace_session("a", None),  # type: ignore[arg-type]
    "ttl_seconds = 'x'": lambda state: state.set_ttl("a", "x"),  # type: ignore[arg-type]
    "ttl_seconds = None": lambda state: state.set_ttl("a", None),  # type: ignore[arg-type]
    "max_age_seconds = '5'": lambda state: state.cleanup_old_sessions("5"),  # type: ignore[arg-type]
    "max_age_seconds = None": lambda state: state.cleanup_old_sessions(None),  # type: ignore[arg-type]
    "prefix = None": lambda state: iterated(state, None),
    "user_id = None": lambda state: state.find_sessions(user_id=None),  # type: ignore[arg-type]
    "attributes is a int": lambda state: state.update_session_metadata("a", attributes=5),
    "source = 5": lambda state: state.update_session_metadata("a", source=5),
    "attributes is a list": create(metadata=SessionMetadata(attributes=[1])),  # type: ignore[arg-type]
    "client_ip = 5": create(metadata=SessionMetadata(client_ip=5)),  # type: ignore[arg-type]
    "reason = 5": lambda state: state.create_checkpoint(5),  # type: ignore[arg-type]
    "reason = None": lambda state: state.create_checkpoint(None),  # type: ignore[arg-type]
    "reason = '\\udcff'": lambda state: state.create_checkpoint("\udcff"),
    "checkpoint_id = None": lambda state: state.delete_checkpoint(None),  # type: ignore[arg-type]
    "checkpoint_id = 5": lambda state: state.restore_checkpoint(5),  # type: ignore[arg-type]
    "grace_seconds = '5'": lambda state: state.close(grace_seconds="5"),  # type: ignore[arg-type]
    "grace_seconds = nan": lambda state: state.close(grace_seconds=math.nan),
}


@pytest.mark.parametrize(("said", "call"), WRONG.items(), ids=WRONG.keys())
async def test_a_wrong_argument_is_named_and_nothing_is_written(
    state: StateManager, said: str, call: Call
) -> None:
    await state.create_session(session_id="a", data={"x": 1})
    with pytest.raises(InvalidArgument) as raised:
        await call(state)
    assert str(raised.value).startswith(said)
    assert "must be" in str(raised.value)
    assert await contents(state) == {"a": {"x": 1}}
    session = await state.get_session("a")
    assert session is not None
    assert session.version == 1
    assert await state.list_checkpoints() == []


async def test_an_empty_text_about_a_user_comes_back_as_an_empty_text(state: StateManager) -> None:
    metadata = SessionMetadata(client_ip="", user_agent="", source="")
    await state.create_session("", metadata, session_id="empty")
    await state.create_session(session_id="none")
    session = await state.get_session("empty")
    assert session is not None
    assert (session.user_id, session.metadata) == ("", metadata)
    assert await state.find_sessions(user_id="") == ["empty"]


async def test_metadata_of_16_mib_is_too_large(state: StateManager) -> None:
    with pytest.raises(ValueTooLarge, match="less than 16 MiB; nothing was written"):
        await state.create_session(metadata=SessionMetadata(attributes={"x": "x" * 16 * MIB}))


@pytest.mark.parametrize("changes", [{}, {"source": "web"}, {"user_agent": None}], ids=str)
async def test_an_update_of_the_metadata_that_changes_nothing_writes_nothing(
    state: StateManager, changes: dict[str, Any]
) -> None:
    await state.create_session(metadata=SessionMetadata(source="web"), session_id="a")
    written = (await state.stats()).commits
    session = await state.update_session_metadata("a", **changes)
    assert (session.version, session.metadata) == (1, SessionMetadata(source="web"))
    assert (await state.stats()).commits == written


# Functions and lives that are odd


async def asynchronous(data: SessionDraft) -> None:
    data["x"] = 2


def to_a_task(data: SessionDraft) -> object:
    return asyncio.ensure_future(asynchronous(data))


@pytest.mark.parametrize("cold", [False, True], ids=["hot", "cold"])
@pytest.mark.parametrize("function", [asynchronous, to_a_task])
async def test_a_function_that_has_to_be_awaited_is_refused(
    state: StateManager, function: Callable[[SessionDraft], object], cold: bool
) -> None:
    await state.create_session(session_id="a", data={"x": 1})
    if cold:
        await state.spill_session("a")
    with pytest.raises(InvalidArgument, match=r"synchronous.*edit\(session_id\)"):
        await state.update_session("a", function)
    assert await data_of(state, "a") == {"x": 1}


async def test_what_is_no_function_is_refused(state: StateManager) -> None:
    await state.create_session(session_id="a", data={"x": 1})
    with pytest.raises(InvalidArgument, match=r"^function = None: must be a function"):
        await state.update_session("a", None)  # type: ignore[arg-type] # the wrong type is the point


async def test_get_or_create_returns_what_it_created_however_short_its_life(
    state: StateManager, clock: ManualClock
) -> None:
    session = await state.get_or_create_session("a", ttl_seconds=1e-9, data={"x": 1})
    assert (session.id, session.version, session.data) == ("a", 1, {"x": 1})
    clock.advance(1)
    assert await state.get_session("a") is None


# Making a manager, and where it belongs


def test_an_empty_url_is_none() -> None:
    assert StateManager("").config.redis.url is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((StateConfig(),), r"second argument, StateManager\(config="),
        ((5,), "url = 5: must be a str or None"),
        ((None, {}), r"config = \{\}: must be a StateConfig"),
        ((None, 5), "config = 5: must be a StateConfig"),
    ],
)
def test_what_is_no_url_and_what_is_no_configuration_are_refused(
    arguments: tuple[Any, ...], said: str
) -> None:
    with pytest.raises(InvalidArgument, match=said):
        StateManager(*arguments)


@pytest.mark.parametrize("clock", [5, object(), "now"])
def test_a_clock_must_tell_both_times(clock: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"clock = .*: must be a Clock, with wall\(\)"):
        StateManager(clock=clock)


async def test_from_another_event_loop_every_change_is_refused(start: Start) -> None:
    state = await start()
    await state.create_session(session_id="a", data={"x": 1})
    await state.create_session(session_id="hot")
    await state.spill_session("a")
    calls: list[Call] = [
        lambda state: state.create_session(),
        lambda state: state.get_session("hot"),
        lambda state: state.update_session_data("a", "x", 2),
        lambda state: state.update_session("a", lambda data: data.update(x=2)),
        lambda state: state.terminate_session("a"),
        lambda state: state.get_active_sessions(),
        lambda state: state.get_session("missing"),
        lambda state: state.close(),
    ]

    def elsewhere() -> list[str]:
        said = []
        for call in calls:
            with pytest.raises(ManagerClosed) as raised:
                asyncio.run(as_coroutine(call(state)))
            said.append(str(raised.value))
        return said

    for text in await asyncio.to_thread(elsewhere):
        assert "opened in another event loop" in text
        assert "run_coroutine_threadsafe" in text
    assert await contents(state) == {"a": {"x": 1}, "hot": {}}


async def as_coroutine(call: Awaitable[Any]) -> Any:
    return await call
