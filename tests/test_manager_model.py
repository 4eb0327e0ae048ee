"""The whole engine against a plain dict: one call at a time with every kind of ending, then many.

The first test runs a state machine: each rule calls the manager and a model of it. The model knows
no tiers: what a session is depends neither on where it is nor on how often the process died.

The second lets many tasks work at the same time. Each change appends a token of its own to a list
in the session, so that the list is the history of the session, and what everybody was told can be
checked against it.
"""

from __future__ import annotations

import asyncio
import math
import random
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from persistence import ManualClock, Session, SessionDraft, StateManager
from persistence.errors import ConflictError, DiskFull, SessionExists, SessionNotFound
from tests.engine import (
    DAY,
    KIB,
    ScriptedFiles,
    commits_of,
    config_for,
    contents,
    disk_of,
    loop_steps,
    memory_of,
    outcomes,
)

TTL = 160.0
LIFETIME = 1000.0
SECTIONS: dict[str, dict[str, Any]] = {
    "session": {"ttl_seconds": TTL, "max_lifetime_seconds": LIFETIME},
    "memory": {"max_bytes": 64 * KIB},
    "disk": {"segment_bytes": 64 * KIB, "compaction_bytes_per_second": 0},
}

NAMES = st.sampled_from(["a", "b", "c", "../d", "ü" * 200, "f\n"])
FIELDS = st.sampled_from(["x", "y", "z"])
VALUES = st.one_of(
    st.none(),
    st.integers(-(2**70), 2**70),
    st.text(max_size=20),
    st.lists(st.integers(0, 9), max_size=5),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=3),
    st.integers(1, 30_000).map(bytes),
    st.tuples(st.integers(), st.frozensets(st.integers(0, 9))),
    st.integers(5_000, 20_000).map(lambda size: random.Random(size).randbytes(size)),
)
TTLS = st.sampled_from([None, 0, 40.0, TTL, 480.0])


REFUSALS = (SessionNotFound, DiskFull, ConflictError, ZeroDivisionError)


@dataclass
class Known:
    """What the model knows of a session; times are process time.

    `surely_until` and `perhaps_until` differ after a crash only: what was not recorded yet of the
    renewals is granted, and so is up to an eighth more than there was.
    """

    data: dict[str, Any]
    user: str | None
    ttl: float
    renews: bool
    cap: float
    version: int = 1
    surely_until: float = math.inf
    perhaps_until: float = math.inf
    recorded_until: float = math.inf

    def renew(self, now: float) -> None:
        if self.renews:
            self.set_deadline(now)

    def set_deadline(self, now: float) -> None:
        deadline = min(now + self.ttl if self.ttl else math.inf, self.cap)
        self.surely_until = self.perhaps_until = deadline

    def record(self) -> None:
        """The newest access is in the log, or so nearly that the grant makes up for it."""
        self.recorded_until = self.surely_until

    def crash(self) -> None:
        grant = self.ttl / 8 if self.renews else 0
        self.surely_until = min(self.recorded_until, self.surely_until)
        self.perhaps_until = min(self.perhaps_until + grant, self.cap)
        self.recorded_until = self.surely_until


class Engine(RuleBasedStateMachine):
    """The manager and the model, in lock-step."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="model-"))
        self.numbers = 0
        self.ended = 0  # by listings, and told by the next clean-up
        self.path = self.folder / "0"
        self.clock = ManualClock()
        self.files = ScriptedFiles()
        self.runner = asyncio.Runner()
        self.model: dict[str, Known] = {}
        self.jumped = False
        self.open()

    def run(self, call: Awaitable[Any]) -> Any:
        """Return what `call` returns, or the error it raises."""

        async def waiting() -> Any:
            async with asyncio.timeout(20):
                return (await outcomes([call]))[0]

        return self.runner.run(waiting())

    def open(self) -> None:
        config = config_for(self.path, **SECTIONS)
        self.state = StateManager(config=config, clock=self.clock, files=self.files)
        assert self.run(self.state.open()) is None

    def teardown(self) -> None:
        self.run(self.state.flush())
        assert commits_of(self.state).pending_bytes == 0
        self.run(self.state.close())
        self.runner.close()
        shutil.rmtree(self.folder)

    @property
    def now(self) -> float:
        return self.clock.monotonic()

    def settle(self, name: str, *, seen: bool) -> Known | None:
        """Compare what was seen with what the model knows; return the session if it is there."""
        known = self.model.get(name)
        if known is None:
            assert not seen, f"{name!r} is there and should not be"
            return None
        if seen:
            assert self.now < known.perhaps_until, f"{name!r} has expired"
            return known
        assert self.now >= known.surely_until, f"{name!r} has vanished"
        del self.model[name]  # whoever was told so never sees it again
        return None

    def settle_update(self, name: str, result: Any) -> Known | None:
        """The same after an update; count it."""
        if isinstance(result, SessionNotFound):
            return self.settle(name, seen=False)
        assert not isinstance(result, BaseException), result
        known = self.settle(name, seen=True)
        assert known is not None
        known.renew(self.now)
        known.record()
        return known

    def settle_failure(self, name: str) -> None:
        """The same after a change that was given up: it was an access and nothing else."""
        known = self.settle(name, seen=True)
        assert known is not None
        known.renew(self.now)

    # Beginning

    @initialize()
    def begin(self) -> None:
        assert self.run(contents(self.state)) == {}

    @rule(
        name=NAMES,
        data=st.dictionaries(FIELDS, VALUES, max_size=2),
        user=st.sampled_from([None, "ada"]),
        ttl=TTLS,
        renews=st.sampled_from([True, True, False]),
    )
    def create(
        self, name: str, data: dict[str, Any], user: str | None, ttl: float | None, renews: bool
    ) -> None:
        result = self.run(self.state.create_session(user, None, ttl, data, name, auto_renew=renews))
        if isinstance(result, SessionExists):
            assert self.settle(name, seen=True) is not None
            return
        assert result == name
        self.settle(name, seen=False)
        seconds = TTL if ttl is None else ttl
        known = Known(data, user, seconds, renews, self.now + LIFETIME)
        known.set_deadline(self.now)
        known.record()
        self.model[name] = known

    # Changing

    @rule(name=NAMES, key=FIELDS, value=VALUES)
    def set_a_field(self, name: str, key: str, value: Any) -> None:
        result = self.run(self.state.update_session_data(name, key, value))
        if known := self.settle_update(name, result):
            known.version += 1
            known.data[key] = value
            assert (result.version, result.data) == (known.version, known.data)

    @rule(name=NAMES, key=FIELDS, value=VALUES, fails=st.booleans())
    def update(self, name: str, key: str, value: Any, fails: bool) -> None:
        def change(draft: SessionDraft) -> None:
            draft[key] = [draft.pop(key, None), value]
            if fails:
                raise ZeroDivisionError

        result = self.run(self.state.update_session(name, change))
        if isinstance(result, ZeroDivisionError):
            self.settle_failure(name)
            return
        if known := self.settle_update(name, result):
            known.version += 1
            known.data[key] = [known.data.pop(key, None), value]
            assert result.data == known.data

    @rule(name=NAMES, key=FIELDS, value=VALUES, deletes=st.booleans(), fails=st.booleans())
    def edit(self, name: str, key: str, value: Any, deletes: bool, fails: bool) -> None:
        known = self.model.get(name)
        before = dict(known.data) if known else {}

        async def edited() -> dict[str, Any]:
            async with self.state.edit(name) as draft:
                assert dict(draft) == before
                draft[key] = value
                if deletes:
                    draft.pop(next(iter(draft)))
                after = dict(draft)
                if fails:
                    raise ZeroDivisionError
            return after

        result = self.run(edited())
        if isinstance(result, ZeroDivisionError):
            self.settle_failure(name)
            return
        if known := self.settle_update(name, result):
            if (result, list(map(type, result.values()))) != (
                before,
                list(map(type, before.values())),
            ):
                known.version += 1
            known.data = result

    @rule(name=NAMES, data=st.dictionaries(FIELDS, VALUES, max_size=2), ttl=TTLS)
    def replace(self, name: str, data: dict[str, Any], ttl: float | None) -> None:
        result = self.run(self.state.replace_session(name, data, ttl))
        if known := self.settle_update(name, result):
            known.version += 1
            known.data = dict(data)
            if ttl is not None:
                known.ttl = ttl
                known.set_deadline(self.now)
                known.record()

    @rule(name=NAMES, ttl=st.sampled_from([0, 40.0, TTL, 480.0]))
    def set_ttl(self, name: str, ttl: float) -> None:
        seen = self.run(self.state.set_ttl(name, ttl))
        if known := self.settle(name, seen=seen):
            known.ttl = ttl
            known.set_deadline(self.now)
            known.record()

    @rule(name=NAMES)
    def terminate(self, name: str) -> None:
        if self.settle(name, seen=self.run(self.state.terminate_session(name))):
            del self.model[name]

    # Looking

    @rule(name=NAMES, renew=st.booleans())
    def get(self, name: str, renew: bool) -> None:
        session = self.run(self.state.get_session(name, renew=renew))
        assert session is None or isinstance(session, Session), session
        known = self.settle(name, seen=session is not None)
        if session is not None and known is not None:
            if renew:
                known.renew(self.now)
            self.compare(session, known)

    def compare(self, session: Session, known: Known) -> None:
        assert session.data == known.data
        assert [*map(type, session.data.values())] == [*map(type, known.data.values())]
        assert session.version == known.version
        assert session.user_id == known.user
        assert session.ttl_seconds == known.ttl
        if known.surely_until == known.perhaps_until:
            expires = session.expires_at
            left = math.inf if expires is None else expires.timestamp() - self.clock.wall()
            assert left == pytest.approx(known.surely_until - self.now, abs=0.01)

    @rule(name=NAMES)
    def has(self, name: str) -> None:
        self.settle(name, seen=self.run(self.state.has_session(name)))

    @rule(name=NAMES)
    def find(self, name: str) -> None:
        del name
        self.ended += self.perhaps_over()
        found = set(self.run(self.state.find_sessions(user_id="ada")))
        for other, known in list(self.model.items()):
            if known.user == "ada":
                self.settle(other, seen=other in found)
        assert found <= self.model.keys()

    @rule()
    def list_all(self) -> None:
        self.ended += self.perhaps_over()
        found = self.run(self.state.get_active_sessions())
        assert len(found) == len(set(found))
        for name in set(self.model) | set(found):
            self.settle(name, seen=name in found)

    # Moving

    @rule(name=NAMES)
    def spill(self, name: str) -> None:
        if known := self.settle(name, seen=self.run(self.state.spill_session(name))):
            known.record()
            assert name not in memory_of(self.state)

    @rule(name=NAMES)
    def restore(self, name: str) -> None:
        self.settle(name, seen=self.run(self.state.restore_session(name)))

    @rule()
    def flush(self) -> None:
        assert self.run(self.state.flush()) is None
        for known in self.model.values():
            known.record()

    @rule()
    def compact(self) -> None:
        self.ended += self.perhaps_over()
        assert self.run(self.state.compact()) is None
        self.forget_the_expired()

    @rule()
    def clean_up(self) -> None:
        count = self.run(self.state.cleanup_expired())
        most = self.perhaps_over() + self.ended
        self.ended = 0
        for known in self.model.values():
            if self.now < known.surely_until:
                known.record()
        assert self.forget_the_expired() <= count <= most

    def perhaps_over(self) -> int:
        return sum(self.now >= known.surely_until for known in self.model.values())

    def forget_the_expired(self) -> int:
        over = [name for name, known in self.model.items() if self.now >= known.perhaps_until]
        for name in over:
            del self.model[name]
        return len(over)

    # Time

    @rule(seconds=st.sampled_from([0.25, 5.0, 39.5, 40.0, 159.75, 160.0, 600.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(seconds=st.sampled_from([10 * DAY, -10 * DAY, 3600.0]))
    def jump(self, seconds: float) -> None:
        self.clock.jump_wall(seconds)
        self.jumped = True

    # Ending

    @rule()
    def close_and_reopen(self) -> None:
        assert self.run(self.state.close()) is None
        for known in self.model.values():
            known.record()
            if self.jumped:  # from hints, like after a crash
                known.crash()
        self.jumped = False
        self.open()

    @rule(flushes=st.booleans())
    def crash_and_reopen(self, flushes: bool) -> None:
        if self.jumped:
            return  # what was written before a jump cannot know of it
        if flushes:
            self.flush()
        self.numbers += 1
        image = self.files.image(self.path, self.folder / str(self.numbers))
        assert self.run(self.state.close()) is None
        shutil.rmtree(self.path)
        self.path = image
        for known in self.model.values():
            known.crash()
        self.open()

    @invariant()
    def accounts_are_exact(self) -> None:
        memory_of(self.state).check()
        assert memory_of(self.state).peak_bytes <= 64 * KIB + 61 * KIB
        assert not disk_of(self.state).damages


TestEngine = Engine.TestCase
TestEngine.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


# Many at the same time


@dataclass
class Told:
    """What callers were told about a session of one name.

    A session's data are its generation and its history, a list of tokens.
    """

    acknowledged: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    refused: set[int] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)
    seen: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))

    def saw(self, data: dict[str, Any]) -> None:
        """Check a version that a reader got against the ones that came before."""
        generation, history = data["generation"], data["history"]
        longest = self.seen[generation]
        shorter, longer = sorted((longest, history), key=len)
        assert longer[: len(shorter)] == shorter, "two versions contradict each other"
        self.seen[generation] = longer
        assert self.refused.isdisjoint(history), "a refused change is there"

    def check_final(self, data: dict[str, Any] | None) -> None:
        """Check what is left in the end."""
        if data is None:
            return
        self.saw(data)
        generation, history = data["generation"], data["history"]
        assert generation not in self.ended, "a terminated session is back"
        assert len(history) == len(set(history))
        assert set(history) >= set(self.acknowledged[generation]), "an acknowledged change is lost"
        order = {token: place for place, token in enumerate(history)}
        places = [order[token] for token in self.acknowledged[generation]]
        assert places == sorted(places), "acknowledged in another order than committed"


class Crowd:
    """Tasks that do what they like with a few sessions."""

    def __init__(self, state: StateManager, files: ScriptedFiles, seed: int) -> None:
        self.state = state
        self.files = files
        self.rng = random.Random(seed)
        self.told: defaultdict[str, Told] = defaultdict(Told)
        self.tokens = 0
        self.generations = 0
        self.counts: defaultdict[str, int] = defaultdict(int)

    def token(self) -> int:
        self.tokens += 1
        return self.tokens

    async def change(self, name: str) -> None:
        told, token = self.told[name], self.token()
        large = self.rng.random() < 0.2

        def append(draft: SessionDraft) -> None:
            draft["history"].append(token)
            draft["filler"] = "x" * 3000 if large else ""

        try:
            session = await self.state.update_session(name, append)
        except REFUSALS:
            told.refused.add(token)
            raise
        assert session["history"][-1] == token
        told.acknowledged[session["generation"]].append(token)
        told.saw(session.data)

    async def edit(self, name: str) -> None:
        told, token = self.told[name], self.token()
        try:
            async with self.state.edit(name) as draft:
                generation = draft["generation"]
                draft["history"].append(token)
                await loop_steps(self.rng.randrange(4))
                draft["filler"] = ""
                draft["one"] = 1 // self.rng.choice((0, 1, 1, 1, 1))
        except REFUSALS:
            told.refused.add(token)
            raise
        told.acknowledged[generation].append(token)

    async def create(self, name: str) -> None:
        self.generations += 1
        data = {"generation": self.generations, "history": [], "filler": "y" * 500}
        session = await self.state.get_or_create_session(name, data=data)
        self.told[name].saw(session.data)

    async def end(self, name: str) -> None:
        session = await self.state.get_session(name)
        if session is not None and await self.state.terminate_session(name):
            # Whatever was there when the call began is over, and cannot come back.
            self.told[name].ended.add(session["generation"])

    async def read(self, name: str) -> None:
        session = await self.state.get_session(name)
        if session is not None:
            assert session["generation"] not in self.told[name].ended
            self.told[name].saw(session.data)

    async def act(self, names: list[str]) -> None:
        name = self.rng.choice(names)
        kind = self.rng.choices(
            ["change", "edit", "create", "read", "end", "spill", "restore", "list", "compact"],
            [30, 10, 8, 20, 2, 8, 5, 1, 1],
        )[0]
        self.counts[kind] += 1
        if kind in ("spill", "restore"):
            await getattr(self.state, f"{kind}_session")(name)
        elif kind == "list":
            found = [found async for found in self.state.iter_sessions()]
            assert len(found) == len(set(found))
        elif kind == "compact":
            await self.state.compact()
        else:
            await getattr(self, kind)(name)

    async def cause_trouble(self) -> None:
        """Let the disk be full now and then."""
        while True:
            await loop_steps(self.rng.randrange(50, 200))
            self.files.full = True
            await loop_steps(self.rng.randrange(1, 20))
            self.files.full = False

    async def work(self, count: int, names: list[str]) -> None:
        running: set[asyncio.Task[None]] = set()
        for _ in range(count):
            task = asyncio.create_task(self.act(names))
            running.add(task)
            task.add_done_callback(self.finished)
            task.add_done_callback(running.discard)
            if self.rng.random() < 0.05:
                self.rng.choice(list(running)).cancel()
            if len(running) > 30 or self.rng.random() < 0.3:
                await loop_steps(self.rng.randrange(6))
        await outcomes(list(running))

    def finished(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            self.counts["cancelled"] += 1
            return
        error = task.exception()
        if error is not None:
            self.counts[type(error).__name__] += 1
            if not isinstance(error, REFUSALS):
                self.failures.append(error)

    failures: list[BaseException] = []  # noqa: RUF012 - set for each crowd below


@pytest.mark.parametrize("tells_cached", [True, False], ids=["cached reads", "reads in threads"])
@pytest.mark.parametrize("trouble", [False, True], ids=["disk with space", "disk full at times"])
@pytest.mark.parametrize("seed", range(3))
async def test_what_a_crowd_was_told_is_what_is_there_after_a_crash(
    tmp_path: Path, seed: int, trouble: bool, tells_cached: bool
) -> None:
    files = ScriptedFiles()
    files.tells_cached = tells_cached
    sections: dict[str, dict[str, Any]] = {
        "memory": {"max_bytes": 16 * KIB},
        "disk": {
            "segment_bytes": 64 * KIB,
            "queue_bytes": 16 * KIB,
            "compaction_bytes_per_second": 0,
            "fsync": ["always", "interval", "never"][seed % 3],
        },
    }
    names = [f"session {number}" for number in range(12)]
    path = tmp_path / "0"
    told: defaultdict[str, Told] = defaultdict(Told)
    for run in range(3):
        async with StateManager(config=config_for(path, **sections), files=files) as state:
            crowd = Crowd(state, files, seed * 10 + run)
            crowd.told, crowd.failures = told, []
            crowd.tokens = crowd.generations = run * 1_000_000
            troubling = asyncio.create_task(crowd.cause_trouble()) if trouble else None
            async with asyncio.timeout(60):
                await crowd.work(800, names)
            if troubling is not None:
                troubling.cancel()
                await outcomes([troubling])
                files.full = False
            assert crowd.failures == []
            memory_of(state).check()
            path = files.image(path, tmp_path / str(run + 1))
        async with StateManager(config=config_for(path, **sections), files=files) as again:
            left = await contents(again)
            for name in names:
                told[name].check_final(left.get(name))
            assert left.keys() <= set(names)
    assert sum(len(item) for one in told.values() for item in one.acknowledged.values()) > 300
