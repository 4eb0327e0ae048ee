"""What the tests of checkpoints do with a manager, in few words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from persistence import ManualClock, StateManager
from persistence.checkpoint.catalogue import CheckpointInfo
from persistence.checkpoint.create import Plan, create_checkpoint
from persistence.checkpoint.restore import RestoredInfo, restore_into
from persistence.checkpoint.stores import CheckpointStore, ChunkKey, ChunkMissing
from persistence.disk.files import Files
from tests.engine import ScriptedFiles, config_for, disk_of, residency_of

CLOCK = ManualClock()


class MemoryStore:
    """A store in a dict that fails, or goes wrong, where a test wants it to.

    Attributes:
        steps: calls that change something, so far.
        dies_at: the step at which it raises `Died`, and at every one from then on; 0: never.
    """

    def __init__(self, name: str = "memory") -> None:
        self.name = name
        self.kept_chunks: dict[ChunkKey, bytes] = {}
        self.kept_manifests: dict[str, bytes] = {}
        self.steps = 0
        self.dies_at = 0

    def _step(self) -> None:
        self.steps += 1
        if self.dies_at and self.steps >= self.dies_at:
            raise Died

    async def put_chunk(self, key: ChunkKey, data: bytes) -> None:
        self._step()
        self.kept_chunks[key] = data

    async def get_chunk(self, key: ChunkKey) -> bytes:
        if key not in self.kept_chunks:
            raise ChunkMissing(str(key))
        return self.kept_chunks[key]

    async def chunk_bytes(self, keys: Any) -> list[int]:
        return [len(self.kept_chunks.get(key, b"")) for key in keys]

    async def publish(self, checkpoint_id: str, manifest: bytes) -> None:
        self._step()
        self.kept_manifests[checkpoint_id] = manifest

    async def manifests(self) -> dict[str, bytes]:
        return dict(self.kept_manifests)

    async def withdraw(self, checkpoint_id: str) -> bool:
        self._step()
        return self.kept_manifests.pop(checkpoint_id, None) is not None

    async def chunks(self) -> list[ChunkKey]:
        return sorted(self.kept_chunks)

    async def remove_chunks(self, keys: Any) -> None:
        self._step()
        for key in keys:
            self.kept_chunks.pop(key, None)


class Died(Exception):
    """The process that made the checkpoint is gone."""


async def checkpoint(state: StateManager, store: CheckpointStore, **plan: Any) -> CheckpointInfo:
    """Make a checkpoint as the manager does: first everything goes into the log."""
    residency = residency_of(state)
    await residency.log_unlogged()
    await residency.record_renewals()
    await state.flush()
    return await create_checkpoint(disk_of(state), store, Plan(**plan), state._clock)


async def restored(
    store: CheckpointStore,
    path: Path,
    wanted: str = "latest",
    *,
    clock: Any = CLOCK,
    files: Files | None = None,
    **options: Any,
) -> tuple[RestoredInfo, dict[str, dict[str, Any]]]:
    """Restore into a fresh directory; return what was restored, and the data that is there."""
    info = await restore_into(store, str(path), clock, wanted, files=files, **options)
    return info, await data_in(path, clock=clock)


async def data_in(path: Path, *, clock: Any = CLOCK) -> dict[str, dict[str, Any]]:
    """Return the data of every session in a directory."""
    found = {}
    config = config_for(path)
    async with StateManager(config=config, clock=clock, files=ScriptedFiles()) as state:
        async for sid in state.iter_sessions():
            session = await state.get_session(sid, renew=False)
            if session is not None:
                found[sid] = session.data
    return found


async def records_in(state: StateManager) -> dict[str, tuple[bytes, float]]:
    """Return the record and the deadline of every session in the log, as bytes."""
    disk = disk_of(state)
    found = {}
    for shard in range(1024):
        for row in disk.index.rows_of_shard(shard):
            for key, _ in await disk.reading.keys([row]):
                read = await disk.reading.newest(row.fingerprint, key)
                assert read is not None
                found[key.decode()] = (read[0], read[1].deadline)
    return found
