"""Requests of sessions: admitted, counted, timed, stored with the session.

What happens at a request is kept in memory, in one `Entry` for each session that had one lately.
It goes into the session's metadata with a commit of its own (`Updates.annotate`), which is no
access and no version: when it is half a minute old, when the session has been idle, at `flush`,
before a checkpoint and at close. So it is where the session is: in the log, in the shared tier, in
checkpoints; and a request costs no sync. A worker that is killed loses the counts of the last half
minute, and never a limit (see `limits`).

Invariants:
- a request is in exactly one place: in an entry, or in the newest record, in flight or not.
- an entry is of one incarnation of a session; what is in it never goes to another one.
- at most `_MOST_ENTRIES` entries and those with requests under way. Over `_MAX_ENTRIES` everything
  is stored at once; over `_MOST_ENTRIES` requests wait for that, and what the disk does not take
  then is forgotten (never a limit: what an entry holds in reserve is charged already).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from math import inf
from threading import get_ident
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeAlias

from persistence import record as rec
from persistence.admission import Waiting, is_admitted
from persistence.arguments import MAX_TTL_SECONDS, check_seconds, check_text
from persistence.clock import Clock, EngineTime
from persistence.config import SessionConfig
from persistence.entries import Entry, Noted
from persistence.errors import (
    CorruptionError,
    Overtaken,
    PersistenceError,
    SessionNotFound,
    WriteOutcomeUnknown,
    printable,
)
from persistence.ids import check_session_id
from persistence.lifecycle import wrong_loop
from persistence.limits import block_size, refuse_request
from persistence.observe.digest import WORKER_CENTROIDS, Digest
from persistence.observe.health import SessionHealth, score
from persistence.observe.metrics import RequestMetrics, Tally, error_text, metrics_of, name_text
from persistence.residency import Residency
from persistence.session import MAX_REQUESTS, Session
from persistence.slices import Slices, short_rest
from persistence.stats import Latencies, RequestStats
from persistence.turns import Turns
from persistence.updates import Updates

_log = logging.getLogger("persistence.requests")

_TICK_SECONDS: Final = 5.0
_STORED_AFTER_SECONDS: Final = 30.0
_GIVEN_BACK_AFTER_SECONDS: Final = 5.0
_MAX_ENTRIES: Final = 8192
_MOST_ENTRIES: Final = 2 * _MAX_ENTRIES
_STORED_AT_ONCE: Final = 256
_STORED_BESIDE: Final = 2
_FOLD_AT: Final = 64
_FOLD_ALL_AT: Final = 256
_NO_META: Final = bytes(3)
_META_AT: Final = rec.FLAGS_AT + 1


Get: TypeAlias = Callable[[str], Awaitable[Session | None]]
"""Accesses a session; None: missing, expired or terminated."""


class _Move(NamedTuple):
    """Where a session goes on."""

    session_id: str
    incarnation: bytes


class Requests:
    """All requests of this worker.

    Args:
        config: ``max_requests``, ``track_metrics``, ``max_bytes``, ``max_lifetime_seconds``.
        clock: time.
        get_session: the manager's: an access.
        has_session: the manager's: brings here what the shared tier has.
        gathers: whether commits have to wait for a sync or for a shared tier, and cost less
            together. Where they do not, the background stores a few at a time: each has its whole
            session written, and the updates of that moment would wait behind hundreds of them.

    Attributes:
        tracks: ``session.track_metrics``, until it closes.
        entries: session id -> what is not stored yet.
        durations: of requests that are not in the worker's totals yet, seconds.
        on_idle: told of a session whose last request of this worker has ended; None: nobody asks.
    """

    def __init__(
        self,
        config: SessionConfig,
        clock: Clock,
        get_session: Get,
        has_session: Callable[[str], Awaitable[bool]],
        *,
        gathers: bool,
    ) -> None:
        self._beside = _STORED_AT_ONCE if gathers else _STORED_BESIDE
        self.tracks = config.track_metrics
        self.entries: dict[str, Entry] = {}
        self._moves: dict[str, _Move] = {}
        self.on_idle: Callable[[str], None] | None = None
        self.monotonic = clock.monotonic
        self.get_session = get_session
        self._has_session = has_session
        self._limit = config.max_requests
        self._max_bytes = config.max_bytes
        self._max_lifetime_seconds = config.max_lifetime_seconds
        self._updates: Updates
        self._residency: Residency
        self._time: EngineTime
        self._turns: Turns
        self._some = asyncio.Event()
        self._too_many = asyncio.Event()
        self._making_room = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.durations: list[float] = []
        self._requests = 0
        self._refused = 0
        self._errors = 0
        self._total_seconds = 0.0
        self._digest = Digest(WORKER_CENTROIDS)

    def attach(self, updates: Updates, residency: Residency, time: EngineTime) -> None:
        """Work on these tiers. What was counted of the sessions before is theirs."""
        self._updates, self._residency, self._time = updates, residency, time
        self._turns = Turns()
        self.entries.clear()
        self._moves.clear()

    # --- one request --------------------------------------------------------------------------

    async def enter_anew(
        self, session_id: str, session: Session, get: Get
    ) -> tuple[Session, Entry | None]:
        """Return the entry of a session that has none, once there is room for it, and the session.

        Raises:
            SessionNotFound: it ended, or got another id, while it waited for room.
        """
        if self.is_crowded:
            await self.make_room()
            found = await get(session_id)
            if found is None:
                raise SessionNotFound(session_id)
            session = found
        return session, self._enter(session_id, session._record)

    def _enter(self, session_id: str, record: bytes) -> Entry | None:
        """Return the entry of a session, a fresh one if there is none; None: it needs none."""
        known = self.entries.get(session_id)
        if known is not None and known.incarnation == record[: rec.ID_BYTES]:
            return known
        limit = self._limit
        if record[_META_AT : _META_AT + 3] != _NO_META:
            limit = self._limit_of(rec.meta_of(record))
        if not limit and not self.tracks:
            return None
        entry = Entry(session_id, rec.incarnation_of(record), limit, self.monotonic())
        self.entries[session_id] = entry
        self._some.set()
        if len(self.entries) > _MAX_ENTRIES:
            self._too_many.set()
        return entry

    def _limit_of(self, meta: dict[str, Any]) -> int:
        own = meta.get(MAX_REQUESTS)
        return self._limit if own is None else int(own)

    async def admit(self, session_id: str, entry: Entry) -> None:
        """Charge the limit of a session with one request.

        Raises:
            RequestLimitReached: nothing is left.
            SessionNotFound, DiskFull, WriteOutcomeUnknown: no block could be reserved.
        """
        waiting = entry.waiting
        if waiting is None:
            waiting = entry.waiting = Waiting()
            turn = waiting.join()
            self._start(self._serve(entry, waiting))
        else:
            turn = waiting.join()
        entry.coming += 1
        try:
            may_pass = await turn
        except asyncio.CancelledError:
            if is_admitted(turn):  # it was admitted, and had not got round to it
                entry.left += 1
            raise
        finally:
            entry.coming -= 1
        if not may_pass:
            self._refused += 1
            refuse_request(session_id, entry.limit)

    async def _serve(self, entry: Entry, waiting: Waiting) -> None:
        """Reserve one block after the other, until nobody waits any more.

        Whoever comes meanwhile joins the queue; the step that finds it empty takes it away. So
        nobody ever waits for a task that has ended, which would answer at once, for ever.
        """
        try:
            while waiting:
                try:
                    granted = await self._reserve(entry, waiting)
                except Exception as error:  # noqa: BLE001 - whoever waits raises it
                    await waiting.refuse(error)
                    continue
                block, entry.left = entry.left + granted, 0
                if block:
                    entry.left += await waiting.admit(block)
                else:
                    await waiting.refuse()
        finally:
            entry.waiting = None
            waiting.give_up()  # only a task that is cancelled leaves anybody

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run `work` in a task that no caller's cancellation ends: a commit is decided anyway."""
        task = asyncio.create_task(work, name="persistence-requests")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _reserve(self, entry: Entry, waiting: Waiting) -> int:
        """Reserve the next block; return how many requests it is, 0: none are left."""
        granted = 0
        taken = Tally()

        def change(record: bytes) -> bytes | None:
            nonlocal granted, taken
            if rec.incarnation_of(record) != entry.incarnation:
                raise SessionNotFound(entry.session_id)
            meta = rec.meta_of(record)
            noted = Noted.of(meta)
            granted = block_size(entry.limit - noted.mark, len(waiting))
            if not granted:
                return None
            if not self._updates.is_cut_off:  # see `look`
                taken = self._take(entry)
            noted.tally.add(taken, self._now())
            return noted._replace(mark=noted.mark + granted).packed_with(meta)

        def undo() -> None:
            nonlocal taken
            taken = self._put_back(entry, taken)

        try:
            await self._annotate(entry, change, undo)
        except BaseException:
            undo()
            raise
        return granted

    async def _annotate(
        self, entry: Entry, change: Callable[[bytes], bytes | None], undo: Callable[[], None]
    ) -> None:
        """Commit what `change` makes of the metadata of a session, and again after `undo`.

        Again when another worker's commit came first, or the session got another id meanwhile.
        Only so many begin in one turn of the loop.
        """
        while True:
            await self._turns.enter()
            session_id = entry.session_id
            try:
                await self._updates.annotate(session_id, change)
                return
            except Overtaken:
                undo()
            except SessionNotFound:
                if entry.session_id == session_id:
                    raise
                undo()

    def fold(self, entry: Entry) -> None:
        """Take the durations of an entry into its tally, and into the worker's."""
        durations = entry.durations
        if not durations:
            return
        entry.tally.ended(durations, name_text(entry.name), self._wall(entry.ended))
        entry.durations = ()

    def fold_all(self) -> None:
        """Take the durations of all sessions into the worker's totals."""
        durations = self.durations
        if durations:
            self._requests += len(durations)
            self._total_seconds += sum(durations)
            self._digest.add(durations)
            durations.clear()

    def failed(self, entry: Entry, error: object) -> None:
        """Note a failure."""
        self._errors += 1
        entry.tally.failed(error_text(error), self._now())

    def _wall(self, monotonic: float) -> float:
        return monotonic + self._time.base + self._time.skew()

    def _now(self) -> float:
        return self._wall(self.monotonic())

    async def record(self, session_id: str, name: str, seconds: float, error: object) -> None:
        """Count a request that somebody else has timed; see `StateManager.record_request`."""
        check_text("name", name)
        allowed = f"a number of seconds from 0 to {MAX_TTL_SECONDS}"
        seconds = check_seconds("seconds", seconds, MAX_TTL_SECONDS, allowed)
        async with Request(self, session_id, name) as request:
            request.seconds = seconds
            if error is not None:
                request.failed(error)

    async def record_error(self, session_id: str, error: object) -> None:
        """Count a failure beside requests; see `StateManager.record_error`."""
        session = await self.get_session(session_id)
        if session is None:
            raise SessionNotFound(session_id)
        entry = self.entries.get(session_id)
        if entry is None or entry.incarnation != session._record[: rec.ID_BYTES]:
            _, entry = await self.enter_anew(session_id, session, self.get_session)
        if entry is not None and self.tracks:
            self.failed(entry, error)

    # --- looking ------------------------------------------------------------------------------

    async def _newest(self, session_id: str) -> bytes:
        """Return the newest record of a live session, in flight or not; renews nothing."""
        key = check_session_id(session_id)
        if await self._has_session(session_id):
            record = await self._residency.newest(session_id, key)
            if record is not None:
                return record
        raise SessionNotFound(session_id)

    def _of(self, session_id: str, record: bytes) -> tuple[Entry | None, Tally, int, int]:
        """Return the entry, everything counted, the limit and its mark of a session."""
        meta = rec.meta_of(record)
        noted = Noted.of(meta)
        entry = self.entries.get(session_id)
        if entry is not None and entry.incarnation == rec.incarnation_of(record):
            self.fold(entry)
            if entry.has_news:
                noted.tally.add(entry.tally, self._now())
        else:
            entry = None
        return entry, noted.tally, self._limit_of(meta), noted.mark

    async def metrics(self, session_id: str) -> RequestMetrics:
        """Return the requests of a session; see `StateManager.session_metrics`."""
        record = await self._newest(session_id)
        entry, tally, limit, mark = self._of(session_id, record)
        return metrics_of(
            tally,
            self._now(),
            lambda wall: datetime.fromtimestamp(wall, UTC),
            running=0 if entry is None else entry.running,
            max_requests=limit,
            admitted=mark,
        )

    async def is_limit_reached(self, session_id: str) -> bool:
        """Whether the next request of a session is refused."""
        record = await self._newest(session_id)
        entry, _, limit, mark = self._of(session_id, record)
        return bool(limit) and mark >= limit and not (entry is not None and entry.left)

    async def health(self, session_id: str) -> SessionHealth:
        """Return how a session is doing; see `StateManager.session_health`."""
        record = await self._newest(session_id)
        entry, tally, *_ = self._of(session_id, record)
        wall = self._now()
        accessed, deadline, cap = self._residency.wall_times(session_id)
        created = rec.created_of(record)
        lifetime_seconds = self._lifetime(cap - created)
        left_seconds = max(0.0, min(deadline, cap) - wall)
        recent_error_rate = tally.recent_error_rate()
        return SessionHealth(
            session_id=session_id,
            score=score(
                recent_error_rate=recent_error_rate,
                left_seconds=left_seconds,
                life_seconds=min(rec.ttl_of(record) or inf, lifetime_seconds),
                lifetime_left_seconds=cap - wall,
                lifetime_seconds=lifetime_seconds,
                bytes_share=len(record) / self._max_bytes,
            ),
            tier="memory" if self._residency.resident(session_id) is not None else "disk",
            bytes=len(record),
            age_seconds=max(0.0, wall - created),
            idle_seconds=max(0.0, wall - accessed),
            left_seconds=left_seconds,
            requests=tally.requests,
            running=0 if entry is None else entry.running,
            requests_per_second=tally.requests_per_second(wall),
            errors=tally.errors,
            error_rate=min(1.0, tally.errors / max(tally.requests, tally.errors, 1)),
            recent_error_rate=recent_error_rate,
        )

    def _lifetime(self, recorded_seconds: float) -> float:
        """Return how long a session lives at most, of what lies between creation and end.

        A clock that was set since its creation makes that too long, or less than nothing; whoever
        configured another lifetime since, too short.
        """
        configured_seconds = self._max_lifetime_seconds or inf
        if recorded_seconds <= 0:
            return configured_seconds
        return min(recorded_seconds, configured_seconds)

    def stats(self) -> RequestStats:
        """Return what this worker has counted since opening."""
        self.fold_all()
        quantile = self._digest.quantile
        return RequestStats(
            requests=self._requests,
            running=sum(entry.running for entry in self.entries.values()),
            errors=self._errors,
            refused=self._refused,
            total_seconds=self._total_seconds,
            seconds=Latencies(quantile(0.50), quantile(0.95), quantile(0.99)),
            unstored_sessions=len(self.entries),
        )

    # --- storing ------------------------------------------------------------------------------

    def ended(self, session_id: str) -> None:
        """A session has ended: nothing of it is stored any more, unless it goes on elsewhere."""
        entry = self.entries.pop(session_id, None)
        move = self._moves.pop(session_id, None)
        if entry is not None and move is not None:
            entry.session_id, entry.incarnation = move
            self.entries[entry.session_id] = entry

    def follow(self, old_id: str, new_id: str, incarnation: bytes) -> None:
        """A session goes on as `new_id` as soon as `old_id` has ended; or `turn_back` is called.

        In that very moment all that is under way, counted and held in reserve goes with it: until
        then requests of the old id begin. What is held in reserve has been charged in the record
        that the session took along.
        """
        self._moves[old_id] = _Move(new_id, incarnation)

    def turn_back(self, old_id: str) -> None:
        """The session has kept its old id after all."""
        self._moves.pop(old_id, None)

    async def store_due(self) -> None:
        """Store what is due, once it is time: a step of the manager's background work."""
        await self._some.wait()
        try:
            async with asyncio.timeout(_TICK_SECONDS):
                await self._too_many.wait()
        except TimeoutError:
            pass
        await self.look(at_once=self._beside, rests=True)

    async def look(self, at_once: int = _STORED_AT_ONCE, *, rests: bool = False) -> None:
        """Store what is due by the clock; everything, if it is too much.

        Args:
            at_once: store so many at a time.
            rests: nobody waits for it, unless it is too much.
        """
        everything = len(self.entries) > _MAX_ENTRIES
        # While the shared tier is away each worker would have a branch of its own, of a session
        # that nobody has changed. It takes one of them, and what was counted in the others is lost.
        waits = self._updates.is_cut_off and not everything
        self._too_many.clear()
        now = self.monotonic()
        due: list[Entry] = []
        slices = self._slices(rests=rests and not everything)
        for entry in list(self.entries.values()):
            if not entry.is_needed:
                self._drop(entry)
            elif not waits and (everything or self._is_due(entry, now)):
                due.append(entry)
            await slices.give_way_if_due()
        await self._store(due, gives_back=everything, at_once=at_once, slices=slices)
        for entry in due:
            if not entry.is_needed:
                self._drop(entry)
            await slices.give_way_if_due()
        if not self.entries:
            self._some.clear()

    def _slices(self, *, rests: bool = False) -> Slices:
        return Slices(self.monotonic, rest_seconds=short_rest) if rests else Slices(self.monotonic)

    def _drop(self, entry: Entry) -> None:
        if self.entries.get(entry.session_id) is entry:
            del self.entries[entry.session_id]

    @property
    def is_crowded(self) -> bool:
        """Whether a request of a session without an entry has to wait in `make_room`."""
        return len(self.entries) >= _MOST_ENTRIES

    async def make_room(self) -> None:
        """Store so much that there is room for another entry."""
        async with self._making_room:
            if self.is_crowded:
                await self.look()
            if not self.is_crowded:
                return
            forgotten = 0
            slices = Slices(self.monotonic)
            for entry in list(self.entries.values()):
                if not entry.is_used:
                    self._drop(entry)
                    forgotten += 1
                await slices.give_way_if_due()
            _log.warning("what %d sessions requested lately cannot be stored: forgotten", forgotten)

    def _is_due(self, entry: Entry, now: float) -> bool:
        if entry.has_news and now - entry.stored >= _STORED_AFTER_SECONDS:
            return True
        return self._is_idle(entry, now) and bool(entry.left)

    def _is_idle(self, entry: Entry, now: float) -> bool:
        return not entry.is_used and now - entry.ended >= _GIVEN_BACK_AFTER_SECONDS

    async def store_all(self) -> None:
        """Store everything now: for `flush`, checkpoints and close."""
        if self.entries:
            await self._store(list(self.entries.values()))

    async def close(self) -> None:
        """Store everything and give back what is reserved; wait for what is being stored.

        The manager admits no more requests. Those under way have been charged, so they are counted:
        as if they ended now, since nothing is stored any more when they do.
        """
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self.tracks:
            self.tracks = False
            now = self.monotonic()
            for entry in self.entries.values():
                if entry.running:
                    entry.cut_short(now)
        await self._store(list(self.entries.values()), gives_back=True)

    async def gone(self) -> None:
        """Wait until nothing of it runs any more."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _store(
        self,
        entries: list[Entry],
        *,
        gives_back: bool = False,
        at_once: int = _STORED_AT_ONCE,
        slices: Slices | None = None,
    ) -> None:
        """Store entries, many with one sync; those that are idle give back what they reserved."""
        now = self.monotonic()
        slices = slices or self._slices()
        storing: list[asyncio.Task[None]] = []
        for entry in entries:
            if entry.has_news or entry.left:
                self.fold(entry)  # here, where it is done in slices
                gives = gives_back or self._is_idle(entry, now)
                storing.append(self._start(self._store_one(entry, gives_back=gives)))
            if len(storing) == at_once:
                await asyncio.wait(storing)
                storing = []
            await slices.give_way_if_due()
        if storing:
            await asyncio.wait(storing)

    async def _store_one(self, entry: Entry, *, gives_back: bool) -> None:
        """Store one entry. What fails is logged, and stays in the entry."""
        taken = Tally()
        rest = 0

        def change(record: bytes) -> bytes | None:
            nonlocal taken, rest
            if rec.incarnation_of(record) != entry.incarnation:
                return None
            taken = self._take(entry)
            if gives_back:  # from here on this block admits nobody
                rest, entry.left = entry.left, 0
            if not taken and not rest:
                return None
            meta = rec.meta_of(record)
            noted = Noted.of(meta)
            noted.tally.add(taken, self._now())
            return noted._replace(mark=max(0, noted.mark - rest)).packed_with(meta)

        def undo() -> None:
            nonlocal taken, rest
            taken = self._put_back(entry, taken)
            entry.left += rest
            rest = 0

        entry.stored = self.monotonic()
        try:
            await self._annotate(entry, change, undo)
        except SessionNotFound:
            if entry.session_id not in self._moves:
                self._drop(entry)
        except WriteOutcomeUnknown as error:
            # It may be stored: counting it twice, or giving back twice, would be worse.
            _log.warning("requests of %s: %s", printable(entry.session_id), error)
        except CorruptionError as error:
            _log.warning("requests of a damaged session are not stored: %s", error)
        except PersistenceError as error:
            undo()
            _log.warning("requests of %s are not stored: %s", printable(entry.session_id), error)

    def _take(self, entry: Entry) -> Tally:
        self.fold(entry)
        return entry.take()

    def _put_back(self, entry: Entry, taken: Tally) -> Tally:
        """Let an entry have again what could not be stored; return an empty tally."""
        if taken:
            taken.add(entry.tally, self._now())
            entry.tally = taken
        return Tally()


class Request:
    """The context manager behind `StateManager.request`.

    Attributes:
        session: the session as it was on entering.
        seconds: what to note as its duration; None: what it takes.
    """

    __slots__ = (
        "_entry",
        "_error",
        "_get_session",
        "_name",
        "_requests",
        "_session_id",
        "_started",
        "_thread",
        "seconds",
        "session",
    )

    session: Session

    def __init__(
        self,
        requests: Requests,
        session_id: str,
        name: str,
        get_session: Get | None = None,
    ) -> None:
        """Prepare it.

        Args:
            requests: where it is counted.
            session_id: whose it is.
            name: what it is.
            get_session: accesses the session; None: as everybody does.
        """
        self._requests = requests
        self._get_session = get_session or requests.get_session
        self._session_id = session_id
        self._name = name
        self.seconds: float | None = None

    async def __aenter__(self) -> Self:
        requests, session_id = self._requests, self._session_id
        session = await self._get_session(session_id)
        if session is None:
            raise SessionNotFound(session_id)
        entry = requests.entries.get(session_id)
        if entry is None or entry.incarnation != session._record[: rec.ID_BYTES]:
            session, entry = await requests.enter_anew(session_id, session, self._get_session)
        self._entry = entry
        self._error: object = None  # here: it may be entered again, after one that failed
        if entry is not None:
            if entry.limit:
                if entry.left:
                    entry.left -= 1
                else:
                    await requests.admit(session_id, entry)
            entry.running += 1
            self._thread = get_ident()
            self._started = started = requests.monotonic()
            entry.started += started
        self.session = session
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        entry = self._entry
        if entry is None:
            return
        if get_ident() != self._thread:
            raise wrong_loop()
        requests = self._requests
        entry.running -= 1
        entry.started -= self._started
        if requests.tracks:
            entry.ended = now = requests.monotonic()
            entry.name = self._name
            seconds = now - self._started if self.seconds is None else self.seconds
            entry.durations += (seconds,)
            requests.durations.append(seconds)
            if error is not None and isinstance(error, Exception):
                self._error = error
            if self._error is not None:
                requests.failed(entry, self._error)
            if len(entry.durations) >= _FOLD_AT:
                requests.fold(entry)
            if len(requests.durations) >= _FOLD_ALL_AT:
                requests.fold_all()
        if requests.on_idle is not None and not entry.running:
            requests.on_idle(entry.session_id)

    def failed(self, error: object) -> None:
        """Count this request as failed, though nothing is raised: a reply with status 500, say.

        Args:
            error: an exception or a text.
        """
        self._error = error
