"""The expected result of a replay: plain dicts folded over the same log, and the comparison.

Written apart from `workload.apply_request` on purpose. It knows which session a request belongs
to and nothing else of the replay: it gathers each session's requests and describes them at the
end, where the replay updates a stored session request by request.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any, Final

from persistence.cli.accesslog import Request
from persistence.cli.workload import clean, session_id, status_class

_KEPT: Final = 20


class _Gathered:
    """The requests of one session so far, as far as its final state needs them."""

    __slots__ = ("classes", "last", "recent", "total_bytes")

    def __init__(self) -> None:
        self.classes: Counter[str] = Counter()
        self.recent: deque[Request] = deque(maxlen=_KEPT)
        self.total_bytes = 0
        self.last = -1

    def add(self, position: int, request: Request) -> None:
        self.classes[status_class(request.status)] += 1
        self.recent.append(request)
        self.total_bytes += request.bytes
        self.last = position

    def data(self) -> dict[str, Any]:
        return {
            "statuses": dict(self.classes),
            "history": [[clean(r.time), clean(r.url or ""), r.status] for r in self.recent],
            "requests": self.classes.total(),
            "bytes": self.total_bytes,
            "last_url": clean(self.recent[-1].url or ""),
            "position": self.last,
        }


class Fold:
    """The sessions that a log makes: add its requests in order, then ask for each session."""

    def __init__(self) -> None:
        self._gathered: dict[str, _Gathered] = {}
        self._requests = 0

    def add(self, request: Request) -> None:
        """Add the next request of the log."""
        session = self._gathered.setdefault(session_id(request), _Gathered())
        session.add(self._requests, request)
        self._requests += 1

    def ids(self) -> set[str]:
        """Return the ids of all sessions."""
        return set(self._gathered)

    def data(self, sid: str) -> dict[str, Any] | None:
        """Return the data that a session must hold; None: there must be no such session."""
        session = self._gathered.get(sid)
        return None if session is None else session.data()


def differences(
    expected: Mapping[str, Any] | None, found: Mapping[str, Any] | None
) -> Iterator[str]:
    """Yield, in words, how the data of one session differs; None stands for no session."""
    if expected is None:
        yield "is there, but no request in the log belongs to it"
    elif found is None:
        yield "is missing"
    else:
        for name in sorted(expected.keys() | found.keys()):
            if name not in found:
                yield f"field {name} is missing"
            elif name not in expected:
                yield f"field {name} should not be there"
            elif not same(expected[name], found[name]):
                yield f"field {name} is {found[name]!r:.80}, expected {expected[name]!r:.80}"


def same(left: object, right: object) -> bool:
    """Return whether two plain values are equal and of the same types, all the way down."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right
