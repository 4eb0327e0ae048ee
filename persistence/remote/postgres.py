"""PostgreSQL as the shared tier: `contract` says what it promises, ``docs/providers.md`` the rest.

It puts the parts together: `postgres_link` has the connections, `postgres_calls` sends statements,
`postgres_committer` commits, `postgres_announcements` listens, `postgres_schema` has the tables.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, Final

from asyncpg import PostgresError

from persistence.clock import Clock
from persistence.config import RedisConfig
from persistence.errors import ConfigError, PersistenceError, RemoteDamaged
from persistence.record import ID_BYTES
from persistence.remote.contract import CommitResult, Listener, RemoteSession, Request, Stored
from persistence.remote.exchanges import Fault, sessions_named
from persistence.remote.keys import Keys
from persistence.remote.postgres_announcements import Channels, PostgresSubscription
from persistence.remote.postgres_calls import PostgresCalls
from persistence.remote.postgres_committer import PostgresCommitter
from persistence.remote.postgres_faults import as_config_error, explain
from persistence.remote.postgres_link import SMALL_BYTES, PostgresLink
from persistence.remote.postgres_rows import RowCodec, decode_stored, id_bytes
from persistence.remote.postgres_schema import SESSIONS, prepare
from persistence.remote.postgres_urls import parse_postgres_url
from persistence.remote.subscription import Subscriptions
from persistence.sealer import Sealer
from persistence.slices import Slices

_log = logging.getLogger("persistence.remote")

_PER_PAGE: Final = 1000
_REMOVED_AT_ONCE: Final = 1000
_EPOCH_TRIES: Final = 3
_BYTE_MAX: Final = 255

# All names are constants of this package, and everything else a parameter. statement_timestamp()
# and not clock_timestamp(): an index serves only what stays the same within a statement.
_NOW: Final = "extract(epoch FROM statement_timestamp())::double precision"
_LIVE: Final = f"namespace = $1 AND expires > {_NOW}"
_COLUMNS: Final = "id, kind, version, incarnation, commits, checksum, accessed, deadline, cap"
_LOAD: Final = (
    f"SELECT {_COLUMNS}, octet_length(record) AS size, "  # noqa: S608
    f"CASE WHEN octet_length(record) <= {SMALL_BYTES} THEN record END AS record "
    f"FROM {SESSIONS} WHERE {_LIVE} AND id = ANY ($2)"
)
_LOAD_LARGE: Final = (
    f"SELECT {_COLUMNS}, octet_length(record) AS size, record "  # noqa: S608
    f"FROM {SESSIONS} WHERE {_LIVE} AND id = $2"
)
_STORED: Final = (
    f"SELECT id, kind, version, incarnation, coalesce(commits[1], '') FROM {SESSIONS} "  # noqa: S608
    f"WHERE {_LIVE} AND id = ANY ($2)"
)
_SCAN: Final = (
    f"SELECT id FROM {SESSIONS} WHERE {_LIVE} AND kind = 'L' AND id >= $2 AND id <> $3 "  # noqa: S608
    f"AND ($4::bytea IS NULL OR id < $4) ORDER BY id LIMIT {_PER_PAGE}"
)
_EPOCH: Final = f"""
WITH made AS (
  INSERT INTO {SESSIONS} (
    namespace, id, kind, version, incarnation, commits, checksum, accessed, deadline, cap, expires
  ) VALUES ($1, '', 'E', 0, '', ARRAY[$2::bytea], 0, 0, 'Infinity', 'Infinity', 'Infinity')
  ON CONFLICT DO NOTHING RETURNING commits
)
SELECT commits[1] AS epoch FROM made
UNION ALL SELECT commits[1] FROM {SESSIONS} WHERE namespace = $1 AND id = ''
"""  # noqa: S608
_REMOVE_EXPIRED: Final = f"""
WITH over AS (
  SELECT id FROM {SESSIONS} WHERE namespace = $1 AND expires <= {_NOW}
  ORDER BY expires LIMIT {_REMOVED_AT_ONCE} FOR UPDATE SKIP LOCKED
)
DELETE FROM {SESSIONS} AS s USING over WHERE s.namespace = $1 AND s.id = over.id RETURNING 1
"""  # noqa: S608


class PostgresTier:
    """Sessions in PostgreSQL, shared by all workers with the same namespace.

    Args:
        config: ``url`` (must be set), ``namespace``, ``timeout_seconds``, ``tombstone_seconds``,
            ``heartbeat_seconds``, ``max_connections``.
        clock: process time.
        sealer: seals and opens records; None: they are stored as they are.
        learn: awaited when one is sealed with a key that is not known: it may have been added.

    Raises:
        ConfigError: the URL is wrong.
    """

    def __init__(
        self,
        config: RedisConfig,
        clock: Clock,
        sealer: Sealer | None = None,
        learn: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        if config.url is None:
            raise ConfigError("redis.url is not set: there is no shared tier")
        self.worker = secrets.token_bytes(ID_BYTES)
        target = parse_postgres_url(config.url)
        self.where = target.shown
        self._config = config
        self._clock = clock
        self._space = Keys(config.namespace).prefix.decode()
        self._channels = Channels(self._space, self.worker)
        self._link = PostgresLink(target, config.max_connections, config.timeout_seconds)
        self._calls = PostgresCalls(self._link, config.timeout_seconds, clock)
        self._codec = RowCodec(sealer)
        self._learn = learn
        self._committer = PostgresCommitter(
            self._calls,
            self._space,
            self._channels.commits,
            self.worker,
            self._codec,
            config=config,
            where=self.where,
        )
        self._subscriptions = Subscriptions()

    # --- opening and closing ----------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, check the server and the tables, and install what is missing."""
        try:
            await prepare(self._link)
        except (Fault, PostgresError) as error:
            wrong = as_config_error(error, self.where)
            raise wrong or explain(error, self.where, "opening the shared tier") from None
        await self.epoch()

    async def close(self) -> None:
        """Give all connections back; idempotent."""
        await self._subscriptions.close()
        await self._link.close()

    # --- reading ----------------------------------------------------------------------------------

    async def load(self, session_id: str) -> RemoteSession | Stored | None:
        """Return the session; `Stored` if there is a tombstone, None if there is nothing."""
        [found] = await self.load_many([session_id])
        if isinstance(found, PersistenceError):
            raise found
        return found

    async def load_many(
        self, session_ids: Sequence[str]
    ) -> list[RemoteSession | Stored | PersistenceError | None]:
        """Return what `load` returns, or raises about one session only, for each."""
        keys = [id_bytes(session_id) for session_id in session_ids]
        if not keys:
            return []
        doing = f"load {sessions_named(session_ids)}"
        rows = await self._calls.read(doing, _LOAD, self._space, list(set(keys)))
        by_key = {row["id"]: row for row in rows}
        for row in rows:
            if row["record"] is None and row["size"] is not None:
                await self._load_large(row, by_key)
        await self._learn_keys(by_key.values())
        slices = Slices(self._clock.monotonic)
        found: list[RemoteSession | Stored | PersistenceError | None] = []
        for key, session_id in zip(keys, session_ids, strict=True):
            row = by_key.get(key)
            found.append(None if row is None else self._decode(row, session_id))
            await slices.give_way_if_due()
        return found

    async def _load_large(self, row: Any, rows: dict[bytes, Any]) -> None:
        """Put a row with its large record into `rows`, as it is now; that has its own time."""
        key = row["id"]
        found = await self._calls.read(
            "load a large session", _LOAD_LARGE, self._space, key, payload_bytes=row["size"]
        )
        del rows[key]
        if found:
            rows[key] = found[0]

    def _decode(self, row: Any, session_id: str) -> RemoteSession | Stored | RemoteDamaged:
        """Return the session in a row, if it is as it was written."""
        key, kind, version, incarnation, commits, checksum, accessed, deadline, cap, _, kept = row
        history = tuple(commits)
        commit = history[0] if history else b""
        stored = decode_stored(kind, version, incarnation, commit)._replace(history=history)
        if not stored.lives:
            return stored
        try:
            record = self._codec.opened(key, stored, kept, checksum)
        except ValueError as error:
            place = f"{self._space}/{session_id}"
            return RemoteDamaged(place, str(error), session_id, f"row in {SESSIONS}")
        return RemoteSession(record, accessed, deadline, cap, history)

    async def _learn_keys(self, rows: Iterable[Any]) -> None:
        """Look for keys that another worker may have begun to seal with."""
        if self._learn is not None and any(self._codec.lacks_key(row["record"]) for row in rows):
            await self._learn()

    async def stored(self, session_ids: Sequence[str]) -> list[Stored | None]:
        """Return what is stored of each session, without its data."""
        keys = [id_bytes(session_id) for session_id in session_ids]
        if not keys:
            return []
        doing = f"look at {sessions_named(session_ids)}"
        rows = await self._calls.read(doing, _STORED, self._space, list(set(keys)))
        found = {row[0]: decode_stored(*row[1:]) for row in rows}
        return [found.get(key) for key in keys]

    async def scan(self, prefix: str = "") -> AsyncIterator[list[str]]:
        """Yield pages of the ids of live sessions that start with `prefix`, sorted by UTF-8."""
        first = prefix.encode()
        end = _end_of(first)
        last = b""
        while True:
            start = max(first, last)
            rows = await self._calls.read("list sessions", _SCAN, self._space, start, last, end)
            if rows:
                yield [row[0].decode() for row in rows]
            if len(rows) < _PER_PAGE:
                return
            last = rows[-1][0]

    async def epoch(self) -> bytes:
        """Return the id of the tier's content; create it if there is none."""
        for _ in range(_EPOCH_TRIES):
            fresh = secrets.token_bytes(ID_BYTES)
            doing = "read the epoch of the shared tier"
            rows = await self._calls.read(doing, _EPOCH, self._space, fresh)
            if rows:
                return bytes(rows[0][0])
            # Another worker made it in this moment: its row is seen by the next statement.
        raise RemoteDamaged(self._space, "it has no epoch", None, f"namespace in {SESSIONS}")

    async def ping(self) -> float:
        """Return how long the server took to answer, seconds."""
        started = self._clock.monotonic()
        await self._calls.read("ping", "SELECT 1")
        return self._clock.monotonic() - started

    async def commit(self, requests: Sequence[Request]) -> list[CommitResult]:
        """Apply `requests` in order, in one round trip; return the outcome of each."""
        return await self._committer.commit(requests)

    async def remove_expired(self) -> int:
        """Remove up to 1,000 rows whose time is over; return how many.

        Nobody sees such rows any more. The subscription does this by itself.

        Raises:
            RemoteUnavailable: the server does not answer.
        """
        return len(await self._calls.read("remove what expired", _REMOVE_EXPIRED, self._space))

    async def _remove_expired(self) -> bool:
        return await self.remove_expired() == _REMOVED_AT_ONCE

    # --- announcements ----------------------------------------------------------------------------

    async def subscribe(self, listener: Listener) -> None:
        """Tell `listener` of other workers' commits, until `close`."""
        await self._subscriptions.begin(
            lambda: PostgresSubscription(
                self._link,
                self._channels,
                self.worker,
                listener,
                epoch=self.epoch,
                remove_expired=self._remove_expired,
                heartbeat_seconds=self._config.heartbeat_seconds,
                timeout_seconds=self._config.timeout_seconds,
            )
        )

    @property
    def is_listening(self) -> bool:
        """Whether announcements of other workers arrive, as far as the last heartbeat tells."""
        return self._subscriptions.is_connected

    @property
    def repeated(self) -> int:
        """How many statements were sent again."""
        return self._calls.repeated


def _end_of(prefix: bytes) -> bytes | None:
    """Return the first key behind all that start with `prefix`; None: there is none."""
    kept = prefix.rstrip(bytes([_BYTE_MAX]))
    return kept[:-1] + bytes([kept[-1] + 1]) if kept else None
