"""Our commits and the announcements of others arrive in any order; what is told is in one."""

from __future__ import annotations

from itertools import count

import pytest

from persistence import record as rec
from persistence.commit import Commit
from persistence.disk.format import DELETE, PUT
from persistence.record import NEVER, NO_ID
from persistence.remote.contract import Announcement
from persistence.watching.changes import NO_FIELDS
from persistence.watching.everywhere import Everywhere
from persistence.watching.stream import Mailbox

SESSION = "s"
WORKER = b"w" * 16


def commit_id(name: str) -> bytes:
    return name.encode().ljust(16, b".")


class Story:
    """What happens, and what was told of it as (version, kind, skipped)."""

    def __init__(self) -> None:
        self.everywhere = Everywhere()
        self.everywhere.is_shared = True
        self.mailbox = Mailbox(100, of_all=True)
        self.everywhere.mailboxes.append(self.mailbox)

    def ours(self, version: int, commit: str, base: str = "") -> None:
        record = rec.assemble(
            incarnation=commit_id("incarnation"),
            commit=commit_id(commit),
            version=version,
            created=0,
            ttl_seconds=0,
            flags=0,
            user=0,
            meta=b"",
            fields={},
        )
        ids = record[:32] + (commit_id(base) if base else NO_ID)
        made = Commit(PUT, SESSION, b"s", b"", record, ids, 0, NEVER, NEVER, NEVER, 0)
        self.everywhere.put(made, "updated" if base else "created", NO_FIELDS)

    def we_end(self, version: int, commit: str) -> None:
        ids = NO_ID + commit_id(commit) + NO_ID
        made = Commit(DELETE, SESSION, b"s", b"", None, ids, 0, 0, NEVER, 0, 0)
        self.everywhere.end(made, "terminated", version)

    def theirs(self, version: int, commit: str, *, ended: bool = False) -> None:
        announcement = Announcement(SESSION, version, commit_id(commit), ended, WORKER)
        self.everywhere.announced([announcement])

    @property
    def told(self) -> list[tuple[int, str, int]]:
        return [(each.version, each.kind, each.skipped) for each in self.mailbox._pending]


@pytest.fixture
def story() -> Story:
    return Story()


def test_in_order_nothing_is_skipped(story: Story) -> None:
    story.ours(1, "a")
    story.theirs(2, "b")
    story.ours(3, "c", base="b")
    assert story.told == [(1, "created", 0), (2, "updated", 0), (3, "updated", 0)]


def test_an_announcement_may_overtake_our_own_acknowledgement(story: Story) -> None:
    story.ours(1, "a")
    story.theirs(3, "c")  # built on our 2, which is not in our log yet
    story.ours(2, "b", base="a")
    story.ours(4, "d", base="c")
    assert story.told == [(1, "created", 0), (3, "updated", 1), (4, "updated", 0)]


def test_our_acknowledgement_may_overtake_the_announcement_before_it(story: Story) -> None:
    story.theirs(1, "a")
    story.ours(3, "c", base="b")
    story.theirs(2, "b")
    assert story.told == [(1, "created", 0), (3, "updated", 1)]


def test_what_is_told_of_a_session_that_was_never_told_of_skips_nothing(story: Story) -> None:
    story.theirs(7, "g")
    assert story.told == [(7, "updated", 0)]


def test_a_version_of_another_line_is_a_reset(story: Story) -> None:
    story.theirs(5, "e")
    story.theirs(3, "restored")
    story.theirs(4, "f")
    assert story.told == [(5, "updated", 0), (3, "reset", 0), (4, "updated", 0)]


def test_another_ttl_elsewhere_is_no_version(story: Story) -> None:
    story.theirs(5, "e")
    story.theirs(5, "e with another TTL")
    story.ours(6, "f", base="e with another TTL")
    assert story.told == [(5, "updated", 0), (6, "updated", 0)]


def test_nothing_late_is_told_behind_an_end(story: Story) -> None:
    story.ours(1, "a")
    story.theirs(3, "end", ended=True)
    story.ours(2, "b", base="a")
    story.theirs(2, "late")
    assert story.told == [(1, "created", 0), (3, "terminated", 2)]


def test_an_end_that_two_workers_bring_about_is_told_once(story: Story) -> None:
    story.ours(1, "a")
    story.we_end(1, "end")
    story.theirs(1, "their end", ended=True)
    assert story.told == [(1, "created", 0), (1, "terminated", 0)]


def test_a_new_life_begins_with_its_first_version(story: Story) -> None:
    story.ours(1, "a")
    story.we_end(1, "end")
    story.theirs(1, "b")
    story.ours(2, "c", base="b")
    story.theirs(2, "end 2", ended=True)
    story.ours(1, "d")
    assert [kind for _, kind, _ in story.told] == [
        "created",
        "terminated",
        "created",
        "updated",
        "terminated",
        "created",
    ]


def test_the_end_of_a_session_that_is_not_in_memory_has_the_version_that_was_told(
    story: Story,
) -> None:
    story.theirs(8, "h")
    story.we_end(0, "end")
    assert story.told == [(8, "updated", 0), (8, "terminated", 0)]


def test_what_is_remembered_is_bounded(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persistence.watching.everywhere._REMEMBERED", 10)
    for number in count(1):
        announcement = Announcement(f"s{number}", 1, commit_id("x"), ended=False, worker=WORKER)
        story.everywhere.announced([announcement])
        if number == 50:
            break
    assert len(story.everywhere._told) == 10
    assert "s50" in story.everywhere._told
