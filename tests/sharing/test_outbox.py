"""The record of what the shared tier has not seen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from persistence.disk.directory import make_directory
from persistence.disk.filenames import OUTBOX
from persistence.disk.journal import Journal
from persistence.disk.threads import Threads
from persistence.record import NO_ID
from persistence.sharing import outbox as outbox_module
from persistence.sharing.outbox import Branch, Outbox
from tests.disk.memoryfiles import MemoryFiles

DIRECTORY = "/state"
BASE, FIRST, SECOND = (bytes([number]) * 16 for number in (1, 2, 3))


@pytest.fixture
async def threads() -> AsyncIterator[Threads]:
    """Where files are touched."""
    threads = Threads()
    yield threads
    await asyncio.to_thread(threads.close)


async def opened(files: MemoryFiles, threads: Threads) -> Outbox:
    """Open the outbox of the one directory there is, any number of times."""
    if not files.exists(DIRECTORY):
        make_directory(files, DIRECTORY)
    outbox = Outbox(Journal(files, DIRECTORY, OUTBOX, b"d" * 16), threads, sync=True)
    await outbox.open()
    return outbox


async def test_a_branch_goes_on_when_a_commit_comes_while_its_delivery_is_noted(
    threads: Threads,
) -> None:
    outbox = await opened(MemoryFiles(), threads)
    await outbox.add({"a": Branch(BASE, 1)})
    newest = FIRST
    async with outbox._lock:  # something else is being noted
        advancing = asyncio.create_task(outbox.advance("a", Branch(FIRST, 2), lambda: newest))
        await asyncio.sleep(0)
        newest = SECOND  # it finds its session in the outbox, and adds nothing
    await advancing
    assert outbox.branches == {"a": Branch(FIRST, 2)}
    await outbox.advance("a", Branch(SECOND, 3), lambda: newest)
    assert not outbox.branches
    await outbox.close()


async def test_a_commit_that_is_sent_again_and_again_without_a_reply_is_noted_once(
    threads: Threads,
) -> None:
    files = MemoryFiles()
    outbox = await opened(files, threads)
    await outbox.add({"a": Branch(BASE, 1)}, [("a", FIRST)])
    size_bytes = outbox._journal.size_bytes
    for _ in range(3):
        await outbox.add({}, [("a", FIRST)])
    assert outbox._journal.size_bytes == size_bytes
    await outbox.add({}, [("a", SECOND)])
    await outbox.close()
    again = await opened(files, threads)
    assert again.sent == {"a": {FIRST, SECOND}}
    await again.close()


async def test_a_long_journal_is_written_anew_with_all_that_counts(
    threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = MemoryFiles()
    monkeypatch.setattr(outbox_module, "_MIN_REWRITE_BYTES", 1)
    outbox = await opened(files, threads)
    await outbox.set_epoch(SECOND)
    branches = {"kept": Branch(BASE, 1), "ended": Branch(NO_ID, 0)}
    await outbox.add(branches, sent=[("kept", FIRST)], ended=[("ended", SECOND)])
    for number in range(50):
        await outbox.add({f"s{number}": Branch(BASE, 1)})
        await outbox.remove(f"s{number}")
    size = outbox._journal.size_bytes
    await outbox.close()
    again = await opened(files, threads)
    assert size < 1000
    assert again.branches == branches
    assert (again.sent, again.ended) == ({"kept": {FIRST}}, {"ended": [SECOND]})
    assert again.epoch == SECOND
    await again.close()


async def test_what_is_noted_survives_a_power_loss_at_once(threads: Threads) -> None:
    files = MemoryFiles()
    outbox = await opened(files, threads)
    await outbox.set_epoch(SECOND)
    after = await opened(files.after_power_loss(), threads)
    assert after.epoch == SECOND
    await outbox.add({"a": Branch(NO_ID, 0)}, sent=[("a", FIRST)], ended=[("a", SECOND)])
    after = await opened(files.after_power_loss(), threads)
    assert after.branches == {"a": Branch(NO_ID, 0)}
    assert (after.sent, after.ended) == ({"a": {FIRST}}, {"a": [SECOND]})
    await outbox.begin_anew({"a": Branch(BASE, 7)})
    after = await opened(files.after_power_loss(), threads)
    assert after.branches == {"a": Branch(BASE, 7)}
