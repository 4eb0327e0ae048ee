"""A worker that shares its sessions is killed while it restores: all of it, or nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from persistence import StateManager
from persistence.checkpoint.restore import StagedRestore
from persistence.clock import SystemClock
from persistence.disk.filenames import OUTBOX, RESTORING, TEMPORARY_SUFFIX
from persistence.disk.install import SEQUENCE_GAP
from persistence.errors import DirectoryNotUsable, DiskFull, WriteOutcomeUnknown
from persistence.sharing import sharing as sharing_module
from persistence.sharing.outbox import Outbox
from persistence.sharing.restoring import Mark, Restoring
from tests.engine import ScriptedFiles, Start, config_for, directory_of, disk_of, names_in
from tests.redis_servers import Proxy, RedisServer
from tests.sharing.conftest import Worker
from tests.sharing.support import sharing_of, until_delivered, until_down, until_up, value

_PATIENCE_SECONDS = 20.0

KEPT = [f"kept {number}" for number in range(10)]
LATER = [f"later {number}" for number in range(5)]
"""Which sessions the checkpoint has, and which are made after it."""


class Kill:
    """Takes an image of a worker's directory when it gets somewhere, and holds it there.

    Args:
        monkeypatch: of the test.
        tmp_path: where the image goes.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self._monkeypatch = monkeypatch
        self._tmp_path = tmp_path
        self._images = 0
        self._held = asyncio.Event()

    @asynccontextmanager
    async def at(
        self, directory: Path, place: tuple[type, str], calls: int, work: Awaitable[object]
    ) -> AsyncIterator[Path]:
        """Let `work` run up to a call; give the image of the directory at that moment."""
        owner, name = place
        image: asyncio.Future[Path] = asyncio.get_running_loop().create_future()
        go_on = getattr(owner, name)
        left = calls

        async def called(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                if not image.done():
                    self._images += 1
                    target = self._tmp_path / f"image {self._images}"
                    image.set_result(ScriptedFiles().image(directory, target))
                await self._held.wait()
                raise DiskFull("this process has been killed")
            return await go_on(*arguments)

        with self._monkeypatch.context() as patch:
            patch.setattr(owner, name, called)
            working = asyncio.ensure_future(work)
            await asyncio.wait(
                (image, working),
                return_when=asyncio.FIRST_COMPLETED,
                timeout=_PATIENCE_SECONDS,
            )
            assert image.done(), "it was not called"
        try:
            yield image.result()
        finally:
            self._held.set()
            await asyncio.gather(working, return_exceptions=True)


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kill:
    """Kill workers; what they have to note takes several batches."""
    monkeypatch.setattr(sharing_module, "_IMPOSED_AT_ONCE", 4)
    return Kill(monkeypatch, tmp_path)


Open = Callable[..., Awaitable[StateManager]]


@pytest.fixture
def restorer(worker: Worker, tmp_path: Path) -> Open:
    """Open workers with one store of checkpoints."""

    async def restorer(url: str, **settings: Any) -> StateManager:
        checkpoint = {"store": str(tmp_path / "checkpoints")}
        return await worker(url, checkpoint=checkpoint, **settings)

    return restorer


async def prepare(state: StateManager) -> None:
    """Make a checkpoint, and go on from it."""
    for session_id in KEPT:
        await state.create_session(session_id=session_id, data={"n": 0})
    await state.create_checkpoint()
    for session_id in KEPT:
        await state.update_session_data(session_id, "n", 1)
    for session_id in LATER:
        await state.create_session(session_id=session_id, data={"n": 1})


async def prepared(restorer: Open, server: RedisServer) -> tuple[StateManager, StateManager]:
    """Return two workers; the first has a checkpoint, and has gone on from it."""
    a, b = await restorer(server.url), await restorer(server.url)
    await until_up(a, b)
    await prepare(a)
    return a, b


async def seen(state: StateManager, session_ids: Iterable[str]) -> set[int | None]:
    """Return which values sessions have, once the shared tier was asked."""
    found = set()
    for session_id in session_ids:
        session = await state.get_session(session_id, fresh=True)
        found.add(None if session is None else session["n"])
    return found


async def check_restored(*states: StateManager) -> None:
    """Everything is as the checkpoint has it, for everybody, and nothing was refused."""
    for state in states:
        assert (await seen(state, KEPT), await seen(state, LATER)) == ({0}, {None})
        assert sharing_of(state).conflicts.count == 0
        assert RESTORING not in names_in(directory_of(state))


BEGUN = (Outbox, "begin_anew")


@pytest.mark.parametrize(
    ("place", "calls"),
    [(BEGUN, 0), (BEGUN, 1), (BEGUN, 3), ((Restoring, "over"), 0)],
    ids=["nothing is noted", "a part is noted", "nearly all is noted", "all is noted"],
)
async def test_what_was_in_place_when_the_worker_was_killed_is_restored_for_everybody(
    restorer: Open,
    shared_server: RedisServer,
    kill: Kill,
    place: tuple[type, str],
    calls: int,
) -> None:
    a, b = await prepared(restorer, shared_server)
    async with kill.at(directory_of(a), place, calls, a.restore_checkpoint()) as image:
        assert RESTORING in names_in(image)
        again = await restorer(shared_server.url, path=image)
        await until_delivered(again)
        await check_restored(again, b)


async def test_a_worker_that_is_killed_once_more_while_it_opens_has_everything_restored(
    restorer: Open, shared_server: RedisServer, kill: Kill
) -> None:
    a, b = await prepared(restorer, shared_server)
    async with kill.at(directory_of(a), BEGUN, 1, a.restore_checkpoint()) as first:
        opening = restorer(shared_server.url, path=first)
        async with kill.at(first, BEGUN, 2, opening) as second:
            again = await restorer(shared_server.url, path=second)
            await until_delivered(again)
            await check_restored(again, b)


async def test_a_restore_that_was_killed_before_it_was_in_place_changes_nothing_for_anybody(
    restorer: Open, shared_server: RedisServer, kill: Kill
) -> None:
    a, b = await prepared(restorer, shared_server)
    installing = (StagedRestore, "install")
    async with kill.at(directory_of(a), installing, 0, a.restore_checkpoint()) as image:
        assert RESTORING in names_in(image)
        await b.update_session_data(KEPT[0], "n", 2)
        again = await restorer(shared_server.url, path=image)
        assert await seen(again, KEPT[1:] + LATER) == {1}
        assert await value(again, KEPT[0]) == await value(b, KEPT[0]) == 2
        assert (len(sharing_of(again).outbox), sharing_of(again).conflicts.count) == (0, 0)
        assert RESTORING not in names_in(image)


async def test_nothing_was_restored_yet_is_told_from_an_empty_state_that_was(
    restorer: Open, shared_server: RedisServer, kill: Kill
) -> None:
    a, b = await restorer(shared_server.url), await restorer(shared_server.url)
    await until_up(a, b)
    empty = await a.create_checkpoint()
    await prepare(a)
    restoring = a.restore_checkpoint(empty.id)
    async with kill.at(directory_of(a), BEGUN, 1, restoring) as image:
        again = await restorer(shared_server.url, path=image)
        await until_delivered(again)
        for state in (again, b):
            assert await seen(state, KEPT + LATER) == {None}


async def test_copies_of_others_sessions_in_an_empty_log_are_not_ended_by_what_never_was_restored(
    restorer: Open, shared_server: RedisServer, kill: Kill
) -> None:
    a, b = await prepared(restorer, shared_server)
    await a.terminate_session(KEPT[0])
    assert await value(b, LATER[0]) == 1
    installing = (StagedRestore, "install")
    async with kill.at(directory_of(b), installing, 0, b.restore_checkpoint()) as image:
        again = await restorer(shared_server.url, path=image)
        await until_delivered(again)
        assert await seen(again, LATER) == await seen(a, LATER) == {1}


async def test_a_worker_that_comes_back_while_the_server_is_away_serves_what_was_restored(
    restorer: Open, shared_server: RedisServer, proxy: Proxy, own_server: RedisServer, kill: Kill
) -> None:
    a, b = await restorer(proxy.url, timeout_seconds=0.5), await restorer(own_server.url)
    await until_up(a, b)
    await prepare(a)
    async with kill.at(directory_of(a), BEGUN, 1, a.restore_checkpoint()) as image:
        proxy.refuse()
        proxy.cut()
        again = await restorer(proxy.url, path=image, timeout_seconds=0.5)
        await until_down(again)
        assert (await seen(again, KEPT), await seen(again, LATER)) == ({0}, {None})
        assert RESTORING not in names_in(image)
        await proxy.start()
        await until_up(again)
        await until_delivered(again)
        # As after any restore during an outage: nobody knew what the server had.
        assert await seen(again, KEPT) == await seen(b, KEPT) == {1}
        assert sharing_of(again).conflicts.count == len(KEPT)
        assert await seen(again, LATER) == await seen(b, LATER) == {None}


async def test_a_worker_that_does_not_share_keeps_the_note_for_when_it_does_again(
    restorer: Open, shared_server: RedisServer, kill: Kill
) -> None:
    a, b = await prepared(restorer, shared_server)
    async with kill.at(directory_of(a), BEGUN, 1, a.restore_checkpoint()) as image:
        async with StateManager(None, config_for(image)) as alone:
            await alone.update_session_data(KEPT[0], "n", 0)
        assert RESTORING in names_in(image)
        again = await restorer(shared_server.url, path=image)
        await until_delivered(again)
        await check_restored(again, b)


async def test_a_restore_that_cannot_be_noted_leaves_everything_as_it_was(
    restorer: Open, shared_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await prepared(restorer, shared_server)
    files = disk_of(a).files
    assert isinstance(files, ScriptedFiles)
    write = Restoring._write

    async def full(*arguments: Any) -> None:
        files.full = True
        try:
            await write(*arguments)
        finally:
            files.full = False

    with monkeypatch.context() as patch:
        patch.setattr(Restoring, "_write", full)
        with pytest.raises(DiskFull, match=r"RESTORING.*nothing was changed"):
            await a.restore_checkpoint()
    names = names_in(directory_of(a))
    assert not any(name == RESTORING or name.endswith(TEMPORARY_SUFFIX) for name in names)
    await until_up(a)
    assert await seen(a, KEPT + LATER) == await seen(b, KEPT + LATER) == {1}
    await a.restore_checkpoint()
    await until_delivered(a)
    await check_restored(a, b)


@pytest.mark.parametrize(
    ("error", "stays"),
    [(DiskFull("as it was"), False), (WriteOutcomeUnknown("who knows"), True)],
    ids=["as it was", "unknown"],
)
async def test_the_note_goes_when_nothing_was_installed_and_stays_when_nobody_knows(
    restorer: Open,
    shared_server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    stays: bool,
) -> None:
    a = await restorer(shared_server.url)
    await until_up(a)
    await prepare(a)

    async def install(_: StagedRestore) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(StagedRestore, "install", install)
        with pytest.raises(type(error)):
            await a.restore_checkpoint()
    assert (RESTORING in names_in(directory_of(a))) is stays
    assert len(sharing_of(a).outbox) == 0
    assert await seen(a, KEPT + LATER) == {1}
    await a.restore_checkpoint()
    await until_delivered(a)
    await check_restored(a)


async def test_a_restore_of_which_not_all_could_be_noted_for_the_server_is_done_again(
    restorer: Open, shared_server: RedisServer, kill: Kill, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await prepared(restorer, shared_server)
    begin, calls = Outbox.begin_anew, 0

    async def full(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise DiskFull(f"{OUTBOX}: no space left")
        await begin(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "begin_anew", full)
        with pytest.raises(DiskFull):
            await a.restore_checkpoint()
    assert RESTORING in names_in(directory_of(a))
    await a.restore_checkpoint()
    await until_delivered(a)
    await check_restored(a, b)


async def test_a_watched_session_is_not_taken_back_while_its_restored_version_is_imposed(
    restorer: Open, shared_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await prepared(restorer, shared_server)
    watches = [a.watch(session_id) for session_id in KEPT]
    waiting = [asyncio.ensure_future(anext(watch)) for watch in watches]
    await asyncio.sleep(0)
    begin = Outbox.begin_anew

    async def slowly(*arguments: Any) -> None:
        for _ in range(5):  # the server answers whoever has asked before
            await seen(b, KEPT)
        await begin(*arguments)

    monkeypatch.setattr(Outbox, "begin_anew", slowly)
    await a.restore_checkpoint()
    await until_delivered(a)
    await check_restored(a, b)
    async with asyncio.timeout(_PATIENCE_SECONDS):
        changes = await asyncio.gather(*waiting)
    assert {change.kind for change in changes} == {"reset"}


# --- the note by itself ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_empty", "sequence", "has_segments", "is_passed"),
    [
        (False, 100, True, False),
        (False, 100 + 10**6, True, False),  # it went on without having restored anything
        (False, 101 + SEQUENCE_GAP, True, True),
        (False, 0, False, False),
        (True, 100, True, False),
        (True, 0, False, True),
        (True, 101 + SEQUENCE_GAP, True, True),
    ],
)
def test_where_the_log_is_tells_whether_the_restored_state_is_in_place(
    *, is_empty: bool, sequence: int, has_segments: bool, is_passed: bool
) -> None:
    assert Mark(100, is_empty).is_passed(sequence, has_segments=has_segments) is is_passed


async def left(state: StateManager) -> list[str] | None:
    """Return what the next opening of a worker's directory finds is to be imposed."""
    found = Restoring(disk_of(state), SystemClock())
    await found.open()
    await found.close()
    return found.before


async def test_the_note_keeps_every_id_and_is_gone_for_good_once_it_is_over(start: Start) -> None:
    state = await start()
    await state.create_session(data={"n": 0})
    disk, ids = disk_of(state), [f"sitzung ü {number}" for number in range(2_500)]
    restoring = Restoring(disk, SystemClock())
    async with restoring.noted(ids, is_empty=False):
        assert RESTORING in names_in(directory_of(state))
        disk.writer.sequence += SEQUENCE_GAP
    assert restoring.before == ids
    assert await left(state) == ids
    await restoring.over()
    assert await left(state) is None
    assert RESTORING not in names_in(directory_of(state))


async def test_a_note_of_what_never_was_installed_goes_at_the_next_opening(start: Start) -> None:
    state = await start()
    await state.create_session(data={"n": 0})
    with pytest.raises(WriteOutcomeUnknown):
        async with Restoring(disk_of(state), SystemClock()).noted(["a"], is_empty=False):
            raise WriteOutcomeUnknown("who knows")
    await state.create_session(data={"n": 0})
    assert RESTORING in names_in(directory_of(state))
    assert await left(state) is None
    assert RESTORING not in names_in(directory_of(state))


async def test_a_second_restore_does_not_forget_whom_the_first_one_has_ended(start: Start) -> None:
    state = await start()
    first = Restoring(disk_of(state), SystemClock())
    async with first.noted(["a", "b"], is_empty=False):
        disk_of(state).writer.sequence += SEQUENCE_GAP
    await first.close()
    second = Restoring(disk_of(state), SystemClock())
    await second.open()
    with pytest.raises(DirectoryNotUsable):
        async with second.noted(["b", "c"], is_empty=False):
            raise DirectoryNotUsable("as it was")
    assert second.before == ["a", "b", "c"]
    await second.close()
    assert await left(state) == ["a", "b", "c"]
