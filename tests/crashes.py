"""Real processes that are killed, and what their next lives must find.

`Nursery` raises workers (`crash_nursery`); `History` is what a session may be after a crash.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from persistence import StateConfig, StateManager
from tests import encryption
from tests.crash_nursery import State
from tests.engine import contents
from tests.nurseries import NurseryProcess

NURSERY = Path(__file__).with_name("crash_nursery.py")


class Nursery(NurseryProcess):
    """The process that raises the workers and kills them."""

    def __init__(self) -> None:
        super().__init__(NURSERY)

    def run(self, order: dict[str, Any]) -> Iterator[list[Any]]:
        """Yield what a worker reports until its end, the end included."""
        for words in self.answers(order):
            yield words
            if words[0] == "end":
                return


class History:
    """One session: what was submitted since it was last looked at, and what of it was done."""

    def __init__(self) -> None:
        self.states: list[State] = [None]
        self.done = 0
        self.acknowledged = 0

    def submitted(self, state: State) -> None:
        self.states.append(state)

    def acknowledge(self, state: State) -> None:
        place = self.states.index(state, self.done + 1)
        assert place == self.done + 1, "acknowledged before what it was built on"
        self.done = place
        self.acknowledged += 1

    def found(self, state: State) -> None:
        """After a crash: at least what was done, at most what was submitted, nothing else."""
        possible = self.states[self.done :]
        assert state in possible, f"found {state}, possible are {possible}"
        self.states, self.done = [state], 0


def work_and_check(
    nursery: Nursery,
    order: dict[str, Any],
    histories: dict[str, History],
    others: list[list[Any]] | None = None,
    on_report: Callable[[str], None] = lambda _: None,
    counts: Callable[[], bool] = lambda: True,
) -> tuple[int | None, int]:
    """Let a worker live; check what it finds; return its exit code and how much it reported.

    What it reports of other things than sessions is added to `others`; `on_report` is called with
    the first word of every report. What is done counts only while `counts` says so.
    """
    lines = 0
    code: int | None = None
    for kind, *words in nursery.run(order):
        lines += 1
        on_report(kind)
        if kind == "end":
            (code,) = words
        elif kind in {"point", "made", "size"}:
            assert others is not None
            others.append([kind, *words])
        elif kind != "done" or counts():
            history = histories[words[0]]
            {"found": history.found, "try": history.submitted, "done": history.acknowledge}[kind](
                words[1]
            )
    return code, lines


async def check_by_opening(directory: Path, copy: Path, histories: dict[str, History]) -> None:
    shutil.copytree(directory, copy)
    disk = {"disk": {"path": str(copy)}}
    config = StateConfig.model_validate({**disk, **encryption.sections()})
    async with StateManager(config=config) as state:
        left = await contents(state)
        assert left.keys() <= histories.keys()
        for session_id, history in histories.items():
            data = left.get(session_id)
            history.found(None if data is None else [data["generation"], data["count"]])
        assert (await state.stats()).disk.damages == 0
        assert await state.get_active_sessions() != []
    # Recovered and closed once more: nothing has changed.
    async with StateManager(config=config) as state:
        assert await contents(state) == left
