"""Power cuts of a real file system under a real worker, life after life on one directory."""

from __future__ import annotations

import threading
from random import Random
from typing import Any, Final

from tests.crash_nursery import SESSIONS
from tests.crashes import History, Nursery, work_and_check
from tests.faults.kernel import Ext4

_LONGEST_SECONDS: Final = 0.5
"""From the first acknowledgement of a life to the cut."""
_LIFE_SECONDS: Final = 20.0


class PowerCuts:
    """Cuts the power under workers; each life starts with a look at what is left.

    Args:
        nursery: raises them.
        disk: where they work.
        seed: of the times.

    Attributes:
        cuts: how many there were.
        directory: where the log is.
        histories: of each session.
    """

    def __init__(self, nursery: Nursery, disk: Ext4, seed: int) -> None:
        self.cuts = 0
        self.directory = disk.path / "state"
        self.histories = {session_id: History() for session_id in SESSIONS}
        self._nursery = nursery
        self._disk = disk
        self._random = Random(seed)

    @property
    def acknowledged(self) -> int:
        """How many updates were acknowledged."""
        return sum(history.acknowledged for history in self.histories.values())

    def one(self) -> None:
        """Let a worker work, and cut the power at a random time."""
        self.cuts += 1
        order: dict[str, Any] = {
            "directory": str(self.directory),
            "disk": {"fsync": "always"},
            "filler_bytes": 4_000,
            "run": self.cuts,
            "seconds": _LIFE_SECONDS,
            "closes": False,
            "checkpoints": self._random.random() < 0.3,
            "endures": True,
        }
        others: list[list[Any]] = []
        problems: list[BaseException] = []

        # An fdatasync that the ioctl overtakes may return success with nothing on the disk: a bare
        # loop of pwrite and fdatasync loses its last write in one of 25 cuts. So what is told from
        # the beginning of the cut on is no promise.
        is_cut = threading.Event()

        def cut() -> None:
            is_cut.set()
            try:
                self._disk.cut_power()
            except BaseException as error:  # noqa: BLE001 - raised below, in the thread that asked
                problems.append(error)

        timer = threading.Timer(self._random.uniform(0.0, _LONGEST_SECONDS), cut)
        if self._random.random() < 0.2:
            timer.start()  # most of these cuts hit the opening

        def on_report(kind: str) -> None:
            if kind == "done" and not timer.ident:
                timer.start()

        code, _ = work_and_check(
            self._nursery, order, self.histories, others, on_report, lambda: not is_cut.is_set()
        )
        if timer.ident:
            timer.join()
        if problems:
            raise problems[0]
        assert code in (None, 0), "the worker ended with an error that is not the engine's"
        self._disk.after_power_cut()
