"""One directory through many lives, beside the reference model, one step at a time.

A `World` does what it is told (`World.do`) to a manager on a simulated disk, compares every answer
with the ledger, and watches that no call returns before the sync that covers it. When the engine
takes no more writes, or dies, it opens the directory again, as an operator would.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Any, Final

from persistence import CheckpointConfig, ManualClock, StateManager, errors
from persistence.disk.filenames import SEGMENT_SUFFIX
from persistence.disk.format import SEGMENT_HEADER_BYTES
from tests import encryption
from tests.disk.memoryfiles import Fault, Killed, MemoryFiles
from tests.faults.ledger import Data, Entry, Ledger, State, Value
from tests.support import abandon, config, everything

TTL_SECONDS: Final = 10.0
"""Of the sessions whose end the world waits for; those live `LONG_TTL_SECONDS`."""
LONG_TTL_SECONDS: Final = 1e6
SEGMENT_BYTES: Final = 64 * 1024
TOKEN_BYTES: Final = 16
FILLER: Final = "filler"
SHORT_LIVED: Final = "short lived"

_REFUSED: Final = (errors.DiskFull, errors.DirectoryNotUsable)
_UNKNOWN: Final = (errors.WriteOutcomeUnknown, errors.ManagerClosed, Killed)


class Impossible(AssertionError):
    """The engine did what it must never do."""


class World:
    """See the module.

    Args:
        seed: the same seed makes the same values.
        files: the disk; empty, or as another world has left it.
        ledger: what is on it.
        clock: time; stands still but for the step "expire".
        disk: fields of `DiskConfig`.

    Attributes:
        refusals: the errors that callers were told of, one line each.
        checkpoints: what each acknowledged restore point holds, by its id.
        faults: asked before each call, in every life.
        has_failed: a call on the disk has failed, so that something may not be readable.
        watches: whether the monitor looks: is what is acknowledged on the disk?
        lives: how many managers were opened.
    """

    def __init__(
        self,
        seed: int = 0,
        files: MemoryFiles | None = None,
        ledger: Ledger | None = None,
        clock: ManualClock | None = None,
        **disk: Any,
    ) -> None:
        self.files = files or MemoryFiles()
        self.ledger = ledger or Ledger()
        self.clock = clock or ManualClock()
        self.checkpoints: dict[str, State] = {}
        self.refusals: list[str] = []
        self.lives = 0
        self.faults: list[Fault] = []
        self.has_failed = False
        self._chance = Random(seed)
        self._count = 0
        self._state: StateManager | None = None
        self._is_unusable = False
        self.watches = True
        self._syncs_each = disk.get("fsync", "always") == "always"
        common = {"segment_bytes": SEGMENT_BYTES, "compression": "none"}
        self.config = config(ttl_seconds=LONG_TTL_SECONDS, **{**common, **disk}).model_copy(
            update={"checkpoint": CheckpointConfig(keep=2)}
        )

    @property
    def state(self) -> StateManager:
        """The open manager."""
        assert self._state is not None, "it is open"
        return self._state

    # --- lives --------------------------------------------------------------------------------

    async def open(self, *, looks: bool = True) -> bool:
        """Open the directory; return whether that worked.

        Args:
            looks: compare what is there. That reads every session, and ends expired ones.
        """
        self.lives += 1
        self.files.faults[:] = self.faults
        state = StateManager(config=self.config, clock=self.clock, files=self.files)
        try:
            async with asyncio.timeout(20):
                await state.open()
        except Killed:
            return False
        except errors.PersistenceError as error:
            self._refused("open", error)
            if self.files.open_files and not self.files.is_dead:
                raise Impossible(f"left open: {self.files.open_files}") from error
            return False
        self._state = state
        self._is_unusable = False
        found = await self._look() if looks else None
        if found is not None:
            self.ledger.found(found)
        return True

    async def die(self) -> None:
        """Kill the process; the next one finds what the kernel has."""
        if self._state is not None:
            await abandon(self._state)
            self._state = None
        self.files = self.files.after_kill()

    async def close(self) -> None:
        """Close in order."""
        try:
            await self.state.close()
        except (errors.PersistenceError, Killed) as error:
            self._refused("close", error)
        await abandon(self.state)
        if self.files.open_files and not self.files.is_dead:
            raise Impossible(f"left open after a close: {self.files.open_files}")
        self._state = None
        self.files = self.files.after_kill()

    async def _look(self) -> State | None:
        """Return what all sessions hold, or None if that cannot be found out."""
        try:
            listed = await self.state.get_active_sessions()
            found = {sid: await self.state.get_session(sid) for sid in listed}
        except errors.PersistenceError as error:
            self._refused("look", error)
            return None
        except Killed:
            return None
        if len(listed) != len(set(listed)):
            raise Impossible(f"listed twice: {sorted(listed)}")
        if self.state._disk.damages and self.has_failed:
            return None  # what could not be read is left out of listings, and reported
        return {sid: session.data for sid, session in found.items() if session is not None}

    # --- steps --------------------------------------------------------------------------------

    async def run(self, steps: Sequence[str]) -> None:
        """Do the steps; open the directory again whenever the engine has had enough."""
        for step in steps:
            if self._state is None and not await self._revive():
                return
            await self.do(step)
            if self._is_unusable or self.files.is_dead:
                await self.die()

    async def _revive(self) -> bool:
        for _ in range(3):  # a fault that comes once is in the way of one opening only
            if await self.open():
                return True
            await self.die()
        return False

    async def do(self, step: str) -> None:
        """Do one step: ``"update a"``, ``"compact"``; see the methods `_do_…`."""
        name, _, argument = step.partition(" ")
        method: Callable[..., Awaitable[None]] = getattr(self, f"_do_{name}")
        async with asyncio.timeout(20):  # nothing may hang
            await (method(argument) if argument else method())

    async def _do_create(self, sid: str) -> None:
        if self.ledger.value(sid) is None:
            value = self._value()
            await self._change(sid, value, self.state.create_session(session_id=sid, data=value))
            return
        await self._expect(errors.SessionExists, self.state.create_session(session_id=sid))

    async def _do_update(self, sid: str) -> None:
        before = self.ledger.value(sid)
        x = self._value()["x"]
        call = self.state.update_session_data(sid, "x", x)
        if before is None:
            await self._expect(errors.SessionNotFound, call)
        else:
            await self._change(sid, {**before, "x": x}, call)

    async def _do_replace(self, sid: str) -> None:
        value = self._value()
        call = self.state.replace_session(sid, value)
        if self.ledger.value(sid) is None:
            await self._expect(errors.SessionNotFound, call)
        else:
            await self._change(sid, value, call)

    async def _do_edit(self, sid: str) -> None:
        before = self.ledger.value(sid)
        x = self._value()["x"]

        async def edit() -> None:
            async with self.state.edit(sid) as draft:
                draft["x"] = x

        if before is None:
            await self._expect(errors.SessionNotFound, edit())
        else:
            await self._change(sid, {**before, "x": x}, edit())

    async def _do_terminate(self, sid: str) -> None:
        was_alive = self.ledger.value(sid) is not None

        async def end() -> None:
            if await self.state.terminate_session(sid) != was_alive:
                raise Impossible(f"{sid}: whether it was alive")

        await self._change(sid, None, end())

    async def _do_ttl(self, sid: str) -> None:
        before = self.ledger.value(sid)

        async def set_ttl() -> None:
            if await self.state.set_ttl(sid, 2 * LONG_TTL_SECONDS) != (before is not None):
                raise Impossible(f"{sid}: whether it is there")

        await self._change(sid, before, set_ttl())

    async def _do_rotate(self) -> None:
        """Write a session larger than a segment: it begins a segment of its own."""
        value = self._value(SEGMENT_BYTES)
        if self.ledger.value(FILLER) is None:
            call: Awaitable[Any] = self.state.create_session(session_id=FILLER, data=value)
        else:
            call = self.state.replace_session(FILLER, value)
        await self._change(FILLER, value, call)

    async def _do_burst(self) -> None:
        """Change several sessions at once, and one of them several times."""
        live = sorted(self.ledger.live())
        sids = self._chance.sample(live, min(5, len(live)))
        group = self.ledger.new_group()
        changes = []
        for sid in [*sids, *sids[:1], *sids[:1]]:
            value = {**(self.ledger.value(sid) or {}), "x": self._value()["x"]}
            call = self.state.update_session_data(sid, "x", value["x"])
            changes.append(self._change(sid, value, call, group))
        for outcome in await asyncio.gather(*changes, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _do_expire(self) -> None:
        value = self._value()
        sid = f"{SHORT_LIVED} {value['n']}"
        call = self.state.create_session(
            session_id=sid, data=value, ttl_seconds=TTL_SECONDS, auto_renew=False
        )
        outcome = await self._change(sid, value, call)
        self.clock.advance(TTL_SECONDS + 1)
        gone = self.ledger.submit(sid, None)
        gone.outcome = "acknowledged"  # whatever happens from now on, its time is over
        if outcome == "acknowledged":
            await self._read(sid)

    async def _do_read(self, sid: str) -> None:
        await self._read(sid)

    async def _do_spill(self, sid: str) -> None:
        await self._try("spill", self.state.spill_session(sid))

    async def _do_restore(self, sid: str) -> None:
        await self._try("restore", self.state.restore_session(sid))

    async def _do_flush(self) -> None:
        is_flushed = await self._try("flush", self.state.flush())
        if is_flushed and self.watches and self._has_unsynced_log():
            raise Impossible("flushed before it was synced")

    async def _do_clean(self) -> None:
        await self._try("clean", self.state.cleanup_expired())

    async def _do_compact(self) -> None:
        await self._try("compact", self.state.compact())

    async def _do_list(self) -> None:
        live = self.ledger.live()
        found = await self._look()
        if found is not None and found != live and not self._is_unusable:
            raise Impossible(f"listed {sorted(found)}, there are {sorted(live)}")

    async def _do_checkpoint(self) -> None:
        before = self.ledger.live()
        try:
            info = await self.state.create_checkpoint()
        except (errors.PersistenceError, Killed) as error:
            self._refused("checkpoint", error)
            return
        self.checkpoints[info.id] = before
        there = self.files.contents()
        unsynced = self.files.unsynced_data() | self.files.unsynced_names()
        if self.watches and any(info.id in path and path in there for path in unsynced):
            raise Impossible("a checkpoint is acknowledged that is not durable")

    async def _do_goback(self) -> None:
        """Restore the newest checkpoint."""
        known = self.checkpoints
        if not known:
            return
        wanted = max(known)
        self.ledger.replacement = known[wanted]
        try:
            info = await self.state.restore_checkpoint(wanted)
        except (errors.DiskFull, errors.DirectoryNotUsable, errors.CheckpointNotFound) as error:
            self._refused("goback", error)
            self.ledger.replacement = None
        except (errors.PersistenceError, Killed) as error:
            self._refused("goback", error)
            self._is_unusable = True
        else:
            if info.skipped:  # one that cannot be read is passed over, and said so
                self.refusals.append(f"goback: skipped {info.skipped}")
            if info.id not in known:
                raise Impossible(f"restored {info.id}, which nobody made")
            self.ledger.replaced(known[info.id])

    async def _do_crash(self) -> None:
        await self.die()

    async def _do_reopen(self) -> None:
        await self.close()

    # --- how calls end ------------------------------------------------------------------------

    async def _change(
        self, sid: str, value: Value, call: Awaitable[Any], group: int | None = None
    ) -> str:
        """Await a change of a session; return its outcome."""
        does_nothing = value is None and self.ledger.value(sid) is None
        entry = self.ledger.submit(sid, value, group)
        try:
            await call
        except _REFUSED as error:
            entry.outcome = "refused"
            self._refused(sid, error)
        except _UNKNOWN as error:
            entry.outcome = "unknown"
            self._refused(sid, error)
            self._is_unusable = True
        except errors.CorruptionError as error:  # the version it is built on cannot be read
            entry.outcome = "refused"
            self._refused(sid, error)
        else:
            self._check_durable(entry, alone=group is None and not does_nothing)
            self.ledger.acknowledged(entry)
        return entry.outcome

    def _check_durable(self, entry: Entry, *, alone: bool) -> None:
        """The monitor: what is acknowledged must be on the disk by now.

        Or what was submitted behind it: the log is synced in order, and before its caller is woken
        compaction may have dropped what that has replaced.
        """
        if not self._syncs_each or not self.watches:
            return
        if entry.value is not None and not encryption.IS_ON:  # else nobody can tell where it is
            values = [entry.value, *self.ledger.later(entry)]
            if not any(map(self._is_durable, values)):
                raise Impossible("acknowledged before it was synced")
        if alone and self._has_unsynced_log():
            raise Impossible("acknowledged with unsynced bytes in the log")

    def _is_durable(self, value: Value) -> bool:
        if value is None:
            return False
        marks = [value["x"][:TOKEN_BYTES]]
        if "token" in value:
            marks.append(value["token"])
        return all(map(self.files.is_durable, marks))

    def _has_unsynced_log(self) -> bool:
        contents = self.files.contents()
        return any(
            # One with a header only was given up before there was a frame in it.
            path.endswith(SEGMENT_SUFFIX) and len(contents.get(path, b"")) > SEGMENT_HEADER_BYTES
            for path in self.files.unsynced_data()
        )

    async def _read(self, sid: str) -> None:
        expected = self.ledger.value(sid)
        try:
            session = await self.state.get_session(sid)
        except (errors.PersistenceError, Killed) as error:
            self._refused(f"read {sid}", error)
            return
        found = None if session is None else session.data
        if found != expected:
            raise Impossible(f"{sid} reads {found!r:.80}, it is {expected!r:.80}")

    async def _try(self, name: str, call: Awaitable[Any]) -> bool:
        try:
            await call
        except (errors.PersistenceError, Killed) as error:
            self._refused(name, error)
            self._is_unusable |= isinstance(error, _UNKNOWN)
            return False
        return True

    async def _expect(self, kind: type[errors.PersistenceError], call: Awaitable[Any]) -> None:
        try:
            await call
        except kind:
            return
        except (*_REFUSED, *_UNKNOWN, errors.CorruptionError) as error:
            self._refused(kind.__name__, error)
            self._is_unusable |= isinstance(error, _UNKNOWN)
            return
        raise Impossible(f"no {kind.__name__}")

    def _refused(self, what: str, error: BaseException) -> None:
        self.refusals.append(f"{what}: {type(error).__name__}: {error}")

    def _value(self, size: int | None = None) -> Data:
        self._count += 1
        token = self._chance.randbytes(TOKEN_BYTES)
        if size is None:
            size = int(3000 * self._chance.random() ** 2)
        return {"n": self._count, "token": token, "x": self._chance.randbytes(TOKEN_BYTES + size)}


# --- afterwards -----------------------------------------------------------------------------------


async def check_image(
    world: World, files: MemoryFiles, *, may_report_damage: bool = False
) -> State:
    """Open a disk that a crash has left; assert that it holds what it may; return what that is.

    Args:
        world: what it may hold, and when this is.
        files: the disk.
        may_report_damage: something may be called damaged, though nothing is lost.
    """
    ledger = world.ledger.copy()
    state = StateManager(config=world.config, clock=ManualClock(world.clock.wall()), files=files)
    await state.open()
    try:
        found = await everything(state)
        ledger.found(found)
        damages = state._disk.damages
        assert may_report_damage or damages == [], "a crash damages nothing"
    finally:
        await abandon(state)
    return found


async def check_checkpoints(world: World, files: MemoryFiles) -> None:
    """Restore the newest acknowledged checkpoint of a disk, and compare it."""
    if not world.checkpoints:
        return
    newest = max(world.checkpoints)
    state = StateManager(config=world.config, clock=ManualClock(world.clock.wall()), files=files)
    await state.open()
    try:
        listed = {info.id for info in await state.list_checkpoints()}
        assert newest in listed, "an acknowledged checkpoint is there"
        restored = await state.restore_checkpoint(newest)
        assert (restored.id, restored.skipped) == (newest, ())
        assert await everything(state) == world.checkpoints[newest]
    finally:
        await abandon(state)
