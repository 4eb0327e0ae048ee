"""What is reported of everything that depends on the number of sessions: ours and peers alike."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks import payloads
from benchmarks.amplification import amplification
from benchmarks.contender import Metrics


class Taken(NamedTuple):
    """How long each part took, in seconds."""

    create: float
    update: float
    restore: float
    scan: float
    open: float


def growth_metrics(
    session_count: int,
    operation_count: int,
    taken: Taken,
    *,
    rss_bytes: float,
    written_bytes: int,
    occupied_bytes: int,
) -> Metrics:
    """Return the metrics of a contender at one number of sessions.

    Args:
        session_count: how many were created and listed.
        operation_count: how many were updated, and how many were read.
        taken: how long that took.
        rss_bytes: by which the process has grown, for each session.
        written_bytes: what went to the disk by then.
        occupied_bytes: what the directory takes in the end.
    """
    stored = session_count * payloads.SESSION_BYTES
    return {
        "create": session_count / taken.create,
        "update": operation_count / taken.update,
        "restore": operation_count / taken.restore,
        "scan": session_count / taken.scan,
        "open": taken.open,
        "rss": rss_bytes,
    } | amplification(
        written_bytes,
        stored + operation_count * payloads.SESSION_BYTES,
        occupied_bytes,
        stored,
    )
