"""What every session provider must do, as tests: derive from `ProviderContract`, run it on yours.

::

    import pytest
    from persistence.testing.provider_contract import ProviderContract

    class TestMyProvider(ProviderContract):
        @pytest.fixture
        async def provider(self):
            async with MyProvider(url, namespace=fresh_namespace()) as provider:
                yield provider

The provider is empty when a test begins, and its default TTL is more than a minute. Where time must
pass, the tests call `pass_time`, which sleeps. A provider with an injected clock moves that clock
instead, and needs no waiting at all::

        async def pass_time(self, seconds):
            self.clock.advance(seconds)

With ``pytest.register_assert_rewrite("persistence.testing")`` in a ``conftest.py``, before the
import, failures show the values that differ.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, UserDict
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from persistence.errors import (
    InvalidArgument,
    InvalidSessionId,
    PersistenceError,
    ValueNotSerializable,
)
from persistence.providers.contract import SessionProvider
from persistence.testing.sessions import HOSTILE_IDS

_VALUES: Final[dict[str, Any]] = {
    "nothing": None,
    "": "an empty name",
    "text": "ü\0\n'\"",
    "bytes": b"\xff\0",
    "numbers": [0, -1, 2**63, -(2**200), 1.5, float("inf")],
    "nested": {"a": {"b": [{"c": (1, 2)}]}, 7: "seven"},
    "sets": [{1, 2}, frozenset({"x"})],
    "raw": bytearray(b"raw"),
    "moment": datetime(2026, 1, 2, 3, 4, 5, 6, UTC),
    "day": date(2026, 1, 2),
    "id": UUID(int=5),
    "price": Decimal("9.990"),
    "yes": True,
}
_PATIENCE_SECONDS: Final = 20.0
_POLL_SECONDS: Final = 0.01


class _Unstorable:
    """A value that no provider can keep."""


async def _refused(call: Any, *kinds: type[PersistenceError]) -> PersistenceError:
    """Await a call that must raise one of `kinds`; return the error."""
    try:
        result = await call
    except kinds as error:
        return error
    raise AssertionError(f"it must raise {' or '.join(k.__name__ for k in kinds)}, not {result!r}")


class ProviderContract:
    """Tests of one provider. A subclass brings the fixture `provider`; see the module."""

    async def pass_time(self, seconds: float) -> None:
        """Let time pass, as the provider sees it."""
        await asyncio.sleep(seconds)

    async def _until_gone(self, provider: SessionProvider, session_id: str) -> None:
        """Let time pass until a session has expired. Nothing here accesses it."""
        for _ in range(int(_PATIENCE_SECONDS / _POLL_SECONDS)):
            if not await provider.has_session(session_id):
                return
            await self.pass_time(_POLL_SECONDS)
        raise AssertionError(f"session {session_id!r} does not expire")

    # --- what is stored comes back --------------------------------------------------------------

    async def test_what_never_was_is_absent_everywhere(self, provider: SessionProvider) -> None:
        """And asking does not bring it about."""
        assert await provider.get_session("a") is None
        assert await provider.has_session("a") is False
        assert await provider.delete_session("a") is False
        assert await provider.get_active_sessions() == []
        assert await provider.cleanup_old_sessions(0) == 0

    async def test_every_value_comes_back_as_what_it_was(self, provider: SessionProvider) -> None:
        """With its type, and the fields in their order."""
        assert await provider.set_session("a", _VALUES) is None  # type: ignore[func-returns-value]
        found = await provider.get_session("a")
        assert found == _VALUES
        assert type(found) is dict
        assert list(found) == list(_VALUES)
        assert [type(each) for each in found.values()] == [type(each) for each in _VALUES.values()]
        assert str(found["price"]) == "9.990"
        assert await provider.has_session("a") is True

    async def test_a_session_without_fields_is_a_session(self, provider: SessionProvider) -> None:
        """Not an absent one. Any mapping may be given."""
        await provider.set_session("a", {})
        assert await provider.get_session("a") == {}
        assert await provider.has_session("a") is True
        await provider.set_session("a", UserDict({"n": 1}))
        assert await provider.get_session("a") == {"n": 1}

    async def test_setting_replaces_all_of_a_session(self, provider: SessionProvider) -> None:
        """What is not given any more is gone."""
        await provider.set_session("a", {"old": 1, "both": 1})
        await provider.set_session("a", {"both": 2, "new": 2})
        assert await provider.get_session("a") == {"both": 2, "new": 2}
        assert await provider.get_active_sessions() == ["a"]

    async def test_what_is_read_or_was_given_is_the_callers_own(
        self, provider: SessionProvider
    ) -> None:
        """Changing it changes nothing that is stored."""
        data = {"items": [1]}
        await provider.set_session("a", data)
        data["items"].append(2)
        found = await provider.get_session("a")
        assert found == {"items": [1]}
        found["items"].append(3)
        found["more"] = 1
        assert await provider.get_session("a") == {"items": [1]}

    async def test_a_large_session_comes_back(self, provider: SessionProvider) -> None:
        """Many fields, and one of a megabyte."""
        data = {f"field {n}": n for n in range(1000)} | {"blob": bytes(2**20)}
        await provider.set_session("a", data)
        assert await provider.get_session("a") == data

    # --- ends -----------------------------------------------------------------------------------

    async def test_a_deleted_session_is_gone_and_may_begin_anew(
        self, provider: SessionProvider
    ) -> None:
        """As often as one likes."""
        for count in range(3):
            await provider.set_session("a", {"n": count})
            assert await provider.get_session("a") == {"n": count}
            assert await provider.delete_session("a") is True
            assert await provider.delete_session("a") is False
            assert await provider.get_session("a") is None
            assert await provider.has_session("a") is False
            assert await provider.get_active_sessions() == []

    # --- ids ------------------------------------------------------------------------------------

    async def test_any_session_id_is_a_plain_key(self, provider: SessionProvider) -> None:
        """None of them reaches another one."""
        for name in HOSTILE_IDS:
            await provider.set_session(name, {"id": name})
        assert sorted(await provider.get_active_sessions()) == sorted(HOSTILE_IDS)
        for name in HOSTILE_IDS:
            assert await provider.get_session(name) == {"id": name}
        for name in HOSTILE_IDS[::2]:
            assert await provider.delete_session(name) is True
        assert sorted(await provider.get_active_sessions()) == sorted(HOSTILE_IDS[1::2])

    async def test_what_is_no_session_id_is_refused_by_every_method(
        self, provider: SessionProvider
    ) -> None:
        """Empty, too long, not to be encoded, or no str at all."""
        wrong: list[Any] = ["", "x" * 513, "ü" * 257, "\ud800", None, b"a", 5, ["a"]]
        for each in wrong:
            await _refused(provider.get_session(each), InvalidSessionId)
            await _refused(provider.set_session(each, {}), InvalidSessionId)
            await _refused(provider.delete_session(each), InvalidSessionId)
            await _refused(provider.has_session(each), InvalidSessionId)
        assert await provider.get_active_sessions() == []

    # --- what cannot be stored ------------------------------------------------------------------

    async def test_what_cannot_be_stored_is_refused_by_name_and_changes_nothing(
        self, provider: SessionProvider
    ) -> None:
        """Neither a session that is there, nor does one begin."""
        await provider.set_session("a", {"n": 1})
        values: list[Any] = [
            _Unstorable(),
            [_Unstorable()],
            datetime(2026, 1, 1),
            "\ud800",
            Counter(),
        ]
        for value in values:
            for name in ("a", "b"):
                data = {"n": 2, "the field": value}
                error = await _refused(provider.set_session(name, data), ValueNotSerializable)
                assert "the field" in str(error), "the message names the field"
        keys: list[Any] = [{5: 1}, {b"n": 1}, {None: 1}]
        for data in keys:
            await _refused(provider.set_session("a", data), ValueNotSerializable)
        others: list[Any] = [None, [("n", 2)], "n", 5]
        for each in others:
            await _refused(provider.set_session("a", each), InvalidArgument)
        assert await provider.get_session("a") == {"n": 1}
        assert await provider.has_session("b") is False

    async def test_a_wrong_duration_is_refused_and_changes_nothing(
        self, provider: SessionProvider
    ) -> None:
        """Negative, not a number, no number at all, or longer than a century."""
        await provider.set_session("a", {"n": 1})
        wrong: list[Any] = [-1, float("nan"), float("inf"), 1e12, "60", True, [1]]
        for each in wrong:
            await _refused(provider.set_session("a", {"n": 2}, each), InvalidArgument)
            await _refused(provider.cleanup_old_sessions(each), InvalidArgument)
        missing: Any = None
        await _refused(provider.cleanup_old_sessions(missing), InvalidArgument)
        assert await provider.get_session("a") == {"n": 1}

    # --- time -----------------------------------------------------------------------------------

    async def test_a_session_expires_by_its_ttl_and_is_absent_everywhere(
        self, provider: SessionProvider
    ) -> None:
        """Its id is free, and what comes anew has nothing of it: neither data nor TTL."""
        await provider.set_session("a", {"n": 1}, ttl_seconds=0.1)
        await provider.set_session("b", {"n": 2}, ttl_seconds=0)
        await self._until_gone(provider, "a")
        assert await provider.cleanup_old_sessions(3600) == 0, "it has ended by itself"
        assert await provider.get_session("a") is None
        assert await provider.delete_session("a") is False
        assert await provider.get_active_sessions() == ["b"]
        assert (await provider.get_stats())["sessions"] == 1
        await provider.set_session("a", {"m": 1})
        await self.pass_time(0.15)
        assert await provider.get_session("a") == {"m": 1}
        assert await provider.get_session("b") == {"n": 2}

    async def test_a_ttl_stays_until_another_one_is_given(self, provider: SessionProvider) -> None:
        """Shorter, longer, or none at all."""
        await provider.set_session("short", {"n": 1})
        await provider.set_session("short", {"n": 2}, ttl_seconds=0.2)
        await provider.set_session("short", {"n": 3})  # keeps it
        await provider.set_session("long", {"n": 1}, ttl_seconds=0.2)
        await provider.set_session("long", {"n": 2}, ttl_seconds=600)
        await provider.set_session("endless", {"n": 1}, ttl_seconds=0.2)
        await provider.set_session("endless", {"n": 2}, ttl_seconds=0)
        await self._until_gone(provider, "short")
        assert await provider.get_session("long") == {"n": 2}
        assert await provider.get_session("endless") == {"n": 2}

    async def test_reading_renews_and_asking_does_not(self, provider: SessionProvider) -> None:
        """All have the same TTL; one is read all the while, one written, one only asked for."""
        for name in ("read", "written", "asked"):
            await provider.set_session(name, {"n": 0}, ttl_seconds=0.8)
        for n in range(12):
            await self.pass_time(0.1)
            assert await provider.get_session("read") == {"n": 0}
            assert await provider.has_session("written") is True
            await provider.set_session("written", {"n": n})
            await provider.has_session("asked")
            await provider.get_active_sessions()
        assert await provider.has_session("asked") is False

    async def test_old_sessions_are_cleaned_up_and_counted(self, provider: SessionProvider) -> None:
        """By their last access, not by their beginning, and whatever their TTL is."""
        for name in ("old", "read", "written"):
            await provider.set_session(name, {"n": 1}, ttl_seconds=8)  # recorded each half second
        await provider.set_session("old too", {"n": 1}, ttl_seconds=0)
        await self.pass_time(1.0)
        await provider.get_session("read")
        await provider.set_session("written", {"n": 2})
        await provider.set_session("new", {"n": 1})
        assert await provider.cleanup_old_sessions(3600) == 0
        assert await provider.cleanup_old_sessions(0.95) == 2
        assert sorted(await provider.get_active_sessions()) == ["new", "read", "written"]
        assert await provider.get_session("old") is None
        assert await provider.cleanup_old_sessions(0.95) == 0
        assert await provider.get_session("new") == {"n": 1}

    # --- lists and numbers ----------------------------------------------------------------------

    async def test_all_active_sessions_are_listed_once(self, provider: SessionProvider) -> None:
        """In no order."""
        names = [f"s{n}" for n in range(120)]
        await asyncio.gather(*(provider.set_session(name, {"n": 1}) for name in names))
        for name in names[::10]:
            await provider.delete_session(name)
        living = sorted(set(names) - set(names[::10]))
        found = await provider.get_active_sessions()
        assert type(found) is list
        assert sorted(found) == living

    async def test_the_numbers_agree_with_what_was_done(self, provider: SessionProvider) -> None:
        """What was refused, or had nothing to do, is not counted. They can be written as JSON."""
        await provider.set_session("a", {"n": 1})
        await provider.set_session("a", {"n": 2})
        await provider.set_session("b", {"n": 1})
        await _refused(provider.set_session("b", {"n": _Unstorable()}), ValueNotSerializable)
        await provider.get_session("a")
        await provider.get_session("nobody")
        await provider.has_session("a")
        await provider.delete_session("b")
        await provider.delete_session("b")
        stats = await provider.get_stats()
        json.dumps(stats)
        assert isinstance(stats["provider"], str)
        counts = ("sessions", "reads", "hits", "writes", "deletes")
        assert [stats[name] for name in counts] == [1, 2, 1, 3, 1]  # type: ignore[literal-required]
        await self.pass_time(0.1)
        assert await provider.cleanup_old_sessions(0.05) == 1
        stats = await provider.get_stats()
        assert [stats[name] for name in counts] == [0, 2, 1, 3, 2]  # type: ignore[literal-required]

    # --- at the same time -----------------------------------------------------------------------

    async def test_of_many_writers_of_one_session_the_last_one_wins_whole(
        self, provider: SessionProvider
    ) -> None:
        """Readers meanwhile see one of the versions, and never a mixture."""
        await provider.set_session("a", {"by": 0, "same": 0})

        async def read() -> None:
            for _ in range(5):
                found = await provider.get_session("a")
                assert found is not None
                assert found["by"] == found["same"]

        writers = (provider.set_session("a", {"by": n, "same": n}) for n in range(1, 9))
        await asyncio.gather(*writers, read(), read())
        await provider.set_session("a", {"by": 99, "same": 99})
        assert await provider.get_session("a") == {"by": 99, "same": 99}

    async def test_a_session_that_is_deleted_and_set_at_the_same_time_is_there_whole_or_not(
        self, provider: SessionProvider
    ) -> None:
        """Nobody is refused, and nothing of it stays behind."""
        for n in range(5):
            await provider.set_session("a", {"n": 0})
            await asyncio.gather(
                provider.delete_session("a"),
                provider.set_session("a", {"n": n, "m": n}),
                provider.delete_session("a"),
            )
            assert await provider.get_session("a") in (None, {"n": n, "m": n})
        await provider.delete_session("a")
        assert await provider.get_active_sessions() == []

    async def test_a_cancelled_call_leaves_a_whole_session_and_a_working_provider(
        self, provider: SessionProvider
    ) -> None:
        """Whichever step it was at."""
        await provider.set_session("a", {"n": 0, "m": 0})
        for n in range(1, 13):
            task = asyncio.ensure_future(provider.set_session("a", {"n": n, "m": n}))
            for _ in range(n):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            found = await provider.get_session("a")
            assert found is not None
            assert found["n"] == found["m"]
        await provider.set_session("a", {"n": 1, "m": 2})
        assert await provider.get_session("a") == {"n": 1, "m": 2}
