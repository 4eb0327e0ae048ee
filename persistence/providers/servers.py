"""Providers by the URL of a server."""

from __future__ import annotations

from typing import Any, ClassVar

from persistence.clock import Clock, SystemClock
from persistence.config import RedisConfig
from persistence.errors import ConfigError
from persistence.providers.packing import DEFAULT_TTL_SECONDS, MAX_BYTES
from persistence.providers.tier import TierProvider
from persistence.remote.opening import tier_of
from persistence.remote.postgres_urls import is_postgres


class _ServerProvider(TierProvider):
    """A provider in the server of a URL; a subclass says which kind of server it is for."""

    _kind: ClassVar[str]
    _is_postgres: ClassVar[bool]
    _needs: ClassVar[str]

    def __init__(
        self,
        url: str,
        *,
        ttl_seconds: float = DEFAULT_TTL_SECONDS,
        max_bytes: int = MAX_BYTES,
        clock: Clock | None = None,
        **settings: Any,
    ) -> None:
        config = RedisConfig(url=url, **settings)
        if config.url is None or is_postgres(config.url) != self._is_postgres:
            raise ConfigError(f"redis.url: a {type(self).__name__} needs the URL of {self._needs}")
        clock = clock or SystemClock()
        super().__init__(
            tier_of(config, clock),
            name=self._kind,
            ttl_seconds=ttl_seconds,
            max_bytes=max_bytes,
            clock=clock,
        )


class RedisProvider(_ServerProvider):
    """A `SessionProvider` in Redis 6.2 or newer, or Valkey: one server, Sentinel or Cluster.

    Args:
        url: of the server, as ``redis.url``; see ``docs/redis.md``.
        ttl_seconds: of new sessions; 0: they never expire.
        max_bytes: of one session's packed fields.
        clock: wall and process time; default: the machine's.
        **settings: fields of the section ``redis`` of the configuration: ``namespace``,
            ``timeout_seconds``, ``max_connections``, ``tombstone_seconds``, ``allow_eviction``.

    Raises:
        ConfigError: the URL or a setting is wrong.
        InvalidArgument: `ttl_seconds` is no duration.
    """

    _kind = "redis"
    _is_postgres = False
    _needs = "a Redis: redis://host"


class PostgresProvider(_ServerProvider):
    """A `SessionProvider` in PostgreSQL 14 or newer. Needs the extra ``postgres``.

    Args:
        url: of the database, as ``redis.url``; see ``docs/providers.md``.
        ttl_seconds: of new sessions; 0: they never expire.
        max_bytes: of one session's packed fields.
        clock: wall and process time; default: the machine's.
        **settings: fields of the section ``redis`` of the configuration: ``namespace``,
            ``timeout_seconds``, ``max_connections``, ``tombstone_seconds``.

    Raises:
        ConfigError: the URL or a setting is wrong, or asyncpg is not installed.
        InvalidArgument: `ttl_seconds` is no duration.
    """

    _kind = "postgresql"
    _is_postgres = True
    _needs = "a database: postgresql://host/name"
