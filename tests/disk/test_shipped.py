from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from persistence.disk.compaction import NOTHING_TO_SHIP
from persistence.disk.filenames import SHIPPED
from persistence.disk.shipped import Shipped, ShippedRecord, decode_shipped, encode_shipped
from persistence.disk.threads import Threads
from tests.disk.memoryfiles import MemoryFiles, fail

SHIPPED_ONE = Shipped("redis:app", "some id", 17)


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads()
    yield threads
    threads.close()


@pytest.fixture
def files() -> MemoryFiles:
    files = MemoryFiles()
    files.make_directory("/log")
    files.sync_directory("/")
    return files


def test_a_record_comes_back_and_any_flipped_bit_makes_it_none() -> None:
    data = encode_shipped(SHIPPED_ONE)
    assert decode_shipped(data) == SHIPPED_ONE
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        assert decode_shipped(bytes(damaged)) is None
    for size in range(len(data)):
        assert decode_shipped(data[:size]) is None


async def test_it_survives_a_power_loss(files: MemoryFiles, threads: Threads) -> None:
    await ShippedRecord(files, "/log", threads).advance(SHIPPED_ONE)
    record = ShippedRecord(files.after_power_loss(), "/log", threads)
    await record.load()
    assert (record.newest, record.sequence) == (SHIPPED_ONE, 17)


async def test_without_one_nothing_is_kept_but_for_a_checkpoint_under_way(
    files: MemoryFiles, threads: Threads
) -> None:
    record = ShippedRecord(files, "/log", threads)
    await record.load()
    assert (record.newest, record.sequence) == (None, NOTHING_TO_SHIP)
    with record.keeping(5):
        assert record.sequence == 5
    assert record.sequence == NOTHING_TO_SHIP
    await record.advance(SHIPPED_ONE)
    with record.keeping(20):
        assert record.sequence == 17


async def test_giving_up_is_durable_and_waits_for_a_checkpoint_under_way(
    files: MemoryFiles, threads: Threads
) -> None:
    record = ShippedRecord(files, "/log", threads)
    await record.advance(SHIPPED_ONE)
    with record.keeping(20):
        await record.give_up()
    assert f"/log/{SHIPPED}" in files.after_power_loss().contents("/log")
    await record.give_up()
    assert record.sequence == NOTHING_TO_SHIP
    assert f"/log/{SHIPPED}" not in files.after_power_loss().contents("/log")


@pytest.mark.parametrize("wrong", ["unreadable", "damaged"])
async def test_as_long_as_one_is_there_that_cannot_be_read_everything_is_kept(
    files: MemoryFiles, threads: Threads, wrong: str
) -> None:
    """Another life of the worker may be able to read it, and go on from it."""
    await ShippedRecord(files, "/log", threads).advance(SHIPPED_ONE)
    if wrong == "damaged":
        fd = files.open_write(f"/log/{SHIPPED}")
        files.write_at(fd, b"?", 5)
        files.close(fd)
    else:
        files.faults.append(fail(errno.EMFILE, "open_read"))
    record = ShippedRecord(files, "/log", threads)
    await record.load()
    assert (record.newest, record.sequence) == (None, 0)
    with record.keeping(5):
        assert record.sequence == 0
        await record.give_up()
        assert record.sequence == 0, "not while a checkpoint is being made"
    await record.give_up()
    assert record.sequence == NOTHING_TO_SHIP
    assert not files.after_power_loss().exists(f"/log/{SHIPPED}")
    await record.advance(SHIPPED_ONE)
    assert record.sequence == 17
