"""A random workload beside a plain dict, which knows what each session may hold after a crash."""

from __future__ import annotations

import random
from typing import Any, Final

from persistence import ManualClock, StateManager
from persistence.errors import DirectoryNotUsable, DiskFull, WriteOutcomeUnknown
from tests.disk.memoryfiles import Killed

Data = dict[str, Any]
Value = Data | None
"""What a session holds; None: there is no such session."""

_GONE: Final = (WriteOutcomeUnknown, Killed)


class Workload:
    """Does one thing after the other to a manager and writes down what the caller was told.

    Args:
        seed: the same seed does the same things.
        sessions: how many ids there are; few, so that they end and begin again.
        value_bytes: about how large a value is.

    Attributes:
        values: what each session holds, as far as calls have returned.
        possible: by id, what else a session may hold after a crash, because a call that would
            have made it so did not return, or failed.
        is_over: whether the engine takes no more writes.
        refused: how many writes found the disk full, or no file to open.
    """

    def __init__(self, seed: int, *, sessions: int = 12, value_bytes: int = 3000) -> None:
        self.values: dict[str, Value] = {f"s{number}": None for number in range(sessions)}
        self.possible: dict[str, list[Value]] = {}
        self.is_over = False
        self.refused = 0
        self._chance = random.Random(seed)
        self._value_bytes = value_bytes
        self._count = 0

    async def run(self, state: StateManager, steps: int, clock: ManualClock | None = None) -> None:
        """Do `steps` things, or fewer when the engine takes no more."""
        for _ in range(steps):
            if self.is_over:
                return
            if clock is not None:
                clock.advance(self._chance.random() * 20)
            await self.step(state)

    async def step(self, state: StateManager) -> None:
        """Do something to one session."""
        sid = self._chance.choice(sorted(self.values))
        before = self.values[sid]
        kind = self._chance.random()
        if before is None:
            value: Value = self._value()
        elif kind < 0.15:
            value = {**before, "n": self._value()["n"]}  # little of what a large one holds
        elif kind < 0.5:
            value = {**before, "x": self._value()["x"]}
        elif kind < 0.7:
            value = self._value()
        elif kind < 0.85:
            value = None
        else:
            assert await self.read(state, sid) == before
            return
        try:
            field = "n" if kind < 0.15 else "x" if kind < 0.5 else ""
            await self._write(state, sid, before, value, field)
        except (DiskFull, DirectoryNotUsable):
            self.refused += 1
            self.possible.setdefault(sid, []).append(value)  # a power loss may bring it back
        except _GONE:
            self.possible.setdefault(sid, []).append(value)
            self.is_over = True
        else:
            self.values[sid] = value
            self.possible.pop(sid, None)

    def _value(self) -> Data:
        self._count += 1
        size = self._chance.randrange(self._value_bytes * 2)
        return {"n": self._count, "x": self._chance.randbytes(size)}

    async def _write(
        self, state: StateManager, sid: str, before: Value, value: Value, field: str
    ) -> None:
        if value is None:
            assert await state.terminate_session(sid)
        elif before is None:
            await state.create_session(session_id=sid, data=value)
        elif field:
            await state.update_session_data(sid, field, value[field])
        else:
            await state.replace_session(sid, value)

    @staticmethod
    async def read(state: StateManager, sid: str) -> Value:
        """Return what the engine says a session holds."""
        session = await state.get_session(sid)
        return None if session is None else session.data

    # --- after a crash ------------------------------------------------------------------------

    async def check(self, state: StateManager) -> None:
        """Assert that every session holds what it may hold.

        What it does hold is certain from then on.
        """
        for sid, value in self.values.items():
            found = await self.read(state, sid)
            allowed = [value, *self.possible.get(sid, [])]
            assert found in allowed, (sid, _short(found), _short(value))
            self.values[sid] = found
        alive = {sid for sid, value in self.values.items() if value is not None}
        assert set(await state.get_active_sessions()) == alive
        self.possible.clear()
        self.is_over = False


def _short(value: Value) -> object:
    return None if value is None else (value.get("n"), len(value.get("x", b"")))
