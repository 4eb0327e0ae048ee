"""Real servers that lose replies, hang, restart, forget, go back in time and hold damaged values.

Three parts. Two are about the shared tier alone. `lose_replies`: each update is applied once,
however often its reply is lost. `cancel_calls`: no reply reaches another caller. `Trouble` is about
whole workers that share sessions; the model is that of the simulation (`simmodel`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, Final

from persistence import StateManager, errors
from persistence import record as rec
from persistence.clock import SystemClock
from persistence.config import RedisConfig, SecurityConfig
from persistence.disk.filenames import CONFLICTS
from persistence.disk.journal import decode_entries
from persistence.keys import seals_for
from persistence.remote.contract import RemoteSession
from persistence.remote.redis import RedisTier
from persistence.sharing.conflicts import decode_conflict
from tests import encryption
from tests.engine import ScriptedFiles, config_for
from tests.faults.simmodel import Model, Wrong, data_of, filler, tokens_in
from tests.redis_servers import Proxy, RedisServer, need_binary
from tests.remote.sessions import create, new_record, next_record, update

_TIERS: Final = 8
_WORKERS: Final = 3
_SESSIONS: Final = 12
_TIMEOUT_SECONDS: Final = 0.5
_REST_SECONDS: Final = 60.0
_CONNECTIONS: Final = 4

_NOT_DONE: Final = (errors.SessionNotFound, errors.ConflictError, errors.RemoteUnavailable)


async def lose_replies(replies: int, seed: int, goes_on: Callable[[], bool]) -> tuple[int, int]:
    """Update sessions until so many replies were lost; return how many were, and the updates.

    Raises:
        AssertionError: an update was applied twice, or not at all.
    """
    server = RedisServer(need_binary()).start()
    proxy = await Proxy(server.port).start()
    chance = Random(seed)
    tiers = [
        RedisTier(RedisConfig(url=proxy.url, timeout_seconds=30), SystemClock())
        for _ in range(_TIERS)
    ]
    try:
        for tier in tiers:
            await tier.open()
        proxy.drops_reply = lambda data: chance.random() < (0.5 if data[:1] == b"*" else 0.02)

        async def work(tier: RedisTier, name: str) -> int:
            record, updates = new_record({"n": 0}), 0
            assert (await tier.commit([create(name, record)]))[0].is_stored
            while proxy.dropped < replies and goes_on():
                after = next_record(record, {"n": updates + 1})
                [result] = await tier.commit([update(name, record, after)])
                assert result.is_stored, result
                record, updates = after, updates + 1
            proxy.drops_reply = lambda _: False
            found = await tier.load(name)
            assert isinstance(found, RemoteSession)
            assert found.record == record
            assert rec.version_of(record) == updates + 1
            return updates

        done = await asyncio.gather(
            *(work(tier, f"{n}") for n, tier in enumerate([*tiers, *tiers]))
        )
        return proxy.dropped, sum(done)
    finally:
        for tier in tiers:
            await tier.close()
        await proxy.close()
        server.close()


async def cancel_calls(count: int, seed: int, goes_on: Callable[[], bool]) -> int:
    """Cancel reads and updates at any of their suspensions; return how many were cancelled.

    Raises:
        AssertionError: a call got what another one had asked for, or an update was lost.
    """
    server = RedisServer(need_binary()).start()
    chance = Random(seed)
    config = RedisConfig(url=server.url, max_connections=_CONNECTIONS, timeout_seconds=30)
    tier = RedisTier(config, SystemClock())
    records = {f"s{n}": new_record({"name": f"s{n}"}) for n in range(50)}
    cancelled = 0

    async def read(name: str) -> None:
        found = await tier.load(name)
        assert isinstance(found, RemoteSession)
        assert found.record == records[name], "another caller's reply"

    async def write(name: str) -> None:
        """Commit the next version until it is known to be there, as a worker does."""
        after = next_record(records[name], {"name": name, "n": chance.random()})
        request = update(name, records[name], after)
        call = asyncio.create_task(tier.commit([request]))
        for _ in range(chance.randrange(12)):
            await asyncio.sleep(0)
        nonlocal cancelled
        cancelled += call.cancel()
        with suppress(asyncio.CancelledError):
            await call
        [result] = await tier.commit([request])
        assert result.is_stored, result
        records[name] = after

    try:
        await tier.open()
        await tier.commit([create(name, record) for name, record in records.items()])
        while cancelled < count and goes_on():
            read_names = chance.choices(list(records)[:40], k=12)
            reads = [asyncio.create_task(read(name)) for name in read_names]
            writes = [
                asyncio.create_task(write(name)) for name in chance.sample(list(records)[40:], 4)
            ]
            for _ in range(chance.randrange(12)):
                await asyncio.sleep(0)
            for call in reads[::2]:
                cancelled += call.cancel()
            ended = await asyncio.gather(*reads, *writes, return_exceptions=True)
            problems = [error for error in ended if isinstance(error, Exception)]
            assert not problems, problems
        await asyncio.gather(*map(read, records))
        clients = server.told("CLIENT LIST").splitlines()
        assert len([line for line in clients if " cmd=client" not in line]) <= _CONNECTIONS
        return cancelled
    finally:
        await tier.close()
        server.close()


class Trouble:
    """Workers that share sessions while one thing after the other happens to the server.

    Args:
        directory: for their directories.
        seed: of what happens.
        on_outage: of all of them.
    """

    def __init__(self, directory: Path, seed: int, on_outage: str) -> None:
        self.happened: Counter[str] = Counter()
        self.acknowledged = 0
        self._directory = directory
        self._chance = Random(f"{seed} {on_outage}")
        self._on_outage = on_outage
        self._model = Model()
        self._count = 0
        self._has_lost = False
        self._stop = asyncio.Event()
        self._states: list[StateManager] = []
        self._server = RedisServer(need_binary()).start()
        self._others: list[RedisServer] = []

    async def run(self, rounds: int, goes_on: Callable[[], bool]) -> None:
        """Let so many things happen; then see that nothing is lost.

        Raises:
            Wrong: something is.
        """
        self._proxies = [await Proxy(self._server.port).start() for _ in range(_WORKERS)]
        try:
            for number, proxy in enumerate(self._proxies):
                self._states.append(await self._open(number, proxy))
            for number in range(_SESSIONS):
                await self._create(f"s{number}")
            clients = [asyncio.create_task(self._work()) for _ in range(2 * _WORKERS)]
            for _ in range(rounds):
                if not goes_on() or any(client.done() for client in clients):
                    break
                await self._something()
                await asyncio.sleep(self._chance.random() * 0.5)
            self._stop.set()
            await asyncio.gather(*clients)
            await self._rest()
        finally:
            self._stop.set()
            for state in self._states:
                await state.close(grace_seconds=1)
            for proxy in self._proxies:
                await proxy.close()
            for server in (self._server, *self._others):
                server.close()

    async def _open(self, number: int, proxy: Proxy) -> StateManager:
        config = config_for(
            self._directory / f"w{number}",
            redis={
                "timeout_seconds": _TIMEOUT_SECONDS,
                "heartbeat_seconds": 0.5,
                "on_outage": self._on_outage,
            },
            shutdown={"checkpoint": False},
        )
        state = StateManager(proxy.url, config, files=ScriptedFiles())
        await state.open()
        return state

    # --- work -------------------------------------------------------------------------------------

    def _token(self) -> str:
        self._count += 1
        return f"{self._count}.0"  # each a client of its own: many are under way at once

    async def _create(self, sid: str) -> None:
        token = self._token()
        born = self._model.create(sid, token, 0.0, 0.0, renews=False)
        await self._states[0].create_session(session_id=sid, data=data_of([token]), ttl_seconds=0)
        born.acknowledged[token] = "w0"

    async def _work(self) -> None:
        while not self._stop.is_set():
            sid = f"s{self._chance.randrange(_SESSIONS)}"
            state = self._chance.choice(self._states)
            if self._chance.random() < 0.4:
                await self._read(state, sid)
            else:
                await self._update(state, sid)
            await asyncio.sleep(0.001)

    async def _update(self, state: StateManager, sid: str) -> None:
        token = self._token()
        self._model.change(sid, token)

        def append(data: Any) -> None:
            data["log"].append(token)
            data["fill"] = filler(token)

        try:
            async with asyncio.timeout(60):
                session = await state.update_session(sid, append)
        except _NOT_DONE:
            for born in self._model.by_id[sid]:
                born.refused.add(token)
        except errors.PersistenceError:
            return
        else:
            born, found = self._model.view(sid, session.data, session.version)
            self._model.check_has(born, found, [token], "was acknowledged")
            born.acknowledged[token] = "w"
            self.acknowledged += 1
        finally:
            self._model.changed(sid, token)

    async def _read(self, state: StateManager, sid: str) -> None:
        [born] = self._model.by_id[sid]
        known = list(born.acknowledged)
        try:
            async with asyncio.timeout(60):
                session = await state.get_session(sid, fresh=True)
        except errors.PersistenceError:
            return
        is_strict = self._on_outage == "fail" and not self._has_lost
        if session is None:
            if is_strict:
                raise Wrong(f"{sid} is not shown")
            return
        born, found = self._model.view(sid, session.data, session.version)
        if is_strict:
            self._model.check_has(born, found, known, "were acknowledged before")

    # --- what happens -----------------------------------------------------------------------------

    async def _something(self) -> None:
        names = [
            "lossy",
            "lossy",
            "cut",
            "cut_off",
            "hang",
            "restart",
            "failover",
            "damage",
            "flush",
        ]
        name = self._chance.choice(names)
        self.happened[name] += 1
        await getattr(self, f"_{name}")()

    async def _lossy(self) -> None:
        for proxy in self._proxies:
            proxy.drops_reply = lambda _: self._chance.random() < 0.2
        await asyncio.sleep(self._chance.random())
        for proxy in self._proxies:
            proxy.drops_reply = lambda _: False

    async def _cut(self) -> None:
        self._chance.choice(self._proxies).cut()

    async def _cut_off(self) -> None:
        proxy = self._chance.choice(self._proxies)
        proxy.refuse()
        proxy.cut()
        await asyncio.sleep(self._chance.random())
        await proxy.start()

    async def _hang(self) -> None:
        self._server.hang()
        await asyncio.sleep(self._chance.random() * 3 * _TIMEOUT_SECONDS)
        self._server.go_on()

    async def _flush(self) -> None:
        await asyncio.to_thread(self._server.ask, "SCRIPT", "FLUSH")

    async def _restart(self) -> None:
        """It comes back without its data."""
        self._has_lost = True
        await asyncio.to_thread(self._server.restart_empty)

    async def _failover(self) -> None:
        """A replica takes over that has been behind for a moment."""
        self._has_lost = True
        port = str(self._server.port)
        replica = RedisServer(need_binary(), {"replicaof": f"127.0.0.1 {port}"})
        self._others.append(replica)
        await asyncio.to_thread(replica.start)
        for _ in range(200):
            if "master_link_status:up" in await asyncio.to_thread(replica.told, "INFO replication"):
                break
            await asyncio.sleep(0.01)
        await asyncio.to_thread(replica.ask, "REPLICAOF", "NO", "ONE")
        replica.options.clear()  # so that it is none when it is started again
        await asyncio.sleep(self._chance.random() * 0.3)
        self._others.remove(replica)
        before, self._server = self._server, replica
        for proxy in self._proxies:
            proxy._target_port = replica.port
            proxy.cut()
        before.close()

    async def _damage(self) -> None:
        """A value is damaged: it is never shown, and the others go on; then it is removed."""
        sid = f"s{self._chance.randrange(_SESSIONS)}"
        key = f"persistence:session:{{{sid}}}"

        def damage() -> bool:
            fields = self._server.ask("HGETALL", key)
            if not fields:
                return False
            names = list(fields) if isinstance(fields, dict) else fields[0::2]
            name = self._chance.choice([name for name in names if name != b"\xffstate"])
            self._server.ask("HSET", key, name, self._chance.randbytes(20))
            return True

        with suppress(Exception):
            if await asyncio.to_thread(damage):
                await asyncio.sleep(0.1)
        self._has_lost = True
        with suppress(Exception):
            await asyncio.to_thread(self._server.ask, "DEL", key)

    # --- the end ----------------------------------------------------------------------------------

    async def _rest(self) -> None:
        await self._wait_until_delivered()
        kept = self._conflicts()
        for sid, [born] in self._model.by_id.items():
            shown = set()
            for state in self._states:
                session = await state.get_session(sid, fresh=True)
                if session is None:
                    raise Wrong(f"{sid} is gone")
                _, found = self._model.view(sid, session.data, session.version)
                shown.add(frozenset(found))
            if len(shown) != 1:
                raise Wrong(f"{sid}: they do not agree")
            if not self._has_lost:
                [there] = shown
                self._model.check_has(
                    born, {*there, *kept.get(sid, ())}, born.acknowledged, "were acknowledged"
                )

    async def _wait_until_delivered(self) -> None:
        end = time.monotonic() + _REST_SECONDS
        while time.monotonic() < end:
            sides = [state._sharing for state in self._states]
            if all(s is not None and s.is_up and not len(s.outbox) for s in sides):
                for sid in self._model.by_id:
                    for state in self._states:
                        await state.get_session(sid, fresh=True)
                if not any(len(side.outbox) for side in sides if side is not None):
                    break
            await asyncio.sleep(0.1)
        else:
            left = [
                (side.stats(), side.copies.is_listening, dict(side.outbox.branches))
                for side in sides
                if side is not None
            ]
            raise Wrong(f"it does not come to rest: {left}")

    def _conflicts(self) -> dict[str, set[str]]:
        """Return what is kept of refused branches, by session."""
        kept: dict[str, set[str]] = {}
        security = SecurityConfig.model_validate(encryption.sections().get("security", {}))
        seals = seals_for(security)
        sealer = None if seals is None else seals.conflicts
        for number in range(_WORKERS):
            path = self._directory / f"w{number}" / CONFLICTS
            content = path.read_bytes() if path.exists() else b""
            for entry in decode_entries(content[8:24], content)[0]:
                conflict = decode_conflict(entry, sealer)
                if conflict is not None and conflict.record:
                    packed = rec.packed_fields(conflict.record)
                    data = {name: rec.unpack_value(value) for name, value in packed.items()}
                    kept.setdefault(conflict.session_id, set()).update(tokens_in(data))
        return kept
