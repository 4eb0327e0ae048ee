from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistence.errors import TokenInvalid
from persistence.security import tokens
from persistence.security.keyring import KeyRing
from persistence.security.sealing import RECORDS, TOKENS, Sealing
from persistence.security.tokens import MAX_TOKEN_CHARS, Claims, fingerprint
from persistence.session import ClientInfo
from tests.full_size import full_or

KEY, OTHER_KEY = bytes(range(32)), bytes(range(32, 64))
SEALING = Sealing(KeyRing([KEY]), TOKENS)
CLIENT = ClientInfo("203.0.113.9", "Mozilla/5.0")
INCARNATION = bytes(range(16))
NOW = 1_700_000_000.0
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
DAMAGED_TOKENS = 524_288


def claims(session_id: str = "a", *, client: ClientInfo = CLIENT, ttl: float = 60.0) -> Claims:
    return Claims(session_id, INCARNATION, NOW, NOW + ttl, fingerprint(client))


def is_valid(token: object, client: ClientInfo = CLIENT, now: float = NOW) -> bool:
    try:
        tokens.read(SEALING, token, client, now)
    except TokenInvalid as error:
        said = str(error)
    else:
        return True
    assert said == str(tokens.invalid()), "it says the same whatever is wrong"
    return False


@given(
    st.text(min_size=1, max_size=100),
    st.one_of(st.none(), st.text()),
    st.one_of(st.none(), st.text()),
)
def test_a_token_says_what_was_issued_and_is_safe_in_a_url(
    session_id: str, ip: str | None, user_agent: str | None
) -> None:
    client = ClientInfo(ip, user_agent)
    said = claims(session_id, client=client)
    token = tokens.issue(SEALING, said)
    assert set(token) <= set(ALPHABET)
    assert tokens.read(SEALING, token, client, NOW) == said


def test_the_longest_session_id_has_a_token_within_the_bound() -> None:
    token = tokens.issue(SEALING, claims("ü" * 256))
    assert len(token) <= MAX_TOKEN_CHARS
    assert is_valid(token)


def test_no_token_is_like_another() -> None:
    assert len({tokens.issue(SEALING, claims()) for _ in range(1000)}) == 1000


def test_a_token_is_valid_until_the_moment_it_expires() -> None:
    token = tokens.issue(SEALING, claims(ttl=60))
    assert is_valid(token, now=NOW + 59.999)
    assert not is_valid(token, now=NOW + 60)
    assert is_valid(tokens.issue(SEALING, claims(ttl=float("inf"))), now=1e300)


@pytest.mark.parametrize(
    "other",
    [
        ClientInfo("203.0.113.10", "Mozilla/5.0"),
        ClientInfo("203.0.113.9", "mozilla/5.0"),
        ClientInfo("203.0.113.9", None),
        ClientInfo(None, "Mozilla/5.0"),
        ClientInfo("203.0.113.9Mozilla/5.0", ""),
        ClientInfo("Mozilla/5.0", "203.0.113.9"),
        ClientInfo(),
    ],
)
def test_a_token_is_one_clients(other: ClientInfo) -> None:
    token = tokens.issue(SEALING, claims())
    assert is_valid(token)
    assert not is_valid(token, other)
    assert fingerprint(other) != fingerprint(CLIENT)


def test_what_is_not_given_is_not_the_same_as_empty() -> None:
    given = [ClientInfo(ip, agent) for ip in (None, "", "a") for agent in (None, "", "a")]
    assert len({fingerprint(client) for client in given}) == len(given)


@pytest.mark.parametrize(
    "token",
    [None, 5, b"bytes", "", "a", "é" * 100, "A" * 2000, "=" * 40, " ", [], "AQ" + "A" * 140],
)
def test_what_is_no_token_is_invalid_like_any_other(token: object) -> None:
    assert not is_valid(token)
    tokens.key_id_in(token)


@given(st.one_of(st.text(), st.text(ALPHABET), st.binary().map(tokens._encoded)))
def test_nothing_but_a_token_is_valid_and_nothing_else_is_raised(token: str) -> None:
    assert not is_valid(token)
    assert not is_valid("AQ" + token)


@given(st.binary(max_size=200))
def test_what_is_sealed_and_makes_no_claims_is_invalid_too(plain: bytes) -> None:
    sealed = SEALING.seal(plain[: tokens._CLAIMS.size], tokens.VERSION)
    assert not is_valid(tokens._encoded(tokens.VERSION + sealed))


def test_a_token_has_one_spelling() -> None:
    token = tokens.issue(SEALING, claims("ab"))
    data = tokens._decoded(token)
    assert data is not None
    assert len(data) % 3, "else its last character has no bits to spare"
    same = [
        spelling
        for last in ALPHABET
        if base64.urlsafe_b64decode((spelling := token[:-1] + last) + "=" * (-len(token) % 4))
        == data
    ]
    assert len(same) > 1
    assert [spelling for spelling in same if is_valid(spelling)] == [token]
    padded = token + "=" * (-len(token) % 4)
    assert not is_valid(padded)
    assert not any(map(is_valid, (f" {token}", f"{token}\n", token[:5] + "\n" + token[5:])))


def test_tokens_of_other_keys_purposes_and_versions_are_invalid() -> None:
    others = [Sealing(KeyRing([OTHER_KEY]), TOKENS), Sealing(KeyRing([KEY]), RECORDS)]
    assert not any(is_valid(tokens.issue(other, claims())) for other in others)
    data = tokens._decoded(tokens.issue(SEALING, claims()))
    assert data is not None
    assert not is_valid(tokens._encoded(b"\x02" + data[1:]))


def test_an_old_key_validates_while_a_new_one_signs() -> None:
    ring = KeyRing([KEY, OTHER_KEY])
    rotated = Sealing(ring, TOKENS)
    old, new = tokens.issue(SEALING, claims()), tokens.issue(rotated, claims())
    assert tokens.key_id_in(new) == ring.newest != tokens.key_id_in(old)
    assert tokens.read(rotated, old, CLIENT, NOW) == tokens.read(rotated, new, CLIENT, NOW)
    assert not is_valid(new)


# Damaged tokens


def damaged(token: str, other: str) -> Iterator[str]:
    """Yield what may become of a token: each differs from it, and from `other`."""
    data = tokens._decoded(token)
    assert data is not None
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield tokens._encoded(bytes(flipped))
    for at, character in itertools.product(range(len(token)), ALPHABET):
        yield token[:at] + character + token[at + 1 :]
    for at in range(len(token)):
        yield token[:at]
        yield token[at + 1 :]
        yield token[:at] + token[at + 1 :]
        yield token[:at] + other[at:]
    for first, second in itertools.combinations(range(len(token)), 2):
        swapped = list(token)
        swapped[first], swapped[second] = swapped[second], swapped[first]
        yield "".join(swapped)
    yield from (token + character for character in ALPHABET)


def test_every_damaged_token_is_invalid() -> None:
    wanted = full_or(DAMAGED_TOKENS, DAMAGED_TOKENS // 16)
    tried = 0
    for number in itertools.count():
        token, other = (tokens.issue(SEALING, claims(f"session {number}")) for _ in range(2))
        foreign = tokens.issue(Sealing(KeyRing([OTHER_KEY]), TOKENS), claims())
        assert is_valid(token)
        assert is_valid(other)
        for each in itertools.chain(damaged(token, other), damaged(foreign, other)):
            if each in (token, other):
                continue
            assert not is_valid(each), each
            tried += 1
        if tried >= wanted:
            break
    assert tried >= wanted
