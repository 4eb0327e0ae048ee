"""Differences that are told in moments, however large what differs is.

pytest explains a failed ``==`` of two lists or texts through `difflib.ndiff`, whose time grows with
the cube of the lines: two lists of 300 words of five kinds take minutes, so that a test of which
that is the failure ends by its timeout, without a word of what was wrong.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

MOST_LINES = 150  # from 200 on, difflib takes frequent lines for noise, and compares all pairs
MOST_CHARS = 20_000
SHOWN_LINES = 20

_ndiff = difflib.ndiff

Junk = Callable[[str], bool] | None


def install() -> None:
    """Let everybody in this process, so also pytest, use `bounded_ndiff` for `difflib.ndiff`."""
    difflib.ndiff = bounded_ndiff


def bounded_ndiff(
    a: Sequence[str],
    b: Sequence[str],
    linejunk: Junk = None,
    charjunk: Junk = difflib.IS_CHARACTER_JUNK,
) -> Iterator[str]:
    """Return `difflib.ndiff`; of larger texts, the first lines that are not the same in both."""
    if max(len(a), len(b)) <= MOST_LINES and sum(map(len, [*a, *b])) <= MOST_CHARS:
        return _ndiff(a, b, linejunk, charjunk)
    return _first_differences(a, b)


def _first_differences(a: Sequence[str], b: Sequence[str]) -> Iterator[str]:
    pairs = zip_longest(a, b)
    differing = [(number, *pair) for number, pair in enumerate(pairs, 1) if pair[0] != pair[1]]
    for number, left, right in differing[:SHOWN_LINES]:
        yield f"? line {number}"
        if left is not None:
            yield f"- {_around_difference(left, right or '')}"
        if right is not None:
            yield f"+ {_around_difference(right, left or '')}"
    yield f"? {len(differing)} lines differ, of {len(a)} and {len(b)}"


def _around_difference(line: str, other: str) -> str:
    at = next(
        (at for at, pair in enumerate(zip(line, other, strict=False)) if pair[0] != pair[1]), 0
    )
    start = max(0, at - 100)
    return f"{'…' if start else ''}{line[start : at + 300]}{'…' if len(line) > at + 300 else ''}"
