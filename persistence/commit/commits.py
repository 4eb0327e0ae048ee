"""One frame on its way into the log, and whoever waits for it."""

from __future__ import annotations

import asyncio
from struct import Struct
from typing import Final

from persistence.disk.format import FRAME_OVERHEAD_BYTES, ROW_RENEWS
from persistence.errors import PersistenceError
from persistence.record import FLAGS_AT, ID_BYTES, RENEWS

_FRAME_BYTES: Final = FRAME_OVERHEAD_BYTES - 2 * ID_BYTES  # beside key and record: its ids move
_FLAGS_AND_USER: Final = Struct("<II")
_unpack_flags_and_user = _FLAGS_AND_USER.unpack_from


class Commit:
    """One frame on its way into the log; see `disk.writer.Write` for what the writer reads.

    Attributes:
        session_id: whose.
        ids: incarnation id, commit id, and the id of the commit it was built on.
        record: the new record; None for a tombstone or a touch.
        changed: the new packed values, if only values of fields that were there before changed.
        life: the session's life once this is acknowledged (see `memory.tier`).
        nbytes: about how many bytes the frame takes, before compression.
        creates: it makes a session that was not there.
        previous: the commit in flight that this one was built on.
        number: its place in the order of submission.
        settled, failed, error: it has been decided, against it, and why.
        before: the record it was built on, if it was at hand.
        local: nothing that the shared tier has to learn of.
        shared: the shared tier has it.
        expired: the session's time is over; of tombstones only.
        spills: drop the session from memory when this is in the log.
        done: resolved when acknowledged; None when nobody waits.
    """

    row: bytes
    segment: int
    length: int
    expired: bool

    __slots__ = (
        "accessed",
        "before",
        "cap",
        "changed",
        "creates",
        "deadline",
        "done",
        "error",
        "expired",
        "failed",
        "fingerprint",
        "ids",
        "key",
        "kind",
        "length",
        "life",
        "local",
        "nbytes",
        "number",
        "previous",
        "record",
        "row",
        "segment",
        "session_id",
        "settled",
        "shared",
        "spills",
        "user",
    )

    def __init__(  # noqa: PLR0913, PLR0917 - made on the hot path, where keywords are felt
        self,
        kind: int,
        session_id: str,
        key: bytes,
        fingerprint: bytes,
        record: bytes | None,
        ids: bytes,
        accessed: float,
        deadline: float,
        cap: float,
        life: float,
        user: int,
    ) -> None:
        self.kind = kind
        self.session_id = session_id
        self.key = key
        self.fingerprint = fingerprint
        self.record = record
        self.ids = ids
        self.accessed = accessed
        self.deadline = deadline
        self.cap = cap
        self.life = life
        self.user = user
        self.nbytes = _FRAME_BYTES + len(key)
        if record is not None:
            self.nbytes += len(record)
        self.spills = False
        self.local = False
        self.shared = False
        self.before: bytes | None = None
        self.changed: dict[str, bytes] | None = None
        self.creates = False
        self.failed = False
        self.error: PersistenceError | None = None
        self.number = 0
        self.settled = False
        self.previous: Commit | None = None
        self.done: asyncio.Future[None] | None = None
        # The writer fills in where the frame lies: `row`, `segment`, `length`. Whoever submits a
        # tombstone says why: `expired`.


class ExactEnd(Commit):
    """A tombstone that counts only on the very commit that it names as its base.

    Another worker's commit since then is not ended unseen.
    """

    __slots__ = ()


def row_user(record: bytes) -> int:
    """Return the `user` of the frame and the index row of a record (see `disk.format`)."""
    flags, user = _unpack_flags_and_user(record, FLAGS_AT)
    word: int = user | ROW_RENEWS if flags & RENEWS else user
    return word


async def committed(commit: Commit) -> None:
    """Wait until a commit is acknowledged, or raise why it failed."""
    assert commit.done is not None, "submitted to be waited for"
    await commit.done
