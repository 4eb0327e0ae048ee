"""Who watches what: turns commits, take-overs and announcements into changes.

Of a session that is watched by its id, every version that readers of this worker get to see comes
by here exactly once, in order, whether this worker made it (`acknowledged`) or took it over from
the shared tier (`adopted`). An announcement only makes it take over. So a change is told when the
new version is here, and what changed is known by comparing the two.

Watching all sessions does not bring those of other workers here: see `everywhere`.

Invariants:
- the version in a `_Topic` is the one that readers see;
- who does not watch pays one look at `is_on` for each piece of a batch;
- nothing here waits for a reader;
- what goes wrong here ends streams, and never fails who commits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from heapq import heapify, heappop, heappush
from typing import Final

from persistence import record as rec
from persistence.arguments import MAX_COUNT, refused
from persistence.clock import EngineTime
from persistence.commit import Commit
from persistence.disk.format import DELETE, TOUCH
from persistence.errors import (
    CorruptionError,
    InvalidArgument,
    ManagerClosed,
    SessionNotFound,
    printable,
)
from persistence.ids import check_session_id
from persistence.record import ID_BYTES, NEVER, NO_ID
from persistence.remote.contract import Announcement
from persistence.residency import Residency
from persistence.watching.changes import (
    NO_FIELDS,
    Kind,
    SessionChange,
    changed_fields,
    gap,
    reset_of_all,
)
from persistence.watching.everywhere import Everywhere
from persistence.watching.stream import Mailbox, Permit, Watch, put_all

_log = logging.getLogger("persistence.watching")

_LONGEST_WAIT_SECONDS: Final = 1.0
_AGAIN_SECONDS: Final = 5.0
_MOST_LEFT_OVER: Final = 256  # deadlines of sessions that nobody watches any more
MAX_PENDING: Final = 1024
"""Changes that wait to be read at most, unless the watcher says otherwise."""


class _Topic:
    """A session that somebody watches by its id.

    Attributes:
        commit, incarnation, version: of the version that readers see; `NO_ID`: not known yet.
        due: when its deadline is looked at, engine seconds.
        mailboxes: of those who watch it.
    """

    __slots__ = ("commit", "due", "incarnation", "mailboxes", "version")

    def __init__(self) -> None:
        self.commit = NO_ID
        self.incarnation = NO_ID
        self.version = 0
        self.due = NEVER
        self.mailboxes: list[Mailbox] = []

    def follow(self, record: bytes) -> None:
        """`record` is what readers see now."""
        self.incarnation = rec.incarnation_of(record)
        self.commit = rec.commit_of(record)
        self.version = rec.version_of(record)

    def tell(self, change: SessionChange) -> None:
        """Tell everybody who watches it, and may hear of this incarnation."""
        put_all(self.mailboxes, change, self.incarnation)


class Watching:
    """All watchers of one manager. Every method runs on the event loop.

    Args:
        bring: brings here what the shared tier has of a session; raises ManagerClosed.

    Attributes:
        is_on: whether anybody watches anything.
        topics: the sessions that are watched by their id.
    """

    def __init__(self, bring: Callable[[str], Awaitable[None]]) -> None:
        self.is_on = False
        self.topics: dict[str, _Topic] = {}
        self._everywhere = Everywhere()
        self._bring = bring
        self._residency: Residency
        self._time: EngineTime
        self._closed = False
        self._due: list[tuple[float, str]] = []
        self._sooner = asyncio.Event()
        self._expiring: asyncio.Task[None] | None = None

    def attach(self, residency: Residency, time: EngineTime, *, is_shared: bool) -> None:
        """Tell which tiers to look at; again when they were exchanged."""
        self._residency = residency
        self._time = time
        self._everywhere.is_shared = is_shared
        self._everywhere.forget()

    # --- coming and going ---------------------------------------------------------------------

    def watch(
        self,
        session_id: str | None,
        after: int | None,
        max_pending: int,
        permit: Permit | None = None,
    ) -> Watch:
        """Begin to listen; see `StateManager.watch`.

        Args:
            session_id: as there.
            after: as there.
            max_pending: as there.
            permit: what the reader may hear; None: everything.
        """
        if type(max_pending) is not int or not 1 <= max_pending <= MAX_COUNT:
            raise refused("max_pending", max_pending, f"a whole number from 1 to {MAX_COUNT}")
        if after is not None and (type(after) is not int or not 0 <= after <= MAX_COUNT):
            raise refused("after", after, "the version of a change that was seen, or None")
        if session_id is None and after is not None:
            raise InvalidArgument(
                "after is the version of one session: it needs a session_id. After watching all "
                "sessions, begin anew and read what matters"
            )
        key = None if session_id is None else check_session_id(session_id)
        if self._closed:
            raise ManagerClosed("the manager is closing: watch again with the next worker")
        mailbox = Mailbox(max_pending, of_all=session_id is None, permit=permit)
        begin = None
        if session_id is None or key is None:
            self._everywhere.mailboxes.append(mailbox)
        else:
            self._join(session_id, mailbox)
            begin = partial(self._begin, session_id, key, mailbox, after)
        self.is_on = True
        return Watch(mailbox, begin, partial(self._leave, session_id, mailbox))

    def _join(self, session_id: str, mailbox: Mailbox) -> None:
        topic = self.topics.get(session_id)
        if topic is None:
            topic = self.topics[session_id] = _Topic()
            record = self._residency.resident(session_id)
            if record is not None:
                topic.follow(record)
        topic.mailboxes.append(mailbox)

    def _leave(self, session_id: str | None, mailbox: Mailbox) -> None:
        mailboxes = self._everywhere.mailboxes
        if session_id is not None:
            topic = self.topics.get(session_id)
            if topic is None:
                return
            mailboxes = topic.mailboxes
            if mailboxes == [mailbox]:
                del self.topics[session_id]
        if mailbox in mailboxes:
            mailboxes.remove(mailbox)
        if not self._everywhere.mailboxes:
            self._everywhere.forget()
        self.is_on = bool(self.topics or self._everywhere.mailboxes)

    async def _begin(
        self,
        session_id: str,
        key: bytes,
        mailbox: Mailbox,
        after: int | None,
    ) -> None:
        """See that the session is there, and catch up with what came after version `after`."""
        if mailbox.has_ended():
            return  # what has come until then can be read
        try:
            await self._bring(session_id)
        except ManagerClosed:
            if mailbox.has_ended():  # meanwhile
                return
            raise
        residency = self._residency
        record = None
        if residency.is_acknowledged(session_id, key):
            record = await residency.peek(session_id, key)
        topic = self.topics.get(session_id)
        if mailbox.has_ended() or topic is None or mailbox not in topic.mailboxes:
            return  # it has ended meanwhile, and that can be read
        if record is None:
            await residency.expire_if_over(session_id, key)
            if mailbox.permit is None:
                raise SessionNotFound(session_id)
            mailbox.begin_with(None)
            mailbox.refuse()
            return
        if topic.commit == NO_ID:
            topic.follow(record)
        if mailbox.permit is not None and mailbox.permit.incarnation != topic.incarnation:
            mailbox.refuse()  # it is another session under the same id
            return
        if after is not None:
            mailbox.begin_with(_catch_up(session_id, after, topic.version))
        self._expire_at(session_id, topic, residency.acknowledged_deadline(session_id, key))

    def close(self) -> None:
        """End all streams; what is in them can still be read. Idempotent."""
        self._closed = True
        for topic in self.topics.values():
            for mailbox in topic.mailboxes:
                mailbox.end()
        for mailbox in self._everywhere.mailboxes:
            mailbox.end()
        self.topics.clear()
        self._everywhere.mailboxes.clear()
        self.is_on = False
        if self._expiring is not None:
            self._expiring.cancel()

    async def closed(self) -> None:
        """Wait until nothing of this runs any more."""
        self.close()
        if self._expiring is not None:
            await asyncio.gather(self._expiring, return_exceptions=True)

    # --- what this worker's tiers tell --------------------------------------------------------

    def acknowledged(self, commits: Sequence[Commit]) -> None:
        """Commits are in the log; memory still has the versions before them."""
        for commit in commits:
            if commit.kind == TOUCH or commit.spills:
                continue
            topic = self.topics.get(commit.session_id)
            try:
                if commit.kind == DELETE:
                    self._ended(topic, commit)
                else:
                    self._put(topic, commit)
            except Exception:  # noqa: BLE001 - logged, and the streams end
                self._give_up(commit.session_id)

    def _put(self, topic: _Topic | None, commit: Commit) -> None:
        record = commit.record
        assert record is not None, "a put carries its record"
        # Of this worker's own versions, all but the first know what they were built on.
        is_own = not commit.local
        before = commit.before
        if topic is None and not (is_own and self._everywhere.mailboxes):
            return
        if before is None and not commit.creates:
            before = self._residency.resident(commit.session_id)
        if topic is not None:
            kind = self._kind_of_next(topic, record, before)
            if commit.creates:
                kind = "created"
            fields = None
            if kind is not None and kind != "reset":
                fields = _fields(commit, before)
            self._tell_next(commit.session_id, topic, record, kind, fields, local=is_own)
            if commit.deadline < topic.due:
                self._expire_at(commit.session_id, topic, commit.deadline)
        if is_own and self._everywhere.mailboxes:
            if commit.creates:
                self._everywhere.put(commit, "created", _fields(commit, None))
            elif before is None or rec.version_of(before) != rec.version_of(record):
                self._everywhere.put(commit, "updated", _fields(commit, before))

    def adopted(self, session_id: str, record: bytes, deadline: float) -> None:
        """A version of the shared tier is about to take the place of what is here."""
        topic = self.topics.get(session_id)
        if topic is None:
            return
        try:
            self._take_over(session_id, topic, record, deadline)
        except Exception:  # noqa: BLE001 - logged, and the streams end
            self._give_up(session_id)

    def _take_over(self, session_id: str, topic: _Topic, record: bytes, deadline: float) -> None:
        kind: Kind | None = None
        fields = None
        if topic.commit != NO_ID:  # else it is what the watcher begins with
            before = self._residency.readable(session_id, session_id.encode())
            kind = self._kind_of_next(topic, record, before)
            if kind is not None and kind != "reset" and before is not None:
                fields = changed_fields(before, record)
        self._tell_next(session_id, topic, record, kind, fields, local=False)
        if deadline < topic.due:
            self._expire_at(session_id, topic, deadline)

    def _kind_of_next(self, topic: _Topic, record: bytes, before: bytes | None) -> Kind | None:
        """Return what `record` is after the version that was told last; None: nothing new."""
        if rec.commit_of(record) == topic.commit:
            return None  # it only got into the log
        if topic.commit == NO_ID:
            return "updated"
        if rec.incarnation_of(record) != topic.incarnation:
            return "reset"
        version = rec.version_of(record)
        if version == topic.version and before is not None and not changed_fields(before, record):
            return None  # another TTL
        return "updated" if version > topic.version else "reset"

    def _tell_next(
        self,
        session_id: str,
        topic: _Topic,
        record: bytes,
        kind: Kind | None,
        fields: frozenset[str] | None,
        *,
        local: bool,
    ) -> None:
        """Let `record` be what readers see, and tell of it; `kind` None: that is nothing new."""
        version = rec.version_of(record)
        skipped = 0
        if kind == "updated" and topic.commit != NO_ID:
            skipped = version - topic.version - 1
        topic.follow(record)  # first: who may not hear of this incarnation is told nothing of it
        if kind is not None:
            topic.tell(SessionChange(session_id, version, kind, fields, skipped, local))

    def _ended(self, topic: _Topic | None, commit: Commit) -> None:
        kind: Kind = "expired" if commit.expired else "terminated"
        if topic is not None:
            if topic.incarnation == NO_ID:
                topic.incarnation = commit.ids[:ID_BYTES]
            self._end_topic(
                commit.session_id, topic, kind, local=not commit.local or commit.expired
            )
        if self._everywhere.mailboxes and (not commit.local or commit.expired):
            record = self._residency.resident(commit.session_id)
            version = 0 if record is None else rec.version_of(record)
            self._everywhere.end(commit, kind, version)

    def _end_topic(self, session_id: str, topic: _Topic, kind: Kind, *, local: bool) -> None:
        topic.tell(SessionChange(session_id, topic.version, kind, NO_FIELDS, 0, local))
        for mailbox in topic.mailboxes:
            mailbox.end()
        del self.topics[session_id]
        self.is_on = bool(self.topics or self._everywhere.mailboxes)

    def _give_up(self, session_id: str) -> None:
        """End the streams that a change could not be worked out for: they would miss it."""
        _log.exception(
            "what changed in session %s cannot be told: the streams that would have to are ended",
            printable(session_id),
        )
        topic = self.topics.pop(session_id, None)
        everywhere = self._everywhere.mailboxes
        for mailbox in [*everywhere, *(() if topic is None else topic.mailboxes)]:
            mailbox.end()
        everywhere.clear()
        self._everywhere.forget()
        self.is_on = bool(self.topics)

    async def restored(self) -> None:
        """A restored state is in place of all sessions."""
        for session_id, topic in list(self.topics.items()):
            key = session_id.encode()
            record = None
            if self._residency.is_acknowledged(session_id, key):
                try:
                    record = await self._residency.peek(session_id, key)
                except CorruptionError as error:
                    _log.warning("a watched session cannot be read any more: %s", error)
            if self.topics.get(session_id) is not topic:
                continue
            if record is None:
                self._end_topic(session_id, topic, "terminated", local=True)
                continue
            topic.follow(record)
            topic.tell(SessionChange(session_id, topic.version, "reset", None))
            deadline = self._residency.acknowledged_deadline(session_id, key)
            self._expire_at(session_id, topic, deadline)
        self._everywhere.tell(reset_of_all())

    # --- what the shared tier tells -----------------------------------------------------------

    def announced(self, announcements: Sequence[Announcement]) -> None:
        """Other workers committed. Sessions that are watched by their id are taken over for it."""
        if self._everywhere.mailboxes:
            self._everywhere.announced(announcements)

    def reconnected(self) -> None:
        """Announcements may have been missed. Sessions watched by their id are compared for it."""
        self._everywhere.forget()
        self._everywhere.tell(gap())

    # --- deadlines ----------------------------------------------------------------------------

    def _expire_at(self, session_id: str, topic: _Topic, deadline: float | None) -> None:
        """Look at a session when its deadline has come: nobody else may, for a long time."""
        if deadline is None or deadline == NEVER or self._closed:
            return
        topic.due = deadline
        heappush(self._due, (deadline, session_id))
        if len(self._due) > 2 * len(self.topics) + _MOST_LEFT_OVER:
            self._due = [(each.due, name) for name, each in self.topics.items()]
            heapify(self._due)
        if self._expiring is None or self._expiring.done():
            self._expiring = asyncio.create_task(self._expire(), name="persistence-watching")
            self._expiring.add_done_callback(self._expired)
        elif self._due[0][0] == deadline:
            self._sooner.set()

    def _expired(self, task: asyncio.Task[None]) -> None:
        if self._expiring is task:
            self._expiring = None
        if not task.cancelled() and task.exception() is not None:
            _log.error("ending what is watched at its deadline stopped", exc_info=task.exception())

    async def _expire(self) -> None:
        """End sessions that are watched when their time is over, until none is watched."""
        while self._due:
            due, session_id = self._due[0]
            left = due - self._time.now()
            topic = self.topics.get(session_id)
            if topic is None or topic.due != due:
                heappop(self._due)  # it is not watched any more, or is looked at another time
                continue
            if left > 0:
                # Not for long at once: a clock that is not the system's may be set meanwhile.
                await self._sleep(min(left, _LONGEST_WAIT_SECONDS))
                continue
            heappop(self._due)
            await self._look_at(session_id, topic)

    async def _sleep(self, seconds: float) -> None:
        self._sooner.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._sooner.wait()
        except TimeoutError:
            return

    async def _look_at(self, session_id: str, topic: _Topic) -> None:
        """End a session if its time is over; else come again at its deadline."""
        key = session_id.encode()
        topic.due = NEVER
        residency = self._residency
        deadline = residency.acknowledged_deadline(session_id, key)
        if deadline is not None and deadline <= self._time.now():
            await residency.expire(session_id, key)
            if self.topics.get(session_id) is not topic:
                return
            deadline = self._residency.acknowledged_deadline(session_id, key)
            if deadline is not None and deadline <= self._time.now():  # the disk took no end
                deadline = self._time.now() + _AGAIN_SECONDS
        self._expire_at(session_id, topic, deadline)


def _fields(commit: Commit, before: bytes | None) -> frozenset[str] | None:
    """Return what a commit changed in the version `before` it; None: that is not known."""
    assert commit.record is not None, "a put carries its record"
    if commit.creates:
        return frozenset(rec.field_names(commit.record))
    if commit.changed is not None:
        return frozenset(commit.changed)
    return None if before is None else changed_fields(before, commit.record)


def _catch_up(session_id: str, after: int, version: int) -> SessionChange | None:
    """Return what to tell somebody who has seen version `after` and missed what followed."""
    if version == after:
        return None
    if version < after:  # restored, or begun anew
        return SessionChange(session_id, version, "reset", None)
    return SessionChange(session_id, version, "updated", None, version - after - 1)
