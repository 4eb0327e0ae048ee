"""Redis as the shared tier: see `contract` for what it promises, ``docs/redis.md`` for operators.

It puts the parts of this room together: `topology` knows the servers, `router` sends calls to them,
`committer` commits, `announcements` listens, `layout` knows what is in a key.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final

from persistence.clock import Clock
from persistence.config import RedisConfig
from persistence.errors import (
    ConfigError,
    PersistenceError,
    RemoteDamaged,
    printable,
)
from persistence.record import ID_BYTES
from persistence.remote.announcements import RedisSubscription
from persistence.remote.checks import EPOCH_MAGIC, check_keys, check_server, foreign
from persistence.remote.committer import REQUESTS_PER_CALL, Committer
from persistence.remote.connect import check_tls_files
from persistence.remote.contract import CommitResult, Listener, RemoteSession, Request, Stored
from persistence.remote.exchanges import Fault, Lost, sessions_named
from persistence.remote.faults import Refused, as_config_error, code_of, explain, explain_key
from persistence.remote.keys import Keys
from persistence.remote.layout import decode_session, decode_state, lacks_key
from persistence.remote.link import Command
from persistence.remote.router import Router, Script, ScriptCall
from persistence.remote.subscription import Subscriptions
from persistence.remote.topology import topology_of
from persistence.remote.urls import parse_url
from persistence.sealer import Sealer
from persistence.slices import Slices

_log = logging.getLogger("persistence.remote")

_SCAN_COUNT: Final = b"1000"
_EPOCH_BYTES: Final = 8


class RedisTier:
    """Sessions in Redis, shared by all workers with the same namespace.

    Args:
        config: ``url`` (must be set), ``namespace``, ``timeout_seconds``, ``tombstone_seconds``,
            ``heartbeat_seconds``, ``max_connections``, ``allow_eviction``.
        clock: process time.
        sealer: seals and opens values; None: they are stored as they are.
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
        self.where = ""
        self._target = parse_url(config.url)
        self.where = self._target.shown
        self._config = config
        self._clock = clock
        self._keys = Keys(config.namespace)
        self._topology = topology_of(self._target, config.max_connections, config.timeout_seconds)
        self._router = Router(self._topology, clock)
        self._states_script = Script("states.lua")
        self._sealer = sealer
        self._learn = learn
        self._committer = Committer(
            self._router, self._keys, self.worker, config=config, where=self.where, sealer=sealer
        )
        self._subscriptions = Subscriptions()

    # --- opening and closing ----------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, check every primary, and only then write the epoch if there is none."""
        check_tls_files(self._target)
        try:
            await self._topology.discover()
            for link in self._topology.primaries():
                await check_server(self._target, link, allow_eviction=self._config.allow_eviction)
                await check_keys(self._keys, link)
            await self._read_epoch()
        except RemoteDamaged as damage:
            raise foreign(damage.key, self.where) from None
        except Fault as fault:
            wrong = as_config_error(fault, self.where)
            raise wrong or explain(fault, self.where, "opening the shared tier") from None

    async def close(self) -> None:
        """Give all connections back; idempotent."""
        await self._subscriptions.close()
        await self._topology.close()

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
        """Return what `load` returns, or raises about one key only, for each."""
        keys = [self._keys.session(session_id) for session_id in session_ids]
        calls = [Command(b"HGETALL", key, key=key) for key in keys]
        replies = await self._read(calls, f"load {sessions_named(session_ids)}")
        slices = Slices(self._clock.monotonic)
        found = []
        if self._sealer is not None:
            await self._learn_keys(session_ids, replies, self._sealer)
        for key, session_id, reply in zip(keys, session_ids, replies, strict=True):
            found.append(self._decode(key, session_id, reply))
            await slices.give_way_if_due()
        return found

    async def _learn_keys(
        self, session_ids: Sequence[str], replies: Sequence[Any], sealer: Sealer
    ) -> None:
        """Look for new keys if one is lacking: another worker may have begun to seal with one."""
        if self._learn is not None and any(
            isinstance(reply, dict) and lacks_key(session_id, reply, sealer)
            for session_id, reply in zip(session_ids, replies, strict=True)
        ):
            await self._learn()

    def _decode(
        self, key: bytes, session_id: str, reply: Any
    ) -> RemoteSession | Stored | PersistenceError | None:
        if isinstance(reply, Exception):
            code = code_of(reply)
            name = key.decode("utf-8", "backslashreplace")
            about_key = explain_key(code, str(reply), name, session_id)
            return about_key or explain(reply, self.where, f"load session {printable(session_id)}")
        try:
            return decode_session(key, session_id, reply, self._sealer)
        except RemoteDamaged as damage:
            return damage

    async def stored(self, session_ids: Sequence[str]) -> list[Stored | None]:
        """Return what is stored of each session, without its data."""
        keys = [self._keys.session(session_id) for session_id in session_ids]
        groups = self._router.groups(keys, REQUESTS_PER_CALL)
        calls = [ScriptCall(self._states_script, [keys[i] for i in group], ()) for group in groups]
        found: list[Stored | None] = [None] * len(keys)
        replies = await self._read(calls, f"look at {sessions_named(session_ids)}")
        for group, reply in zip(groups, replies, strict=True):
            if isinstance(reply, Exception):
                raise explain(reply, self.where, f"look at {sessions_named(session_ids)}")
            for index, state in zip(group, reply, strict=True):
                found[index] = self._decode_state(state)
        return found

    def _decode_state(self, state: bytes) -> Stored | None:
        try:
            return decode_state(state) if state else None
        except ValueError:  # foreign: loading it says so, and nothing is ever written over it
            return None

    async def scan(self, prefix: str = "") -> AsyncIterator[list[str]]:
        """Yield pages of the ids of live sessions that start with `prefix`."""
        pattern = self._keys.sessions_pattern(prefix)
        for link in self._topology.primaries():
            cursor = b"0"
            while True:
                try:
                    reply = await link.ask(
                        b"SCAN", cursor, b"MATCH", pattern, b"COUNT", _SCAN_COUNT
                    )
                except Fault as fault:
                    raise explain(fault, self.where, "list sessions") from None
                if isinstance(reply, Exception):
                    raise explain(reply, self.where, "list sessions")
                cursor, keys = reply
                ids = [self._keys.session_id(key) for key in keys if self._is_session(key)]
                states = await self.stored(ids) if ids else []
                page = [
                    sid for sid, state in zip(ids, states, strict=True) if state and state.lives
                ]
                if page:
                    yield page
                if cursor == b"0":
                    break

    def _is_session(self, key: bytes) -> bool:
        try:
            return bool(self._keys.session_id(key))
        except ValueError:
            return False

    async def epoch(self) -> bytes:
        """Return the id of the tier's content; create what of it is missing."""
        try:
            return await self._read_epoch()
        except Fault as fault:
            raise explain(fault, self.where, "read the epoch of the shared tier") from None

    async def _read_epoch(self) -> bytes:
        names = self._keys.epochs(cluster=self._topology.routes_by_slot)
        calls = []
        for name in names:
            fresh = EPOCH_MAGIC + secrets.token_hex(_EPOCH_BYTES).encode()
            # SET with NX and GET in one command needs Redis 7.
            calls.append(Command(b"SET", name, fresh, b"NX", key=name))
            calls.append(Command(b"GET", name, key=name))
        settled = await self._router.settle(calls, lost_seconds=self._config.timeout_seconds)
        return b"".join(
            self._epoch_part(name, made, found)
            for name, (made, *_), (found, *_) in zip(
                names, settled[::2], settled[1::2], strict=True
            )
        )

    def _epoch_part(self, name: bytes, made: Any, found: Any) -> bytes:
        """Return one part of the epoch, from the replies to its SET with NX and its GET."""
        if isinstance(found, Fault):
            raise found
        if isinstance(found, Exception) and code_of(found) != "WRONGTYPE":
            raise Refused(found, self.where)
        if found is None:  # there was none, and none could be made
            if isinstance(made, Fault):
                raise made
            if isinstance(made, Exception):
                raise Refused(made, self.where)
            raise Lost(f"{self.where}: the content was lost while its epoch was read")
        if not isinstance(found, bytes) or not found.startswith(EPOCH_MAGIC):
            raise RemoteDamaged(name.decode(), "it holds no epoch of this library")
        return found.removeprefix(EPOCH_MAGIC)

    async def ping(self) -> float:
        """Return how long the slowest primary took to answer, seconds."""
        slowest = 0.0
        for link in self._topology.primaries():
            started = self._clock.monotonic()
            try:
                reply = await link.ask(b"PING")
            except Fault as fault:
                raise explain(fault, self.where, "ping") from None
            if isinstance(reply, Exception):
                raise explain(reply, self.where, "ping")
            slowest = max(slowest, self._clock.monotonic() - started)
        return slowest

    async def _read(self, calls: Sequence[Command | ScriptCall], doing: str) -> list[Any]:
        """Return the replies of idempotent calls; those may be errors that a server answered.

        Raises:
            RemoteUnavailable: one did not come.
        """
        replies = []
        settled = await self._router.settle(calls, lost_seconds=self._config.timeout_seconds)
        for reply, *_ in settled:
            if isinstance(reply, Fault):
                raise explain(reply, self.where, doing)
            replies.append(reply)
        return replies

    async def commit(self, requests: Sequence[Request]) -> list[CommitResult]:
        """Apply `requests` in order, in one round trip; return the outcome of each."""
        return await self._committer.commit(requests)

    # --- announcements ----------------------------------------------------------------------------

    async def subscribe(self, listener: Listener) -> None:
        """Tell `listener` of other workers' commits, until `close`."""
        await self._subscriptions.begin(
            lambda: RedisSubscription(
                self._topology,
                self._keys,
                self.worker,
                listener,
                epoch=self.epoch,
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
        """How many calls were sent again, because of a lost reply or a redirection."""
        return self._router.repeated
