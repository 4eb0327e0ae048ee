"""Real kernels: power cuts, full disks, no inodes, read-only disks, no descriptors, slow syncs.

Each test is skipped, with its reason, where the machine does not allow what it needs.
"""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import pytest

from persistence import StateManager, errors
from persistence.disk.files import Files
from persistence.disk.inspect import scan_directory
from tests.cli.command import command_with
from tests.crashes import Nursery, check_by_opening
from tests.engine import KIB, Start, commits_of, names_in
from tests.faults.kernel import Ext4, NotHere, ext4, tmpfs
from tests.faults.powercuts import PowerCuts
from tests.support import abandon, config, everything, opened

pytestmark = pytest.mark.alone
CUTS = 2


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Ext4]:
    """An ext4 file system on a loop device."""
    try:
        with ext4(tmp_path) as made:
            yield made
    except NotHere as why:
        pytest.skip(str(why))


@contextmanager
def small_tmpfs(path: Path, options: str) -> Iterator[Path]:
    try:
        with tmpfs(path, options) as mounted:
            yield mounted
    except NotHere as why:
        pytest.skip(str(why))


async def fill(state: StateManager) -> list[str]:
    """Create sessions until there is no room; return which."""
    created = []
    for number in range(2000):
        data = {"n": number, "x": Random(number).randbytes(6000)}
        try:
            created.append(await state.create_session(data=data))
        except errors.DiskFull:
            return created
    raise AssertionError("it is never full")


async def test_power_cuts_lose_nothing_acknowledged(disk: Ext4, tmp_path: Path) -> None:
    nursery = Nursery()
    try:
        cuts = PowerCuts(nursery, disk, seed=1)
        while cuts.cuts < CUTS:
            cuts.one()
    finally:
        nursery.close()
    assert cuts.acknowledged > 0
    reports = [report for report, _ in scan_directory(str(cuts.directory))]
    assert not any(report.damages for report in reports)
    await check_by_opening(cuts.directory, tmp_path / "copy", cuts.histories)


async def test_a_disk_of_1_mib_that_is_full_takes_writes_again_when_there_is_space(
    tmp_path: Path,
) -> None:
    with small_tmpfs(tmp_path / "disk", "size=1m") as path:
        ballast = path / "ballast"
        ballast.write_bytes(bytes(300_000))
        configuration = config(str(path / "state"), segment_bytes=64 * KIB, compression="none")
        async with opened(Files(), configuration) as state:
            created = await fill(state)
            assert len(created) > 20
            before = await everything(state)
            assert sorted(before) == sorted(created)
            ballast.unlink()
            more = await state.create_session(data={"x": bytes(6000)})
            assert await state.has_session(more)
            await abandon(state)
        async with opened(Files(), configuration) as state:
            assert (await state.stats()).disk.damages == 0
            assert await everything(state) == before | {more: {"x": bytes(6000)}}


async def test_a_read_only_disk_is_not_opened_for_writing_and_can_be_verified(
    disk: Ext4, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = disk.path / "state"
    async with opened(Files(), config(str(directory))) as state:
        await state.create_session(session_id="s", data={"n": 1})
    disk.remount_read_only()
    names = names_in(directory)
    with pytest.raises(errors.DirectoryNotUsable, match="read-only"):
        async with opened(Files(), config(str(directory))):
            pass
    assert names_in(directory) == names
    assert command_with(capsys)("verify", directory).code == 0


async def test_a_disk_that_becomes_read_only_stops_writes_and_no_reads(disk: Ext4) -> None:
    configuration = config(str(disk.path / "state"), segment_bytes=64 * KIB)
    async with opened(Files(), configuration) as state:
        for number in range(40):
            await state.create_session(session_id=f"s{number}", data={"x": bytes([number]) * 6000})
        for number in range(0, 40, 2):
            await state.spill_session(f"s{number}")
        before = await everything(state)
        for number in range(0, 40, 2):
            await state.spill_session(f"s{number}")
        disk.fail_read_only()
        for _ in range(2):
            with pytest.raises((errors.WriteOutcomeUnknown, errors.DirectoryNotUsable)):
                await state.update_session_data("s1", "x", "lost")
        assert await everything(state) == before
        assert not (await state.stats()).disk.takes_writes
        await abandon(state)
    disk.unmount()
    disk.mount()
    async with opened(Files(), configuration) as state:
        assert await everything(state) == before
        assert (await state.stats()).disk.damages == 0


async def test_without_inodes_updates_are_refused_and_reads_go_on(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path / "disk", "size=16m,nr_inodes=24") as path:
        configuration = config(str(path / "state"), segment_bytes=64 * KIB, compression="none")
        async with opened(Files(), configuration) as state:
            created = await fill(state)
            assert sorted(await everything(state)) == sorted(created)
            used = [path / f"other {number}" for number in range(30)]
            with suppress(OSError):
                for name in used:
                    name.touch()
            created += await fill(state)
            assert sorted(await everything(state)) == sorted(created)
            for name in used:
                name.unlink(missing_ok=True)
            for session_id in created[: len(created) // 2]:
                assert await state.terminate_session(session_id)
            await state.compact()
            assert await state.create_session(data={"x": bytes(6000)})
            assert sorted(created[len(created) // 2 :]) == sorted(
                set(await state.get_active_sessions()) & set(created)
            )


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """Let the process open nothing more than it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def until_no_descriptor_is_left(state: StateManager) -> errors.PersistenceError:
    """Create sessions until a new segment is due that cannot be opened; return what is raised."""
    with no_more_descriptors():
        try:
            await fill(state)
        except errors.PersistenceError as error:
            for session_id in ("s0", "s10", "s29"):  # in memory
                assert await state.get_session(session_id) is not None
            return error
    raise AssertionError("there always was one")


@pytest.fixture
async def busy(tmp_path: Path) -> AsyncIterator[StateManager]:
    """A manager with some sessions in several segments."""
    configuration = config(str(tmp_path / "state"), segment_bytes=64 * KIB, compression="none")
    async with opened(Files(), configuration) as state:
        for number in range(30):
            await state.create_session(session_id=f"s{number}", data={"x": bytes(6000)})
        await state._disk.compactor.settle()
        yield state


async def test_without_descriptors_updates_are_refused_and_go_on_when_there_are_some(
    busy: StateManager,
) -> None:
    await until_no_descriptor_is_left(busy)
    count = len(await everything(busy))
    await busy.create_session(session_id="more")
    assert len(await everything(busy)) == count + 1
    assert (await busy.stats()).disk.damages == 0


async def test_without_descriptors_no_session_is_left_out_of_a_listing(tmp_path: Path) -> None:
    configuration = config(str(tmp_path / "state"), segment_bytes=64 * KIB, compression="none")
    async with opened(Files(), configuration) as state:
        for number in range(30):
            await state.create_session(session_id=f"s{number}", data={"x": bytes(6000)})
    async with opened(Files(), configuration) as state:  # with no segment open
        with no_more_descriptors(), pytest.raises(errors.DirectoryNotUsable, match="RLIMIT_NOFILE"):
            await state.get_active_sessions()
        assert len(await state.get_active_sessions()) == 30
        assert (await state.stats()).disk.damages == 0


class SlowFiles(Files):
    """Every sync of the log takes a second, for some time."""

    is_slow = False

    def sync_data(self, fd: int) -> None:
        if self.is_slow:
            time.sleep(1.0)
        super().sync_data(fd)


async def test_a_sync_of_a_second_holds_writers_back_and_no_one_else(start: Start) -> None:
    files = SlowFiles()
    state = await start(files=files, disk={"queue_bytes": 256 * KIB})
    await state.create_session(session_id="read", data={"n": 1})
    files.is_slow = True
    value = bytes(20 * KIB)
    writing = [
        asyncio.create_task(state.create_session(data={"x": value, "n": n})) for n in range(60)
    ]
    lags = []
    reads = most = 0
    end = time.monotonic() + 1.5
    while (now := time.monotonic()) < end:
        assert await state.get_session("read") is not None
        reads += 1
        most = max(most, commits_of(state).pending_bytes)
        await asyncio.sleep(0.001)
        lags.append(time.monotonic() - now)
    assert most <= 256 * KIB + 21 * KIB
    assert sum(not task.done() for task in writing) > 30, "writers feel it"
    assert sorted(lags)[int(len(lags) * 0.99)] < 0.1, "and the event loop does not"
    assert reads > 100
    files.is_slow = False
    await asyncio.gather(*writing)
