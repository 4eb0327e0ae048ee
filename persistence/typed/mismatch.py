"""A value that is not what its type says, and what is said about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from persistence.errors import SchemaMismatch, printable

MISSING: Final = object()
"""Stands for a value that is not there."""


class Mismatch(Exception):
    """A value is not what its type says.

    Attributes:
        path: where, from the top of what was read.
        value: what is there; `MISSING`: nothing, and there is no default.
        wanted: the type that it is to have, or what a library says about it.
        said: what a library says about it.
        fault: what the class or its ``migrate`` hook did instead of what it is there for.
        owner: the innermost class around it; None: there is none.
        hook: the ``migrate`` hook that returned or raised it; None: it is stored so.
    """

    def __init__(
        self, value: Any, wanted: Any, path: tuple[Any, ...] = (), fault: str | None = None
    ) -> None:
        self.value = value
        self.wanted = wanted
        self.path = path
        self.said = ""
        self.fault = fault
        self.owner: str | None = None
        self.hook: str | None = None

    def after(self, hook: str, fault: str) -> Mismatch:
        """Return it as what is left after a ``migrate`` hook that made nothing of the value."""
        self.hook, self.fault = hook, fault
        return self

    @property
    def stored_type(self) -> str:
        """What is there instead."""
        return "nothing" if self.value is MISSING else type_name(type(self.value))

    @property
    def wanted_type(self) -> str:
        """What it is to be."""
        return self.wanted if isinstance(self.wanted, str) else type_name(self.wanted)


def unreadable(session_id: str, at: tuple[Any, ...], found: Mismatch) -> SchemaMismatch:
    """Return the error for what is stored, at `at` in the session, and cannot be read."""
    wants = f"and {_wants(found)}"
    if found.fault is None:
        source = "stored is" if found.hook is None else f"{found.hook} made of it"
        what = f"{source} {found.stored_type}, {wants}"
    elif found.hook is None:
        what = found.fault
    else:
        what = f"stored is {found.stored_type}, {wants}, and {found.fault}"
    if found.hook is not None:
        remedy = f"mend {found.hook}"
    elif found.owner is not None:
        remedy = f"give {found.owner} a migrate(data) class method, or a default"
    else:
        remedy = "give the field another type, or another value by update_session_data()"
    advice = f"the stored data are unchanged: {remedy}, or read the session with get_session()"
    return _error(session_id, at, found, f"{what}; {advice}")


def unwritable(session_id: str, at: tuple[Any, ...], found: Mismatch) -> SchemaMismatch:
    """Return the error for what was to be written, and could not be read back."""
    given = f"{found.stored_type} was to be written, and {_wants(found)}"
    advice = "nothing was written: give it what is wanted"
    return _error(session_id, at, found, f"{found.fault or given}; {advice}")


def _wants(found: Mismatch) -> str:
    wants = f"{found.owner or 'the schema'} wants {found.wanted_type}"
    # Where the types do not tell what is wrong, the library does.
    is_told = found.stored_type != found.wanted_type and not isinstance(found.value, Mapping)
    return wants if is_told or not found.said else f"{wants} ({found.said})"


def _error(session_id: str, at: tuple[Any, ...], found: Mismatch, text: str) -> SchemaMismatch:
    place = "".join(map(_step_text, (*at, *found.path))).lstrip(".")
    return SchemaMismatch(session_id, place, found.stored_type, found.wanted_type, text)


def _step_text(step: Any) -> str:
    return f".{step}" if isinstance(step, str) else f"[{printable(step)}]"


def raised(what: str, error: Exception) -> str:
    """Return what is said about an exception of the application's own code."""
    return f"{what} raised {type(error).__name__}: {error}"


def type_name(kind: Any) -> str:
    """Return the name of a type as one would write it."""
    if isinstance(kind, type):
        return kind.__qualname__
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", str(kind))
