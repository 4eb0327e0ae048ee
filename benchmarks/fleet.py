"""Several processes that update the same sessions at once."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import random
import traceback
from abc import ABC, abstractmethod
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from benchmarks import payloads
from benchmarks.contender import Contender, Metrics, Stopwatch, check
from benchmarks.optional import UnavailableError
from benchmarks.redis_server import RedisServer


class Member(ABC):
    """One of the processes. Pickled into it before `open`."""

    @abstractmethod
    async def open(self, directory: Path, number: int, session_count: int) -> None:
        """Open what all share; number 0 opens first, and creates the sessions."""

    @abstractmethod
    async def update(self, keys: list[str]) -> None:
        """Count a visit in each of the sessions."""

    @abstractmethod
    async def visits(self, keys: list[str]) -> int:
        """Return the sum of all visits, as this process sees them now."""

    @abstractmethod
    async def close(self) -> None:
        """Release everything."""


class FleetUpdate(Contender):
    """Updates of random shared sessions by `process_count` processes; none may be lost."""

    def __init__(
        self, member: Member, session_count: int, update_count: int, process_count: int
    ) -> None:
        self.member = member
        self.session_count = session_count
        self.update_count = update_count
        self.process_count = process_count

    async def open(self, directory: Path) -> None:
        self._members: list[_Remote | _Local] = []
        self._keys = [payloads.session_id(index) for index in range(self.session_count)]
        self._random = random.Random(2)
        for number in range(self.process_count or 1):
            remote = _Remote(self.member) if self.process_count else _Local(self.member)
            self._members.append(remote)
            await remote.ask("open", directory, number, self.session_count)
        self._visits = await self._members[0].ask("visits", self._keys)

    async def measure(self) -> Metrics:
        each = max(1, self.update_count // len(self._members))
        drawn = [self._random.choices(self._keys, k=each) for _ in self._members]
        with Stopwatch() as watch:
            await asyncio.gather(
                *(
                    remote.ask("update", keys)
                    for remote, keys in zip(self._members, drawn, strict=True)
                )
            )
        updated = each * len(self._members)
        self._visits += updated
        seen = await self._members[0].ask("visits", self._keys)
        check(seen == self._visits, f"{self._visits - seen} updates were lost")
        return watch.rate(updated)

    async def close(self) -> None:
        answers = await asyncio.gather(
            *(remote.end() for remote in self._members), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer


class RedisFleetUpdate(FleetUpdate):
    """The same of processes with a Redis of their own between them."""

    @abstractmethod
    def take_url(self, url: str) -> None:
        """The Redis is there: tell the member where, before it is pickled."""

    async def open(self, directory: Path) -> None:
        self._server = RedisServer(durable=directory)
        self._server.start()
        self.take_url(self._server.url)
        await super().open(directory)

    async def close(self) -> None:
        try:
            await super().close()
        finally:
            self._server.close()


class _Remote:
    """A member's process, seen from the contender."""

    def __init__(self, member: Member) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, remote = context.Pipe()
        self._process: SpawnProcess = context.Process(target=_serve, args=(remote, member))
        self._process.start()
        remote.close()

    async def ask(self, name: str, *arguments: Any) -> Any:
        """Call a method of the member; what it raises is raised here."""
        self._pipe.send((name, arguments))
        answer = await asyncio.to_thread(self._pipe.recv)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def end(self) -> None:
        """Close the member and end its process."""
        try:
            await self.ask("close")
        finally:
            await asyncio.to_thread(self._process.join)
            self._pipe.close()


class _Local:
    """A member in this process: for sizes at which starting one takes the longest."""

    def __init__(self, member: Member) -> None:
        self._member = member

    async def ask(self, name: str, *arguments: Any) -> Any:
        """Call a method of the member."""
        return await getattr(self._member, name)(*arguments)

    async def end(self) -> None:
        """Close the member."""
        await self._member.close()


def _serve(pipe: Connection, member: Member) -> None:
    with contextlib.suppress(KeyboardInterrupt):  # all processes of a terminal get it at once
        asyncio.run(_answer(pipe, member))


async def _answer(pipe: Connection, member: Member) -> None:
    while True:
        try:
            name, arguments = await asyncio.to_thread(pipe.recv)
        except EOFError:
            return  # the contender has ended
        try:
            answer = await getattr(member, name)(*arguments)
        except UnavailableError as error:
            answer = error
        except Exception as error:  # noqa: BLE001 - whatever it is, the row says so
            traceback.print_exc()
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        pipe.send(answer)
        if name == "close":
            return
