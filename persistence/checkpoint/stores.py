"""What a place for checkpoints must do; `directory_store` and `redis_store` are two of them.

A store keeps two kinds of things: chunks, under the id of the checkpoint that wrote them and a
number, and manifests, under their id. It never looks into either.

What makes a checkpoint atomic is the order, which is the caller's: all chunks first, then the
manifest. What makes a repeated call harmless is the id: a chunk's name never has other content.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol


class ChunkKey(NamedTuple):
    """The name of a chunk: the checkpoint that wrote it, and its number there, from 0."""

    checkpoint: str
    number: int


class ChunkMissing(Exception):
    """The store has no such chunk."""


class ChunkUnreadable(Exception):
    """What stands in a chunk's place cannot be read, or is no chunk; the store is all right."""


class CheckpointStore(Protocol):
    """A place for checkpoints. Every method may raise the store's own error.

    `RemoteUnavailable` where a server does not answer (a write may then have been done all the
    same), `RemoteDamaged` where somebody else's key is in the way, `DiskFull` or
    `DirectoryNotUsable` where a file system is the reason.
    """

    @property
    def name(self) -> str:
        """Which store this is, the same after a restart: incremental checkpoints stay with it."""

    async def put_chunk(self, key: ChunkKey, data: bytes) -> None:
        """Keep a chunk, durably where the store knows durability."""

    async def get_chunk(self, key: ChunkKey) -> bytes:
        """Return a chunk.

        Raises:
            ChunkMissing: it is not there.
            ChunkUnreadable: it cannot be read, and the store is not the reason.
        """

    async def chunk_bytes(self, keys: Sequence[ChunkKey]) -> list[int]:
        """Return the length of each chunk, 0 for one that is missing or cannot be read."""

    async def publish(self, checkpoint_id: str, manifest: bytes) -> None:
        """Keep a manifest: atomically, and only after all that was put before."""

    async def manifests(self) -> dict[str, bytes]:
        """Return every manifest by its id."""

    async def withdraw(self, checkpoint_id: str) -> bool:
        """Remove a manifest; return whether it was there."""

    async def chunks(self) -> list[ChunkKey]:
        """Return the keys of all chunks, published or not; also ones that may never have come."""

    async def remove_chunks(self, keys: Iterable[ChunkKey]) -> None:
        """Remove chunks; fine when they are gone already."""
