from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from crc32c import crc32c

from persistence import ManualClock, StateManager, errors
from persistence.disk.filenames import segment_name
from persistence.disk.files import Files
from persistence.disk.format import (
    FORMAT_VERSION,
    PATCHES_VERSION,
    SEGMENT_HEADER_BYTES,
    OtherFormat,
)
from persistence.disk.manifest import (
    MalformedManifest,
    Manifest,
    decode_manifest,
    encode_manifest,
)
from tests.disk.memoryfiles import MUTATING, MemoryFiles, fail
from tests.support import PATH, Points, Sampled, abandon, config, everything, opened

MANIFEST: Final = f"{PATH}/MANIFEST"
COPY: Final = f"{PATH}/MANIFEST.bak"
DATA: Final = {f"s{number}": {"n": number, "x": "x" * 6000} for number in range(30)}
OPENING: Final = MUTATING | {
    "list_directory",
    "open_read",
    "open_write",
    "lock",
    "size",
    "exists",
    "read_at",
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
async def files() -> MemoryFiles:
    """A directory with some sessions in several segments, closed."""
    made = MemoryFiles()
    async with opened(made, config(segment_bytes=64 * 1024, compression="none")) as state:
        for sid, data in DATA.items():
            await state.create_session(session_id=sid, data=data)
    return made.after_kill()


async def refusal(files: Files, path: str = PATH) -> errors.PersistenceError:
    """Try to open the directory; return the error, which must name it."""
    with pytest.raises(errors.PersistenceError) as caught:
        await StateManager(config=config(path), files=files).open()
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


async def assert_refused(
    files: MemoryFiles, kind: type[errors.PersistenceError], words: str
) -> None:
    """The directory is refused with that error, and not one byte of the disk is changed."""
    before = files.contents()
    files.calls.clear()
    error = await refusal(files)
    assert type(error) is kind
    assert words in str(error)
    assert files.contents() == before
    assert [str(call) for call in files.calls if call.operation != "sync_directory"] == []
    assert files.open_files == []


# Locked


async def test_a_second_manager_of_the_same_process_is_refused(files: MemoryFiles) -> None:
    async with opened(files) as state:
        before = files.contents()
        error = await refusal(files)
        assert type(error) is errors.DirectoryLocked
        assert "in use" in str(error)
        assert files.contents() == before
        assert await everything(state) == DATA
    async with opened(files) as state:
        assert await everything(state) == DATA


HOLDER = """
import asyncio, sys
from persistence import DiskConfig, StateConfig, StateManager

async def main():
    async with StateManager(config=StateConfig(disk=DiskConfig(path=sys.argv[1]))) as state:
        await state.create_session(session_id="held", data={"by": "another process"})
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


def held_by_another_process(path: str) -> subprocess.Popen[bytes]:
    """Start a process that opens the directory and holds it until its standard input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def listing(path: str | Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in Path(path).iterdir() if item.is_file()}


@pytest.mark.parametrize("end", ["close", "kill"])
async def test_a_second_process_is_refused_until_the_first_has_ended(
    tmp_path: Path, end: str
) -> None:
    path = str(tmp_path / "state")
    holder = held_by_another_process(path)
    assert holder.stdin is not None
    assert holder.stdout is not None
    with holder, holder.stdin, holder.stdout:
        assert await asyncio.to_thread(holder.stdout.readline) == b"ready\n"
        before = listing(path)
        error = await refusal(Files(), path)
        assert type(error) is errors.DirectoryLocked
        assert listing(path) == before
        if end == "kill":
            holder.send_signal(signal.SIGKILL)
        holder.stdin.close()
        await asyncio.to_thread(holder.wait)
    async with opened(Files(), config(path)) as state:
        assert await everything(state) == {"held": {"by": "another process"}}


async def test_the_lock_is_given_back_when_opening_fails(files: MemoryFiles) -> None:
    good = files.data(MANIFEST)
    files.set_data(MANIFEST, b"")
    files.set_data(COPY, b"")
    await refusal(files)
    files.set_data(MANIFEST, good)
    async with opened(files) as state:
        assert await everything(state) == DATA


# Not ours, or not for us


def stamped(body: bytes) -> bytes:
    return body + b"\n%08x\n" % crc32c(body)


def manifest_with(files: MemoryFiles, **changes: Any) -> bytes:
    """Return the manifest with other entries and the right checksum; None: without that entry."""
    entries = json.loads(files.data(MANIFEST).split(b"\n")[0]) | changes
    kept = {key: value for key, value in entries.items() if value is not None}
    return stamped(json.dumps(kept).encode())


@pytest.mark.parametrize(
    ("version", "advice"),
    [(PATCHES_VERSION + 1, "use a newer version"), (FORMAT_VERSION - 1, "export with")],
)
async def test_a_manifest_of_another_version_is_refused(
    files: MemoryFiles, version: int, advice: str
) -> None:
    files.set_data(MANIFEST, manifest_with(files, format_version=version, new_things=[1]))
    known = f"{FORMAT_VERSION} and {PATCHES_VERSION}"
    words = f"format version {version}; this library reads {known}: {advice}"
    await assert_refused(files, errors.DirectoryNotUsable, words)


@pytest.mark.parametrize("number", [1, 2, 3])
async def test_a_segment_of_a_newer_version_is_refused(files: MemoryFiles, number: int) -> None:
    path = f"{PATH}/{segment_name(number)}"
    data = bytearray(files.data(path))
    data[8:12] = (FORMAT_VERSION + 1).to_bytes(4, "little")
    end = SEGMENT_HEADER_BYTES
    data[end - 4 : end] = crc32c(bytes(data[: end - 4])).to_bytes(4, "little")
    files.set_data(path, bytes(data))
    await assert_refused(files, errors.DirectoryNotUsable, segment_name(number))


async def test_a_segment_of_another_directory_is_refused(files: MemoryFiles) -> None:
    other = MemoryFiles()
    async with opened(other) as state:
        await state.create_session(session_id="stranger")
    name = segment_name(1)
    files.set_data(f"{PATH}/{segment_name(1)}", other.data(f"{PATH}/{name}"))
    await assert_refused(files, errors.DirectoryNotUsable, "another directory")


async def test_segments_without_a_manifest_are_refused(files: MemoryFiles) -> None:
    files.delete(MANIFEST)
    files.delete(COPY)
    await assert_refused(files, errors.DirectoryNotUsable, "no MANIFEST")
    files.delete(f"{PATH}/LOCK")
    await assert_refused(files, errors.DirectoryNotUsable, "no MANIFEST")


@pytest.mark.parametrize("name", ["thesis.doc", "0000000001.seg.bak", "1.seg", "subfolder/file"])
async def test_a_directory_with_files_of_somebody_else_is_refused(name: str) -> None:
    files = MemoryFiles()
    files.set_data(f"{PATH}/{name}", b"theirs")
    await assert_refused(files, errors.DirectoryNotUsable, "other files")


async def test_files_of_somebody_else_in_a_directory_of_ours_are_left_alone(
    files: MemoryFiles,
) -> None:
    theirs = {f"{PATH}/notes.txt": b"a", f"{PATH}/mine.tmp": b"b", f"{PATH}/sub/x.seg": b"c"}
    for path, data in theirs.items():
        files.set_data(path, data)
    async with opened(files) as state:
        assert await everything(state) == DATA
        await state.compact()
    assert {path: files.data(path) for path in theirs} == theirs


async def test_an_empty_directory_and_one_with_half_a_beginning_are_taken() -> None:
    for leftovers in ([], ["LOCK"], ["LOCK", "MANIFEST.tmp"]):
        files = MemoryFiles()
        files.make_directory(PATH)
        for name in leftovers:
            files.set_data(f"{PATH}/{name}", b"half" if "tmp" in name else b"")
        async with opened(files) as state:
            assert await everything(state) == {}
            await state.create_session(session_id="s")


# A damaged manifest


def damage_manifest(files: MemoryFiles) -> None:
    files.flip(MANIFEST, 8 * 40)


def lose_manifest(files: MemoryFiles) -> None:
    files.delete(MANIFEST)


@pytest.mark.parametrize("hurt", [damage_manifest, lose_manifest])
@pytest.mark.parametrize("end", ["close", "kill"])
async def test_the_copy_of_a_damaged_manifest_is_used_and_says_so_once(
    files: MemoryFiles, hurt: Callable[[MemoryFiles], None], end: str
) -> None:
    if end == "kill":
        files.delete(f"{PATH}/INDEX")
    good = files.data(MANIFEST)
    assert files.data(COPY) == good
    hurt(files)
    async with opened(files) as state:
        assert await everything(state) == DATA
        [damage] = state._disk.damages
        assert (damage.path, damage.offset) == (MANIFEST, 0)
        assert "MANIFEST.bak was used" in damage.reason
        assert files.data(MANIFEST) == files.data(COPY)
        await abandon(state)
    async with opened(files.after_kill()) as state:
        assert await everything(state) == DATA
        assert state._disk.damages == []


async def test_an_old_copy_is_brought_up_to_date_before_anything_is_removed(
    files: MemoryFiles,
) -> None:
    """A crash came between the manifest and its copy."""
    old = files.data(COPY)
    async with opened(files) as state:
        for sid in list(DATA)[:20]:
            await state.terminate_session(sid)
        await state.compact()
        await abandon(state)
    files = files.after_kill()
    current = files.data(MANIFEST)
    assert current != old
    files.set_data(COPY, old)
    async with opened(files) as state:
        names = [str(call) for call in files.calls]
        if any(name.endswith(".seg") and name.startswith("remove") for name in names):
            removal = next(n for n, name in enumerate(names) if name.startswith("remove 00"))
            assert names.index("rename MANIFEST.bak.tmp MANIFEST.bak") < removal
        assert files.data(COPY) == files.data(MANIFEST)
        await abandon(state)


async def test_a_copy_that_cannot_be_written_is_removed(files: MemoryFiles) -> None:
    files.faults.append(fail(errno.EIO, "rename", path="MANIFEST.bak", times=None))
    async with opened(files) as state:
        await state.create_session(session_id="new")
    assert COPY not in files.contents()
    async with opened(files.after_kill()) as state:
        assert len(await everything(state)) == len(DATA) + 1
        assert state._disk.damages == []


async def test_any_flipped_bit_in_both_manifests_is_refused(files: MemoryFiles) -> None:
    good = files.data(MANIFEST)
    chance = random.Random(1)
    for bit in chance.sample(range(8 * len(good)), 60):
        for path in (MANIFEST, COPY):
            files.set_data(path, good)
            files.flip(path, bit)
        await assert_refused(files, errors.DirectoryNotUsable, "is damaged")


def test_no_flipped_bit_and_no_cut_in_a_manifest_goes_unnoticed() -> None:
    good = encode_manifest(Manifest(bytes(16), bytes(16), frozenset({1, 2}), frozenset({3}), 4))
    for bit in range(8 * len(good)):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(MalformedManifest):
            decode_manifest(bytes(damaged))
    for end in range(len(good)):
        with pytest.raises(MalformedManifest):
            decode_manifest(good[:end])
    with pytest.raises(MalformedManifest):
        decode_manifest(good + b"\n")


def test_a_manifest_comes_back() -> None:
    manifest = Manifest(os.urandom(16), os.urandom(16), frozenset({1, 5}), frozenset({2}), 9)
    assert decode_manifest(encode_manifest(manifest)) == manifest


def test_a_newer_manifest_is_told_from_a_damaged_one() -> None:
    body = json.dumps({"what": "persistence directory", "format_version": 99}).encode()
    with pytest.raises(OtherFormat):
        decode_manifest(stamped(body))


@pytest.mark.parametrize(
    "change",
    [
        lambda files: b"",
        lambda files: files.data(MANIFEST)[:-10],
        lambda files: b"not json at all",
        lambda files: stamped(b"not json at all"),
        lambda files: stamped(b"[1, 2]"),
        lambda files: stamped(b"null"),
        lambda files: stamped(b"\xff\xfe"),
        lambda files: stamped(b"[" * 100_000),
        lambda files: manifest_with(files, what="something else"),
        lambda files: manifest_with(files, sealed=None),
        lambda files: manifest_with(files, sealed="all"),
        lambda files: manifest_with(files, sealed=[[]]),
        lambda files: manifest_with(files, next_number="x"),
        lambda files: manifest_with(files, next_number=-1),
        lambda files: manifest_with(files, sealed=[-4]),
        lambda files: manifest_with(files, sealed=[2**70]),
        lambda files: manifest_with(files, format_version="new"),
        lambda files: manifest_with(files, directory_id="xyz"),
        lambda files: manifest_with(files, directory_id="00"),
        lambda files: manifest_with(files, fingerprint_key="ab"),
        lambda files: manifest_with(files, fingerprint_key=5),
    ],
)
async def test_a_manifest_that_makes_no_sense_is_refused(
    files: MemoryFiles, change: Callable[[MemoryFiles], bytes]
) -> None:
    data = change(files)
    files.set_data(MANIFEST, data)
    files.set_data(COPY, data)
    await assert_refused(files, errors.DirectoryNotUsable, "is damaged")


# What the system refuses


async def test_a_file_in_the_place_of_the_directory_is_refused() -> None:
    files = MemoryFiles()
    files.set_data(PATH, b"a file")
    await assert_refused(files, errors.DirectoryNotUsable, "not a directory")


@pytest.mark.parametrize("name", ["INDEX", "INDEX.tmp", "0000000099.hint", "0000000001.hint.tmp"])
async def test_a_directory_in_the_place_of_a_cache_keeps_nobody_from_his_sessions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.WARNING, logger="persistence.recovery")
    configuration = config(str(tmp_path / "state"))
    for life in range(3):
        async with StateManager(config=configuration) as state:
            assert set(await state.get_active_sessions()) == {f"s{each}" for each in range(life)}
            await state.create_session(session_id=f"s{life}")
        if not life:
            in_the_way = tmp_path / "state" / name
            in_the_way.unlink(missing_ok=True)
            in_the_way.mkdir()
    assert f"{name}: a directory is in the place of this file" in caplog.text
    assert in_the_way.is_dir()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("0000000099.seg", "a link that leads nowhere"),
        ("ROTATIONS", "a link that leads nowhere"),
        ("LOCK", "a directory is in the place of this file"),
        ("MANIFEST.tmp", "a directory is in the place of this file"),
    ],
)
async def test_what_is_in_the_place_of_a_file_is_named_with_the_way_out(
    tmp_path: Path, name: str, what: str
) -> None:
    configuration = config(str(tmp_path / "state"))
    async with StateManager(config=configuration) as state:
        await state.create_session(session_id="s")
    in_the_way = tmp_path / "state" / name
    in_the_way.unlink(missing_ok=True)
    if "link" in what:
        in_the_way.symlink_to(tmp_path / "gone" / "file")
    else:
        in_the_way.mkdir()
    with pytest.raises(errors.DirectoryNotUsable, match=f"{name}.*{what}.*move it away"):
        await StateManager(config=configuration).open()
    in_the_way.rmdir() if in_the_way.is_dir() else in_the_way.unlink()
    async with StateManager(config=configuration) as state:
        assert await state.has_session("s")


@pytest.mark.parametrize("name", ["MANIFEST", segment_name(1)])
@pytest.mark.parametrize("put_there", [os.mkdir, os.mkfifo])
async def test_what_is_no_file_in_the_place_of_one_is_refused_by_name(
    tmp_path: Path, name: str, put_there: Callable[[Path], None]
) -> None:
    directory = str(tmp_path / "state")
    async with StateManager(config=config(directory)) as state:
        await state.create_session()
    os.unlink(f"{directory}/{name}")
    put_there(tmp_path / "state" / name)

    async with asyncio.timeout(30):  # the opening of a named pipe could wait for ever
        error = await refusal(Files(), directory)
    assert isinstance(error, errors.DirectoryNotUsable)
    assert f"'{name}': " in str(error)


async def test_a_directory_may_be_a_thousand_levels_below_one_that_is_there(
    tmp_path: Path,
) -> None:
    directory = str(tmp_path) + "/d" * 1200
    async with StateManager(config=config(directory)) as state:
        await state.create_session(session_id="s")
    async with StateManager(config=config(directory)) as state:
        assert await state.has_session("s")
    # Not left to pytest, whose way of removing it is recursive as well.
    await (await asyncio.create_subprocess_exec("rm", "-rf", tmp_path / "d")).wait()


async def test_a_directory_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a file")
    for path in (tmp_path / "file", tmp_path / "file" / "state"):
        error = await refusal(Files(), str(path))
        assert type(error) is errors.DirectoryNotUsable
        assert "not a directory" in str(error)
    assert (tmp_path / "file").read_bytes() == b"a file"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EPERM, "permission denied"),
        (errno.EIO, "Input/output error"),
    ],
)
async def test_a_directory_that_nothing_can_be_written_to_is_refused(
    files: MemoryFiles, number: int, words: str
) -> None:
    killed = files.after_kill()
    killed.delete(f"{PATH}/INDEX")
    for disk in (files, killed, MemoryFiles()):
        disk.faults.append(fail(number, MUTATING | {"open_write"}, times=None))
        await assert_refused(disk, errors.DirectoryNotUsable, words)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
async def test_a_real_directory_without_permission_to_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.mkdir(mode=0o500)
    error = await refusal(Files(), str(path))
    assert type(error) is errors.DirectoryNotUsable
    assert list(path.iterdir()) == []


async def test_too_many_open_files_are_named_as_the_reason(files: MemoryFiles) -> None:
    files.faults.append(fail(errno.EMFILE, {"open_read", "open_write"}, times=None))
    await assert_refused(files, errors.DirectoryNotUsable, "RLIMIT_NOFILE")


async def test_a_full_disk_refuses_a_new_directory_and_takes_it_when_there_is_space() -> None:
    files = MemoryFiles()
    files.free_bytes = 10
    error = await refusal(files)
    assert type(error) is errors.DiskFull
    assert "free some space" in str(error)
    files.free_bytes = None
    async with opened(files) as state:
        await state.create_session(session_id="s")


async def test_a_closed_directory_opens_on_a_full_disk_and_is_read(files: MemoryFiles) -> None:
    for delete in ([], ["INDEX"]):
        disk = files.after_kill()
        for name in delete:
            disk.delete(f"{PATH}/{name}")
        disk.free_bytes = 0
        async with opened(disk) as state:
            assert await everything(state) == DATA
            await abandon(state)


@pytest.mark.parametrize("has_reserve", [True, False])
async def test_a_killed_directory_on_a_full_disk_is_read_and_written_on_when_there_is_space(
    *, has_reserve: bool
) -> None:
    files = MemoryFiles()
    async with opened(files) as state:
        await state.create_session(session_id="s", data={"n": 1})
        await abandon(state)
    files = files.after_kill()
    if not has_reserve:
        files.delete(f"{PATH}/RESERVE")
    for again in range(2):
        files.free_bytes = 20  # the last segment has to be sealed
        async with opened(files) as state:
            assert await everything(state) == {"s": {"n": 1}}
            assert state._disk.damages == []
            with pytest.raises(errors.DiskFull):
                await state.create_session(session_id="t", data={"x": os.urandom(100_000)})
            assert not (await state.stats()).disk.takes_writes
            if again:
                files.free_bytes = None
                await state.create_session(session_id="t", data={"n": 2})
                await abandon(state)
        files = files.after_kill()
    async with opened(files) as state:
        assert await everything(state) == {"s": {"n": 1}, "t": {"n": 2}}
        assert state._disk.damages == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EROFS])
@pytest.mark.parametrize("kind", ["new", "closed", "killed"])
async def test_whichever_call_of_an_opening_fails_the_error_is_typed_and_nothing_is_lost(
    files: MemoryFiles, kind: str, number: int, points: Points
) -> None:
    before = {"new": MemoryFiles(), "closed": files, "killed": files.after_kill()}[kind]
    if kind == "killed":
        for name in ("INDEX", "0000000003.hint"):
            before.delete(f"{PATH}/{name}")
    expected = {} if kind == "new" else DATA
    for nth in points(1):
        assert nth < 300, "an opening makes fewer calls than that"
        disk = before.after_kill()
        disk.faults.append(fail(number, OPENING, nth=nth))
        state = StateManager(config=config(), files=disk, clock=ManualClock())
        try:
            await state.open()
        except errors.PersistenceError as error:
            assert type(error) in (errors.DirectoryNotUsable, errors.DiskFull)  # noqa: PT017
            assert disk.open_files == []
        else:
            assert await everything(state) == expected, "a fault that does no harm"
            await abandon(state)
        again = disk.after_kill()
        async with opened(again) as state:
            assert await everything(state) == expected
            assert state._disk.damages == []
            await abandon(state)
        if not any(fault_was_reached(fault) for fault in disk.faults):
            return


def fault_was_reached(fault: Callable[..., Any]) -> bool:
    """Whether the call that a `fail` waits for has come."""
    cells = dict(zip(fault.__code__.co_freevars, fault.__closure__ or (), strict=True))
    seen: int = cells["seen"].cell_contents
    nth: int = cells["nth"].cell_contents
    return seen >= nth


# Cancelled while opening


async def test_an_opening_that_is_cancelled_at_any_time_leaves_no_lock_behind(
    files: MemoryFiles, sampled: Sampled
) -> None:
    for steps in sampled(range(60)):
        disk = files.after_kill()
        state = StateManager(config=config(), files=disk)
        opening = asyncio.create_task(state.open())
        for _ in range(steps):
            await asyncio.sleep(0)
        opening.cancel()
        outcome = (await asyncio.gather(opening, return_exceptions=True))[0]
        if outcome is None:
            await state.close()
        else:
            assert isinstance(outcome, asyncio.CancelledError)
        assert disk.open_files == []
        async with opened(disk) as state:
            assert await everything(state) == DATA
            await abandon(state)


# A relative path


@pytest.mark.parametrize("has_another", [False, True])
async def test_a_relative_path_means_the_same_directory_after_a_chdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_another: bool
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    relative = config(".persistence", segment_bytes=64 * 1024, compression="none")
    if has_another:
        monkeypatch.chdir(there)
        async with opened(Files(), relative) as state:
            await state.create_session(session_id="theirs", data={"n": 1})
    before = listing(there / ".persistence") if has_another else {}
    monkeypatch.chdir(here)
    async with opened(Files(), relative) as state:
        monkeypatch.chdir(there)
        for sid, data in DATA.items():
            await state.create_session(session_id=sid, data=data)
            await state.spill_session(sid)
        await state.terminate_session("s0")
        await state.compact()
        assert len(await everything(state)) == len(DATA) - 1
    if has_another:
        assert listing(there / ".persistence") == before
    else:
        assert list(there.iterdir()) == []
    monkeypatch.chdir(here)
    async with opened(Files(), relative) as state:
        assert await everything(state) == {sid: DATA[sid] for sid in DATA if sid != "s0"}


# What it looks like on a real disk


async def test_the_directory_and_its_files_are_private(tmp_path: Path) -> None:
    path = tmp_path / "a" / "state"
    async with opened(Files(), config(str(path), segment_bytes=64 * 1024)) as state:
        for number in range(40):
            await state.create_session(data={"x": os.urandom(4000), "n": number})
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    modes = {item.name: stat.S_IMODE(item.stat().st_mode) for item in path.iterdir()}
    assert {"LOCK", "MANIFEST", "INDEX", segment_name(1), segment_name(2)} <= modes.keys()
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize("name", ["with space", "ünï", "new\nline", "dot.", "[glob]*?", "x" * 200])
async def test_any_name_of_a_directory_will_do(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for expected in ({}, {"s": {"n": 1}}):
        async with opened(Files(), config(f"{path}/")) as state:
            assert await everything(state) == expected
            if not expected:
                await state.create_session(session_id="s", data={"n": 1})


async def test_no_session_id_becomes_part_of_a_file_name(tmp_path: Path) -> None:
    ids = ["../../escape", "a/b", "nul\0", "new\nline", "..", ".", "-rf", "x" * 512, "MANIFEST"]
    path = tmp_path / "state"
    async with opened(Files(), config(str(path))) as state:
        for sid in ids:
            await state.create_session(session_id=sid, data={"id": sid})
    async with opened(Files(), config(str(path))) as state:
        assert await everything(state) == {sid: {"id": sid} for sid in ids}
    assert os.listdir(tmp_path) == ["state"]
    assert listing(path).keys() == {
        "LOCK",
        "MANIFEST",
        "MANIFEST.bak",
        "RESERVE",
        "INDEX",
        "0000000001.seg",
        "0000000001.hint",
    }
