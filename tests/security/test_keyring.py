from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistence.errors import ConfigError
from persistence.security.keyring import (
    KEY_BYTES,
    KeyRing,
    derive,
    format_keys,
    key_id,
    new_key,
    parse_keys,
)

ONE, TWO = bytes(range(32)), bytes(range(1, 33))


@pytest.mark.parametrize(
    "text",
    [
        ONE.hex(),
        ONE.hex().upper(),
        base64.b64encode(ONE).decode(),
        base64.urlsafe_b64encode(ONE).decode().rstrip("="),
        f"# a comment\n\n  {ONE.hex()}  # the key\n",
    ],
)
def test_a_key_is_read_in_every_spelling(text: str) -> None:
    assert parse_keys(text, "here") == [ONE]


@pytest.mark.parametrize("between", ["\n", ",", " , ", "\r\n", "\t"])
def test_the_last_of_several_keys_is_the_newest(between: str) -> None:
    keys = parse_keys(f"{ONE.hex()}{between}{TWO.hex()}", "here")
    assert keys == [ONE, TWO]
    assert KeyRing(keys).newest == key_id(TWO)


@given(st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=5, unique=True))
def test_a_key_file_reads_back_as_what_was_written(keys: list[bytes]) -> None:
    assert parse_keys(format_keys(keys), "here") == keys


def test_only_one_spelling_of_a_base64_key_is_the_key() -> None:
    text = base64.b64encode(ONE).decode()
    mistyped = text[:-2] + chr(ord(text[-2]) + 1) + "="  # the two bits that decode to nothing
    assert base64.b64decode(mistyped) == ONE
    with pytest.raises(ConfigError, match="entry 1"):
        parse_keys(mistyped, "here")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        ("secret!", "entry 1 is no key"),
        (f"{ONE.hex()} {ONE.hex()[:-1]}", "entry 2 is no key"),
        (f"{ONE.hex()} {TWO.hex()} {ONE.hex().upper()}", "entry 3 is there a second time"),
        (" ".join(f"{n:064x}" for n in range(1001)), "at most 1000"),
    ],
)
def test_what_is_wrong_is_named_by_its_place_and_never_shown(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        parse_keys(text, "security.secret_keys")
    assert str(caught.value).startswith("security.secret_keys")
    assert "secret!" not in str(caught.value)
    assert ONE.hex()[:8] not in str(caught.value)


def test_no_representation_of_a_ring_has_a_key_in_it() -> None:
    text = repr(KeyRing([ONE, TWO]))
    assert text == f"KeyRing({key_id(ONE).hex()}, {key_id(TWO).hex()})"
    assert ONE.hex()[:8] not in text


def test_keys_are_random_and_their_ids_follow_from_them() -> None:
    assert len({new_key() for _ in range(100)}) == 100
    assert len(new_key()) == KEY_BYTES
    assert key_id(ONE) == key_id(bytes(ONE)) != key_id(TWO)


def test_every_purpose_has_a_key_of_its_own() -> None:
    ring = KeyRing([ONE])
    derived = {ring.derived(ring.newest, purpose) for purpose in (b"a", b"b", b"")}
    assert len(derived | {ONE, derive(ONE, b"a")}) == 5
    assert ring.derived(b"none", b"a") is None


def test_a_ring_that_learns_goes_on_with_its_newest_key() -> None:
    ring = KeyRing([ONE])
    ring.learn(KeyRing([TWO]))
    assert key_id(TWO) in ring
    assert key_id(ONE) in ring
    assert ring.newest == key_id(ONE)
