"""A question is on its way to the shared tier while things change, there or here."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from persistence import Session, StateManager
from persistence.errors import (
    ConflictError,
    ManagerClosed,
    PersistenceError,
    RemoteDamaged,
    RemoteUnavailable,
)
from persistence.remote.contract import Announcement, RemoteSession, RemoteTier, Stored
from persistence.sharing.questions import Questions
from tests.engine import ScriptedFiles
from tests.redis_servers import RedisServer
from tests.sharing.conftest import Worker
from tests.sharing.support import HeldReplies, add_one, sharing_of, until, until_up, value

Pair = tuple[StateManager, StateManager]


@pytest.fixture
async def pair(worker: Worker, shared_server: RedisServer) -> Pair:
    """Two workers that are connected."""
    a, b = await worker(shared_server.url), await worker(shared_server.url)
    await until_up(a, b)
    return a, b


def delay_announcements(state: StateManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, announcements of others are on their way to a worker for ever."""

    def announced(_: Sequence[Announcement]) -> None:
        pass

    monkeypatch.setattr(sharing_of(state), "announced", announced)


async def start_fresh_read(state: StateManager, sid: str) -> asyncio.Task[Session | None]:
    reading = asyncio.create_task(state.get_session(sid, fresh=True))
    await asyncio.sleep(0)  # it runs up to its first wait
    return reading


async def test_no_read_is_answered_by_a_question_that_has_just_been_answered(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its task has ended, and nobody but the event loop knows it yet."""
    a, b = pair
    await a.create_session(session_id="one", data={"n": 1})
    assert await value(b, "one") == 1
    replies = HeldReplies(a, monkeypatch)
    await b.terminate_session("one")
    await replies.arrived()
    delay_announcements(a, monkeypatch)
    await b.create_session(session_id="one", data={"n": 2})
    [fill] = [task for task in asyncio.all_tasks() if task.get_name() == "persistence-fill"]
    replies.release()
    while not fill.done():  # noqa: ASYNC110 - an event would come a step too late
        await asyncio.sleep(0)
    session = await a.get_session("one", fresh=True)
    assert session is not None
    assert session["n"] == 2


async def test_a_fresh_read_is_not_answered_with_the_version_before(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    sid = await b.create_session(data={"n": 0})
    delay_announcements(a, monkeypatch)
    replies = HeldReplies(a, monkeypatch)
    before = asyncio.create_task(a.get_session(sid))
    await replies.arrived()
    await b.update_session(sid, add_one)
    reading = await start_fresh_read(a, sid)
    replies.release()
    session = await reading
    assert session is not None
    assert session["n"] == 1
    assert await before is not None


async def test_an_answer_that_an_announcement_has_overtaken_is_not_taken_for_current(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    sid = await b.create_session(data={"n": 0})
    replies = HeldReplies(a, monkeypatch)
    reading = asyncio.create_task(a.get_session(sid))
    await replies.arrived()
    await b.update_session(sid, add_one)

    async def announced() -> bool:
        return sharing_of(a).copies.is_stale(sid)

    await until(announced)
    replies.release()
    session = await reading
    assert session is not None
    assert session["n"] == 1
    assert await value(a, sid) == 1


async def test_readers_who_come_while_a_question_is_under_way_share_the_next_one(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    sid = await b.create_session(data={"n": 0})
    replies = HeldReplies(a, monkeypatch)
    before = asyncio.create_task(a.get_session(sid))
    await replies.arrived()
    asked = 0
    questions = sharing_of(a)._fills._questions
    stored = questions.stored

    async def counted(session_id: str) -> Stored | None:
        nonlocal asked
        asked += 1
        return await stored(session_id)

    monkeypatch.setattr(questions, "stored", counted)
    readers = [await start_fresh_read(a, sid) for _ in range(50)]
    replies.release()
    assert None not in await asyncio.gather(*readers, before)
    assert asked == 1


async def test_a_fresh_read_while_our_update_is_being_logged_sees_what_others_built_on_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    files = a._tiers._files
    assert isinstance(files, ScriptedFiles)
    sid = await a.create_session(data={"n": 0})
    files.writes.hold()
    ours = asyncio.create_task(a.update_session(sid, add_one))
    await files.writes.reached()  # the shared tier has it
    assert (await b.update_session(sid, add_one))["n"] == 2
    replies = HeldReplies(a, monkeypatch)
    reading = await start_fresh_read(a, sid)
    await replies.arrived()
    replies.release()
    assert await a.get_session("another", fresh=True) is None  # the reply has been taken meanwhile
    files.open_gates()
    session = await reading
    assert session is not None
    assert session["n"] == 2
    assert (await ours)["n"] == 1


async def test_a_session_that_is_created_while_an_end_is_being_told_stays(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    await b.create_session(session_id="one", data={"n": 1})
    await b.terminate_session("one")
    replies = HeldReplies(a, monkeypatch)
    reading = asyncio.create_task(a.get_session("one"))
    await replies.arrived()
    await a.create_session(session_id="one", data={"n": 2})
    replies.release()
    session = await reading
    assert session is not None
    assert session["n"] == 2
    assert await a.get_active_sessions() == ["one"]


async def test_who_waits_for_an_answer_when_the_worker_closes_is_told_so(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    sid = await b.create_session(data={"n": 0})
    replies = HeldReplies(a, monkeypatch)
    reading = asyncio.create_task(a.get_session(sid))
    await replies.arrived()
    more = await start_fresh_read(a, sid)
    await a.close()
    for each in (reading, more):
        with pytest.raises(ManagerClosed):
            await each


async def test_who_waits_for_an_answer_while_a_checkpoint_is_restored_gets_one_afterwards(
    worker: Worker, shared_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = await worker(shared_server.url, checkpoint={"store": str(tmp_path / "checkpoints")})
    b = await worker(shared_server.url)
    await until_up(a, b)
    sid = await b.create_session(data={"n": 7})
    await a.create_checkpoint()
    replies = HeldReplies(a, monkeypatch)
    reading = asyncio.create_task(a.get_session(sid))
    await replies.arrived()
    updating = asyncio.create_task(a.update_session(sid, add_one))
    fresh = await start_fresh_read(a, sid)
    await a.restore_checkpoint("latest")
    for each in (reading, fresh):
        session = await each
        assert session is not None
        assert session["n"] == 7
    with pytest.raises(ConflictError):
        await updating


async def test_thousands_who_ask_share_round_trips_and_each_gets_its_own_answer(
    worker: Worker, shared_server: RedisServer
) -> None:
    """With one connection and a short timeout, they could not all ask for themselves."""
    a, b = await worker(shared_server.url), await worker(shared_server.url, max_connections=1)
    await until_up(a, b)
    ids = [f"s{number}" for number in range(3000)]
    await asyncio.gather(
        *(a.create_session(session_id=sid, data={"n": n}) for n, sid in enumerate(ids))
    )
    sessions = await asyncio.gather(*(b.get_session(sid) for sid in [*ids, "missing"]))
    assert [None if each is None else each["n"] for each in sessions] == [*range(3000), None]
    sessions = await asyncio.gather(*(b.get_session(sid, fresh=True) for sid in ids))
    assert [None if each is None else each["n"] for each in sessions] == [*range(3000)]
    assert sharing_of(b).is_up


class OneRefused:
    """A shared tier that has nothing, has damage in one session, and then goes away."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.is_there = True

    async def stored(self, ids: Sequence[str]) -> list[Stored | None]:
        self.asked.append(list(ids))
        await asyncio.sleep(0)
        if not self.is_there:
            raise RemoteUnavailable("gone")
        return [None] * len(ids)

    async def load_many(
        self, ids: Sequence[str]
    ) -> list[RemoteSession | Stored | PersistenceError | None]:
        return [RemoteDamaged(sid, "damage", sid) if sid == "bad" else None for sid in ids]


async def test_questions_that_come_together_go_together_and_fail_alone() -> None:
    tier = OneRefused()
    questions = Questions(cast("RemoteTier", tier))
    assert await asyncio.gather(*map(questions.stored, "abc")) == [None] * 3
    assert tier.asked == [["a", "b", "c"]]
    outcomes = await asyncio.gather(
        *map(questions.load, ["good", "bad", "other"]), return_exceptions=True
    )
    assert [type(each) for each in outcomes] == [type(None), RemoteDamaged, type(None)]
    tier.is_there = False
    outcomes = await asyncio.gather(*map(questions.stored, "de"), return_exceptions=True)
    assert [type(each) for each in outcomes] == [RemoteUnavailable] * 2
    assert outcomes[0] is not outcomes[1]
    waiting = asyncio.create_task(questions.stored("f"))
    await asyncio.sleep(0)
    await questions.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
