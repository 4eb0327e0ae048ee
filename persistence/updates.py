"""From a change to a commit: what an update is built on, the next version, edits.

Nothing awaits between looking at the newest version of a session and submitting the next one, so
two updates can never be built on the same version. Editors hold the session's lock meanwhile, and
other writers of that session wait for them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, NoReturn

from persistence import record as rec
from persistence.arguments import check_mapping, check_ttl
from persistence.clock import EngineTime
from persistence.commit import Commit, CommitQueue, committed, row_user
from persistence.config import SessionConfig
from persistence.disk.format import PUT, user_tag
from persistence.errors import (
    ConflictError,
    InvalidArgument,
    Overtaken,
    SessionNotFound,
    ValueTooLarge,
    printable,
)
from persistence.expiry import deadline_after, life_of
from persistence.ids import CommitIds, check_session_id, plain_id
from persistence.locks import SessionLocks
from persistence.memory.tier import MemoryTier, deadline_of
from persistence.record import FIXED_BYTES, ID_BYTES, NO_ID, RENEWS
from persistence.residency import Base, Residency
from persistence.session import REQUESTS, Changes, Session, SessionDraft
from persistence.sharing.sharing import Sharing

_IDS_BYTES: Final = 2 * ID_BYTES
_view = Session.view


@dataclass(frozen=True, slots=True)
class Change:
    """What an update does to a session.

    Attributes:
        data: gets the newest record, returns what changes in its fields; None: nothing changes.
        meta: gets the newest record, returns the new packed metadata.
        ttl_seconds: the new TTL, from now on; None: as it was.
        same_version: it is not a new version for people.
    """

    data: Callable[[bytes], Changes | None]
    meta: Callable[[bytes], bytes] | None = None
    ttl_seconds: float | None = None
    same_version: bool = False


def whole_change(data: Mapping[str, Any], ttl_seconds: float | None) -> Change:
    """Return the change that replaces all fields, and the TTL unless it is None.

    Raises:
        InvalidArgument, ValueNotSerializable: they cannot be stored.
    """
    fields = packed_data(data)
    ttl = None if ttl_seconds is None else check_ttl(ttl_seconds)
    return Change(lambda _: Changes({}, fields), ttl_seconds=ttl)


def ttl_change(ttl_seconds: float) -> Change:
    """Return the change that sets the TTL, from now on, and nothing else.

    Raises:
        InvalidArgument: it is no duration.
    """
    ttl = check_ttl(ttl_seconds)
    return Change(lambda _: Changes({}), ttl_seconds=ttl, same_version=True)


def field_change(field: str, value: Any) -> Change:
    """Return the change that sets one field.

    Raises:
        InvalidArgument, ValueNotSerializable: it cannot be stored.
    """
    packed = rec.pack_value(value, rec.check_field_name(field))

    def change(record: bytes) -> Changes:
        if field in rec.field_names(record):
            return Changes({field: packed})
        return Changes({}, {**rec.packed_fields(record), field: packed})

    return Change(change)


def metadata_change(changes: Mapping[str, Any]) -> Change:
    """Return the change that sets some metadata, which have been checked."""

    def change_meta(record: bytes) -> bytes:
        return rec.pack_meta({**rec.meta_of(record), **changes})

    def no_data(record: bytes) -> Changes | None:
        is_same = change_meta(record) == rec.packed_meta(record)
        return None if is_same else Changes({})

    return Change(no_data, change_meta)


def packed_data(data: Mapping[str, Any]) -> dict[str, bytes | memoryview]:
    """Return the fields of a session as they are stored.

    Raises:
        InvalidArgument, ValueNotSerializable: they cannot be stored.
    """
    return {
        rec.check_field_name(name): rec.pack_value(value, name)
        for name, value in check_mapping("data", data).items()
    }


class Updates:
    """Builds versions and submits them.

    Args:
        config: ``max_bytes``, ``max_lifetime_seconds``.
        time: the engine's time base.
        memory: the memory tier.
        residency: finds what an update is built on.
        commits: where versions are submitted to.
        check_open: raises ManagerClosed once the manager is closed.
        sharing: the shared tier, if there is one.
    """

    def __init__(
        self,
        config: SessionConfig,
        time: EngineTime,
        memory: MemoryTier,
        residency: Residency,
        commits: CommitQueue,
        check_open: Callable[[], None],
        sharing: Sharing | None,
    ) -> None:
        self.locks = SessionLocks()
        self._max_record_bytes = config.max_bytes + FIXED_BYTES
        self._max_lifetime_seconds = config.max_lifetime_seconds
        self._time = time
        self._now = time.now
        self._monotonic = time.monotonic
        self._time_base = time.base
        self._memory = memory
        self._residency = residency
        self._fingerprint = residency.disk.fingerprint
        self._commits = commits
        self._commit_ids = CommitIds()
        self._new_id = self._commit_ids.next
        self._check_open = check_open
        self._sharing = sharing

    @property
    def is_cut_off(self) -> bool:
        """Whether there is a shared tier, and it is away: what is committed now is a branch."""
        return self._sharing is not None and not self._sharing.is_up

    async def prepare(self, session_id: str) -> None:
        """Bring here what the shared tier has of a session that is about to be updated."""
        if self._sharing is not None:
            await self._sharing.current(session_id)

    async def admit(self) -> None:
        """Wait while too much is in flight: the back-pressure of a slow disk."""
        if self._commits.is_full:
            await self._commits.admission()
            self._check_open()

    # --- from other threads -------------------------------------------------------------------
    #
    # The event loop's thread hands out what is newest and takes what was made of it; in between
    # another thread does the work: it calls the function that changes a draft.

    def newest(self, session_id: str) -> bytes | None:
        """Return the newest record of a session, if it is at hand. From any thread: only reads."""
        tail = self._commits.tails.get(session_id)
        return self._memory.peek(session_id) if tail is None else tail.record

    def submit_on(self, session_id: str, record: bytes, changes: Changes) -> Commit | None:
        """Submit what was changed in `record`, unless that is not the newest version any more.

        Never awaits, as `made_now`; None also if something would have to be waited for.
        """
        if self._commits.is_full or session_id in self.locks:
            return None
        if self._sharing is not None and not self._sharing.is_current(session_id):
            return None
        base = self._residency.base_now(session_id)
        if base is None or base[0] is not record:
            return None
        return self.next_version(session_id, session_id.encode(), base, changes)

    # --- updating -----------------------------------------------------------------------------

    def made_now(
        self, session_id: str, function: Callable[[SessionDraft], object]
    ) -> Commit | Base | None:
        """Submit what `function` changes in a draft, if nothing has to be waited for before that.

        The hot path. Never awaits, so nothing comes between looking and submitting.

        Returns:
            The commit to wait for. Or what there is, if nothing was changed. Or None: something
            has to be waited for, and `function` was not called; `by_function` does it.
        """
        if self._commits.is_full:
            return None
        if self._sharing is not None and not self._sharing.is_current(session_id):
            return None
        try:
            if session_id in self.locks.holders:
                return None
        except TypeError:  # not hashable, so no session id: `apply` says it better
            return None
        base = self._residency.base_now(session_id)
        if base is None:
            return None
        changes = drafted(base[0], function)
        if changes is None:
            return base
        self._check_newest(session_id, base[0])
        return self.next_version(session_id, session_id.encode(), base, changes)

    async def by_function(
        self, session_id: str, function: Callable[[SessionDraft], object]
    ) -> Session:
        """Commit what `function` changes in a draft. The manager must be open."""
        return await self.apply(session_id, Change(lambda record: drafted(record, function)))

    async def apply(self, session_id: str, change: Change) -> Session:
        """Build a version on the newest one and commit it; again when another worker was first."""
        session_id = plain_id(session_id)
        while True:
            try:
                return await self._apply_once(session_id, change)
            except Overtaken:
                continue  # `prepare` now knows that the copy here is out of date

    async def _apply_once(self, session_id: str, change: Change) -> Session:
        self._check_open()
        key = check_session_id(session_id)
        await self.admit()
        await self.prepare(session_id)
        base = None
        if session_id not in self.locks:
            base = self._residency.base_now(session_id)
            if base is None:
                base = await self._residency.base(session_id, key)
                if session_id in self.locks:
                    base = None  # an edit began while the session was being read
        if base is not None:
            commit = self._changed(session_id, key, base, change)
        else:
            async with self.locks.holding(session_id):
                base = await self._residency.base(session_id, key)
                commit = self._changed(session_id, key, base, change)
        if commit is None:
            return await self.unchanged(session_id, key, base)
        assert commit.done is not None, "submitted to be waited for"
        await commit.done
        return self.view(commit)

    def view(self, commit: Commit) -> Session:
        """Return a view of the version that a commit made."""
        record = commit.record
        assert record is not None, "an update carries its record"
        life, cap = commit.life, commit.cap
        return _view(commit.session_id, record, commit.accessed, (life, cap, self._time))

    async def unchanged(self, session_id: str, key: bytes, base: Base) -> Session:
        """Answer an update that changed nothing: with an access, and what is there.

        What it found may be in flight still; it is only said to be so once that is durable.

        Raises:
            DiskFull, WriteOutcomeUnknown: what it found could not be written.
        """
        await self._commits.outcome(session_id)
        session = self._memory.access(session_id)
        return session or self.access_uncached(session_id, key, base)

    def access_uncached(self, session_id: str, key: bytes, base: Base) -> Session:
        """Return a view of a session that is too large to be resident, and renew it."""
        record, life, cap = base
        now = self._now()
        deadline = min(deadline_of(now, life), cap)
        fingerprint = self._fingerprint(key)
        self._residency.note_access(session_id, key, fingerprint, record, now, life, deadline)
        return Session.view(session_id, record, now, (life, cap, self._time))

    async def annotate(self, session_id: str, change: Callable[[bytes], bytes | None]) -> bool:
        """Commit other metadata of a session, beside its editors: no access, and no version.

        Editors are not waited for: what they commit is built on this (see `Edit`).

        Args:
            session_id: which one.
            change: gets the newest record, in flight or not; returns the new packed metadata, or
                None: nothing changes. Called right before the submission.

        Returns:
            Whether something was committed.

        Raises:
            SessionNotFound: missing, expired or terminated.
            Overtaken: another worker's commit came first; nothing was written.
            DiskFull, WriteOutcomeUnknown: see `commit`.
        """
        key = check_session_id(session_id)
        if self._commits.is_full:
            await self._commits.admission()
        await self.prepare(session_id)
        (before, life, cap), accessed = await self._residency.aside_base(session_id, key)
        meta = change(before)
        if meta is None:
            return False
        record = rec.with_meta(before, self._new_id(), meta)
        commit = self._residency.put_commit(
            session_id, key, record, accessed, life, cap, rec.commit_of(before)
        )
        commit.before = before
        commit.changed = {}
        self._commits.submit(commit)
        await committed(commit)
        return True

    # --- versions -----------------------------------------------------------------------------

    def _changed(self, session_id: str, key: bytes, base: Base, change: Change) -> Commit | None:
        """Submit the changed version; None when nothing changed. Never awaits."""
        changes = change.data(base[0])
        if changes is None:
            return None
        self._check_newest(session_id, base[0])
        if change.meta is None and change.ttl_seconds is None:
            return self.next_version(session_id, key, base, changes)
        return self._rebuilt(session_id, key, base, change, changes)

    def _check_newest(self, session_id: str, record: bytes) -> None:
        """See that `record` is still the newest version, once a caller's function has seen it.

        The function must not await, but what it starts may run inside of it: a task, where the
        event loop makes eager ones, or a finalizer.

        Raises:
            ConflictError: it has written to the session.
        """
        tail = self._commits.tails.get(session_id)
        if tail is not None and tail.record is not record:
            raise ConflictError(
                f"session {printable(session_id)} was written to while the function that changes "
                "it ran, by that function or by what it has started; nothing of what it changed "
                "was written: let it change its draft and nothing else"
            )

    def next_version(self, session_id: str, key: bytes, base: Base, changes: Changes) -> Commit:
        """Submit the version after `base` with other data. Never awaits. The hot path."""
        before, life, cap = base
        now = self._monotonic() + self._time_base
        deadline = now + life if life > 0 else -life
        deadline = min(deadline, cap)
        values, fields, layout = changes
        if fields is None:
            record = rec.patched(before, self._new_id(), values, layout or rec.layout_of(before))
        else:
            record = rec.successor(before, self._new_id(), fields)
        if len(record) > self._max_record_bytes:
            self._refuse_size(session_id, record)
        commit = Commit(
            PUT,
            session_id,
            key,
            self._fingerprint(key),
            record,
            record[:_IDS_BYTES] + before[ID_BYTES:_IDS_BYTES],
            now,
            deadline,
            cap,
            life,
            row_user(record),
        )
        commit.before = before
        if fields is None:
            commit.changed = values
        self._commits.submit(commit)
        return commit

    def _rebuilt(
        self,
        session_id: str,
        key: bytes,
        base: Base,
        change: Change,
        changes: Changes,
    ) -> Commit:
        """Submit the version after `base` with another TTL or other metadata. Never awaits."""
        before, life, cap = base
        head = rec.head(before)
        now = self._now()
        ttl_seconds = head.ttl_seconds if change.ttl_seconds is None else change.ttl_seconds
        if change.ttl_seconds is None and life < 0:
            deadline = -life  # fixed, and nobody asked to change it
        else:
            deadline = deadline_after(now, ttl_seconds)
        record = rec.assemble(
            incarnation=head.incarnation,
            commit=self._commit_ids.next(),
            version=head.version + (not change.same_version),
            created=head.created,
            ttl_seconds=ttl_seconds,
            flags=head.flags,
            user=head.user,
            meta=rec.packed_meta(before) if change.meta is None else change.meta(before),
            fields=all_fields(before, changes),
        )
        life = life_of(ttl_seconds, head.renews, deadline)
        return self._submit(session_id, key, record, now, life, cap, before)

    def create(  # noqa: PLR0913 - one parameter for each part of a session
        self,
        session_id: str,
        key: bytes,
        *,
        fields: Mapping[str, bytes | memoryview],
        meta: bytes,
        user_id: str | None,
        ttl_seconds: float,
        renews: bool,
        deadline: float | None = None,
        cap: float | None = None,
    ) -> Commit:
        """Submit the first version of a session. Never awaits.

        Args:
            session_id: whose; what there is of a session under this id is replaced.
            key: its id as UTF-8.
            fields: packed.
            meta: packed.
            user_id: whose it is.
            ttl_seconds: 0: never expires.
            renews: whether an access moves the deadline.
            deadline: when it expires, wall seconds; None: a TTL from now.
            cap: when it ends at the latest, wall seconds; None: as configured.

        Raises:
            ValueTooLarge: it exceeds ``session.max_bytes``.
        """
        now, skew = self._time.tick(), self._time.skew()
        record = rec.assemble(
            incarnation=self._commit_ids.next(),
            commit=self._commit_ids.next(),
            version=1,
            created=now + skew,
            ttl_seconds=ttl_seconds,
            flags=RENEWS if renews else 0,
            user=user_tag(user_id),
            meta=meta,
            fields=fields,
        )
        ends = deadline_after(now, ttl_seconds) if deadline is None else deadline - skew
        life = life_of(ttl_seconds, renews, ends)
        cap = deadline_after(now, self._max_lifetime_seconds) if cap is None else cap - skew
        return self._submit(session_id, key, record, now, life, cap, None)

    def new_incarnation(self) -> bytes:
        """Return a fresh incarnation id."""
        return self._commit_ids.next()

    def copy(self, base: Base, session_id: str, incarnation: bytes) -> Commit:
        """Submit the first version of a session that is all that `base` is, but for its id.

        What it may live at most stays as it was; its TTL starts anew if it renews. Never awaits.
        """
        record, life, cap = base
        copied = b"".join(
            (incarnation, self._commit_ids.next(), record[_IDS_BYTES:])  # all but its two ids
        )
        now, key = self._time.tick(), session_id.encode()
        return self._submit(session_id, key, copied, now, life, cap, None)

    def _submit(
        self,
        session_id: str,
        key: bytes,
        record: bytes,
        now: float,
        life: float,
        cap: float,
        before: bytes | None,
    ) -> Commit:
        """Submit `record`, which was built on `before`; None: it creates the session."""
        if len(record) > self._max_record_bytes:
            self._refuse_size(session_id, record)
        base = NO_ID if before is None else rec.commit_of(before)
        commit = self._residency.put_commit(session_id, key, record, now, life, cap, base)
        commit.before = before
        commit.creates = before is None
        self._commits.submit(commit)
        return commit

    def _refuse_size(self, session_id: str, record: bytes) -> None:
        """Refuse a record that is too large, unless it is only for what the engine added."""
        record_bytes = len(record) - _counted_bytes(record)
        if record_bytes <= self._max_record_bytes:
            return
        raise ValueTooLarge(
            f"session {printable(session_id)} would have {record_bytes - FIXED_BYTES} bytes and "
            f"session.max_bytes is {self._max_record_bytes - FIXED_BYTES}; nothing was written"
        )


class Edit:
    """The context manager behind `StateManager.edit`.

    Attributes:
        commit: what it committed, once it has ended; None: it changed nothing.
    """

    __slots__ = (
        "_base",
        "_changes",
        "_current",
        "_draft",
        "_key",
        "_residency",
        "_session_id",
        "_updates",
        "commit",
    )

    def __init__(self, current: Callable[[], Awaitable[Updates]], session_id: str) -> None:
        self._current = current
        self._session_id = plain_id(session_id)
        self.commit: Commit | None = None

    async def __aenter__(self) -> SessionDraft:
        updates = self._updates = await self._current()
        self._residency = updates._residency
        self._key = check_session_id(self._session_id)
        await updates.admit()
        await updates.locks.acquire(self._session_id)
        try:
            updates._check_open()
            await updates.prepare(self._session_id)
            self._base = await self._residency.base(self._session_id, self._key)
            self._draft = SessionDraft(self._base[0])
        except BaseException:
            updates.locks.release(self._session_id)
            raise
        return self._draft

    @property
    def record(self) -> bytes:
        """The record that the draft was made of."""
        return self._base[0]

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        commit = None
        try:
            if kind is None:
                commit = self.commit = await self._submit()
        finally:
            self._draft.close()
            self._updates.locks.release(self._session_id)
        while commit is not None:
            try:
                await committed(commit)
                return
            except Overtaken:
                # Perhaps only by one that notes requests, which leaves the data as it was. Under
                # the lock, so that no other editor is overtaken by this one in turn.
                async with self._updates.locks.holding(self._session_id):
                    await self._updates.prepare(self._session_id)
                    now = await self._residency.base(self._session_id, self._key)
                    if not rec.has_same_data(now[0], self._base[0]):
                        raise
                    commit = self.commit = self._next_version(now)

    async def _submit(self) -> Commit | None:
        """Submit what was changed, on the version that the draft was made of.

        Writers wait for the editor, so three things only can have come between. An end: then the
        incarnation is another one, or there is none. Or the version that the draft was made of
        was still in flight and failed: nothing may be built on it. Or `Updates.annotate`, which
        leaves the data as it was.
        """
        changes = self._draft.changes()
        now = await self._residency.base(self._session_id, self._key)
        if rec.incarnation_of(now[0]) != rec.incarnation_of(self._base[0]):
            self._updates._commits.check_open()  # it has been restored from a checkpoint
            raise SessionNotFound(self._session_id)
        is_same = rec.commit_of(now[0]) == rec.commit_of(self._base[0])
        if not is_same and not rec.has_same_data(now[0], self._base[0]):
            raise ConflictError(
                f"session {printable(self._session_id)}: the version that this edit was made of "
                "is not the newest any more (another worker's commit came first, or it could not "
                "be written); nothing was written: edit again"
            )
        if changes is None:
            await self._updates.unchanged(self._session_id, self._key, now)
            return None
        self._changes = changes
        if not is_same:
            return self._next_version(now)
        return self._updates.next_version(self._session_id, self._key, now, changes)

    def _next_version(self, now: Base) -> Commit:
        """Submit the same changes on another record of the same data."""
        # Where the fields lie in it depends on how long its metadata are.
        changes = self._changes._replace(layout=None)
        return self._updates.next_version(self._session_id, self._key, now, changes)


def _counted_bytes(record: bytes) -> int:
    """Return what the metadata take for the session's requests: no part of what it holds."""
    noted = rec.meta_of(record).get(REQUESTS)
    return 0 if noted is None else len(rec.pack_meta({REQUESTS: noted}))


def _refuse_awaitable(result: Any) -> NoReturn:
    """Raise what is wrong with an asynchronous function; let nobody warn of its remains."""
    for end in ("close", "cancel"):  # of a coroutine, of a task
        if hasattr(result, end):
            getattr(result, end)()
            break
    raise InvalidArgument(
        "function returned an awaitable: update_session takes a synchronous function; use "
        "'async with state.edit(session_id) as draft' for one that awaits. Nothing was written"
    )


def drafted(record: bytes, function: Callable[[SessionDraft], object]) -> Changes | None:
    """Return what `function` changes in a draft of `record`; None: nothing."""
    draft = SessionDraft(record)
    try:
        result = function(draft)
        if result is not None and hasattr(result, "__await__"):
            _refuse_awaitable(result)
        return draft.changes()
    finally:
        draft._closed = True  # `close`, without the call


def change_draft(draft: SessionDraft, function: Callable[[SessionDraft], object]) -> None:
    """Let `function` change a draft that belongs to an edit.

    Raises:
        InvalidArgument: it returned an awaitable.
    """
    result = function(draft)
    if result is not None and hasattr(result, "__await__"):
        _refuse_awaitable(result)


def all_fields(record: bytes, changes: Changes) -> Mapping[str, bytes | memoryview]:
    """Return all packed fields of `record` once it is changed."""
    if changes.fields is not None:
        return changes.fields
    return {**rec.packed_fields(record), **changes.values}
