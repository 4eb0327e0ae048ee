"""Differences, arguments and records put together again: pure functions over bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistence import record as rec
from persistence.errors import RemoteDamaged
from persistence.record import NEVER, NO_ID
from persistence.remote.contract import Announcement, Put, RemoteSession, Request, Stored
from persistence.remote.layout import (
    HEAD,
    OLDER,
    ORDER,
    STATE,
    decode_announcements,
    decode_session,
    decode_state,
    difference,
    pack_command,
    pack_requests,
)
from tests.remote.sessions import end, new_id, new_record, next_record, touch, unpack

DATA = st.dictionaries(
    st.text(max_size=5), st.one_of(st.integers(), st.binary(max_size=40)), max_size=6
)


def stored_hash(
    record: bytes, accessed: float = 1.0, deadline: float = NEVER
) -> dict[bytes, bytes]:
    """Return the hash that the script makes of a creation."""
    [put] = unpack(pack_requests([Put("a", record, NO_ID, accessed, deadline)], 0))
    fields: dict[bytes, bytes] = {STATE: b"L" + bytes(8) + record[:32]}
    put.apply(fields)
    return fields


@given(data=DATA)
def test_a_record_taken_apart_is_put_together_byte_for_byte(data: dict[str, object]) -> None:
    record = new_record(data)
    found = decode_session(b"k", "a", stored_hash(record, 5.0, 7.0))
    assert found == RemoteSession(record, 5.0, 7.0, NEVER, (rec.commit_of(record),))


@given(before=DATA, after=DATA)
def test_a_difference_makes_the_new_record_of_the_old_one(
    before: dict[str, object], after: dict[str, object]
) -> None:
    old = new_record(before)
    new = next_record(old, after)
    fields = stored_hash(old)
    [put] = unpack(pack_requests([Put("a", new, rec.commit_of(old), 1.0, NEVER, old=old)], 0))
    changed, removed = difference(old, new)
    assert len(put.sets) + len(put.outside) == len(changed) // 2 + 1
    assert put.removes == removed
    put.apply(fields)
    fields[STATE] = b"L" + bytes(8) + new[:32]
    found = decode_session(b"k", "a", fields)
    assert isinstance(found, RemoteSession)
    assert found.record == new


def test_only_what_differs_is_sent() -> None:
    old = new_record({"a": 1, "b": 2, "c": 3})
    changed, removed = difference(old, next_record(old, {"a": 1, "b": 9, "c": 3}))
    assert (changed, removed) == ([b"b", b"\x09"], [])
    changed, removed = difference(old, next_record(old, {"a": 1, "c": 3}))
    assert (changed[0], removed) == (ORDER, [b"b"])
    changed, _ = difference(old, next_record(old, {"c": 3, "b": 2, "a": 1}))
    assert changed[0] == ORDER
    assert len(changed) == 2


def test_large_values_are_compared_as_bytes_too() -> None:
    old = new_record({"blob": bytes(100_000), "n": 1})
    changed, _ = difference(old, next_record(old, {"blob": bytes(100_000), "n": 2}))
    assert changed == [b"n", b"\x02"]


def test_a_difference_to_another_version_than_the_base_is_a_bug() -> None:
    old = new_record({"n": 1})
    with pytest.raises(AssertionError, match="built on"):
        pack_requests([Put("a", next_record(old, {}), new_id(), 1, 2, old=old)], 0)


@given(data=DATA, place=st.integers(0, 2**16), field=st.integers(0, 20))
def test_any_changed_byte_is_found(data: dict[str, object], place: int, field: int) -> None:
    fields = stored_hash(new_record(data))
    name = sorted(fields)[field % len(fields)]
    value = fields[name]
    # Times may change without a new record, and the state is the script's.
    first = 24 if name == HEAD else 0
    if name == STATE or len(value) <= first:
        return
    at = first + place % (len(value) - first)
    fields[name] = value[:at] + bytes([value[at] ^ 0x40]) + value[at + 1 :]
    with pytest.raises(RemoteDamaged):
        decode_session(b"k", "a", fields)


def test_older_commit_ids_beside_a_session_are_no_field_of_it() -> None:
    record = new_record({"n": 1})
    fields = {**stored_hash(record), OLDER: bytes(31 * 16)}
    found = decode_session(b"k", "a", fields)
    assert isinstance(found, RemoteSession)
    assert found.record == record


@pytest.mark.parametrize("missing", [STATE, HEAD, ORDER, b"n"])
def test_a_hash_that_lacks_something_is_damaged(missing: bytes) -> None:
    fields = stored_hash(new_record({"n": 1}))
    del fields[missing]
    with pytest.raises(RemoteDamaged, match="Redis key 'k'"):
        decode_session(b"k", "a", fields)


@pytest.mark.parametrize("order", [b"", b"\xc0", b"\x91\x01", b"\x91\xa1x", b"\x91\xa1n\x00"])
def test_an_order_that_names_other_fields_is_damage(order: bytes) -> None:
    fields = stored_hash(new_record({"n": 1}))
    with pytest.raises(RemoteDamaged):
        decode_session(b"k", "a", {**fields, ORDER: order})


@pytest.mark.parametrize("state", [b"", b"L", b"X" + bytes(40), bytes(41)])
def test_a_state_of_somebody_else_is_none(state: bytes) -> None:
    with pytest.raises(ValueError, match="not one that this library writes"):
        decode_state(state)


def test_a_tombstone_is_decoded_as_that() -> None:
    state = b"T" + (7).to_bytes(8, "little") + b"i" * 16 + b"c" * 16 + b"o" * 16
    assert decode_session(b"k", "a", {STATE: state}) == Stored(
        False, 7, b"i" * 16, b"c" * 16, (b"c" * 16, b"o" * 16)
    )


def test_announcements_are_decoded_in_order_and_cut_ones_refused() -> None:
    event = b"L" + (3).to_bytes(8, "little") + b"c" * 16 + (2).to_bytes(2, "little") + "ü".encode()
    message = b"w" * 16 + event + b"T" + event[1:]
    alive, ended = decode_announcements(message)
    assert alive == Announcement("ü", 3, b"c" * 16, False, b"w" * 16)
    assert ended == alive._replace(ended=True)
    for length in range(17, len(message)):
        if length != 16 + len(event):
            with pytest.raises(ValueError, match="cut short"):
                decode_announcements(message[:length])


def test_a_session_that_never_expires_has_no_expiry() -> None:
    record = new_record({})
    touches = [touch("a", record, 1.0, NEVER), touch("a", record, 1.0, 12.5)]
    never, timed = unpack(pack_requests(touches, 0))
    assert never.expires_ms == NEVER
    assert timed.expires_ms == 12_500


def test_requests_of_all_kinds_are_told_apart_again() -> None:
    record = new_record({"a": 1, "b": 2, "c": 3})
    new = next_record(record, {"b": 5, "c": bytes(20_000), "d": bytes(30_000)})
    base = rec.commit_of(record)
    requests: list[Request] = [
        Put("a", record, NO_ID, 1.0, 2.0),
        Put("a", new, base, 1.0, 2.0, old=record),
        end("a", rec.incarnation_of(record), base),
        touch("a", record, 3.0, 4.0),
        Put("a", new, base, 1.0, 2.0),
    ]
    packed = pack_requests(requests, 60_000)
    found = unpack(packed)
    assert [request.kind for request in found] == [b"C", b"P", b"D", b"T", b"R"]
    assert [request.base for request in found] == [NO_ID, base, base, NO_ID, base]
    assert [request.expires_ms for request in found] == [2_000, 2_000, 60_000, 4_000, 2_000]
    assert found[1].removes == [b"a"]
    values = rec.packed_fields(new)
    assert found[1].outside == {b"c": values["c"], b"d": values["d"]}, "large ones are not copied"
    assert max(map(len, packed.outside)) > 16_384 > len(packed.requests)


@given(data=DATA, pick=st.integers(0, 5), value=st.binary(max_size=40))
def test_naming_what_changed_packs_the_same_as_comparing(
    data: dict[str, object], pick: int, value: bytes
) -> None:
    if not data:
        return
    name = list(data)[pick % len(data)]
    old = new_record(data)
    new = next_record(old, {**data, name: value})
    put = Put("a", new, rec.commit_of(old), 1.0, 2.0, old=old)
    changed = {} if data[name] == value else {name: rec.pack_value(value, name)}
    assert pack_requests([put], 0) == pack_requests([put._replace(changed=changed)], 0)


def test_a_large_value_that_changed_is_not_copied() -> None:
    old = new_record({"blob": b"", "n": 1})
    blob = rec.pack_value(bytes(100_000), "blob")
    new = next_record(old, {"blob": bytes(100_000), "n": 1})
    put = Put("a", new, rec.commit_of(old), 1.0, 2.0, changed={"blob": blob})
    packed = pack_requests([put], 0)
    assert packed.outside[0] is blob
    assert unpack(packed)[0].outside == {b"blob": blob}


@given(sizes=st.lists(st.integers(0, 1100), max_size=5))
def test_arguments_of_any_length_are_announced_with_it(sizes: list[int]) -> None:
    arguments = [b"x" * size for size in sizes]
    expected = b"*%d\r\n" % len(sizes)
    expected += b"".join(b"$%d\r\n%b\r\n" % (len(each), each) for each in arguments)
    assert b"".join(pack_command(arguments)) == expected


def test_commands_are_packed_as_the_protocol_has_it() -> None:
    assert b"".join(pack_command([b"GET", b"k\r\n"])) == b"*2\r\n$3\r\nGET\r\n$3\r\nk\r\n\r\n"
    large = bytes(50_000)
    pieces = pack_command([b"SET", b"k", large, b"NX"])
    assert any(piece is large for piece in pieces), "not copied"
    expected = b"*4\r\n$3\r\nSET\r\n$1\r\nk\r\n$50000\r\n" + large + b"\r\n$2\r\nNX\r\n"
    assert b"".join(pieces) == expected
