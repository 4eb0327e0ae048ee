"""From a configuration to the shared tier that its URL names.

Who needs no shared tier loads no client of one, and who needs one does not load the other's: that
takes a tenth of a second and leaves 15,000 objects, over which every full garbage collection goes
from then on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from persistence.clock import Clock
from persistence.config import RedisConfig
from persistence.errors import ConfigError
from persistence.remote.contract import RemoteTier
from persistence.remote.postgres_urls import is_postgres, parse_postgres_url
from persistence.remote.urls import parse_url
from persistence.sealer import Sealer


def tier_of(
    config: RedisConfig,
    clock: Clock,
    sealer: Sealer | None = None,
    learn: Callable[[], Awaitable[None]] | None = None,
) -> RemoteTier:
    """Return the shared tier behind ``redis.url``. Connects to nothing yet.

    Args:
        config: ``url`` (must be set) and all that the tier takes.
        clock: process time.
        sealer: seals and opens what is stored of sessions; None: it is stored as it is.
        learn: awaited when something is sealed with a key that is not known.

    Raises:
        ConfigError: the URL is wrong, or what the tier needs is not installed.
    """
    if config.url is not None and is_postgres(config.url):
        check_asyncpg()
        from persistence.remote.postgres import PostgresTier  # noqa: PLC0415 - see above

        return PostgresTier(config, clock, sealer, learn)
    from persistence.remote.redis import RedisTier  # noqa: PLC0415 - see above

    return RedisTier(config, clock, sealer, learn)


def check_url(url: str | None) -> None:
    """Check all of a URL that can be told without a client.

    Raises:
        ConfigError: it is wrong.
    """
    if url is None:
        return
    if is_postgres(url):
        parse_postgres_url(url)
    else:
        parse_url(url)


def check_asyncpg() -> None:
    """Check that the client of PostgreSQL is installed.

    Raises:
        ConfigError: it is not.
    """
    try:
        import asyncpg  # noqa: F401, PLC0415 - see above
    except ImportError as error:
        raise ConfigError(
            "redis.url: PostgreSQL needs the extra 'postgres': "
            "pip install 'persistence-engine[postgres]'"
        ) from error
