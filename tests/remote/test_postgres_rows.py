"""Rows of the sessions' table: requests become them, records come out of them, and nothing else."""

from __future__ import annotations

import hashlib
import hmac
import secrets

import pytest
from crc32c import crc32c

from persistence import record as rec
from persistence.record import NEVER, NO_ID
from persistence.remote.contract import Delete, Put, Stored, Touch
from persistence.remote.postgres_rows import RowCodec, id_bytes
from persistence.sealer import KEY_ID_BYTES
from persistence.testing.sessions import new_id, new_record

SECRET = "nobody may read this"


class ToySealer:
    """A sealer that is good enough to tell whether what it is given is the same again."""

    def __init__(self, *keys: bytes) -> None:
        self._keys = {hashlib.sha256(key).digest()[:KEY_ID_BYTES]: key for key in keys}
        self.newest = list(self._keys)[-1]

    def learn(self, key: bytes) -> None:
        """Know one key more."""
        self._keys[hashlib.sha256(key).digest()[:KEY_ID_BYTES]] = key

    def knows(self, key_id: bytes) -> bool:
        return key_id in self._keys

    def seal(self, plain: bytes | memoryview, about: bytes, group: bytes = b"") -> bytes:
        nonce = secrets.token_bytes(12)
        body = self._mixed(self.newest, nonce, bytes(plain))
        return self.newest + nonce + body + self._tag(self.newest, nonce + body, about + group)

    def open(self, sealed: bytes | memoryview, about: bytes, group: bytes = b"") -> bytes | None:
        key_id, nonce, body, tag = sealed[:4], sealed[4:16], bytes(sealed[16:-16]), sealed[-16:]
        if bytes(key_id) not in self._keys:
            return None
        expected = self._tag(bytes(key_id), bytes(nonce) + body, about + group)
        if not hmac.compare_digest(tag, expected):
            return None
        return self._mixed(bytes(key_id), bytes(nonce), body)

    def _mixed(self, key_id: bytes, nonce: bytes, data: bytes) -> bytes:
        stream = hashlib.shake_256(self._keys[key_id] + nonce).digest(len(data))
        return bytes(a ^ b for a, b in zip(data, stream, strict=True))

    def _tag(self, key_id: bytes, data: bytes, about: bytes) -> bytes:
        return hmac.digest(self._keys[key_id], data + b"|" + about, "sha256")[:16]


SEALERS = {"plain": None, "sealed": ToySealer(b"old", b"new")}


def stored_of(record: bytes) -> Stored:
    return Stored(True, 1, rec.incarnation_of(record), rec.commit_of(record))


@pytest.mark.parametrize("name", SEALERS)
def test_a_record_comes_back_byte_for_byte(name: str) -> None:
    codec = RowCodec(SEALERS[name])
    record = new_record({"a": SECRET})
    kind, key, commit, base, incarnation, version, kept, checksum, *times = codec.row_of(
        Put("ü", record, NO_ID, 5.0, 7.0, 9.0)
    )
    assert (kind, key, version, times) == ("C", "ü".encode(), 1, [5.0, 7.0, 9.0])
    assert (commit, base, incarnation) == (record[16:32], NO_ID, record[:16])
    assert kept is not None
    assert codec.opened(key, stored_of(record), kept, checksum) == record
    assert (SECRET.encode() in kept) is (name == "plain")


def test_other_requests_carry_no_record() -> None:
    codec = RowCodec(SEALERS["sealed"])
    commit, incarnation, base = new_id(), new_id(), new_id()
    delete = codec.row_of(Delete("a", commit, incarnation, base))
    assert delete[:7] == ("D", b"a", commit, base, incarnation, 0, None)
    touch = codec.row_of(Touch("a", commit, 5.0, NEVER))
    assert touch == ("T", b"a", commit, NO_ID, NO_ID, 0, None, 0, 5.0, NEVER, NEVER)
    record = new_record({})
    assert codec.row_of(Put("a", record, base, 5.0, 7.0))[0] == "P"


@pytest.mark.parametrize("name", SEALERS)
def test_every_flipped_bit_of_a_record_is_noticed(name: str) -> None:
    codec = RowCodec(SEALERS[name])
    record = new_record({"a": 1})
    row = codec.row_of(Put("a", record, NO_ID, 5.0, 7.0))
    kept, checksum = row[6], row[7]
    assert kept is not None
    for bit in range(8 * len(kept)):
        flipped = bytearray(kept)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="checksum"):
            codec.opened(b"a", stored_of(record), bytes(flipped), checksum)
        if name == "sealed":  # and by who makes the checksum fit
            with pytest.raises(ValueError, match=r"sealed|encrypted"):
                codec.opened(b"a", stored_of(record), bytes(flipped), crc32c(flipped))


def test_a_sealed_record_of_another_session_incarnation_or_commit_does_not_open() -> None:
    codec = RowCodec(SEALERS["sealed"])
    record = new_record({"a": 1})
    row = codec.row_of(Put("a", record, NO_ID, 5.0, 7.0))
    kept, checksum = row[6], row[7]
    assert kept is not None
    mine = stored_of(record)
    for key, stored in (
        (b"b", mine),
        (b"a", mine._replace(incarnation=new_id())),
        (b"a", mine._replace(commit=new_id())),
    ):
        with pytest.raises(ValueError, match="not what was sealed for this commit"):
            codec.opened(key, stored, kept, checksum)


def test_a_key_that_is_not_known_is_named_and_can_be_looked_for() -> None:
    old, new = RowCodec(ToySealer(b"old")), RowCodec(ToySealer(b"old", b"new"))
    record = new_record({"a": 1})
    row = new.row_of(Put("a", record, NO_ID, 5.0, 7.0))
    kept, checksum = row[6], row[7]
    assert kept is not None
    assert old.lacks_key(kept)
    assert not new.lacks_key(kept)
    assert not new.lacks_key(None)
    with pytest.raises(ValueError, match=kept[:4].hex()):
        old.opened(b"a", stored_of(record), kept, checksum)
    kept = old.row_of(Put("a", record, NO_ID, 5.0, 7.0))[6]
    assert kept is not None
    assert new.opened(b"a", stored_of(record), kept, crc32c(kept)) == record


def test_a_plain_record_is_not_taken_where_all_are_sealed_nor_a_sealed_one_where_none_is() -> None:
    plain, sealed = RowCodec(), RowCodec(SEALERS["sealed"])
    record = new_record({"a": 1})
    for writer, reader in ((plain, sealed), (sealed, plain)):
        kept = writer.row_of(Put("a", record, NO_ID, 5.0, 7.0))[6]
        assert kept is not None
        with pytest.raises(ValueError, match=r"not encrypted|of another commit"):
            reader.opened(b"a", stored_of(record), kept, crc32c(kept))


def test_what_is_no_record_is_refused() -> None:
    with pytest.raises(ValueError, match="no record"):
        RowCodec().opened(b"a", stored_of(new_record({})), None, 0)
    with pytest.raises(ValueError, match="none of this library"):
        RowCodec().opened(b"a", stored_of(new_record({})), b"short", crc32c(b"short"))


def test_the_empty_id_is_nobodys() -> None:
    with pytest.raises(AssertionError):
        id_bytes("")
