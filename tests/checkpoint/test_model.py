"""Random histories against a dict: whatever happened before, a checkpoint restores what was."""

from __future__ import annotations

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from persistence import ManualClock, StateManager
from tests.checkpoint.support import MemoryStore, checkpoint, restored
from tests.engine import KIB, ScriptedFiles, config_for, disk_of

SESSIONS = st.integers(0, 15)
STEPS = st.one_of(
    st.tuples(st.just("write"), SESSIONS),
    st.tuples(st.just("write many"), SESSIONS),
    st.tuples(st.just("delete"), SESSIONS),
    st.tuples(st.sampled_from(["checkpoint", "compact", "reopen", "crash"]), st.just(0)),
)
_PADDING = "0123456789 " * 80


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=30))
def test_every_checkpoint_restores_what_was(steps: list[tuple[str, int]]) -> None:
    with TemporaryDirectory() as path:
        asyncio.run(History(Path(path)).run(steps))


class History:
    """One worker's life, and what it must be able to go back to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = MemoryStore()
        self.model: dict[str, dict[str, Any]] = {}
        self.points: list[tuple[str, dict[str, Any]]] = []
        self.clock = ManualClock()
        self.writes = 0

    async def run(self, steps: list[tuple[str, int]]) -> None:
        state = await self.opened()
        for what, session in steps:
            if what == "checkpoint":
                info = await checkpoint(state, self.store, keep=3)
                self.points.append((info.id, dict(self.model)))
            elif what == "compact":
                disk_of(state).compactor.wake()
                await disk_of(state).compactor.settle()
            elif what in {"reopen", "crash"}:
                state = await self.again(state, is_clean=what == "reopen")
            elif what == "delete":
                await state.terminate_session(f"s{session}")
                self.model.pop(f"s{session}", None)
            else:
                for other in range(session, 16 if what == "write many" else session + 1):
                    await self.write(state, f"s{other}")
        await state.close()
        for number, (checkpoint_id, expected) in enumerate(self.points[-3:]):
            target = self.path / f"restored {number}"
            found, data = await restored(
                self.store, target, checkpoint_id, clock=self.clock, files=ScriptedFiles()
            )
            assert (found.id, found.skipped, data) == (checkpoint_id, (), expected)

    async def opened(self) -> StateManager:
        config = config_for(self.path / "state", disk={"segment_bytes": 64 * KIB})
        self.files = ScriptedFiles()
        state = StateManager(config=config, clock=self.clock, files=self.files)
        await state.open()
        return state

    async def again(self, state: StateManager, *, is_clean: bool) -> StateManager:
        if is_clean:
            await state.close()
            return await self.opened()
        image = self.path / f"crash {self.writes} {len(self.points)} {id(state)}"
        self.files.image(self.path / "state", image)
        await state.close()
        (self.path / "state").rename(self.path / f"{image.name} old")
        image.rename(self.path / "state")
        return await self.opened()

    async def write(self, state: StateManager, sid: str) -> None:
        self.writes += 1
        data = {"n": self.writes, "padding": _PADDING}
        if sid in self.model:
            await state.update_session_data(sid, "n", self.writes)
        else:
            await state.create_session(session_id=sid, data=data)
        self.model[sid] = data
