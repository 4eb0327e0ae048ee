"""URLs of the shared tier. Pure.

::

    redis://[user[:password]@]host[:port][/database]
    rediss://…                                            the same over TLS
    unix://[user[:password]@]/path/of/the/socket[?db=0]
    redis+sentinel://[user[:password]@]host[:port],…/service[/database]
    redis+cluster://[user[:password]@]host[:port],…
    rediss+sentinel://…, rediss+cluster://…               the same over TLS

Options behind ``?``: ``db``, ``username``, ``password``; with TLS ``ssl_ca_certs``,
``ssl_certfile``, ``ssl_keyfile`` (paths), ``ssl_cert_reqs`` (``required`` or ``none``) and
``ssl_check_hostname`` (``true`` or ``false``); with Sentinel ``sentinel_username`` and
``sentinel_password``. Anything else is refused: a misspelt option must not pass in silence. An @ in
an option is written ``%40``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal
from urllib.parse import parse_qsl, unquote

from persistence.errors import ConfigError, printable

Kind = Literal["standalone", "sentinel", "cluster"]

REDIS_PORT: Final = 6379
SENTINEL_PORT: Final = 26_379
_LAST_PORT: Final = 65_535
_LAST_DATABASE: Final = 2**31 - 1
_KINDS: Final[dict[str, tuple[Kind, bool]]] = {
    "redis": ("standalone", False),
    "rediss": ("standalone", True),
    "unix": ("standalone", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_COMMON: Final = frozenset({"db", "username", "password"})
_TLS: Final = frozenset(
    {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"}
)
_SENTINEL: Final = frozenset({"sentinel_username", "sentinel_password"})


@dataclass(frozen=True)
class Target:
    """Where the tier is, and how to get in. Its representation shows no password.

    Attributes:
        kind: of deployment.
        addresses: host and port of the server, the sentinels or the first nodes.
        path: of the unix socket; empty: TCP.
        service: the name under which the sentinels know the primary.
        database: its number.
        tls: whether connections are encrypted.
        credentials: ``username`` and ``password``, as far as they are given.
        sentinel_credentials: the same for the sentinels.
        tls_options: as redis-py takes them.
    """

    kind: Kind
    addresses: tuple[tuple[str, int], ...]
    path: str = ""
    service: str = ""
    database: int = 0
    tls: bool = False
    credentials: dict[str, str] = field(default_factory=dict, repr=False)
    sentinel_credentials: dict[str, str] = field(default_factory=dict, repr=False)
    tls_options: dict[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """Where it is, for messages: without credentials."""
        if self.path:
            return f"unix:{self.path}"
        places = ",".join(f"{host}:{port}" for host, port in self.addresses)
        return f"{places}/{self.service}" if self.service else places


def parse_url(url: str) -> Target:
    """Return what `url` says.

    Raises:
        ConfigError: something in it is wrong. The message has no password in it.
    """
    try:
        url.encode()
    except UnicodeEncodeError:  # from an environment that is not UTF-8
        raise ConfigError("redis.url: a byte of it is no UTF-8; write it as %XX") from None
    scheme, _, rest = url.partition("://")
    if scheme not in _KINDS:
        raise ConfigError(f"redis.url: must start with {', '.join(f'{k}://' for k in _KINDS)}")
    kind, tls = _KINDS[scheme]
    # All in front of the last @ is user and password: those may hold a / or ? that nobody escaped.
    userinfo, _, place = rest.rpartition("@")
    place, _, query = place.partition("?")
    options = _options(query, _COMMON | (_TLS if tls else set()) | _allowed_for(kind))
    credentials = _credentials(userinfo, options)
    hosts, _, path = place.partition("/")
    parts = [unquote(part) for part in path.split("/") if part]
    if scheme == "unix":
        return Target(
            kind,
            (),
            path=_socket_path(hosts, path),
            database=_database([], options),
            credentials=credentials,
        )
    service = _service(parts) if kind == "sentinel" else ""
    database = _database(parts, options)
    if kind == "cluster" and database:
        raise ConfigError(f"redis.url: a Redis Cluster has only database 0, not {database}")
    return Target(
        kind,
        _addresses(hosts, kind),
        service=service,
        database=database,
        tls=tls,
        credentials=credentials,
        sentinel_credentials={
            name.removeprefix("sentinel_"): options[name] for name in _SENTINEL & options.keys()
        },
        tls_options=_tls_options(options) if tls else {},
    )


def _allowed_for(kind: Kind) -> frozenset[str]:
    return _SENTINEL if kind == "sentinel" else frozenset()


def _options(query: str, allowed: frozenset[str] | set[str]) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(options.keys() - allowed)
    if unknown:
        raise ConfigError(
            f"redis.url: option {unknown[0]!a} is unknown here; there are "
            f"{', '.join(sorted(allowed))}"
        )
    return options


def _credentials(userinfo: str, options: dict[str, str]) -> dict[str, str]:
    user, _, password = userinfo.partition(":")
    found = {"username": unquote(user), "password": unquote(password)}
    found.update({name: options[name] for name in ("username", "password") if name in options})
    credentials = {name: value for name, value in found.items() if value}
    if credentials.keys() == {"username"}:
        raise ConfigError(
            "redis.url: a user without a password; write redis://:PASSWORD@host for a password "
            "without a user"
        )
    return credentials


def _socket_path(hosts: str, path: str) -> str:
    if hosts or not path:
        raise ConfigError("redis.url: unix:// is followed by the absolute path of a socket")
    return "/" + unquote(path)


def _service(parts: list[str]) -> str:
    if not parts:
        raise ConfigError(
            "redis.url: the name of the service is missing: redis+sentinel://host:26379/mymaster"
        )
    return parts.pop(0)


def _database(parts: list[str], options: dict[str, str]) -> int:
    texts = [*parts, *([options["db"]] if "db" in options else [])]
    if not texts:
        return 0
    number = _number(texts[0], _LAST_DATABASE) if len(texts) == 1 else None
    if number is None:
        raise ConfigError(
            f"redis.url: database {printable('/'.join(texts))} is no number from 0 to "
            f"{_LAST_DATABASE}; write for example /0"
        )
    return number


def _number(text: str, last: int) -> int | None:
    """Return the number that `text` is, from 0 to `last`; None: it is none."""
    if not (text.isascii() and text.isdigit()):
        return None
    digits = text.lstrip("0") or "0"
    if len(digits) > len(str(last)):
        return None
    number = int(digits)
    return number if number <= last else None


def _addresses(hosts: str, kind: Kind) -> tuple[tuple[str, int], ...]:
    default = SENTINEL_PORT if kind == "sentinel" else REDIS_PORT
    found = tuple(_address(place, default) for place in hosts.split(","))
    if kind == "standalone" and len(found) > 1:
        raise ConfigError(
            "redis.url: several servers; say which kind with redis+sentinel:// or redis+cluster://"
        )
    return found


def _address(place: str, default: int) -> tuple[str, int]:
    host, colon, port = place.rpartition(":")
    if not colon or place.endswith("]"):
        host, port = place, str(default)
    host = host.removeprefix("[").removesuffix("]")
    number = _number(port, _LAST_PORT)
    if not host or not number:
        raise ConfigError(f"redis.url: {printable(place)} is no host, or no host and port")
    return host, number


def _tls_options(options: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {name: options[name] for name in _TLS & options.keys()}
    reqs = found.setdefault("ssl_cert_reqs", "required")
    if reqs not in ("required", "none"):
        raise ConfigError(f"redis.url: ssl_cert_reqs = {reqs!a}: must be required or none")
    check = found.get("ssl_check_hostname", "true" if reqs == "required" else "false")
    if check not in ("true", "false"):
        raise ConfigError(f"redis.url: ssl_check_hostname = {check!a}: must be true or false")
    found["ssl_check_hostname"] = check == "true"
    return found
