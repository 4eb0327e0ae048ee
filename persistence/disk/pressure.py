"""How much dead space the log may hold, and how commits and compaction are kept in step.

An update makes its session's record before it dead, and only compaction gives that space back.
Both run on the event loop; commits, of which a thousand may wait at a time, would leave compaction
behind for as long as they come. So from `soft_bytes` of dead space on each batch waits a little, in
proportion to what it cost and to how far things are, and at `hard_bytes` until a merge has ended.
On the way there compaction's own rate limit fades.

Bound: live bytes + `hard_bytes` + tombstones + headers and footers of the segments + one batch, and
beside that what a merge is writing.
It holds as long as compaction can work, which a damaged segment or a failing disk may prevent:
commits never wait for a compaction that has nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from persistence.disk.segments import Segment

_SOFT_SEGMENTS: Final = 2  # the open one, and the one that is being merged
_HARD_SEGMENTS: Final = 3
_SOFT_PER_LIVE: Final = 1.0  # more than what is left unmerged: a third of a segment
_HARD_PER_LIVE: Final = 2.0
_LONGEST_PAUSE_SECONDS: Final = 0.05


class Pressure:
    """Dead space, counted as it grows. Synchronous.

    Attributes:
        dead_bytes: in all segments, the open one included.
        soft_bytes: from here on commits are slowed down.
        hard_bytes: from here on they wait.

    Args:
        segment_bytes: size of a segment.
    """

    def __init__(self, segment_bytes: int) -> None:
        self._segment_bytes = segment_bytes
        self.dead_bytes = 0
        self.soft_bytes = 0.0
        self.hard_bytes = 0.0
        self.measure(())

    def measure(self, segments: Iterable[Segment]) -> None:
        """Count anew, and set the limits by what is live now."""
        live_bytes = dead_bytes = 0
        for item in segments:
            live_bytes += item.live_bytes
            if not (item.damaged or item.without_rows):  # what nobody can free is no reason to wait
                dead_bytes += item.dead_bytes
        self.dead_bytes = dead_bytes
        self.soft_bytes = _SOFT_PER_LIVE * live_bytes + _SOFT_SEGMENTS * self._segment_bytes
        self.hard_bytes = _HARD_PER_LIVE * live_bytes + _HARD_SEGMENTS * self._segment_bytes

    @property
    def of_compaction(self) -> float:
        """How urgent compaction is: 0, not at all, to 1, where commits are slowed down."""
        return min(1.0, self.dead_bytes / self.soft_bytes)

    @property
    def of_commits(self) -> float:
        """How near the hard limit is: up to 0, not near, to 1, there is no more room."""
        beyond = self.dead_bytes - self.soft_bytes
        return min(1.0, beyond / (self.hard_bytes - self.soft_bytes))

    def pause_seconds(self, batch_seconds: float) -> float:
        """Return how long to wait after a batch that took so long, short of the hard limit."""
        near = self.of_commits
        if near <= 0:
            return 0.0
        if near >= 1:
            return _LONGEST_PAUSE_SECONDS
        return min(_LONGEST_PAUSE_SECONDS, batch_seconds * near / (1 - near))
