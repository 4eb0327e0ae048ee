"""From a configuration to the store that checkpoints go to.

In Redis they have a redis-py client of their own, from the same URL as the shared tier: writes of
checkpoints may be repeated without harm, which commits may not, and a chunk of some megabytes
must not hold up a commit. How long a client goes on repeating differs between one server, a Cluster
and sentinels, so `RedisStore` ends every call itself. In PostgreSQL they have connections of their
own. A client is loaded where it is needed: it takes a tenth of a second, and leaves 15,000 objects
to every full garbage collection.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

from persistence.checkpoint.directory_store import DirectoryStore, beside
from persistence.checkpoint.stores import CheckpointStore
from persistence.config import CheckpointConfig, RedisConfig
from persistence.disk.files import Files
from persistence.disk.threads import Threads
from persistence.errors import ConfigError
from persistence.remote.opening import check_asyncpg
from persistence.remote.postgres_urls import is_postgres, parse_postgres_url
from persistence.remote.urls import Target, parse_url

SERVERS: Final = ("redis", "postgresql")
"""What ``checkpoint.store`` can name beside a directory."""
_REPEATS: Final = 3
_TIMEOUTS_PER_CHUNK: Final = 5  # a chunk of some megabytes takes longer than a commit
# With all repeats. More than one sending may take: only when a Cluster's client has seen a node
# miss its time does it ask the others which node has taken its place.
_TIMEOUTS_PER_CALL: Final = 6


class OpenStore(NamedTuple):
    """A store, and what to call when it is not needed any more.

    Attributes:
        store: the store.
        is_apart: whether it survives the loss of the log's disk, as far as can be told.
        close: gives its connections back.
    """

    store: CheckpointStore
    is_apart: bool
    close: Callable[[], Awaitable[None]]


def open_store(
    checkpoint: CheckpointConfig,
    redis: RedisConfig,
    disk_path: str,
    threads: Threads,
    files: Files | None = None,
) -> OpenStore:
    """Return the store that ``checkpoint.store`` names. Connects to nothing yet.

    Args:
        checkpoint: ``store``.
        redis: ``url``, ``namespace``, ``timeout_seconds``.
        disk_path: where the log is.
        threads: where files are touched.
        files: system calls on files.

    Raises:
        ConfigError: it names a server that ``redis.url`` does not lead to.
    """
    check_store(checkpoint, redis)
    where = checkpoint.store
    url = redis.url
    if url is None or where not in ("auto", *SERVERS):
        directory = beside(disk_path) if where == "auto" else where
        return OpenStore(DirectoryStore(directory, threads, files), where != "auto", _nothing)
    return _in_postgres(url, redis) if is_postgres(url) else _in_redis(url, redis)


def check_store(checkpoint: CheckpointConfig, redis: RedisConfig) -> None:
    """Check that ``redis.url`` leads to the server that ``checkpoint.store`` names, if it does.

    Raises:
        ConfigError: it does not.
    """
    where, url = checkpoint.store, redis.url
    if where not in SERVERS:
        return
    if url is None:
        raise ConfigError(f"checkpoint.store is {where!r}, but redis.url is not set")
    if is_postgres(url) != (where == "postgresql"):
        raise ConfigError(
            f"checkpoint.store is {where!r}, but redis.url leads to another kind of server; "
            "'auto' means the one that it leads to"
        )


def _in_redis(url: str, redis: RedisConfig) -> OpenStore:
    from persistence.checkpoint.redis_store import RedisStore  # noqa: PLC0415 - see above

    client, others = clients_of(parse_url(url), redis.timeout_seconds)

    async def close() -> None:
        for each in (client, *others):
            await each.aclose()

    timeout_seconds = _TIMEOUTS_PER_CALL * redis.timeout_seconds
    return OpenStore(RedisStore(client, redis.namespace, timeout_seconds), True, close)


def _in_postgres(url: str, redis: RedisConfig) -> OpenStore:
    check_asyncpg()
    from persistence.checkpoint.postgres_store import PostgresStore  # noqa: PLC0415 - see above

    timeout_seconds = _TIMEOUTS_PER_CHUNK * redis.timeout_seconds
    store = PostgresStore(parse_postgres_url(url), redis.namespace, timeout_seconds)
    return OpenStore(store, True, store.close)


async def _nothing() -> None:
    return


def clients_of(target: Target, timeout_seconds: float) -> tuple[Any, list[Any]]:
    """Return an unconnected client that returns bytes, and the clients that it needs itself.

    The caller closes all of them (``aclose``).
    """
    from redis.asyncio import Redis, RedisCluster, Sentinel  # noqa: PLC0415 - see above
    from redis.asyncio.cluster import ClusterNode  # noqa: PLC0415
    from redis.asyncio.retry import Retry  # noqa: PLC0415
    from redis.backoff import ExponentialBackoff, NoBackoff  # noqa: PLC0415

    options: dict[str, Any] = {
        **target.credentials,
        "socket_timeout": _TIMEOUTS_PER_CHUNK * timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        "retry": Retry(ExponentialBackoff(cap=0.5, base=0.05), _REPEATS),
    }
    tls = {"ssl": True, **target.tls_options} if target.tls else {}
    if target.path:
        return Redis(unix_socket_path=target.path, db=target.database, **options), []
    if target.kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in target.addresses]
        return RedisCluster(startup_nodes=nodes, **options, **tls), []
    if target.kind == "sentinel":
        sentinel = Sentinel(  # type: ignore[no-untyped-call]
            list(target.addresses),
            # Asked once each, and not for long: there are others, and whoever asks for the primary
            # repeats that.
            sentinel_kwargs={
                **options,
                "socket_timeout": timeout_seconds,
                "username": None,
                "password": None,
                **target.sentinel_credentials,
                "retry": Retry(NoBackoff(), 0),
                **tls,
            },
            **options,
            **tls,
        )
        primary = sentinel.master_for(target.service, db=target.database)
        return primary, list(sentinel.sentinels)
    host, port = target.addresses[0]
    return Redis(host=host, port=port, db=target.database, **options, **tls), []
