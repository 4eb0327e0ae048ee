"""Watches the process's memory: lets the budget of the memory tier follow what is left."""

from __future__ import annotations

import logging
from collections.abc import Callable

from persistence.memory.budget import (
    SHRINK_ABOVE,
    MemoryPressure,
    MemoryReader,
    effective_budget_bytes,
)
from persistence.memory.tier import MemoryTier

_log = logging.getLogger("persistence")


class MemoryWatch:
    """Turns the pressure on the process into a budget.

    Args:
        reader: reads the pressure.
        configured_bytes: ``memory.max_bytes``; the budget never exceeds it.

    Attributes:
        read: reads the pressure; to be called in a thread.
        rss_bytes: resident set of the process at the last look; 0: there was none.
    """

    def __init__(self, reader: MemoryReader, configured_bytes: int) -> None:
        self.read = reader.read
        self.rss_bytes = 0
        self._configured_bytes = configured_bytes

    def act(
        self, pressure: MemoryPressure, memory: MemoryTier, set_budget: Callable[[int], None]
    ) -> None:
        """Set the budget that fits `pressure`, if it is another one than now."""
        self.rss_bytes = pressure.rss_bytes
        current = memory.budget_bytes
        if pressure.used_fraction > SHRINK_ABOVE:
            # A budget that is not used up shrinks from what is used, or it would not bite at once.
            current = min(current, max(memory.used_bytes, 1))
        budget = effective_budget_bytes(self._configured_bytes, current, pressure)
        if budget == memory.budget_bytes:
            return
        _log.info(
            "memory budget is %d bytes, was %d: %s uses %d of %d",
            budget,
            memory.budget_bytes,
            pressure.source,
            pressure.anonymous_bytes,
            pressure.limit_bytes,
        )
        set_budget(budget)
