"""The group-commit queue: many updates, one write, one sync.

While one batch is being written and synced in the writer thread, the next one gathers. When the
sync returns, the batch is acknowledged in order: the index and the memory tier learn of it, then
the waiters are woken, a few in each turn of the loop, because waking a thousand tasks at once is a
stall of its own. A commit that comes while nothing is under way is written alone, without the task.

Invariants:
- The memory tier and the index hold acknowledged versions only. Versions in flight form a chain
  per session; `tails` names the newest, and the next update of the session builds on that one.
- Acknowledgements come in the order of submission. When a commit fails, every commit of the same
  session behind it fails with it: they were built on it.
- A caller that is cancelled only stops waiting. What was submitted is decided here.
- With a shared tier, a batch is *decided* there before it is written; what it refuses fails here.
  While one batch is being decided, the one before it is being written.

=============== ===================== ===================== =====================
``disk.fsync``  acknowledged          survives ``kill -9``  survives power loss
=============== ===================== ===================== =====================
``always``      after fdatasync       yes                   yes
``interval``    after write           yes                   all but the last interval
``never``       after write           yes                   what the kernel wrote
=============== ===================== ===================== =====================
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

from persistence.clock import Clock
from persistence.commit.batches import (
    THREAD_ENCODE_BYTES,
    joined,
    next_batch,
    pieces,
    remove_first,
    take_out,
    woken_together,
)
from persistence.commit.commits import Commit
from persistence.commit.syncs import Syncs
from persistence.config import DiskConfig
from persistence.disk.format import PUT, TOUCH
from persistence.disk.tier import DiskTier
from persistence.errors import (
    DiskFull,
    ManagerClosed,
    Overtaken,
    PersistenceError,
    SessionExists,
    WriteOutcomeUnknown,
    again,
)
from persistence.slices import Slices

_log = logging.getLogger("persistence.commit")

_MAX_BATCH_BYTES: Final = 2 * 2**20
_LATENCIES_KEPT: Final = 1024


Decide: TypeAlias = Callable[
    [Sequence[Commit]],
    Awaitable[tuple[list[Commit], list[tuple[Commit, PersistenceError]]]],
]


class CommitQueue:
    """Owns the task that commits. Every method runs on the event loop.

    Args:
        disk: where frames go.
        config: ``fsync``, ``flush_interval_seconds``, ``queue_bytes``, ``segment_bytes``.
        clock: time.
        acknowledged: called with commits, in order, once the index knows them, before their
            waiters wake.
        failed: called for each commit that failed.
    """

    def __init__(
        self,
        disk: DiskTier,
        config: DiskConfig,
        clock: Clock,
        *,
        acknowledged: Callable[[Sequence[Commit]], None],
        failed: Callable[[Commit], None],
    ) -> None:
        self.tails: dict[str, Commit] = {}
        self.pending_bytes = 0
        self.creating = 0
        self.committed = 0
        self.batches = 0
        self.latencies_seconds: deque[float] = deque(maxlen=_LATENCIES_KEPT)
        self._disk = disk
        self._sync_each_batch = config.fsync == "always"
        self._max_pending_bytes = config.queue_bytes
        self._max_batch_bytes = min(_MAX_BATCH_BYTES, config.segment_bytes // 2)
        self._monotonic = clock.monotonic
        self._acknowledged = acknowledged
        self._failed = failed
        self._queue: deque[Commit] = deque()
        self._work = asyncio.Event()
        # Where commits arrive: at the queue itself, unless they have to be decided first.
        self._arrivals = self._queue
        self._arrived = self._work
        self._decide: Decide | None = None
        self._deciding: list[Commit] = []
        self._decider: asyncio.Task[None] | None = None
        self._closing = False
        self._why_closed: PersistenceError | None = None
        self._ending = False
        self._submitted = 0
        self._inflight: list[list[Commit]] = []
        self._broken: WriteOutcomeUnknown | None = None
        self._admissions: deque[asyncio.Future[None]] = deque()
        self._syncs = Syncs(
            disk, config, oldest_undecided=self._oldest_undecided, wake=self._work.set
        )
        self._failure: BaseException | None = None  # what the task is to end with
        # A commit that is written alone, while the task waits for work (see `_start_alone`).
        self._alone: Commit | None = None
        self._is_idle = False
        self._gathers = False  # whether the last batch was one of several
        self._task: asyncio.Task[None] | None = None

    # --- what callers do ----------------------------------------------------------------------

    def share(self, decide: Decide) -> None:
        """Let a shared tier decide every batch before it is written. To be called before `start`.

        Args:
            decide: gets a batch in order; returns what may be written of it, in order, and what
                fails, each with its error. Raises no PersistenceError.
        """
        self._decide = decide
        self._arrivals = deque()
        self._arrived = asyncio.Event()

    def start(self) -> None:
        """Start the committing task."""
        self._loop = asyncio.get_running_loop()
        if self._decide is not None:
            self._decider = self._started(self._decide_until_closed(self._decide), "decide")
        self._task = self._started(self._commit_until_closed(), "commit")

    def _started(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"persistence-{name}")
        task.add_done_callback(self._ended)
        return task

    @property
    def is_full(self) -> bool:
        """Whether a caller should wait in `admission` before it builds an update.

        Also while others wait: whoever comes later gets its turn later.
        """
        return self.pending_bytes >= self._max_pending_bytes or bool(self._admissions)

    async def admission(self) -> None:
        """Wait while more than ``disk.queue_bytes`` are in flight: the back-pressure.

        Woken one after the other: each wakes the next once it has got through, and by then has
        usually submitted, so that a thousand waiters do not overshoot the bound together.
        """
        if not self.is_full:
            return
        turn: asyncio.Future[None] = self._loop.create_future()
        self._admissions.append(turn)
        while True:
            try:
                await turn
            except asyncio.CancelledError:
                self._admissions.remove(turn)
                self._admit()  # it may have been this one's turn: pass it on
                raise
            # Only the first in line is ever woken, and it stays first until it gets through.
            assert self._admissions[0] is turn, "somebody got in front"
            if self.pending_bytes < self._max_pending_bytes:
                break
            turn = self._admissions[0] = self._loop.create_future()
        self._admissions.popleft()
        self._admit()

    def check_open(self) -> None:
        """Raise what whoever submits is told, if no more is taken."""
        if self._closing:
            raise again(
                self._broken
                or self._why_closed
                or ManagerClosed("the manager is closing: no more updates")
            )

    def submit(self, commit: Commit, *, wait: bool = True) -> None:
        """Queue `commit`; with `wait`, its ``done`` resolves or fails once it is decided.

        A put or a tombstone becomes the tail of its session's chain (a spill does not: it is no
        new version). No await may lie between looking at the chain and this call.
        """
        if self._closing:
            self.check_open()
        if wait:
            commit.done = asyncio.Future(loop=self._loop)
        # Where memory lacks, an update is refused whole: a tail that is not queued would hold its
        # session for ever.
        number, pending_bytes = self._submitted + 1, self.pending_bytes + commit.nbytes
        is_first = not self._arrivals
        if commit.kind != TOUCH and not commit.spills:
            commit.previous = self.tails.get(commit.session_id)
            self.tails[commit.session_id] = commit
        try:
            self._arrivals.append(commit)
        except MemoryError:
            self._shorten(commit)
            raise
        commit.number = self._submitted = number
        self.pending_bytes = pending_bytes
        if commit.creates:
            self.creating += 1
        try:
            if is_first and not self._start_alone(commit):
                self._arrived.set()
        except MemoryError:  # it is queued, and whoever comes next would not wake the task
            self._arrived.set()

    async def flush(self) -> None:
        """Wait until everything submitted so far is decided and synced, in every mode.

        Raises:
            WriteOutcomeUnknown: a sync failed.
        """
        if self._broken is not None:
            raise self._broken
        if self._ending and (self._task is None or self._task.done()):
            # Closed, or exchanged for another one, while whoever asks was at work: all is decided,
            # and nobody is there to answer any more.
            self._disk.writer.check_usable()
            return
        await self._syncs.flushed(self._submitted)

    async def decided(self, session_id: str) -> None:
        """Wait until what is in flight of one session now is decided."""
        tail = self.tails.get(session_id)
        if tail is None:
            return
        if tail.done is None or tail.done.done():
            # Nobody waits for it, or whoever did was cancelled.
            await self.flush()
            return
        decided: asyncio.Future[None] = self._loop.create_future()

        def resolve(_: object) -> None:
            if not decided.done():
                decided.set_result(None)

        tail.done.add_done_callback(resolve)
        await decided

    async def outcome(self, session_id: str) -> None:
        """Wait until what is in flight of one session is acknowledged.

        Raises:
            DiskFull, WriteOutcomeUnknown: it failed.
        """
        tail = self.tails.get(session_id)
        while tail is not None and not tail.settled:
            await self.decided(session_id)
        if tail is not None and tail.error is not None:
            raise again(tail.error)

    async def close(self, why: PersistenceError | None = None) -> None:
        """Decide what is queued, sync, and end the task.

        Args:
            why: what whoever submits from now on is told.
        """
        self._why_closed = why
        self._closing = True
        if self._decider is not None:
            self._arrived.set()
            await asyncio.wait([self._decider])
            self._decider = None
        self._ending = True
        self._work.set()
        self._syncs.stop_timer()
        if self._task is not None:
            await asyncio.wait([self._task])
            self._task = None
        await self._syncs.ended()  # if it is still there, the task has failed

    # --- the committing task ------------------------------------------------------------------

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Let waiters hear of whatever has ended a task before its time.

        A callback, not a handler around the work: it also runs where a task could not be begun.
        """
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        _log.error("the commit queue failed; no more updates are taken", exc_info=error)
        self._disk.writer.poisoned = f"internal error: {error!r}"
        self._closing = True
        self._broken = WriteOutcomeUnknown(
            f"an internal error stopped the commit queue ({error!r}); the update may or may "
            "not be durable; open the directory again"
        )
        undecided = [commit for batch in self._inflight for commit in batch]
        undecided += [*self._queue, *self._deciding, *self._arrivals]
        undecided = list(dict.fromkeys(undecided))
        self._queue.clear()
        self._arrivals.clear()
        self._fail([commit for commit in undecided if not commit.settled], self._broken)
        for commit in undecided:  # acknowledged already, but the waiter had not been told
            if commit.done is not None and not commit.done.done():
                commit.done.set_exception(again(self._broken))
        self._syncs.answer(self._broken)

    async def _decide_until_closed(self, decide: Decide) -> None:
        """Let the shared tier decide batch after batch; what it agrees to goes on to the log."""
        while True:
            if not self._arrivals:
                if self._closing:
                    return
                await self._arrived.wait()
            self._arrived.clear()
            self._deciding = next_batch(self._arrivals, self._max_batch_bytes)
            remove_first(self._arrivals, len(self._deciding))
            agreed, refused = await decide(self._deciding)
            self._deciding = []
            # Something may have failed meanwhile, and with it what was built on it.
            self._queue.extend(commit for commit in agreed if not commit.settled)
            for commit, error in refused:
                if not commit.settled:
                    self._fail([commit], error)
            self._work.set()

    async def _commit_until_closed(self) -> None:
        """Write batch n + 1 in the thread while batch n is being acknowledged on the loop."""
        written: list[Commit] = []
        while await self._has_work(written):
            batch = next_batch(self._queue, self._max_batch_bytes)
            self._inflight = [written, batch]  # before they leave the queue: `_ended` finds each
            remove_first(self._queue, len(batch))
            if written and (self._disk.holds_back or self._syncs.is_behind):
                # What is durable must not wait for what has to wait.
                await self._acknowledge(written)
                written = []
            if self._syncs.is_behind:
                await self._syncs.ended()
            self._check_failure()
            writing = await self._start(batch) if batch else None
            if written:
                await self._acknowledge(written)
                written = []
            if writing is not None:
                written = await self._finish(*writing)
            if self._syncs.is_wanted:
                self._syncs.start(self._submitted)
        await self._syncs.ended()
        self._check_failure()
        if self._disk.writer.poisoned is None:
            self._syncs.start(self._submitted)
            await self._syncs.ended()
        self._check_failure()

    async def _has_work(self, written: list[Commit]) -> bool:
        """Wait for something to do; False: the queue is closed, and everything is decided.

        While a commit is written alone there is nothing to do.
        """
        self._check_failure()
        while self._alone is not None or not (written or self._queue or self._syncs.is_wanted):
            if self._ending and self._alone is None:
                return False
            self._is_idle = True
            await self._work.wait()
            self._is_idle = False
            self._work.clear()
            self._check_failure()
        self._work.clear()
        return True

    def _check_failure(self) -> None:
        for failure in (self._failure, self._syncs.failure):
            if failure is not None:
                raise failure

    async def _start(
        self, batch: list[Commit]
    ) -> tuple[list[Commit], asyncio.Future[None], float] | None:
        """Encode a batch and hand it to the writer thread."""
        started = self._monotonic()
        batch = await self._with_room(batch)
        if not batch:
            return None
        self._gathers = len(batch) > 1
        append = self._append(await self._encode(batch), len(batch))
        return batch, self._disk.threads.write(append), started

    def _append(self, chunks: list[bytes], frames: int) -> Callable[[], None]:
        """Return what writes a batch, and syncs it if that is what acknowledgements wait for."""
        append = self._disk.writer.append
        return partial(append, chunks, frames, sync=self._sync_each_batch)

    async def _with_room(self, batch: list[Commit]) -> list[Commit]:
        """Make room in the log for `batch`; return what of it there is room for.

        When the disk is full, tombstones and touches are still tried: they free space.
        """
        try:
            nbytes = sum(commit.nbytes for commit in batch)
            grows = any(commit.kind == PUT for commit in batch)
            await self._disk.make_room(nbytes, grows=grows)
            return batch
        except DiskFull as error:
            # What comes behind a put that fails was built on it and fails too, tombstones included.
            doomed: list[Commit] = []
            rest: list[Commit] = []
            sessions: set[str] = set()
            for commit in batch:
                dies = commit.kind == PUT or (
                    commit.kind != TOUCH and commit.session_id in sessions
                )
                (doomed if dies else rest).append(commit)
                if dies:
                    sessions.add(commit.session_id)
            self._fail(doomed or rest, error)
            return await self._with_room(rest) if doomed and rest else []
        except PersistenceError as error:
            self._fail(batch, error)
            return []

    async def _encode(self, batch: list[Commit]) -> list[bytes]:
        """Encode the frames of a batch, in slices, into a few larger chunks."""
        encode = self._disk.writer.encode
        chunks: list[bytes] = []
        slices = Slices(self._monotonic)
        for some in pieces(batch):
            if some[0].nbytes >= THREAD_ENCODE_BYTES:
                chunks.append(await self._disk.threads.write(encode, some))
            else:
                chunks.append(encode(some))
            if slices.due():
                await slices.give_way()
        return joined(chunks)

    async def _finish(
        self,
        batch: list[Commit],
        writing: asyncio.Future[None],
        started: float,
        *,
        is_first: bool = True,
    ) -> list[Commit]:
        """Wait for the writer thread; return the commits that are now to be acknowledged."""
        try:
            await writing
        except DiskFull as error:
            # Ends of sessions free space, so they are worth another try when a merge, which may
            # have taken what was left, has ended.
            frees = not any(commit.kind == PUT for commit in batch)
            if frees and is_first and await self._disk.merge_has_ended():
                repeated = await self._start(batch)
                return [] if repeated is None else await self._finish(*repeated, is_first=False)
            self._fail(batch, error)
            return []
        except PersistenceError as error:
            self._fail(batch, error)
            return []
        self._written(batch, started)
        return batch

    def _written(self, batch: list[Commit], started: float) -> None:
        """Note that a batch is in the log.

        Before anything else can run: until `apply`, these frames must not look dead.
        """
        self._disk.segments[batch[0].segment].unapplied += len(batch)
        self.latencies_seconds.append(self._monotonic() - started)
        self.batches += 1
        self._syncs.appended()

    async def _acknowledge(self, batch: list[Commit]) -> None:
        """Let index, memory and waiters know, in order, a few in each turn of the loop."""
        slices = Slices(self._monotonic)
        has_woken = False
        for some in woken_together(batch):
            if has_woken or slices.due():
                # Whoever was waiting goes on before more are woken: a thousand at a time would
                # keep everything else from the loop for as long as they all take.
                await slices.give_way()
            has_woken = self._settle(some)
        self.committed += len(batch)

    def _settle(self, some: list[Commit]) -> bool:
        """Acknowledge a few commits; return whether somebody waited for one."""
        tails = self.tails
        self._disk.apply(some)
        nbytes = 0
        for commit in some:
            session_id = commit.session_id
            if tails.get(session_id) is commit:
                del tails[session_id]
            commit.previous = None
            commit.settled = True
            nbytes += commit.nbytes
            if commit.creates:
                self.creating -= 1
        self._acknowledged(some)
        self.pending_bytes -= nbytes
        has_woken = False
        for commit in some:
            done = commit.done
            if done is not None and not done.done():
                done.set_result(None)
                has_woken = True
        if self._admissions:
            self._admit()
        return has_woken

    def _admit(self) -> None:
        """Wake whoever has waited longest for admission, if there is room."""
        if self._admissions and self.pending_bytes < self._max_pending_bytes:
            turn = self._admissions[0]
            if not turn.done():
                turn.set_result(None)

    def _fail(self, commits: list[Commit], error: PersistenceError) -> None:
        """Fail `commits` and everything in the queue that was built on one of them."""
        sessions = {
            commit.session_id for commit in commits if commit.kind != TOUCH and not commit.spills
        }
        later = self._withdraw_later(commits, sessions)
        doomed = [*commits, *later]
        for commit in doomed:
            commit.settled = commit.failed = True
            commit.error = error
        if isinstance(error, SessionExists):
            # Whoever built on the creation did not ask for one: there is a session, try again.
            for commit in later:
                commit.error = Overtaken(f"{error}: another worker created it first; try again")
        for commit in doomed:
            self._withdraw(commit)
            self.pending_bytes -= commit.nbytes
            self._failed(commit)
            if commit.done is not None and not commit.done.done():
                commit.done.set_exception(again(commit.error or error))
        self._admit()

    def _withdraw_later(self, commits: list[Commit], sessions: set[str]) -> list[Commit]:
        """Take what was built on `commits` out of the queues, and return it."""
        first = min((commit.number for commit in commits), default=0)
        doomed = take_out(self._queue, sessions, first)
        if self._arrivals is not self._queue:
            doomed += take_out(self._arrivals, sessions, first)
        known = set(map(id, commits))
        doomed += [
            commit
            for commit in self._deciding
            if commit.session_id in sessions and commit.number > first and id(commit) not in known
        ]
        return doomed

    def _withdraw(self, commit: Commit) -> None:
        """Let the chain of a failed commit's session end before it.

        What is in flight before it is not affected, and is what the next update builds on.
        """
        if commit.creates:
            self.creating -= 1
        self._shorten(commit)

    def _shorten(self, commit: Commit) -> None:
        """Take the newest version of a chain out of it."""
        if self.tails.get(commit.session_id) is commit:
            before = commit.previous
            while before is not None and before.failed:
                before = before.previous
            if before is None or before.settled:
                del self.tails[commit.session_id]
            else:
                self.tails[commit.session_id] = before

    def _oldest_undecided(self) -> float:
        """Return the number of the first commit that has not been decided."""
        for batch in (*self._inflight, self._queue, self._deciding, self._arrivals):
            for commit in batch:
                if not commit.settled:
                    return commit.number
        return math.inf

    # --- one commit by itself -----------------------------------------------------------------

    def _start_alone(self, commit: Commit) -> bool:
        """Write the only commit there is at once, without the task; False: it is the task's.

        Whoever updates by itself would else wait for three turns of the event loop more. What
        comes meanwhile gathers in the queue, as behind any batch, and the task waits for the end.
        Not after a batch of several: others are about to come then, and one sync does for all.
        """
        if (
            not self._is_idle
            or self._work.is_set()  # it is about to begin: a sync for example, which must get on
            or self._alone is not None
            or self._gathers
            or self._arrivals is not self._queue
            or commit.nbytes >= THREAD_ENCODE_BYTES
            or self._syncs.is_behind
            or not self._disk.begin_now(commit.nbytes, grows=commit.kind == PUT)
        ):
            return False
        self._inflight = [[commit]]  # before it leaves the queue: `_ended` finds it
        self._queue.clear()
        self._alone = commit
        try:
            started = self._monotonic()
            append = self._append([self._disk.writer.encode([commit])], 1)
            self._disk.threads.write_and_tell(partial(self._alone_ended, started), append)
        except BaseException as error:  # noqa: BLE001 - the task ends with it
            self._end_alone(error)
        return True

    def _alone_ended(self, started: float, _: object, error: BaseException | None) -> None:
        """Acknowledge what was written alone. What is submitted meanwhile is the task's."""
        assert self._alone is not None, "one at a time"
        try:
            batch = [self._alone]
            if error is None:
                self._written(batch, started)
                self._settle(batch)
                self.committed += 1
            elif isinstance(error, DiskFull) and self._alone.kind != PUT:
                self._queue.extendleft(batch)  # it frees space: the task knows what else to try
                error = None
            elif isinstance(error, PersistenceError):
                self._fail(batch, error)
                error = None
        except BaseException as raised:  # noqa: BLE001 - the task ends with it
            error = raised
        self._end_alone(error)

    def _end_alone(self, failure: BaseException | None) -> None:
        """Let the task go on, if there is something to do, or end with `failure`."""
        self._alone = None
        if failure is None:
            self._inflight = []
        else:
            self._failure = failure
        if self._queue or self._ending or self._failure is not None or self._syncs.is_wanted:
            self._work.set()
