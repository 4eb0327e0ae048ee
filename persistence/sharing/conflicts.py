"""Branches that the shared tier did not accept: kept, reported, never merged silently.

While the shared tier was away, this worker went on with a session, and so did another one. The
shared state wins; what this worker had is kept whole in a journal.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgpack

from persistence.disk.journal import Journal
from persistence.disk.threads import Threads
from persistence.errors import printable
from persistence.sealer import Sealer, key_id_of

_log = logging.getLogger("persistence.sharing")


class Conflict(NamedTuple):
    """One refused branch.

    Attributes:
        session_id: whose.
        wall_seconds: when it was refused.
        record: this worker's newest version, whole; empty: this worker had terminated it.
        base: id of the last commit that both sides have.
        version: the version that the shared tier has.
        ended: the shared tier has a tombstone.
    """

    session_id: str
    wall_seconds: float
    record: bytes
    base: bytes
    version: int
    ended: bool


class Conflicts:
    """The conflict records of a directory.

    Args:
        journal: where they are kept.
        threads: runs the journal's calls.
        sealer: seals their records; None: they are stored as they are.
    """

    def __init__(self, journal: Journal, threads: Threads, sealer: Sealer | None = None) -> None:
        self._sealer = sealer
        self.count = 0
        self._journal = journal
        self._threads = threads

    async def open(self) -> None:
        """Count what there is."""
        self.count = len(await self._threads.write(self._journal.load))

    async def keep(self, conflict: Conflict) -> None:
        """Keep one durably, and say so.

        Raises:
            DiskFull, WriteOutcomeUnknown: it could not be kept.
        """
        stored = conflict
        if self._sealer is not None:
            about = conflict.session_id.encode()
            stored = conflict._replace(record=self._sealer.seal(conflict.record, about))
        data = msgpack.packb(tuple(stored))
        await self._threads.write(self._journal.append, [data], sync=True)
        self.count += 1
        _log.warning(
            "session %s went on elsewhere while the shared tier was away: the shared state wins, "
            "what this worker had is kept as a conflict record",
            printable(conflict.session_id),
        )

    async def close(self) -> None:
        """Close the journal."""
        await self._threads.write(self._journal.close)


def keys_of_conflicts(entries: Iterable[bytes]) -> set[bytes]:
    """Return the ids of the keys that the conflict records of an encrypted directory need."""
    conflicts = [decode_conflict(entry) for entry in entries]
    return {key_id_of(each.record) for each in conflicts if each is not None}


def decode_conflict(data: bytes, sealer: Sealer | None = None) -> Conflict | None:
    """Decode one conflict record; None: it is sealed, and not with a key of ours."""
    fields: list[Any] = msgpack.unpackb(data)
    conflict = Conflict(*fields)
    if sealer is None:
        return conflict
    record = sealer.open(conflict.record, conflict.session_id.encode())
    return None if record is None else conflict._replace(record=record)
