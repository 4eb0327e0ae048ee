"""Documents as workers hold them, with so little memory that almost every access is a restore.

The real ones (`payload-taubench.jsonl.gz`: customer profiles, orders, chat transcripts of up to
43 KB) where the data directory beside the repository is there, else generated ones of the same
distribution of sizes.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import payloads
from persistence import DiskConfig, MemoryConfig, StateConfig, StateManager
from persistence.disk.inspect import scan_directory

DOCUMENTS = Path(__file__).parents[2] / "shared/data/payload-taubench.jsonl.gz"
COUNT = 4288
TASKS = 16
BUDGET_BYTES = 64 * 1024
LARGEST_BYTES = 64 * 1024

Documents = dict[str, dict[str, Any]]


def documents() -> Documents:
    """Return the documents by session id."""
    if not DOCUMENTS.exists():
        return {f"document {n}": payloads.document(n) for n in range(COUNT)}
    with gzip.open(DOCUMENTS, "rt", encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    return {f"{line['kind']} {line['id']}": {"doc": line["doc"]} for line in found}


def config_of(directory: Path) -> StateConfig:
    return StateConfig(
        memory=MemoryConfig(max_bytes=BUDGET_BYTES),
        disk=DiskConfig(path=str(directory), segment_bytes=2**20, fsync="interval"),
    )


async def each(session_ids: Iterable[str], work: Callable[[str], Awaitable[None]]) -> None:
    """Await `work` for every session, some at a time."""
    left = iter(session_ids)

    async def some() -> None:
        for session_id in left:
            await work(session_id)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(TASKS):
            tasks.create_task(some())


async def assert_all_equal(state: StateManager, data: Documents) -> None:
    async def compare(session_id: str) -> None:
        session = await state.get_session(session_id)
        assert session is not None
        assert session.data == data[session_id]

    await each(data, compare)


async def test_every_document_comes_back_equal_through_a_memory_of_64_kib(tmp_path: Path) -> None:
    data = documents()
    assert len(data) == COUNT
    async with StateManager(config=config_of(tmp_path / "state")) as state:

        async def create(session_id: str) -> None:
            await state.create_session(session_id=session_id, data=data[session_id])

        async def visit(session_id: str) -> None:
            """Restore, change, change back: garbage for compaction, and the document as it was."""
            async with state.edit(session_id) as draft:
                draft["visits"] = 1
            await state.update_session(session_id, lambda draft: draft.pop("visits"))

        await each(data, create)
        await each(data, visit)
        await assert_all_equal(state, data)
        await state.compact()
        await assert_all_equal(state, data)
        stats = await state.stats()
        assert stats.memory_peak_bytes <= BUDGET_BYTES + LARGEST_BYTES
        assert stats.restored > 2 * COUNT
        assert stats.spilled > 2 * COUNT
        assert stats.disk.segments > 3, "the log was rotated"
        assert stats.disk.compactions > 0
        assert stats.disk.total_bytes < 2 * stats.disk.live_bytes
        assert stats.disk.damages == 0
    assert not any(report.damages for report, _ in scan_directory(str(tmp_path / "state")))

    async with StateManager(config=config_of(tmp_path / "state")) as state:
        assert sorted(await state.get_active_sessions()) == sorted(data)
        await assert_all_equal(state, data)
