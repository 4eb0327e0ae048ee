"""One contender in one process: started once, then told to measure whenever its turn comes."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.contender import Contender, Metrics, WrongResultError
from benchmarks.optional import UnavailableError

_EXIT_SECONDS = 30


@dataclass(frozen=True)
class Failure:
    """Why a contender has no number.

    `kind` is "unavailable" (its row is skipped), "wrong" or "crashed" (the run fails).
    """

    kind: str
    reason: str


Reply = Metrics | Failure


class Isolated:
    """A contender's process, seen from the runner. Every call waits for the answer."""

    def __init__(self, contender: Contender, directory: Path) -> None:
        # "spawn", because a forked child would inherit the runner's heap and count it as its own.
        context = multiprocessing.get_context("spawn")
        self._pipe, remote = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(remote, contender, directory), name=contender.name, daemon=False
        )
        self._process.start()
        remote.close()

    def open(self) -> Reply:
        """Prepare the contender; returns {} when it is ready."""
        return self._ask("open")

    def measure(self) -> Reply:
        """Run one repetition."""
        return self._ask("measure")

    def close(self) -> Reply:
        """Close the contender and end its process."""
        reply = self._ask("close")
        self._process.join(_EXIT_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        return reply

    def _ask(self, command: str) -> Reply:
        try:
            self._pipe.send(command)
            reply: Reply = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(_EXIT_SECONDS)
            return Failure("crashed", f"its process ended with {self._process.exitcode}")
        return reply


def _serve(pipe: Connection, contender: Contender, directory: Path) -> None:
    asyncio.run(_answer(pipe, contender, directory))


async def _answer(pipe: Connection, contender: Contender, directory: Path) -> None:
    loop = asyncio.get_running_loop()
    while True:
        # In a thread, so that a contender's background tasks live on while others have a turn.
        try:
            command = await loop.run_in_executor(None, pipe.recv)
        except EOFError:
            return  # the runner was interrupted
        pipe.send(await _perform(command, contender, directory))
        if command == "close":
            return


async def _perform(command: str, contender: Contender, directory: Path) -> Reply:
    try:
        if command == "open":
            await contender.open(directory)
        elif command == "measure":
            return await measure_settled(contender)
        else:
            await contender.close()
    except UnavailableError as error:
        return Failure("unavailable", str(error))
    except WrongResultError as error:
        return Failure("wrong", str(error))
    except Exception as error:  # noqa: BLE001 - a peer may raise anything; the others go on
        traceback.print_exc()
        return Failure("crashed", f"{type(error).__name__}: {error}")
    return {}


async def measure_settled(contender: Contender) -> Metrics:
    """Run one repetition from a settled state: no garbage, no dirty pages of somebody else."""
    gc.collect()
    os.sync()
    return await contender.measure()
