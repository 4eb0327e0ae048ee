"""One contender in one process: started once, then told to measure whenever its turn comes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from benchmarks.contender import Contender, Metrics, WrongResultError
from benchmarks.lag import Observed, observe
from benchmarks.optional import UnavailableError

_EXIT_SECONDS = 30
_PRELOADED = [
    *("benchmarks.catalogue", "benchmarks.isolation", "benchmarks.resident", "persistence.manager"),
    *("diskcache", "lmdb", "msgpack", "redis.asyncio", "rocksdict", "zict"),
]


@dataclass(frozen=True)
class Failure:
    """Why a contender has no number.

    `kind` is "unavailable" (its row is skipped), "wrong" or "crashed" (the run fails).
    """

    kind: str
    reason: str


@dataclass(frozen=True)
class Command:
    """What a contender is told: "open", "measure", "observe" or "close"."""

    name: str
    sample_count: int = 0
    limit_seconds: float = 0.0


Reply = Metrics | Observed | Failure


class Host(Protocol):
    """Where a contender lives. Every call waits for the answer."""

    def ask(self, command: Command) -> Reply:
        """Tell the contender something; "close" ends it."""


class Isolated:
    """A contender's process, seen from the runner."""

    def __init__(self, contender: Contender, directory: Path) -> None:
        # A child of the runner would inherit its heap and count it as its own; one of the fork
        # server inherits the modules that most contenders import, and nothing else.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._pipe, remote = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(remote, contender, directory), name=contender.name, daemon=False
        )
        self._process.start()
        remote.close()

    def ask(self, command: Command) -> Reply:
        """See `Host`."""
        reply = self._exchange(command)
        if command.name == "close":
            self._end()
        return reply

    def _exchange(self, command: Command) -> Reply:
        try:
            self._pipe.send(command)
            reply: Reply = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(_EXIT_SECONDS)
            return Failure("crashed", f"its process ended with {self._process.exitcode}")
        return reply

    def _end(self) -> None:
        self._process.join(_EXIT_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()


class Inside:
    """A contender in this very process: for sizes at which starting one takes the longest."""

    def __init__(self, contender: Contender, directory: Path) -> None:
        self._runner = asyncio.Runner()
        self._stage = _Stage(contender, directory)

    def ask(self, command: Command) -> Reply:
        """See `Host`."""
        reply = self._runner.run(self._stage.perform(command))
        if command.name == "close":
            self._runner.close()
        return reply


def _serve(pipe: Connection, contender: Contender, directory: Path) -> None:
    # Interrupted are all processes of a terminal at once; the runner says so.
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_answer(pipe, _Stage(contender, directory)))


async def _answer(pipe: Connection, stage: _Stage) -> None:
    loop = asyncio.get_running_loop()
    is_closed = False
    try:
        while not is_closed:
            # In a thread, so that a contender's background tasks live on while others have a turn.
            command: Command = await loop.run_in_executor(None, pipe.recv)
            if command.name in {"measure", "observe"}:
                _settle()
            pipe.send(await stage.perform(command))
            is_closed = command.name == "close"
    except (EOFError, BrokenPipeError):
        return  # the runner has ended
    finally:
        if not is_closed:
            await stage.abandon()


class _Stage:
    """A contender and where it stands."""

    def __init__(self, contender: Contender, directory: Path) -> None:
        self._contender = contender
        self._directory = directory
        self._is_open = False

    async def perform(self, command: Command) -> Reply:
        """Do what a command says; whatever it raises is a `Failure`."""
        try:
            return await self._perform(command)
        except UnavailableError as error:
            return Failure("unavailable", str(error))
        except WrongResultError as error:
            return Failure("wrong", str(error))
        except Exception as error:  # noqa: BLE001 - a peer may raise anything; the others go on
            traceback.print_exc()
            return Failure("crashed", f"{type(error).__name__}: {error}")

    async def _perform(self, command: Command) -> Reply:
        contender = self._contender
        if command.name == "open":
            await contender.open(self._directory)
            self._is_open = True
            # Full collections would go over all modules each time, of peers and of the engine: a
            # pause that a server spares itself in the same way.
            gc.collect()
            gc.freeze()
        elif command.name == "measure":
            return await contender.measure()
        elif command.name == "observe":
            return await observe(contender, command.sample_count, command.limit_seconds)
        else:
            await self._close()
        return {}

    async def _close(self) -> None:
        if self._is_open:
            await self._contender.close()
            return
        await self.abandon()

    async def abandon(self) -> None:
        """Close what was opened halfway, or is at work: what there is (a server, say) must end."""
        with contextlib.suppress(Exception):
            await self._contender.close()


def _settle() -> None:
    """Let a repetition begin without garbage, and without dirty pages of somebody else."""
    gc.collect()
    os.sync()
