"""Session stores with seven methods, for applications that need no more: see ``docs/providers.md``.

Importing this loads no client of a server; making a provider of that server does.
"""

from persistence.providers.contract import ProviderStats as ProviderStats
from persistence.providers.contract import SessionProvider as SessionProvider
from persistence.providers.memory import MemoryProvider as MemoryProvider
from persistence.providers.servers import PostgresProvider as PostgresProvider
from persistence.providers.servers import RedisProvider as RedisProvider
from persistence.providers.tier import TierProvider as TierProvider

__all__ = [
    "MemoryProvider",
    "PostgresProvider",
    "ProviderStats",
    "RedisProvider",
    "SessionProvider",
    "TierProvider",
]
