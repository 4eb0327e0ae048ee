"""What a watcher is told. Pure: no event loop, no clock.

Nothing in a change is a value of a session: it says *that* something changed and what, and whoever
wants to know to what reads the session.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, TypeAlias

from persistence import record as rec

Kind: TypeAlias = Literal["created", "updated", "terminated", "expired", "reset", "gap"]

ALL_SESSIONS: Final = ""
"""The session id of a change that concerns all of them; no session has it."""
NO_FIELDS: Final[frozenset[str]] = frozenset()


class SessionChange(NamedTuple):
    """A session has changed, as readers see it from now on.

    Attributes:
        session_id: which one. Empty where it may be any: a gap, and the reset of everything.
        version: its version now; of one that has ended, the last it had (0: not known).
        kind: ``created``; ``updated``; ``terminated``; ``expired``; ``reset``: what is there now is
            no successor of what was told before, because a checkpoint was restored, or because it
            ended and began anew elsewhere; ``gap``: something may have been missed. After the last
            two, read again what matters to you.
        fields: names of the fields that were set, changed or removed; empty where only metadata
            changed. None: not known, so it may be any of them.
        skipped: how many versions before this one were not told on their own: the reader was slow,
            or they came from other workers in quick succession. `fields` covers them.
        local: whether this worker did it.
    """

    session_id: str
    version: int
    kind: Kind
    fields: frozenset[str] | None
    skipped: int = 0
    local: bool = True

    @property
    def is_end(self) -> bool:
        """Whether the session is gone."""
        return self.kind in _ENDS

    def may_affect(self, field: str) -> bool:
        """Whether the value of `field` may be another one now."""
        return self.fields is None or field in self.fields or self.is_end


_ENDS: Final = ("terminated", "expired")


def coalesced(first: SessionChange, second: SessionChange) -> SessionChange:
    """Return one change for two of the same session that follow each other."""
    kind: Kind = second.kind
    if kind == "updated":
        kind = first.kind
    fields = None
    if first.fields is not None and second.fields is not None:
        fields = first.fields | second.fields
    return SessionChange(
        second.session_id,
        second.version,
        kind,
        fields,
        first.skipped + second.skipped + 1,
        first.local and second.local,
    )


def gap(skipped: int = 0) -> SessionChange:
    """Return the change that says: of any session, something may have been missed."""
    return SessionChange(ALL_SESSIONS, 0, "gap", None, skipped, local=False)


def reset_of_all() -> SessionChange:
    """Return the change that says: every session may be another one now."""
    return SessionChange(ALL_SESSIONS, 0, "reset", None)


def changed_fields(before: bytes, after: bytes) -> frozenset[str]:
    """Return the names of the fields in which two records differ, compared as packed bytes."""
    old, new = rec.packed_fields(before), rec.packed_fields(after)
    return frozenset(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
