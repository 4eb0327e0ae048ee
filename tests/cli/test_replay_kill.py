"""SIGKILL at any moment of a replay, then resume: exactly once per request, all the same."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from persistence.cli.export import line_fields, sessions_in
from persistence.cli.jsonl import decode, encode
from persistence.cli.replayer import CURSOR_ID
from persistence.clock import SystemClock
from tests.cli.generated import write_log
from tests.nurseries import NurseryProcess
from tests.redis_servers import RedisServer

KILLS = 104
SHARED_KILLS = 16
CHAINS = 2
REQUESTS = 300
SCRIPT = Path(__file__).with_name("replay_nursery.py")

State = dict[str, tuple[Any, Any]]


class Nursery(NurseryProcess):
    """A process that forks a replay for each order, and kills it when its time is over."""

    def __init__(self, log: Path, *more: str) -> None:
        super().__init__(SCRIPT, str(log), *more)

    def run_for(self, directory: Path, seconds: float | None) -> int | None:
        """Run a replay for so long (None: to its end); return its exit code, None if killed."""
        code = self.answer({"directory": str(directory), "seconds": seconds})
        assert code is None or type(code) is int
        return code


def state_of(directory: Path) -> State:
    """Return what the directory holds, by way of its export."""

    async def collected() -> State:
        lines = [
            decode(encode(line_fields(session))) async for session in sessions_in(directory, [])
        ]
        return {line["id"]: (line["data"], line.get("metadata")) for line in lines}

    state = asyncio.run(collected())
    state[CURSOR_ID][0].pop("namespace", None)  # that of a shared replay is a random one
    return state


def chain(
    nursery: Nursery, folder: Path, kills: int, expected: State, longest_seconds: float
) -> Counter[str]:
    """Kill and resume, in new directories as replays finish, until there were enough kills."""
    rng = random.Random(f"kill in {folder.name}")
    seen: Counter[str] = Counter()
    while seen["kills"] < kills:
        directory = folder / str(seen["finished"])
        while True:
            is_last = seen["kills"] >= kills
            seconds = None if is_last else rng.uniform(0, longest_seconds)
            code = nursery.run_for(directory, seconds)
            if code is not None:
                break
            seen["kills"] += 1
        assert code == 0
        assert state_of(directory) == expected
        seen["finished"] += 1
    return seen


def chain_of_its_own(
    folder: Path, log: Path, expected: State, longest_seconds: float
) -> Counter[str]:
    with Nursery(log) as nursery:
        return chain(nursery, folder, KILLS // CHAINS, expected, longest_seconds)


def seconds_of_replays(nursery: Nursery, folder: Path) -> float:
    """Return how long a replay takes that is not killed, into new directories.

    The shortest of some: were it too long, few replays would be killed before their end.
    """
    clock = SystemClock()
    seconds = []
    for number in range(3):
        started = clock.monotonic()
        assert nursery.run_for(folder / f"uninterrupted {number}", None) == 0
        seconds.append(clock.monotonic() - started)
    return min(seconds)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_replay_killed_at_any_moment_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    log = write_log(tmp_path / "access.log", REQUESTS)
    with Nursery(log) as nursery:
        longest_seconds = seconds_of_replays(nursery, tmp_path)
    expected = state_of(tmp_path / "uninterrupted 0")
    assert expected[CURSOR_ID][0]["watermark"] == REQUESTS
    with ThreadPoolExecutor(CHAINS) as pool:
        chains = [
            pool.submit(
                chain_of_its_own, tmp_path / f"chain {number}", log, expected, longest_seconds
            )
            for number in range(CHAINS)
        ]
        seen = sum((future.result() for future in chains), Counter[str]())
    assert seen["kills"] >= 100
    assert seen["finished"] >= CHAINS


@pytest.mark.timeout(120)
def test_a_shared_replay_killed_at_any_moment_ends_like_an_uninterrupted_one(
    tmp_path: Path, shared_server: RedisServer
) -> None:
    """Redis is ahead of the log then, by what was committed there and not yet written here."""
    log = write_log(tmp_path / "access.log", REQUESTS // 2)
    with Nursery(log, shared_server.url) as nursery:
        longest_seconds = seconds_of_replays(nursery, tmp_path)
        expected = state_of(tmp_path / "uninterrupted 0")
        seen = chain(nursery, tmp_path / "killed", SHARED_KILLS, expected, longest_seconds)
    assert seen["finished"] >= 1
