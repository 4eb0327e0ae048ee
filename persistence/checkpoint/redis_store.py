"""Checkpoints in Redis.

====================================== ====== =====================================================
key                                    type   holds
====================================== ====== =====================================================
``<namespace>:checkpoints``            hash   checkpoint id -> manifest
``<namespace>:checkpoints:started``    hash   checkpoint id -> how many chunk keys it may have
``<namespace>:checkpoint:{<id>-<n>}``  string chunk `n` of checkpoint `id`
====================================== ====== =====================================================

The hash tag makes the chunks of one checkpoint spread over a Cluster. The second hash is written
before the chunks are, so that the chunks of a checkpoint that was never published are found again
without a SCAN through everybody's keys. Keys have no expiry: a restore point must not fade away.

Commands: GET, SET, STRLEN, UNLINK, HSET, HGET, HGETALL, HDEL, HRANDFIELD, TYPE; each may be sent
twice without harm. Nothing is written into a hash that has fields, and none of them ours.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import islice
from typing import Any, Final

from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import (
    NoPermissionError,
    RedisClusterException,
    RedisError,
    ResponseError,
)

from persistence.checkpoint.manifest import is_id
from persistence.checkpoint.stores import ChunkKey, ChunkMissing, ChunkUnreadable
from persistence.errors import RemoteDamaged, RemoteUnavailable, printable
from persistence.remote.keys import Keys

_log = logging.getLogger("persistence.checkpoint")

_ANNOUNCED_AT_ONCE: Final = 16  # chunk keys announced together, to save round trips
_KEYS_PER_PIPELINE: Final = 500
_MAX_FIELDS: Final = 20
_COUNT: Final = re.compile(rb"[0-9]{1,5}")  # with 2 MiB each: up to 195 GiB of log


class RedisStore:
    """Checkpoints in the Redis behind `client`. See `CheckpointStore`.

    Args:
        client: an asyncio client of redis-py (also a Cluster's) that returns bytes; the caller
            closes it.
        namespace: what all keys start with, percent-encoded as those of the shared tier; several
            workers may share it.
        timeout_seconds: for one call with all that the client repeats, after which the server
            counts as not answering; None: as long as the client takes.
    """

    def __init__(self, client: Any, namespace: str, timeout_seconds: float | None = None) -> None:
        self._client = client
        self._timeout_seconds = timeout_seconds
        keys = Keys(namespace)
        self._prefix = keys.prefix.decode()
        self._manifests, self._started = (key.decode() for key in keys.checkpoints())
        # One checkpoint at a time is made through this.
        self._making = ""
        self._announced = 0  # how many chunk keys it may have, as Redis knows it
        self._used = 0  # how many it has
        self._announcing = asyncio.Lock()

    @property
    def name(self) -> str:
        """`redis:` and the namespace."""
        return f"redis:{self._prefix}"

    def chunk_key(self, key: ChunkKey) -> str:
        """Return the key of a chunk."""
        assert is_id(key.checkpoint), key
        return f"{self._prefix}:checkpoint:{{{key.checkpoint}-{key.number}}}"

    async def put_chunk(self, key: ChunkKey, data: bytes) -> None:
        """Keep a chunk."""
        async with self._announcing:  # chunks come together: one announces for all of them
            await self._announce(key)
        async with self._calling():
            await self._client.set(self.chunk_key(key), data)

    async def _announce(self, key: ChunkKey) -> None:
        """Announce a chunk key, and more of them, before it is written."""
        if key.checkpoint != self._making:
            for each in (self._manifests, self._started):  # before anything has been shipped
                async with self._calling():
                    await self._check_ours(each)
            self._making, self._announced, self._used = key.checkpoint, 0, 0
        if key.number >= self._announced:
            count = key.number + _ANNOUNCED_AT_ONCE
            async with self._calling():
                await self._client.hset(self._started, key.checkpoint, str(count))
            self._announced = count
        self._used = max(self._used, key.number + 1)

    async def _check_ours(self, key: str) -> None:
        """Refuse to write into a hash of somebody else.

        Raises:
            RemoteDamaged: it has fields, and none of some of them is the id of a checkpoint.
        """
        try:
            fields = await self._client.hrandfield(key, _MAX_FIELDS)
        except NoPermissionError:
            return  # a user that was set up before this was asked
        if fields and not any(is_id(_text(each)) for each in fields):
            raise RemoteDamaged(key, "it is a hash of somebody else, and no list of checkpoints")

    async def get_chunk(self, key: ChunkKey) -> bytes:
        """Return a chunk."""
        async with self._calling():
            try:
                data = await self._client.get(self.chunk_key(key))
            except ResponseError as error:
                if _is_wrong_type(error):
                    raise ChunkUnreadable(f"key {self.chunk_key(key)} is no string") from error
                raise
        if data is None:
            raise ChunkMissing(self.chunk_key(key))
        return bytes(data)

    async def chunk_bytes(self, keys: Sequence[ChunkKey]) -> list[int]:
        """Return the length of each chunk, 0 for one that is missing or cannot be read."""
        sizes: list[int] = []
        for some in _pieces(keys):
            async with self._calling():
                pipeline = self._client.pipeline(transaction=False)
                for key in some:
                    pipeline.execute_command("STRLEN", self.chunk_key(key))
                sizes += map(_size_of, await pipeline.execute(raise_on_error=False))
        return sizes

    async def publish(self, checkpoint_id: str, manifest: bytes) -> None:
        """Keep a manifest, atomically; behind it, announce no more chunk keys than there are."""
        async with self._calling():
            await self._check_ours(self._manifests)
            await self._client.hset(self._manifests, checkpoint_id, manifest)
        if checkpoint_id == self._making and self._used < self._announced:
            self._announced = self._used
            # Published it is. What stays announced beyond that is swept up as if it were chunks.
            with suppress(RemoteUnavailable):
                async with self._calling():
                    await self._client.hset(self._started, checkpoint_id, str(self._used))

    async def manifests(self) -> dict[str, bytes]:
        """Return every manifest by its id."""
        async with self._calling():
            found = await self._client.hgetall(self._manifests)
        named = {_text(key): bytes(value) for key, value in found.items()}
        return {name: value for name, value in named.items() if is_id(name)}

    async def withdraw(self, checkpoint_id: str) -> bool:
        """Remove a manifest; return whether it was there."""
        async with self._calling():
            return bool(await self._client.hdel(self._manifests, checkpoint_id))

    async def chunks(self) -> list[ChunkKey]:
        """Return the keys of all chunks that were ever announced and not removed."""
        async with self._calling():
            started = await self._client.hgetall(self._started)
        keys: list[ChunkKey] = []
        for checkpoint_id, value in sorted((_text(key), each) for key, each in started.items()):
            if is_id(checkpoint_id):
                count = self._count_in(checkpoint_id, value) or 0
                keys += [ChunkKey(checkpoint_id, number) for number in range(count)]
                await asyncio.sleep(0)
        return keys

    def _count_in(self, checkpoint_id: str, value: bytes) -> int | None:
        """Return how many chunk keys are announced; None: somebody else wrote something there.

        Then nothing is known of that checkpoint's chunks. They stay, and so does what stands there.
        """
        if _COUNT.fullmatch(value):
            return int(value)
        _log.warning(
            "checkpoints in Redis: key %a, field %s holds %s, which is no number of chunks: unused "
            "chunks of that checkpoint are kept; delete the field if nobody needs it",
            self._started, checkpoint_id, printable(value),
        )  # fmt: skip
        return None

    async def remove_chunks(self, keys: Iterable[ChunkKey]) -> None:
        """Remove chunks; announced keys behind the last one that is left are forgotten."""
        removed: dict[str, set[int]] = {}
        for some in _pieces(keys):
            async with self._calling():
                pipeline = self._client.pipeline(transaction=False)
                for key in some:
                    pipeline.execute_command("UNLINK", self.chunk_key(key))
                    removed.setdefault(key.checkpoint, set()).add(key.number)
                await pipeline.execute()
        if self._making in removed:
            self._making = ""  # who puts one again announces it again
        for checkpoint_id, numbers in removed.items():
            async with self._calling():
                await self._shrink(checkpoint_id, numbers)

    async def _shrink(self, checkpoint_id: str, removed: set[int]) -> None:
        announced = await self._client.hget(self._started, checkpoint_id)
        count = None if announced is None else self._count_in(checkpoint_id, announced)
        if count is None:
            return
        left = count
        while left and left - 1 in removed:
            left -= 1
        if not left:
            await self._client.hdel(self._started, checkpoint_id)
        elif left < count:
            await self._client.hset(self._started, checkpoint_id, str(left))

    @asynccontextmanager
    async def _calling(self) -> AsyncIterator[None]:
        """End a call when its time is over, and translate what it raises."""
        time = asyncio.timeout(self._timeout_seconds)
        try:
            async with time:
                yield
        except MasterNotFoundError:
            # Its message describes the clients, in some versions with their passwords.
            raise self._unavailable("no sentinel answers and knows a primary") from None
        except (RedisError, RedisClusterException, OSError) as error:
            if time.expired():
                reason = f"no answer within {self._timeout_seconds:g} s (redis.timeout_seconds)"
                raise self._unavailable(reason) from error
            if _is_wrong_type(error):
                raise await self._foreign(error) from error
            raise self._unavailable(f"{type(error).__name__}: {error}") from error

    async def _foreign(self, error: Exception) -> RemoteUnavailable:
        """Return what to raise for a key in our place that somebody else wrote."""
        for key in (self._manifests, self._started):
            with suppress(RedisError, RedisClusterException, OSError):
                async with asyncio.timeout(self._timeout_seconds):
                    kind = _text(await self._client.type(key))
                if kind not in ("hash", "none"):
                    return RemoteUnavailable(
                        f"checkpoints in Redis (WRONGTYPE): key {key!a} is a {kind} that was not "
                        "written by this library; use another redis.namespace or another database, "
                        "or delete that key if nobody needs it"
                    )
        return self._unavailable(f"{type(error).__name__}: {error}")

    def _unavailable(self, reason: str) -> RemoteUnavailable:
        return RemoteUnavailable(
            f"checkpoints in Redis under {self._prefix!a}: {reason}; "
            "what was published before is as it was"
        )


def _text(key: bytes | str) -> str:
    return key.decode("utf-8", "backslashreplace") if isinstance(key, bytes) else key


def _is_wrong_type(error: object) -> bool:
    return isinstance(error, ResponseError) and str(error).startswith("WRONGTYPE")


def _size_of(reply: Any) -> int:
    """Return the length that a reply to STRLEN says, 0 where no string is there."""
    if _is_wrong_type(reply):
        return 0
    if isinstance(reply, Exception):
        raise reply
    return int(reply)


def _pieces(keys: Iterable[ChunkKey]) -> Iterable[list[ChunkKey]]:
    rest = iter(keys)
    while some := list(islice(rest, _KEYS_PER_PIPELINE)):
        yield some
