"""Random work on a few sessions, and watchers of every pace, next to a model of what was true."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from persistence import SessionChange, StateManager, Watch
from persistence.errors import SessionNotFound
from tests.engine import Start
from tests.full_size import full_or

FIELDS = ("a", "b", "c")
NAMES = ("s0", "s1", "s2")


class Truth:
    """What each version of each session held; a new life of a session is another line."""

    def __init__(self) -> None:
        self.lines: dict[str, list[dict[int, dict[str, Any]]]] = {name: [] for name in NAMES}

    def note(self, name: str, version: int, data: dict[str, Any], *, is_new: bool) -> None:
        if is_new:
            self.lines[name].append({})
        self.lines[name][-1][version] = data


class Reader:
    """One watcher: checks each change against the one before it and against the truth."""

    def __init__(self, name: str, version: int, watch: Watch) -> None:
        self.name = name
        self.version = version
        self.watch = watch
        self.told: list[SessionChange] = []

    async def read(self, pace: random.Random) -> None:
        async for change in self.watch:
            self.told.append(change)
            for _ in range(pace.randrange(4)):
                await asyncio.sleep(0)

    def check(self, line: dict[int, dict[str, Any]]) -> None:
        before = self.version
        for change in self.told:
            assert change.session_id == self.name
            if change.is_end:
                assert change is self.told[-1]
                assert change.version == before == max(line)
                return
            assert change.kind == "updated"
            assert change.version == before + 1 + change.skipped
            assert change.fields is not None
            old, new = line[before], line[change.version]
            differ = {name for name in FIELDS if old.get(name) != new.get(name)}
            assert differ <= change.fields
            if not change.skipped:
                assert differ == change.fields
            before = change.version


@pytest.mark.parametrize("seed", range(full_or(200, 4)))
async def test_what_watchers_are_told_is_what_happened(start: Start, seed: int) -> None:
    chance = random.Random(seed)
    state = await start(memory={"max_bytes": "4KiB"})
    truth = Truth()
    readers: list[tuple[Reader, dict[int, dict[str, Any]]]] = []
    tasks: list[asyncio.Task[None]] = []

    async def work(name: str) -> None:
        for _ in range(60):
            await step(state, name, truth, chance)
            if chance.random() < 0.15 and await state.has_session(name):
                line = truth.lines[name][-1]
                watch = state.watch(name, max_pending=chance.randint(1, 8))
                reader = Reader(name, max(line), watch)
                readers.append((reader, line))
                tasks.append(asyncio.create_task(reader.read(random.Random(chance.random()))))

    await asyncio.gather(*map(work, NAMES))
    for name in NAMES:
        if await state.terminate_session(name):
            assert truth.lines[name]
    async with asyncio.timeout(20):
        await asyncio.gather(*tasks)
    assert len(readers) > 5
    for reader, line in readers:
        assert reader.told
        assert reader.told[-1].is_end
        reader.check(line)
    assert not state._watching.is_on


async def step(state: StateManager, name: str, truth: Truth, chance: random.Random) -> None:
    """Do something to a session; each is worked on by one task, so its result is the truth."""
    kind = chance.randrange(8)
    is_new = False
    field, value = chance.choice(FIELDS), chance.randrange(3)
    try:
        if kind == 0:
            await state.spill_session(name)
            return
        if kind == 1:
            await state.set_ttl(name, 1000 + value)
            return
        if kind == 2 and chance.random() < 0.3:
            await state.terminate_session(name)
            return
        if kind == 3:
            session = await state.replace_session(name, {field: value})
        elif kind == 4:
            session = await state.replace_session(name, {field: value}, ttl_seconds=2000)
        elif kind == 5:
            session = await state.update_session_metadata(name, source=str(value))
        else:
            session = await state.update_session(name, lambda data: data.update({field: value}))
    except SessionNotFound:
        session = await state.get_or_create_session(name, data={field: value})
        is_new = True
    truth.note(name, session.version, session.data, is_new=is_new)
