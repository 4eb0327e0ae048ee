"""A group commit under asyncio, and nothing else: what the interpreter sets as a limit."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import asyncio
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgpack
from crc32c import crc32c

from benchmarks import payloads
from benchmarks.contender import ASYNCIO, SYNCED, Contender, Metrics, Stopwatch, check
from benchmarks.peers.bare import open_log
from benchmarks.tasks import TASK_COUNT, in_tasks

_CHANGED = "prefs"

_Waiting = tuple[str, dict[str, bytes], asyncio.Future[None]]


@dataclass
class LeastUpdate(Contender):
    """Unpack one field, change it, pack it; join the session, checksum it; wait for its sync.

    While one batch is written and synced in a thread, the next one gathers. There is no index and
    no budget, nothing expires, nothing is ever read back, and nobody else may write to a session:
    whatever keeps sessions from Python with a group commit does all of this, and more.
    """

    session_count: int
    update_count: int
    name: str = "asyncio, group commit, nothing else"
    is_limit: bool = True
    durability: str = SYNCED
    called: str = ASYNCIO
    request_tasks: int = TASK_COUNT

    async def open(self, directory: Path) -> None:
        self._file = open_log(directory)
        self._writer = ThreadPoolExecutor(1)
        self._random = random.Random(2)
        self._sessions = {
            payloads.session_id(index): {
                name: msgpack.packb(value) for name, value in payloads.session(index).items()
            }
            for index in range(self.session_count)
        }
        self._gathered: list[_Waiting] = []
        self._some = asyncio.Event()
        self._committing = asyncio.create_task(self._commit())
        self._visits = self._count_visits()

    async def measure(self) -> Metrics:
        indexes = self._random.choices(range(self.session_count), k=self.update_count)
        ids = [payloads.session_id(index) for index in indexes]
        with Stopwatch() as watch:
            await in_tasks(ids, self._update)
        before, self._visits = self._visits, self._count_visits()
        # Of two at once, one may not have seen the other.
        check(before < self._visits <= before + len(ids), "updates were lost")
        return watch.rate(len(ids))

    async def request(self) -> None:
        await self._update(payloads.session_id(self._random.randrange(self.session_count)))

    def _count_visits(self) -> int:
        return sum(msgpack.unpackb(each[_CHANGED])["visits"] for each in self._sessions.values())

    async def _update(self, session_id: str) -> None:
        session = self._sessions[session_id]
        changed = {_CHANGED: msgpack.unpackb(session[_CHANGED])}
        payloads.count_visit(changed)
        newer = {**session, _CHANGED: msgpack.packb(changed[_CHANGED])}
        done = asyncio.get_running_loop().create_future()
        self._gathered.append((session_id, newer, done))
        self._some.set()
        await done

    async def _commit(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._some.wait()
            self._some.clear()
            batch, self._gathered = self._gathered, []
            pieces: list[bytes] = []
            for session_id, session, _ in batch:
                record = b"".join(session.values())
                pieces += (session_id.encode(), record, crc32c(record).to_bytes(4, "little"))
            await loop.run_in_executor(self._writer, self._write, b"".join(pieces))
            for session_id, session, done in batch:
                self._sessions[session_id] = session
                if not done.done():
                    done.set_result(None)

    def _write(self, data: bytes) -> None:
        os.write(self._file, data)
        os.fdatasync(self._file)

    async def close(self) -> None:
        self._committing.cancel()
        self._writer.shutdown()
        os.close(self._file)
