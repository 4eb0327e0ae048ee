"""The reference model: what was submitted, what was acknowledged, and so what may be found.

What a crash may leave is a beginning of what was submitted, with everything in it that had been
acknowledged: no holes, nothing that was never submitted. Calls that were under way at the same
time form a *group*; of the last group that left anything, each session may have a beginning of its
own.

A call that was refused (`DiskFull`) did not happen. Its bytes may have been written before that,
though, and cut away again: until the log has gone on behind the cut, a power loss may bring them
back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Data = dict[str, Any]
Value = Data | None
"""What a session holds; None: there is no such session."""

State = dict[str, Data]
"""What all live sessions hold."""


@dataclass(slots=True)
class Entry:
    """One submitted change of one session."""

    session_id: str
    value: Value
    group: int
    outcome: str = "open"  # "acknowledged", "refused", "unknown"


@dataclass
class Ledger:
    """Everything that was submitted since the sessions were last looked at.

    Attributes:
        settled: what every session held when it was last looked at after an opening.
        replacement: a whole other state that may be there instead: a restore was under way.
        ever: all that was ever submitted, by session.
    """

    settled: State = field(default_factory=dict)
    log: list[Entry] = field(default_factory=list)
    replacement: State | None = None
    ever: dict[str, list[Value]] = field(default_factory=dict)
    _groups: int = 0

    def copy(self) -> Ledger:
        """Return a ledger that goes its own way."""
        log = [Entry(item.session_id, item.value, item.group, item.outcome) for item in self.log]
        return Ledger(dict(self.settled), log, self.replacement, self.ever, self._groups)

    def new_group(self) -> int:
        """Return the number of a group of calls that are under way at the same time."""
        self._groups += 1
        return self._groups

    def submit(self, session_id: str, value: Value, group: int | None = None) -> Entry:
        """Note what a call is about to do."""
        entry = Entry(session_id, value, self.new_group() if group is None else group)
        self.log.append(entry)
        self.ever.setdefault(session_id, []).append(value)
        return entry

    def live(self) -> State:
        """Return what readers must be shown now: what was acknowledged."""
        state = dict(self.settled)
        for entry in self.log:
            if entry.outcome == "acknowledged":
                _put(state, entry)
        return state

    def value(self, session_id: str) -> Value:
        """Return what readers must be shown of one session now."""
        for entry in reversed(self.log):
            if entry.session_id == session_id and entry.outcome == "acknowledged":
                return entry.value
        return self.settled.get(session_id)

    def acknowledged(self, entry: Entry) -> None:
        """Note that a call has succeeded.

        Calls of a group that change the same session may overtake each other, where one of them
        has to wait for the disk. They were done in the order in which they succeed.
        """
        entry.outcome = "acknowledged"
        done = [
            number
            for number, each in enumerate(self.log)
            if (each.session_id, each.group, each.outcome)
            == (entry.session_id, entry.group, "acknowledged")
        ]
        at = next(number for number in done if self.log[number] is entry)
        self.log.insert(done[-1], self.log.pop(at))

    def later(self, entry: Entry) -> list[Value]:
        """Return what was submitted of the same session behind `entry`, and not refused."""
        at = next(number for number, each in enumerate(self.log) if each is entry)
        behind = self.log[at + 1 :]
        sid = entry.session_id
        return [
            each.value for each in behind if each.session_id == sid and each.outcome != "refused"
        ]

    def replaced(self, state: State) -> None:
        """Everything is different from now on: a checkpoint was restored."""
        self.settled = dict(state)
        self.log.clear()
        self.replacement = None

    def found(self, state: Mapping[str, Data], *, acknowledged_is_durable: bool = True) -> None:
        """Assert that a crash may have left `state`, and go on from there."""
        problem = self.problem(state, acknowledged_is_durable=acknowledged_is_durable)
        assert problem is None, problem
        self.replaced(dict(state))

    def problem(
        self, state: Mapping[str, Data], *, acknowledged_is_durable: bool = True
    ) -> str | None:
        """Return why a crash cannot have left `state`, if it cannot."""
        if self.replacement is not None and state == self.replacement:
            return None
        groups = sorted({entry.group for entry in self.log})
        done = [entry.group for entry in self.log if entry.outcome == "acknowledged"]
        first = max(done) if done and acknowledged_is_durable else 0
        complaints = [
            self._mismatch(state, last, first)
            for last in [0, *groups]
            if last >= first  # of a group that was acknowledged in part, the rest may be missing
        ]
        if not all(complaints):
            return None
        return "nothing that was submitted leads to this:\n" + "\n".join(
            str(item) for item in complaints[-3:]
        )

    def _mismatch(self, state: Mapping[str, Data], last: int, first: int) -> str | None:
        """Return a session that does not hold what it may if `last` is the last group.

        What was refused before group `first` was synced is gone for good.
        """
        allowed: dict[str, list[Value]] = {}
        for entry in self.log:
            sid = entry.session_id
            values = allowed.setdefault(sid, [self.settled.get(sid)])
            if entry.group > last or (entry.outcome == "refused" and entry.group < first):
                continue
            may_be_missing = entry.outcome == "refused" or (
                entry.group == last and entry.outcome != "acknowledged"
            )
            if not may_be_missing:
                values.clear()
            values.append(entry.value)
        for sid in self.settled.keys() | allowed.keys() | state.keys():
            values = allowed.get(sid, [self.settled.get(sid)])
            if state.get(sid) not in values:
                return f"{sid}: {_short(state.get(sid))}, may be {[_short(v) for v in values]}"
        return None


def _put(state: State, entry: Entry) -> None:
    if entry.value is None:
        state.pop(entry.session_id, None)
    else:
        state[entry.session_id] = entry.value


def _short(value: Value) -> object:
    if value is None:
        return None
    return {
        name: f"{len(item)} bytes, {item[:4].hex()}" if isinstance(item, bytes) else item
        for name, item in value.items()
    }
