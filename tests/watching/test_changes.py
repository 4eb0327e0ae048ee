"""What two changes become when there is room for one only."""

from __future__ import annotations

from persistence.watching.changes import SessionChange, coalesced
from persistence.watching.stream import Mailbox


def change(version: int, *fields: str, kind: str = "updated", **more: object) -> SessionChange:
    return SessionChange("s", version, kind, frozenset(fields), **more)  # type: ignore[arg-type]


def test_two_updates_become_the_later_version_with_the_fields_of_both() -> None:
    merged = coalesced(change(2, "a"), change(3, "b"))
    assert merged == change(3, "a", "b", skipped=1)


def test_what_both_had_skipped_is_counted() -> None:
    merged = coalesced(change(4, "a", skipped=2), change(9, "a", skipped=4))
    assert (merged.version, merged.skipped) == (9, 7)


def test_fields_that_are_not_known_stay_not_known() -> None:
    unknown = SessionChange("s", 2, "updated", None)
    assert coalesced(unknown, change(3, "a")).fields is None
    assert coalesced(change(1, "a"), unknown).fields is None


def test_an_update_does_not_hide_what_came_before_it() -> None:
    assert coalesced(change(1, "a", kind="created"), change(2, "a")).kind == "created"
    assert coalesced(change(5, kind="reset"), change(6, "a")).kind == "reset"
    assert coalesced(change(5, "a"), change(2, kind="reset")).kind == "reset"


def test_a_merged_change_is_local_only_if_both_were() -> None:
    assert coalesced(change(1), change(2)).local
    assert not coalesced(change(1, local=False), change(2)).local
    assert not coalesced(change(1), change(2, local=False)).local


def test_a_field_may_be_affected_if_it_is_named_or_nothing_is_known() -> None:
    assert change(2, "a").may_affect("a")
    assert not change(2, "a").may_affect("b")
    assert SessionChange("s", 2, "updated", None).may_affect("b")
    assert change(2, kind="expired").may_affect("b")


async def test_a_full_mailbox_of_a_session_merges_and_keeps_the_end() -> None:
    mailbox = Mailbox(2, of_all=False)
    for version in range(2, 8):
        mailbox.put(change(version, f"f{version}"))
    mailbox.put(change(7, kind="terminated"))
    mailbox.end()
    assert await mailbox.take() == change(2, "f2")
    assert await mailbox.take() == change(7, "f3", "f4", "f5", "f6", "f7", skipped=4)
    assert (await mailbox.take()).kind == "terminated"


async def test_a_full_mailbox_of_all_sessions_counts_what_is_missing_where_it_is_missing() -> None:
    mailbox = Mailbox(2, of_all=True)
    for version in range(2, 7):
        mailbox.put(change(version))
    assert [await mailbox.take() for _ in range(2)] == [change(2), change(3)]
    mailbox.put(change(7))
    missing = await mailbox.take()
    assert (missing.kind, missing.session_id, missing.skipped) == ("gap", "", 3)
    assert await mailbox.take() == change(7)
