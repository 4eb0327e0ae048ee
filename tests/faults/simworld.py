"""The whole engine in one simulated world: workers, their disks, a shared tier, time, and faults.

A seed says everything: what kind of world it is, what clients ask of which worker and when, and
what goes wrong meanwhile. Every answer is compared with the model (`simmodel`). In the end all
faults are mended, and everything must come to rest: every worker shows the same, all that was
acknowledged is there or in a conflict record, nothing is open, nothing hangs.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from random import Random
from typing import Any, Final
from unittest.mock import patch

from persistence import (
    CheckpointConfig,
    DiskConfig,
    MemoryConfig,
    RedisConfig,
    Session,
    SessionConfig,
    ShutdownConfig,
    StateConfig,
    StateManager,
    errors,
)
from persistence import record as rec
from persistence.disk.filenames import CONFLICTS
from persistence.disk.journal import decode_entries
from persistence.sharing.conflicts import decode_conflict
from tests.disk.memoryfiles import Call, Killed, MemoryFiles
from tests.faults.simloop import LIFE, Life, SimulatedClock, SimulatedLoop, run
from tests.faults.simmodel import Asked, Born, Model, Wrong, data_of, filler, tokens_in
from tests.faults.simredis import Network, Server, SimulatedTier
from tests.faults.simulation import SteppedThreads

KINDS: Final = ("alone", "alone", "through fail", "through fail", "through local", "behind")
CLIENTS: Final = 4
OPERATIONS: Final = 22
"""Of each client."""
_SESSIONS: Final = 6
_CALL_SECONDS: Final = 120.0
"""No call takes longer, whatever goes wrong: the faults themselves are shorter."""
_STRAY_SECONDS: Final = 10.0
"""For so long an end whose caller has gone may be on its way."""
_REST_SECONDS: Final = 300.0
_DAY: Final = 86_400.0
_LEEWAY_SECONDS: Final = 3.0
"""What the end of a session may be late or early by, on workers that share it: renewals travel."""

_NOT_DONE: Final = (
    errors.SessionNotFound,
    errors.SessionExists,
    errors.ConflictError,
    errors.RemoteUnavailable,
)
_PERHAPS_DONE: Final = (
    errors.DiskFull,
    errors.DirectoryNotUsable,
    errors.WriteOutcomeUnknown,
    errors.ManagerClosed,
    Killed,
)


class TimedThreads(SteppedThreads):
    """Calls take some turns of the loop; some of them take their time."""

    def __init__(self, chance: Random) -> None:
        super().__init__(chance)
        self._dice = chance

    def _wait(self, loop: asyncio.AbstractEventLoop, queue: Any, turns: int) -> None:
        if turns == 3:
            seconds = 0.001 if self._dice.random() < 0.9 else 0.2 * self._dice.random()
            loop.call_later(seconds, self._run_next, queue)
        else:
            super()._wait(loop, queue, turns)


class Worker:
    """One process after the other on one disk.

    Attributes:
        name: it is the host of its URL as well.
        is_up: set while it takes calls.
        told_broken: it has said that it takes no more updates.
    """

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.files = MemoryFiles()
        self.clock = SimulatedClock(world.loop)
        self.state: StateManager
        self.life = Life(name)
        self.tier: SimulatedTier | None = None
        self.is_up = asyncio.Event()
        self.changing = asyncio.Lock()
        self._world = world

    async def open(self) -> bool:
        """Open the directory; return whether that worked."""
        life = self.life = Life(self.name)
        LIFE.set(life)
        self.tier = None
        self.state = StateManager(
            config=self._world.config(self.name), clock=self.clock, files=self.files
        )
        opening = asyncio.ensure_future(self.state.open())
        await asyncio.wait([opening], timeout=_CALL_SECONDS)
        LIFE.set(None)
        if not opening.done():
            raise Wrong(f"{self.name}: opening hangs")
        if opening.cancelled():
            return False
        error = opening.exception()
        if error is None:
            self.is_up.set()
            return True
        if not isinstance(error, (errors.PersistenceError, Killed)):
            raise Wrong(f"{self.name}: opening: {error!r}") from error
        if isinstance(error, errors.CorruptionError):
            raise Wrong(f"{self.name}: opening: {error!r}") from error
        return False

    async def kill(self, power_loss: Random | None = None) -> None:
        """End the process; with `power_loss`, the machine, which forgets what was not synced."""
        self.is_up.clear()
        self.files.kill()
        if self.tier is not None:
            self.tier.kill()
        self.life.is_over = True
        for _ in range(50):
            running = self.life.running()
            if not running:
                break
            for task in running:
                task.cancel()
            await asyncio.sleep(0.02)  # what it has in its threads goes on until it ends
        else:
            raise Wrong(f"{self.name}: does not end: {self.life.running()}")
        self.files = (
            self.files.after_kill()
            if power_loss is None
            else self.files.after_power_loss(power_loss)
        )

    async def close(self) -> None:
        """Close in order."""
        self.is_up.clear()
        LIFE.set(self.life)
        closing = asyncio.ensure_future(self.state.close())
        await asyncio.wait([closing], timeout=_CALL_SECONDS)
        LIFE.set(None)
        if not closing.done():
            raise Wrong(f"{self.name}: closing hangs")
        error = None if closing.cancelled() else closing.exception()
        if error is not None and not isinstance(error, (errors.PersistenceError, Killed)):
            raise Wrong(f"{self.name}: closing: {error!r}") from error
        for _ in range(20):
            await asyncio.sleep(0)
        if self.files.open_files and not self.files.is_dead:
            raise Wrong(f"{self.name}: left open: {self.files.open_files}")
        left = [task for task in self.life.running() if task.get_name() != "client"]
        if left and not self.files.is_dead:
            raise Wrong(f"{self.name}: tasks are left: {left}")
        await self.kill()

    @property
    def is_broken(self) -> bool:
        """Whether it has said that it takes no more updates."""
        state, tiers = self.state, self.state._tiers
        journals = (tiers._outbox._journal, tiers._conflicts._journal)
        return (
            state._commits._broken is not None
            or state._disk.writer.poisoned is not None
            or any(journal._poisoned is not None for journal in journals)
        )

    def conflicts(self) -> list[tuple[str, dict[str, Any] | None]]:
        """Return what is kept of refused branches: session id and data, None: an end."""
        content = self.files.contents().get(f"/{self.name}/{CONFLICTS}", b"")
        found: list[tuple[str, dict[str, Any] | None]] = []
        for entry in decode_entries(content[8:24], content)[0]:
            conflict = decode_conflict(entry)
            assert conflict is not None, "nothing is sealed here"
            data = None
            if conflict.record:
                packed = rec.packed_fields(conflict.record)
                data = {name: rec.unpack_value(value) for name, value in packed.items()}
            found.append((conflict.session_id, data))
        return found


class _Errors(logging.Handler):
    """What the engine logs as an error is a bug, but for what a killed process says."""

    def __init__(self, loop: SimulatedLoop) -> None:
        super().__init__(logging.ERROR)
        self._loop = loop

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, (Killed, OSError)):
            self._loop.complaints.append(f"{record.name}: {record.getMessage()}: {error!r}")


class World:
    """See the module.

    Args:
        seed: of everything.
        loop: simulated.
        kind: one of `KINDS`; None: the seed says.
    """

    def __init__(self, seed: int, loop: SimulatedLoop, kind: str | None = None) -> None:
        self.loop = loop
        self.chance = Random(f"world {seed}")
        self.kind = kind or self.chance.choice(KINDS)
        self.model = Model()
        self.done: Counter[str] = Counter()
        self.trace = blake2b(digest_size=16)
        self.story: list[str] = []
        self._ids = Random(f"ids {seed}")
        self._threads = Random(f"threads {seed}")
        clock = SimulatedClock(loop)
        self.server = Server(clock.wall, self._ids.randbytes)
        self.network = Network(self.server, Random(f"network {seed}"))
        self.network.delay_seconds = self.chance.choice([0.001, 0.01, 0.1])
        self._fsync = "always"
        if self.kind == "alone":
            self._fsync = self.chance.choice(["always", "always", "interval", "never"])
        self._budget_bytes = self.chance.choice([8 * 1024, 64 * 1024, 2**20])
        self._queue_bytes = self.chance.choice([8 * 1024, 2**20])
        count = 1 if self.kind == "alone" else self.chance.choice([2, 2, 3])
        self.workers = [Worker(self, f"w{number}") for number in range(count)]
        self.sids = [f"s{number}" for number in range(_SESSIONS)]
        self.cleanup_seconds = 7.0
        self.quiet = asyncio.Event()
        self.quiet.set()
        self.under_way = 0
        self.has_lost = False
        self.has_gone_back = False
        self.has_jumped = False
        self.restarts_after_loss = False
        self.recoveries = 0
        self.checkpoint: tuple[str, dict[str, set[str]]] | None = None

    # --- what it is made of -----------------------------------------------------------------------

    @property
    def is_alone(self) -> bool:
        return self.kind == "alone"

    @property
    def is_strict(self) -> bool:
        """Whether nobody may go on alone, so that all agree at any time."""
        return self.is_alone or (self.kind == "through fail" and not self.has_lost)

    def config(self, name: str) -> StateConfig:
        """Return the configuration of a worker."""
        redis: dict[str, Any] = {}
        if not self.is_alone:
            write, _, on_outage = self.kind.partition(" ")
            redis = {
                "url": f"redis://{name}",
                "write": write,
                "on_outage": on_outage or "local",
                "timeout_seconds": 1.0,
                "heartbeat_seconds": 1.0,
                "flush_interval_seconds": 0.3,
            }
        return StateConfig(
            session=SessionConfig(ttl_seconds=1e6, cleanup_interval_seconds=self.cleanup_seconds),
            memory=MemoryConfig(check_interval_seconds=0, max_bytes=self._budget_bytes),
            disk=DiskConfig(
                path=f"/{name}",
                fsync=self._fsync,  # type: ignore[arg-type]  # one of them
                flush_interval_seconds=0.2,
                segment_bytes=64 * 1024,
                queue_bytes=self._queue_bytes,
                compaction_bytes_per_second=2**20,
            ),
            redis=RedisConfig(**redis),
            checkpoint=CheckpointConfig(keep=2, store=f"/{name}-checkpoints"),
            shutdown=ShutdownConfig(checkpoint=False, grace_seconds=5),
        )

    def new_tier(self, config: RedisConfig, *_: object) -> SimulatedTier:
        """Return the connection of a worker that is being opened."""
        name = str(config.url).rpartition("/")[2]
        tier = SimulatedTier(
            self.network,
            name,
            self._ids.randbytes(16),
            timeout_seconds=config.timeout_seconds,
            heartbeat_seconds=config.heartbeat_seconds,
        )
        [worker] = [each for each in self.workers if each.name == name]
        worker.tier = tier
        return tier

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Let the engine work with what is simulated."""
        threads = self._threads
        handler = _Errors(self.loop)
        logger = logging.getLogger("persistence")
        logger.addHandler(handler)
        level, passes = logger.level, logger.propagate
        logger.setLevel(logging.ERROR)
        logger.propagate = False
        try:
            with (
                patch("persistence.disk.tier.Threads", lambda: TimedThreads(threads)),
                patch("persistence.checkpoint.restore.Threads", lambda: TimedThreads(threads)),
                patch("persistence.tiers.tier_of", self.new_tier),
                patch("secrets.token_bytes", self._ids.randbytes),
            ):
                yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = passes

    def note(self, text: str) -> None:
        """Write down what happens: two runs of a seed write the same."""
        line = f"{self.loop.now:.6f} {text}"
        self.trace.update(line.encode())
        self.story.append(line)

    # --- the run ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Let it all happen; then see that it comes to rest."""
        self.note(f"{self.kind}, {len(self.workers)} workers, fsync {self._fsync}")
        for worker in self.workers:
            assert await worker.open()
        clients = [
            asyncio.create_task(Client(self, number).run(), name="client loop")
            for number in range(CLIENTS)
        ]
        chaos = asyncio.create_task(Chaos(self).run(), name="chaos")
        try:
            done, _ = await asyncio.wait([*clients, chaos], return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                await task
        finally:
            for task in (*clients, chaos):
                task.cancel()
            await asyncio.gather(*clients, chaos, return_exceptions=True)
        await self.come_to_rest()
        self.check_complaints()

    def check_complaints(self) -> None:
        """Assert that nothing went wrong that nobody was told of."""
        complaints = [
            text
            for text in self.loop.complaints
            if not any(name in text for name in ("Killed", "PersistenceError", "ManagerClosed"))
        ]
        if complaints:
            raise Wrong("nobody was told: " + "; ".join(complaints))

    async def revive(self, worker: Worker) -> None:
        """Open a worker's directory, as often as it takes."""
        for attempt in range(60):
            if await worker.open():
                self.recoveries += 1
                if self.has_lost:
                    self.restarts_after_loss = True
                self.note(f"{worker.name} is up")
                return
            await worker.kill()
            if attempt > 2:
                worker.files.free_bytes = None
                worker.files.faults.clear()
            await asyncio.sleep(1)
        raise Wrong(f"{worker.name} cannot be opened")

    # --- the end ----------------------------------------------------------------------------------

    async def come_to_rest(self) -> None:
        """Mend everything; wait until all is delivered; compare."""
        self.note("mended")
        self.network.cut_off.clear()
        self.network.loses = 0.0
        self.network.go_on()
        self.network.is_up = True
        for worker in self.workers:
            worker.files.faults.clear()
            worker.files.free_bytes = None
            async with worker.changing:
                if not worker.is_up.is_set():
                    await self.revive(worker)
                elif worker.is_broken:
                    await worker.kill()
                    await self.revive(worker)
        if not self.is_alone:
            await self._wait_until_delivered()
        await self._check_end()

    async def _wait_until_delivered(self) -> None:
        end = self.loop.now + _REST_SECONDS
        rounds = 0
        while rounds < 3:
            sides = [worker.state._sharing for worker in self.workers]
            rests = all(
                side is not None
                and side.is_up
                and side.copies.is_listening
                and not len(side.outbox)
                and side._delivery._refill_epoch is None
                and not side._to_follow
                for side in sides
            )
            rounds = rounds + 1 if rests else 0
            if self.loop.now > end:
                left = [dict(side.outbox.branches) for side in sides if side is not None]
                why = [
                    (
                        side.stats(),
                        side.copies.is_listening,
                        side._to_follow,
                        side._delivery._refill_epoch,
                    )
                    for side in sides
                    if side is not None
                ]
                raise Wrong(f"it does not come to rest: {left}, {why}")
            await asyncio.sleep(1)
            if rounds == 1 and (self.has_gone_back or self.has_lost):
                # What the shared tier lost of a session is seen when the session is next used.
                for sid in self.sids:
                    for worker in self.workers:
                        # A connection of before may break only now: then it is not at rest yet.
                        with suppress(errors.RemoteUnavailable):
                            await self._settled(worker, sid)

    async def _settled(self, worker: Worker, sid: str) -> Session | None:
        async with asyncio.timeout(_CALL_SECONDS):
            return await worker.state.get_session(sid, fresh=True, renew=False)

    async def _check_end(self) -> None:
        kept: dict[str, list[dict[str, Any] | None]] = {}
        for worker in self.workers:
            for sid, data in worker.conflicts():
                kept.setdefault(sid, []).append(data)
        self.done["conflicts"] += sum(map(len, kept.values()))
        for sid in self.sids:
            for attempt in range(3):  # its time may be over just now
                asked_at = self.loop.now
                views = [await self._settled(worker, sid) for worker in self.workers]
                shown = {None if v is None else tuple(sorted(tokens_in(v.data))) for v in views}
                if len(shown) == 1:
                    break
                if attempt == 2:
                    raise Wrong(f"{sid}: they do not agree: {shown}")
                await asyncio.sleep(_LEEWAY_SECONDS)
            self._check_session(sid, views[0], kept.get(sid, []), asked_at)
        for worker in self.workers:
            await worker.close()
            assert await worker.open()
            again = {sid: await self._settled(worker, sid) for sid in self.sids}
            for sid, session in again.items():
                if session is not None:
                    self.model.view(sid, session.data, session.version)
            if self.is_alone and worker.state._disk.damages:
                raise Wrong(f"a crash damages nothing: {worker.state._disk.damages}")
            await worker.close()

    def _check_session(
        self, sid: str, session: Session | None, kept: list[dict[str, Any] | None], asked_at: float
    ) -> None:
        """What was acknowledged is in the session, in a conflict record, or has ended."""
        model = self.model
        alive: Born | None = None
        there: set[str] = set()
        if session is not None:
            alive, there = model.view(sid, session.data, session.version)
            if not self.has_jumped:
                model.check_not_over(alive, asked_at - self.leeway - self.granted(alive))
            branches = [None if data is None else tokens_in(data)[0] for data in kept]
            lost_end = any(branch != alive.token for branch in branches)  # it was part of a branch
            if self._has_later_life_over(sid, alive):
                lost_end = True
            if not (lost_end or self.has_gone_back or self.restarts_after_loss):
                model.check_not_ended(alive, asked_at)
        for data in kept:
            if data is not None:
                there |= set(tokens_in(data))
        for born in model.by_id.get(sid, ()):
            if born.end != "no" or self.loop.now >= born.lives_until - self.leeway:
                continue
            if self.has_jumped:
                continue
            if self.has_lost and born is alive:
                continue  # of one incarnation the highest version wins: docs/redis.md, the limit
            if self.has_lost and self._has_later_life_over(sid, born):
                continue  # it passes for one that was ended before that
            model.check_has(born, there, born.acknowledged, "were acknowledged")

    def _has_later_life_over(self, sid: str, born: Born) -> bool:
        """Whether a later life took the place of a lost one or of its tombstone, and is over too.

        Then nothing is left that says so to a worker which was away: docs/redis.md, the limit.
        """
        lives = self.model.by_id[sid]
        later = lives[lives.index(born) + 1 :]
        return any(each.exists and self.loop.now >= each.lives_until for each in later)

    def granted(self, born: Born) -> float:
        """Return what recoveries may have granted: what was unrecorded of the last renewal."""
        return born.ttl_seconds / 8 * self.recoveries if born.renews else 0.0

    @property
    def leeway(self) -> float:
        """Seconds by which workers may differ about the end of a session."""
        return 0.0 if self.is_alone else _LEEWAY_SECONDS


class Client:
    """Asks for one thing after the other, and compares the answers.

    Args:
        world: its world.
        number: its own.
    """

    def __init__(self, world: World, number: int) -> None:
        self._world = world
        self._model = world.model
        self._number = number
        self._chance = Random(world.chance.random())
        self._count = 0

    async def run(self) -> None:
        """Do all of it."""
        names = list(_OPERATIONS)
        weights = list(_OPERATIONS.values())
        for _ in range(OPERATIONS):
            pause = self._chance.choice([0.0, 0.0, 0.001, 0.05, 1.0])
            await asyncio.sleep(pause * self._chance.random() * 2)
            await self._one(self._chance.choices(names, weights)[0])

    async def _one(self, name: str) -> None:
        world = self._world
        worker = self._chance.choice(world.workers)
        while not (worker.is_up.is_set() and world.quiet.is_set()):
            await worker.is_up.wait()
            await world.quiet.wait()
        sid = self._chance.choice(world.sids)
        world.under_way += 1
        try:
            world.note(f"{self._number} {name} {sid} at {worker.name}")
            outcome = await getattr(self, f"_{name}")(worker, sid)
            world.note(f"{self._number} {outcome}")
            world.done[f"{name} {outcome}"] += 1
        finally:
            world.under_way -= 1
        if worker.is_up.is_set() and worker.is_broken and not worker.changing.locked():
            async with worker.changing:
                if worker.is_up.is_set() and worker.is_broken:
                    await worker.kill()
                    await world.revive(worker)

    def _token(self, kind: str = "") -> str:
        self._count += 1
        return f"{kind}{self._number}.{self._count}"

    async def _call(self, worker: Worker, call: Callable[[StateManager], Awaitable[Any]]) -> Any:
        """Make a call, as a task of the worker's process; now and then cancel it.

        Returns:
            What it returns, or the exception that it ends with.
        """
        LIFE.set(worker.life)
        task = asyncio.create_task(_called(call, worker.state), name="client")
        LIFE.set(None)
        if self._chance.random() < 0.08:
            for _ in range(self._chance.randrange(12)):
                await asyncio.sleep(0)
            if self._chance.random() < 0.5:
                await asyncio.sleep(0.01 * self._chance.random())
            task.cancel()
        await asyncio.wait([task], timeout=_CALL_SECONDS)
        if not task.done():
            raise Wrong("a call hangs")
        if task.cancelled():
            return asyncio.CancelledError()
        error = task.exception()
        if error is None:
            return task.result()
        if isinstance(error, (*_NOT_DONE, *_PERHAPS_DONE)):
            return error
        raise Wrong(f"unexpected: {error!r}") from error

    # --- changes ----------------------------------------------------------------------------------

    async def _change(
        self,
        worker: Worker,
        sid: str,
        token: str,
        call: Callable[[StateManager], Awaitable[Any]],
    ) -> str:
        """Change a session; whichever lives there may get the token."""
        model, world = self._model, self._world
        asked_at = world.loop.now
        before = model.existing(sid)
        known = {born.token: list(born.acknowledged) for born in before}
        model.change(sid, token)
        result = await self._call(worker, call)
        model.changed(sid, token)
        model.accessed(sid, world.loop.now)
        if isinstance(result, BaseException):
            return self._not_changed(sid, token, result, before)
        born, found = model.view(sid, result.data, result.version)
        if token not in found:
            raise Wrong(f"{sid}: {token} was acknowledged without being there")
        born.acknowledged[token] = worker.name
        if world.is_strict:
            model.check_not_ended(born, asked_at)
            if not world.has_jumped:
                model.check_not_over(born, asked_at - world.leeway - world.granted(born))
            model.check_has(born, found, known.get(born.token, ()), "were acknowledged before")
        return "done"

    def _not_changed(
        self,
        sid: str,
        token: str,
        error: BaseException,
        before: list[Born],
        *,
        is_edit: bool = False,
    ) -> str:
        world = self._world
        if isinstance(error, _NOT_DONE):
            for born in self._model.by_id.get(sid, ()):
                born.refused.add(token)
        # An edit may have been made of a creation of this worker's that came too late.
        sees_all = world.is_alone or not is_edit
        if isinstance(error, errors.SessionNotFound) and world.is_strict and sees_all:
            if world.has_jumped:
                return type(error).__name__
            self._model.check_gone(before, world.loop.now + world.leeway, "is not found")
        return type(error).__name__

    async def _update(self, worker: Worker, sid: str) -> str:
        token = self._token()

        def append(data: Any) -> None:
            data["log"].append(token)
            data["fill"] = filler(token)

        return await self._change(worker, sid, token, lambda s: s.update_session(sid, append))

    async def _set(self, worker: Worker, sid: str) -> str:
        token = self._token("k")
        return await self._change(
            worker, sid, token, lambda s: s.update_session_data(sid, token, 1)
        )

    async def _edit(self, worker: Worker, sid: str) -> str:
        token = self._token()
        pause = self._chance.choice([0.0, 0.01, 0.5]) * self._chance.random()

        async def edit(state: StateManager) -> Any:
            async with state.edit(sid) as draft:
                draft["log"].append(token)
                await asyncio.sleep(pause)
                draft["fill"] = filler(token)
            return _Edited

        return await self._edited(worker, sid, token, edit)

    async def _edited(
        self, worker: Worker, sid: str, token: str, edit: Callable[[StateManager], Awaitable[Any]]
    ) -> str:
        """An edit returns no view; what it was made of is whatever lives there."""
        model, world = self._model, self._world
        before = model.existing(sid)
        model.change(sid, token)
        result = await self._call(worker, edit)
        model.changed(sid, token)
        model.accessed(sid, world.loop.now)
        if isinstance(result, BaseException):
            return self._not_changed(sid, token, result, before, is_edit=True)
        lives = [each for each in model.by_id.get(sid, ()) if each.token not in each.refused]
        if len(lives) == 1:  # else nobody can tell whose it was
            lives[0].acknowledged[token] = worker.name
        return "done"

    async def _create(self, worker: Worker, sid: str) -> str:
        model, world = self._model, self._world
        token = self._token()
        ttl = self._chance.choice([0, 0, 1e6, 4.0, 15.0])
        renews = self._chance.random() < 0.5
        asked_at = world.loop.now
        before = model.existing(sid)
        had = list(model.by_id.get(sid, ()))
        born = model.create(sid, token, asked_at, ttl, renews=renews)
        result = await self._call(
            worker,
            lambda state: state.create_session(
                session_id=sid, data=data_of([token]), ttl_seconds=ttl, auto_renew=renews
            ),
        )
        if isinstance(result, BaseException):
            if isinstance(result, _NOT_DONE):
                born.refused.add(token)
            if isinstance(result, errors.SessionExists) and not had:
                others = [each for each in model.by_id[sid] if each is not born]
                if not others:
                    raise Wrong(f"{sid} exists, and nobody has created it")
            return type(result).__name__
        born.acknowledged[token] = worker.name
        if ttl and not born.is_retimed:
            born.over_from = max(
                world.loop.now + ttl * (_GRANT if renews else 1.0),
                born.over_from if born.over_from < float("inf") else 0.0,
            )
        if world.is_strict and not world.has_jumped:
            model.check_gone(before, world.loop.now + world.leeway, "was created again")
        return "done"

    async def _terminate(self, worker: Worker, sid: str) -> str:
        world = self._world
        lives = list(self._model.by_id.get(sid, ()))
        before = self._model.existing(sid)
        for born in lives:
            if born.end == "no":
                born.end = "open"
        asked = Asked()
        self._model.ends[sid].append(asked)
        result = await self._call(worker, lambda state: state.terminate_session(sid))
        is_stray = isinstance(result, BaseException)
        asked.until = world.loop.now + (_STRAY_SECONDS if is_stray else 0.0)
        if isinstance(result, BaseException):
            return type(result).__name__
        if result is False and world.is_strict and not world.has_jumped:
            for born in before:
                if world.loop.now + world.leeway < born.lives_until and born.end == "no":
                    raise Wrong(f"{sid} is not there to be ended")
        if result is False:
            return "none"
        ended = [born for born in lives if born.exists and born.end != "done"]
        possible = [
            born
            for born in self._model.by_id.get(sid, ())
            if born.token not in born.refused and born.end != "done"
        ]
        if world.is_strict or (
            ended == possible and len(ended) == 1
        ):  # else each worker may have one of its own
            for born in ended:
                born.end = "done"
                born.ended_at = world.loop.now
        return "done"

    async def _ttl(self, worker: Worker, sid: str) -> str:
        world = self._world
        ttl = self._chance.choice([0, 8.0, 40.0])
        lives = list(self._model.by_id.get(sid, ()))
        asked_at = world.loop.now
        for born in lives:
            if ttl:
                born.lives_until = min(born.lives_until, asked_at + ttl)
            born.is_retimed = True
            born.over_from = float("inf")  # several of these at once: nobody can tell
        asked = Asked(ttl_seconds=ttl or float("inf"))
        self._model.ttls[sid].append(asked)
        result = await self._call(worker, lambda state: state.set_ttl(sid, ttl))
        asked.until = world.loop.now + _STRAY_SECONDS
        return type(result).__name__ if isinstance(result, BaseException) else "done"

    # --- looking ----------------------------------------------------------------------------------

    async def _get(self, worker: Worker, sid: str) -> str:
        return await self._look(worker, sid, fresh=False)

    async def _fresh(self, worker: Worker, sid: str) -> str:
        return await self._look(worker, sid, fresh=True)

    async def _look(self, worker: Worker, sid: str, *, fresh: bool) -> str:
        model, world = self._model, self._world
        asked_at = world.loop.now
        sees_all = world.is_alone or fresh
        by = None if sees_all else worker.name
        before = model.existing(sid, by=by)
        known = {
            born.token: [
                token for token, teller in born.acknowledged.items() if by in {None, teller}
            ]
            for born in model.by_id.get(sid, ())
        }
        renew = self._chance.random() < 0.8
        result = await self._call(
            worker, lambda state: state.get_session(sid, fresh=fresh, renew=renew)
        )
        if isinstance(result, BaseException):
            if isinstance(result, (errors.SessionNotFound, errors.ConflictError)):
                raise Wrong(f"a read ends with {result!r}")
            return type(result).__name__
        is_strict = world.is_strict
        if result is None:
            if is_strict and not world.has_jumped:
                model.check_gone(before, world.loop.now + world.leeway, "is not shown")
            return "none"
        born, found = model.view(sid, result.data, result.version)
        if renew:
            model.accessed(sid, world.loop.now)
        if is_strict and not world.has_jumped:
            model.check_not_over(born, asked_at - world.leeway - world.granted(born))
        if is_strict:
            if sees_all:
                model.check_not_ended(born, asked_at)
            model.check_has(born, found, known.get(born.token, ()), "were acknowledged before")
        return "shown"

    async def _list(self, worker: Worker, sid: str) -> str:
        del sid
        result = await self._call(worker, lambda state: state.get_active_sessions())
        if isinstance(result, BaseException):
            return type(result).__name__
        if len(result) != len(set(result)) or not set(result) <= set(self._world.sids):
            raise Wrong(f"listed: {result}")
        return "done"

    # --- moving -----------------------------------------------------------------------------------

    async def _move(self, worker: Worker, call: Callable[[StateManager], Awaitable[Any]]) -> str:
        result = await self._call(worker, call)
        return type(result).__name__ if isinstance(result, BaseException) else "done"

    async def _spill(self, worker: Worker, sid: str) -> str:
        return await self._move(worker, lambda state: state.spill_session(sid))

    async def _restore(self, worker: Worker, sid: str) -> str:
        return await self._move(worker, lambda state: state.restore_session(sid))

    async def _flush(self, worker: Worker, sid: str) -> str:
        del sid
        return await self._move(worker, lambda state: state.flush())

    async def _clean(self, worker: Worker, sid: str) -> str:
        del sid
        return await self._move(worker, lambda state: state.cleanup_expired())

    async def _compact(self, worker: Worker, sid: str) -> str:
        del sid
        return await self._move(worker, lambda state: state.compact())

    async def _checkpoint(self, worker: Worker, sid: str) -> str:
        del sid
        return await self._move(worker, lambda state: state.create_checkpoint())


_GRANT: Final = 1.125
_Edited: Final = object()
_OPERATIONS: Final = {
    "create": 14,
    "update": 22,
    "set": 12,
    "edit": 8,
    "terminate": 5,
    "ttl": 2,
    "get": 14,
    "fresh": 8,
    "list": 2,
    "spill": 6,
    "restore": 3,
    "flush": 2,
    "clean": 2,
    "compact": 2,
    "checkpoint": 1.5,
}


async def _called(call: Callable[[StateManager], Awaitable[Any]], state: StateManager) -> Any:
    return await call(state)


class Chaos:
    """Lets things go wrong for as long as the clients work.

    Args:
        world: where.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._chance = Random(world.chance.random())
        self._snapshot = world.server.snapshot()

    async def run(self) -> None:
        """Let some things go wrong."""
        everywhere = ["kill", "kill", "power", "reopen", "full", "sync", "stall"]
        if self._world.is_alone:
            names = [*everywhere, "jump", "goback", "keep"]
        else:
            shared = ["cut_off", "hang", "down", "lossy", "emptied", "older", "replicate", "cut"]
            names = [*everywhere, *shared, *shared[:4]]
        for _ in range(self._chance.randrange(7)):
            await asyncio.sleep(self._chance.random() * 5)
            name = self._chance.choice(names)
            worker = self._chance.choice(self._world.workers)
            self._world.note(f"{name} {worker.name}")
            self._world.done[f"chaos {name}"] += 1
            await getattr(self, f"_{name}")(worker)

    async def _again(self, worker: Worker, power_loss: Random | None) -> None:
        async with worker.changing:
            await worker.kill(power_loss)
            await asyncio.sleep(self._chance.random())
            if self._chance.random() < 0.3:  # killed again while it recovers
                opening = asyncio.create_task(worker.open())
                for _ in range(self._chance.randrange(60)):
                    await asyncio.sleep(0)
                await worker.kill(power_loss)
                await asyncio.wait([opening])
                with suppress(asyncio.CancelledError):
                    if opening.result():  # it was faster
                        await worker.kill(power_loss)
            self._forget_times_after_jump()
            await self._world.revive(worker)

    def _forget_times_after_jump(self) -> None:
        """Between runs a jump of the clock cannot be told from time that has passed."""

    async def _kill(self, worker: Worker) -> None:
        await self._again(worker, None)

    async def _power(self, worker: Worker) -> None:
        synced = self._world._fsync == "always"
        await self._again(worker, Random(self._chance.random()) if synced else None)

    async def _reopen(self, worker: Worker) -> None:
        async with worker.changing:
            await worker.close()
            await self._world.revive(worker)

    async def _full(self, worker: Worker) -> None:
        worker.files.free_bytes = self._chance.randrange(20_000)
        await asyncio.sleep(self._chance.random() * 4)
        worker.files.free_bytes = None

    async def _sync(self, worker: Worker) -> None:
        """Let one of the next syncs fail."""
        left = self._chance.randrange(1, 10)

        def fault(_: MemoryFiles, call: Call) -> None:
            nonlocal left
            if call.operation in {"sync_data", "sync", "sync_directory"}:
                left -= 1
                if left == 0:
                    raise OSError(errno.EIO, "simulated", call.path)

        worker.files.faults.append(fault)

    async def _stall(self, worker: Worker) -> None:
        """Let the process stand still, as SIGSTOP does, and time go on."""
        del worker
        self._world.loop.now += self._chance.random() * 5

    async def _jump(self, worker: Worker) -> None:
        self._world.has_jumped = True
        worker.clock.jump(self._chance.choice([10 * _DAY, -10 * _DAY]))

    # --- checkpoints ------------------------------------------------------------------------------

    async def _quiet(self) -> None:
        """Wait until nobody asks for anything."""
        self._world.quiet.clear()
        while self._world.under_way:  # noqa: ASYNC110 - looked at once, and seldom
            await asyncio.sleep(0.01)

    async def _keep(self, worker: Worker) -> None:
        """Make a checkpoint of what is known exactly."""
        world = self._world
        await self._quiet()
        try:
            async with worker.changing:
                if worker.is_broken:
                    return
                held = {}
                for sid in world.sids:
                    session = await worker.state.get_session(sid, renew=False)
                    if session is not None:
                        held[sid] = set(tokens_in(session.data))
                info = await worker.state.create_checkpoint()
                world.checkpoint = info.id, held
        except errors.PersistenceError as error:
            world.note(f"no checkpoint: {error!r}")
        finally:
            world.quiet.set()

    async def _goback(self, worker: Worker) -> None:
        """Restore it, and compare."""
        world = self._world
        if world.checkpoint is None:
            return
        wanted, held = world.checkpoint
        await self._quiet()
        try:
            async with worker.changing:
                if not worker.is_broken:
                    await self._restore(worker, wanted, held)
        finally:
            world.quiet.set()

    async def _restore(self, worker: Worker, wanted: str, held: dict[str, set[str]]) -> None:
        world = self._world
        try:
            await worker.state.restore_checkpoint(wanted)
        except errors.CheckpointNotFound:
            return  # later ones have taken its place
        except errors.PersistenceError as error:
            world.note(f"not restored: {error!r}")
            if worker.is_broken:
                await self._forget(worker)
            return
        for sid in world.sids:
            session = await worker.state.get_session(sid, renew=False)
            there = set() if session is None else set(tokens_in(session.data))
            if there and there != held.get(sid):
                raise Wrong(f"{sid}: restored {there}, kept was {held.get(sid)}")
            for born in world.model.by_id.get(sid, ()):
                born.end = "no" if born.token in there else "done"
                born.ended_at = world.loop.now
                if born.token in there:
                    born.acknowledged = dict.fromkeys(there, worker.name)
            if not there and sid in held and not world.has_jumped:
                self._check_over(sid, held[sid])

    async def _forget(self, worker: Worker) -> None:
        """A restore whose outcome is unknown: what is there now is what is known."""
        await worker.kill()
        await self._world.revive(worker)
        for sid in self._world.sids:
            session = await worker.state.get_session(sid, renew=False)
            there = set() if session is None else set(tokens_in(session.data))
            for born in self._world.model.by_id.get(sid, ()):
                born.end = "no" if born.token in there else "done"
                born.ended_at = self._world.loop.now
                if born.token in there:
                    born.acknowledged = dict.fromkeys(there, worker.name)

    def _check_over(self, sid: str, held: set[str]) -> None:
        for born in self._world.model.by_id[sid]:
            if born.token in held and self._world.loop.now < born.lives_until:
                raise Wrong(f"{sid} is not restored")

    # --- the shared tier --------------------------------------------------------------------------

    async def _cut_off(self, worker: Worker) -> None:
        cut_off = self._world.network.cut_off
        cut_off.add(worker.name)
        await asyncio.sleep(self._chance.random() * 6)
        cut_off.discard(worker.name)

    async def _hang(self, worker: Worker) -> None:
        del worker
        self._world.network.stop()
        await asyncio.sleep(self._chance.random() * 5)
        self._world.network.go_on()

    async def _down(self, worker: Worker) -> None:
        del worker
        self._world.network.go_down()
        await asyncio.sleep(self._chance.random() * 5)
        self._world.network.is_up = True

    async def _cut(self, worker: Worker) -> None:
        del worker
        self._world.network.cut()

    async def _lossy(self, worker: Worker) -> None:
        del worker
        self._world.network.loses = self._chance.random() * 0.5
        await asyncio.sleep(self._chance.random() * 8)
        self._world.network.loses = 0.0

    async def _emptied(self, worker: Worker) -> None:
        """The server comes back without its data."""
        self._world.network.go_down()
        self._world.has_lost = True
        self._world.server.empty()
        await self._down(worker)

    async def _replicate(self, worker: Worker) -> None:
        """Let the replica be up to date now."""
        del worker
        self._snapshot = self._world.server.snapshot()

    async def _older(self, worker: Worker) -> None:
        """A replica that was behind takes over."""
        self._world.network.go_down()
        self._world.has_lost = self._world.has_gone_back = True
        self._world.server.go_back(self._snapshot)
        self._snapshot = self._world.server.snapshot()
        await self._down(worker)


def simulate(seed: int, kind: str | None = None) -> World:
    """Run one world; return it.

    Raises:
        Wrong, Stuck: the engine did what it must never do.
    """
    worlds: list[World] = []

    async def main(loop: SimulatedLoop) -> None:
        world = World(seed, loop, kind)
        worlds.append(world)
        with world.patched():
            await world.run()

    try:
        run(main)
    except BaseException as error:
        if worlds:
            error.add_note(f"seed {seed}:\n" + "\n".join(worlds[0].story[-60:]))
        raise
    return worlds[0]
