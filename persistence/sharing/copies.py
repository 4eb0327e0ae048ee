"""Which local copies of sessions are known to be what the shared tier has.

While announcements of other workers arrive, a copy that was compared once stays *valid* until a
commit to its session is announced. When they may have been missed, no copy is valid any more. A
copy that is *stale*, because there was something newer, stays so until it is compared.

The table is split into many small sets, so that none of them grows in one long step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

_SHARDS: Final = 256
_MASK: Final = _SHARDS - 1
_MAX_PER_SHARD: Final = 8192


class Copies:
    """Valid, known to be out of date, or neither: then it has to be compared.

    Invariants:
    - no session is both valid and stale;
    - while announcements do not arrive, none is valid.

    Attributes:
        generation: changes whenever announcements may have been missed.
        is_listening: whether announcements arrive.
    """

    def __init__(self) -> None:
        self.is_listening = False
        self._valid: list[set[str]] = [set() for _ in range(_SHARDS)]
        self._stale: dict[str, int] = {}  # session -> the generation in which it was announced
        self._filling: dict[str, list[bytes]] = {}
        self.generation = 0

    def is_valid(self, session_id: str) -> bool:
        """Whether the local copy is what the shared tier has."""
        return session_id in self._valid[hash(session_id) & _MASK]

    def is_stale(self, session_id: str) -> bool:
        """Whether another commit than the local copy's was in the shared tier."""
        return session_id in self._stale

    def is_stale_for_certain(self, session_id: str) -> bool:
        """Whether it has been heard of all that happened since, so that nothing was lost there."""
        return self._stale.get(session_id) == self.generation

    def all_stale(self) -> list[str]:
        """Return those of which `is_stale` is true."""
        return list(self._stale)

    def validate(self, session_id: str) -> None:
        """The local copy was compared, and is what the shared tier has."""
        self._stale.pop(session_id, None)
        self.validate_all((session_id,), self.generation)

    def validate_all(self, session_ids: Iterable[str], generation: int) -> None:
        """Commits to these, sent in `generation`, are in the shared tier.

        So they are current there and here, unless more was announced since they were sent. The
        race: another worker builds on our commit, and its announcement overtakes the reply to
        ours. Valid now, our version would stay for good.
        """
        if generation != self.generation or not self.is_listening:
            return
        shards, stale = self._valid, self._stale
        for session_id in session_ids:
            if session_id in stale:
                continue
            valid = shards[hash(session_id) & _MASK]
            if len(valid) >= _MAX_PER_SHARD:
                valid.clear()  # they are compared again when they are next read
            valid.add(session_id)

    def forget(self, session_id: str) -> None:
        """Nothing is known about a session any more; there may be no local copy."""
        self.forget_all((session_id,))

    def forget_all(self, session_ids: Sequence[str]) -> None:
        """Nothing is known about these sessions any more."""
        shards = self._valid
        for session_id in session_ids:
            shards[hash(session_id) & _MASK].discard(session_id)
            self._stale.pop(session_id, None)

    def announced(self, session_id: str, commit: bytes) -> None:
        """Another worker committed: the local copy, and any fill under way, may be older."""
        self._valid[hash(session_id) & _MASK].discard(session_id)
        self._stale[session_id] = self.generation
        seen = self._filling.get(session_id)
        if seen is not None:
            seen.append(commit)

    def reset(self, *, is_listening: bool, is_lost: bool = False) -> None:
        """Announcements may have been missed: every local copy has to be compared again.

        Args:
            is_listening: whether they arrive from now on.
            is_lost: what was in the shared tier is gone, and with it what was newer than here.
        """
        self.generation += 1
        self.is_listening = is_listening
        self._valid = [set() for _ in range(_SHARDS)]
        if is_lost:
            self._stale.clear()

    # --- fills --------------------------------------------------------------------------------
    #
    # The race: a reply with version 3 is on its way to us, version 4 is committed and announced,
    # the announcement overtakes the reply. Cached now, version 3 would stay for good. So commits
    # that are announced while a fill is under way are remembered, and a reply that is not the
    # last of them is not taken for current.

    def begin_fill(self, session_id: str) -> None:
        """A question about a session is about to be sent to the shared tier."""
        assert session_id not in self._filling, "one fill of a session at a time"
        self._filling[session_id] = []

    def end_fill(self, session_id: str) -> list[bytes]:
        """Return the commits that were announced since `begin_fill`, in order."""
        return self._filling.pop(session_id)
