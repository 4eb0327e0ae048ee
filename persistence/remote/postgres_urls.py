"""URLs of a shared tier in PostgreSQL. Pure.

::

    postgresql://[user[:password]@]host[:port][,host[:port]…]/database
    postgresql://[user[:password]@][:port]/database?host=/run/postgresql   over a unix socket

The port of a unix socket is part of its name (``.s.PGSQL.5432``). It may stand behind ``?``, too.

``postgres://`` means the same. Options behind ``?``: ``host`` and ``port`` (of the socket),
``sslmode`` (``disable``, ``prefer``, ``require``, ``verify-ca``, ``verify-full``), ``sslrootcert``,
``sslcert``, ``sslkey`` (paths), and ``target_session_attrs`` (``primary`` or ``read-write``: of
several hosts the one that takes writes). Anything else is refused: a misspelt option must not pass
in silence. Special characters of a user or password are escaped (an @ is ``%40``).

A user or password that is not in the URL comes from where PostgreSQL's own clients look for it:
``PGUSER``, ``PGPASSWORD``, ``~/.pgpass``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qsl, quote, unquote

from persistence.errors import ConfigError

POSTGRES_PORT: Final = 5432
_SCHEMES: Final = ("postgresql", "postgres")
_TLS: Final = frozenset({"sslmode", "sslrootcert", "sslcert", "sslkey"})
_OPTIONS: Final = _TLS | {"host", "port", "target_session_attrs"}
_ALLOWED: Final = {
    "sslmode": ("disable", "prefer", "require", "verify-ca", "verify-full"),
    "target_session_attrs": ("primary", "read-write"),
}


@dataclass(frozen=True)
class PostgresTarget:
    """Where the database is, and how to get in. Its representation shows no password.

    Attributes:
        addresses: hosts, or directories of sockets, each with its port.
        database: its name.
        user: empty: see the module.
        password: empty: see the module.
        options: of TLS, and ``target_session_attrs``.
    """

    addresses: tuple[tuple[str, int], ...]
    database: str
    user: str = ""
    password: str = field(default="", repr=False)
    options: dict[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """Where it is, for messages: without credentials."""
        places = ",".join(f"{host}:{port}" for host, port in self.addresses)
        return f"{places}/{self.database}"

    @property
    def arguments(self) -> dict[str, Any]:
        """What asyncpg's ``connect`` takes."""
        found: dict[str, Any] = {
            "host": [host for host, _ in self.addresses],
            "port": [port for _, port in self.addresses],
            "database": self.database,
        }
        if self.user:
            found["user"] = self.user
        if self.password:
            found["password"] = self.password
        if self.options:  # asyncpg takes the paths of certificates from a URL only
            texts = (f"{name}={quote(value, safe='')}" for name, value in self.options.items())
            found["dsn"] = f"postgresql://?{'&'.join(texts)}"
        return found


def is_postgres(url: str) -> bool:
    """Whether a URL is one of PostgreSQL."""
    return url.partition("://")[0] in _SCHEMES


def parse_postgres_url(url: str) -> PostgresTarget:
    """Return what `url` says.

    Raises:
        ConfigError: something in it is wrong. The message has no password in it.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in _SCHEMES:
        raise ConfigError("redis.url: must start with postgresql:// for PostgreSQL")
    # All in front of the last @ is user and password: those may hold a / or ? that nobody escaped.
    userinfo, _, place = rest.rpartition("@")
    place, _, query = place.partition("?")
    options = _options(query)
    hosts, _, path = place.partition("/")
    user, _, password = userinfo.partition(":")
    return PostgresTarget(
        _addresses(hosts, options.pop("host", ""), options.pop("port", "")),
        _database(path),
        unquote(user),
        unquote(password),
        options,
    )


def _options(query: str) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(options.keys() - _OPTIONS)
    if unknown:
        raise ConfigError(
            f"redis.url: option {unknown[0]!a} is unknown for PostgreSQL; there are "
            f"{', '.join(sorted(_OPTIONS))}"
        )
    for name, allowed in _ALLOWED.items():
        if options.get(name, allowed[0]) not in allowed:
            raise ConfigError(
                f"redis.url: {name} = {options[name]!a}: must be one of {', '.join(allowed)}"
            )
    return options


def _database(path: str) -> str:
    database = unquote(path)
    if not database or "/" in database or "\0" in database:
        raise ConfigError(
            "redis.url: the name of the database is missing: postgresql://host:5432/shop"
        )
    return database


def _addresses(hosts: str, socket: str, port: str) -> tuple[tuple[str, int], ...]:
    if socket and hosts.startswith(":") and not port:
        hosts, port = "", hosts[1:]
    if port and not socket:
        raise ConfigError("redis.url: option 'port' is for a unix socket; write host:port")
    if bool(hosts) == bool(socket):
        raise ConfigError(
            "redis.url: name a host, or the directory of a socket: postgresql://host/shop or "
            "postgresql:///shop?host=/run/postgresql"
        )
    if socket:
        if not socket.startswith("/"):
            raise ConfigError(f"redis.url: host = {socket!a}: must be the directory of a socket")
        if port and not _is_port(port):
            raise ConfigError(f"redis.url: port = {port!a}: must be a number from 1 to 65535")
        return ((socket, int(port or POSTGRES_PORT)),)
    return tuple(_address(place) for place in hosts.split(","))


def _address(place: str) -> tuple[str, int]:
    host, colon, port = place.rpartition(":")
    if not colon or place.endswith("]"):
        host, port = place, str(POSTGRES_PORT)
    host = unquote(host.removeprefix("[").removesuffix("]"))
    if not host or not _is_port(port):
        raise ConfigError(f"redis.url: {place!a} is no host, or no host and port")
    return host, int(port)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65_536
