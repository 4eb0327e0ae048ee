"""For those who watch all sessions: what this worker commits and what others announce, in order.

With a shared tier both come on ways of their own. Our commit is applied there, another worker
builds on it and announces that, and the announcement is here before our own log is synced. Or the
reply to our commit overtakes the announcement of the one that it was built on. So the last version
that was told of each session is remembered (of the last 32,768 sessions), and what comes late is
not told again: the later version has counted it as skipped.

A version that is older, and not the one that the last was built on, is of another line: a worker
has restored a checkpoint, or lost a conflict. That is told as a ``reset``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from persistence import record as rec
from persistence.commit import Commit
from persistence.record import ID_BYTES, NO_ID
from persistence.remote.contract import Announcement
from persistence.watching.changes import NO_FIELDS, Kind, SessionChange
from persistence.watching.stream import Mailbox, put_all

_REMEMBERED: Final = 32_768


class _Told(NamedTuple):
    """The version of a session that was told last, and what it was built on."""

    version: int
    commit: bytes
    base: bytes
    ended: bool


class Everywhere:
    """The mailboxes of those who watch all sessions.

    Attributes:
        mailboxes: theirs.
        is_shared: whether other workers announce what they commit.
    """

    def __init__(self) -> None:
        self.mailboxes: list[Mailbox] = []
        self.is_shared = False
        self._told: dict[str, _Told] = {}

    def tell(self, change: SessionChange) -> None:
        """Tell all of them."""
        put_all(self.mailboxes, change)

    def forget(self) -> None:
        """What was told before is no measure any more."""
        self._told.clear()

    # --- what this worker does ----------------------------------------------------------------

    def put(self, commit: Commit, kind: Kind, fields: frozenset[str] | None) -> None:
        """A version that this worker made is acknowledged."""
        assert commit.record is not None, "a put carries its record"
        version = rec.version_of(commit.record)
        skipped = 0
        if self.is_shared:
            before = self._told.get(commit.session_id)
            if before is not None and kind != "created":
                if before.ended or version <= before.version:
                    return  # it was overtaken, and has been counted
                skipped = version - before.version - 1
            ids = commit.ids
            self._note(
                commit.session_id,
                _Told(version, ids[ID_BYTES : 2 * ID_BYTES], ids[2 * ID_BYTES :], ended=False),
            )
        self.tell(SessionChange(commit.session_id, version, kind, fields, skipped))

    def end(self, commit: Commit, kind: Kind, version: int) -> None:
        """The end of a session is acknowledged."""
        session_id = commit.session_id
        if self.is_shared:
            before = self._told.get(session_id)
            if before is not None:
                if before.ended:
                    return
                version = max(version, before.version)
            own = commit.ids[ID_BYTES : 2 * ID_BYTES]
            self._note(session_id, _Told(version, own, NO_ID, ended=True))
        self.tell(SessionChange(session_id, version, kind, NO_FIELDS))

    # --- what other workers do ----------------------------------------------------------------

    def announced(self, announcements: Iterable[Announcement]) -> None:
        """Other workers committed."""
        for item in announcements:
            before = self._told.get(item.session_id)
            kind: Kind | None = "created" if item.version == 1 else "updated"
            if item.ended:
                kind = "terminated"
            skipped = 0
            if before is not None:
                kind, skipped = _follow(before, item, kind)
            if kind is None:
                continue
            told = _Told(item.version, item.commit, NO_ID, ended=item.ended)
            self._note(item.session_id, told)
            fields = NO_FIELDS if item.ended else None
            self.tell(
                SessionChange(item.session_id, item.version, kind, fields, skipped, local=False)
            )

    def _note(self, session_id: str, told: _Told) -> None:
        known = self._told
        known.pop(session_id, None)
        if len(known) >= _REMEMBERED:
            del known[next(iter(known))]
        known[session_id] = told


def _follow(before: _Told, item: Announcement, kind: Kind | None) -> tuple[Kind | None, int]:
    """Return what an announcement is after what was told before, and how many versions it skips.

    None: nothing new.
    """
    if item.commit in (before.commit, before.base):
        return None, 0
    if before.ended:
        # Announcements of a session come in the order of its commits, so a new life begins with
        # its first version; all else is of the old one, and late.
        return (kind, 0) if item.version == 1 and not item.ended else (None, 0)
    if item.ended:
        return kind, max(0, item.version - before.version)
    if item.version == before.version:
        return None, 0  # another TTL, or notes of the engine's own: no version
    if item.version > before.version:
        return kind, item.version - before.version - 1
    return "reset", 0
