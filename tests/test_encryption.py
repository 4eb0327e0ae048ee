"""Encrypted directories: what is in them, who can open them, and how keys are rotated."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from persistence import ManualClock, SecurityConfig, SessionMetadata, StateManager, errors
from persistence.disk.compactor import Compactor
from persistence.disk.format import Frame, decode_frame, encode_frame
from persistence.disk.inspect import keys_of, scan_directory
from persistence.disk.reader import scan_frames
from persistence.keys import seals_for
from tests.disk.memoryfiles import Killed, MemoryFiles, kill_at
from tests.disk.readonly import StoredRecord, newest_records
from tests.engine import Crash, Start, config_for
from tests.support import abandon, config, everything

KEYS = ["0b" * 32, "5e" * 32, "d1" * 32]
SECRET = "nobody may read this"


def sealed(*keys: str) -> dict[str, Any]:
    return {"encrypt": True, "secret_keys": ",".join(keys)}


def contents(directory: Path) -> dict[str, bytes]:
    return {
        os.path.relpath(path, directory): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


async def fill(state: StateManager, count: int = 40) -> None:
    metadata = SessionMetadata(user_agent=SECRET, attributes={"field of metadata": SECRET})
    for number in range(count):
        await state.create_session(
            "ada lovelace",
            metadata,
            data={"name of field": SECRET, "n": number, "x": SECRET * (number % 3 * 100)},
            session_id=f"s{number}",
        )


async def numbers(state: StateManager) -> dict[str, int]:
    return {sid: data["n"] for sid, data in (await everything(state)).items()}


async def test_nothing_in_an_encrypted_directory_shows_what_is_in_a_session(
    start: Start, tmp_path: Path, crash: Crash
) -> None:
    state = await start(security=sealed(KEYS[0]), disk={"segment_bytes": 65_536})
    await fill(state)
    for number in range(0, 40, 2):
        await state.update_session_data(f"s{number}", "n", -number)
    await state.terminate_session("s1")
    await state.compact()
    crashed = crash(state)
    with next(crashed.glob("*.seg")).open("ab") as file:
        file.write(b"a torn append")
    again = await start(path=crashed, security=sealed(KEYS[0]))
    assert (await numbers(again)).keys() == {f"s{n}" for n in range(40) if n != 1}
    await again.close()
    await state.close()
    for directory in (tmp_path / "state", crashed):
        for name, data in contents(directory).items():
            for word in (SECRET, "name of field", "lovelace", "field of metadata"):
                assert word.encode() not in data, (name, word)


async def test_what_an_encrypted_directory_holds_is_what_was_put_there(
    start: Start, tmp_path: Path
) -> None:
    first = await start(security=sealed(KEYS[0]))
    await fill(first)
    before = await everything(first)
    for sid in before:
        await first.spill_session(sid)
    assert await everything(first) == before
    await first.close()
    second = await start(security=sealed(KEYS[0]))
    assert await everything(second) == before
    assert (await second.find_sessions(user_id="ada lovelace")) != []


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({}, "security.encrypt is off"),
        ({"secret_keys": KEYS[0]}, "security.encrypt is off"),
        (sealed(KEYS[1]), "not among the keys given"),
        (sealed(KEYS[1], KEYS[2]), "not among the keys given"),
    ],
)
async def test_without_its_key_a_directory_is_refused_and_nothing_changes(
    start: Start, tmp_path: Path, given: dict[str, Any], what: str
) -> None:
    state = await start(security=sealed(KEYS[0]))
    await fill(state, 3)
    await state.close()
    before = contents(tmp_path / "state")
    with pytest.raises(errors.DirectoryNotUsable, match=what) as caught:
        await start(security=given)
    assert "nothing was changed" in str(caught.value)
    assert KEYS[0][:8] not in str(caught.value)
    assert contents(tmp_path / "state") == before
    assert await numbers(await start(security=sealed(KEYS[0]))) == {"s0": 0, "s1": 1, "s2": 2}


async def test_a_plain_directory_is_not_opened_as_an_encrypted_one(
    start: Start, tmp_path: Path
) -> None:
    state = await start(security={})
    await fill(state, 3)
    await state.close()
    before = contents(tmp_path / "state")
    with pytest.raises(errors.DirectoryNotUsable, match="not encrypted"):
        await start(security=sealed(KEYS[0]))
    assert contents(tmp_path / "state") == before


async def test_a_key_file_that_is_lost_is_not_made_anew_for_what_it_has_encrypted(
    start: Start, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    security = {"encrypt": True, "key_file": str(file)}
    state = await start(security=security)
    await fill(state, 3)
    await state.close()
    kept = file.read_bytes()
    file.unlink()
    with pytest.raises(errors.ConfigError, match="bring the file back"):
        await start(security=security)
    assert not file.exists()
    file.write_bytes(kept)
    file.chmod(0o600)
    assert await numbers(await start(security=security)) == {"s0": 0, "s1": 1, "s2": 2}


async def test_a_record_that_was_exchanged_is_reported_and_never_returned(
    start: Start, tmp_path: Path
) -> None:
    """Somebody who can write to the directory, and make checksums right, plants old records."""
    state = await start(security=sealed(KEYS[0]))
    for sid in ("a", "b"):
        await state.create_session(session_id=sid, data={"of": sid})
        await state.spill_session(sid)
    [segment] = state._disk.segments.values()
    path = tmp_path / "state" / "0000000001.seg"
    fd = state._disk.files.open_read(str(path))
    frames = list(scan_frames(state._disk.files, fd, segment.length, segment.salt_checksum))
    state._disk.files.close(fd)
    (at_a, a), (_, b) = frames[:2]
    assert isinstance(a, Frame)
    assert isinstance(b, Frame)
    forged = encode_frame(
        segment.salt_checksum,
        a.type,
        a.key,
        b.payload,
        a.sequence,
        0,
        a.incarnation + a.commit + a.base,
        flags=b.flags,
        raw_bytes=b.raw_bytes,
    )
    assert isinstance(decode_frame(forged, 0, segment.salt_checksum), Frame)
    with path.open("r+b") as file:
        file.seek(at_a)
        file.write(forged)
    with pytest.raises(errors.CorruptionError, match="not what this directory's keys"):
        await state.get_session("a")
    session = await state.get_session("b")
    assert session is not None
    assert session["of"] == "b"


# Rotating keys


async def test_an_old_key_is_needed_until_everything_is_sealed_with_the_new_one(
    start: Start, tmp_path: Path
) -> None:
    first = await start(security=sealed(KEYS[0]), disk={"segment_bytes": 65_536})
    await fill(first)
    before = await numbers(first)
    await first.close()
    second = await start(security=sealed(KEYS[0], KEYS[1]), disk={"segment_bytes": 65_536})
    assert await numbers(second) == before
    await second.compact()
    assert await numbers(second) == before
    await second.close()
    [newest] = keys_of(str(tmp_path / "state"))
    third = await start(security=sealed(KEYS[1]))
    assert await numbers(third) == before
    assert third._disk.codec is not None
    assert third._disk.codec.sealer.newest == newest
    await third.close()
    with pytest.raises(errors.DirectoryNotUsable, match=newest.hex()):
        await start(security=sealed(KEYS[0]))


async def test_keys_are_rotated_again_before_the_first_rotation_is_through(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "state"
    count = 0
    with monkeypatch.context() as patch:
        patch.setattr(Compactor, "start", lambda _: None)  # it may be faster than any `stop`
        for last in range(3):
            state = await start(security=sealed(*KEYS[: last + 1]))
            for _ in range(3):
                await state.create_session(session_id=f"s{count}", data={"n": count})
                count += 1
            await state.close()
    assert len(keys_of(str(directory))) >= 2
    state = await start(security=sealed(*KEYS))
    await state.compact()
    assert await numbers(state) == {f"s{n}": n for n in range(count)}
    await state.close()
    assert len(keys_of(str(directory))) == 1
    assert len(await numbers(await start(security=sealed(KEYS[2])))) == count


async def test_a_crash_at_any_call_of_a_key_rotation_loses_nothing() -> None:
    def settings(*keys: str) -> Any:
        return config(segment_bytes=65_536).model_copy(
            update={"security": SecurityConfig(**sealed(*keys))}
        )

    files = MemoryFiles()
    state = StateManager(config=settings(KEYS[0]), clock=ManualClock(), files=files)
    await state.open()
    await fill(state, 60)
    before = await numbers(state)
    await abandon(state)
    files = files.after_kill()
    calls = 0
    for nth in itertools.count(1, 5):
        disk = files.after_kill()
        disk.faults.append(kill_at(nth, (0.0, 0.5, 1.0)[nth % 3]))
        state = StateManager(config=settings(*KEYS[:2]), clock=ManualClock(), files=disk)
        with suppress(errors.PersistenceError, Killed):
            await state.open()
        survived = not disk.is_dead
        if survived:
            await state.compact()
            survived = not disk.is_dead
            await abandon(state)
        for left in (disk.after_kill(), disk.after_power_loss()):
            again = StateManager(config=settings(*KEYS[:2]), clock=ManualClock(), files=left)
            await again.open()
            assert await numbers(again) == before
            assert again._disk.damages == []
            await abandon(again)
        calls = nth
        if survived:
            break
    assert calls > 20, "it died at every fifth call of the opening and the merge"


# Read-only


async def test_a_directory_is_read_without_being_opened(start: Start, tmp_path: Path) -> None:
    state = await start(security=sealed(KEYS[0]))
    await fill(state, 5)
    await state.close()
    path = str(tmp_path / "state")
    seals = seals_for(SecurityConfig(**sealed(KEYS[0])))
    assert seals is not None
    found = list(newest_records(path, seals.records))
    assert {each.session_id for each in found if isinstance(each, StoredRecord)} == {
        f"s{n}" for n in range(5)
    }
    for sealer in (None, seals.records):  # without keys, checksums only
        assert [report.damages for report, _ in scan_directory(path, sealer)] == [[]]
    wrong = seals_for(SecurityConfig(**sealed(KEYS[1])))
    assert wrong is not None
    for sealer in (None, wrong.records):
        with pytest.raises(errors.DirectoryNotUsable):
            list(newest_records(path, sealer))


def test_a_manager_that_does_not_encrypt_loads_nothing_for_it(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys; from persistence import *\n"
        "async def main():\n"
        f"    config = StateConfig(disk=DiskConfig(path={str(tmp_path / 'd')!r}))\n"
        "    async with StateManager(config=config) as state:\n"
        "        await state.create_session()\n"
        "asyncio.run(main())\n"
        "print([name for name in sys.modules if name.startswith('cryptography')])\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_helper_of_the_tests_has_a_configuration_that_can_be_encrypted(tmp_path: Path) -> None:
    assert config_for(tmp_path, security=sealed(KEYS[0])).security.encrypt
