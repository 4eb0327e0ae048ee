"""What a replay does to its sessions: which session a request belongs to, and how it changes it.

Pure functions. `persistence.cli.fold` computes the same final state in another way, to check.

A session's fields: ``position`` (index of the last request applied), ``requests``, ``bytes``,
``statuses`` (requests per status class), ``last_url``, and ``history`` (the last `HISTORY_ENTRIES`
requests: time, URL, status).
"""

from __future__ import annotations

from collections.abc import MutableMapping
from hashlib import blake2b
from typing import Any, Final

from persistence.cli.accesslog import Request
from persistence.session import SessionMetadata

HISTORY_ENTRIES: Final = 20
TTL_SECONDS: Final = 7 * 86400
"""Every request renews its session for this long: a week, so that an interrupted replay can be
resumed days later with all of its sessions alive."""

NOT_STARTED: Final = -1
_READABLE_CHARS: Final = 100


def clean(text: str) -> str:
    """Return `text` with what was no UTF-8 in the log replaced, so that it can be stored."""
    if text.isascii():
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def session_id(request: Request) -> str:
    """Return the id of the session of `request`: its client, then a hash of client and agent.

    The hash runs over the log's own bytes, whole: neither the replacement of bad UTF-8 nor the
    shortening of a long host name makes two clients one. At most 433 bytes of UTF-8.
    """
    identity = f"{request.client} {request.agent or ''}"  # a client contains no space
    digest = blake2b(identity.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return f"{clean(request.client[:_READABLE_CHARS])} {digest}"


def metadata_of(request: Request) -> SessionMetadata:
    """Return what the session that `request` begins is said to belong to."""
    return SessionMetadata(
        client_ip=clean(request.client),
        user_agent=None if request.agent is None else clean(request.agent),
        source="replay",
    )


def status_class(status: int | None) -> str:
    """Return ``2xx`` and the like; ``none`` where the log gives no status."""
    return "none" if status is None else f"{status // 100}xx"


def apply_request(data: MutableMapping[str, Any], position: int, request: Request) -> None:
    """Apply `request`, the one at `position` of the log, to its session's `data`.

    Exactly once: a request at or before the session's own position changes nothing. That needs
    the requests of one session to arrive in the order of the log.
    """
    if position <= data.get("position", NOT_STARTED):
        return
    url = clean(request.url or "")
    statuses = data.setdefault("statuses", {})
    kind = status_class(request.status)
    statuses[kind] = statuses.get(kind, 0) + 1
    history = data.setdefault("history", [])
    history.append([clean(request.time), url, request.status])
    del history[:-HISTORY_ENTRIES]
    data["requests"] = data.get("requests", 0) + 1
    data["bytes"] = data.get("bytes", 0) + request.bytes
    data["last_url"] = url
    data["position"] = position
