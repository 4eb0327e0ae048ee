"""Checkpoints through the manager: made while it works, by schedule, at its end; and back, live."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from persistence import ManualClock, StateConfig, StateManager
from persistence.errors import (
    CheckpointNotFound,
    ConfigError,
    ConflictError,
    InvalidArgument,
    PersistenceError,
)
from tests.engine import KIB, ScriptedFiles, Start, config_for, contents, disk_of, names_in
from tests.redis_servers import Group, RedisServer
from tests.sharing.support import add_one, until, until_delivered, until_up, value


@pytest.fixture
def store(tmp_path: Path) -> dict[str, Any]:
    """Checkpoints go to a directory of the test."""
    return {"store": str(tmp_path / "checkpoints")}


async def filled(state: StateManager, count: int = 50) -> list[str]:
    return [
        await state.create_session(session_id=f"session {number}", data={"n": number})
        for number in range(count)
    ]


async def test_a_restored_state_is_the_one_of_the_checkpoint(
    start: Start, store: dict[str, Any]
) -> None:
    state = await start(checkpoint=store)
    ids = await filled(state)
    before = await contents(state)
    info = await state.create_checkpoint("before a migration")
    assert (info.reason, info.sessions, info.kind) == ("before a migration", 50, "full")
    await state.update_session(ids[0], add_one)
    await state.terminate_session(ids[1])
    await state.create_session(session_id="later", data={"n": -1})
    restored = await state.restore_checkpoint(info.id)
    assert (restored.id, restored.sessions) == (info.id, 50)
    assert await contents(state) == before
    assert await state.get_session("later") is None
    assert (await state.update_session(ids[0], add_one))["n"] == 1
    await state.create_session(session_id="later", data={"n": -2})


@pytest.mark.parametrize("wanted", ["", "nope", "../latest"])
async def test_an_id_that_no_checkpoint_has_never_means_the_latest(
    start: Start, store: dict[str, Any], wanted: str
) -> None:
    state = await start(checkpoint=store)
    await filled(state, 2)
    await state.create_checkpoint()
    await state.create_session(session_id="later")
    with pytest.raises(CheckpointNotFound):
        await state.restore_checkpoint(wanted)
    assert await state.has_session("later")


async def test_what_was_restored_is_there_after_a_restart(
    start: Start, store: dict[str, Any], tmp_path: Path
) -> None:
    state = await start(checkpoint=store)
    ids = await filled(state)
    await state.create_checkpoint()
    await state.update_session(ids[0], add_one)
    await state.restore_checkpoint("latest")
    await state.update_session(ids[1], add_one)
    expected = await contents(state)
    await state.close()
    again = await start(path=tmp_path / "state", checkpoint=store)
    assert await contents(again) == expected
    assert expected[ids[0]]["n"] == 0
    assert expected[ids[1]]["n"] == 2


async def test_the_next_checkpoint_ships_what_has_changed(
    start: Start, store: dict[str, Any]
) -> None:
    state = await start(checkpoint=store)
    ids = await filled(state, 500)
    full = await state.create_checkpoint()
    for sid in ids[:5]:
        await state.update_session(sid, add_one)
    delta = await state.create_checkpoint()
    assert (delta.kind, delta.parent) == ("incremental", full.id)
    assert delta.bytes < 0.1 * full.bytes
    assert [info.id for info in await state.list_checkpoints()] == [full.id, delta.id]
    await state.delete_checkpoint(full.id)
    assert [info.id for info in await state.list_checkpoints()] == [delta.id]
    await state.restore_checkpoint(delta.id)
    assert await value(state, ids[0]) == 1
    assert await value(state, ids[400]) == 400


async def test_only_so_many_are_kept(start: Start, store: dict[str, Any]) -> None:
    state = await start(checkpoint={**store, "keep": 3})
    [sid] = await filled(state, 1)
    made = []
    for _ in range(6):
        await state.update_session(sid, add_one)
        made.append((await state.create_checkpoint()).id)
    assert [info.id for info in await state.list_checkpoints()] == made[-3:]


async def test_an_unknown_checkpoint_changes_nothing(start: Start, store: dict[str, Any]) -> None:
    state = await start(checkpoint=store)
    with pytest.raises(CheckpointNotFound):
        await state.restore_checkpoint("latest")
    await filled(state)
    before = await contents(state)
    with pytest.raises(CheckpointNotFound):
        await state.restore_checkpoint("no such thing")
    with pytest.raises(CheckpointNotFound):
        await state.delete_checkpoint("no such thing")
    assert await contents(state) == before


@pytest.mark.parametrize("wrong", [None, 5, b"x", []])
async def test_what_is_no_text_neither_names_nor_explains_a_checkpoint(
    start: Start, store: dict[str, Any], wrong: Any
) -> None:
    """Not even the newest one is restored for it, nor is one made that nobody can read."""
    state = await start(checkpoint=store)
    sid = await state.create_session(data={"n": 1})
    made = await state.create_checkpoint()
    await state.update_session_data(sid, "n", 2)
    for call in (state.create_checkpoint, state.restore_checkpoint, state.delete_checkpoint):
        with pytest.raises(InvalidArgument):
            await call(wrong)
    with pytest.raises(InvalidArgument, match="surrogates"):
        await state.create_checkpoint("\ud800")
    with pytest.raises(CheckpointNotFound):
        await state.restore_checkpoint("")
    assert [info.id for info in await state.list_checkpoints()] == [made.id]
    assert await value(state, sid) == 2


async def test_updates_go_on_while_one_is_made_and_are_whole_in_it(
    start: Start, store: dict[str, Any]
) -> None:
    state = await start(checkpoint=store)
    ids = await filled(state, 300)
    stop = asyncio.Event()

    async def count_up(sid: str) -> None:
        while not stop.is_set():
            async with state.edit(sid) as draft:
                draft["n"] += 1
                draft["twice"] = 2 * draft["n"]

    working = [asyncio.create_task(count_up(sid)) for sid in ids[:20]]
    for _ in range(5):
        await state.create_checkpoint()
    stop.set()
    await asyncio.gather(*working)
    await state.restore_checkpoint("latest")
    found = await contents(state)
    assert len(found) == 300
    for sid in ids[:20]:
        assert found[sid].get("twice", 2 * found[sid]["n"]) == 2 * found[sid]["n"]


async def test_nothing_of_an_update_under_way_survives_a_restore(
    start: Start, store: dict[str, Any]
) -> None:
    state = await start(checkpoint=store)
    ids = await filled(state, 200)
    await state.create_checkpoint()
    before = await contents(state)
    stop = asyncio.Event()
    outcomes: list[str] = []

    async def count_up(sid: str) -> None:
        while not stop.is_set():
            try:
                session = await state.update_session(sid, add_one)
                assert session is not None
            except ConflictError:
                outcomes.append(sid)
            await asyncio.sleep(0)

    working = [asyncio.create_task(count_up(sid)) for sid in ids]
    await asyncio.sleep(0)
    for _ in range(3):
        await state.restore_checkpoint("latest")
    stop.set()
    await asyncio.gather(*working)
    after = await contents(state)
    assert after.keys() == before.keys()
    await state.restore_checkpoint("latest")
    assert await contents(state) == before


async def test_an_edit_of_the_state_before_fails_and_changes_nothing(
    start: Start, store: dict[str, Any]
) -> None:
    state = await start(checkpoint=store)
    [sid] = await filled(state, 1)
    await state.create_checkpoint()
    edit = state.edit(sid)
    draft = await edit.__aenter__()
    await state.restore_checkpoint("latest")
    draft["n"] = 99
    with pytest.raises(PersistenceError):
        await edit.__aexit__(None, None, None)
    assert await value(state, sid) == 0
    async with state.edit(sid) as draft:
        draft["n"] = 1
    assert await value(state, sid) == 1


async def test_deadlines_are_absolute(
    start: Start, store: dict[str, Any], clock: ManualClock
) -> None:
    state = await start(checkpoint=store)
    await state.create_session(session_id="brief", data={"n": 1}, ttl_seconds=100)
    await state.create_session(session_id="long", data={"n": 1}, ttl_seconds=1000)
    await state.create_checkpoint()
    clock.advance(200)
    await state.restore_checkpoint("latest")
    assert await state.get_session("brief") is None
    assert await value(state, "long") == 1


async def test_checkpoints_are_made_at_intervals(tmp_path: Path, store: dict[str, Any]) -> None:
    config = config_for(
        tmp_path / "state",
        checkpoint={**store, "interval_seconds": 0.05, "min_pause_seconds": 0.01},
    )
    async with StateManager(config=config, files=ScriptedFiles()) as state:
        await filled(state, 3)

        async def several() -> bool:
            return len(await state.list_checkpoints()) >= 3

        await until(several)
        assert {info.reason for info in await state.list_checkpoints()} == {"interval"}


async def test_a_worker_ends_with_a_checkpoint_of_everything(
    tmp_path: Path, store: dict[str, Any]
) -> None:
    config = config_for(tmp_path / "state", checkpoint=store)
    async with StateManager(config=config) as state:
        await filled(state, 20)
    async with StateManager(config=config_for(tmp_path / "other", checkpoint=store)) as state:
        [info] = await state.list_checkpoints()
        assert (info.reason, info.sessions) == ("shutdown", 20)
        await state.restore_checkpoint(info.id)
        assert await value(state, "session 7") == 7


async def test_stats_tell_what_is_unshipped_and_what_may_be(
    start: Start, store: dict[str, Any]
) -> None:
    state = await start(checkpoint=store)
    await filled(state, 20)
    before = (await state.stats()).checkpoints
    assert 0 < before.unshipped_bytes < before.limit_bytes
    info = await state.create_checkpoint()
    after = (await state.stats()).checkpoints
    assert (after.made, after.last_id, after.unshipped_bytes) == (1, info.id, 0)


async def test_what_an_earlier_life_left_unshipped_counts(
    start: Start, store: dict[str, Any], tmp_path: Path
) -> None:
    keeps_quiet = {"checkpoint": store, "shutdown": {"checkpoint": False}}

    async def unshipped_after_a_restart(state: StateManager) -> tuple[StateManager, int]:
        await state.close()
        state = await start(**keeps_quiet)
        return state, (await state.stats()).checkpoints.unshipped_bytes

    state = await start(**keeps_quiet)
    await filled(state, 100)
    grown = (await state.stats()).checkpoints.unshipped_bytes
    state, unshipped = await unshipped_after_a_restart(state)
    assert 0.9 * grown < unshipped <= grown
    await state.create_checkpoint()
    state, unshipped = await unshipped_after_a_restart(state)
    assert unshipped == 0
    await state.update_session("session 1", add_one)
    grown = (await state.stats()).checkpoints.unshipped_bytes
    state, unshipped = await unshipped_after_a_restart(state)
    assert 0.9 * grown < unshipped <= 1.1 * grown
    await state.restore_checkpoint()  # the next one is a full one
    assert (await state.stats()).checkpoints.unshipped_bytes > 50 * grown


async def test_a_shutdown_makes_no_full_checkpoint_where_a_small_one_will_do(
    start: Start, store: dict[str, Any]
) -> None:
    state = await start(checkpoint={**store, "keep": 100})
    ids = await filled(state, 20)
    full = await state.create_checkpoint()
    shipped_bytes = 0
    while shipped_bytes < full.bytes:  # from then on a full one is due
        for sid in ids:
            await state.update_session(sid, add_one)
        info = await state.create_checkpoint()
        assert info.kind == "incremental"
        shipped_bytes += info.bytes
    await state.update_session(ids[0], add_one)
    await state.close()
    state = await start(checkpoint={**store, "keep": 100})
    infos = await state.list_checkpoints()
    assert (infos[-1].reason, infos[-1].kind) == ("shutdown", "incremental")
    assert (await state.create_checkpoint()).kind == "full"


async def test_no_more_is_left_unshipped_than_a_shutdown_can_ship(
    tmp_path: Path, store: dict[str, Any]
) -> None:
    """The grace period is so short that a few hundred KiB are too much."""
    config = config_for(
        tmp_path / "state",
        checkpoint={**store, "min_pause_seconds": 0.0},
        shutdown={"grace_seconds": 0.03},
    )
    async with StateManager(config=config, files=ScriptedFiles()) as state:
        limit_bytes = (await state.stats()).checkpoints.limit_bytes
        assert 0 < limit_bytes < 512 * KIB
        for made in range(3):
            for number in range(10):
                sid = await state.create_session(session_id=f"{made} {number}")
                await state.update_session_data(sid, "blob", random.randbytes(64 * KIB))

            async def little() -> bool:
                stats = (await state.stats()).checkpoints
                return stats.unshipped_bytes <= stats.limit_bytes

            await until(little)
        assert {info.reason for info in await state.list_checkpoints()} == {"unshipped"}


async def test_one_that_fails_counts_as_failed_whatever_the_reason(
    start: Start, store: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise ValueError("of a kind that nobody expects")

    state = await start(checkpoint=store, shutdown={"checkpoint": False})
    monkeypatch.setattr("persistence.checkpoint.keeper.create_checkpoint", broken)
    with pytest.raises(ValueError, match="nobody expects"):
        await state.create_checkpoint()
    assert (await state.stats()).checkpoints.failed == 1


async def test_a_store_in_redis_without_one_is_a_configuration_error(tmp_path: Path) -> None:
    config = config_for(tmp_path / "state", checkpoint={"store": "redis"})
    with pytest.raises(ConfigError, match=r"redis\.url"):
        await StateManager(config=config).open()
    assert names_in(tmp_path) == set()


async def test_another_worker_restores_what_one_put_into_redis(
    tmp_path: Path, deployment: Group
) -> None:
    def config(name: str) -> StateConfig:
        return config_for(tmp_path / name, redis={"url": deployment.url, "write": "checkpoint"})

    async with StateManager(config=config("a")) as a:
        ids = await filled(a, 200)
        first = await a.create_checkpoint()
        await a.update_session(ids[0], add_one)
        expected = await contents(a)
    async with StateManager(config=config("b")) as b:
        infos = await b.list_checkpoints()
        assert [info.reason for info in infos] == ["manual", "shutdown"]
        await b.restore_checkpoint()
        assert await contents(b) == expected
        await b.restore_checkpoint(first.id)
        assert await value(b, ids[0]) == 0


async def test_a_restore_reaches_the_workers_that_share_the_sessions(
    tmp_path: Path, shared_server: RedisServer
) -> None:
    def config(name: str) -> StateConfig:
        return config_for(tmp_path / name)

    url = shared_server.url
    async with StateManager(url, config("a")) as a, StateManager(url, config("b")) as b:
        await until_up(a, b)
        ids = await filled(a, 20)
        info = await a.create_checkpoint()
        await a.update_session(ids[0], add_one)
        await a.terminate_session(ids[1])
        await a.create_session(session_id="later", data={"n": -1})
        assert await value(b, ids[0]) == 1
        assert await value(b, "later") == -1
        await a.restore_checkpoint(info.id)
        await until_up(a)
        await until_delivered(a)
        for number, sid in enumerate(ids):
            session = await b.get_session(sid, fresh=True)
            assert session is not None
            assert session["n"] == number
        assert await b.get_session("later", fresh=True) is None
        assert (await b.update_session(ids[0], add_one))["n"] == 1
        assert (await a.get_session(ids[0], fresh=True))["n"] == 1  # type: ignore[index]


async def test_a_cleanup_under_way_outlives_the_exchange_of_the_tiers(
    start: Start, store: dict[str, Any], clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = await start(checkpoint=store)
    await state.create_session(session_id="kept")
    await state.create_checkpoint()
    for number in range(3):
        await state.create_session(session_id=f"short {number}", ttl_seconds=10)
    clock.advance(11)
    reading = disk_of(state).reading
    read_keys, reached, goes_on = reading.keys, asyncio.Event(), asyncio.Event()
    calls = 0

    async def held(rows: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            reached.set()
            await goes_on.wait()
        return await read_keys(rows)

    monkeypatch.setattr(reading, "keys", held)
    cleaning = asyncio.create_task(state.cleanup_expired())
    await reached.wait()
    await state.restore_checkpoint()
    goes_on.set()
    await asyncio.wait_for(cleaning, 10)
    assert await state.get_active_sessions() == ["kept"]


@pytest.mark.parametrize("changes", [True, False], ids=["changes", "no changes"])
async def test_an_edit_over_which_a_checkpoint_was_restored_is_a_conflict(
    start: Start, store: dict[str, Any], *, changes: bool
) -> None:
    state = await start(checkpoint=store)
    await state.create_session(session_id="a", data={"n": 1})
    await state.create_checkpoint()
    edit = state.edit("a")
    draft = await edit.__aenter__()
    if changes:
        draft["n"] = 2
    await state.restore_checkpoint()
    with pytest.raises(ConflictError, match="restored from a checkpoint meanwhile"):
        await edit.__aexit__(None, None, None)
    assert await contents(state) == {"a": {"n": 1}}
