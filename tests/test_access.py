"""Tokens that open one session, and handles through which no other can be reached."""

from __future__ import annotations

import asyncio
import glob
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persistence import ClientInfo, ManualClock, StateManager, errors
from persistence.access import SessionHandle
from tests.disk.memoryfiles import MemoryFiles
from tests.engine import ScriptedFiles, Start
from tests.support import opened

CLIENT = ClientInfo("203.0.113.9", "Mozilla/5.0")
OTHER = ClientInfo("203.0.113.10", "Mozilla/5.0")
KEYS = ["0b" * 32, "5e" * 32]


async def is_valid(state: StateManager, token: str, client: ClientInfo = CLIENT) -> bool:
    try:
        await state.validate_token(token, client)
    except errors.TokenInvalid:
        return False
    return True


async def test_a_token_opens_the_session_that_it_was_issued_for(state: StateManager) -> None:
    one, two = [await state.create_session(data={"n": n}) for n in (1, 2)]
    tokens = {sid: state.issue_token(sid, CLIENT) for sid in (one, two)}
    for sid, token in tokens.items():
        assert await state.validate_token(token, CLIENT) == sid
        assert not await is_valid(state, token, OTHER)


async def test_a_token_survives_a_spill_and_a_restart(start: Start, tmp_path: Path) -> None:
    first = await start()
    sid = await first.create_session()
    token = first.issue_token(sid, CLIENT)
    await first.spill_session(sid)
    assert await first.validate_token(token, CLIENT) == sid
    await first.spill_session(sid)
    cold = first.issue_token(sid, CLIENT)
    await first.close()
    second = await start()
    assert await second.validate_token(token, CLIENT) == sid
    assert await second.validate_token(cold, CLIENT) == sid


async def test_a_token_is_issued_for_a_cold_session_that_is_in_no_cache(
    state: StateManager, files: ScriptedFiles
) -> None:
    files.tells_cached = False
    sid = await state.create_session()
    await state.spill_session(sid)
    token = state.issue_token(sid, CLIENT)
    assert await state.validate_token(token, CLIENT) == sid


async def test_a_token_ends_with_its_session(state: StateManager) -> None:
    sid = await state.create_session()
    token = state.issue_token(sid, CLIENT)
    await state.terminate_session(sid)
    assert not await is_valid(state, token)
    await state.create_session(session_id=sid)
    assert not await is_valid(state, token), "another session has the same id"
    assert await is_valid(state, state.issue_token(sid, CLIENT))


async def test_a_token_ends_when_its_session_expires(
    state: StateManager, clock: ManualClock
) -> None:
    sid = await state.create_session(ttl_seconds=60)
    token = state.issue_token(sid, CLIENT)
    clock.advance(59)
    assert await is_valid(state, token)
    clock.advance(2)
    assert not await is_valid(state, token), "validating does not renew"


@pytest.mark.parametrize(("given_seconds", "seconds"), [(None, 100.0), (30, 30.0)])
async def test_a_token_ends_after_its_own_time(
    start: Start, clock: ManualClock, given_seconds: float | None, seconds: float
) -> None:
    state = await start(security={"token_ttl_seconds": 100})
    sid = await state.create_session(ttl_seconds=0)
    token = state.issue_token(sid, CLIENT, ttl_seconds=given_seconds)
    handle = await state.open_session(sid, token, CLIENT)
    clock.advance(seconds - 1)
    assert await is_valid(state, token)
    await handle.get()
    clock.advance(1)
    assert not await is_valid(state, token)
    with pytest.raises(errors.TokenInvalid):
        await handle.get()


async def test_a_token_without_an_end_lasts_as_long_as_its_session(
    state: StateManager, clock: ManualClock
) -> None:
    sid = await state.create_session(ttl_seconds=0)
    token = state.issue_token(sid, CLIENT, ttl_seconds=0)
    clock.advance(10 * 365 * 86_400)
    assert await is_valid(state, token)


async def test_what_is_wrong_with_a_call_is_said_and_what_is_wrong_with_a_token_is_not(
    state: StateManager,
) -> None:
    sid = await state.create_session()
    token = state.issue_token(sid, CLIENT)
    wrong: Any = "203.0.113.9"
    with pytest.raises(errors.InvalidArgument, match="ClientInfo"):
        state.issue_token(sid, wrong)
    with pytest.raises(errors.InvalidArgument, match="ClientInfo"):
        await state.validate_token(token, wrong)
    wrong = ClientInfo(5)  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidArgument, match=r"client\.ip"):
        await state.open_session(sid, token, wrong)
    with pytest.raises(errors.InvalidArgument, match="ttl_seconds"):
        state.issue_token(sid, CLIENT, ttl_seconds=-1)
    with pytest.raises(errors.SessionNotFound):
        state.issue_token("nobody", CLIENT)
    with pytest.raises(errors.InvalidSessionId):
        state.issue_token("", CLIENT)
    said = set()
    cases: list[Any] = [None, 7, "", token[:-1], "x" * 5000, state.issue_token(sid, OTHER)]
    for bad in cases:
        with pytest.raises(errors.TokenInvalid) as caught:
            await state.validate_token(bad, CLIENT)
        said.add(str(caught.value))
    assert len(said) == 1


async def test_a_closed_manager_issues_and_validates_nothing(start: Start) -> None:
    state = await start()
    sid = await state.create_session()
    token = state.issue_token(sid, CLIENT)
    handle = await state.open_session(sid, token, CLIENT)
    await state.close()
    with pytest.raises(errors.ManagerClosed):
        state.issue_token(sid, CLIENT)
    with pytest.raises(errors.ManagerClosed):
        await state.validate_token(token, CLIENT)
    with pytest.raises(errors.ManagerClosed):
        await handle.get()


async def test_tokens_of_a_restored_state_are_new(state: StateManager) -> None:
    sid = await state.create_session()
    token = state.issue_token(sid, CLIENT)
    info = await state.create_checkpoint()
    await state.restore_checkpoint(info.id)
    assert await state.has_session(sid)
    assert not await is_valid(state, token), "it may have been revoked since"


# Keys


async def test_without_a_key_of_its_own_a_directory_knows_its_own_tokens_only(
    start: Start, tmp_path: Path
) -> None:
    one, two = await start(path=tmp_path / "one"), await start(path=tmp_path / "two")
    for state in (one, two):
        await state.create_session(session_id="a")
    assert not await is_valid(two, one.issue_token("a", CLIENT))


async def test_workers_with_the_same_key_file_make_it_once_and_read_each_others_tokens(
    start: Start, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    states = await asyncio.gather(
        *(start(path=tmp_path / name, security={"key_file": str(file)}) for name in "abcd")
    )
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(glob.glob(f"{tmp_path}/*.tmp")) == []
    ids = {repr(state._tiers.keys) for state in states}
    assert len(ids) == 1
    key = file.read_text().splitlines()[1].split()[0]
    assert key not in repr(states[0]._tiers.keys) + repr(states[0].config)


async def test_a_rotated_key_signs_after_a_restart_and_old_tokens_stay_valid(start: Start) -> None:
    first = await start(security={"secret_keys": KEYS[0]})
    sid = await first.create_session()
    old = first.issue_token(sid, CLIENT)
    await first.close()
    second = await start(security={"secret_keys": ",".join(KEYS)})
    new = second.issue_token(sid, CLIENT)
    assert await is_valid(second, old)
    assert await is_valid(second, new)
    await second.close()
    third = await start(security={"secret_keys": KEYS[1]})
    assert not await is_valid(third, old)
    assert await is_valid(third, new)


async def test_a_key_that_another_worker_has_added_is_learned_when_it_is_met(
    start: Start, tmp_path: Path, clock: ManualClock
) -> None:
    file = tmp_path / "keys"
    file.write_text(KEYS[0])
    state = await start(security={"key_file": str(file)})
    sid = await state.create_session()
    before = state.issue_token(sid, CLIENT)
    file.write_text("\n".join(KEYS))
    other = await start(path=tmp_path / "other", security={"key_file": str(file)})
    mine = state._residency.record_now(sid, sid.encode())
    assert mine is not None
    token = other._token_access.issue(sid, mine, CLIENT, None)
    assert await is_valid(state, token)
    assert await is_valid(state, before)
    assert state.issue_token(sid, CLIENT)[:6] == before[:6], "it signs with what it opened with"
    file.write_text("broken")
    clock.advance(2)
    assert not await is_valid(state, "AQ" + "A" * 150)
    assert await is_valid(state, token), "and keeps what it knows"


@pytest.mark.parametrize("content", [b"", b"no key", b"\xff\xfe"])
async def test_a_key_file_without_keys_is_a_wrong_configuration(
    start: Start, tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(errors.ConfigError, match="keys"):
        await start(security={"key_file": str(file)})
    assert file.read_bytes() == content


async def test_a_key_file_that_cannot_be_read_or_made_is_named(
    start: Start, tmp_path: Path
) -> None:
    with pytest.raises(errors.ConfigError, match=r"security\.key_file: .*nowhere"):
        await start(security={"key_file": str(tmp_path / "nowhere" / "keys")})
    with pytest.raises(errors.ConfigError, match=r"security\.key_file"):
        await start(security={"key_file": str(tmp_path)})


# Handles


async def a_handle(state: StateManager, sid: str) -> SessionHandle:
    return await state.open_session(sid, state.issue_token(sid, CLIENT), CLIENT)


async def test_a_handle_does_to_its_session_what_the_manager_does(state: StateManager) -> None:
    sid = await state.create_session(data={"list": [1]})
    handle = await a_handle(state, sid)
    assert (handle.id, repr(handle)) == (sid, f"SessionHandle({sid!r})")
    await handle.update(lambda data: data["list"].append(2))
    await handle.update_data("n", 1)
    async with handle.edit() as draft:
        draft["list"].append(3)
    assert (await handle.get()).data == {"list": [1, 2, 3], "n": 1}
    await handle.replace({"m": 2}, ttl_seconds=60)
    assert (await handle.get()).ttl_seconds == 60
    await handle.set_ttl(120)
    session = await handle.get()
    assert (session.data, session.ttl_seconds) == ({"m": 2}, 120)
    await handle.terminate()
    assert not await state.has_session(sid)


async def test_an_edit_through_a_handle_that_fails_leaves_no_trace(state: StateManager) -> None:
    sid = await state.create_session(data={"n": 1})
    handle = await a_handle(state, sid)
    with pytest.raises(ZeroDivisionError):
        async with handle.edit() as draft:
            draft["n"] = 1 / 0
    assert (await handle.get())["n"] == 1


async def test_a_handle_takes_no_token_of_another_session(state: StateManager) -> None:
    one, two = await state.create_session(), await state.create_session()
    token = state.issue_token(one, CLIENT)
    with pytest.raises(errors.TokenInvalid):
        await state.open_session(two, token, CLIENT)
    with pytest.raises(errors.TokenInvalid):
        await state.open_session(one, token, OTHER)
    with pytest.raises(errors.InvalidSessionId):
        await state.open_session("", token, CLIENT)


async def use_get(handle: SessionHandle) -> None:
    await handle.get()


async def use_update(handle: SessionHandle) -> None:
    await handle.update(lambda data: data.update(n="updated"))


async def use_update_data(handle: SessionHandle) -> None:
    await handle.update_data("n", "set")


async def use_replace(handle: SessionHandle) -> None:
    await handle.replace({"n": "replaced"})


async def use_set_ttl(handle: SessionHandle) -> None:
    await handle.set_ttl(1)


async def use_terminate(handle: SessionHandle) -> None:
    await handle.terminate()


async def use_edit(handle: SessionHandle) -> None:
    async with handle.edit() as draft:
        draft["n"] = "edited"


CALLS: dict[str, Callable[[SessionHandle], Coroutine[Any, Any, None]]] = {
    "get": use_get,
    "update": use_update,
    "update_data": use_update_data,
    "replace": use_replace,
    "set_ttl": use_set_ttl,
    "edit": use_edit,
    "terminate": use_terminate,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("is_created_anew", [False, True])
async def test_no_call_of_a_handle_outlives_its_session(
    state: StateManager, call: Any, is_created_anew: bool
) -> None:
    sid = await state.create_session(data={"n": 1})
    handle = await a_handle(state, sid)
    await state.terminate_session(sid)
    if is_created_anew:
        await state.create_session(session_id=sid, data={"n": "another's"}, ttl_seconds=600)
    with pytest.raises(errors.TokenInvalid):
        await call(handle)
    if is_created_anew:
        session = await state.get_session(sid)
        assert session is not None
        assert (session["n"], session.ttl_seconds, session.version) == ("another's", 600, 1)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("get", "terminate")])
async def test_a_session_that_is_created_anew_while_a_call_waits_is_not_touched(
    state: StateManager, name: str
) -> None:
    sid = await state.create_session(data={"n": 1})
    handle = await a_handle(state, sid)
    async with state._updates.locks.holding(sid):  # writers wait
        call = asyncio.ensure_future(CALLS[name](handle))
        while not state._updates.locks.holders[sid].waiters:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0)
        await state.terminate_session(sid)
        await state.create_session(session_id=sid, data={"n": "another's"})
    with pytest.raises(errors.TokenInvalid):
        await call
    session = await state.get_session(sid)
    assert session is not None
    assert (session["n"], session.version) == ("another's", 1)


# Two clients, many sessions

IDS = ["a", "b", "c", "d"]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["one", "two"]),
        st.sampled_from([*CALLS, "end", "begin", "rotate", "spill", "steal"]),
        st.integers(0, len(IDS) - 1),
        st.integers(0, 9),
    ),
    max_size=40,
)


class Isolation:
    """Two clients, each with handles for the sessions that were made for it.

    Every value that a client writes, and every value of its sessions, has its name in it.
    """

    def __init__(self, state: StateManager) -> None:
        self.state = state
        self.clients = {"one": ClientInfo("1", "one"), "two": ClientInfo("2", "two")}
        self.handles: dict[str, list[SessionHandle]] = {"one": [], "two": []}
        self.tokens: dict[str, list[tuple[str, str]]] = {"one": [], "two": []}
        self.owner: dict[str, str] = {}

    async def begin(self, who: str, sid: str) -> None:
        """Create a session for a client, if there is none under that id."""
        if sid in self.owner:
            return
        await self.state.create_session(session_id=sid, data={"of": who, "n": 0})
        self.owner[sid] = who
        await self.open(who, sid)

    async def open(self, who: str, sid: str) -> None:
        """Give a client a token and a handle."""
        token = self.state.issue_token(sid, self.clients[who])
        self.tokens[who].append((sid, token))
        self.handles[who].append(await self.state.open_session(sid, token, self.clients[who]))

    async def end(self, sid: str) -> None:
        """End a session, whosever it is."""
        await self.state.terminate_session(sid)
        self.owner.pop(sid, None)

    async def rotate(self, sid: str) -> None:
        """Give a session another id."""
        if sid not in self.owner:
            return
        who = self.owner.pop(sid)
        moved = await self.state.rotate_session_id(sid)
        self.owner[moved] = who
        await self.open(who, moved)

    async def steal(self, who: str, sid: str, which: int) -> None:
        """Let a client try the tokens of the other one, and its own for other sessions."""
        for owner in ("one", "two"):
            for of, token in self.tokens[owner][which:]:
                may_open = owner == who and of == sid and self.owner.get(of) == who
                try:
                    handle = await self.state.open_session(sid, token, self.clients[who])
                except errors.TokenInvalid:
                    continue
                assert may_open
                assert (await handle.get())["of"] == who

    async def call(self, who: str, name: str, sid: str, which: int) -> None:
        """Let a client use one of its handles, whatever has become of its session."""
        handles = self.handles[who]
        if not handles:
            return
        handle = handles[which % len(handles)]
        try:
            if name == "get":
                assert (await handle.get())["of"] == who
            elif name == "replace":
                await handle.replace({"of": who, "n": which})
            elif name == "terminate":
                await handle.terminate()
                assert self.owner.pop(handle.id) == who
                return
            else:
                await CALLS[name](handle)
        except errors.TokenInvalid:
            return
        assert self.owner.get(handle.id) == who, "it reached a session of its own"

    async def check(self) -> None:
        """Every session is there, and is its owner's."""
        assert set(await self.state.get_active_sessions()) == set(self.owner)
        for sid, who in self.owner.items():
            session = await self.state.get_session(sid, renew=False)
            assert session is not None
            assert session["of"] == who


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(STEPS)
def test_no_handle_of_one_client_reaches_what_is_the_others(steps: list[Any]) -> None:
    async def run() -> None:
        async with opened(MemoryFiles()) as state:
            world = Isolation(state)
            for number, sid in enumerate(IDS):
                await world.begin("one" if number % 2 else "two", sid)
            for who, step, place, which in steps:
                sid = IDS[place]
                if step == "begin":
                    await world.begin(who, sid)
                elif step == "end":
                    await world.end(sid)
                elif step == "rotate":
                    await world.rotate(sid)
                elif step == "spill":
                    await state.spill_session(sid)
                elif step == "steal":
                    await world.steal(who, sid, which)
                else:
                    await world.call(who, step, sid, which)
            await world.check()

    asyncio.run(run())
