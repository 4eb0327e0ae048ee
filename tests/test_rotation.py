"""Sessions that get another id: exactly one of the two lives, whatever comes between."""

from __future__ import annotations

import asyncio
import errno
import gc
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from persistence import ClientInfo, ManualClock, SessionMetadata, StateManager, errors
from persistence.disk.filenames import ROTATIONS
from tests.disk.memoryfiles import MUTATING, Killed, MemoryFiles, fail, kill_at
from tests.engine import ScriptedFiles, Start, disk_of, eventually, loop_steps
from tests.support import abandon, config, opened

CLIENT = ClientInfo("203.0.113.9", "Mozilla/5.0")
DATA = {"n": 1, "text": "kept"}


async def test_all_that_a_session_is_moves_and_its_id_does_not(
    state: StateManager, clock: ManualClock
) -> None:
    metadata = SessionMetadata(client_ip="203.0.113.9", attributes={"tenant": "acme"})
    sid = await state.create_session("ada", metadata, 600, DATA, max_requests=7)
    await state.update_session_data(sid, "n", 2)
    before = await state.get_session(sid)
    clock.advance(60)
    moved = await state.rotate_session_id(sid)
    after = await state.get_session(moved)
    assert before is not None
    assert after is not None
    assert moved != sid
    assert len(moved) == 22, "128 bits"
    assert after.data == {"n": 2, "text": "kept"}
    assert (after.user_id, after.metadata, after.max_requests) == ("ada", metadata, 7)
    assert (after.version, after.created_at) == (before.version, before.created_at)
    assert after.expires_at is not None
    assert before.expires_at is not None
    assert after.expires_at - before.expires_at == timedelta(seconds=60), "it is an access"
    assert await state.get_session(sid) is None
    assert not await state.has_session(sid)
    assert await state.get_active_sessions() == [moved]
    assert await state.find_sessions(user_id="ada") == [moved]


async def test_what_a_session_may_live_at_most_does_not_start_anew(
    start: Start, clock: ManualClock
) -> None:
    state = await start(session={"max_lifetime_seconds": 100})
    sid = await state.create_session(ttl_seconds=90)
    fixed = await state.create_session(ttl_seconds=80, auto_renew=False)
    clock.advance(70)
    sid, fixed = [await state.rotate_session_id(each) for each in (sid, fixed)]
    clock.advance(11)
    assert await state.has_session(sid)
    assert not await state.has_session(fixed)
    clock.advance(20)
    assert not await state.has_session(sid)


async def test_tokens_and_handles_of_the_old_id_end(state: StateManager) -> None:
    sid = await state.create_session(data=DATA)
    token = state.issue_token(sid, CLIENT)
    handle = await state.open_session(sid, token, CLIENT)
    moved = await state.rotate_session_id(sid)
    with pytest.raises(errors.TokenInvalid):
        await state.validate_token(token, CLIENT)
    with pytest.raises(errors.TokenInvalid):
        await handle.get()
    assert await state.validate_token(state.issue_token(moved, CLIENT), CLIENT) == moved


async def test_a_cold_session_is_moved_and_is_there_after_a_restart(
    start: Start, tmp_path: Path
) -> None:
    first = await start()
    sid = await first.create_session(data=DATA)
    await first.spill_session(sid)
    moved = await first.rotate_session_id(sid)
    again = await first.rotate_session_id(moved)
    await first.close()
    second = await start()
    assert await second.get_active_sessions() == [again]
    session = await second.get_session(again)
    assert session is not None
    assert session.data == DATA


@pytest.mark.parametrize("sid", ["nobody", "ended", "expired"])
async def test_what_is_not_there_is_not_moved(
    state: StateManager, clock: ManualClock, sid: str
) -> None:
    await state.create_session(session_id="ended")
    await state.create_session(session_id="expired", ttl_seconds=1)
    await state.terminate_session("ended")
    clock.advance(2)
    with pytest.raises(errors.SessionNotFound):
        await state.rotate_session_id(sid)
    assert await state.get_active_sessions() == []


async def test_writers_wait_and_find_that_the_session_has_gone(state: StateManager) -> None:
    sid = await state.create_session(data=DATA)
    results = await asyncio.gather(
        state.rotate_session_id(sid),
        state.update_session_data(sid, "n", 2),
        state.rotate_session_id(sid),
        return_exceptions=True,
    )
    moved = results[0]
    assert isinstance(moved, str)
    assert [type(each) for each in results[1:]] == [errors.SessionNotFound] * 2
    assert await state.get_active_sessions() == [moved]


async def test_who_edits_a_session_cannot_move_it_meanwhile(state: StateManager) -> None:
    sid = await state.create_session(data=DATA)
    async with state.edit(sid) as draft:
        draft["n"] = 2
        with pytest.raises(errors.ConflictError):
            await state.rotate_session_id(sid)
    moved = await state.rotate_session_id(sid)
    session = await state.get_session(moved)
    assert session is not None
    assert session["n"] == 2


async def test_a_session_that_ends_while_it_is_moved_has_ended(
    state: StateManager, files: ScriptedFiles
) -> None:
    sid = await state.create_session(data=DATA)
    files.syncs.hold()
    moving = asyncio.ensure_future(state.rotate_session_id(sid))
    await files.syncs.reached()  # the note of it
    ending = asyncio.ensure_future(state.terminate_session(sid))
    await asyncio.sleep(0)
    files.syncs.let_pass()
    with pytest.raises(errors.SessionNotFound):
        await moving
    assert await ending
    assert await state.get_active_sessions() == []


async def test_a_caller_that_is_cancelled_only_stops_waiting(
    state: StateManager, files: ScriptedFiles
) -> None:
    sid = await state.create_session(data=DATA)
    files.syncs.hold()
    moving = asyncio.ensure_future(state.rotate_session_id(sid))
    await files.syncs.reached()
    moving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await moving
    files.syncs.let_pass()
    with pytest.raises(errors.SessionNotFound):
        await state.update_session_data(sid, "n", 2)  # it waits for the rotation
    [moved] = await state.get_active_sessions()
    assert moved != sid


async def test_nobody_complains_of_a_rotation_that_fails_when_its_caller_has_gone(
    start: Start, files: ScriptedFiles
) -> None:
    state = await start()
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
    sid = await state.create_session(data=DATA)
    files.syncs.hold()
    moving = asyncio.create_task(state.rotate_session_id(sid))
    await eventually(lambda: bool(state._rotations._tasks))
    ending = asyncio.create_task(state.terminate_session(sid))
    moving.cancel()
    await asyncio.wait([moving])
    files.open_gates()
    assert await ending
    await eventually(lambda: not state._rotations._tasks)
    assert await state.get_active_sessions() == []
    del moving  # whose trace knows of the rotation
    gc.collect()
    assert complaints == []


async def test_a_full_disk_leaves_a_session_its_id() -> None:
    for nth in range(1, 4):
        files = MemoryFiles()
        async with opened(files) as state:
            await state.create_session(session_id="a", data=DATA)
            files.faults.append(fail(errno.ENOSPC, "write_at", nth=nth, times=None))
            with pytest.raises(errors.DiskFull):
                await state.rotate_session_id("a")
            files.faults.clear()
            assert await state.has_session("a")
            await state.update_session_data("a", "n", 2)
        async with opened(files.after_kill()) as state:
            assert await state.get_active_sessions() == ["a"]


async def test_a_note_that_is_long_is_written_anew(state: StateManager) -> None:
    sid = await state.create_session(data=DATA)
    state._rotations._journal.append([bytes(70_000)], sync=False)
    size = state._rotations._journal.size_bytes
    await state.rotate_session_id(sid)
    assert state._rotations._journal.size_bytes < 100 < size


# Crashes


async def rotate_and_die(nth: int, part: float) -> tuple[MemoryFiles, str | None]:
    """Rotate until the process dies at its nth call; return the disk, and the id if it was told."""
    files = MemoryFiles()
    state = StateManager(config=config(), clock=ManualClock(), files=files)
    await state.open()
    await state.create_session(session_id="a", data=DATA)
    await state.create_session(session_id="b", data={})
    await state.rotate_session_id("b")  # the journal is there
    files.faults.append(kill_at(nth, part))
    moved = None
    with suppress(errors.PersistenceError, Killed):
        moved = await state.rotate_session_id("a")
    await abandon(state)
    return files, moved


async def check(files: MemoryFiles, moved: str | None) -> list[str]:
    """Open what a crash has left; return which of the sessions lives."""
    async with opened(files) as state:
        live = await state.get_active_sessions()
        found = []
        for sid in live:
            session = await state.get_session(sid)
            assert session is not None
            if session.data:
                assert session.data == DATA
                found.append(sid)
        assert len(found) == 1, "neither both nor none"
        assert moved is None or found == [moved], "who was told an id has it"
        assert state._rotations._pending == {}
    async with opened(files.after_kill()) as state:
        assert set(await state.get_active_sessions()) == set(live)
    return found


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
async def test_exactly_one_of_the_two_lives_wherever_a_crash_comes(part: float) -> None:
    outcomes = set()
    for nth in range(1, 12):
        files, moved = await rotate_and_die(nth, part)
        for left in (files.after_kill(), files.after_power_loss()):
            [found] = await check(left, moved)
            outcomes.add(found == "a")
    assert outcomes == {True, False}


async def test_an_end_that_fails_is_undone_and_a_pending_note_is_settled() -> None:
    files = MemoryFiles()
    state = StateManager(config=config(), clock=ManualClock(), files=files)
    await state.open()
    await state.create_session(session_id="a", data=DATA)
    await state.rotate_session_id(await state.create_session())
    # The note and the new session are written, and nothing more.
    files.faults.append(fail(errno.EIO, "write_at", nth=3, times=None))
    with pytest.raises(errors.WriteOutcomeUnknown):
        await state.rotate_session_id("a")
    assert len(state._rotations._pending) == 1
    await abandon(state)
    assert await check(files.after_kill(), None) == ["a"]


async def test_the_calls_of_a_rotation_are_all_among_those_at_which_it_was_killed() -> None:
    files = MemoryFiles()
    async with opened(files) as state:
        await state.rotate_session_id(await state.create_session())
        await state.create_session(session_id="a")
        before = len(files.calls)
        await state.rotate_session_id("a")
        await state.flush()
        made = [call for call in files.calls[before:] if call.operation in MUTATING]
    assert 4 <= len(made) <= 10
    assert sum(call.path.endswith(ROTATIONS) for call in made) == 3  # begun, synced, over


async def test_a_checkpoint_beside_a_rotation_does_not_restore_both_ids(start: Start) -> None:
    """It was cut between the creation of the one and the end of the other."""
    state = await start()
    sid = await state.create_session(data=DATA)
    rotations, wholes = state._rotations, disk_of(state).wholes
    follow = rotations.follow
    assert follow is not None
    checkpoints: list[asyncio.Task[Any]] = []

    async def begin_a_checkpoint(old_id: str, new_id: str, incarnation: bytes) -> None:
        making = asyncio.create_task(state.create_checkpoint())
        await eventually(lambda: making.done() or wholes._cuts > 0)
        checkpoints.append(making)
        await follow(old_id, new_id, incarnation)

    rotations.follow = begin_a_checkpoint
    moved = await state.rotate_session_id(sid)
    await checkpoints[0]
    assert await state.get_active_sessions() == [moved]
    await state.restore_checkpoint()
    assert await state.get_active_sessions() == [moved]


async def test_a_rotation_waits_for_a_cut_that_waits_and_not_for_the_checkpoint(
    start: Start,
) -> None:
    state = await start()
    first, second = [await state.create_session(data=DATA) for _ in range(2)]
    disk = disk_of(state)
    async with disk.wholes.change():
        checkpoint = asyncio.create_task(state.create_checkpoint())
        await eventually(lambda: disk.wholes._cuts > 0)
        rotation = asyncio.create_task(state.rotate_session_id(first))
        await loop_steps(50)
        assert not checkpoint.done()
        assert not rotation.done()
    async with asyncio.timeout(10):
        await asyncio.gather(checkpoint, rotation, state.rotate_session_id(second))
    await state.restore_checkpoint()
    assert len(await state.get_active_sessions()) == 2
