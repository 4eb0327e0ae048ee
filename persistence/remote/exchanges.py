"""How an exchange with a server can fail to end, whatever the server is. Pure.

Two things are told apart, because they mean different things for a write that was under way:
`Unsent` (certainly not executed) and `Lost` (nobody knows). A server's answer that is an error is
a third: not executed, and the server says why.
"""

from __future__ import annotations

from collections.abc import Sequence

from persistence.errors import printable


class Fault(Exception):
    """An exchange with a server did not end; the message says why and where."""


class Unsent(Fault):
    """No byte of it was sent: it was certainly not executed."""


class Lost(Fault):
    """It was sent, at least in part, and the reply did not come: executed or not."""


def sessions_named(session_ids: Sequence[str]) -> str:
    """Return how a message names the sessions that an exchange is about."""
    if len(session_ids) == 1:
        return f"session {printable(session_ids[0])}"
    return f"{len(session_ids)} sessions"
