"""The read-only commands, on clean, torn, damaged, open and foreign directories."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from persistence import (
    DiskConfig,
    SecurityConfig,
    ShutdownConfig,
    StateConfig,
    StateManager,
    errors,
)
from persistence.disk.filenames import parse_segment
from persistence.disk.format import FOOTER_BYTES, FORMAT_VERSION
from persistence.disk.journal import MAGIC, encode_entry
from persistence.security.keyring import key_id
from persistence.sharing.conflicts import Conflict
from tests.cli.command import Command
from tests.engine import ScriptedFiles

SESSIONS = 200
KIB = 1024


def config(directory: Path) -> StateConfig:
    return StateConfig(
        disk=DiskConfig(path=str(directory), segment_bytes=64 * KIB, compression="none"),
        shutdown=ShutdownConfig(checkpoint=False),
    )


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("filled") / "state"

    async def fill() -> None:
        async with StateManager(config=config(path), files=ScriptedFiles()) as state:
            for number in range(SESSIONS):
                await state.create_session(session_id=f"s{number}", data={"x": "y" * 600})
            await state.terminate_session("s0")

    asyncio.run(fill())
    return path


@pytest.fixture(scope="module")
def filled_and_killed(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    add_one(Path(shutil.copytree(filled, folder / "closed")), copy=folder / "state")
    return folder / "state"


@pytest.fixture
def directory(filled: Path, tmp_path: Path) -> Path:
    """Several segments with sessions, one of them terminated."""
    return Path(shutil.copytree(filled, tmp_path / "state"))


def segments(directory: Path) -> list[Path]:
    """Return the segments' paths, the oldest first."""
    return sorted(path for path in directory.iterdir() if parse_segment(path.name) is not None)


def files_of(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in directory.iterdir()
        if path.is_file()
    }


def flip(path: Path, needle: bytes) -> int:
    """Flip a bit of `needle` in the file; return where."""
    data = bytearray(path.read_bytes())
    at = data.index(needle)
    data[at] ^= 1
    path.write_bytes(bytes(data))
    return at


def test_inspect_counts_what_is_there(command: Command, directory: Path) -> None:
    result = command("inspect", directory, "--json")
    assert result.code == 0
    summary = result.json
    assert summary["live_sessions"] == SESSIONS - 1
    assert summary["deletes"] == 1
    assert summary["puts"] >= SESSIONS - 1
    assert summary["segments"] == len(segments(directory)) > 2
    assert summary["bytes"] == sum(path.stat().st_size for path in segments(directory))
    assert summary["live_bytes"] + summary["dead_bytes"] == summary["bytes"]
    assert summary["live_bytes"] > 600 * (SESSIONS - 1)
    assert summary["format_version"] == FORMAT_VERSION
    assert (summary["damages"], summary["torn_bytes"]) == (0, 0)
    assert summary["is_open_elsewhere"] is False
    table = command("inspect", directory)
    assert table.code == 0
    assert f"{SESSIONS - 1}" in table.out


def test_inspect_counts_what_the_shared_tier_refused(command: Command, directory: Path) -> None:
    assert command("inspect", directory, "--json").json["conflicts"] == 0
    assert "CONFLICT" not in command("inspect", directory).out
    its_id = bytes.fromhex(
        json.loads((directory / "MANIFEST").read_text().splitlines()[0])["directory_id"]
    )
    refused = b"".join(encode_entry(its_id, data) for data in (b"one", b"two"))
    (directory / "CONFLICTS").write_bytes(MAGIC + its_id + refused)
    assert command("inspect", directory, "--json").json["conflicts"] == 2
    assert "CONFLICT RECORDS" in command("inspect", directory).out


def test_inspect_names_the_keys_of_what_the_shared_tier_refused(
    command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "state"

    async def refuse(*keys: str) -> None:
        settings = config(path).model_copy(
            update={"security": SecurityConfig(encrypt=True, secret_keys=",".join(keys))}
        )
        async with StateManager(config=settings, files=ScriptedFiles()) as state:
            await state.get_or_create_session("a", data={})
            await state.compact()
            if len(keys) == 1:
                await state._tiers._conflicts.keep(Conflict("b", 0.0, b"whole", b"", 1, False))

    keys = ["0b" * 32, "5e" * 32]
    ids = [key_id(bytes.fromhex(key)).hex() for key in keys]
    asyncio.run(refuse(keys[0]))
    assert command("inspect", path, "--json").json["keys"] == ids[:1]
    asyncio.run(refuse(*keys))
    assert command("inspect", path, "--json").json["keys"] == ids, "CONFLICTS needs the older one"
    (path / "CONFLICTS").unlink()
    assert command("inspect", path, "--json").json["keys"] == ids[1:]


def test_a_restore_that_was_cut_short_is_no_damage(command: Command, directory: Path) -> None:
    (directory / "RESTORING").write_bytes(MAGIC + bytes(16) + encode_entry(bytes(16), bytes(9)))
    assert command("inspect", directory, "--json").json["damages"] == 0
    assert command("verify", directory, "--json").json["damages"] == []
    assert (directory / "RESTORING").exists()


def test_verify_of_a_clean_directory_is_intact(command: Command, directory: Path) -> None:
    result = command("verify", directory, "--json")
    assert result.code == 0
    assert result.json["damages"] == []
    assert result.json["frames"] >= SESSIONS
    assert command("verify", directory).out.startswith("Intact: ")


def test_neither_changes_anything(command: Command, directory: Path) -> None:
    before = files_of(directory)
    for words in (["inspect"], ["verify"]):
        command(*words, directory)
        assert files_of(directory) == before


def test_damage_is_listed_with_file_offset_session_and_reason(
    command: Command, directory: Path
) -> None:
    hurt = segments(directory)[0]
    data = hurt.read_bytes()
    at = data.index(b"y" * 600, data.index(b"s7"))
    data = data[: at + 300] + b"Z" + data[at + 301 :]
    hurt.write_bytes(data)
    result = command("verify", directory, "--json")
    assert result.code == 1
    (damage,) = result.json["damages"]
    assert damage["path"].endswith(hurt.name)
    assert 0 < damage["offset"] < at
    assert damage["session_id"] == "s7"
    assert damage["reason"]
    told = command("verify", directory)
    assert told.code == 1
    assert f"{hurt.name} at offset {damage['offset']}, session 's7'" in told.out
    assert "DAMAGED in 1 places" in told.out
    assert command("inspect", directory, "--json").json["damages"] == 1


def test_the_space_that_is_left_is_told(command: Command, directory: Path) -> None:
    report = command("inspect", directory, "--json").json
    assert report["free_bytes"] > 0
    assert report["is_writable"] is True
    assert "free space" in command("inspect", directory).out


def add_one(directory: Path, *, copy: Path | None = None) -> None:
    """Add a session; with `copy`, keep the directory as a kill right after that would leave it."""

    async def add() -> None:
        async with StateManager(config=config(directory), files=ScriptedFiles()) as state:
            await state.create_session(session_id="torn", data={"x": "y" * 600})
            if copy is not None:
                shutil.copytree(directory, copy)

    asyncio.run(add())


def cut_last_record(directory: Path) -> None:
    last = segments(directory)[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[: whole.index(b"torn") + 100])


def test_a_torn_tail_is_told_and_no_damage(
    command: Command, directory: Path, tmp_path: Path
) -> None:
    add_one(directory, copy=tmp_path / "killed")
    directory = tmp_path / "killed"
    cut_last_record(directory)
    result = command("verify", directory)
    assert result.code == 0, result.out
    assert "Torn tail" in result.out
    assert "Intact" in result.out
    assert command("verify", directory, "--json").json["torn_bytes"] > 0
    assert command("inspect", directory, "--json").json["torn_bytes"] > 0


def test_the_missing_end_of_a_segment_that_was_closed_cleanly_is_damage(
    command: Command, directory: Path
) -> None:
    add_one(directory)
    cut_last_record(directory)
    result = command("verify", directory)
    assert result.code == 1
    assert "the sealed segment has no footer" in result.out


def test_a_directory_that_is_open_is_noted_and_stays_usable(
    command: Command, directory: Path
) -> None:
    async def work() -> tuple[Any, Any]:
        async with StateManager(config=config(directory)) as state:
            await state.create_session(session_id="new")
            # On this very thread: nothing happens in the engine meanwhile.
            inspected = command("inspect", directory, "--json")
            verified = command("verify", directory)
            await state.create_session(session_id="newer")
            return inspected, verified

    inspected, verified = asyncio.run(work())
    assert inspected.json["is_open_elsewhere"] is True
    assert verified.code == 0
    assert "Open in another process" in verified.out


@pytest.mark.parametrize("name", ["inspect", "verify"])
def test_what_is_no_directory_of_the_engine_is_refused(
    command: Command, tmp_path: Path, name: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    command(name, tmp_path / "nothing").assert_refused("nothing does not exist")
    command(name, tmp_path / "file").assert_refused("file is not a directory")
    command(name, tmp_path / "empty").assert_refused("not a directory of this engine")


# What verify says and what an opening says


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut_in_the_middle(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_to(size: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:size])

    return damage


def without_footer(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-FOOTER_BYTES])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"something else")


def overwritten(start: int, size: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[start : start + size or None] = b"\x5a" * size
        path.write_bytes(bytes(data))

    return damage


def one_bit(at: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 4
        path.write_bytes(bytes(data))

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "emptied": emptied,
    "cut in its header": cut_to(40),
    "cut behind its header": cut_to(64),
    "cut in the middle": cut_in_the_middle,
    "without footer": without_footer,
    "longer": longer,
    "a bit of its header": one_bit(20),
    "a bit of its salt": one_bit(50),
    "header destroyed": overwritten(0, 64),
    "beginning destroyed": overwritten(0, 4096),
    "a bit of a frame header": one_bit(64 + 9),
    "a bit of a key": one_bit(64 + 112),
    "a bit of a payload": one_bit(64 + 300),
    "a frame header destroyed": overwritten(64, 112),
    "a piece destroyed": overwritten(3000, 2000),
    "a bit of its footer": one_bit(-2),
    "footer destroyed": overwritten(-FOOTER_BYTES, FOOTER_BYTES),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "killed"])
@pytest.mark.parametrize("hinted", [True, False], ids=["hints", "no hints"])
def test_verify_and_an_opening_say_the_same(
    command: Command,
    filled: Path,
    filled_and_killed: Path,
    tmp_path: Path,
    *,
    damage: Callable[[Path], None],
    which: int,
    closed: bool,
    hinted: bool,
) -> None:
    source = filled if closed else filled_and_killed
    directory = Path(shutil.copytree(source, tmp_path / "state"))
    damage(segments(directory)[which])
    if not hinted:
        for hint in directory.glob("*.hint"):
            hint.unlink()
    verified = command("verify", directory, "--json")
    told = {(item["path"], item["offset"]) for item in verified.json["damages"]}
    assert len(told) == len(verified.json["damages"])

    async def read() -> tuple[set[tuple[str, int]], set[str]]:
        unreadable = set()
        async with StateManager(config=config(directory), files=ScriptedFiles()) as state:
            found = {(item.path, item.offset) for item in state._disk.damages}
            for number in range(SESSIONS):
                try:
                    await state.get_session(f"s{number}")
                except errors.CorruptionError as error:
                    unreadable.add(error.path)
            return found, unreadable

    found, unreadable = asyncio.run(read())
    assert unreadable <= {path for path, _ in told}
    assert found <= told
    if not hinted:  # with a hint nobody looks at a frame before it is read
        assert found == told
    assert verified.code == (1 if told else 0)
    if closed:
        assert told, "whatever it is, a clean close leaves no torn tail"


@pytest.mark.parametrize("name", ["0000000001.hint", "INDEX", "MANIFEST.bak"])
@pytest.mark.parametrize("at", [10, 30, 100, -20])
def test_a_damaged_cache_is_a_warning_and_no_damage(
    command: Command, directory: Path, name: str, at: int
) -> None:
    assert command("verify", directory, "--json").json["warnings"] == []
    one_bit(at)(directory / name)
    result = command("verify", directory, "--json")
    assert result.code == 0
    assert result.json["damages"] == []
    [warning] = result.json["warnings"]
    assert warning["path"] == str(directory / name)
    assert f"Warning: {directory / name}" in command("verify", directory).out


def test_a_damaged_manifest_is_damage_as_long_as_nobody_opened_the_directory(
    command: Command, directory: Path
) -> None:
    one_bit(40)(directory / "MANIFEST")
    result = command("verify", directory, "--json")
    assert result.code == 1
    [damage] = result.json["damages"]
    assert damage["path"] == str(directory / "MANIFEST")
    assert "MANIFEST.bak was used" in damage["reason"]
    add_one(directory)
    assert command("verify", directory).code == 0


def test_a_damaged_footer_is_nobodys_session(command: Command, directory: Path) -> None:
    one_bit(-2)(segments(directory)[0])
    result = command("verify", directory, "--json")
    assert [damage["session_id"] for damage in result.json["damages"]] == [None]
