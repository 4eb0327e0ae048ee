"""Puts the room together: what the manager and the commit queue ask about the shared tier.

Reads: a local copy that is not known to be current is compared with the shared tier, or fetched
from it, before it is served (`current`). Writes: see `agreement` for ``through``; with ``behind``
every update begins a branch in the outbox, and `delivery` brings it over soon after.

While the shared tier is away, ``on_outage = "local"`` serves what is here and remembers what
changed; ``"fail"`` refuses both.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Final

from persistence.commit import Commit
from persistence.config import RedisConfig
from persistence.disk.format import DELETE
from persistence.errors import ManagerClosed, PersistenceError, RemoteUnavailable
from persistence.record import ID_BYTES, NO_ID
from persistence.remote.contract import Announcement, RemoteSession, RemoteTier, Touch
from persistence.sharing.agreement import Agreement, Decision, request_of, unavailable
from persistence.sharing.conflicts import Conflicts
from persistence.sharing.copies import Copies
from persistence.sharing.delivery import Delivery
from persistence.sharing.fills import Fills
from persistence.sharing.local import Local
from persistence.sharing.outbox import Branch, Outbox
from persistence.sharing.restoring import Restoring
from persistence.stats import SharingStats

_log = logging.getLogger("persistence.sharing")

_PROBE_SECONDS: Final = 0.5
_IMPOSED_AT_ONCE: Final = 1000
_COMPARED_AT_ONCE: Final = 256
_ENDS_AT_ONCE: Final = 64
_LISTENING_TIMEOUTS: Final = 2  # one to subscribe, one for the first heartbeat to come back


class Sharing:
    """This worker's side of the shared tier. Every method runs on the event loop.

    Args:
        remote: the shared tier, opened by `open`.
        config: ``write``, ``on_outage``, ``flush_interval_seconds``.
        outbox: what the shared tier has not seen.
        conflicts: where refused branches are kept.
        local: this worker's own side.
    """

    def __init__(
        self,
        remote: RemoteTier,
        config: RedisConfig,
        outbox: Outbox,
        conflicts: Conflicts,
        local: Local,
    ) -> None:
        self.copies = Copies()
        self.outbox = outbox
        self.conflicts = conflicts
        self._remote = remote
        self._config = config
        self._residency = local.residency
        self._commits = local.commits
        self._time = local.time
        self._all_ids = local.all_ids
        self._accepts_outages = config.on_outage == "local"
        self._connected = asyncio.Event()
        self._has_subscribed = False
        self._to_follow: dict[str, None] = {}
        self._may_follow = False
        self._watchers = local.watchers
        self._ending: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None
        self._closing = False
        self.agreement = Agreement(
            remote,
            outbox,
            self.copies,
            local.time,
            accepts_outages=self._accepts_outages,
            writes_through=config.write == "through",
            went_away=self._suspect,
            deliver=self._wake_delivery,
        )
        self._delivery = Delivery(
            remote,
            self.agreement,
            outbox,
            conflicts,
            local,
            flush_interval_seconds=config.flush_interval_seconds,
            tombstone_seconds=config.tombstone_seconds,
        )
        self._fills = Fills(remote, self.copies, outbox, conflicts, local, self._delivery.wake)

    def stats(self) -> SharingStats:
        """Return numbers about the shared tier."""
        return SharingStats(
            is_up=self.is_up,
            undelivered=len(self.outbox),
            delivered=self._delivery.delivered,
            refreshed=self._fills.refreshed,
            conflicts=self.conflicts.count,
        )

    @property
    def is_up(self) -> bool:
        """Whether the shared tier answers, and announcements have arrived since it does."""
        return self.agreement.is_up

    # --- opening and closing ------------------------------------------------------------------

    async def open(self, restoring: Restoring, *, again: bool = False) -> None:
        """Connect, and start listening and delivering. It listens when this returns.

        With ``on_outage = "local"`` a shared tier that is away is no reason not to start.

        Args:
            restoring: whether there is a restored state to impose, before anything else is done.
            again: this worker was connected before, so whatever fails now is an outage.

        Raises:
            ConfigError: it can never work like this.
            RemoteUnavailable: it is away or announcements do not arrive, and ``on_outage`` is
                ``"fail"``.
            DiskFull, WriteOutcomeUnknown: a restored state is not imposed as a whole. The next
                opening does it again.
        """
        try:
            await self._remote.open()
            await self._subscribe()
            await self._wait_until_listening()
        except PersistenceError as error:
            may_be_away = self._accepts_outages and isinstance(error, RemoteUnavailable)
            if not may_be_away and not again:
                raise
            _log.warning("starting without the shared tier: %s", error)
            if not self._has_subscribed:  # else the subscription connects by itself
                self._probe(_PROBE_SECONDS)
        try:
            if restoring.before is not None:
                await self._impose(restoring.before)
                await restoring.over()
        finally:
            self._delivery.start()
            self._may_follow = True
            self._start_following()

    async def _subscribe(self) -> None:
        await self._remote.subscribe(self)
        self._has_subscribed = True  # from now on it reconnects by itself

    async def _wait_until_listening(self) -> None:
        """Wait for the subscription, or for the time in which it should have come about.

        Work that began before that would be done as in an outage: on local copies that other
        workers, or this one before it was killed, may have left behind.

        Raises:
            RemoteUnavailable: it did not come about.
        """
        try:
            async with asyncio.timeout(_LISTENING_TIMEOUTS * self._config.timeout_seconds):
                await self._connected.wait()
        except TimeoutError:
            raise RemoteUnavailable(
                "opening the shared tier: announcements of other workers' commits do not arrive"
            ) from None

    async def deliver(self) -> None:
        """Deliver what the shared tier has not seen and takes now; to be followed by `close`."""
        await self._commits.flush()
        await self._delivery.end()

    async def _impose(self, before: Iterable[str]) -> None:
        """Let the shared tier have what is here now, after all of it was replaced.

        The race: a copy of what is there is taken over here before it is noted that it is to be
        replaced. So nothing is delivered and nothing followed meanwhile. And those that were here
        before come first: with the list of what is here now, the expired among them are ended.

        Args:
            before: the sessions that were here: those that are gone are ended there as well.
        """
        self.copies.reset(is_listening=self.copies.is_listening, is_lost=True)
        known = dict.fromkeys(before)
        await self._impose_each(known)
        await self._impose_each([each async for each in self._all_ids() if each not in known])

    async def _impose_each(self, session_ids: Iterable[str]) -> None:
        rest = iter(session_ids)
        while some := list(islice(rest, _IMPOSED_AT_ONCE)):
            unseen: list[str] = []
            try:
                found = await self._remote.stored(some)
            except RemoteUnavailable as error:
                _log.warning("restored while the shared tier is away: %s", error)
                found = [None] * len(some)
                unseen = some
            await self.outbox.begin_anew(
                {
                    session_id: Branch(stored.commit, stored.version)
                    if stored is not None and stored.lives
                    else Branch(NO_ID, 0)
                    for session_id, stored in zip(some, found, strict=True)
                },
                unseen,
            )

    async def close(self, why: PersistenceError | None = None) -> None:
        """Disconnect. What was not delivered is in the outbox.

        Args:
            why: what whoever waits for an answer is told; None: the manager is closed.
        """
        self._closing = True
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)
        if self._ending is not None:
            self._ending.cancel()
            await asyncio.gather(self._ending, return_exceptions=True)
        await self._fills.close(why or ManagerClosed("the manager is closed"))
        await self._delivery.close()
        await self._remote.close()

    # --- the shared tier's calls --------------------------------------------------------------

    def announced(self, announcements: Sequence[Announcement]) -> None:
        """Other workers committed."""
        self._watchers.announced(announcements)
        watched = self._watchers.topics
        for item in announcements:
            session_id = item.session_id
            is_watched = session_id in watched
            if (
                not is_watched
                and not self._residency.has_copy(session_id)
                and session_id not in self._fills
            ):
                continue
            if self._residency.commit_of(session_id) == item.commit:
                self.copies.validate(session_id)
                continue
            self.copies.announced(session_id, item.commit)
            if item.ended or is_watched:
                # What has ended is absent everywhere from now on, also in lists. And whoever
                # watches is to hear of it. So do not wait for a reader.
                self._to_follow[session_id] = None
        self._start_following()

    def connected(self, *, epoch: bytes) -> None:
        """Announcements arrive from now on; what was before may have been missed."""
        epoch = blake2b(epoch, digest_size=ID_BYTES).digest()  # on Cluster it is longer
        is_lost = epoch != self.outbox.epoch
        self.copies.reset(is_listening=True, is_lost=is_lost)
        self._connected.set()
        if is_lost:
            if self.outbox.epoch != NO_ID:
                _log.warning("the shared tier lost its content: it is filled again from here")
            self._delivery.refill(epoch)
        self._up()
        self._watchers.reconnected()
        self._to_follow.update(dict.fromkeys(self._watchers.topics))
        self._start_following()

    def disconnected(self) -> None:
        """Announcements may be missing: from now on every read asks.

        That alone is no outage. Updates that were made here, without asking, while others still
        reach the shared tier, would be conflicts.
        """
        self.copies.reset(is_listening=False)
        self._probe(0.0)

    def _up(self) -> None:
        if not self.agreement.is_up:
            self.agreement.is_up = True
            _log.info("the shared tier is there")
        self._delivery.wake()

    def _down(self) -> None:
        if self.agreement.is_up:
            self.agreement.is_up = False
            _log.warning("the shared tier is away")

    def _wake_delivery(self) -> None:
        self._delivery.wake()

    def _suspect(self) -> None:
        """A request was not answered: do not ask again before a probe was."""
        self._down()
        self._probe(_PROBE_SECONDS)

    def _probe(self, pause_seconds: float) -> None:
        if self._probing is None and not self._closing:
            self._probing = asyncio.create_task(
                self._probe_until_up(pause_seconds), name="persistence-probe"
            )
            self._probing.add_done_callback(self._probed)

    def _probed(self, task: asyncio.Task[None]) -> None:
        self._probing = None
        if not task.cancelled() and task.exception() is not None:
            _log.error("probing the shared tier stopped", exc_info=task.exception())

    async def _probe_until_up(self, pause_seconds: float) -> None:
        """Ask until there is an answer; the first one makes the shared tier usable again.

        Args:
            pause_seconds: before the first question.
        """
        while True:
            await asyncio.sleep(pause_seconds)
            pause_seconds = _PROBE_SECONDS
            try:
                if not self._has_subscribed:
                    await self._remote.open()
                    await self._subscribe()
                    return  # `connected` does the rest
                await self._remote.ping()
            except PersistenceError:
                self._down()
                continue
            except Exception:  # noqa: BLE001 - logged; nobody else would ask again
                _log.exception("probing the shared tier failed")
                self._down()
                continue
            if self.copies.is_listening:
                self._up()
            return

    def _start_following(self) -> None:
        if self._to_follow and self._may_follow and self._ending is None and not self._closing:
            self._ending = asyncio.create_task(self._follow_ends(), name="persistence-ends")
            self._ending.add_done_callback(self._followed)

    async def follow_what_is_over(self) -> None:
        """Look which sessions are over that other workers have changed, and nobody has read since.

        Their time may have been made shorter. Their end is not announced, and what is here of them
        says that they live on: it is listed, and what belongs to it here is kept.
        """
        rest = iter(self.copies.all_stale())
        while self.agreement.is_up and (some := list(islice(rest, _COMPARED_AT_ONCE))):
            # Of the others, what was newer may have been lost: that is for a reader to find out.
            some = [each for each in some if self.copies.is_stale_for_certain(each)]
            await asyncio.sleep(0)
            try:
                found = await self._remote.stored(some)
            except RemoteUnavailable:
                self._suspect()
                return
            except PersistenceError as error:
                _log.warning("looking which sessions are over elsewhere: %s", error)
                continue
            for session_id, stored in zip(some, found, strict=True):
                if stored is None or not stored.lives:
                    self._to_follow[session_id] = None
            self._start_following()

    async def _follow_ends(self) -> None:
        """Look at sessions that ended elsewhere, or are watched; a few at a time, for readers."""
        while self._to_follow:
            some = list(islice(self._to_follow, _ENDS_AT_ONCE))
            for session_id in some:
                del self._to_follow[session_id]
            looked = (self._fills.refresh(session_id) for session_id in some)
            errors = await asyncio.gather(*looked, return_exceptions=True)
            for session_id, error in zip(some, errors, strict=True):
                if isinstance(error, RemoteUnavailable):
                    self._to_follow[session_id] = None
                elif isinstance(error, PersistenceError):
                    _log.warning("after an announcement: %s", error)
            if any(isinstance(error, RemoteUnavailable) for error in errors):
                await asyncio.sleep(_PROBE_SECONDS)

    def _followed(self, task: asyncio.Task[None]) -> None:
        self._ending = None
        if not task.cancelled() and task.exception() is not None:
            _log.error("following announcements stopped", exc_info=task.exception())
        self._start_following()  # some may have come since its last look

    # --- the commit queue's calls -------------------------------------------------------------

    async def decide(self, batch: Sequence[Commit]) -> Decision:
        """Ask the shared tier for a batch (``through``), or remember it for later (``behind``)."""
        if not self.agreement.writes_through:
            return await self.agreement.postpone(batch)
        decision = await self.agreement.decide(batch)
        for commit in decision.agreed:
            if commit.settled:  # the log failed meanwhile, for what it was built on
                self.failed(commit)
        return decision

    def failed(self, commit: Commit) -> None:
        """A commit failed: if the shared tier has it all the same, the local copy is behind."""
        if commit.shared:
            self.copies.announced(commit.session_id, commit.ids[16:32])

    def acknowledged(self, commits: Sequence[Commit]) -> None:
        """Commits are in the log."""
        for commit in commits:
            # A version counts as valid since the shared tier took it, if nothing came after it.
            if commit.kind == DELETE:
                self.copies.forget(commit.session_id)
                incarnation = commit.ids[:ID_BYTES]
                if not commit.local and incarnation != NO_ID:
                    self._delivery.ended(commit.session_id, incarnation)

    def renewing(self, touch: Commit) -> None:
        """A session was accessed that is not in the log: what the log does not have to hear of."""
        request = request_of(touch, self._time.skew())
        if isinstance(request, Touch):
            self.agreement.touches.append(request)
            if self.agreement.writes_through:
                self._delivery.wake()

    # --- reading ------------------------------------------------------------------------------

    async def ids(self, prefix: str) -> AsyncIterator[str]:
        """Yield the ids of the sessions of all workers that start with `prefix`, each once.

        Raises:
            RemoteUnavailable: the shared tier does not answer.
        """
        seen: set[str] = set()
        async for page in self._remote.scan(prefix):
            for session_id in page:
                if session_id not in seen:
                    seen.add(session_id)
                    yield session_id

    def is_current(self, session_id: str) -> bool:
        """Whether a local copy may be served without asking."""
        if self.copies.is_valid(session_id):
            return True
        if session_id in self.outbox or session_id in self._commits.tails:
            return True  # this worker is ahead
        return not self.agreement.is_up and self._accepts_outages

    async def current(self, session_id: str, *, fresh: bool = False) -> None:
        """Make sure that what is here of a session is what the shared tier has.

        Args:
            session_id: which one; it need not be here.
            fresh: ask even if the local copy counts as current.

        Raises:
            ManagerClosed, ConflictError: see `close`.
            RemoteUnavailable: it cannot be asked, and ``on_outage`` is ``"fail"``.
        """
        if self.agreement.waits_for_delivery(session_id):
            await self._delivery.round_over()
        if not fresh and self.is_current(session_id) and self._residency.has_copy(session_id):
            return
        if not self.agreement.is_up:
            if self._accepts_outages:
                return
            raise unavailable("the shared tier")
        try:
            await self._fills.refresh(session_id)
        except RemoteUnavailable:
            self._suspect()
            if not self._accepts_outages:
                raise

    async def confirm_end(self, session_id: str, key: bytes, idle_since: float) -> bool:
        """Whether a session that is over here is over in the shared tier too.

        Another worker may have renewed it; then it goes on with the newer times.

        Args:
            session_id: which one.
            key: its id as UTF-8.
            idle_since: it is over if nobody has accessed it since then, engine seconds; it is in
                any case when its deadline is past.
        """
        if not self.agreement.is_up or session_id in self.outbox:
            return True
        try:
            found = await self._fills.look(session_id)
        except PersistenceError:
            return True
        now = self._time.now()
        skew = self._time.skew()
        if (
            isinstance(found, RemoteSession)
            and found.deadline - skew > now
            and found.accessed - skew >= idle_since
        ):
            mine = await self._residency.peek(session_id, key)
            if session_id not in self._commits.tails and session_id not in self.outbox:
                await self._fills.adopt(session_id, mine, found)
            return False
        return True
