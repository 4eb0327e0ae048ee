"""Records for the tests of the shared tier, and requests as Redis gets them."""

from __future__ import annotations

from dataclasses import dataclass, field
from struct import Struct

from persistence.remote.layout import HEAD, Packed
from persistence.testing.sessions import (
    create,
    data_of,
    end,
    new_id,
    new_record,
    next_record,
    touch,
    update,
)

__all__ = [
    "Unpacked",
    "create",
    "data_of",
    "end",
    "new_id",
    "new_record",
    "next_record",
    "touch",
    "unpack",
    "update",
]

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
