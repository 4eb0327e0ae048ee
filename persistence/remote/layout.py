r"""What a session's hash holds, and what the scripts are given and give back. Pure, over bytes.

A session is one hash. Its fields are the session's own, each with the very bytes that were packed
when the value was written, and up to four more, whose names are not UTF-8 and so never collide:

``\xffstate``
    written by the script alone: kind (``L`` lives, ``T`` tombstone, ``t`` tombstone of a session
    that was not there), version (8 bytes), incarnation id (16), then the ids of the latest commits
    (16 each, newest first).
``\xffolder``
    written by the script alone: more of these ids, older ones; there are always at least 32
    together if there were so many commits. They survive a re-creation.
``\xffhead``
    accessed, deadline, cap (floats, wall seconds), CRC-32C of the whole record (4 bytes), then the
    record's fixed part and its metadata, as they are in the record. Where the tier is encrypted,
    what comes behind the three floats is sealed, and so is every field's value (see `sealed`).
``\xfforder``
    MessagePack array of the fields' names in the record's order; written when that changes.

A tombstone has the first one only. Numbers are little-endian. A record that is put together again
is byte for byte the one that was committed, which its checksum proves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from struct import Struct
from typing import Final, NamedTuple

import msgpack
from crc32c import crc32c

from persistence import record as rec
from persistence.errors import RemoteDamaged
from persistence.record import ID_BYTES, NO_ID, PREFIX_BYTES
from persistence.remote.contract import (
    IDS_REMEMBERED,
    Announcement,
    Delete,
    Outcome,
    Put,
    RemoteSession,
    Request,
    Stored,
    Touch,
)
from persistence.remote.sealed import FieldCodec
from persistence.sealer import Sealer

STATE: Final = b"\xffstate"
HEAD: Final = b"\xffhead"
ORDER: Final = b"\xfforder"
OLDER: Final = b"\xffolder"
_OURS: Final = frozenset((STATE, HEAD, ORDER, OLDER))

_STATE: Final = Struct("<cQ16s16s")  # with the newest commit id
STATE_BYTES: Final = _STATE.size
_TIMES: Final = Struct("<dd")
_HEAD: Final = Struct("<dddI")
_HEAD_BYTES: Final = _HEAD.size
_HEAD_TIMES_BYTES: Final = 3 * 8  # accessed, deadline, cap
# Incarnation, commit and version are one piece, as in a record.
_HEADER: Final = Struct("<cIII40s16sdI")
_PUT_HEADER: Final = Struct("<cIII40s16sdIdddI")  # with the start of \xffhead, `_HEAD`
_LENGTH: Final = Struct("<I")
_LENGTHS: Final = Struct("<II")
_EVENT: Final = Struct("<cQ16sH")
_pack_header = _HEADER.pack
_NO_VERSION: Final = bytes(8)
_VERSION_END: Final = 2 * ID_BYTES + 8
_pack_put_header = _PUT_HEADER.pack
_pack_head_start = _HEAD.pack
_pack_length = _LENGTH.pack
_pack_lengths = _LENGTHS.pack

_COPY_BELOW_BYTES: Final = 16 * 1024

CODES: Final = {
    b"A": Outcome.APPLIED,
    b"D": Outcome.ALREADY_APPLIED,
    b"C": Outcome.CONFLICT,
    b"X": Outcome.TERMINATED,
    b"M": Outcome.MISSING,
    b"E": Outcome.REFUSED,
    b"F": Outcome.REFUSED,
}
"""Outcome codes of ``commit.lua``, one byte a request; all but A, M and F come with a detail."""
DETAILED: Final = frozenset(b"DCXE")
FORGOTTEN: Final = b"F"
"""Behind a state: the request may have been applied and forgotten since."""
APPLIED_CODE: Final = ord("A")
FOREIGN_CODE: Final = ord("F")


# --- requests -------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """Requests as ``commit.lua`` takes them.

    Attributes:
        requests: all of them, but for what is outside.
        outside: values of fields that are too large to be copied once more.
    """

    requests: bytes
    outside: list[bytes]


def pack_requests(
    requests: Iterable[Request], tombstone_ms: float, sealer: Sealer | None = None
) -> Packed:
    """Pack requests for ``commit.lua``, whose head describes the format.

    Args:
        requests: what to do, in order.
        tombstone_ms: for how long a tombstone is kept, milliseconds.
        sealer: seals values; None: they are sent as they are.
    """
    pieces: list[bytes] = []
    outside: list[bytes] = []
    for request in requests:
        if type(request) is Put:
            if sealer is not None:
                _pack_put(request, pieces, outside, FieldCodec(sealer, request.session_id.encode()))
            elif not _pack_update(request, pieces):
                _pack_put(request, pieces, outside)
        elif type(request) is Delete:
            ids = request.incarnation + request.commit + _NO_VERSION
            pieces.append(_pack_header(b"D", 0, 0, 0, ids, request.base, tombstone_ms, 0))
        else:
            assert type(request) is Touch, "there are three kinds of requests"
            ids = NO_ID + request.commit + _NO_VERSION
            time, size = request.deadline * 1000, _TIMES.size
            pieces.append(_pack_header(b"T", 0, 0, 0, ids, NO_ID, time, size))
            pieces.append(_TIMES.pack(request.accessed, request.deadline))
    return Packed(b"".join(pieces), outside)


def _pack_update(put: Put, pieces: list[bytes]) -> bool:
    """Pack a put of one known field, small as nearly all are; return whether it is one.

    The same as `_pack_put` makes of it, in half the time: every update comes by here.
    """
    _, record, base, accessed, deadline, cap, _, changed = put
    if changed is None or len(changed) != 1:
        return False
    for field, value in changed.items():
        if len(value) >= _COPY_BELOW_BYTES:
            return False
        name = field.encode()
        meta_end = rec.meta_end_of(record)
        pieces += (
            _pack_put_header(
                b"P",
                1,
                0,
                0,
                record[:_VERSION_END],
                base,
                deadline * 1000,
                _HEAD_BYTES + meta_end,
                accessed,
                deadline,
                cap,
                crc32c(record),
            ),
            record[:meta_end],
            _pack_lengths(len(name), len(value)),
            name,
            value,
        )
    return True


def _pack_put(
    put: Put, pieces: list[bytes], outside: list[bytes], codec: FieldCodec | None = None
) -> None:
    """Pack a put into `pieces`."""
    _, record, base, accessed, deadline, cap, old, known = put
    removed: Sequence[bytes] = ()
    kind = b"P"
    if known is None:
        assert old is None or rec.commit_of(old) == base, "old is not what it was built on"
        if old is None:
            kind = b"C" if base == NO_ID else b"R"
        changed, removed = difference(old, record)
    else:
        changed = []
        for field, value in known.items():
            changed += (field.encode(), value)
    head = _pack_head_start(accessed, deadline, cap, crc32c(record))
    head += record[: rec.meta_end_of(record)]
    if codec is not None:
        changed = _sealed_values(changed, record[:ID_BYTES], codec)
        head = head[:_HEAD_TIMES_BYTES] + codec.seal_head(head[_HEAD_TIMES_BYTES:])
    at = len(pieces)
    pieces += (b"", head)  # the first is the header, once the fields are counted
    later = 0
    names = iter(changed)
    for name in names:
        value = next(names)
        if len(value) < _COPY_BELOW_BYTES:
            pieces += (_pack_lengths(len(name), len(value)), name, value)
        else:
            later += 1
            outside.append(value)
    if later:
        pieces += _names_of_large(changed)
    for name in removed:
        pieces += (_pack_length(len(name)), name)
    pieces[at] = _pack_header(
        kind,
        len(changed) // 2 - later,
        later,
        len(removed),
        record[:_VERSION_END],
        base,
        deadline * 1000,
        len(head),
    )


def _sealed_values(changed: list[bytes], incarnation: bytes, codec: FieldCodec) -> list[bytes]:
    """Return names and values in turn with the values sealed. The order of names stays as it is."""
    sealed = list(changed)
    for at in range(0, len(changed), 2):
        if changed[at] != ORDER:
            sealed[at + 1] = codec.seal(changed[at], changed[at + 1], incarnation)
    return sealed


def _names_of_large(changed: list[bytes]) -> list[bytes]:
    """Return the names of the fields whose values are outside, as they follow the others."""
    pieces: list[bytes] = []
    for name, value in zip(changed[::2], changed[1::2], strict=True):
        if len(value) >= _COPY_BELOW_BYTES:
            pieces += (_pack_length(len(name)), name)
    return pieces


def difference(old: bytes | None, new: bytes) -> tuple[list[bytes], list[bytes]]:
    """Return what to set (names and values in turn) and what to remove to make `new` of `old`.

    Values are compared as packed bytes, never decoded. `old` None: all of `new`.
    """
    after = rec.packed_fields(new)
    before = {} if old is None else rec.packed_fields(old)
    changed: list[bytes] = []
    if len(before) == len(after):
        # Nearly always the names are the same, in the same order: one walk over both tells.
        for (name, value), (known_name, known) in zip(after.items(), before.items(), strict=True):
            if name != known_name:
                break
            if value != known:
                changed += (name.encode(), bytes(value))
        else:
            if old is not None:
                return changed, []
    changed = []
    for name, value in after.items():
        if before.get(name) != value:
            changed += (name.encode(), bytes(value))
    changed += (ORDER, msgpack.packb(list(after)))
    return changed, [name.encode() for name in before if name not in after]


# --- replies --------------------------------------------------------------------------------------


def decode_state(state: bytes) -> Stored:
    r"""Decode the start of a ``\xffstate``.

    Raises:
        ValueError: it is none.
    """
    if len(state) < STATE_BYTES or state[:1] not in b"LTt":
        raise ValueError("the state is not one that this library writes")
    kind, version, incarnation, commit = _STATE.unpack_from(state)
    return Stored(kind == b"L", version, incarnation, commit)


def decode_session(
    key: bytes, session_id: str, fields: Mapping[bytes, bytes], sealer: Sealer | None = None
) -> RemoteSession | Stored | None:
    """Put a session together again from its hash; None: the hash is empty, so there is none.

    Raises:
        RemoteDamaged: it is not as it was written, or somebody else wrote it.
    """
    if not fields:
        return None
    try:
        stored = decode_state(fields[STATE])
        history = _history(fields[STATE], fields.get(OLDER, b""))
        if not stored.lives:
            return stored._replace(history=history)
        if sealer is not None:
            fields = _opened(fields, FieldCodec(sealer, session_id.encode()))
        session = _assemble(fields)
    except KeyError as error:
        raise RemoteDamaged(_text(key), f"it has no {error.args[0]!r}", session_id) from None
    except (ValueError, TypeError, OverflowError) as error:
        raise RemoteDamaged(_text(key), str(error), session_id) from None
    if session.record[ID_BYTES : 2 * ID_BYTES] != stored.commit:
        raise RemoteDamaged(_text(key), "its head is of another commit than its state", session_id)
    return session._replace(history=history)


def _history(state: bytes, older: bytes) -> tuple[bytes, ...]:
    """Return the ids of the latest commits, newest first."""
    ids = (state[STATE_BYTES - ID_BYTES :] + older)[: IDS_REMEMBERED * ID_BYTES]
    whole = range(0, len(ids) - ID_BYTES + 1, ID_BYTES)
    return tuple(ids[start : start + ID_BYTES] for start in whole)


def _opened(fields: Mapping[bytes, bytes], codec: FieldCodec) -> dict[bytes, bytes]:
    """Return a hash as it would be in a tier that is not encrypted.

    Raises:
        Unopened: something is not what was sealed.
    """
    head = fields[HEAD]
    opened = dict(fields)
    plain = codec.open_head(head[_HEAD_TIMES_BYTES:])
    incarnation = plain[_HEAD_BYTES - _HEAD_TIMES_BYTES :][:ID_BYTES]
    opened[HEAD] = head[:_HEAD_TIMES_BYTES] + plain
    for name, value in fields.items():
        if name not in _OURS:
            opened[name] = codec.open(name, value, incarnation)
    return opened


def lacks_key(session_id: str, fields: Mapping[bytes, bytes], sealer: Sealer) -> bool:
    """Whether a live session is sealed with a key that is not known."""
    return FieldCodec(sealer, session_id.encode()).missing_key(fields, _HEAD_TIMES_BYTES)


def _assemble(fields: Mapping[bytes, bytes]) -> RemoteSession:
    head = fields[HEAD]
    if len(head) < _HEAD.size + PREFIX_BYTES:
        raise ValueError("its head is too short")
    accessed, deadline, cap, checksum = _HEAD.unpack_from(head)
    order = msgpack.unpackb(fields[ORDER])
    names = type(order) is list and all(type(name) is str for name in order)
    if not names or len(order) != len(fields) - (4 if OLDER in fields else 3):
        raise ValueError("its fields are not those that its order names")
    record = rec.with_fields(head[_HEAD.size :], {name: fields[name.encode()] for name in order})
    if crc32c(record) != checksum:
        raise ValueError("its checksum is wrong")
    return RemoteSession(record, accessed, deadline, cap)


def decode_announcements(message: bytes) -> list[Announcement]:
    """Decode a message on the channel of commits.

    Raises:
        ValueError: it is none of ours.
    """
    worker = message[:ID_BYTES]
    at = ID_BYTES
    found = []
    while at < len(message):
        if len(message) < at + _EVENT.size:
            raise ValueError("an announcement is cut short")
        kind, version, commit, id_bytes = _EVENT.unpack_from(message, at)
        at += _EVENT.size
        session_id = message[at : at + id_bytes]
        at += id_bytes
        if at > len(message):
            raise ValueError("an announcement is cut short")
        found.append(Announcement(session_id.decode(), version, commit, kind != b"L", worker))
    return found


def announcing_worker(message: bytes) -> bytes:
    """Return who sent a message on the channel of commits."""
    return message[:ID_BYTES]


def _text(key: bytes) -> str:
    return key.decode("utf-8", "backslashreplace")


# --- the protocol ---------------------------------------------------------------------------------


class _LengthLines(dict[int, bytes]):
    """What the protocol has between two arguments: how long the next one is."""

    def __missing__(self, size: int) -> bytes:
        """Return the line for a length that is too long to be kept."""
        return b"\r\n$%d\r\n" % size


_LENGTH_LINES: Final = _LengthLines({size: b"\r\n$%d\r\n" % size for size in range(1024)})


def pack_command(arguments: Sequence[bytes]) -> list[bytes]:
    """Return one command in the protocol's bytes, in pieces; large arguments are not copied."""
    pieces: list[bytes] = []
    small = [b"*%d" % len(arguments)]
    for argument in arguments:
        size = len(argument)
        small += (_LENGTH_LINES[size], argument)
        if size >= _COPY_BELOW_BYTES:
            small.pop()
            pieces += (b"".join(small), argument)
            small = []
    small.append(b"\r\n")
    pieces.append(b"".join(small))
    return pieces
