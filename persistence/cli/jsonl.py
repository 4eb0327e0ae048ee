"""Sessions as JSON Lines: one session a line, every value coming back as what it was.

JSON holds null, booleans, text, lists, maps with text keys, finite floats, and integers (which
other readers take for floats beyond 2**53). Everything else is a *tagged* value: a map with one
key that starts with ``$``.

=================================== ==========================================================
tag                                 value
=================================== ==========================================================
``{"$datetime": "…+02:00"}``        aware datetime, ISO 8601 with its offset
``{"$date": "2026-02-28"}``         date, ISO 8601
``{"$uuid": "…"}``                  UUID
``{"$decimal": "1.50"}``            Decimal, its exact text
``{"$int": "36893488147419103232"}``  integer beyond ±2**53
``{"$float": "nan"}``               ``nan``, ``inf``, ``-inf``; the bits of any other NaN in hex
``{"$bytes": "AAE="}``              bytes, Base64
``{"$bytearray": "AAE="}``          bytearray, Base64
``{"$tuple": […]}``                 tuple
``{"$set": […]}``                   set; its elements in no particular order
``{"$frozenset": […]}``             frozenset, the same
``{"$map": [[key, value], …]}``     map with keys that are not text
=================================== ==========================================================

A map of the user's that looks like a tag (one key, starting with ``$``) is written as ``$map``, so
reading is never ambiguous.

The line of a session is a map of ``id``, ``user_id``, ``metadata``, ``data``, ``ttl_seconds``,
``auto_renew``, ``max_requests`` and, mostly for information, ``version``, ``created_at``,
``last_accessed``, ``expires_at`` and ``lifetime_ends_at``. Of the times an import keeps the last
two: the second always, the first where no access moves it. What is null or empty is left out.
"""

from __future__ import annotations

import json
import math
import re
from base64 import b64decode, b64encode
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from struct import Struct
from typing import Any, Final
from uuid import UUID

_EXACT_INT: Final = 2**53
_FLOAT: Final = Struct(">d")
_FRACTION_OF_OFFSET: Final = re.compile(r"([+-])00:00:00\.([0-9]{6})$")
_MAX_INT_DIGITS: Final = 4000  # below the interpreter's own limit on text to int


class LineError(ValueError):
    """A line is not what `encode` writes; the message says what is wrong with it."""


# --- values -----------------------------------------------------------------------------------


def to_json(value: Any) -> Any:
    """Return `value` as what the json module writes, tagged where it needs to be.

    Raises:
        TypeError: for a type that sessions cannot hold.
    """
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -_EXACT_INT <= value <= _EXACT_INT else {"$int": _int_text(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$float": _float_text(value)}
    if kind is list:
        return [to_json(item) for item in value]
    if kind is dict:
        return _map_to_json(value)
    encode = _ENCODERS.get(kind)
    if encode is None:
        raise TypeError(f"a value of type {kind.__qualname__} has no JSON form")
    tag, plain = encode(value)
    return {tag: plain}


def _map_to_json(value: dict[Any, Any]) -> dict[str, Any]:
    is_plain = all(type(key) is str for key in value)
    if is_plain and not _looks_tagged(value):
        return {key: to_json(item) for key, item in value.items()}
    return {"$map": [[to_json(key), to_json(item)] for key, item in value.items()]}


def _looks_tagged(value: dict[str, Any]) -> bool:
    return len(value) == 1 and next(iter(value)).startswith("$")


def _int_text(value: int) -> str:
    # Decimal digits where the interpreter allows; it bounds them, because they take quadratic time.
    return str(value) if value.bit_length() < 3 * _MAX_INT_DIGITS else hex(value)


def _float_text(value: float) -> str:
    # A NaN has 52 bits to differ in, and sets that hold one compare as bytes.
    text = str(value)
    return text if _FLOAT.pack(float(text)) == _FLOAT.pack(value) else _FLOAT.pack(value).hex()


def _base64(value: bytes | bytearray) -> str:
    return b64encode(value).decode("ascii")


def _items(value: Any) -> list[Any]:
    return [to_json(item) for item in value]


_ENCODERS: Final[dict[type, Callable[[Any], tuple[str, Any]]]] = {
    datetime: lambda value: ("$datetime", value.isoformat()),
    date: lambda value: ("$date", value.isoformat()),
    UUID: lambda value: ("$uuid", str(value)),
    Decimal: lambda value: ("$decimal", str(value)),
    bytes: lambda value: ("$bytes", _base64(value)),
    bytearray: lambda value: ("$bytearray", _base64(value)),
    tuple: lambda value: ("$tuple", _items(value)),
    set: lambda value: ("$set", _items(value)),
    frozenset: lambda value: ("$frozenset", _items(value)),
}


def from_json(value: Any) -> Any:
    """Return the value that `to_json` made `value` of.

    Raises:
        LineError: an unknown tag, or a tag around something that it cannot hold.
    """
    kind = type(value)
    if kind is list:
        return [from_json(item) for item in value]
    if kind is not dict:
        return value
    if not _looks_tagged(value):
        return {key: from_json(item) for key, item in value.items()}
    ((tag, plain),) = value.items()
    decode = _DECODERS.get(tag)
    if decode is None:
        raise LineError(f"unknown tag {tag!a}")
    try:
        return decode(plain)
    except LineError:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        raise LineError(f"{tag} does not hold {plain!a:.60}") from error


def _text(plain: Any) -> str:
    if type(plain) is not str:
        raise TypeError("not text")
    return plain


def _list(plain: Any) -> list[Any]:
    if type(plain) is not list:
        raise TypeError("not a list")
    return [from_json(item) for item in plain]


def _float(plain: Any) -> float:
    if plain in ("nan", "inf", "-inf"):
        return float(plain)
    bits = bytes.fromhex(_text(plain))
    if len(bits) != _FLOAT.size:
        raise ValueError("not 8 bytes")
    value: float = _FLOAT.unpack(bits)[0]
    if math.isfinite(value):
        raise ValueError("a finite number needs no tag")
    return value


def _map(plain: Any) -> dict[Any, Any]:
    pairs = _list(plain)
    if not all(type(pair) is list and len(pair) == 2 for pair in pairs):
        raise ValueError("not pairs")
    decoded = dict(pairs)
    if len(decoded) != len(pairs):
        raise ValueError("a key is there twice")
    return decoded


def _datetime(plain: Any) -> datetime:
    text = _text(plain)
    value = datetime.fromisoformat(text)
    if value.utcoffset() is None:
        raise ValueError("no offset")
    # Python reads an offset of less than a second as none.
    fraction = _FRACTION_OF_OFFSET.search(text)
    return value if fraction is None else value.replace(tzinfo=_offset(*fraction.groups()))


def _offset(sign: str, microseconds: str) -> timezone:
    return timezone(timedelta(microseconds=int(sign + microseconds)))


def _bytes(plain: Any) -> bytes:
    return b64decode(_text(plain), validate=True)


_DECODERS: Final[dict[str, Callable[[Any], Any]]] = {
    "$datetime": _datetime,
    "$date": lambda plain: date.fromisoformat(_text(plain)),
    "$uuid": lambda plain: UUID(_text(plain)),
    "$decimal": lambda plain: Decimal(_text(plain)),
    "$int": lambda plain: int(_text(plain), 0),
    "$float": _float,
    "$bytes": _bytes,
    "$bytearray": lambda plain: bytearray(_bytes(plain)),
    "$tuple": lambda plain: tuple(_list(plain)),
    "$set": lambda plain: set(_list(plain)),
    "$frozenset": lambda plain: frozenset(_list(plain)),
    "$map": _map,
}


# --- lines ------------------------------------------------------------------------------------


def encode(fields: dict[str, Any]) -> bytes:
    """Return one line, line end included, for the fields of a session."""
    kept = {
        name: to_json(value) for name, value in fields.items() if value is not None and value != {}
    }
    text = json.dumps(kept, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8") + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """Return the fields of the session on `line`.

    Raises:
        LineError: it is no JSON, or not the line of a session.
    """
    try:
        parsed = json.loads(
            line.rstrip().decode("utf-8"),  # what ends early, ends on this line
            parse_constant=_no_constant,
            parse_float=_finite,
            object_pairs_hook=_unique,
        )
        fields = _map_of(parsed)
    except RecursionError as error:
        raise LineError("nested too deeply") from error
    except UnicodeDecodeError as error:
        raise LineError(f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise LineError(f"not JSON: {error.msg} at column {error.colno}") from error
    except LineError:
        raise
    except ValueError as error:  # an integer of more digits than the interpreter converts
        raise LineError(f"not JSON: {error}") from error
    _check(fields)
    return fields


def _map_of(parsed: Any) -> dict[str, Any]:
    if type(parsed) is not dict:
        raise LineError("not a map")
    return {name: from_json(value) for name, value in parsed.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a map, unless a key is there twice: one of its values would be lost."""
    decoded = dict(pairs)
    if len(decoded) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for at, key in enumerate(keys) if key in keys[:at])
        raise LineError(f"the key {twice!a:.60} is there twice")
    return decoded


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise LineError(f"{text} is too large for a float")
    return value


def _no_constant(name: str) -> None:
    raise LineError(f"not JSON: {name}")


_FIELDS: Final[dict[str, tuple[tuple[type, ...], str]]] = {
    "id": ((str,), "text"),
    "user_id": ((str,), "text"),
    "metadata": ((dict,), "a map"),
    "data": ((dict,), "a map"),
    "ttl_seconds": ((int, float), "a number"),
    "auto_renew": ((bool,), "true or false"),
    "max_requests": ((int,), "a number"),
    "version": ((int,), "a number"),
    "created_at": ((datetime,), "a datetime"),
    "last_accessed": ((datetime,), "a datetime"),
    "expires_at": ((datetime,), "a datetime"),
    "lifetime_ends_at": ((datetime,), "a datetime"),
}
_AMOUNTS: Final = {"ttl_seconds", "max_requests", "version"}


def _check(fields: dict[str, Any]) -> None:
    if "id" not in fields:
        raise LineError("no id")
    for name, value in fields.items():
        known = _FIELDS.get(name)
        if known is None:
            raise LineError(f"unknown field {name!a}")
        types, what = known
        if type(value) not in types:
            raise LineError(f"{name} is {value!a:.60}, not {what}")
        if name in _AMOUNTS and not 0 <= value < math.inf:
            raise LineError(f"{name} is {value!a:.60}, not a finite number of at least 0")
