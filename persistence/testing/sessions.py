"""Records and requests for tests of a shared tier."""

from __future__ import annotations

import secrets
from typing import Any, Final

from persistence import record as rec
from persistence.clock import SystemClock
from persistence.record import NEVER, NO_ID
from persistence.remote.contract import Delete, Put, Touch

_wall: Final = SystemClock.wall

HOSTILE_IDS: Final = (
    "a",
    "A",
    "a ",
    " a",
    "with space",
    "with_space",
    "with+space",
    "{tag}",
    "}{",
    "*?[x]\\^-",
    "%",
    "%25",
    "_",
    "a'; DROP TABLE sessions; --",
    '"',
    "\\",
    "$1",
    ":a",
    "ü" * 200,
    "ü",
    "\N{LATIN SMALL LETTER U}\N{COMBINING DIAERESIS}",
    "u",
    "\N{LATIN SMALL LETTER SHARP S}",
    "ss",
    "\N{LATIN SMALL LIGATURE FI}",
    "fi",
    "a\nb\0c",
    "\0",
    "\x7f",
    "\uffff",
    "\U0010ffff",
    "x" * 512,
    "x" * 511 + "y",
    "../etc/passwd",
    "a/b",
    "a_b",
    "null",
    "0",
    "00",
)
"""Ids that are plain keys: none is a path, a pattern, an escape or another one's equal.

Those beside each other are equal to who folds case, strips blanks, ignores accents, composes
characters, unquotes, reads numbers, or cuts off what is too long.
"""


def new_id() -> bytes:
    """Return a fresh commit or incarnation id."""
    return secrets.token_bytes(16)


def new_record(data: dict[str, Any], **head: Any) -> bytes:
    """Return the first version of a session with `data`; `head` changes parts of it."""
    parts: dict[str, Any] = {
        "incarnation": new_id(),
        "commit": new_id(),
        "version": 1,
        "created": 1_700_000_000.0,
        "ttl_seconds": 3600.0,
        "flags": rec.RENEWS,
        "user": 7,
        "meta": rec.pack_meta({"user_id": "ada"}),
        **head,
    }
    return rec.assemble(fields={name: rec.pack_value(v, name) for name, v in data.items()}, **parts)


def next_record(record: bytes, data: dict[str, Any]) -> bytes:
    """Return the version after `record`, with exactly `data`, in its order."""
    head = rec.head(record)
    return new_record(
        data,
        incarnation=head.incarnation,
        version=head.version + 1,
        created=head.created,
        ttl_seconds=head.ttl_seconds,
        meta=rec.packed_meta(record),
        user=head.user,
    )


def data_of(record: bytes) -> dict[str, Any]:
    """Return the data in a record."""
    return {name: rec.unpack_value(value) for name, value in rec.packed_fields(record).items()}


def create(session_id: str, record: bytes, ttl_seconds: float = 3600.0) -> Put:
    """Return the request that creates a session; with a negative TTL its time is over already."""
    now = _wall()
    deadline = now + ttl_seconds if ttl_seconds else NEVER
    return Put(session_id, record, NO_ID, now, deadline)


def update(session_id: str, old: bytes, new: bytes, *, whole: bool = False) -> Put:
    """Return the request that puts `new` on `old`; with `whole`, without the difference."""
    now = _wall()
    base = rec.commit_of(old)
    return Put(session_id, new, base, now, now + 3600.0, old=None if whole else old)


def end(session_id: str, incarnation: bytes = NO_ID, base: bytes = NO_ID) -> Delete:
    """Return the request that ends a session."""
    return Delete(session_id, new_id(), incarnation, base)


def touch(session_id: str, record: bytes, accessed: float, deadline: float) -> Touch:
    """Return the request that renews a version."""
    return Touch(session_id, rec.commit_of(record), accessed, deadline)
