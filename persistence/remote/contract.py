"""What any shared tier does, and the values that pass through it.

A tier stores at most one *version* of each session, identified by its commit id, never by its
number. What it promises:

1. A request is applied at most once: its commit id is remembered (the last 32 of each session), so
   the same request may be sent again whenever its outcome is not known.
2. A put is applied only on the commit that it names as its base, and a creation only where no
   session lives, atomically across workers. So a put that was built on a refused one is refused
   too, whatever version number it has.
3. A terminated session leaves a tombstone. Nothing of that incarnation is accepted after it.
4. "Not applied" is never concluded from a read: a request that is still on its way may overtake it.

Times are wall seconds. Nothing here decodes a value: records are moved as bytes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Protocol, TypeAlias

from persistence.errors import PersistenceError
from persistence.record import NEVER, NO_ID

IDS_REMEMBERED = 32
"""Commits of a session after which a repeated request is no longer recognised as applied."""


class RemoteSession(NamedTuple):
    """A live session as the tier has it.

    Attributes:
        record: the whole record, byte for byte as it was committed; its commit id is in it.
        accessed: last access that was recorded, wall seconds.
        deadline: wall seconds; infinity: never expires.
        cap: deadline that no renewal moves, wall seconds; infinity: none.
        history: ids of the latest commits under this session id, newest first, also those of
            earlier incarnations; fewer than `IDS_REMEMBERED` are all that the tier has had.
    """

    record: bytes
    accessed: float
    deadline: float
    cap: float
    history: tuple[bytes, ...] = ()


class Stored(NamedTuple):
    """What the tier knows about a session without its data.

    Attributes:
        lives: False: this is a tombstone.
        version: the session's version (of a tombstone: the last one it had).
        incarnation: its incarnation id.
        commit: id of its latest commit; of a tombstone, the one that ended it.
        history: as of a `RemoteSession`, if this is a tombstone that was loaded; else empty.
    """

    lives: bool
    version: int
    incarnation: bytes
    commit: bytes
    history: tuple[bytes, ...] = ()


class Put(NamedTuple):
    """Store a new version of a session, or create it.

    Attributes:
        session_id: whose.
        record: the whole new record, with its incarnation and commit ids.
        base: id of the commit it was built on; `NO_ID`: it creates the session.
        accessed: wall seconds.
        deadline: wall seconds; infinity: never expires.
        cap: wall seconds; infinity: none.
        old: the record with commit id `base`, if it is at hand: then only what differs is sent.
            Without it, and without `changed`, the whole record is.
        changed: names of fields of that record, and their new packed values, if it is known that
            the new record has the same fields in the same order and differs in these only. It
            saves comparing the two.
    """

    session_id: str
    record: bytes
    base: bytes
    accessed: float
    deadline: float
    cap: float = NEVER
    old: bytes | None = None
    changed: Mapping[str, bytes] | None = None


class Delete(NamedTuple):
    """End a session and leave a tombstone.

    Attributes:
        session_id: whose.
        commit: a fresh id for the end itself.
        incarnation: end this incarnation only; `NO_ID`: whichever lives.
        base: end it only if its latest commit is this one; `NO_ID`: whatever it is.
    """

    session_id: str
    commit: bytes
    incarnation: bytes = NO_ID
    base: bytes = NO_ID


class Touch(NamedTuple):
    """Record a renewal of the version with id `commit`. An older access changes nothing."""

    session_id: str
    commit: bytes
    accessed: float
    deadline: float


Request: TypeAlias = Put | Delete | Touch


class Outcome(Enum):
    """What became of a request. Only the first two mean that the tier holds it."""

    APPLIED = "applied"
    ALREADY_APPLIED = "already applied"
    """It had been applied before, by a sending of the same request whose reply was lost."""
    CONFLICT = "conflict"
    """Another commit than its base is stored (for a creation: a live session). See `stored`."""
    TERMINATED = "terminated"
    """A tombstone is stored. For a delete: somebody else ended the session."""
    MISSING = "missing"
    """Nothing is stored: expired, or the tier lost its content (see `RemoteTier.epoch`). A delete
    has left a tombstone all the same."""
    REFUSED = "refused"
    """Certainly not applied: the tier is unavailable or does not take it. See `error`."""
    UNKNOWN = "unknown"
    """Sent, and no reply came. Send the same request again. See `error`."""


class CommitResult(NamedTuple):
    """The outcome of one request.

    Attributes:
        outcome: what became of it.
        stored: what the tier holds instead: set for conflicts, tombstones and repeats.
        error: set for REFUSED (`RemoteUnavailable`, `RemoteDamaged`) and UNKNOWN
            (`WriteOutcomeUnknown`); not raised, because it is about this one request.
        may_be_forgotten: of a put that was refused: it may have been applied all the same, by a
            sending whose reply was lost, and others have committed so much since then that neither
            its id nor that of its base is among those that the tier remembers. A tier that has
            lost a reply then says UNKNOWN.
    """

    outcome: Outcome
    stored: Stored | None = None
    error: PersistenceError | None = None
    may_be_forgotten: bool = False

    @property
    def is_stored(self) -> bool:
        """Whether the tier holds what was requested."""
        return self.outcome in _STORED


_STORED = (Outcome.APPLIED, Outcome.ALREADY_APPLIED)
APPLIED = CommitResult(Outcome.APPLIED)


class Announcement(NamedTuple):
    """Another worker committed. Whoever hears of it can read it already.

    An end of what is not there is announced as well: somebody may have a copy of it.

    Attributes:
        session_id: to this session.
        version: its version now.
        commit: id of the commit; a local copy with this id is current.
        ended: it was terminated.
        worker: id of the worker that did it.
    """

    session_id: str
    version: int
    commit: bytes
    ended: bool
    worker: bytes


class Listener(Protocol):
    """Who is told about commits of others. Called on the event loop; must not block or raise."""

    def announced(self, announcements: Sequence[Announcement]) -> None:
        """Other workers committed; in the order in which the tier applied it, per session."""

    def connected(self, *, epoch: bytes) -> None:
        """From now on every commit is announced.

        What was before may have been missed: each local copy counts as unvalidated until its
        commit id has been compared (`RemoteTier.stored`). Another `epoch` than the one known
        means that the tier lost its content; a tier that notices this while it is connected
        calls this once more.
        """

    def disconnected(self) -> None:
        """Announcements may be missing from now on, until `connected` is called."""


class RemoteTier(Protocol):
    """A shared tier.

    Every coroutine except `commit` raises `RemoteUnavailable` when the tier cannot be reached or
    refuses to work. Each may be cancelled at any time: no reply ever reaches another caller. A
    cancelled `commit` leaves its outcome undecided, as if the replies had been lost.
    """

    worker: bytes
    """The id under which this worker announces its commits, 16 random bytes."""

    async def open(self) -> None:
        """Connect and check that the tier can be used. May be tried again after a failure.

        Raises:
            ConfigError: it is reachable, and it can never work like this; nothing was changed.
        """

    async def close(self) -> None:
        """Give all connections back; idempotent."""

    async def load(self, session_id: str) -> RemoteSession | Stored | None:
        """Return the session; `Stored` if there is a tombstone, None if there is nothing.

        Raises:
            RemoteDamaged: what is stored is damaged, or no session.
        """

    async def load_many(
        self, session_ids: Sequence[str]
    ) -> list[RemoteSession | Stored | PersistenceError | None]:
        """Return what `load` returns (or raises: `RemoteDamaged`) for each, in one round trip."""

    async def commit(self, requests: Sequence[Request]) -> list[CommitResult]:
        """Apply `requests` in order, in one round trip; return the outcome of each.

        Calls take their turns, so requests are applied in the order of the calls. Lost replies are
        resolved by sending again; while that does not help, for a few seconds at most.
        """

    async def stored(self, session_ids: Sequence[str]) -> list[Stored | None]:
        """Return what is stored of each session, without its data: to validate local copies."""

    def scan(self, prefix: str = "") -> AsyncIterator[list[str]]:
        """Yield pages of the ids of live sessions that start with `prefix`, in no order.

        A session that lives all the while is in it at least once; it may be in it twice.
        """

    async def epoch(self) -> bytes:
        """Return the id of the tier's content, which changes when that was lost, also in part.

        Created if there is none. Failing over to an older copy does not change it: commit ids tell.
        """

    async def ping(self) -> float:
        """Return how long the slowest server took to answer, seconds."""

    async def subscribe(self, listener: Listener) -> None:
        """Tell `listener` of other workers' commits, until `close`. Returns at once.

        Reconnects by itself, for ever; `listener` is told.
        """
