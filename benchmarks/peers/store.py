"""Peers as stores of sessions: what each of them has to offer to take part in any workload.

A store is driven in two ways. `read` and `change` take many sessions at once, in the way that is
the fastest for it: blocking calls in a tight loop, many updates per transaction, many requests in
flight. `read_one` and `change_one` are one request of an asyncio server, and its durability is
waited for.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, MutableMapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import amplification, payloads
from benchmarks.contender import ASYNCIO, GATHERED, INLINE, NOTHING, SYNCED, THREAD, chunks
from benchmarks.optional import load
from benchmarks.payloads import Data
from benchmarks.tasks import in_tasks

T = TypeVar("T")

Change = Callable[[Data], None]
"""Changes the data of a session; {} is that of a new one."""

Step = tuple[str, Change]

PER_TRANSACTION = 256
"""Updates per transaction, hence per sync: one request at a time would be 100 times slower."""

_IN_FLIGHT = 100  # requests to a server at once


class Store(ABC):
    """A peer. Pickled into its process before `open`.

    Attributes:
        name: begins the names of its rows.
        durability: what an acknowledged change survives.
        called: how asyncio code calls it.
        is_limit: whether it is no peer but a limit.
    """

    name: str
    durability: str = SYNCED
    called: str = INLINE
    is_limit: bool = False

    @abstractmethod
    async def open(self, directory: Path) -> None:
        """Open it, its files below `directory`.

        Raises:
            UnavailableError: it cannot run on this machine.
        """

    @abstractmethod
    async def close(self) -> None:
        """Release everything."""

    @abstractmethod
    async def get(self, key: str) -> Data | None:
        """Return the data of a session, for checks."""

    @abstractmethod
    async def read(self, keys: Sequence[str]) -> None:
        """Get each session and read one field."""

    @abstractmethod
    async def change(self, steps: Sequence[Step]) -> None:
        """Change sessions, all of it durable at the end; creates what is missing."""

    @abstractmethod
    async def remove(self, keys: Sequence[str]) -> None:
        """Delete sessions, durable at the end."""

    @abstractmethod
    async def count(self) -> int:
        """Go through the keys of all sessions; return how many there are."""

    @abstractmethod
    async def read_one(self, key: str) -> None:
        """Get a session and read one field, as a request handler does."""

    @abstractmethod
    async def change_one(self, key: str, change: Change) -> None:
        """Change a session, as a request handler does."""

    async def fill(self, session_count: int) -> None:
        """Store sessions 0 to `session_count` - 1."""
        for some in chunks(list(range(session_count)), 10_000):
            await self.change([(payloads.session_id(each), becoming(each)) for each in some])

    def written_bytes(self) -> int:
        """Return what it has written so far."""
        return amplification.written_bytes()

    def occupied_bytes(self, directory: Path) -> int:
        """Return what its files occupy; `directory` is that of `open`."""
        return amplification.occupied_bytes(directory)


def becoming(index: int) -> Change:
    """Return the change that makes a new session into session `index`."""

    def become(data: Data) -> None:
        data.update(payloads.session(index))

    return become


class SyncStore(Store):
    """A store of blocking calls, on packed bytes. Subclasses give the calls.

    With `called` = "to_thread" each request is a thread's, one at a time: what most of these offer
    is one connection, one writer, or one lock. With "to_thread, gathered" the updates that have
    come while the thread was busy share its next transaction.
    """

    per_transaction: int = PER_TRANSACTION

    @abstractmethod
    def connect(self, directory: Path) -> None:
        """Open it."""

    @abstractmethod
    def disconnect(self) -> None:
        """Close it."""

    @abstractmethod
    def load(self, key: str) -> bytes | None:
        """Return the packed data of a session."""

    @abstractmethod
    def modify(self, steps: Sequence[Step]) -> None:
        """Change sessions in one transaction, where it has them; durable at the end."""

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> None:
        """Delete sessions in one transaction, where it has them; durable at the end."""

    @abstractmethod
    def keys(self) -> int:
        """Go through all keys; return how many."""

    def modified(self, packed: bytes | None, change: Change) -> bytes:
        """Return what `change` makes of the packed data of a session."""
        data: Data = {} if packed is None else self._unpack(packed)
        change(data)
        return bytes(self._pack(data))

    async def open(self, directory: Path) -> None:
        """See `Store`."""
        msgpack = load("msgpack")
        self._pack, self._unpack = msgpack.packb, msgpack.unpackb
        self._lock = threading.Lock()
        self._gathered: list[tuple[Step, asyncio.Future[None]]] = []
        self._committing: asyncio.Task[None] | None = None
        self.connect(directory)

    async def close(self) -> None:
        """See `Store`."""
        self.disconnect()

    async def get(self, key: str) -> Data | None:
        """See `Store`."""
        packed = self.load(key)
        data: Data | None = None if packed is None else self._unpack(packed)
        return data

    async def read(self, keys: Sequence[str]) -> None:
        """See `Store`."""
        load, unpack = self.load, self._unpack
        for key in keys:
            unpack(load(key))["prefs"]

    async def change(self, steps: Sequence[Step]) -> None:
        """See `Store`."""
        for some in chunks(list(steps), self.per_transaction):
            self.modify(some)

    async def remove(self, keys: Sequence[str]) -> None:
        """See `Store`."""
        for some in chunks(list(keys), self.per_transaction):
            self.delete(some)

    async def count(self) -> int:
        """See `Store`."""
        return self.keys()

    async def read_one(self, key: str) -> None:
        """See `Store`."""
        await self._call(self._read_one, key)

    def _read_one(self, key: str) -> None:
        self._unpack(self.load(key))["prefs"]

    async def change_one(self, key: str, change: Change) -> None:
        """See `Store`."""
        if self.called != GATHERED:
            await self._call(self.modify, [(key, change)])
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._gathered.append(((key, change), done))
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit_gathered())
        await done

    async def _commit_gathered(self) -> None:
        try:
            while self._gathered:
                some = self._gathered[: self.per_transaction]
                del self._gathered[: len(some)]
                await asyncio.to_thread(self.modify, [step for step, _ in some])
                for _, done in some:
                    done.set_result(None)
        except Exception as error:  # noqa: BLE001 - for those who wait
            for _, done in [*some, *self._gathered]:
                done.set_exception(error)
            self._gathered.clear()
        self._committing = None

    async def _call(self, function: Callable[[T], None], argument: T) -> None:
        if self.called == THREAD:
            await asyncio.to_thread(self._alone, function, argument)
        else:
            function(argument)

    def _alone(self, function: Callable[[T], None], argument: T) -> None:
        with self._lock:
            function(argument)


class MappingStore(SyncStore):
    """A store that is a mapping of live objects, which all readers share."""

    durability = NOTHING
    mapping: MutableMapping[str, Data]

    def disconnect(self) -> None:
        """See `SyncStore`."""

    def load(self, key: str) -> bytes | None:
        """See `SyncStore`; not used for reading."""
        data = self.mapping.get(key)
        return None if data is None else bytes(self._pack(data))

    async def read(self, keys: Sequence[str]) -> None:
        """See `Store`."""
        mapping = self.mapping
        for key in keys:
            mapping[key]["prefs"]

    def _read_one(self, key: str) -> None:
        self.mapping[key]["prefs"]

    def modify(self, steps: Sequence[Step]) -> None:
        """See `SyncStore`."""
        mapping = self.mapping
        for key, change in steps:
            data = mapping.get(key, {})
            change(data)
            mapping[key] = data

    def delete(self, keys: Sequence[str]) -> None:
        """See `SyncStore`."""
        for key in keys:
            del self.mapping[key]

    def keys(self) -> int:
        """See `SyncStore`."""
        return sum(1 for _ in self.mapping)


class AsyncStore(Store):
    """A store that is awaited: requests are in flight at once.

    Between reading and writing a session, another task of this process may write it too, and one
    of the two updates would be lost. So there is a lock per session, as a server would have it.
    """

    called = ASYNCIO

    async def change_one(self, key: str, change: Change) -> None:
        """See `Store`."""
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
        async with lock:
            await self.change_alone(key, change)

    @cached_property
    def _locks(self) -> dict[str, asyncio.Lock]:
        return {}

    @abstractmethod
    async def change_alone(self, key: str, change: Change) -> None:
        """Change a session that no other task of this process changes."""

    async def read(self, keys: Sequence[str]) -> None:
        """See `Store`."""
        await in_tasks(keys, self.read_one, _IN_FLIGHT)

    async def change(self, steps: Sequence[Step]) -> None:
        """See `Store`."""
        await in_tasks(steps, self._step, _IN_FLIGHT)

    async def _step(self, step: Step) -> None:
        await self.change_one(*step)

    async def remove(self, keys: Sequence[str]) -> None:
        """See `Store`."""
        await in_tasks(keys, self.remove_one, _IN_FLIGHT)

    @abstractmethod
    async def remove_one(self, key: str) -> None:
        """Delete one session."""

    async def read_one(self, key: str) -> None:
        """See `Store`."""
        data: Any = await self.get(key)
        data["prefs"]
