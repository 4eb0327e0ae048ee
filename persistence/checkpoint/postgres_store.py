"""Checkpoints in PostgreSQL: a row for each chunk, and one for each manifest.

The tables are ``persistence_chunks_1`` and ``persistence_checkpoints_1``; ``remote/sql/schema.sql``
describes them, and installs them at the first use. Every statement is a transaction of its own and
may be sent twice without harm. Rows do not expire: a restore point must not fade away.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Final

from persistence.checkpoint.manifest import is_id
from persistence.checkpoint.stores import ChunkKey, ChunkMissing
from persistence.clock import Clock, SystemClock
from persistence.remote.keys import Keys
from persistence.remote.postgres_calls import PostgresCalls
from persistence.remote.postgres_link import PostgresLink
from persistence.remote.postgres_urls import PostgresTarget

_CONNECTIONS: Final = 4  # chunks are written a few at a time
_KEYS_AT_ONCE: Final = 1000

_PUT: Final = """
INSERT INTO persistence_chunks_1 (namespace, checkpoint, number, data) VALUES ($1, $2, $3, $4)
ON CONFLICT (namespace, checkpoint, number) DO UPDATE SET data = EXCLUDED.data
"""
_GET: Final = """
SELECT data FROM persistence_chunks_1 WHERE namespace = $1 AND checkpoint = $2 AND number = $3
"""
_SIZES: Final = """
SELECT checkpoint, number, octet_length(data) FROM persistence_chunks_1
WHERE namespace = $1
  AND (checkpoint, number) IN (SELECT * FROM unnest($2::text[], $3::bigint[]))
"""
_CHUNKS: Final = """
SELECT checkpoint, number FROM persistence_chunks_1 WHERE namespace = $1
ORDER BY checkpoint, number
"""
_REMOVE: Final = """
DELETE FROM persistence_chunks_1
WHERE namespace = $1
  AND (checkpoint, number) IN (SELECT * FROM unnest($2::text[], $3::bigint[]))
"""
_PUBLISH: Final = """
INSERT INTO persistence_checkpoints_1 (namespace, checkpoint, manifest) VALUES ($1, $2, $3)
ON CONFLICT (namespace, checkpoint) DO UPDATE SET manifest = EXCLUDED.manifest
"""
_MANIFESTS: Final = """
SELECT checkpoint, manifest FROM persistence_checkpoints_1 WHERE namespace = $1
"""
_WITHDRAW: Final = """
DELETE FROM persistence_checkpoints_1 WHERE namespace = $1 AND checkpoint = $2 RETURNING 1
"""


class PostgresStore:
    """Checkpoints in a database. See `CheckpointStore`. Connects when it is first used.

    Args:
        target: where the database is.
        namespace: of the rows; several workers may share it.
        timeout_seconds: after which the server counts as not answering; a chunk is some megabytes.
        clock: process time; default: the machine's.
    """

    def __init__(
        self,
        target: PostgresTarget,
        namespace: str,
        timeout_seconds: float,
        clock: Clock | None = None,
    ) -> None:
        self.namespace = namespace
        self._space = Keys(namespace).prefix.decode()
        self._link = PostgresLink(target, _CONNECTIONS, timeout_seconds)
        self._calls = PostgresCalls(self._link, timeout_seconds, clock or SystemClock())

    @property
    def name(self) -> str:
        """`postgresql:` and the namespace."""
        return f"postgresql:{self._space}"

    async def put_chunk(self, key: ChunkKey, data: bytes) -> None:
        """Keep a chunk, as durably as the server commits."""
        assert is_id(key.checkpoint), key
        await self._ask(_PUT, key.checkpoint, key.number, data)

    async def get_chunk(self, key: ChunkKey) -> bytes:
        """Return a chunk."""
        rows = await self._ask(_GET, key.checkpoint, key.number)
        if not rows:
            raise ChunkMissing(f"{self.name}/{key.checkpoint}/{key.number}")
        return bytes(rows[0][0])

    async def chunk_bytes(self, keys: Sequence[ChunkKey]) -> list[int]:
        """Return the length of each chunk, 0 for one that is missing."""
        sizes: dict[tuple[str, int], int] = {}
        for some in _pieces(keys):
            rows = await self._ask(_SIZES, *_columns(some))
            sizes.update({(checkpoint, number): size for checkpoint, number, size in rows})
        return [sizes.get(key, 0) for key in keys]

    async def publish(self, checkpoint_id: str, manifest: bytes) -> None:
        """Keep a manifest: atomically, and after all that was put before."""
        await self._ask(_PUBLISH, checkpoint_id, manifest)

    async def manifests(self) -> dict[str, bytes]:
        """Return every manifest by its id."""
        return {
            checkpoint: manifest
            for checkpoint, manifest in await self._ask(_MANIFESTS)
            if is_id(checkpoint)
        }

    async def withdraw(self, checkpoint_id: str) -> bool:
        """Remove a manifest; return whether it was there."""
        return bool(await self._ask(_WITHDRAW, checkpoint_id))

    async def chunks(self) -> list[ChunkKey]:
        """Return the keys of all chunks."""
        return [ChunkKey(*row) for row in await self._ask(_CHUNKS) if is_id(row[0])]

    async def remove_chunks(self, keys: Iterable[ChunkKey]) -> None:
        """Remove chunks; fine when they are gone already."""
        for some in _pieces(keys):
            await self._ask(_REMOVE, *_columns(some))

    async def close(self) -> None:
        """Give all connections back; idempotent."""
        await self._link.close()

    async def _ask(self, statement: str, *arguments: Any) -> list[Any]:
        doing = f"checkpoints in PostgreSQL under {self._space!a}"
        return await self._calls.read(doing, statement, self._space, *arguments)


def _columns(keys: Sequence[ChunkKey]) -> tuple[list[str], list[int]]:
    return [key.checkpoint for key in keys], [key.number for key in keys]


def _pieces(keys: Iterable[ChunkKey]) -> Iterable[list[ChunkKey]]:
    rest = iter(keys)
    while some := list(islice(rest, _KEYS_AT_ONCE)):
        yield some
