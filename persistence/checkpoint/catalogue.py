"""Which checkpoints a store has: listing, deleting, pruning, and sweeping up what was left behind.

Chunks belong to every manifest that lists them. One that no manifest lists is an *orphan*: of a
checkpoint that was being made when its worker died, or that was deleted. A worker sweeps up its own
(it makes one checkpoint at a time, so none of them is under way) and those of others that were
started more than a day ago. While there is a manifest that cannot be read, nothing is known of what
it lists, and chunks stay.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from persistence.checkpoint.manifest import (
    MalformedCheckpoint,
    Manifest,
    decode_manifest,
    is_id,
    worker_of,
)
from persistence.checkpoint.stores import CheckpointStore, ChunkKey
from persistence.disk.format import OtherFormat
from persistence.errors import CheckpointNotFound, printable
from persistence.sealer import Sealer

_log = logging.getLogger("persistence.checkpoint")

LATEST: Final = "latest"
_ABANDONED_SECONDS: Final = 86_400.0
_TIME_FORMAT: Final = "%Y%m%dT%H%M%SZ"


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A restore point, as it is listed. Sizes in bytes, as stored.

    Attributes:
        id: its id.
        created_at: when it was cut.
        reason: why it was made.
        kind: "full", "incremental", or "damaged": its manifest cannot be read, nor it be restored.
        sessions: how many sessions there were.
        chunks: how many chunks it shipped itself.
        bytes: how much it shipped itself.
        total_bytes: how much restoring reads.
        parent: the checkpoint that it goes on from; None for a full one.
        worker: the id of the directory it was made of.
        namespace: of the worker that made it.
        problem: what is wrong with a damaged one.
    """

    id: str
    created_at: datetime
    reason: str = ""
    kind: str = "damaged"
    sessions: int = 0
    chunks: int = 0
    bytes: int = 0
    total_bytes: int = 0
    parent: str | None = None
    worker: str = ""
    namespace: str = ""
    problem: str | None = None


def info_of(manifest: Manifest) -> CheckpointInfo:
    """Return what is told of a checkpoint."""
    own = manifest.own_chunks
    return CheckpointInfo(
        id=manifest.id,
        created_at=datetime.fromtimestamp(manifest.created, UTC),
        reason=manifest.reason,
        kind="incremental" if manifest.parent else "full",
        sessions=manifest.sessions,
        chunks=len(own),
        bytes=sum(chunk.stored_bytes for chunk in own),
        total_bytes=manifest.total_bytes,
        parent=manifest.parent or None,
        worker=manifest.worker,
        namespace=manifest.namespace,
    )


@dataclass(slots=True)
class Catalogue:
    """The manifests of a store at one moment.

    Attributes:
        manifests: the ones that can be read, by id, oldest first.
        damaged: why others cannot, by id.
        newer: which are of a newer format, or sealed with a key that is not here.
    """

    manifests: dict[str, Manifest]
    damaged: dict[str, str]
    newer: dict[str, str]

    @staticmethod
    async def load(store: CheckpointStore, sealer: Sealer | None = None) -> Catalogue:
        """Read all manifests. What is wrong with one is no reason to withhold the others."""
        found = Catalogue({}, {}, {})
        for checkpoint_id, data in sorted((await store.manifests()).items()):
            try:
                found.manifests[checkpoint_id] = decode_manifest(data, checkpoint_id, sealer)
            except OtherFormat as error:
                found.newer[checkpoint_id] = str(error)
            except MalformedCheckpoint as error:
                found.damaged[checkpoint_id] = str(error)
                _log.error("checkpoint %s: %s", checkpoint_id, error)
        return found

    @property
    def ids(self) -> list[str]:
        """The ids of all checkpoints, also of those that cannot be read, oldest first."""
        return sorted([*self.manifests, *self.damaged, *self.newer])

    @property
    def is_complete(self) -> bool:
        """Whether every manifest could be read."""
        return not self.damaged and not self.newer

    def newest_first(self, wanted: str) -> list[str]:
        """Return `wanted`, or what "latest" means, and what it falls back to, in this order.

        Raises:
            CheckpointNotFound: there is none.
        """
        ids = self.ids[::-1]
        if wanted == LATEST:
            if not ids:
                raise CheckpointNotFound("there is no checkpoint yet; make one first")
            return ids
        if wanted not in ids:
            raise not_found(wanted)
        worker = worker_of(wanted)
        older = ids[ids.index(wanted) + 1 :]
        return [wanted, *(one for one in older if worker_of(one) == worker)]


def not_found(checkpoint_id: str) -> CheckpointNotFound:
    """Return the error for an id that no checkpoint has."""
    return CheckpointNotFound(
        f"there is no checkpoint {printable(checkpoint_id)}; list_checkpoints() and "
        "'persistence checkpoints list' tell which there are"
    )


async def list_checkpoints(
    store: CheckpointStore, sealer: Sealer | None = None
) -> list[CheckpointInfo]:
    """Return all restore points, oldest first; damaged ones are named as such."""
    catalogue = await Catalogue.load(store, sealer)
    problems = {**catalogue.damaged, **catalogue.newer}
    return [
        info_of(catalogue.manifests[one])
        if one in catalogue.manifests
        else CheckpointInfo(id=one, created_at=_time_in(one), problem=problems[one])
        for one in catalogue.ids
    ]


async def delete_checkpoint(
    store: CheckpointStore, checkpoint_id: str, sealer: Sealer | None = None
) -> None:
    """Delete one restore point, and the chunks that no other one needs.

    Raises:
        CheckpointNotFound: there is none of that id.
    """
    if not is_id(checkpoint_id) or not await store.withdraw(checkpoint_id):
        raise not_found(checkpoint_id)
    catalogue = await Catalogue.load(store, sealer)
    if catalogue.is_complete:
        await store.remove_chunks(
            [
                key
                for key in unlisted(catalogue, await store.chunks())
                if worker_of(key.checkpoint) == worker_of(checkpoint_id)
                # A younger one may be under way: its chunks are not listed yet.
                and key.checkpoint <= checkpoint_id
            ]
        )


async def prune(
    store: CheckpointStore, worker: str, keep: int, now: float, sealer: Sealer | None = None
) -> Catalogue:
    """Keep the newest `keep` restore points of a worker; sweep up orphans. Return what is left.

    Args:
        store: where.
        worker: hexadecimal, as in ids; other workers' restore points are left alone.
        keep: how many stay; those that cannot be read do not count.
        now: wall seconds.
        sealer: opens manifests that are sealed.
    """
    catalogue = await Catalogue.load(store, sealer)
    mine = [one for one in catalogue.manifests if worker_of(one) == worker[:8]]
    if len(mine) > keep:
        oldest_kept = mine[-keep]
        unreadable = [one for one in catalogue.damaged if worker_of(one) == worker[:8]]
        for old in [one for one in (*mine, *unreadable) if one < oldest_kept]:
            await store.withdraw(old)
            catalogue.manifests.pop(old, None)
            catalogue.damaged.pop(old, None)
    await sweep(store, catalogue, worker, now)
    return catalogue


async def sweep(store: CheckpointStore, catalogue: Catalogue, worker: str, now: float) -> int:
    """Remove orphans; return how many. Not while a checkpoint of this worker is being made."""
    if not catalogue.is_complete:
        _log.warning("unused chunks are kept: some manifest cannot be read, and may list them")
        return 0
    keys = await store.chunks()
    over = {  # of these none is under way
        one
        for one in {key.checkpoint for key in keys}
        if worker_of(one) == worker[:8] or _time_in(one).timestamp() < now - _ABANDONED_SECONDS
    }
    orphans = [key for key in unlisted(catalogue, keys) if key.checkpoint in over]
    if orphans:
        await store.remove_chunks(orphans)
    return len(orphans)


def unlisted(catalogue: Catalogue, keys: Iterable[ChunkKey]) -> list[ChunkKey]:
    """Return the keys that no manifest lists."""
    listed = {
        ChunkKey(chunk.checkpoint, chunk.number)
        for manifest in catalogue.manifests.values()
        for chunk in manifest.chunks
    }
    return [key for key in keys if key not in listed]


def time_text(wall_seconds: float) -> str:
    """Return a wall time as it stands in ids."""
    return datetime.fromtimestamp(wall_seconds, UTC).strftime(_TIME_FORMAT)


def _time_in(checkpoint_id: str) -> datetime:
    text = checkpoint_id[9:25]
    try:
        return datetime.strptime(text, _TIME_FORMAT).replace(tzinfo=UTC)
    except ValueError:  # an id of the right form, with a day that does not exist
        return datetime.fromtimestamp(0, UTC)
