"""What can go wrong with a server, and what to tell about it. Pure.

Three things are told apart, because they mean different things for a write that was under way:
`Unsent` (certainly not executed), `Lost` (nobody knows) and an answer that is an error (not
executed, and the server says why).
"""

from __future__ import annotations

import re
from typing import Final

from redis import exceptions as redis_errors

from persistence.errors import (
    ConfigError,
    PersistenceError,
    RemoteDamaged,
    RemoteUnavailable,
    WriteOutcomeUnknown,
)
from persistence.remote.exchanges import Fault, Lost, Unsent


class Refused(Fault):
    """The server answered with an error that also ended the connection: not executed.

    Attributes:
        error: the server's answer.
    """

    def __init__(self, error: Exception, where: str) -> None:
        self.error = error
        super().__init__(f"{where}: {error}")


# redis-py takes the code off the message of those that it has a class for.
_CODES: Final[tuple[tuple[type[Exception], str], ...]] = (
    (redis_errors.BusyLoadingError, "LOADING"),
    (redis_errors.NoScriptError, "NOSCRIPT"),
    (redis_errors.ReadOnlyError, "READONLY"),
    (redis_errors.OutOfMemoryError, "OOM"),
    (redis_errors.NoPermissionError, "NOPERM"),
    (redis_errors.MovedError, "MOVED"),
    (redis_errors.AskError, "ASK"),
    (redis_errors.TryAgainError, "TRYAGAIN"),
    (redis_errors.ClusterDownError, "CLUSTERDOWN"),
    (redis_errors.MasterDownError, "MASTERDOWN"),
    (redis_errors.AuthenticationWrongNumberOfArgsError, "WRONGPASS"),
    (redis_errors.AuthenticationError, "WRONGPASS"),
    (redis_errors.MaxConnectionsError, "MAXCLIENTS"),
)
_KNOWN_CODE: Final = re.compile(
    r"\b(LOADING|NOSCRIPT|READONLY|OOM|NOPERM|MOVED|ASK|TRYAGAIN|CLUSTERDOWN|MASTERDOWN|NOAUTH"
    r"|WRONGPASS|WRONGTYPE|BUSY|MISCONF|NOREPLICAS|NOPROTO|CROSSSLOT)\b"
)

_IN_SCRIPT: Final = "@user_script"  # where it stopped, in the words of every version
_BEFORE_ANY_WRITE: Final = frozenset({"READONLY", "OOM", "MISCONF", "NOREPLICAS"})

_ADVICE: Final = {
    "LOADING": "Redis is loading its data; it will answer when that is done",
    "READONLY": "this Redis is a replica and takes no writes; the URL must lead to the primary",
    "OOM": "Redis has reached its maxmemory; raise it, or remove something",
    "BUSY": "Redis is busy with a script of somebody; wait, or end it with SCRIPT KILL",
    "MISCONF": "Redis cannot save its data and therefore takes no writes; see its log",
    "NOREPLICAS": "Redis has fewer replicas than min-replicas-to-write; see its replication",
    "NOPERM": "the user of the URL may not do that; docs/redis.md lists the ACL rules it needs",
    "NOAUTH": "Redis asks for a password; put it into the URL",
    "WRONGPASS": "Redis does not accept the user or password of the URL",
    "CLUSTERDOWN": "the Redis Cluster does not serve all its slots now",
    "MASTERDOWN": "this replica has lost its primary",
    "MOVED": "the Redis Cluster keeps moving this slot; try again",
    "TRYAGAIN": "the Redis Cluster is moving this slot; try again",
    "MAXCLIENTS": "Redis has as many clients as its maxclients allows",
    "WRONGTYPE": "somebody else uses this key for something else",
}
CREDENTIALS: Final = frozenset({"NOAUTH", "WRONGPASS", "NOPERM"})


def code_of(error: Exception) -> str:
    """Return the code with which Redis started its answer; empty: none that is known."""
    if isinstance(error, Refused):
        return code_of(error.error)
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return code_in(str(error))


def code_in(text: str) -> str:
    """Return the code in the text of an error, which scripts wrap into words of their own."""
    found = _KNOWN_CODE.search(text)
    return found[1] if found else ""


def explain(error: Exception, where: str, doing: str) -> PersistenceError:
    """Return what to raise for `error`: what happened, to what, and what to do.

    Args:
        error: a `Fault`, or the error that a server answered.
        where: the server, without a password.
        doing: what was being done, for example "load session 'a'".
    """
    if isinstance(error, Unsent | Lost):
        return RemoteUnavailable(f"{doing}: {error}")
    return explain_text(code_of(error), _first_line(error), where, doing)


def explain_text(code: str, text: str, where: str, doing: str) -> PersistenceError:
    """Return what to raise for an answer with this code and text."""
    advice = _ADVICE.get(code, "this answer is not known to the library")
    return RemoteUnavailable(f"{doing}: Redis at {where} answers {text!r}: {advice}")


def explain_key(code: str, text: str, key: str, session_id: str) -> PersistenceError | None:
    """Return what to raise when an answer is about one key only; None: it is about the server."""
    if code != "WRONGTYPE":
        return None
    return RemoteDamaged(key, f"{_ADVICE[code]} (it is no hash: {text})", session_id)


def stopped_a_script(error: Exception) -> bool:
    """Whether a script stopped with it that may have written something by then.

    As with a command that it calls behind a write, and that the user may not use any more.
    """
    return _IN_SCRIPT in str(error) and code_of(error) not in _BEFORE_ANY_WRITE


def unknown(error: Exception, doing: str) -> WriteOutcomeUnknown:
    """Return the error of a write of which nobody can tell whether it was done."""
    what = "and the script stopped" if stopped_a_script(error) else "and no reply came"
    return WriteOutcomeUnknown(
        f"{doing}: sent to Redis, {what} ({error}); it may or may not be stored there: "
        "the same commit is safe to send again"
    )


def as_config_error(error: Exception, where: str) -> ConfigError | None:
    """Return the fault of the configuration behind an error while opening; None: there is none."""
    code = code_of(error)
    text = _first_line(error.error if isinstance(error, Refused) else error)
    if code in CREDENTIALS:
        return ConfigError(f"redis.url: Redis at {where} answers {text!r}: {_ADVICE[code]}")
    if "DB index" in text or "Invalid Database" in text or "invalid DB" in text:
        return ConfigError(
            f"redis.url: Redis at {where} has no such database ({text}); a Cluster has only 0"
        )
    if "cluster support disabled" in text:
        return ConfigError(f"redis.url: the server at {where} is no Redis Cluster; write redis://")
    if "unknown command 'sentinel'" in text.lower():
        return ConfigError(
            f"redis.url: the server at {where} is no sentinel ({text}); write the addresses of the "
            "sentinels, or redis:// for a server without them"
        )
    if code == "NOPROTO" or "unknown command" in text.lower():
        return ConfigError(
            f"redis.url: the server at {where} does not speak RESP3 ({text}); Redis 6.2 or newer, "
            "or Valkey, is needed"
        )
    return None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
