"""Checks of what callers pass: one way to say which argument is wrong, and what is allowed.

Only where nothing is hot: a read and an update of a field check no more than the session id.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final

from persistence.errors import InvalidArgument, printable

MAX_TTL_SECONDS: Final = 3_155_760_000  # 100 years: now plus any TTL is still a datetime
MAX_COUNT: Final = 2**63 - 1


def refused(name: str, value: object, allowed: str) -> InvalidArgument:
    """Return the error for an argument that must be something else."""
    return InvalidArgument(f"{name} = {printable(value)}: must be {allowed}")


def check_text(name: str, value: object) -> str:
    """Return `value` if it is a str.

    Raises:
        InvalidArgument: it is something else (subclasses would come back as a plain str).
    """
    if type(value) is not str:
        raise refused(name, value, "a str")
    return value


def check_utf8(name: str, value: object) -> str:
    """Return `value` if it is a str that can be stored as UTF-8.

    Raises:
        InvalidArgument: it is something else, or has half a surrogate pair in it.
    """
    text = check_text(name, value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refused(name, value, "a str without lone surrogates") from None
    return text


def check_text_or_none(name: str, value: object) -> str | None:
    """Return `value` if it is a str or None.

    Raises:
        InvalidArgument: it is something else.
    """
    if value is not None and type(value) is not str:
        raise refused(name, value, "a str or None")
    return value


def check_seconds(name: str, value: object, most: float, allowed: str) -> float:
    """Return `value` if it is a number of seconds from 0 to `most`.

    Raises:
        InvalidArgument: it is something else; `allowed` says what may be.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise refused(name, value, allowed)
    return float(value)


def check_duration(name: str, value: object) -> float:
    """Return `value` if it is a number of seconds.

    Raises:
        InvalidArgument: it is something else, below 0 or infinite.
    """
    allowed = "a finite number of seconds, at least 0"
    return check_seconds(name, value, sys.float_info.max, allowed)


def check_ttl(value: object) -> float:
    """Return a TTL, seconds.

    Raises:
        InvalidArgument: it is no duration.
    """
    allowed = f"a number of seconds from 0 (never expires) to {MAX_TTL_SECONDS} (100 years)"
    return check_seconds("ttl_seconds", value, MAX_TTL_SECONDS, allowed)


def check_count_or_none(name: str, value: object) -> int | None:
    """Return `value` if it is a whole number of at least 0, or None.

    Raises:
        InvalidArgument: it is something else.
    """
    if value is not None and (type(value) is not int or not 0 <= value <= MAX_COUNT):
        raise refused(name, value, f"a whole number from 0 to {MAX_COUNT}, or None")
    return value


def check_switch_or_none(name: str, value: object) -> bool | None:
    """Return `value` if it is a bool or None.

    Raises:
        InvalidArgument: it is something else.
    """
    if value is not None and type(value) is not bool:
        raise refused(name, value, "True, False or None")
    return value


def check_mapping(name: str, value: object) -> Mapping[Any, Any]:
    """Return `value` if it is a mapping. Its contents are not shown: they are a session's.

    Raises:
        InvalidArgument: it is something else.
    """
    if not isinstance(value, Mapping):
        raise InvalidArgument(f"{name} is a {type(value).__name__}: must be a mapping")
    return value
