"""From a target to unconnected redis-py connections, and what a server says of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ssl import PROTOCOL_TLS_CLIENT, SSLContext
from typing import Any, Final, NamedTuple

from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from persistence.errors import ConfigError
from persistence.remote.faults import Refused
from persistence.remote.link import Link
from persistence.remote.urls import Target

_READ_BYTES: Final = 64 * 1024


def maker(
    target: Target, address: tuple[str, int] | None, timeout_seconds: float
) -> Callable[[], AbstractConnection]:
    """Return what makes connections to the server at `address` (None: the unix socket)."""
    options = _common(timeout_seconds)
    options.update(target.credentials, db=target.database)
    if address is None:
        return lambda: UnixDomainSocketConnection(path=target.path, **options)
    return _over_network(target, address, options)


def sentinel_maker(
    target: Target, address: tuple[str, int], timeout_seconds: float
) -> Callable[[], AbstractConnection]:
    """Return what makes connections to a sentinel."""
    options = _common(timeout_seconds)
    options.update(target.sentinel_credentials)
    return _over_network(target, address, options)


def _common(timeout_seconds: float) -> dict[str, Any]:
    return {
        "protocol": 3,
        "retry": Retry(NoBackoff(), 0),
        # None: every read and write of a `Link` has a timeout of its own, and redis-py's for
        # writes makes a task for each, which on Python 3.11 can swallow a cancellation.
        "socket_timeout": None,
        "socket_connect_timeout": timeout_seconds,
        "socket_read_size": _READ_BYTES,
    }


def _over_network(
    target: Target, address: tuple[str, int], options: dict[str, Any]
) -> Callable[[], AbstractConnection]:
    options.update(host=address[0], port=address[1], socket_keepalive=True)
    if target.tls:
        options.update(target.tls_options)
        return lambda: SSLConnection(**options)
    return lambda: Connection(**options)


def check_tls_files(target: Target) -> None:
    """See that the files for TLS that a URL names can be used.

    A connection with one that cannot looks like a server that is away, and is tried for ever.

    Raises:
        ConfigError: one is missing, not readable, or holds something else; it is named.
    """
    options = target.tls_options
    authorities, certificate = options.get("ssl_ca_certs"), options.get("ssl_certfile")
    if authorities is not None:
        with _named(f"ssl_ca_certs {authorities!a}"):
            SSLContext(PROTOCOL_TLS_CLIENT).load_verify_locations(authorities)
    if certificate is not None:
        key = options.get("ssl_keyfile")
        with _named(
            f"ssl_certfile {certificate!a}" + (f" with ssl_keyfile {key!a}" if key else "")
        ):
            # Without a password, even an empty one, an encrypted key would ask at the terminal.
            SSLContext(PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key, password="")


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # an SSLError is one; a NUL in a path is the other
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"redis.url: {what} cannot be used: {reason}") from None


class Server(NamedTuple):
    """What a server says of itself.

    Attributes:
        version: as many numbers as it has, for example (7, 0, 15).
        mode: ``standalone``, ``sentinel`` or ``cluster``.
        is_replica: whether it follows another one.
    """

    version: tuple[int, ...]
    mode: str
    is_replica: bool


async def ask_server(link: Link) -> Server:
    """Ask a server what it is: with HELLO, which every user may call.

    Raises:
        Fault: it cannot be reached or does not answer.
    """
    reply = await link.ask(b"HELLO")
    if isinstance(reply, Exception):
        raise Refused(reply, link.where)
    told = {_word(name): _word(value) for name, value in reply.items()}
    numbers = tuple(int(part) for part in told["version"].split(".") if part.isdigit())
    return Server(numbers, told["mode"], told.get("role") == "replica")


def _word(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
