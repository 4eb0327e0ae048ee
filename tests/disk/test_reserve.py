"""The space that is kept for leaving a full disk."""

from __future__ import annotations

import errno

from persistence.disk.reserve import Reserve
from tests.disk.memoryfiles import MemoryFiles, fail
from tests.support import PATH


def test_a_reserve_gives_its_space_back_once() -> None:
    files = MemoryFiles()
    files.make_directory(PATH)
    reserve = Reserve(files, PATH)
    assert reserve.make()
    assert reserve.release()
    assert reserve.is_spent
    assert not reserve.release()
    assert reserve.make()
    assert not reserve.is_spent


def test_a_reserve_that_cannot_be_looked_at_is_none() -> None:
    """The error ended the compactor's task, and with it a `close`."""
    files = MemoryFiles()
    files.make_directory(PATH)
    assert Reserve(files, PATH).make()
    for operation in ("open_read", "size"):
        files.faults.append(fail(errno.ENOSPC, operation, times=None))
        assert not Reserve(files, PATH).release()
        files.faults.clear()
    assert files.open_files == []
    assert Reserve(files, PATH).release()
