"""The kits find out what is wrong, and the page that explains them can be followed as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from persistence import ManualClock, SystemClock
from persistence.config import RedisConfig
from persistence.errors import PersistenceError
from persistence.providers import MemoryProvider, SessionProvider
from persistence.remote.contract import (
    APPLIED,
    Announcement,
    CommitResult,
    Listener,
    Outcome,
    RemoteSession,
    RemoteTier,
    Request,
    Stored,
    Touch,
)
from persistence.remote.redis import RedisTier
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
        return await super().get_session(_folded(session_id))

    async def set_session(
        self, session_id: str, data: Mapping[str, Any], ttl_seconds: float | None = None
    ) -> None:
        await super().set_session(_folded(session_id), data, ttl_seconds)


def _folded(session_id: Any) -> Any:
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
    ],
)
async def test_a_tier_with_a_fault_fails_the_test_of_it(
    shared_server: RedisServer, kind: type[RedisTier], test: str
) -> None:
    namespace = new_namespace()
    opened: list[RemoteTier] = []

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
