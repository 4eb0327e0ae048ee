"""What can go wrong with PostgreSQL, and what to tell about it. Pure.

An answer that is an error means: not executed, the transaction was rolled back. All but one kind
of them: what a server says while it ends the connection (``FATAL``), which may come after the
commit. Then nobody knows.
"""

from __future__ import annotations

from typing import Final

from asyncpg import PostgresError

from persistence.errors import (
    ConfigError,
    PersistenceError,
    RemoteUnavailable,
    WriteOutcomeUnknown,
)
from persistence.remote.exchanges import Fault

_ENDING: Final = frozenset({"FATAL", "PANIC"})
_CONNECTION: Final = "08"
_PASSING: Final = frozenset({"40001", "40P01", "55P03"})
_UNINSTALLED: Final = frozenset({"42P01", "42883"})
READ_ONLY: Final = "25006"

_ADVICE: Final = {
    "25006": "this PostgreSQL takes no writes: it is a standby, or set to read-only; the URL must "
    "lead to the primary (several hosts and target_session_attrs=primary find it)",
    "28000": "PostgreSQL does not let this user in; see its pg_hba.conf",
    "28P01": "PostgreSQL does not accept the user or password of the URL",
    "3D000": "there is no such database; create it",
    "3F000": "the user's search_path names no schema that exists",
    "42501": "the user of the URL may not do that; docs/providers.md lists the rights it needs",
    "42P01": "the tables of the shared tier are gone",
    "42883": "the function of the shared tier is gone",
    "53100": "the disk of PostgreSQL is full",
    "53200": "PostgreSQL is out of memory",
    "53300": "PostgreSQL has as many clients as its max_connections allows",
    "57014": "PostgreSQL gave up: it took longer than redis.timeout_seconds",
    "57P03": "PostgreSQL is starting up or shutting down",
}
_CONFIGURATION: Final = frozenset({"28000", "28P01", "3D000", "3F000", "42501"})


class Refused(Fault):
    """The server let nobody in, and said why: not executed.

    Attributes:
        error: the server's answer.
    """

    def __init__(self, error: PostgresError, where: str) -> None:
        self.error = error
        super().__init__(f"PostgreSQL at {where}: {first_line(error)}")


def code_of(error: Exception) -> str:
    """Return the SQLSTATE of an answer; empty: it is none."""
    if isinstance(error, Refused):
        return code_of(error.error)
    return str(getattr(error, "sqlstate", None) or "")


def ends_connection(error: PostgresError) -> bool:
    """Whether the connection ended with this answer, or without one."""
    severity = getattr(error, "severity_en", None) or getattr(error, "severity", None)
    return severity in _ENDING or is_broken(error)


def is_broken(error: PostgresError) -> bool:
    """Whether it is no answer at all: asyncpg says so when a connection breaks."""
    return code_of(error).startswith(_CONNECTION)


def is_passing(error: Exception) -> bool:
    """Whether the same statement may well succeed when it is sent again."""
    return code_of(error) in _PASSING


def is_uninstalled(error: Exception) -> bool:
    """Whether our tables or functions are not there."""
    return code_of(error) in _UNINSTALLED


def explain(error: Exception, where: str, doing: str) -> PersistenceError:
    """Return what to raise for `error`: what happened, to what, and what to do.

    Args:
        error: a `Fault`, or the error that the server answered.
        where: the server, without a password.
        doing: what was being done, for example "load session 'a'".
    """
    code = code_of(error)
    if not code:
        return RemoteUnavailable(f"{doing}: {error}")
    text = first_line(error.error if isinstance(error, Refused) else error)
    advice = _ADVICE.get(code, f"SQLSTATE {code} is not known to the library")
    return RemoteUnavailable(f"{doing}: PostgreSQL at {where} answers {text!r}: {advice}")


def unknown(error: Exception, doing: str) -> WriteOutcomeUnknown:
    """Return the error of a write whose reply was lost for good."""
    return WriteOutcomeUnknown(
        f"{doing}: sent to PostgreSQL, and no reply came ({error}); it may or may not be stored "
        "there: the same commit is safe to send again"
    )


def as_config_error(error: Exception, where: str) -> ConfigError | None:
    """Return the fault of the configuration behind an error while opening; None: there is none."""
    code = code_of(error)
    if code not in _CONFIGURATION:
        return None
    text = first_line(error.error if isinstance(error, Refused) else error)
    advice = _ADVICE.get(code, "it cannot be used")
    return ConfigError(f"redis.url: PostgreSQL at {where} answers {text!r}: {advice}")


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]
