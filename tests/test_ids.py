from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistence.errors import InvalidSessionId
from persistence.ids import MAX_SESSION_ID_BYTES, CommitIds, check_session_id, new_session_id

URL_SAFE = set(string.ascii_letters + string.digits + "-_")


# Session ids


def test_new_ids_are_22_url_safe_characters_and_never_the_same() -> None:
    made = {new_session_id() for _ in range(10_000)}
    assert len(made) == 10_000
    assert all(len(name) == 22 and set(name) <= URL_SAFE for name in made)
    assert all(check_session_id(name) == name.encode() for name in made)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=128))
def test_any_text_of_at_most_512_bytes_is_a_plain_key(text: str) -> None:
    assert check_session_id(text).decode() == text


@pytest.mark.parametrize(
    "session_id",
    ["../../etc/passwd", "/", ".", "\0", "a\nb", " ", "*?[a]{b}", "\x1b[2J", "\ufeff", "ü", "😀"],
)
def test_nothing_in_an_id_has_a_meaning(session_id: str) -> None:
    assert check_session_id(session_id) == session_id.encode()


@pytest.mark.parametrize("character", ["a", "ü", "€", "😀"])
def test_the_limit_counts_bytes_of_utf8(character: str) -> None:
    size = len(character.encode())
    most = MAX_SESSION_ID_BYTES // size
    assert len(check_session_id(character * most)) == most * size
    with pytest.raises(InvalidSessionId, match=f"{(most + 1) * size} bytes of UTF-8; at most 512"):
        check_session_id(character * (most + 1))


def test_an_empty_id_is_refused() -> None:
    with pytest.raises(InvalidSessionId, match="must not be empty"):
        check_session_id("")


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InvalidSessionId, match=r"'a\\udc80' has lone surrogates"):
        check_session_id("a\udc80")


@pytest.mark.parametrize(
    ("session_id", "kind"),
    [(None, "NoneType"), (7, "int"), (b"a", "bytes"), (["a"], "list"), (("a",), "tuple")],
)
def test_what_is_no_text_is_refused_by_the_name_of_its_type(session_id: Any, kind: str) -> None:
    with pytest.raises(InvalidSessionId, match=f"must be a str, not {kind}"):
        check_session_id(session_id)


def test_a_refused_megabyte_is_not_repeated_in_the_message() -> None:
    with pytest.raises(InvalidSessionId) as caught:
        check_session_id("\n" * 2**20)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


# Commit ids


def test_commit_ids_are_128_bits_and_never_the_same() -> None:
    ids = CommitIds()
    made = {ids.next() for _ in range(10_000)}
    assert len(made) == 10_000
    assert {len(item) for item in made} == {16}


def test_two_sources_draw_different_commit_ids() -> None:
    one, other = CommitIds(), CommitIds()
    assert {one.next() for _ in range(300)}.isdisjoint({other.next() for _ in range(300)})
