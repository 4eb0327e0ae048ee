"""Statements that may be sent again, until each is settled.

Every statement that comes by here is idempotent: reads, and the function that commits, which knows
each commit id that it has applied. That is the one condition under which anything is repeated.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any, Final, NamedTuple

from asyncpg import PostgresError

from persistence.clock import Clock
from persistence.remote.exchanges import Fault, Lost, Unsent
from persistence.remote.postgres_faults import (
    READ_ONLY,
    Refused,
    code_of,
    explain,
    is_passing,
    is_uninstalled,
)
from persistence.remote.postgres_link import PostgresLink, seconds_for
from persistence.remote.postgres_schema import install

_log = logging.getLogger("persistence.remote")

_FIRST_PAUSE_SECONDS: Final = 0.01
_LONGEST_PAUSE_SECONDS: Final = 0.5
_SOONER: Final = 3


class Settled(NamedTuple):
    """What became of a statement.

    Attributes:
        rows: what it returned; None: see `error`.
        error: a `Fault`, or what the server answered last.
        was_lost: whether a sending of it got no answer, so that it may have been executed.
    """

    rows: list[Any] | None
    error: Exception | None
    was_lost: bool


class PostgresCalls:
    """Sends statements.

    Args:
        link: the connections.
        timeout_seconds: for how long a read is repeated.
        clock: process time.
    """

    def __init__(self, link: PostgresLink, timeout_seconds: float, clock: Clock) -> None:
        self._link = link
        self._timeout_seconds = timeout_seconds
        self._monotonic = clock.monotonic
        self.repeated = 0
        """Statements that were sent again."""

    async def read(
        self, doing: str, statement: str, *arguments: Any, payload_bytes: int = 0
    ) -> list[Any]:
        """Return the rows of a statement that may be repeated.

        Args:
            doing: for messages, for example "load session 'a'".
            statement: SQL.
            *arguments: of it.
            payload_bytes: about how much it carries, there or back.

        Raises:
            RemoteUnavailable: there are none.
        """
        settled = await self.settle(
            statement,
            *arguments,
            lost_seconds=self._timeout_seconds,
            payload_bytes=payload_bytes,
        )
        if settled.rows is None:
            assert settled.error is not None, "one of the two"
            raise explain(settled.error, self._link.where, doing) from None
        return settled.rows

    async def settle(
        self, statement: str, *arguments: Any, lost_seconds: float, payload_bytes: int = 0
    ) -> Settled:
        """Send an idempotent statement until there is a final answer.

        Args:
            statement: SQL.
            *arguments: of it.
            lost_seconds: for how long to go on when an answer was lost.
            payload_bytes: about how much it carries; more than 1 MiB makes that longer.
        """
        lost_seconds += 2 * seconds_for(payload_bytes)
        start = self._monotonic()
        pause = 0.0
        was_lost = False
        tried: set[str] = set()
        while True:
            answer: list[Any] | Exception
            try:
                answer = await self._link.rows(statement, *arguments, payload_bytes=payload_bytes)
            except Fault as fault:
                answer = fault
            if isinstance(answer, list):
                return Settled(answer, None, was_lost)
            was_lost = was_lost or isinstance(answer, Lost)
            # Who cannot even be reached is given up sooner than who takes requests and is silent.
            gone = isinstance(answer, Unsent | Refused)
            waited = self._monotonic() - start
            if waited >= (lost_seconds / _SOONER if gone else lost_seconds):
                return Settled(None, answer, was_lost)
            if not (await self._repaired(answer, tried) or was_lost):
                return Settled(None, answer, was_lost)
            self.repeated += 1
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            pause = min(max(2 * pause, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)

    async def _repaired(self, answer: Exception, tried: set[str]) -> bool:
        """Whether another sending may do better, after doing once what that needs."""
        if is_passing(answer):
            return True
        code = code_of(answer)
        if code in tried:
            return False
        tried.add(code)
        if code == READ_ONLY:  # this was the primary once; look for the one that is
            self._link.drop_idle()
            return True
        if is_uninstalled(answer):
            try:
                await install(self._link)
                return True
            except (Fault, PostgresError) as error:
                _log.warning("the tables of the shared tier are gone: %s", error)
        return False
