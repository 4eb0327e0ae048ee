"""From a caller's data to a packed record, and back. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from persistence import record as rec
from persistence.arguments import MAX_TTL_SECONDS, check_mapping, check_seconds, check_ttl
from persistence.errors import ValueTooLarge, printable

MAX_BYTES: Final = 64 * 2**20
DEFAULT_TTL_SECONDS: Final = 3600.0
Fields = dict[str, bytes]


def pack_fields(session_id: str, data: object, max_bytes: int) -> Fields:
    """Return the packed fields of a session.

    Raises:
        InvalidArgument: `data` is no mapping.
        ValueNotSerializable: a field cannot be stored.
        ValueTooLarge: all of them together are larger than `max_bytes`.
    """
    fields = {
        rec.check_field_name(name): rec.pack_value(value, name)
        for name, value in check_mapping("data", data).items()
    }
    size = sum(map(len, fields.values()))
    if size > max_bytes:
        raise ValueTooLarge(
            f"session {printable(session_id)} would have {size} bytes, at most {max_bytes} are "
            "allowed; nothing was written"
        )
    return fields


def unpack_fields(record: bytes) -> dict[str, Any]:
    """Return the data of a record, as fresh objects."""
    return {name: rec.unpack_value(value) for name, value in rec.packed_fields(record).items()}


def check_ttl_or_none(value: object) -> float | None:
    """Return a TTL, seconds, or None.

    Raises:
        InvalidArgument: it is neither.
    """
    return None if value is None else check_ttl(value)


def check_age(value: object) -> float:
    """Return an age, seconds.

    Raises:
        InvalidArgument: it is none.
    """
    allowed = f"a number of seconds from 0 to {MAX_TTL_SECONDS} (100 years)"
    return check_seconds("max_age_seconds", value, MAX_TTL_SECONDS, allowed)


def first_record(
    incarnation: bytes, commit: bytes, created: float, ttl_seconds: float, fields: Fields
) -> bytes:
    """Return the first version of a session."""
    return rec.assemble(
        incarnation=incarnation,
        commit=commit,
        version=1,
        created=created,
        ttl_seconds=ttl_seconds,
        flags=rec.RENEWS,
        user=0,
        meta=b"",
        fields=fields,
    )


def next_record(
    record: bytes, commit: bytes, ttl_seconds: float | None, fields: Mapping[str, bytes]
) -> bytes:
    """Return the version after `record` with other fields, and with another TTL unless it is None.

    User, metadata and what else a record has stay.
    """
    if ttl_seconds is None or ttl_seconds == rec.ttl_of(record):
        return rec.successor(record, commit, fields)
    head = rec.head(record)
    return rec.assemble(
        incarnation=head.incarnation,
        commit=commit,
        version=head.version + 1,
        created=head.created,
        ttl_seconds=ttl_seconds,
        flags=head.flags & rec.RENEWS,
        user=head.user,
        meta=rec.packed_meta(record),
        fields=fields,
    )
