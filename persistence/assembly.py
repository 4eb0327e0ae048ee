"""Assembles a manager out of its rooms, and takes it apart again: the order of both.

Opening: the tiers, what stands beside them, the background work; then callers are let in, and what
an earlier worker has left half done is settled. Closing: callers are refused, watches end, running
edits finish, what is counted and attached is stored and released, the tiers are closed in any case.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from persistence import background
from persistence.access import Access, Sessions
from persistence.arguments import check_text_or_none, refused
from persistence.clock import Clock, SystemClock
from persistence.commit import CommitQueue
from persistence.config import RedisConfig, StateConfig
from persistence.disk.files import Files
from persistence.disk.format import Frame
from persistence.errors import InvalidArgument, Overtaken
from persistence.facilities import Facilities
from persistence.ids import CommitIds
from persistence.listing import Listing
from persistence.lives import Lives
from persistence.lookup import Lookup
from persistence.memory.watch import MemoryWatch
from persistence.residency import Residency
from persistence.rotation import Tiers as Rotating
from persistence.session import Session
from persistence.sharing.sharing import Sharing
from persistence.shutdown import Grace
from persistence.tiers import Tiers
from persistence.updates import Updates
from persistence.watching.stream import Permit, Watch
from persistence.watching.watching import Watching

if TYPE_CHECKING:
    from persistence.checkpoint.keeper import Keeper

_EDITS_SHARE: Final = 0.5  # of what is left of a shutdown's time


class Assembly(Facilities):
    """The part of `StateManager` that puts it together.

    Args:
        config: the configuration.
        clock: where time comes from; None: the machine's clocks.
        files: system calls on files; None: the system's.
        schema: what sessions are to the application; see `typed`.
        memory_watch: lets the memory budget follow what is left.
    """

    # Of the manager; called here.
    cleanup_expired: Callable[[], Awaitable[int]]
    terminate_session: Callable[[str], Awaitable[bool]]

    _commits: CommitQueue
    _keeper: Keeper
    _listing: Listing
    _loop: asyncio.AbstractEventLoop

    def __init__(
        self,
        config: StateConfig,
        clock: Clock | None,
        files: Files | None,
        schema: object,
        memory_watch: MemoryWatch,
    ) -> None:
        super().__init__()
        self.config = config
        self._clock: Clock = clock or SystemClock()
        self._lookup = Lookup(self._ready)
        self._lives = Lives(config.session, self._begin, self._lookup, self._plain_data)
        self._watching = Watching(self._lookup.bring_when_ready)
        self._tiers = Tiers(config, self._clock, files, self._check_open, self._watching)
        self._memory_watch = memory_watch
        self._background: list[asyncio.Task[None]] = []
        self._commit_ids = CommitIds()
        self._grace = Grace(config.shutdown.grace_seconds, self._clock)
        self._closing: asyncio.Task[None] | None = None
        self._sharing: Sharing | None = None
        self._access: Access | None = None
        self._resident: Callable[[str], Session | None] = self._refuse
        self._restore_now: Callable[[str], Session | None] = self._refuse
        self._make_facilities(config, self._clock, files, schema)

    @abstractmethod
    async def open(self) -> None:
        """See `StateManager.open`."""

    @abstractmethod
    async def close(self) -> None:
        """See `StateManager.close`."""

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # --- opening ------------------------------------------------------------------------------

    async def _open(self) -> None:
        await self._tiers.open()
        self._rotations = self._tiers.rotations
        try:
            self._take_tiers()
            await self._open_facilities(sync=self.config.disk.fsync == "always")
        except BaseException:
            await self._tiers.close()
            raise
        self._tiers.before_settling = self._requests.store_all
        self._background = background.start(self._steps())
        self._keeper.start()
        self._opened()
        self._let_in()
        await self._rotations.settle(self._lookup.living_incarnation, self.terminate_session)

    def _take_tiers(self) -> None:
        """Work with the tiers as they are now."""
        tiers = self._tiers
        self._time, self._disk, self._keeper = tiers.time, tiers.disk, tiers.keeper
        self._memory, self._residency = tiers.memory, tiers.residency
        self._commits, self._updates = tiers.commits, tiers.updates
        self._listing, self._sharing = tiers.listing, tiers.sharing
        self._lookup.attach(tiers)
        self._lives.attach(tiers)
        self._attach_facilities()

    def _let_in(self) -> None:
        """Open the short ways to sessions that are here."""
        self._resident, self._restore_now = self._lookup.short_ways()

    def _keep_out(self) -> None:
        """Close the short ways: who comes now waits in `_ready`."""
        self._resident = self._restore_now = _not_here

    # --- closing ------------------------------------------------------------------------------

    async def _close(self) -> None:
        self._grace.begin()
        await self._turns.enter()  # whoever has called before goes on
        self._closed()
        self._resident = self._restore_now = self._refuse
        # First of all: what is open may be what keeps its readers from ending, and so a server.
        await self._watching.closed()
        await background.stop(self._background)
        await self._grace.spend(self._updates.locks.all_free(), "running edits", _EDITS_SHARE)
        await self._finish_facilities(self._grace)
        await self._rotations.close()
        try:
            await self._tiers.finish(self._grace)
        finally:
            await self._close_facilities(self._grace)
            await self._tiers.close()
            await self._requests.gone()

    def _forked(self) -> None:
        super()._forked()
        self._resident = self._refuse
        self._disk.abandon()

    # --- background ---------------------------------------------------------------------------

    def _steps(self) -> dict[str, background.Step]:
        """Return what goes on by itself."""
        steps: dict[str, background.Step] = {
            "renewals": self._sweep,
            "requests": self._requests.store_due,
        }
        if self.config.session.cleanup_interval_seconds:
            steps["cleanup"] = self._clean_up
        if self.config.memory.check_interval_seconds:
            steps["memory"] = self._watch_memory
        return steps

    async def _sweep(self) -> None:
        await self._residency.next_sweep()
        await self._residency.record_renewals()

    async def _clean_up(self) -> None:
        await asyncio.sleep(self.config.session.cleanup_interval_seconds)
        await self.cleanup_expired()

    async def _watch_memory(self) -> None:
        await asyncio.sleep(self.config.memory.check_interval_seconds)
        pressure = await self._disk.threads.read(self._memory_watch.read)
        self._memory_watch.act(pressure, self._memory, self._residency.set_budget)

    # --- tokens and ids -----------------------------------------------------------------------

    @property
    def _token_access(self) -> Access:
        """What issues and validates tokens, made when it is first needed."""
        if self._access is None:
            tiers = self._tiers
            self._access = Access(
                Sessions(
                    current=self._current_tiers,
                    bring_here=self._lookup.bring_here,
                    get_session=self.get_session,
                    request=self._request,
                    resource=self._resource,
                    scratch_dir=self._scratch_dir,
                    watch=self._watch,
                    plain_data=self._plain_data,
                    plain_value=self._plain_value,
                ),
                tiers.keys.tokens(tiers.disk.secret, is_shared=tiers.shares_sessions),
                self.config.security.token_ttl_seconds,
                self._clock.wall,
                tiers.learn_keys,
            )
        return self._access

    def _watch(
        self,
        session_id: str,
        after: int | None,
        max_pending: int,
        permit: Permit,
    ) -> Watch:
        self._check_open()
        return self._watching.watch(session_id, after, max_pending, permit)

    async def _rotate(self, session_id: str) -> str:
        """Do what `StateManager.rotate_session_id` says."""
        while True:
            await self._ready()
            tiers = Rotating(self._updates, self._residency, self._commits)
            try:
                return await self._rotations.rotate(tiers, session_id)
            except Overtaken:
                continue  # on the version that another worker has made

    # --- what the rooms ask -------------------------------------------------------------------

    async def _current_updates(self) -> Updates:
        await self._begin()
        return self._updates

    async def _current_tiers(self) -> tuple[Updates, Residency]:
        await self._begin()
        return self._updates, self._residency

    def _restored_ids(self, frame: Frame) -> bytes:
        """A restored session is a new incarnation: nothing built on another one is accepted."""
        return self._commit_ids.next() + self._commit_ids.next() + frame.commit


def checked_config(url: object, config: object, clock: object) -> StateConfig:
    """Return the configuration of a manager that is made with these: the two are easily mixed up.

    Raises:
        InvalidArgument: one of them is something else.
        ConfigError: the URL is wrong.
    """
    if isinstance(url, StateConfig):
        raise InvalidArgument(
            "url is a StateConfig: config is the second argument, StateManager(config=...)"
        )
    check_text_or_none("url", url)
    if config is not None and not isinstance(config, StateConfig):
        raise refused(
            "config", config, "a StateConfig (StateConfig.model_validate makes one of a dict)"
        )
    if clock is not None and not all(
        callable(getattr(clock, name, None)) for name in ("wall", "monotonic")
    ):
        raise refused("clock", clock, "a Clock, with wall() and monotonic(), or None")
    given = StateConfig() if config is None else config
    if not url:
        return given
    redis = RedisConfig(**{**given.redis.model_dump(), "url": url})
    return given.model_copy(update={"redis": redis})


def _not_here(session_id: str) -> Any:
    return None
