"""The reference model of the simulation: what every view of a session may show.

Each call that changes a session adds one *token* of its own to it, and nothing else does. So a
session is the list of the calls that made it, its version is their number, and what was lost, done
twice, done although it was refused, or brought back can be told from any view of it, whoever made
it and when. Every creation is a `Born`: a life of a session id, told apart by its first token.

Calls are *acknowledged*, *refused* (certainly not done: the error says that nothing was written) or
*open*: done or not, as a whole.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final

_GRANTED: Final = 1.125
"""What recovery grants of a TTL: the part that may be unrecorded."""
_PER_TOKEN_BYTES: Final = 400


class Wrong(AssertionError):
    """The engine showed or did what it must never do."""


@dataclass
class Born:
    """One life of a session id.

    Attributes:
        session_id: whose.
        token: of the call that created it.
        submitted: tokens of calls that may change it, in order.
        acknowledged: tokens of those that were, in order, with the worker that was told.
        refused: tokens of those that certainly did not.
        end: "no"; "open": its end was asked for; "done": and acknowledged.
        ended_at: when that was, process time.
        lives_until: it cannot have expired before, process time.
        over_from: it must have expired then, process time.
        ttl_seconds: its first TTL.
        renews: whether an access moves its deadline.
        is_retimed: its TTL may be another one by now.
    """

    session_id: str
    token: str
    submitted: dict[str, None] = field(default_factory=dict)
    acknowledged: dict[str, str] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    end: str = "no"
    ended_at: float = math.inf
    lives_until: float = math.inf
    over_from: float = math.inf
    ttl_seconds: float = 0.0
    renews: bool = False
    is_retimed: bool = False

    @property
    def exists(self) -> bool:
        """Whether its creation is acknowledged."""
        return self.token in self.acknowledged


@dataclass
class Asked:
    """A call that may still come to a session which is created meanwhile.

    Attributes:
        until: it has certainly come, or never will, process time.
        ttl_seconds: the TTL that it sets, if it sets one.
    """

    until: float = math.inf
    ttl_seconds: float = math.inf


def filler(token: str) -> bytes:
    """Return the bytes that a call writes beside its token."""
    digest = blake2b(token.encode(), digest_size=16).digest()
    return digest * (1 + digest[0] * digest[1] * _PER_TOKEN_BYTES // 2**20)


def data_of(tokens: Iterable[str]) -> dict[str, Any]:
    """Return what a session holds after these calls."""
    tokens = list(tokens)
    return {"log": tokens, "fill": filler(tokens[-1])}


def tokens_in(data: dict[str, Any]) -> list[str]:
    """Return the calls that made what a session holds."""
    return [*data["log"], *(name for name in data if name not in {"log", "fill"})]


class Model:
    """Everything that was asked of the engine, and what may be seen of it.

    Attributes:
        born: by token of the creation.
        by_id: the same by session id, in order of submission.
        ends: the ends that were asked for, which may come to whoever lives under an id.
        ttls: the same of new TTLs.
        under_way: tokens of the calls that change a session just now.
        views: how many were checked.
    """

    def __init__(self) -> None:
        self.born: dict[str, Born] = {}
        self.by_id: dict[str, list[Born]] = {}
        self.ends: defaultdict[str, list[Asked]] = defaultdict(list)
        self.ttls: defaultdict[str, list[Asked]] = defaultdict(list)
        self.under_way: dict[str, dict[str, None]] = {}
        self.views = 0

    # --- what is asked ----------------------------------------------------------------------------

    def create(
        self, session_id: str, token: str, now: float, ttl_seconds: float, *, renews: bool
    ) -> Born:
        """A session is about to be created."""
        submitted = {token: None, **self.under_way.get(session_id, {})}
        born = Born(session_id, token, submitted, ttl_seconds=ttl_seconds, renews=renews)
        if ttl_seconds:
            born.lives_until = now + ttl_seconds
        if any(now <= asked.until for asked in self.ends[session_id]):
            born.end = "open"
        for asked in self.ttls[session_id]:
            if now <= asked.until:
                born.lives_until = min(born.lives_until, now + asked.ttl_seconds)
                born.is_retimed = True
        self.born[token] = born
        self.by_id.setdefault(session_id, []).append(born)
        return born

    def change(self, session_id: str, token: str) -> None:
        """A call is about to change a session: whoever lives there, or will meanwhile."""
        self.under_way.setdefault(session_id, {})[token] = None
        for born in self.by_id.get(session_id, ()):
            born.submitted[token] = None

    def changed(self, session_id: str, token: str) -> None:
        """That call has ended."""
        del self.under_way[session_id][token]

    def accessed(self, session_id: str, now: float) -> None:
        """A call on a session has ended: it may be renewed until now."""
        for born in self.by_id.get(session_id, ()):
            if born.ttl_seconds and born.renews and born.over_from < math.inf:
                born.over_from = max(born.over_from, now + born.ttl_seconds * _GRANTED)

    # --- what is seen -----------------------------------------------------------------------------

    def view(self, session_id: str, data: dict[str, Any], version: int) -> tuple[Born, set[str]]:
        """Check a view of a session, by itself; return whose it is, and what is in it."""
        self.views += 1
        tokens = tokens_in(data)
        born = self.born.get(tokens[0])
        if born is None or born.session_id != session_id:
            raise Wrong(f"{session_id} shows {tokens[:1]}, which nobody created there")
        found = set(tokens)
        if len(found) != len(tokens):
            raise Wrong(f"{session_id}: a call was done twice: {tokens}")
        if refused := found & born.refused:
            raise Wrong(f"{session_id}: {sorted(refused)} were refused, and are there: {tokens}")
        if not found <= born.submitted.keys():
            raise Wrong(f"{session_id}: {tokens} has what nobody asked for")
        if version != len(tokens):
            raise Wrong(f"{session_id}: version {version} of {len(tokens)} calls: {tokens}")
        if data["fill"] != filler(data["log"][-1]):
            raise Wrong(f"{session_id}: half of a call is there: {tokens}")
        self._check_order(born, tokens)
        return born, found

    @staticmethod
    def _check_order(born: Born, tokens: list[str]) -> None:
        """The calls of one client were made one after the other."""
        last: dict[str, int] = {}
        for token in tokens:
            client, _, number = token.partition(".")
            if token.startswith("k"):
                continue  # fields have an order of their own
            if last.get(client, -1) >= int(number):
                raise Wrong(f"{born.session_id}: out of order: {tokens}")
            last[client] = int(number)

    @staticmethod
    def check_has(born: Born, found: set[str], wanted: Iterable[str], why: str) -> None:
        """Assert that a view shows all of some calls."""
        missing = [token for token in wanted if token not in found]
        if missing:
            raise Wrong(f"{born.session_id}: {missing} {why}, and not there: {sorted(found)}")

    @staticmethod
    def check_not_over(born: Born, asked_at: float) -> None:
        """Assert that a session which was shown was not over when it was asked for."""
        if asked_at > born.over_from:
            raise Wrong(
                f"{born.session_id} is shown {asked_at - born.over_from:.3f} s after its time"
            )

    @staticmethod
    def check_not_ended(born: Born, asked_at: float) -> None:
        """Assert that a session which was shown had not ended when it was asked for."""
        if born.end == "done" and asked_at > born.ended_at:
            raise Wrong(f"{born.session_id} ({born.token}) is back after its end")

    def existing(self, session_id: str, *, by: str | None = None) -> list[Born]:
        """Return the lives of a session that are acknowledged and have not ended.

        Args:
            session_id: whose.
            by: created by this worker only.
        """
        return [
            born
            for born in self.by_id.get(session_id, ())
            if born.exists and born.end == "no" and by in {None, born.acknowledged[born.token]}
        ]

    @staticmethod
    def check_gone(before: Iterable[Born], now: float, what: str) -> None:
        """Assert that sessions which were there before a call are over, as it has told."""
        for born in before:
            if born.end == "no" and now < born.lives_until:
                raise Wrong(f"{born.session_id} ({born.token}) {what}, and it is alive")
