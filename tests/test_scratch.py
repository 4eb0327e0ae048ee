from __future__ import annotations

import asyncio
import errno
import shutil
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from persistence import ManualClock, StateManager
from persistence.errors import DirectoryNotUsable, DiskFull, SessionNotFound
from persistence.scratch import Scratch
from tests.engine import (
    Crash,
    Gate,
    ScriptedFiles,
    Start,
    config_for,
    data_of,
    directory_of,
    eventually,
    names_in,
)


def is_directory(path: Path | str) -> bool:
    return Path(path).is_dir()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def directories(state: StateManager) -> set[str]:
    root = directory_of(state) / "scratch"
    return {each.name for each in root.iterdir()} if root.exists() else set()


async def test_a_session_has_one_private_directory(state: StateManager) -> None:
    sid = await state.create_session()
    path = await state.scratch_dir(sid)
    assert is_directory(path)
    assert mode(path) == 0o700
    assert await state.scratch_dir(sid) == path
    assert directories(state) == {path.name}


async def test_sessions_have_directories_of_their_own(state: StateManager) -> None:
    sids = [await state.create_session() for _ in range(20)]
    paths = await asyncio.gather(*(state.scratch_dir(sid) for sid in sids * 3))
    assert len(set(paths)) == 20
    assert (await state.stats()).scratch_directories == 20


@pytest.mark.parametrize("session_id", ["../../etc", "a/b", "x\0y", ".", "é" * 100, "-rf"])
async def test_no_part_of_an_id_is_in_the_path(state: StateManager, session_id: str) -> None:
    await state.create_session(session_id=session_id)
    path = await state.scratch_dir(session_id)
    assert path.parent == directory_of(state) / "scratch"
    assert len(path.name) == 32
    assert set(path.name) <= set("0123456789abcdef")


async def test_it_survives_spill_and_restart(start: Start) -> None:
    state = await start()
    sid = await state.create_session()
    path = await state.scratch_dir(sid)
    (path / "page.html").write_text("hello")
    await state.spill_session(sid)
    assert await state.scratch_dir(sid) == path
    await state.close()
    state = await start()
    assert await state.scratch_dir(sid) == path
    assert (path / "page.html").read_text() == "hello"


async def test_it_survives_a_kill(start: Start, crash: Crash) -> None:
    state = await start()
    sid = await state.create_session()
    path = await state.scratch_dir(sid)
    (path / "page.html").write_text("hello")
    state = await start(path=crash(state))
    again = await state.scratch_dir(sid)
    assert again.name == path.name
    assert (again / "page.html").read_text() == "hello"


async def test_it_is_removed_with_the_session(state: StateManager, clock: ManualClock) -> None:
    sid = await state.create_session()
    short = await state.create_session(ttl_seconds=10)
    for each in (sid, short):
        path = await state.scratch_dir(each)
        (path / "deep").mkdir()
        (path / "deep" / "file").write_bytes(bytes(1000))
    await state.terminate_session(sid)
    await eventually(lambda: len(directories(state)) == 1)
    clock.advance(11)
    await state.cleanup_expired()
    await eventually(lambda: not directories(state))
    with pytest.raises(SessionNotFound):
        await state.scratch_dir(sid)


async def test_the_end_of_a_session_in_an_earlier_life_is_caught_up_with(
    start: Start, clock: ManualClock
) -> None:
    state = await start()
    sid = await state.create_session(ttl_seconds=100)
    await state.scratch_dir(sid)
    await state.close()
    clock.advance(200)
    state = await start()
    assert directories(state) == set()


async def test_what_a_kill_left_behind_is_removed_at_opening(start: Start, crash: Crash) -> None:
    state = await start()
    kept, ended = await state.create_session(), await state.create_session()
    path = await state.scratch_dir(kept)
    lost = await state.scratch_dir(ended)
    image = crash(state)
    (image / "scratch" / ("0" * 32)).mkdir()  # nobody's
    (image / "scratch" / "mine").mkdir()  # not one of ours: left alone
    await state.terminate_session(ended)
    await eventually(lambda: len(directories(state)) == 1)
    (directory_of(state) / "scratch" / lost.name).mkdir()  # as if killed before it was removed
    later = crash(state)
    state = await start(path=image)
    assert directories(state) == {path.name, lost.name, "mine"}
    state = await start(path=later)
    assert directories(state) == {path.name}


async def test_another_session_of_the_same_id_gets_an_empty_one(state: StateManager) -> None:
    await state.create_session(session_id="s")
    first = await state.scratch_dir("s")
    (first / "secret").write_text("of the first")
    await state.terminate_session("s")
    await state.create_session(session_id="s")
    second = await state.scratch_dir("s")
    assert second != first
    assert names_in(second) == set()
    await eventually(lambda: directories(state) == {second.name})


async def test_one_that_somebody_removed_is_made_again(state: StateManager) -> None:
    sid = await state.create_session()
    path = await state.scratch_dir(sid)
    shutil.rmtree(path)
    assert await state.scratch_dir(sid) == path
    assert is_directory(path)


async def test_a_full_disk_makes_none_and_forgets_nothing(
    state: StateManager, files: ScriptedFiles
) -> None:
    first, second = await state.create_session(), await state.create_session()
    path = await state.scratch_dir(first)
    files.full = True
    with pytest.raises(DiskFull):
        await state.scratch_dir(second)
    assert await state.scratch_dir(first) == path
    files.full = False
    assert await state.scratch_dir(second) != path


class SlowDirectories(ScriptedFiles):
    """A disk on which a directory is made only once a test lets it, or cannot be made."""

    def __init__(self) -> None:
        super().__init__()
        self.makes = Gate()
        self.error: OSError | None = None

    def make_directory(self, path: str) -> None:
        if "/scratch/" in path:
            self.makes.go_through()
            if self.error is not None:
                raise self.error
        super().make_directory(path)


@pytest.fixture
async def slow(
    tmp_path: Path, clock: ManualClock
) -> AsyncIterator[tuple[StateManager, SlowDirectories]]:
    files = SlowDirectories()
    async with StateManager(
        config=config_for(tmp_path / "slow"), clock=clock, files=files
    ) as state:
        yield state, files
        files.open_gates()
        files.makes.let_pass()


Slow = tuple[StateManager, SlowDirectories]


async def asked(slow: Slow) -> tuple[str, asyncio.Task[Path]]:
    """Return a session, and who asks for its directory, while that is being made."""
    state, files = slow
    sid = await state.create_session()
    files.makes.hold()
    asking = asyncio.create_task(state.scratch_dir(sid))
    await files.makes.reached()
    return sid, asking


@pytest.mark.parametrize("number", [errno.EEXIST, errno.ENOENT, 0])
async def test_a_session_that_ends_while_its_directory_is_made_is_not_found(
    slow: Slow, number: int
) -> None:
    """The directory is removed and made at the same time, and what the system says depends."""
    state, files = slow
    sid, asking = await asked(slow)
    await state.terminate_session(sid)
    files.error = OSError(number, "in between") if number else None
    files.makes.let_pass()
    with pytest.raises(SessionNotFound):
        await asking
    await eventually(lambda: not directories(state))


async def test_whoever_gives_up_waiting_for_the_directory_leaves_none_of_a_session_that_ended(
    slow: Slow,
) -> None:
    state, files = slow
    sid, asking = await asked(slow)
    asking.cancel()
    await asyncio.wait([asking])
    await state.terminate_session(sid)
    files.makes.let_pass()
    await eventually(lambda: not state._scratch._tasks)  # type: ignore[union-attr]
    assert not directories(state)


async def test_the_directory_of_a_session_that_gets_another_id_while_it_is_made_stays(
    slow: Slow,
) -> None:
    state, files = slow
    old = await state.create_session()
    path = await state.scratch_dir(old)
    (path / "draft").write_text("half")
    files.makes.hold()
    asking = asyncio.create_task(state.scratch_dir(old))
    await files.makes.reached()
    new = await state.rotate_session_id(old)
    files.makes.let_pass()
    with pytest.raises(SessionNotFound):
        await asking
    await eventually(lambda: not state._scratch._tasks)  # type: ignore[union-attr]
    assert await state.scratch_dir(new) == path
    assert (path / "draft").read_text() == "half"


class SlowRemovals(ScriptedFiles):
    """A disk on which a directory is removed only once a test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.removals = Gate()

    def remove_tree(self, path: str, goes_on: Callable[[], bool]) -> None:
        self.removals.go_through()
        super().remove_tree(path, goes_on)


async def ended_with_directories(state: StateManager, files: SlowRemovals) -> list[Path]:
    """Return directories with files in them of sessions that have just ended."""
    sids = [await state.create_session() for _ in range(6)]
    paths = [await state.scratch_dir(sid) for sid in sids]
    for path in paths:
        (path / "page").mkdir()
        (path / "page" / "body").write_text("<html>")
    files.removals.hold()
    for sid in sids:
        await state.terminate_session(sid)
    await files.removals.reached()
    return paths


async def test_sessions_are_read_while_many_directories_are_removed(tmp_path: Path) -> None:
    files = SlowRemovals()
    files.tells_cached = False  # every read goes through a thread
    async with StateManager(config=config_for(tmp_path / "state"), files=files) as state:
        cold = await state.create_session(data={"a": 1})
        await state.spill_session(cold)
        await ended_with_directories(state, files)
        async with asyncio.timeout(10):
            assert await data_of(state, cold) == {"a": 1}
        files.removals.let_pass()
        await eventually(lambda: not directories(state))


async def test_directories_hold_up_a_shutdown_no_longer_than_its_grace_period(
    tmp_path: Path,
) -> None:
    files = SlowRemovals()
    state = StateManager(config=config_for(tmp_path / "state"), files=files)
    await state.open()
    paths = await ended_with_directories(state, files)
    closing = asyncio.create_task(state.close(grace_seconds=0))
    await eventually(lambda: not state._scratch._goes_on())  # type: ignore[union-attr]
    files.removals.let_pass()  # nothing ends what a thread is doing, but it does no more than that
    await closing
    assert all((path / "page" / "body").exists() for path in paths)
    async with StateManager(config=config_for(tmp_path / "state"), files=files) as state:
        assert not directories(state)


async def test_a_shutdown_removes_the_directories_that_it_has_time_for(tmp_path: Path) -> None:
    files = SlowRemovals()
    state = StateManager(config=config_for(tmp_path / "state"), files=files)
    await state.open()
    await ended_with_directories(state, files)
    closing = asyncio.create_task(state.close(grace_seconds=30))
    files.removals.let_pass()
    await closing
    assert not directories(state)


async def test_links_are_removed_and_what_they_lead_to_stays(
    state: StateManager, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    sid = await state.create_session()
    path = await state.scratch_dir(sid)
    for name, target in (("to a directory", outside), ("to a file", outside / "file")):
        (path / name).symlink_to(target)
    (path / "to nothing").symlink_to(tmp_path / "nothing")
    await state.terminate_session(sid)
    await eventually(lambda: not directories(state))
    assert (outside / "file").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
async def test_a_disk_without_room_for_a_directory_is_full(slow: Slow, number: int) -> None:
    state, files = slow
    sid = await state.create_session()
    files.error = OSError(number, "no room")
    with pytest.raises(DiskFull, match=f"session '{sid}'.*: no room; free some space"):
        await state.scratch_dir(sid)


async def test_what_is_in_the_way_of_a_directory_is_named(state: StateManager) -> None:
    sid = await state.create_session()
    path = await state.scratch_dir(sid)
    path.rmdir()
    path.write_text("a file")
    with pytest.raises(DirectoryNotUsable, match=rf"session '{sid}'.*{path}: File exists; remove"):
        await state.scratch_dir(sid)


async def test_a_worker_without_any_has_no_files_for_it(start: Start) -> None:
    state = await start()
    await state.create_session()
    await state.close()
    assert {"SCRATCH", "scratch"} & {each.name for each in directory_of(state).iterdir()} == set()


async def test_the_journal_does_not_grow_for_ever(
    state: StateManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.scratch._REWRITE_ABOVE_BYTES", 500)
    for _ in range(30):
        sid = await state.create_session()
        await state.scratch_dir(sid)
        await state.terminate_session(sid)
    await eventually(lambda: not directories(state))
    assert (directory_of(state) / "SCRATCH").stat().st_size < 1500


async def test_a_restored_checkpoint_begins_with_empty_ones(state: StateManager) -> None:
    sid = await state.create_session()
    path = await state.scratch_dir(sid)
    await state.create_checkpoint()
    await state.restore_checkpoint()
    assert await state.scratch_dir(sid) != path
    await eventually(lambda: len(directories(state)) == 1)


async def test_one_that_is_made_while_a_restored_state_is_looked_at_stays(
    state: StateManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    sid = await state.create_session()
    old = await state.scratch_dir(sid)
    info = await state.create_checkpoint()
    looked_at = state._living_incarnation
    made: list[Path] = []

    async def meanwhile(session_id: str) -> bytes | None:
        made.append(await state.scratch_dir(session_id))
        return await looked_at(session_id)

    monkeypatch.setattr(state, "_living_incarnation", meanwhile)
    await state.restore_checkpoint(info.id)
    await eventually(lambda: not is_directory(old))
    assert is_directory(made[0])
    assert await state.scratch_dir(sid) == made[0]
    assert directories(state) == {made[0].name}


async def test_a_damaged_journal_keeps_no_worker_from_its_sessions(start: Start) -> None:
    state = await start()
    sid = await state.create_session(data={"a": 1})
    await state.scratch_dir(sid)
    await state.close()
    (directory_of(state) / "SCRATCH").write_bytes(b"rubbish")
    state = await start()
    assert await state.has_session(sid)
    assert is_directory(await state.scratch_dir(sid))


async def test_an_opening_that_is_cancelled_there_leaves_nothing_open(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = asyncio.Event()

    async def hang(*_: object) -> None:
        reached.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patched:
        patched.setattr(Scratch, "open", hang)
        opening = asyncio.ensure_future(start(path=tmp_path / "state"))
        await reached.wait()
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
    state = await start(path=tmp_path / "state")  # nobody holds the lock
    assert is_directory(await state.scratch_dir(await state.create_session()))


async def test_the_directory_goes_with_a_session_that_gets_another_id(start: Start) -> None:
    state = await start()
    old = await state.create_session()
    path = await state.scratch_dir(old)
    (path / "draft").write_text("half")
    new = await state.rotate_session_id(old)
    assert await state.scratch_dir(new) == path
    assert (path / "draft").read_text() == "half"
    await state.close()
    state = await start()
    assert await state.scratch_dir(new) == path
    await state.terminate_session(new)
    await eventually(lambda: not directories(state))


async def test_the_directory_stays_where_the_id_stays(start: Start, files: ScriptedFiles) -> None:
    state = await start()
    old = await state.create_session(data={"a": 1})
    path = await state.scratch_dir(old)
    await state._scratch.follow(old, "new", b"n" * 16)  # type: ignore[union-attr]
    crashed = await start(path=files.image(state.config.disk.path, path.parents[2] / "crashed"))
    assert (await crashed.scratch_dir(old)).name == path.name
    state._scratch.turn_back(old, "new", (await state._living_incarnation(old)) or b"")  # type: ignore[union-attr]
    assert await state.scratch_dir(old) == path
