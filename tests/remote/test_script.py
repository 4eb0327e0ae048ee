"""The commit script against a model of it: a dict, in twenty lines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persistence import record as rec
from persistence.record import NO_ID
from persistence.remote.contract import (
    IDS_REMEMBERED,
    Delete,
    Outcome,
    Put,
    RemoteSession,
    Request,
    Stored,
    Touch,
)
from persistence.remote.keys import Keys
from persistence.remote.layout import CODES, decode_session, pack_requests
from persistence.remote.router import Script
from tests.redis_servers import RedisServer
from tests.remote.sessions import new_id, new_record, next_record

KEYS = Keys("model")
SCRIPT = Script("commit.lua")
IDS = ("a", "b")


class Model:
    """What a tier remembers of one session, and what it answers."""

    def __init__(self) -> None:
        self.exists = False
        self.lives = False
        self.ended_nothing = False
        self.incarnation = NO_ID
        self.record = b""
        self.accessed = 0.0
        self.commits: list[bytes] = []

    def apply(self, request: Request) -> Outcome:
        if isinstance(request, Touch):
            return self._touch(request)
        commit = request.commit if isinstance(request, Delete) else rec.commit_of(request.record)
        if commit in self.commits:
            again = self.ended_nothing and self.commits[0] == commit
            return Outcome.MISSING if again else Outcome.ALREADY_APPLIED
        if isinstance(request, Delete):
            return self._delete(request)
        incarnation = rec.incarnation_of(request.record)
        if request.base == NO_ID:
            if self.lives:
                return Outcome.CONFLICT
            if self.exists and incarnation == self.incarnation:
                return Outcome.TERMINATED
        elif not self.exists:
            return Outcome.MISSING
        elif not self.lives:
            return Outcome.TERMINATED
        elif request.base != self.commits[0]:
            return Outcome.CONFLICT
        self.record, self.accessed, self.incarnation = request.record, request.accessed, incarnation
        self._remember(commit, lives=True)
        return Outcome.APPLIED

    def _touch(self, request: Touch) -> Outcome:
        if not self.exists:
            return Outcome.MISSING
        if not self.lives:
            return Outcome.TERMINATED
        if request.commit != self.commits[0]:
            return Outcome.CONFLICT
        self.accessed = max(self.accessed, request.accessed)
        return Outcome.APPLIED

    def _delete(self, request: Delete) -> Outcome:
        if self.exists and not self.lives:
            return Outcome.TERMINATED
        if self.exists and request.incarnation not in (NO_ID, self.incarnation):
            return Outcome.CONFLICT
        if self.exists and request.base not in (NO_ID, self.commits[0]):
            return Outcome.CONFLICT
        existed = self.exists
        if not existed:
            self.incarnation = request.incarnation
        self._remember(request.commit, lives=False)
        self.ended_nothing = not existed
        return Outcome.APPLIED if existed else Outcome.MISSING

    def _remember(self, commit: bytes, *, lives: bool) -> None:
        self.exists, self.lives, self.ended_nothing = True, lives, False
        self.commits = [commit, *self.commits][:IDS_REMEMBERED]


class History:
    """Makes requests out of drawn numbers: fresh ones, stale ones, repeated ones."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.requests: list[Request] = []
        self.records: dict[str, list[bytes]] = {name: [] for name in IDS}

    def make(self, kind: str, name: str, pick: int, data: dict[str, int]) -> Request:
        records = self.records[name]
        if kind == "repeat" and self.requests:
            return self.requests[pick % len(self.requests)]
        if kind in ("update", "whole", "touch", "delete") and records:
            # Mostly the newest, now and then one that is out of date.
            old = records[-1] if pick % 3 else records[pick % len(records)]
            request = self._on(kind, name, pick, old, data)
        elif kind == "end":
            request = Delete(name, new_id())
        else:
            record = new_record(data)
            if kind == "again" and records:
                record = new_record(data, incarnation=rec.incarnation_of(records[-1]))
            request = Put(name, record, NO_ID, self.now, self.now + 900)
        if isinstance(request, Put):
            records.append(request.record)
        self.requests.append(request)
        return request

    def _on(self, kind: str, name: str, pick: int, old: bytes, data: dict[str, int]) -> Request:
        if kind == "touch":
            return Touch(name, rec.commit_of(old), self.now + pick, self.now + 900)
        if kind == "delete":
            base = rec.commit_of(old) if pick % 2 else NO_ID
            return Delete(name, new_id(), rec.incarnation_of(old), base)
        known = old if kind == "update" else None
        base = rec.commit_of(old)
        return Put(name, next_record(old, data), base, self.now, self.now + 900, old=known)


KINDS = ["create", "update", "whole", "touch", "delete", "end", "again"]
KINDS += ["update", "update", "repeat", "repeat"]  # drawn more often
STEPS = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.sampled_from(IDS),
        st.integers(0, 50),
        st.dictionaries(st.sampled_from(["x", "y", "z"]), st.integers(0, 3), max_size=3),
    ),
    max_size=25,
)


def run(client: Any, requests: Sequence[Request]) -> list[Outcome]:
    """Run the script over `requests`; return their outcomes."""
    keys = [KEYS.session(request.session_id) for request in requests]
    arguments = [KEYS.commits, b"w" * 16, b"%d" % len(KEYS.session_prefix)]
    packed = pack_requests(requests, 60_000)
    arguments += [packed.requests, *packed.outside]
    codes = client.eval(SCRIPT.source, len(keys), *keys, *arguments)[0]
    return [CODES[bytes([code])] for code in codes]


@pytest.mark.parametrize("batch", [1, 7])
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=STEPS)
def test_the_script_answers_and_stores_what_the_model_does(
    each_server: RedisServer, batch: int, steps: list[tuple[str, str, int, dict[str, int]]]
) -> None:
    with each_server.client() as client:
        client.flushdb()
        history = History(time.time())
        models = {name: Model() for name in IDS}
        requests = [history.make(*step) for step in steps]
        for start in range(0, len(requests), batch):
            some = requests[start : start + batch]
            assert run(client, some) == [models[item.session_id].apply(item) for item in some]
        for name, model in models.items():
            assert_same(name, model, client.hgetall(KEYS.session(name)))


def assert_same(name: str, model: Model, fields: dict[bytes, bytes]) -> None:
    found = decode_session(KEYS.session(name), name, fields)
    if not model.exists:
        assert found is None
    elif model.lives:
        assert isinstance(found, RemoteSession)
        assert (found.record, found.accessed) == (model.record, model.accessed)
    else:
        assert isinstance(found, Stored)
        assert (found.lives, found.incarnation) == (False, model.incarnation)
        assert found.commit == model.commits[0]
        assert len(fields) == 1, "no data is left behind a tombstone"
