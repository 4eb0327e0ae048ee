"""A disk with nothing left: what still works on it, and how it is left again."""

from __future__ import annotations

import asyncio
import logging
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from persistence import StateManager, errors
from persistence.disk.filenames import RESERVE
from persistence.disk.files import Files
from tests.disk.memoryfiles import MemoryFiles
from tests.support import PATH, abandon, config, everything, opened

SMALL = config(segment_bytes=64 * 1024, compression="none")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


async def fill(state: StateManager, most: int = 1000) -> int:
    """Create sessions until the disk is full; return how many there are."""
    for number in range(most):
        try:
            await state.create_session(session_id=f"s{number}", data={"x": bytes(6000)})
        except errors.DiskFull:
            return number
    raise AssertionError("it is never full")


async def empty(state: StateManager) -> None:
    for sid in await state.get_active_sessions():
        async with asyncio.timeout(60):
            while not await is_ended(state, sid):
                await state._disk.compactor.settle()
    await state.compact()


async def at_rest(state: StateManager) -> None:
    """Wait for rotations and merges: for a manifest they may take the reserve at any moment."""
    await asyncio.gather(*state._disk._background)
    await state._disk.compactor.settle()


async def is_ended(state: StateManager, sid: str) -> bool:
    """End a session; False if a merge under way has taken what was left of the disk."""
    try:
        assert await state.terminate_session(sid)
    except errors.DiskFull:
        return False
    return True


@pytest.mark.parametrize("spare_bytes", [0, 30, 63, 64, 100, 5000])
async def test_sessions_end_on_a_full_disk_and_updates_go_on_behind_that(spare_bytes: int) -> None:
    files = MemoryFiles()
    async with opened(files, SMALL) as state:
        await state.create_session(session_id="first")
        files.free_bytes = 400_000 + spare_bytes
        count = await fill(state)
        await at_rest(state)
        if f"{PATH}/RESERVE" in files.contents():  # else what follows would take its space
            files.free_bytes = min(files.free_bytes, spare_bytes)
        with pytest.raises(errors.DiskFull):
            await state.create_session(session_id="more", data={"x": bytes(6000)})
        assert len(await everything(state)) == count + 1
        await empty(state)
        assert await everything(state) == {}
        assert await fill(state) > 10
        assert (await state.stats()).disk.damages == 0


async def test_a_full_disk_at_a_rotation_is_left_from_inside() -> None:
    files = MemoryFiles()
    async with opened(files, SMALL) as state:
        for number in range(10):
            await state.create_session(session_id=f"s{number}", data={"x": bytes(6000)})
        files.free_bytes = 0
        with pytest.raises(errors.DiskFull):
            await state.create_session(session_id="more", data={"x": bytes(6000)})
        await empty(state)
        assert f"{PATH}/RESERVE" not in files.contents()
        with pytest.raises(errors.DiskFull):  # all that is dead is in the open segment
            await state.create_session(session_id="more", data={"x": bytes(6000)})
        await state.compact()
        await state.create_session(session_id="more", data={"x": bytes(6000)})
        assert f"{PATH}/RESERVE" in files.contents()


async def test_what_was_ended_on_a_full_disk_stays_ended_after_a_kill() -> None:
    files = MemoryFiles()
    async with opened(files, SMALL) as state:
        for number in range(30):
            await state.create_session(session_id=f"s{number}", data={"x": bytes(6000)})
        files.free_bytes = 0
        for number in range(20):
            assert await state.terminate_session(f"s{number}")
        await abandon(state)
    files = files.after_kill()
    files.free_bytes = 0
    async with opened(files, SMALL) as state:
        assert sorted(await everything(state)) == sorted(f"s{number}" for number in range(20, 30))
        assert state._disk.damages == []
        await abandon(state)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True, check=False
    )
    if mounting.returncode:
        pytest.skip(f"mounting is not allowed here: {mounting.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.alone
async def test_a_real_full_disk_is_left_from_inside_and_opened(small_disk: Path) -> None:
    small = config(str(small_disk / "state"), segment_bytes=64 * 1024, compression="none")
    async with opened(Files(), small) as state:
        assert await fill(state) > 50
        await at_rest(state)
        with suppress(errors.DiskFull):  # a merge may have used the reserve: it is made again first
            await state.create_session(session_id="more", data={"x": bytes(6000)})
        if (small_disk / "state" / RESERVE).exists():  # else what follows would take its space
            with (small_disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
                file.write(bytes(2**20))  # as much as there is room for
        before = await everything(state)
        await abandon(state)
    async with opened(Files(), small) as state:
        assert await everything(state) == before
        await empty(state)
        assert await fill(state) > 10
        await empty(state)
