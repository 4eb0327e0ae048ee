from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from persistence.sealer import SEAL_BYTES
from persistence.security.keyring import KeyRing
from persistence.security.sealing import RECORDS, REMOTE, Sealing

OLD, NEW = bytes(32), bytes(range(32))
SEALING = Sealing(KeyRing([OLD, NEW]), RECORDS)
GROUPS = st.binary(max_size=1)


@given(st.binary(max_size=200), st.binary(max_size=50), GROUPS)
def test_what_is_sealed_opens_as_it_was_and_is_as_long_as_is_said(
    plain: bytes, about: bytes, group: bytes
) -> None:
    sealed = SEALING.seal(plain, about, group)
    assert len(sealed) == len(plain) + SEAL_BYTES
    assert SEALING.open(sealed, about, group) == plain
    assert SEALING.open(memoryview(sealed), about, group) == plain


def test_the_same_is_never_sealed_to_the_same_bytes() -> None:
    assert len({SEALING.seal(b"same", b"about", b"g") for _ in range(1000)}) == 1000


def test_every_flipped_bit_and_every_cut_is_noticed() -> None:
    sealed = SEALING.seal(b"some text", b"about")
    for bit in range(8 * len(sealed)):
        flipped = bytearray(sealed)
        flipped[bit // 8] ^= 1 << bit % 8
        assert SEALING.open(bytes(flipped), b"about") is None
    for length in range(len(sealed)):
        assert SEALING.open(sealed[:length], b"about") is None


@given(st.binary(max_size=100), st.binary(max_size=20), GROUPS)
def test_nothing_else_opens_and_nothing_raises(data: bytes, about: bytes, group: bytes) -> None:
    assert SEALING.open(data, about, group) is None
    assert SEALING.open(SEALING.newest + data, about, group) is None


def test_another_purpose_group_key_or_subject_does_not_open() -> None:
    sealed = SEALING.seal(b"text", b"about", b"g")
    assert SEALING.open(sealed, b"about", b"h") is None
    assert SEALING.open(sealed, b"about ", b"g") is None
    assert Sealing(KeyRing([OLD, NEW]), REMOTE).open(sealed, b"about", b"g") is None
    assert Sealing(KeyRing([OLD]), RECORDS).open(sealed, b"about", b"g") is None


def test_an_old_key_opens_and_the_newest_one_seals() -> None:
    sealed = Sealing(KeyRing([OLD]), RECORDS).seal(b"text", b"about")
    assert SEALING.open(sealed, b"about") == b"text"
    assert SEALING.knows(sealed[:4])
    assert SEALING.seal(b"text", b"about")[:4] == SEALING.newest != sealed[:4]


def test_no_representation_has_a_key_in_it() -> None:
    assert NEW.hex()[:10] not in repr(SEALING)
    assert repr(SEALING).startswith("Sealing(records, KeyRing(")
