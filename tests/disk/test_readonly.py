from __future__ import annotations

import os
from pathlib import Path

import pytest

from persistence import ManualClock
from persistence.disk.files import Files
from persistence.disk.segments import Damage
from tests.disk.readonly import ReadOnlyFiles, StoredRecord, newest_records
from tests.support import abandon, config, everything, opened


@pytest.fixture(params=["closed", "killed"])
async def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "state"
    small = config(str(path), segment_bytes=64 * 1024, compression="none")
    async with opened(Files(), small, clock=ManualClock()) as state:
        for number in range(40):
            await state.create_session(session_id=f"s{number}", data={"x": os.urandom(6000)})
        for number in range(10):
            await state.terminate_session(f"s{number}")
            await state.update_session_data(f"s{number + 10}", "n", number)
        if request.param == "killed":
            await abandon(state)
    return path


def contents(path: Path) -> dict[str, tuple[bytes, int]]:
    return {item.name: (item.read_bytes(), item.stat().st_mtime_ns) for item in path.iterdir()}


async def test_the_newest_records_are_those_of_an_opening_and_nothing_is_written(
    directory: Path,
) -> None:
    before = contents(directory)
    found = {}
    for item in newest_records(str(directory)):
        assert isinstance(item, StoredRecord)
        found[item.session_id] = item.record
    assert contents(directory) == before
    async with opened(Files(), config(str(directory)), clock=ManualClock()) as state:
        assert found.keys() == (await everything(state)).keys()
        for sid, record in found.items():
            session = await state.get_session(sid, renew=False)
            assert session is not None
            assert session._record == record


def test_a_damaged_session_is_a_damage_and_no_older_version(directory: Path) -> None:
    hurt = [path for path in directory.glob("*.seg") if b"s25" in path.read_bytes()]
    for path in hurt:
        data = bytearray(path.read_bytes())
        data[data.index(b"s25") + 300] ^= 1
        path.write_bytes(bytes(data))
    found = list(newest_records(str(directory)))
    [damage] = [item for item in found if isinstance(item, Damage)]
    assert damage.session_id == "s25"
    assert len(found) == 30


async def test_a_manager_on_read_only_files_writes_nothing_to_the_directory(
    directory: Path,
) -> None:
    before = contents(directory)
    async with opened(ReadOnlyFiles(), config(str(directory)), clock=ManualClock()) as state:
        assert len(await everything(state)) == 30
        await state.create_session(session_id="only in memory")
    assert contents(directory) == before
