"""Hashes whose values are sealed: pure, over bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistence import record as rec
from persistence.errors import RemoteDamaged
from persistence.record import NEVER, NO_ID
from persistence.remote.contract import Put, RemoteSession
from persistence.remote.layout import (
    HEAD,
    OLDER,
    ORDER,
    STATE,
    decode_session,
    lacks_key,
    pack_requests,
)
from persistence.security.keyring import KeyRing
from persistence.security.sealing import REMOTE, Sealing
from tests.remote.sessions import new_id, new_record, next_record, unpack

OLD_KEY, NEW_KEY = bytes(32), bytes(range(32))
SEALER = Sealing(KeyRing([OLD_KEY, NEW_KEY]), REMOTE)
DATA = st.dictionaries(
    st.text(max_size=5), st.one_of(st.integers(), st.binary(max_size=40)), max_size=6
)
SECRET = "nobody may read this"


def stored(record: bytes, session_id: str = "a", sealer: Sealing = SEALER) -> dict[bytes, bytes]:
    """Return the hash that the script makes of a creation."""
    request = Put(session_id, record, NO_ID, 5.0, 7.0)
    [put] = unpack(pack_requests([request], 0, sealer))
    fields = {STATE: b"L" + bytes(8) + record[:32]}
    put.apply(fields)
    return fields


def read(fields: dict[bytes, bytes], session_id: str = "a") -> object:
    return decode_session(b"k", session_id, fields, SEALER)


def refused(fields: dict[bytes, bytes], session_id: str = "a") -> str:
    with pytest.raises(RemoteDamaged) as caught:
        read(fields, session_id)
    assert caught.value.session_id == session_id
    return str(caught.value)


@given(data=DATA)
def test_a_sealed_session_is_put_together_byte_for_byte(data: dict[str, object]) -> None:
    record = new_record(data)
    assert read(stored(record)) == RemoteSession(record, 5.0, 7.0, NEVER, (rec.commit_of(record),))


@given(before=DATA, after=DATA)
def test_a_difference_is_sealed_and_makes_the_new_record_of_the_old_one(
    before: dict[str, object], after: dict[str, object]
) -> None:
    old = new_record(before)
    new = next_record(old, after)
    fields = stored(old)
    kept = dict(fields)
    request = Put("a", new, rec.commit_of(old), 1.0, NEVER, old=old)
    [put] = unpack(pack_requests([request], 0, SEALER))
    put.apply(fields)
    fields[STATE] = b"L" + bytes(8) + new[:32]
    assert read(fields) == RemoteSession(new, 1.0, NEVER, NEVER, (rec.commit_of(new),))
    same = {name for name in before if name in after and before[name] == after[name]}
    unchanged = [name for name in same if type(before[name]) is type(after[name])]
    assert all(fields[name.encode()] == kept[name.encode()] for name in unchanged)


def test_one_changed_field_is_sent_alone() -> None:
    old = new_record({"a": 1, "b": SECRET})
    new = next_record(old, {"a": 2, "b": SECRET})
    changed = {"a": rec.pack_value(2, "a")}
    request = Put("a", new, rec.commit_of(old), 1.0, NEVER, old=old, changed=changed)
    [put] = unpack(pack_requests([request], 0, SEALER))
    assert list(put.sets) == [HEAD, b"a"]
    fields = stored(old)
    put.apply(fields)
    fields[STATE] = b"L" + bytes(8) + new[:32]
    assert read(fields) == RemoteSession(new, 1.0, NEVER, NEVER, (rec.commit_of(new),))


def test_large_values_are_sealed_as_well() -> None:
    record = new_record({"large": SECRET * 2000, "small": SECRET})
    packed = pack_requests([Put("a", record, NO_ID, 5.0, 7.0)], 0, SEALER)
    assert len(packed.outside) == 1
    assert SECRET.encode() not in packed.requests + packed.outside[0]
    assert read(stored(record)) == RemoteSession(record, 5.0, 7.0, NEVER, (rec.commit_of(record),))


def test_neither_values_nor_metadata_are_in_the_clear() -> None:
    meta = rec.pack_meta({"user_id": "ada lovelace"})
    fields = stored(new_record({"field": SECRET}, meta=meta))
    everything = b"".join(fields.values())
    assert SECRET.encode() not in everything
    assert b"lovelace" not in everything


def test_every_flipped_bit_of_what_is_sealed_is_noticed() -> None:
    fields = stored(new_record({"a": 1, "b": 2}))
    for name, start in ((b"a", 0), (b"b", 0), (HEAD, 24)):
        for bit in range(8 * start, 8 * len(fields[name])):
            flipped = bytearray(fields[name])
            flipped[bit // 8] ^= 1 << bit % 8
            refused({**fields, name: bytes(flipped)})


def test_a_value_of_another_field_session_or_incarnation_is_refused() -> None:
    record = new_record({"a": 1, "b": 1})
    fields = stored(record)
    assert fields[b"a"] != fields[b"b"], "though the values are the same"
    assert "not what was sealed" in refused({**fields, b"a": fields[b"b"]})
    other = stored(record, "b")
    for name in (b"a", HEAD):
        assert "not what was sealed" in refused({**fields, name: other[name]})
    # The same session, created anew, and by chance in the same group.
    incarnation = record[:1] + new_id()[1:]
    again = stored(new_record({"a": 1, "b": 1}, incarnation=incarnation))
    assert "not what was sealed" in refused({**fields, b"a": again[b"a"]})
    assert "another commit" in refused({**again, STATE: fields[STATE]})


def test_an_older_value_of_the_same_field_does_not_fit_the_checksum_of_the_whole() -> None:
    old = new_record({"a": 1, "b": 1})
    new = next_record(old, {"a": 2, "b": 1})
    fields = {**stored(new), STATE: b"L" + bytes(8) + new[:32]}
    assert isinstance(read(fields), RemoteSession)
    assert "checksum" in refused({**fields, b"a": stored(old)[b"a"]})


def test_a_field_that_is_taken_away_is_missed() -> None:
    fields = stored(new_record({"a": 1, "b": 1}))
    del fields[b"b"]
    assert "order names" in refused(fields)
    order = {**fields, ORDER: b"\x91\xa1a"}
    assert "checksum" in refused(order)


def test_a_plain_session_in_an_encrypted_tier_is_refused_and_the_other_way_round() -> None:
    record = new_record({"a": 1})
    [put] = unpack(pack_requests([Put("a", record, NO_ID, 5.0, 7.0)], 0))
    plain = {STATE: b"L" + bytes(8) + record[:32]}
    put.apply(plain)
    assert "not encrypted, or with another key" in refused(plain)
    with pytest.raises(RemoteDamaged):
        decode_session(b"k", "a", stored(record), None)


def test_a_key_that_is_not_known_is_named() -> None:
    other = Sealing(KeyRing([bytes(range(1, 33))]), REMOTE)
    fields = stored(new_record({"a": 1}), sealer=other)
    assert other.newest.hex() in refused(fields)
    assert lacks_key("a", fields, SEALER)
    assert not lacks_key("a", stored(new_record({"a": 1})), SEALER)
    assert not lacks_key("a", {STATE: b"T" + bytes(40)}, SEALER)


def test_what_an_old_key_has_sealed_is_read_beside_what_the_newest_has() -> None:
    old = new_record({"a": 1, "b": SECRET})
    fields = stored(old, sealer=Sealing(KeyRing([OLD_KEY]), REMOTE))
    new = next_record(old, {"a": 2, "b": SECRET})
    request = Put("a", new, rec.commit_of(old), 1.0, NEVER, old=old)
    [put] = unpack(pack_requests([request], 0, SEALER))
    put.apply(fields)
    fields[STATE] = b"L" + bytes(8) + new[:32]
    assert fields[b"a"][:4] == SEALER.newest != fields[b"b"][:4]
    assert read(fields) == RemoteSession(new, 1.0, NEVER, NEVER, (rec.commit_of(new),))


@given(
    st.dictionaries(
        st.sampled_from([STATE, HEAD, ORDER, OLDER, b"a"]), st.binary(max_size=120), max_size=5
    )
)
def test_no_hash_makes_the_decoder_raise_anything_else(fields: dict[bytes, bytes]) -> None:
    fields = {**stored(new_record({"a": 1})), **fields}
    try:
        read(fields)
    except RemoteDamaged:
        return


def test_a_head_that_is_sealed_and_no_head_is_damage() -> None:
    fields = stored(new_record({"a": 1}))
    for content in (b"", b"short", new_id() * 10):
        from persistence.remote.sealed import FieldCodec

        head = FieldCodec(SEALER, b"a").seal_head(content)
        refused({**fields, HEAD: fields[HEAD][:24] + head})
