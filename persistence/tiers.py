"""Puts the tiers together over one log, and takes them apart again.

Built bottom-up: the log, then what is in memory above it, then this worker's side of the shared
tier, then checkpoints. A restore exchanges everything above the log: operations that still hold
the tiers before it find their commit queue closed, and fail without a trace.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Final

from persistence.checkpoint.create import Plan
from persistence.checkpoint.keeper import Keeper, Schedule
from persistence.checkpoint.opening import check_store, open_store
from persistence.checkpoint.restore import StagedRestore
from persistence.clock import Clock, EngineTime
from persistence.commit import Commit, CommitQueue
from persistence.config import StateConfig
from persistence.disk.filenames import CONFLICTS, MANIFEST, OUTBOX, ROTATIONS
from persistence.disk.files import Files
from persistence.disk.tier import DiskTier
from persistence.errors import ConflictError, RemoteUnavailable
from persistence.expiry import life_of
from persistence.keys import Keys
from persistence.listing import Listing
from persistence.memory.ordered import make_memory_tier
from persistence.memory.tier import MemoryTier
from persistence.record import NEVER
from persistence.remote.contract import RemoteTier
from persistence.remote.opening import check_url, tier_of
from persistence.residency import Residency
from persistence.rotation import Rotations
from persistence.sealer import Seals
from persistence.sharing.conflicts import Conflicts
from persistence.sharing.local import Local
from persistence.sharing.outbox import Outbox
from persistence.sharing.restoring import Restoring
from persistence.sharing.sharing import Sharing
from persistence.shutdown import Grace
from persistence.updates import Updates
from persistence.watching.watching import Watching

_log = logging.getLogger("persistence")

_REMOTE_SHARE: Final = 0.5  # of what is left of a shutdown's time


class Tiers:
    """Everything below the manager. `open` it, and `close` it in the end.

    Args:
        config: the configuration.
        clock: time.
        files: system calls on files; None: the system's.
        check_open: raises ManagerClosed once the manager is closed.
        watching: who is told of changes.

    Attributes:
        time: the engine's time base.
        disk, memory, residency, commits, listing, updates: see these modules.
        sharing: None: there is no shared tier for sessions.
        before_settling: brings into the commit queue what is beside it; None: nothing is.
        keeper: makes checkpoints.
        keys: for tokens and encryption.
        rotations: of sessions' ids.
    """

    time: EngineTime
    disk: DiskTier
    memory: MemoryTier
    residency: Residency
    commits: CommitQueue
    listing: Listing
    updates: Updates
    keeper: Keeper
    keys: Keys
    rotations: Rotations
    sharing: Sharing | None = None
    before_settling: Callable[[], Awaitable[None]] | None = None

    _seals: Seals | None = None

    def __init__(
        self,
        config: StateConfig,
        clock: Clock,
        files: Files | None,
        check_open: Callable[[], None],
        watching: Watching,
    ) -> None:
        self._config = config
        self._clock = clock
        self._files = files
        self._check_open = check_open
        self.watching = watching

    @property
    def shares_sessions(self) -> bool:
        """Whether sessions are shared, and not only checkpoints kept in Redis."""
        redis = self._config.redis
        return redis.url is not None and redis.write != "checkpoint"

    # --- opening and closing ------------------------------------------------------------------

    async def open(self) -> None:
        """Open the log and everything above it; on failure leave nothing open.

        Raises:
            See `StateManager.open`.
        """
        config = self._config
        self._check_places()
        self.time = EngineTime(self._clock)
        self.keys = await Keys.load(config.security, config.disk.path, self._clock)
        seals = self._seals = self.keys.seals
        await self._check_server()
        async with AsyncExitStack() as undo:
            self.disk = await DiskTier.open(
                config.disk, self.time, self._files, None if seals is None else seals.records
            )
            undo.push_async_callback(self.disk.close)
            self._restoring = Restoring(self.disk, self._clock)
            undo.push_async_callback(self._restoring.close)
            await self._restoring.open()
            threads = self.disk.threads
            self._store = open_store(
                config.checkpoint, config.redis, self.disk.directory, threads, self._files
            )
            synced = config.disk.fsync == "always"
            self._outbox = Outbox(self.disk.journal(OUTBOX), threads, sync=synced)
            self._conflicts = Conflicts(
                self.disk.journal(CONFLICTS), threads, None if seals is None else seals.conflicts
            )
            self.rotations = Rotations(
                self.disk.journal(ROTATIONS), threads, self.disk.directory, sync=synced
            )
            undo.push_async_callback(self.rotations.close)
            await self.rotations.open()
            self.keeper = self._make_keeper()
            self._assemble()
            undo.pop_all()
            undo.push_async_callback(self.close)
            if self.sharing is not None:
                await self._outbox.open()
                await self._conflicts.open()
                await self.sharing.open(self._restoring)
            undo.pop_all()

    def _check_places(self) -> None:
        """Refuse a wrong URL or store before there is a directory or a file with keys."""
        check_store(self._config.checkpoint, self._config.redis)
        check_url(self._config.redis.url)

    async def _check_server(self) -> None:
        """See that the shared tier can be used before there is a directory.

        One that is there for checkpoints only is not opened for anything else.
        """
        redis = self._config.redis
        if redis.url is None:
            return
        manifest = f"{self._config.disk.path}/{MANIFEST}"
        if self.shares_sessions and (self._files or Files()).exists(manifest):
            return  # `Sharing.open` will tell
        tier = self._remote_tier()
        try:
            await tier.open()
        except RemoteUnavailable as error:
            if redis.on_outage == "fail":
                raise
            if not self.shares_sessions:  # else `Sharing.open` says it
                _log.warning("starting without Redis: %s", error)
        finally:
            await tier.close()

    async def settle(self) -> None:
        """Bring into the log what is only in memory, and sync it."""
        if self.before_settling is not None:
            await self.before_settling()
        await self.residency.log_unlogged()
        await self.residency.record_renewals()
        await self.commits.flush()

    async def finish(self, grace: Grace) -> None:
        """Bring to the shared tier and to the last checkpoint what there is time for."""
        await self.keeper.stop()
        await self.residency.log_unlogged()
        await self.residency.record_renewals()
        if self.sharing is not None:
            await grace.spend(self.sharing.deliver(), "the shared tier", _REMOTE_SHARE)
        if self.keeper.at_shutdown:
            await grace.spend(self.keeper.create("shutdown", is_last=True), "the last checkpoint")

    async def close(self) -> None:
        """Close everything, in order; the log is sealed in any case."""
        try:
            await self.rotations.close()
            await self._restoring.close()
            await self._store.close()
            if self.sharing is not None:
                await self.sharing.close()
            await self.commits.close()
            await self.residency.close()
            if self.sharing is not None:
                await self._outbox.close()
                await self._conflicts.close()
        finally:
            await self.disk.close()
            self.memory.clear()

    # --- putting together ---------------------------------------------------------------------

    def _assemble(self) -> None:
        """Put the tiers together above the log, which may have sessions."""
        config = self._config
        ttl_seconds = config.session.ttl_seconds
        default_life = life_of(ttl_seconds, config.session.auto_renew, ttl_seconds)
        self.memory = make_memory_tier(
            config.memory.policy,
            config.memory.max_bytes,
            self._clock,
            self.time,
            default_life if default_life > 0 else NEVER,
        )
        self.residency = Residency(config.memory, self.memory, self.disk, self._clock, self.time)
        self.commits = CommitQueue(
            self.disk,
            config.disk,
            self._clock,
            acknowledged=self._acknowledged,
            failed=self._failed,
        )
        self.residency.attach(self.commits)
        self.listing = Listing(
            self.memory,
            self.disk,
            self.residency,
            self.commits,
            self._clock,
            self.time,
            self._check_open,
        )
        self.watching.attach(self.residency, self.time, is_shared=self.shares_sessions)
        self.residency.adopting = self.watching.adopted
        self.sharing = self._make_sharing() if self.shares_sessions else None
        self.updates = Updates(
            config.session,
            self.time,
            self.memory,
            self.residency,
            self.commits,
            self._check_open,
            self.sharing,
        )
        if self.sharing is not None:
            self.commits.share(self.sharing.decide)
        self.commits.start()

    def _make_sharing(self) -> Sharing:
        """Return this worker's side of the shared tier."""
        local = Local(
            self.residency,
            self.commits,
            self._clock,
            self.time,
            partial(self.listing.ids, "", is_own=True),
            self.watching,
        )
        redis = self._config.redis
        sharing = Sharing(self._remote_tier(), redis, self._outbox, self._conflicts, local)
        self.residency.confirm_end = sharing.confirm_end
        self.residency.renewing = sharing.renewing
        return sharing

    def _remote_tier(self) -> RemoteTier:
        sealer = None if self._seals is None else self._seals.remote
        return tier_of(self._config.redis, self._clock, sealer, self.learn_keys)

    async def learn_keys(self) -> None:
        """Look for keys that other workers may have begun to seal with."""
        await self.keys.learn(self.disk.threads)

    def _make_keeper(self) -> Keeper:
        config = self._config
        at_shutdown = config.shutdown.checkpoint and self._store.is_apart
        schedule = Schedule(
            config.checkpoint.interval_seconds,
            config.checkpoint.min_pause_seconds,
            config.shutdown.grace_seconds if at_shutdown else 0.0,
        )
        plan = Plan(
            compress=config.checkpoint.compression == "lz4",
            keep=config.checkpoint.keep,
            namespace=config.redis.namespace,
            seals=self._seals,
        )
        return Keeper(
            self.disk,
            self._store.store,
            plan,
            schedule,
            self._clock,
            self.settle,
            self.learn_keys,
        )

    def _acknowledged(self, commits: Sequence[Commit]) -> None:
        if self.watching.is_on:  # before memory follows, which has the versions before these
            self.watching.acknowledged(commits)
        self.residency.acknowledged(commits)
        if self.sharing is not None:
            self.sharing.acknowledged(commits)

    def _failed(self, commit: Commit) -> None:
        self.residency.failed(commit)
        if self.sharing is not None:
            self.sharing.failed(commit)

    # --- a restored state ---------------------------------------------------------------------

    async def exchange(self, staged: StagedRestore) -> None:
        """Put a restored state in place of all sessions. Nobody may be let in meanwhile.

        The tiers above the log are others afterwards, also when this fails; then with the
        sessions that there were.
        """
        before: list[str] | None = None
        why = ConflictError(
            "the sessions were restored from a checkpoint meanwhile; nothing was written: try again"
        )
        try:
            await self.commits.close(why)
            if self.sharing is not None:  # only now: what was in flight counts too
                before = [session_id async for session_id in self.listing.ids("")]
                await self.sharing.close(why)
            await self.residency.close()
            async with self._restoring.noted(before, is_empty=not staged.info.sessions):
                await staged.install()
        except BaseException:
            await staged.discard()  # also where it was not got to
            await self._exchanged()
            raise
        try:
            await self._exchanged()
        finally:
            await self.watching.restored()

    async def _exchanged(self) -> None:
        """Work with what is in the log now."""
        self.memory.clear()
        self._assemble()
        if self.sharing is not None:
            await self.sharing.open(self._restoring, again=True)
