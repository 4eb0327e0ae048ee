"""The parent of a replay with several workers: starts them, asks them, ends them."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from persistence.cli.accesslog import Request
from persistence.cli.failure import EXIT_OK, CommandError
from persistence.cli.replay_model import Numbers
from persistence.cli.replay_pipe import OPEN, messages, packed, request_fields
from persistence.cli.replay_sessions import Cursor, Sections

_SEED: Final = 1
_CLOSING_SECONDS: Final = 40.0  # more than a worker's own grace period


class WorkerProcess:
    """One worker, as its parent sees it.

    Args:
        number: of the worker, for messages.
        process: with pipes.
    """

    def __init__(self, number: int, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None, "started with pipes"
        assert process.stdout is not None, "started with pipes"
        self.number = number
        self.pid = process.pid
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._numbers = itertools.count(OPEN)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._last_words = ""
        self._ended = False
        self._reading = asyncio.create_task(self._read(), name=f"worker-{number}")

    @staticmethod
    async def start(number: int) -> WorkerProcess:
        """Start a worker process, which waits for its configuration."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "persistence.cli.replay_worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # A Ctrl-C in the terminal is for the parent, which ends the workers in order.
            start_new_session=True,
        )
        return WorkerProcess(number, process)

    async def open(self, sections: Sections) -> None:
        """Let it open its directory; the configuration is nowhere in the list of processes.

        Raises:
            CommandError: it cannot.
        """
        await self._send(next(self._numbers), sections)

    async def ask(self, operation: str, *arguments: Any) -> Any:
        """Return its answer.

        Raises:
            CommandError: it failed, or the worker died.
        """
        number = next(self._numbers)
        return await self._send(number, [number, operation, arguments])

    async def _send(self, number: int, message: Any) -> Any:
        if self._ended:
            raise self._obituary()
        future = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._stdin.write(packed(message))
        return await future

    async def _read(self) -> None:
        async for number, error, result in messages(self._stdout):
            future = self._waiting.pop(number, None)
            if future is None:
                self._last_words = error or ""
            elif future.done():
                continue  # whoever asked has been cancelled
            elif error is None:
                future.set_result(result)
            else:
                future.set_exception(CommandError(f"worker {self.number}: {error}"))
        await self._process.wait()
        self._ended = True
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(self._obituary())

    def _obituary(self) -> CommandError:
        if self._last_words:
            return CommandError(f"worker {self.number}: {self._last_words}")
        code = self._process.returncode
        assert code is not None, "it has ended"
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return CommandError(f"worker {self.number} (process {self.pid}) {how} before its time")

    async def close(self) -> None:
        """Let it close its directory, and wait for its end; killed when that takes too long."""
        self._stdin.close()
        try:
            async with asyncio.timeout(_CLOSING_SECONDS):
                await asyncio.shield(self._reading)
        except TimeoutError:
            self._process.kill()
            await self._reading

    def check_end(self) -> None:
        """Check that it ended in order.

        Raises:
            CommandError: it did not.
        """
        if self._process.returncode != EXIT_OK:
            raise self._obituary()


class Fleet:
    """Several workers; each request goes to one of them at random, the same ones in every run.

    Args:
        workers: open.
    """

    def __init__(self, workers: Sequence[WorkerProcess]) -> None:
        self.workers = workers
        self._dice = random.Random(_SEED)  # noqa: S311 - a workload, not a secret

    async def begin(self, cursor: Cursor, where: str, *, resume: bool) -> int:
        """Let the first worker find or create the cursor; return where to start."""
        start: int = await self.workers[0].ask("begin", cursor, where, resume)
        return start

    async def apply(self, position: int, sid: str, request: Request) -> bool:
        """Let one of them apply a request. False: it had been applied."""
        worker = self._dice.choice(self.workers)
        is_new: bool = await worker.ask("apply", position, sid, request_fields(request))
        return is_new

    async def save_watermark(self, low: int) -> None:
        """Let one of them note in the cursor that every request below `low` is acknowledged."""
        await self._dice.choice(self.workers).ask("save", low)

    async def numbers(self) -> Numbers:
        """Return the numbers of all workers, added up."""
        total = Numbers()
        for found in await asyncio.gather(*(each.ask("numbers") for each in self.workers)):
            total.add(Numbers(*found))
        return total

    async def retried(self) -> int:
        """Return how many updates were done again because another worker's came first."""
        return sum(await asyncio.gather(*(each.ask("retried") for each in self.workers)))


@asynccontextmanager
async def fleet_of(all_sections: Sequence[Sections]) -> AsyncIterator[Fleet]:
    """Start a worker for each configuration; end all of them afterwards, whatever happened.

    Raises:
        CommandError: one cannot open its directory or Redis, or did not end in order.
    """
    workers: list[WorkerProcess] = []
    try:
        for number, _ in enumerate(all_sections, 1):
            workers.append(await WorkerProcess.start(number))
        opening = [each.open(own) for each, own in zip(workers, all_sections, strict=True)]
        await asyncio.gather(*opening)
        yield Fleet(workers)
    finally:
        await asyncio.gather(*(each.close() for each in workers))
    for worker in workers:
        worker.check_end()
