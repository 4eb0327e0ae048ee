"""What the demo's worker does and what its parent checks: pure functions that both share.

The worker counts in each session, one update after the other, and tells the parent of each update
once it is acknowledged. So a session that is found later must hold the last count that was told,
or the one after it: submitted, killed before it was told. Anything else is a loss or a phantom.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from hashlib import shake_128
from struct import Struct
from typing import Any, Final

from persistence import DiskConfig, MemoryConfig, SessionConfig, ShutdownConfig, StateConfig

SESSIONS: Final = 8_000
MEMORY_BYTES: Final = 1024 * 1024
PAYLOAD_BYTES: Final = 480
EDITORS: Final = 128
NEVER: Final = -1

ACK: Final = Struct("<II")
"""Session number and count. Smaller than PIPE_BUF, so an acknowledgement is in the pipe whole or
not at all, whenever the writer is killed."""


def config(directory: str) -> StateConfig:
    """Return the configuration of worker and parent: durable, and far too little memory."""
    return StateConfig(
        session=SessionConfig(ttl_seconds=3600),
        memory=MemoryConfig(max_bytes=MEMORY_BYTES),
        disk=DiskConfig(path=directory, fsync="always", segment_bytes=8 * 2**20),
        shutdown=ShutdownConfig(checkpoint=False),
    )


def session_name(number: int) -> str:
    """Return the id of session `number`."""
    return f"player-{number:05d}"


def payload(number: int, count: int) -> str:
    """Return what session `number` holds at `count`: as good as random, so it does not compress."""
    return shake_128(b"%d %d" % (number, count)).hexdigest(PAYLOAD_BYTES // 2)


def data_of(number: int, count: int) -> dict[str, Any]:
    """Return the whole data of session `number` at `count`."""
    return {"count": count, "payload": payload(number, count)}


def count_up(data: MutableMapping[str, Any], number: int) -> None:
    """Change the data of session `number` from any count to the next: the worker's update."""
    data.update(data_of(number, data["count"] + 1))


@dataclass(slots=True)
class Ledger:
    """What the parent knows of each session.

    Attributes:
        counts: by session number, the last count acknowledged or found; NEVER before the first.
        acknowledged: acknowledgements taken.
    """

    counts: list[int]
    acknowledged: int = 0

    @staticmethod
    def of(sessions: int) -> Ledger:
        """Return a ledger in which nothing is acknowledged."""
        return Ledger([NEVER] * sessions)

    def take(self, acknowledgements: bytes) -> None:
        """Take whole acknowledgements as they come out of the pipe."""
        for number, count in ACK.iter_unpack(acknowledgements):
            self.counts[number] = count
            self.acknowledged += 1

    def is_complete(self) -> bool:
        """Whether every session has been acknowledged at least once."""
        return NEVER not in self.counts

    def check(self, number: int, found: Mapping[str, Any] | None) -> str | None:
        """Compare a session found with what is known, and note its count.

        Returns:
            What is wrong, in words, or None.
        """
        known = self.counts[number]
        if found is None:
            return None if known == NEVER else f"missing, {known} was acknowledged"
        count = found.get("count")
        if count not in (known, known + 1):
            return f"holds {count!r}, but {known} was acknowledged and {known + 1} submitted"
        if dict(found) != data_of(number, count):
            return f"its data are not those of count {count}"
        self.counts[number] = count
        return None
