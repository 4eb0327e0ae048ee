"""Ids that rotate and values that are sealed, with several workers and a real server."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from persistence import ClientInfo, errors
from persistence.commit import Commit, ExactEnd
from persistence.disk.format import DELETE
from persistence.record import NO_ID
from persistence.remote.contract import Delete
from persistence.sharing.agreement import request_of
from persistence.sharing.conflicts import decode_conflict
from tests.redis_servers import RedisServer
from tests.sharing.conftest import Worker
from tests.sharing.support import sharing_of, until_delivered, until_up, value

CLIENT = ClientInfo("203.0.113.9", "Mozilla/5.0")
DATA = {"n": 1, "text": "kept"}
KEYS = ["0b" * 32, "5e" * 32]
SECRET = "nobody may read this"


async def test_other_workers_see_a_session_under_its_new_id_only(
    worker: Worker, shared_server: RedisServer
) -> None:
    one, two = await worker(shared_server.url), await worker(shared_server.url)
    sid = await one.create_session(data=DATA)
    assert await two.has_session(sid)
    token = one.issue_token(sid, CLIENT)
    moved = await one.rotate_session_id(sid)
    assert await two.get_session(sid, fresh=True) is None
    session = await two.get_session(moved, fresh=True)
    assert session is not None
    assert session.data == DATA
    for state in (one, two):
        with pytest.raises(errors.TokenInvalid):
            await state.validate_token(token, CLIENT)


async def test_a_token_for_a_session_that_only_others_have_says_how_to_come_by_it(
    worker: Worker, shared_server: RedisServer, tmp_path: Path
) -> None:
    keys = {"key_file": str(tmp_path / "keys")}
    one, two = [await worker(shared_server.url, security=keys) for _ in range(2)]
    sid = await one.create_session()
    with pytest.raises(errors.SessionNotFound, match=r"bring it here with get_session\(\) first"):
        two.issue_token(sid, CLIENT)
    assert await two.get_session(sid) is not None
    assert await one.validate_token(two.issue_token(sid, CLIENT), CLIENT) == sid


async def test_an_update_of_another_worker_is_never_lost_by_a_rotation(
    worker: Worker, shared_server: RedisServer
) -> None:
    one, two = await worker(shared_server.url), await worker(shared_server.url)
    sid = await one.create_session(data={"n": 0})
    done = 0

    async def count() -> None:
        nonlocal done
        with suppress(errors.SessionNotFound):
            for _ in range(60):  # often enough to come between, and it has an end
                await two.update_session(sid, lambda data: data.update(n=data["n"] + 1))
                done += 1

    moved, _ = await asyncio.gather(one.rotate_session_id(sid), count())
    with pytest.raises(errors.SessionNotFound):
        await two.update_session_data(sid, "n", -1)
    session = await one.get_session(moved, fresh=True)
    assert session is not None
    assert session["n"] == done


async def test_of_workers_that_rotate_an_id_at_the_same_time_one_does(
    worker: Worker, shared_server: RedisServer
) -> None:
    states = [await worker(shared_server.url) for _ in range(3)]
    await until_up(*states)
    for number in range(10):
        sid = await states[0].create_session(data={"n": number})
        for state in states:
            assert await value(state, sid) == number
        results = await asyncio.gather(
            *(state.rotate_session_id(sid) for state in states), return_exceptions=True
        )
        moved = [each for each in results if isinstance(each, str)]
        assert len(moved) == 1
        assert [type(each) for each in results].count(errors.SessionNotFound) == 2
        for state in states:
            assert await state.get_session(sid, fresh=True) is None
            assert await value(state, moved[0]) == number
        assert moved == await states[0].get_active_sessions(namespace=True)
        await states[0].terminate_session(moved[0])


def sealed(*keys: str) -> dict[str, Any]:
    return {"encrypt": True, "secret_keys": ",".join(keys)}


@pytest.mark.parametrize(("kind", "base"), [(ExactEnd, b"b" * 16), (Commit, NO_ID)])
def test_the_end_of_a_rotated_id_names_the_version_that_was_moved(
    kind: type[Commit], base: bytes
) -> None:
    ids = b"i" * 16 + b"c" * 16 + b"b" * 16
    end = kind(DELETE, "a", b"a", bytes(16), None, ids, 0.0, 0.0, 0.0, 0.0, 0)
    assert request_of(end, 0.0) == Delete("a", b"c" * 16, b"i" * 16, base)


async def test_workers_with_the_same_keys_share_what_nobody_else_can_read(
    worker: Worker, own_server: RedisServer
) -> None:
    with Redis.from_url(own_server.url) as watching:
        watching.config_set("slowlog-log-slower-than", -1)
        one = await worker(own_server.url, security=sealed(*KEYS))
        two = await worker(own_server.url, security=sealed(*KEYS))
        sid = await one.create_session(user_id="ada lovelace", data={"text": SECRET, "n": 0})
        await one.update_session_data(sid, "n", 1)
        await two.update_session(sid, lambda data: data.update(text=data["text"] + "!"))
        session = await one.get_session(sid, fresh=True)
        assert session is not None
        assert (session.data, session.user_id) == ({"text": SECRET + "!", "n": 1}, "ada lovelace")
        everything = b"".join(
            b"".join(field + value for field, value in watching.hgetall(key).items())
            for key in watching.keys("*session*")
        )
    assert b"text" in everything, "names of fields are in the clear"
    assert SECRET.encode() not in everything
    assert b"lovelace" not in everything


async def test_a_worker_without_the_key_reads_nothing_and_breaks_nothing(
    worker: Worker, shared_server: RedisServer
) -> None:
    one = await worker(shared_server.url, namespace="locked", security=sealed(KEYS[0]))
    await one.create_session(session_id="a", data=DATA)
    for other in (sealed(KEYS[1]), {}):
        stranger = await worker(shared_server.url, namespace="locked", security=other)
        with pytest.raises(errors.RemoteDamaged, match="left as it is"):
            await stranger.get_session("a")
    plain = await worker(shared_server.url, namespace="locked")
    await plain.create_session(session_id="b", data=DATA)
    with pytest.raises(errors.RemoteDamaged, match="not encrypted"):
        await one.get_session("b")
    session = await one.get_session("a", fresh=True)
    assert session is not None
    assert session.data == DATA


async def test_workers_learn_a_new_key_when_they_meet_it(
    worker: Worker, shared_server: RedisServer, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(KEYS[0])
    file.chmod(0o600)
    settings: dict[str, Any] = {
        "namespace": "rolling",
        "security": {"encrypt": True, "key_file": str(file)},
    }
    old = await worker(shared_server.url, **settings)
    await old.create_session(session_id="a", data=DATA)
    file.write_text(" ".join(KEYS))
    new = await worker(shared_server.url, **settings)
    await new.create_session(session_id="b", data=DATA)
    for state in (old, new):
        for sid in ("a", "b"):
            session = await state.get_session(sid)
            assert session is not None
            assert session.data == DATA


async def test_what_redis_refused_is_kept_sealed(
    worker: Worker, own_server: RedisServer, tmp_path: Path
) -> None:
    one = await worker(own_server.url, path=tmp_path / "one", security=sealed(KEYS[0]))
    two = await worker(own_server.url, security=sealed(KEYS[0]))
    await one.create_session(session_id="a", data={"n": 0})
    await two.get_session("a")
    sharing_of(one)._down()  # it does not know that Redis is there
    await one.update_session_data("a", "n", SECRET)
    await two.update_session_data("a", "n", 2)
    sharing_of(one)._up()
    await until_delivered(one)
    assert sharing_of(one).conflicts.count == 1
    kept = (tmp_path / "one" / "CONFLICTS").read_bytes()
    assert SECRET.encode() not in kept
    [entry] = await one._disk.threads.write(sharing_of(one).conflicts._journal.load)
    seals = one._tiers.keys.seals
    assert seals is not None
    conflict = decode_conflict(entry, seals.conflicts)
    assert conflict is not None
    assert SECRET.encode() in conflict.record
    assert decode_conflict(entry, seals.records) is None


async def test_a_handle_ends_no_session_that_was_begun_anew_elsewhere(
    worker: Worker, shared_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"key_file": str(tmp_path / "keys")}
    a = await worker(shared_server.url, security=keys)
    b = await worker(shared_server.url, security=keys)
    await until_up(a, b)
    sid = await a.create_session(data={"n": 0})
    handle = await a.open_session(sid, a.issue_token(sid, CLIENT), CLIENT)
    monkeypatch.setattr(sharing_of(a), "announced", lambda _: None)  # they are still on their way
    await b.terminate_session(sid)
    await b.create_session(session_id=sid, data={"n": 1})
    with pytest.raises(errors.TokenInvalid):
        await handle.terminate()
    assert await value(b, sid) == 1
