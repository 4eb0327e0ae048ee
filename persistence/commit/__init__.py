"""The group-commit queue: many updates, one write, one sync. See `queue`."""

from persistence.commit.commits import Commit, ExactEnd, committed, row_user
from persistence.commit.queue import CommitQueue

__all__ = ["Commit", "CommitQueue", "ExactEnd", "committed", "row_user"]
