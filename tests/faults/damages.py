"""Damages of several bytes in a real log: as disks, cables, file systems and people make them.

Every single flipped bit is tried in `tests/disk/test_log_prefixes.py`; this is for what no list
exhausts, by chance and by the million. A frame's decoder looks at nothing outside of the frame,
so each damage is judged there: it gives no frame, or the very frame that was written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Final

from persistence.disk.format import Frame, decode_frame
from tests.disk.history import History, Placed, write_history

_LOG_BYTES: Final = 64 * 1024
_LONGEST_BYTES: Final = 64

Damage = Callable[[bytearray, int, int, Random], None]


def _overwritten(log: bytearray, start: int, end: int, chance: Random) -> None:
    log[start:end] = chance.randbytes(end - start)


def _zeroed(log: bytearray, start: int, end: int, chance: Random) -> None:
    log[start:end] = bytes(end - start)


def _erased(log: bytearray, start: int, end: int, chance: Random) -> None:
    log[start:end] = b"\xff" * (end - start)


def _misplaced(log: bytearray, start: int, end: int, chance: Random) -> None:
    source = chance.randrange(len(log) - (end - start))
    log[start:end] = log[source : source + end - start]


def _swapped(log: bytearray, start: int, end: int, chance: Random) -> None:
    log[start:end] = log[start:end][::-1]


def _shifted(log: bytearray, start: int, end: int, chance: Random) -> None:
    log[start:end] = log[start + 1 : end] + log[start : start + 1]


def _flipped(log: bytearray, start: int, end: int, chance: Random) -> None:
    for _ in range(chance.randrange(2, 9)):
        log[chance.randrange(start, end)] ^= 1 << chance.randrange(8)


def _added(log: bytearray, start: int, end: int, chance: Random) -> None:
    """One number up, another down: what sums of bytes do not see."""
    log[start] = (log[start] + 1) % 256
    log[end - 1] = (log[end - 1] - 1) % 256


KINDS: Final[tuple[Damage, ...]] = (
    _overwritten,
    _zeroed,
    _erased,
    _misplaced,
    _swapped,
    _shifted,
    _flipped,
    _added,
)


class Damages:
    """Damages one log again and again, each time only once.

    Args:
        seed: of the log and of what happens to it.

    Attributes:
        history: the log, and what is in it.
        done: how many damages of each kind changed a byte.
        unchanged: how many changed none, such as zeros over zeros; the frame was read each time.
    """

    def __init__(self, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self.unchanged = 0
        self.history: History = write_history(_LOG_BYTES, seed=seed)
        self._chance = Random(seed)
        self._log = bytearray(self.history.log)

    def run(self, count: int) -> None:
        """Do so many damages.

        Raises:
            AssertionError: one of them gave a frame that nobody wrote there.
        """
        for placed in self._chance.choices(self.history.frames, k=count):
            self._one(placed, self._chance.choice(KINDS))

    def _one(self, placed: Placed, damage: Damage) -> None:
        chance, log = self._chance, self._log
        length = chance.randrange(2, min(_LONGEST_BYTES, placed.frame.length))
        start = placed.offset + chance.randrange(placed.frame.length - length)
        good = log[start : start + length]
        damage(log, start, start + length, chance)
        found = decode_frame(log, placed.offset, self.history.header.salt_checksum)
        if log[start : start + length] == good:
            self.unchanged += 1
            assert found == placed.frame, f"a whole frame at {placed.offset} is not read"
            return
        self.done[damage.__name__[1:]] += 1
        assert not isinstance(found, Frame), (
            f"{damage.__name__[1:]} bytes {start} to {start + length} are not noticed in the frame "
            f"at {placed.offset}: {bytes(log[start : start + length]).hex()}"
        )
        log[start : start + length] = good
