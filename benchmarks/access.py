"""Which session is accessed next: the same sequence for every contender of a workload."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Accesses:
    """A sequence of accesses, drawn anew (and alike for all) by each call of `draw`.

    Attributes:
        session_count: how many sessions there are.
        count: how many accesses.
        update_share: the share of them that updates, 0 to 1.
        zipf: exponent of the popularity; 0 makes all sessions equally popular.
    """

    session_count: int
    count: int
    update_share: float = 0.0
    zipf: float = 0.0

    def draw(self, seed: int = 0) -> list[tuple[int, bool]]:
        """Return (session index, whether it updates) for each access."""
        chance = random.Random(seed)
        indexes = list(range(self.session_count))
        chance.shuffle(indexes)  # the popular ones lie anywhere, not next to each other on disk
        weights = accumulate((rank + 1) ** -self.zipf for rank in range(self.session_count))
        chosen = chance.choices(indexes, cum_weights=list(weights), k=self.count)
        return [(index, chance.random() < self.update_share) for index in chosen]

    def indexes(self, seed: int = 0) -> list[int]:
        """Return the session index of each access."""
        return [index for index, _ in self.draw(seed)]
