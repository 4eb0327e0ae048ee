"""The kits find out what is wrong, and the page that explains them can be followed as it stands."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from persistence import ManualClock, SystemClock
from persistence import record as rec
from persistence.config import RedisConfig
from persistence.errors import PersistenceError
from persistence.providers import MemoryProvider, SessionProvider
from persistence.remote.contract import (
    APPLIED,
    Announcement,
    CommitResult,
    Delete,
    Listener,
    Outcome,
    Put,
    RemoteSession,
    RemoteTier,
    Request,
    Stored,
    Touch,
)
from persistence.remote.redis import RedisTier
from persistence.testing import remote_tier_contract
from persistence.testing.provider_contract import ProviderContract
from persistence.testing.remote_tier_contract import RemoteTierContract
from tests.postgres_servers import new_namespace
from tests.redis_servers import RedisServer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "providers.md").read_text(encoding="utf-8")


# --- providers with one fault each ----------------------------------------------------------------


class Sharing(MemoryProvider):
    """Returns the very object that it was given."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._objects: dict[str, Any] = {}

    async def set_session(
        self, session_id: str, data: Mapping[str, Any], ttl_seconds: float | None = None
    ) -> None:
        await super().set_session(session_id, data, ttl_seconds)
        self._objects[session_id] = data

    async def get_session(self, session_id: str) -> dict[str, Any] | None:
        found = await super().get_session(session_id)
        return found if found is None else self._objects[session_id]


class Merging(MemoryProvider):
    """Keeps the fields that were not given."""

    async def set_session(
        self, session_id: str, data: Mapping[str, Any], ttl_seconds: float | None = None
    ) -> None:
        if isinstance(data, dict):
            data = {**(await self.get_session(session_id) or {}), **data}
        await super().set_session(session_id, data, ttl_seconds)


class Folding(MemoryProvider):
    """Takes two ids for one."""

    async def get_session(self, session_id: str) -> dict[str, Any] | None:
        return await super().get_session(self._taken_for(session_id))

    async def set_session(
        self, session_id: str, data: Mapping[str, Any], ttl_seconds: float | None = None
    ) -> None:
        await super().set_session(self._taken_for(session_id), data, ttl_seconds)

    def _taken_for(self, session_id: Any) -> Any:
        return session_id.lower() if isinstance(session_id, str) else session_id


class Immortal(MemoryProvider):
    """Never expires anything."""

    async def set_session(
        self, session_id: str, data: Mapping[str, Any], ttl_seconds: float | None = None
    ) -> None:
        await super().set_session(session_id, data, ttl_seconds)
        await super().set_session(session_id, data, 0)


class Forgetful(MemoryProvider):
    """Gives each write the default TTL."""

    async def set_session(
        self, session_id: str, data: Mapping[str, Any], ttl_seconds: float | None = None
    ) -> None:
        ttl_seconds = self._ttl_seconds if ttl_seconds is None else ttl_seconds
        await super().set_session(session_id, data, ttl_seconds)


class Renewing(MemoryProvider):
    """Counts a question as an access."""

    async def has_session(self, session_id: str) -> bool:
        return await self.get_session(session_id) is not None


class Fixed(MemoryProvider):
    """Does not count reading as an access."""

    async def get_session(self, session_id: Any) -> dict[str, Any] | None:
        before = self._sessions.get(session_id) if isinstance(session_id, str) else None
        found = await super().get_session(session_id)
        if found is not None and before is not None:
            self._sessions[session_id] = before
        return found


class Careless(MemoryProvider):
    """Changes the session before it has looked at all fields."""

    async def set_session(
        self, session_id: str, data: Mapping[str, Any], ttl_seconds: float | None = None
    ) -> None:
        if isinstance(data, dict) and len(data) > 1:
            first = dict([next(iter(data.items()))])
            await super().set_session(session_id, first, ttl_seconds)
        await super().set_session(session_id, data, ttl_seconds)


class Hasty(MemoryProvider):
    """Says that it deleted what was not there."""

    async def delete_session(self, session_id: str) -> bool:
        await super().delete_session(session_id)
        return True


class Sweeping(MemoryProvider):
    """Cleans up everything."""

    async def cleanup_old_sessions(self, max_age_seconds: float) -> int:
        await super().cleanup_old_sessions(max_age_seconds)
        count = len(self._sessions)
        self._sessions.clear()
        return count


class Trimming(Folding):
    """Takes an id for the same one without blanks around it."""

    def _taken_for(self, session_id: Any) -> Any:
        return session_id.strip(" ") if isinstance(session_id, str) else session_id


class Dating(MemoryProvider):
    """Cleans up what began long ago, whoever has used it since."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._begun: dict[str, float] = {}

    async def set_session(
        self, session_id: str, data: Mapping[str, Any], ttl_seconds: float | None = None
    ) -> None:
        await super().set_session(session_id, data, ttl_seconds)
        self._begun.setdefault(session_id, self._clock.monotonic())

    async def cleanup_old_sessions(self, max_age_seconds: float) -> int:
        for session_id, kept in self._sessions.items():
            self._sessions[session_id] = kept._replace(accessed=self._begun[session_id])
        return await super().cleanup_old_sessions(max_age_seconds)


class Padding(MemoryProvider):
    """Counts what has expired by itself among what it cleaned up."""

    async def cleanup_old_sessions(self, max_age_seconds: float) -> int:
        before = len(self._sessions)
        await super().cleanup_old_sessions(max_age_seconds)
        return before - len(self._sessions)


class Counting(MemoryProvider):
    """Counts the calls, whatever they did."""

    async def delete_session(self, session_id: str) -> bool:
        was_alive = await super().delete_session(session_id)
        self._deletes += not was_alive
        return was_alive


class Ageing(MemoryProvider):
    """Does not count writing as an access."""

    async def set_session(
        self, session_id: Any, data: Mapping[str, Any], ttl_seconds: float | None = None
    ) -> None:
        before = self._alive(session_id) if isinstance(session_id, str) else None
        await super().set_session(session_id, data, ttl_seconds)
        if before is not None and ttl_seconds is None:
            kept = self._sessions[session_id]
            self._sessions[session_id] = kept._replace(deadline=before.deadline)


class _Kit(ProviderContract):
    """The kit, on a clock that is moved."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock

    async def pass_time(self, seconds: float) -> None:
        self._clock.advance(seconds)


async def provider_failures(kind: type[MemoryProvider]) -> list[str]:
    """Return the names of the tests that a provider fails."""
    failed = []
    for name in sorted(vars(ProviderContract)):
        if name.startswith("test_"):
            clock = ManualClock()
            provider: SessionProvider = kind(clock=clock)
            try:
                await getattr(_Kit(clock), name)(provider)
            except (AssertionError, PersistenceError):
                failed.append(name)
    return failed


@pytest.mark.parametrize(
    ("kind", "test"),
    [
        (Sharing, "test_what_is_read_or_was_given_is_the_callers_own"),
        (Merging, "test_setting_replaces_all_of_a_session"),
        (Folding, "test_any_session_id_is_a_plain_key"),
        (Immortal, "test_a_session_expires_by_its_ttl_and_is_absent_everywhere"),
        (Forgetful, "test_a_ttl_stays_until_another_one_is_given"),
        (Renewing, "test_reading_renews_and_asking_does_not"),
        (Fixed, "test_reading_renews_and_asking_does_not"),
        (Careless, "test_what_cannot_be_stored_is_refused_by_name_and_changes_nothing"),
        (Hasty, "test_what_never_was_is_absent_everywhere"),
        (Sweeping, "test_old_sessions_are_cleaned_up_and_counted"),
        (Trimming, "test_any_session_id_is_a_plain_key"),
        (Dating, "test_old_sessions_are_cleaned_up_and_counted"),
        (Padding, "test_a_session_expires_by_its_ttl_and_is_absent_everywhere"),
        (Counting, "test_the_numbers_agree_with_what_was_done"),
        (Ageing, "test_reading_renews_and_asking_does_not"),
    ],
)
async def test_a_provider_with_a_fault_fails_the_test_of_it(
    kind: type[MemoryProvider], test: str
) -> None:
    assert test in await provider_failures(kind)


async def test_a_provider_without_one_fails_none() -> None:
    assert await provider_failures(MemoryProvider) == []


# --- tiers with one fault each --------------------------------------------------------------------


class Numbering(RedisTier):
    """Takes a refused update for applied."""

    async def commit(self, requests: Sequence[Request]) -> list[CommitResult]:
        results = await super().commit(requests)
        return [APPLIED if each.outcome is Outcome.CONFLICT else each for each in results]


class Doubting(RedisTier):
    """Does not know its own commits again."""

    async def commit(self, requests: Sequence[Request]) -> list[CommitResult]:
        results = await super().commit(requests)
        return [
            CommitResult(Outcome.CONFLICT, each.stored)
            if each.outcome is Outcome.ALREADY_APPLIED
            else each
            for each in results
        ]


class Reordering(RedisTier):
    """Applies the latest first."""

    async def commit(self, requests: Sequence[Request]) -> list[CommitResult]:
        return (await super().commit(requests[::-1]))[::-1]


class Burying(RedisTier):
    """Leaves no tombstone that anybody sees."""

    async def load_many(
        self, session_ids: Sequence[str]
    ) -> list[RemoteSession | Stored | PersistenceError | None]:
        found = await super().load_many(session_ids)
        return [None if isinstance(each, Stored) else each for each in found]


class Chatty(RedisTier):
    """Announces its own commits too."""

    async def subscribe(self, listener: Listener) -> None:
        self._told = listener
        await super().subscribe(listener)

    async def commit(self, requests: Sequence[Request]) -> list[CommitResult]:
        results = await super().commit(requests)
        if hasattr(self, "_told"):
            sent = [Announcement(each.session_id, 1, b"", False, self.worker) for each in requests]
            self._told.announced(sent)
        return results


class Backdating(RedisTier):
    """Lets a renewal that comes late move the last access back."""

    async def load(self, session_id: str) -> RemoteSession | Stored | None:
        found = await super().load(session_id)
        last = getattr(self, "_last", None)
        if isinstance(found, RemoteSession) and last is not None:
            return found._replace(accessed=last.accessed)
        return found

    async def commit(self, requests: Sequence[Request]) -> list[CommitResult]:
        self._last = next((each for each in requests if isinstance(each, Touch)), None)
        return await super().commit(requests)


class Restless(RedisTier):
    """Has another epoch each time."""

    async def epoch(self) -> bytes:
        self._count = getattr(self, "_count", 0) + 1
        return await super().epoch() + b"%d" % self._count


class Matching(RedisTier):
    """Lists by a pattern."""

    async def scan(self, prefix: str = "") -> AsyncIterator[list[str]]:
        pattern = prefix.replace("*", ".*").replace("?", ".")
        async for page in super().scan():
            try:
                yield [name for name in page if re.match(pattern, name)]
            except re.error:
                yield []


class Viewing(RedisTier):
    """Returns views of its driver's memory."""

    async def load_many(
        self, session_ids: Sequence[str]
    ) -> list[RemoteSession | Stored | PersistenceError | None]:
        found = await super().load_many(session_ids)
        return [
            each._replace(record=memoryview(each.record))  # type: ignore[arg-type]
            if isinstance(each, RemoteSession)
            else each
            for each in found
        ]


class Capping(RedisTier):
    """Takes no limit of renewals for the first deadline."""

    async def load_many(
        self, session_ids: Sequence[str]
    ) -> list[RemoteSession | Stored | PersistenceError | None]:
        found = await super().load_many(session_ids)
        return [
            each._replace(cap=min(each.cap, each.deadline))
            if isinstance(each, RemoteSession)
            else each
            for each in found
        ]


class Hurrying(RedisTier):
    """Lets a call overtake the one before it."""

    async def commit(self, requests: Sequence[Request]) -> list[CommitResult]:
        self._calls = getattr(self, "_calls", 0) + 1
        if self._calls % 2:
            await asyncio.sleep(0.02)
        return await super().commit(requests)


class Paging(RedisTier):
    """Asks for each page by how many ids have come before it."""

    async def scan(self, prefix: str = "") -> AsyncIterator[list[str]]:
        start = 0
        while page := sorted([n async for each in super().scan(prefix) for n in {*each}])[
            start : start + 500
        ]:
            start += 500
            yield page


class Mourning(RedisTier):
    """Takes what has expired for ended by whoever ends it then."""

    async def commit(self, requests: Sequence[Request]) -> list[CommitResult]:
        results = await super().commit(requests)
        return [
            APPLIED if each.outcome is Outcome.MISSING and isinstance(request, Delete) else each
            for each, request in zip(results, requests, strict=True)
        ]


class _Gossip(NamedTuple):
    """A listener that tells of each session's last commit only, and not of what was not there."""

    inner: Listener

    def announced(self, announcements: Sequence[Announcement]) -> None:
        last = {each.session_id: each for each in announcements if each.version}
        self.inner.announced(list(last.values()))

    def connected(self, *, epoch: bytes) -> None:
        self.inner.connected(epoch=epoch)

    def disconnected(self) -> None:
        self.inner.disconnected()


class Summing(RedisTier):
    """Announces the last commit of a batch for all of them, and no end of a missing session."""

    async def subscribe(self, listener: Listener) -> None:
        await super().subscribe(_Gossip(listener))


class Boasting(RedisTier):
    """Announces what it is about to do."""

    async def subscribe(self, listener: Listener) -> None:
        _boasts.append(listener)
        asyncio.get_running_loop().call_soon(partial(listener.connected, epoch=await self.epoch()))

    async def commit(self, requests: Sequence[Request]) -> list[CommitResult]:
        for each in requests:
            if isinstance(each, Put):
                version, commit = rec.version_of(each.record), rec.commit_of(each.record)
                told = Announcement(each.session_id, version, commit, False, self.worker)
                for listener in _boasts:
                    listener.announced([told])
        await asyncio.sleep(0.01)
        return await super().commit(requests)


_boasts: list[Listener] = []


@pytest.mark.parametrize(
    ("kind", "test"),
    [
        (Numbering, "test_successors_of_a_refused_commit_are_refused_whatever_their_version"),
        (Numbering, "test_of_two_writers_no_increment_is_lost"),
        (Doubting, "test_a_repeated_commit_is_recognised_and_changes_nothing"),
        (Doubting, "test_after_a_crash_between_any_two_calls_another_worker_goes_on"),
        (Reordering, "test_a_chain_of_commits_in_one_batch_is_applied_in_order"),
        (Burying, "test_a_terminated_session_leaves_a_tombstone_that_takes_nothing"),
        (Chatty, "test_commits_of_another_worker_are_announced_in_order_and_own_ones_are_not"),
        (Backdating, "test_a_touch_moves_the_deadline_and_never_the_last_access_back"),
        (Restless, "test_the_epoch_is_one_for_all_workers_and_stays"),
        (Matching, "test_any_session_id_is_a_plain_key"),
        (Viewing, "test_wide_and_large_sessions_come_back"),
        (Capping, "test_an_update_replaces_every_time_of_the_version_before"),
        (Hurrying, "test_calls_of_one_worker_are_applied_in_their_order"),
        (Paging, "test_a_scan_finds_what_lives_all_the_while_though_others_end"),
        (Mourning, "test_a_session_expires_by_its_deadline"),
        (Summing, "test_commits_of_one_batch_are_announced_in_order"),
        (Summing, "test_the_end_of_a_missing_session_is_announced"),
        (Boasting, "test_what_is_announced_is_there"),
    ],
)
async def test_a_tier_with_a_fault_fails_the_test_of_it(
    shared_server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[RedisTier],
    test: str,
) -> None:
    namespace = new_namespace()
    opened: list[RemoteTier] = []
    _boasts.clear()
    monkeypatch.setattr(remote_tier_contract, "_PATIENCE_SECONDS", 1.0)  # for what never comes

    async def open_tier(*, tombstone_seconds: float = 86_400.0) -> RemoteTier:
        settings: dict[str, Any] = {"namespace": namespace, "tombstone_seconds": tombstone_seconds}
        tier = kind(RedisConfig(url=shared_server.url, **settings), SystemClock())
        opened.append(tier)
        await tier.open()
        return tier

    try:
        with pytest.raises(AssertionError):
            await getattr(RemoteTierContract(), test)(open_tier)
    finally:
        for tier in opened:
            await tier.close()


# --- the page -------------------------------------------------------------------------------------


def test_the_examples_of_the_page_run_as_they_stand(
    tmp_path: Path, shared_server: RedisServer
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    kits = [block for block in blocks if "class Test" in block]
    assert len(kits) == 2
    for number, block in enumerate(kits):
        text = block.replace("redis://localhost", shared_server.url)
        (tmp_path / f"test_{number}.py").write_text(text, encoding="utf-8")
    (tmp_path / "conftest.py").write_text(
        'import pytest\n\npytest.register_assert_rewrite("persistence.testing")\n', encoding="utf-8"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-o", "asyncio_mode=auto"]
    options = ["-p", "pytest_asyncio.plugin", "-k", "two_writers_no_increment or expires_by"]
    done = subprocess.run(
        [*command, *options, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # they take longer than it
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"^3 passed", done.stdout, re.MULTILINE), done.stdout


def test_all_that_the_page_imports_is_there() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = {
        line
        for block in blocks
        for line in re.findall(r"^(?:from|import) .*$", block, re.MULTILINE)
    }
    assert len(lines) > 8
    for line in sorted(lines):
        exec(line, {})
    for block in blocks:
        compile(block, "docs/providers.md", "exec")
