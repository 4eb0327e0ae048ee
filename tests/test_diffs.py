"""A failing comparison says what differs, in moments."""

from __future__ import annotations

import difflib
import random

import pytest

from tests.diffs import MOST_LINES

WORDS = ("done", "failed", "unknown", "cancelled", "waiting")


@pytest.fixture(autouse=True)
def _told_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")  # where pytest draws all differences


@pytest.mark.timeout(20)
def test_two_long_lists_of_few_words_are_told_apart_at_once() -> None:
    one, other = (random.Random(seed).choices(WORDS, k=1000) for seed in (1, 2))
    with pytest.raises(AssertionError, match=r"\d+ lines differ, of 1002 and 1002"):
        assert one == other


@pytest.mark.timeout(20)
def test_two_long_texts_and_bytes_are_told_apart_at_once() -> None:
    text = "one line, and a long one " * 4_000
    with pytest.raises(AssertionError, match="here"):
        assert text == text[:50_000] + "here" + text[50_000:]
    with pytest.raises(AssertionError, match="here"):
        assert text.encode() == text[:50_000].encode() + b"here" + text[50_000:].encode()


def test_few_lines_are_told_apart_as_ever() -> None:
    few = [f"line {number}" for number in range(MOST_LINES)]
    assert list(difflib.ndiff(few, [*few[:3], *few[4:]]))[2:5] == [
        "  line 2",
        "- line 3",
        "  line 4",
    ]


def test_what_is_longer_in_one_of_two_is_shown() -> None:
    many = [f"line {number}" for number in range(500)]
    assert list(difflib.ndiff(many, [*many, "more"])) == [
        "? line 501",
        "+ more",
        "? 1 lines differ, of 500 and 501",
    ]
