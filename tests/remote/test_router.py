"""What is sent again and what is not: on links that answer as they are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from redis import exceptions as redis_errors

from persistence.clock import ManualClock
from persistence.remote.exchanges import Lost, Unsent
from persistence.remote.link import Call, Command
from persistence.remote.router import Router, Settled

LOST = Lost("gone")
NO_SCRIPT = redis_errors.NoScriptError("no")


class ToldLink:
    """Answers each exchange with the next of the replies it was told; each takes a second."""

    def __init__(self, clock: ManualClock, *replies: list[Any]) -> None:
        self.sent: list[list[bytes]] = []
        self._clock = clock
        self._replies = list(replies)

    async def exchange(self, calls: Sequence[Call]) -> list[Any]:
        self._clock.advance(1)
        self.sent.append([call.key for call in calls])
        return self._replies.pop(0)


class ToldTopology:
    """One link; asked where the servers are, it says as it was told."""

    routes_by_slot = False

    def __init__(self, link: ToldLink, *, moves: bool = False) -> None:
        self._link = link
        self._moves = moves

    async def discover(self) -> bool:
        return self._moves

    def link_of(self, key: bytes) -> Any:
        return self._link

    def link_at(self, address: tuple[str, int]) -> Any:
        return self._link

    def primaries(self) -> list[Any]:
        return [self._link]

    async def close(self) -> None:
        return


async def settle(
    *replies: list[Any], moves: bool = False, lost_seconds: float = 3.0
) -> tuple[list[Settled], list[list[bytes]]]:
    clock = ManualClock()
    link = ToldLink(clock, *replies)
    calls = [Command(b"GET", key=b"%d" % n) for n in range(len(replies[0]))]
    router = Router(ToldTopology(link, moves=moves), clock)
    return await router.settle(calls, lost_seconds=lost_seconds), link.sent


async def test_what_is_answered_is_sent_once() -> None:
    settled, sent = await settle([b"a", b"b"])
    assert settled == [Settled(b"a", False, False), Settled(b"b", False, False)]
    assert len(sent) == 1


async def test_what_comes_behind_a_call_that_is_repeated_is_repeated_too() -> None:
    settled, sent = await settle([b"a", NO_SCRIPT, b"c"], [b"B", b"C"])
    assert sent == [[b"0", b"1", b"2"], [b"1", b"2"]]
    assert [reply for reply, *_ in settled] == [b"a", b"B", b"C"]


async def test_a_lost_reply_is_asked_for_again_until_the_time_is_up() -> None:
    settled, sent = await settle([LOST], [LOST], [b"a"])
    assert settled == [Settled(b"a", True, False)]
    settled, sent = await settle([LOST], [LOST], [LOST])
    assert settled == [Settled(LOST, True, False)]
    assert len(sent) == 3


async def test_a_reply_that_a_lost_repetition_has_overtaken_is_marked() -> None:
    settled, _ = await settle([NO_SCRIPT, b"conflict"], [LOST, LOST], lost_seconds=2)
    assert settled == [Settled(LOST, True, False), Settled(b"conflict", True, True)]


async def test_what_was_never_sent_is_not_lost_and_given_up_unless_servers_moved() -> None:
    unsent = Unsent("no connection")
    settled, sent = await settle([unsent])
    assert settled == [Settled(unsent, False, False)]
    assert len(sent) == 1
    settled, sent = await settle([unsent], [b"a"], moves=True, lost_seconds=9)
    assert settled == [Settled(b"a", False, False)]


async def test_after_a_lost_reply_an_unreachable_server_is_given_up_sooner() -> None:
    settled, sent = await settle([LOST], [Unsent("no")], [Unsent("no")], lost_seconds=9)
    assert settled[0].was_lost
    assert len(sent) == 3


@pytest.mark.parametrize("text", ["LOADING wait", "OOM no", "BUSY later"])
async def test_a_refusal_is_final_unless_an_earlier_sending_was_lost(text: str) -> None:
    refusal = redis_errors.ResponseError(text)
    settled, sent = await settle([refusal])
    assert settled == [Settled(refusal, False, False)]
    settled, sent = await settle([LOST], [refusal], [b"a"])
    assert settled == [Settled(b"a", True, False)]
    assert len(sent) == 3
