"""Opening after a sync that failed: the page cache shows what the disk never got.

The kernel marks the pages that it could not write as clean. So a directory that looks right after
the failure may be wrong after a power loss, unless its opening has written them again.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from persistence.disk.filenames import segment_name
from persistence.disk.files import write_exactly
from persistence.disk.format import FOOTER_BYTES
from persistence.disk.inspect import scan_directory
from persistence.disk.segments import Damage
from persistence.errors import DirectoryNotUsable, WriteOutcomeUnknown
from tests.disk.history import recover
from tests.disk.memoryfiles import Call, Killed, MemoryFiles, kill_at, lose_dirty_pages
from tests.support import PATH, abandon, config, everything, opened

LAST: Final = segment_name(1)
Found = dict[str, dict[str, Any]]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


async def fail_a_sync(fsync: str = "always", updates: int = 5) -> MemoryFiles:
    """Return what a process left whose last sync failed, and who died of it."""
    files = MemoryFiles()
    async with opened(files, config(fsync=fsync)) as state:
        for number in range(updates):
            data = {"n": number, "x": random.Random(number).randbytes(2000)}
            await state.create_session(session_id=f"s{number}", data=data)
        files.faults.append(lose_dirty_pages(errno.EIO, path=LAST))
        writing = [state.create_session(session_id="in doubt", data={"n": -1}), state.flush()]
        outcomes = await asyncio.gather(*writing, return_exceptions=True)
        assert isinstance(outcomes[1], WriteOutcomeUnknown)
        await abandon(state)
    return files.after_kill()


async def shown_by(files: MemoryFiles) -> Found:
    """Open the directory, die, and return what callers were shown."""
    async with opened(files) as state:
        found = await everything(state)
        assert state._disk.damages == []
        await abandon(state)
    return found


@pytest.mark.parametrize("fsync", ["always", "interval", "never"])
@pytest.mark.parametrize("left", [None, 1, 2, 3])
async def test_what_an_opening_shows_after_a_failed_sync_survives_a_power_loss(
    fsync: str, left: int | None
) -> None:
    files = await fail_a_sync(fsync)
    shown = await shown_by(files)
    assert {"s0", "s1", "s2", "s3", "s4", "in doubt"} == shown.keys(), "the page cache has it"
    again = files.after_power_loss(None if left is None else random.Random(left))
    assert await shown_by(again) == shown


async def test_updates_built_on_what_was_in_doubt_survive_a_power_loss() -> None:
    files = await fail_a_sync()
    async with opened(files) as state:
        await state.update_session_data("in doubt", "n", 1)
        await abandon(state)
    assert (await shown_by(files.after_power_loss()))["in doubt"] == {"n": 1}


async def test_a_power_loss_before_the_opening_is_through_loses_nothing_acknowledged() -> None:
    left = await fail_a_sync()
    for nth in range(1, 100):
        files = left.after_kill()
        files.faults.append(kill_at(nth, 0.5))
        try:
            await shown_by(files)
        except Killed:
            found = await shown_by(files.after_power_loss(random.Random(nth)))
            assert found.keys() >= {"s0", "s1", "s2", "s3", "s4"}
            continue
        assert nth > 5
        return
    pytest.fail("the opening never came to its end")


async def test_only_what_nothing_proves_to_be_synced_is_written_again() -> None:
    files = await fail_a_sync(updates=200)
    size = len(files.data(f"{PATH}/{LAST}"))
    await shown_by(files)
    written = [call for call in files.calls if call.operation == "write_at" and LAST in call.path]
    assert sum(call.size for call in written) < size / 20, "the last two batches and the footer"


async def test_a_sync_that_fails_while_opening_is_no_reason_to_trust_the_next_one() -> None:
    files = await fail_a_sync()
    files.faults.append(lose_dirty_pages(errno.EIO, path=LAST))
    with pytest.raises(DirectoryNotUsable):
        await shown_by(files)
    files = files.after_kill()
    shown = await shown_by(files)
    assert "in doubt" in shown
    assert await shown_by(files.after_power_loss()) == shown


async def test_writing_again_needs_no_more_space_than_the_footer() -> None:
    files = await fail_a_sync()
    files.free_bytes = FOOTER_BYTES
    recovered = recover(files)
    assert recovered.damages == []
    assert len(recovered.index) == 6
    files = files.after_power_loss()
    files.free_bytes = None
    assert len(await shown_by(files)) == 6


def damages_of(files: MemoryFiles, directory: Path) -> list[Damage]:
    """Return what a look at the directory, before anybody opens it, calls damage."""
    directory.mkdir()
    for path, data in files.contents(PATH).items():
        (directory / path.rpartition("/")[2]).write_bytes(data)
    return [item for report, _ in scan_directory(str(directory)) for item in report.damages]


async def test_a_footer_is_no_proof_of_what_lies_in_front_of_it(tmp_path: Path) -> None:
    """The machine dies while a segment is sealed, and the end of it has reached the disk alone."""
    files = MemoryFiles()
    async with opened(files, config(fsync="never", segment_bytes=64 * 1024)) as state:

        def die_in_the_sync_of_the_footer(files: MemoryFiles, call: Call) -> None:
            if call.operation == "sync_data":
                files.kill()
                raise Killed

        files.faults.append(die_in_the_sync_of_the_footer)
        creating = [
            state.create_session(
                session_id=f"s{number}",
                data={"n": number, "x": random.Random(number).randbytes(2000)},
            )
            for number in range(60)
        ]
        await asyncio.gather(*creating, return_exceptions=True)
        assert files.is_dead
        await abandon(state)
    for seed in range(20):
        left = files.after_power_loss(random.Random(seed))
        assert damages_of(left, tmp_path / f"{seed}") == []
        found = await shown_by(left)
        assert sorted(data["n"] for data in found.values()) == list(range(len(found))), "a hole"


def test_the_simulated_kernel_forgets_dirty_pages_and_shows_them_all_the_same() -> None:
    files = MemoryFiles()
    files.make_directory("/d")
    files.sync_directory("/")
    fd = files.create("/d/f")
    files.sync_directory("/d")
    write_exactly(files, fd, b"abc", 0)
    files.faults.append(lose_dirty_pages(errno.EIO))
    with pytest.raises(OSError):  # noqa: PT011 - the errno is not the point
        files.sync(fd)
    files.sync(fd)
    assert files.data("/d/f") == b"abc"
    assert files.after_power_loss().data("/d/f") == b""
