"""Records for the tests of the shared tier."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from struct import Struct
from typing import Any

from persistence import record as rec
from persistence.record import NEVER, NO_ID
from persistence.remote.contract import Delete, Put, Touch
from persistence.remote.layout import HEAD, Packed


def new_id() -> bytes:
    """Return a fresh commit or incarnation id."""
    return secrets.token_bytes(16)


def new_record(data: dict[str, Any], **head: Any) -> bytes:
    """Return the first version of a session with `data`."""
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
    """Return the request that creates a session."""
    now = time.time()
    deadline = now + ttl_seconds if ttl_seconds else NEVER
    return Put(session_id, record, NO_ID, now, deadline)


def update(session_id: str, old: bytes, new: bytes, *, whole: bool = False) -> Put:
    """Return the request that puts `new` on `old`; with `whole`, without the difference."""
    now = time.time()
    base = rec.commit_of(old)
    return Put(session_id, new, base, now, now + 3600.0, old=None if whole else old)


def end(session_id: str, incarnation: bytes = NO_ID, base: bytes = NO_ID) -> Delete:
    """Return the request that ends a session."""
    return Delete(session_id, new_id(), incarnation, base)


def touch(session_id: str, record: bytes, accessed: float, deadline: float) -> Touch:
    """Return the request that renews a version."""
    return Touch(session_id, rec.commit_of(record), accessed, deadline)


# --- requests as the script takes them ------------------------------------------------------------

_HEADER = Struct("<cIII16s16s8s16sdI")
_SIZE = Struct("<I")


@dataclass
class Unpacked:
    """One request, read as the head of ``commit.lua`` describes it."""

    kind: bytes
    commit: bytes
    base: bytes
    expires_ms: float
    sets: dict[bytes, bytes] = field(default_factory=dict)
    outside: dict[bytes, bytes] = field(default_factory=dict)
    removes: list[bytes] = field(default_factory=list)

    def apply(self, fields: dict[bytes, bytes]) -> None:
        """Change a hash as the script does, but for its state."""
        fields.update(self.sets)
        fields.update(self.outside)
        for name in self.removes:
            del fields[name]


def unpack(packed: Packed) -> list[Unpacked]:
    """Read requests as the script does."""
    found = []
    at = 0
    large = iter(packed.outside)

    def take(size: int) -> bytes:
        nonlocal at
        assert at + size <= len(packed.requests), "cut short"
        at += size
        return packed.requests[at - size : at]

    def sizes(count: int) -> list[int]:
        return [_SIZE.unpack(take(4))[0] for _ in range(count)]

    while at < len(packed.requests):
        kind, sets, outside, removes, _, commit, _, base, time_ms, head = _HEADER.unpack(
            take(_HEADER.size)
        )
        request = Unpacked(kind, commit, base, time_ms)
        if head:
            request.sets[HEAD] = take(head)
        for _ in range(sets):
            name_bytes, value_bytes = sizes(2)
            name = take(name_bytes)
            request.sets[name] = take(value_bytes)
        for _ in range(outside):
            name = take(*sizes(1))
            request.outside[name] = next(large)
        request.removes = [take(*sizes(1)) for _ in range(removes)]
        found.append(request)
    assert not list(large), "a value belongs to no field"
    return found
