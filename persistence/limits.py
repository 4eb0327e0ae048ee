"""Request limits: exact under concurrency, across workers and across a ``kill -9``.

A limit is charged in blocks. A worker reserves a block with one commit of the session, which raises
the *high-water mark* in its metadata, and then admits so many requests without another word.

Invariants:
- the mark never exceeds the limit, and never falls below what was admitted: a worker admits a
  request only from a block whose commit is acknowledged. So no crash admits more than the limit;
  the rest of a block that a killed worker held is lost.
- a commit is accepted only on the one that it was built on, by the log and by the shared tier. So
  blocks of several workers never overlap.
- what a worker has not used of a block it gives back when the session is idle and at close, by
  lowering the mark by exactly that, once. A block whose rest is being given back admits nobody.

Blocks get smaller towards the limit, so that the last requests are not held in reserve by a worker
that has no use for them (guided self-scheduling, Polychronopoulos and Kuck 1987).
"""

from __future__ import annotations

from typing import Final, NoReturn

from persistence.errors import RequestLimitReached, printable

MIN_BLOCK: Final = 4
MAX_BLOCK: Final = 1024
_BLOCK_SHARE: Final = 8


def block_size(left: int, waiting: int) -> int:
    """Return how many requests to reserve.

    Args:
        left: between the mark and the limit.
        waiting: how many requests wait for it right now.
    """
    guided = min(max(left // _BLOCK_SHARE, MIN_BLOCK), MAX_BLOCK)
    return max(0, min(left, max(guided, waiting)))


def refuse_request(session_id: str, max_requests: int) -> NoReturn:
    """Raise what a request beyond the limit gets.

    Raises:
        RequestLimitReached: always.
    """
    raise RequestLimitReached(
        f"session {printable(session_id)} has used up its {max_requests} requests "
        "(max_requests); the request was not counted: go on with another session, or create "
        "sessions with a higher limit"
    )
