"""What the faults of this folder have found: the smallest case of each."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from random import Random
from threading import get_ident

import pytest
from crc32c import crc32c

from persistence import errors
from persistence import record as rec
from persistence.disk.filenames import SHIPPED, segment_name
from persistence.disk.manifest import MalformedManifest, decode_manifest
from tests.disk.memoryfiles import Call, Killed, MemoryFiles, fail
from tests.disk.powerloss import Beginning
from tests.faults.simulation import stepped
from tests.support import PATH, abandon, config, everything, opened

SMALL = config(segment_bytes=64 * 1024, compression="none")


async def test_a_close_that_fails_is_not_repeated_and_fails_nobody() -> None:
    """The second close of a descriptor closes a file of somebody else."""
    files = MemoryFiles()
    async with opened(files, SMALL) as state:
        files.faults.append(fail(errno.EIO, "close", times=None))
        for number in range(30):
            await state.create_session(session_id=f"s{number}", data={"x": bytes(6000)})
        await state.compact()
        assert len(await everything(state)) == 30
    assert files.open_files == []


def fail_new_names(files: MemoryFiles, number: int) -> None:
    """Let the sync of the directory fail behind each creation of a segment.

    In the thread that creates it: compaction syncs the directory as well.
    """
    creating: set[int] = set()

    def fault(_: MemoryFiles, call: Call) -> None:
        if call.operation == "create" and call.path.endswith(".seg"):
            creating.add(get_ident())
        elif call.operation == "sync_directory" and get_ident() in creating:
            creating.clear()
            raise OSError(number, os.strerror(number), call.path)

    files.faults.append(fault)


@pytest.mark.parametrize("seed", range(10))
async def test_segments_that_were_given_up_and_come_back_are_no_damage(seed: int) -> None:
    files = MemoryFiles()
    async with opened(files, SMALL) as state:
        for number in range(9):
            await state.create_session(session_id=f"s{number}", data={"x": bytes(6000)})
        await state._disk.compactor.settle()
        fail_new_names(files, errno.ENOSPC)
        refused = 0
        for number in range(9, 20):
            try:
                await state.create_session(session_id=f"s{number}", data={"x": bytes(6000)})
            except errors.DiskFull:
                refused += 1
        assert refused > 3
        before = await everything(state)
        await abandon(state)
    left = files.after_power_loss(Random(seed))
    async with opened(left, SMALL) as state:
        assert await everything(state) == before
        assert (await state.stats()).disk.damages == 0
        await abandon(state)


async def test_a_segment_that_was_cut_to_its_header_is_damage_all_the_same() -> None:
    files = MemoryFiles()
    async with opened(files, SMALL) as state:
        for number in range(30):
            await state.create_session(session_id=f"s{number}", data={"x": bytes(6000)})
        await abandon(state)
    files = files.after_kill()
    path = f"{PATH}/{segment_name(2)}"
    files.set_data(path, files.data(path)[:64])
    for name in list(files.contents(PATH)):
        if name.endswith(".hint"):
            files.delete(name)
    async with opened(files, SMALL) as state:
        assert (await state.stats()).disk.damages > 0
        await abandon(state)


async def test_a_listing_without_descriptors_leaves_nobody_out() -> None:
    files = MemoryFiles()
    async with opened(files, SMALL) as state:
        for number in range(20):
            await state.create_session(session_id=f"s{number}", data={"x": bytes(6000)})
    files = files.after_kill()
    async with opened(files, SMALL) as state:  # no segment is open for reading yet
        files.faults.append(fail(errno.EMFILE, "open_read", path=".seg", times=None))
        with pytest.raises(errors.DirectoryNotUsable, match="RLIMIT_NOFILE"):
            await state.get_active_sessions()
        files.faults.clear()
        assert len(await state.get_active_sessions()) == 20
        assert (await state.stats()).disk.damages == 0


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
async def test_a_checkpoint_of_a_log_that_cannot_be_read_says_so_in_the_engines_words(
    number: int,
) -> None:
    files = MemoryFiles()
    async with opened(files, SMALL) as state:
        for each in range(20):
            await state.create_session(session_id=f"s{each}", data={"x": bytes(6000)})
        await state._disk.compactor.settle()
        files.faults.append(fail(number, "open_read", path=".hint"))
        with pytest.raises(errors.DirectoryNotUsable, match="no checkpoint was made"):
            await state.create_checkpoint()
        info = await state.create_checkpoint()
        assert info.sessions == 20


async def test_a_rotation_without_descriptors_is_said_not_to_have_happened() -> None:
    files = MemoryFiles()
    async with opened(files, SMALL) as state:
        await state.create_session(session_id="s", data={"x": bytes(60_000)})
        fail_new_names(files, errno.EMFILE)
        with pytest.raises(errors.DirectoryNotUsable, match="RLIMIT_NOFILE"):
            await state.create_session(session_id="t", data={"x": bytes(60_000)})


async def test_a_disk_without_inodes_is_left_from_inside() -> None:
    """The reserve holds one inode. It went to the segment of the tombstones, and none was left for
    the manifest that would have let the dead segments go.
    """
    files = MemoryFiles()
    async with opened(files, SMALL) as state:
        created = []
        files.most_files = 22
        with suppress(errors.DiskFull):
            for number in range(500):
                data = {"x": Random(number).randbytes(6000)}
                created.append(await state.create_session(data=data))
        assert 20 < len(created) < 500
        for session_id in created[: len(created) // 2]:
            assert await state.terminate_session(session_id)
        await state.compact()
        created = created[len(created) // 2 :]
        for number in range(20):
            data = {"x": Random(number).randbytes(6000)}
            created.append(await state.create_session(data=data))
        assert sorted(await everything(state)) == sorted(created)
        assert f"{PATH}/MANIFEST.bak" in files.contents()
        assert f"{PATH}/RESERVE" in files.contents()


def die_behind(files: MemoryFiles, is_it: Callable[[Call], bool]) -> None:
    """Let the process die at the first call behind this one: no sync makes it durable any more."""
    is_next = False

    def fault(files: MemoryFiles, call: Call) -> None:
        nonlocal is_next
        if is_next:
            files.kill()
            raise Killed(str(call))
        is_next = is_it(call)

    files.faults.append(fault)


@pytest.fixture
def same_each_time() -> Iterator[None]:
    """Without threads."""
    with stepped():
        yield


@pytest.mark.usefixtures("same_each_time")
async def test_what_a_merge_replaced_is_not_removed_too_early() -> None:
    """Killed behind the manifest's rename, killed again behind the first removal, power lost."""
    files = MemoryFiles()
    async with opened(files, SMALL) as state:
        for number in range(60):
            data = {"n": number, "x": bytes([number]) * 6000}
            await state.create_session(session_id=f"s{number}", data=data)
        await state.compact()
        before = await everything(state)

        def drops_segments(call: Call) -> bool:
            if call.operation != "rename" or call.target != f"{PATH}/MANIFEST":
                return False
            return b'"dropped": []' not in files.data(call.path)

        die_behind(files, drops_segments)
        in_doubt = ""
        for number in range(0, 60, 2):
            try:
                await state.terminate_session(f"s{number}")
            except (Killed, errors.PersistenceError):
                in_doubt = f"s{number}"
                break
            del before[f"s{number}"]
        with suppress(Killed, errors.PersistenceError):
            await state.compact()
        assert files.is_dead, "in the middle of a merge"
        before.pop(in_doubt, None)
        await abandon(state)
    files = files.after_kill()
    die_behind(files, lambda call: call.operation == "remove" and call.path.endswith(".seg"))
    with pytest.raises(Killed):
        async with opened(files, SMALL):
            pass
    damaged = files.after_kill()
    damaged.flip(f"{PATH}/MANIFEST", 99)  # its copy must not name what is gone
    images = [(files.after_power_loss(Random(seed)), 0) for seed in range(20)]
    for image, damages in [(damaged, 1), *images]:
        async with opened(image, SMALL) as state:
            found = await everything(state)
            found.pop(in_doubt, None)
            assert found == before
            assert (await state.stats()).disk.damages == damages
            await abandon(state)


async def test_a_torn_write_is_torn_at_any_byte() -> None:
    """Of the simulated disk itself: a beginning of what was not synced."""
    files = MemoryFiles()
    files.make_directory("/d")
    files.sync_directory("/")
    fd = files.create("/d/f")
    files.write_at(fd, b"abcd", 0)
    files.write_at(fd, b"efgh", 4)
    created, first, second = files.unsynced
    assert files.after_power_loss().contents() == {}
    assert files.after_power_loss(Beginning(created)).contents() == {"/d/f": b""}
    assert files.after_power_loss(Beginning(first, 0.5)).contents() == {"/d/f": b"ab"}
    assert files.after_power_loss(Beginning(second, 0.25)).contents() == {"/d/f": b"abcde"}


async def test_a_restore_whose_outcome_is_unknown_leaves_the_old_state_or_the_new_one() -> None:
    """The staged segments were removed, though the manifest that names them was there already."""
    before = {f"s{number}": {"x": bytes(2000)} for number in range(4)}
    unknown = 0
    for nth in range(1, 30):
        files = MemoryFiles()
        async with opened(files, SMALL) as state:
            for sid, data in before.items():
                await state.create_session(session_id=sid, data=data)
            await state.create_checkpoint()
            await state.create_session(session_id="later", data={"x": 1})
            files.faults.append(fail(errno.EIO, {"sync", "sync_data", "sync_directory"}, nth=nth))
            try:
                await state.restore_checkpoint()
            except errors.WriteOutcomeUnknown:
                unknown += 1
            except errors.PersistenceError:
                pass
            await abandon(state)
        for left in (
            files.after_kill(),
            files.after_power_loss(),
            files.after_power_loss(Random(nth)),
        ):
            async with opened(left, SMALL) as state:
                assert await everything(state) in (before, {**before, "later": {"x": 1}})
                assert state._disk.damages == []
    assert unknown > 1, "of some nobody knows"


async def test_no_segment_outlives_a_manifest_whose_name_was_never_synced() -> None:
    """Openings whose syncs of the directory failed, then a power loss: it was refused."""
    files = MemoryFiles()
    files.faults.append(fail(errno.EIO, "sync_directory", times=None))
    for _ in range(3):
        with suppress(errors.DirectoryNotUsable, errors.WriteOutcomeUnknown):
            async with opened(files, SMALL) as state:
                await state.create_session(session_id="s", data={})
    for seed in range(100):
        async with opened(files.after_power_loss(Random(seed)), SMALL) as state:
            assert await everything(state) == {}


async def test_the_name_of_a_new_directory_is_synced_by_the_opening_that_succeeds() -> None:
    """The first opening failed between the manifest and that; the second one left it out."""
    files = MemoryFiles()
    synced: list[str] = []

    def fail_once(_: MemoryFiles, call: Call) -> None:
        if call.operation == "sync_directory":
            synced.append(call.path)
            if synced.count(PATH) == 2 and call.path != PATH:
                raise OSError(errno.EIO, os.strerror(errno.EIO), call.path)

    files.faults.append(fail_once)
    with pytest.raises(errors.DirectoryNotUsable):
        async with opened(files, SMALL):
            pass
    synced.clear()
    async with opened(files, SMALL):
        assert os.path.dirname(PATH) in synced


async def test_a_manifest_of_nonsense_with_a_right_checksum_is_refused_as_damaged() -> None:
    """It ended with a bare error of the decoder of JSON, or of numbers."""
    for body in (
        b"\x80",
        b'{"format_version": "x"}',
        b'{"format_version": 1e999}',
        b'{"format_version": ' + b"9" * 5000 + b"}",
    ):
        with pytest.raises(MalformedManifest):
            decode_manifest(body + b"\n%08x\n" % crc32c(body))


def test_a_record_whose_names_are_no_names_is_malformed() -> None:
    """Of an unhashable key in them nothing was promised."""
    record = rec.assemble(
        incarnation=b"i" * 16,
        commit=b"c" * 16,
        version=1,
        created=0.0,
        ttl_seconds=0.0,
        flags=0,
        user=0,
        meta=b"",
        fields={"abcd": b"\x01"},
    )
    at = record.index(b"\xa4abcd")
    with pytest.raises(rec.MalformedValue):
        rec.validate(record[:at] + b"\x81\x91\x00\x00\x00" + record[at + 5 :])


async def test_what_has_ended_while_the_record_of_checkpoints_could_not_be_read_stays_ended() -> (
    None
):
    """The life in which it can be read again makes an increment, which needs the tombstone."""
    with stepped():
        files = MemoryFiles()
        async with opened(files, SMALL) as state:
            for name in ("stays", "ends"):
                await state.create_session(session_id=name, data={"x": 1})
            await state.create_checkpoint()
        files = files.after_kill()
        files.faults.append(fail(errno.EMFILE, "open_read", path=SHIPPED))
        async with opened(files, SMALL) as state:
            await state.terminate_session("ends")
            for _ in range(30):  # over a segment, so that the tombstone's is merged
                await state.update_session_data("stays", "x", bytes(6000))
            await state.compact()
        async with opened(files.after_kill(), SMALL) as state:
            assert (await state.create_checkpoint()).kind == "incremental"
            await state.restore_checkpoint()
            assert await everything(state) == {"stays": {"x": bytes(6000)}}
