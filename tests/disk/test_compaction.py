from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persistence import ManualClock, StateManager
from persistence.disk import compactor
from persistence.disk.compaction import Merge, choose_inputs, fade_touches, lowest_outside
from persistence.disk.filenames import hint_name, parse_segment, segment_name
from persistence.disk.format import (
    FOOTER_BYTES,
    INDEX_ROW,
    ROW_IS_DELETE,
    ROW_IS_TOUCH,
    SEGMENT_HEADER_BYTES,
    Frame,
    FrameType,
    SegmentKind,
    decode_segment_header,
)
from persistence.disk.index import Index
from persistence.disk.segments import Segment
from persistence.errors import CorruptionError, DiskFull
from persistence.slices import short_rest
from tests.disk.history import Placed, scan
from tests.disk.memoryfiles import MUTATING, Call, MemoryFiles, fail, kill_at
from tests.disk.workload import Data, Workload
from tests.support import PATH, Points, abandon, config, everything, opened, patching

SEGMENT_BYTES: Final = 64 * 1024
NEVER: Final = float("inf")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def _patches_of_small_records() -> Iterator[None]:
    with patching(1024):
        yield


class Switch:
    """Whether segments are chosen for compaction: by the rules at first."""

    def __init__(self) -> None:
        self.on = True
        self.merges_all_once = False

    def choose(
        self,
        segments: Iterable[Segment],
        segment_bytes: int,
        pinned: Container[int] = (),
        room_bytes: int | None = None,
    ) -> list[Segment]:
        if self.merges_all_once:
            self.merges_all_once = False
            return [segment for segment in segments if segment.sealed]
        if not self.on:
            return []
        return choose_inputs(segments, segment_bytes, pinned, room_bytes)


@pytest.fixture(autouse=True)
def switch(monkeypatch: pytest.MonkeyPatch) -> Switch:
    made = Switch()
    monkeypatch.setattr(compactor, "choose_inputs", made.choose)
    return made


def small(**disk: Any) -> Any:
    return config(**{"segment_bytes": SEGMENT_BYTES, "compression": "none", **disk})


def path_of(number: int) -> str:
    return f"{PATH}/{segment_name(number)}"


def frames_of(files: MemoryFiles, number: int) -> list[Placed]:
    data = files.data(path_of(number))
    header = decode_segment_header(data)
    assert header is not None
    found = scan(data, header.salt_checksum)
    assert all(isinstance(frame, Frame) for _, frame in found)
    return [Placed(offset, frame) for offset, frame in found if isinstance(frame, Frame)]


def segments_in(files: MemoryFiles) -> list[int]:
    numbers = (parse_segment(path.rpartition("/")[2]) for path in files.contents())
    return sorted(number for number in numbers if number is not None)


def all_frames(files: MemoryFiles) -> list[Frame]:
    return [placed.frame for number in segments_in(files) for placed in frames_of(files, number)]


def keys_with(files: MemoryFiles, kind: FrameType) -> list[str]:
    return sorted(frame.key.decode() for frame in all_frames(files) if frame.type == kind)


async def rotate(state: StateManager) -> None:
    """Let the log go on in a new segment, and wait for hint and manifest of the old one."""
    await state._disk._rotate()
    while state._disk._background:
        await asyncio.gather(*state._disk._background)


async def records(state: StateManager) -> dict[str, bytes]:
    """Return the records of all sessions, byte for byte."""
    found = {}
    for sid in await state.get_active_sessions():
        session = await state.get_session(sid)
        assert session is not None
        found[sid] = session._record
    return found


def payload(number: int, size: int = 2000) -> Data:
    return {"n": number, "x": random.Random(number).randbytes(size)}


# What is merged


def segment_of(number: int, **values: Any) -> Segment:
    made = Segment(number, SegmentKind.LOG, 0, sealed=True)
    made.length = SEGMENT_HEADER_BYTES + FOOTER_BYTES + values.pop("content", 0)
    for name, value in values.items():
        setattr(made, name, value)
    return made


def test_segments_that_are_mostly_dead_are_merged_the_deadest_first() -> None:
    live = segment_of(1, content=1000, live_bytes=900)
    half = segment_of(2, content=1000, live_bytes=500)
    dead = segment_of(3, content=1000, live_bytes=0)
    assert choose_inputs([live, half, dead], SEGMENT_BYTES) == [dead, half]


def test_only_as_much_as_fills_one_output_is_merged_at_once() -> None:
    halves = [segment_of(n, content=SEGMENT_BYTES, live_bytes=SEGMENT_BYTES // 2) for n in range(9)]
    assert len(choose_inputs(halves, SEGMENT_BYTES)) == 2


@pytest.mark.parametrize("flag", ["damaged", "unapplied", "without_rows"])
def test_a_segment_that_must_not_be_touched_is_not_merged(flag: str) -> None:
    assert choose_inputs([segment_of(1, content=1000, **{flag: True})], SEGMENT_BYTES) == []
    assert choose_inputs([segment_of(1, content=1000, sealed=False)], SEGMENT_BYTES) == []
    assert choose_inputs([segment_of(1, content=1000)], SEGMENT_BYTES, {1}) == []
    assert len(choose_inputs([segment_of(1, content=1000)], SEGMENT_BYTES, {2})) == 1


def test_live_touches_and_tombstones_are_not_dead_bytes() -> None:
    full = segment_of(
        1, content=1000, live_bytes=400, tombstone_bytes=300, touch_bytes=300, lowest_sequence=1
    )
    assert full.dead_bytes == 0
    assert segment_of(1).dead_bytes == 0, "header and footer are none either"


def test_tombstones_are_merged_with_everything_older() -> None:
    older = segment_of(1, content=1000, live_bytes=1000, lowest_sequence=1)
    buried = segment_of(2, content=1000, live_bytes=500, tombstone_bytes=500, lowest_sequence=50)
    newer = segment_of(3, content=1000, live_bytes=1000, lowest_sequence=90)
    assert choose_inputs([newer, buried, older], SEGMENT_BYTES) == [older, buried]


def test_a_merge_for_tombstones_takes_no_more_segments_than_any_other() -> None:
    def full(buried: int) -> list[Segment]:
        return [
            segment_of(
                number,
                content=1000,
                live_bytes=0 if number > buried else 1000,
                tombstone_bytes=1000 if number > buried else 0,
                lowest_sequence=number * 100,
            )
            for number in range(1, 30)
        ]

    assert len(choose_inputs(full(15), SEGMENT_BYTES)) == 16
    assert len(choose_inputs(full(16), SEGMENT_BYTES)) <= 16


def test_tombstones_that_had_to_be_kept_wait_until_that_has_changed() -> None:
    damaged = segment_of(1, content=1000, live_bytes=1000, lowest_sequence=1, damaged=True)
    kept = segment_of(2, content=1000, tombstone_bytes=1000, lowest_sequence=50, kept_until=1)
    assert choose_inputs([damaged, kept], SEGMENT_BYTES) == []
    assert choose_inputs([kept], SEGMENT_BYTES) == [kept]


def test_many_small_segments_become_one() -> None:
    few = [segment_of(n, content=1000, live_bytes=1000) for n in range(7)]
    assert choose_inputs(few, SEGMENT_BYTES) == []
    many = [*few, segment_of(8, content=1000, live_bytes=1000)]
    assert choose_inputs(many, SEGMENT_BYTES) == many


def test_small_segments_do_not_pile_up_while_there_is_always_something_dead() -> None:
    smalls = [segment_of(n, content=100 * n, live_bytes=100 * n) for n in range(1, 13)]
    dead = [segment_of(n, content=SEGMENT_BYTES) for n in range(20, 40)]
    chosen = choose_inputs([*dead, *smalls], SEGMENT_BYTES)
    assert chosen == [*smalls[:8], *dead[:8]], "the smallest and the dead, half and half"
    assert choose_inputs([*dead, *smalls[:7]], SEGMENT_BYTES) == dead[:16]


def test_tombstones_do_not_pile_up_while_there_is_always_something_dead() -> None:
    dead = segment_of(1, content=1000, lowest_sequence=90)
    buried = segment_of(2, content=1200, tombstone_bytes=1200, lowest_sequence=1)
    assert choose_inputs([dead, buried], SEGMENT_BYTES) == [buried]
    dead.length *= 2
    assert choose_inputs([dead, buried], SEGMENT_BYTES) == [dead], "it frees more at once"


def test_the_lowest_sequence_outside_is_that_of_the_segments_that_stay() -> None:
    one, two, three = (segment_of(n, lowest_sequence=10 * n) for n in (1, 2, 3))
    assert lowest_outside([one, two, three], [one]) == 20
    assert lowest_outside([one, two, three], [two]) == 10
    assert lowest_outside([one], [one]) == 2**64 - 1


SEGMENTS = st.lists(
    st.builds(
        lambda live, tombs, touches, dead, low: segment_of(
            0,
            content=live + tombs + touches + dead,
            live_bytes=live,
            tombstone_bytes=tombs,
            touch_bytes=touches,
            lowest_sequence=low,
        ),
        st.integers(0, 40_000),
        st.integers(0, 20_000) | st.just(0),
        st.integers(0, 20_000) | st.just(0),
        st.integers(0, 60_000),
        st.integers(1, 1000),
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=200)
@given(SEGMENTS, st.booleans())
def test_merging_comes_to_an_end(segments: list[Segment], one_is_damaged: bool) -> None:
    """Merges that free nothing but dead bytes, the least that they can do."""
    for number, segment in enumerate(segments):
        segment.number = number
    if segments and one_is_damaged:
        segments[0].damaged = True
    numbers = itertools.count(len(segments))
    for _ in range(200):
        inputs = choose_inputs(segments, SEGMENT_BYTES)
        if not inputs:
            return
        outside = lowest_outside(segments, inputs)
        live, tombs, touches = (
            sum(getattr(item, name) for item in inputs)
            for name in ("live_bytes", "tombstone_bytes", "touch_bytes")
        )
        segments = [item for item in segments if item not in inputs]
        if live + tombs + touches:
            segments.append(
                segment_of(
                    next(numbers),
                    content=live + tombs + touches,
                    live_bytes=live,
                    tombstone_bytes=tombs,
                    touch_bytes=touches,
                    lowest_sequence=min(item.lowest_sequence for item in inputs),
                    kept_until=outside,
                )
            )
    pytest.fail("it goes on for ever")


def test_kept_touches_fade_as_frames_are_written() -> None:
    kept = segment_of(1, content=1000, touch_bytes=1000)
    fade_touches([kept], 0, 100)
    assert kept.touch_bytes == 1000
    fade_touches([kept], 40, 100)
    assert kept.touch_bytes == 600
    fade_touches([kept], 1, 10**9)
    assert kept.touch_bytes == 599
    fade_touches([kept], 500, 100)
    assert kept.touch_bytes == 0
    fade_touches([segment_of(2)], 5, 0)


def row(
    fingerprint: bytes, sequence: int, length: int, segment: int = 1, offset: int = 64
) -> tuple[Any, ...]:
    return (fingerprint, sequence, 1.0, NEVER, NEVER, segment, offset, length, 0)


def index_of(*rows: tuple[Any, ...]) -> Index:
    index = Index()
    index.put([INDEX_ROW.pack(*values) for values in rows])
    return index


A, B, C = (bytes([letter]) * 16 for letter in b"abc")


def test_a_put_is_wanted_only_where_the_index_points() -> None:
    merge = Merge(index_of(row(A, 5, 500, segment=1, offset=64)), 0)
    assert merge.wanted(row(A, 5, 500, segment=1, offset=64), 1) is not None
    assert merge.wanted(row(A, 5, 500, segment=2, offset=64), 2) is None
    assert merge.wanted(row(A, 4, 500, segment=1, offset=900), 1) is None
    assert merge.wanted(row(B, 4, 500, segment=1, offset=64), 1) is None


def test_a_tombstone_is_dropped_only_when_nothing_older_lies_outside() -> None:
    merge = Merge(Index(), 100)
    assert merge.wanted(row(A, 99, ROW_IS_DELETE), 1) is None
    assert merge.wanted(row(A, 100, ROW_IS_DELETE), 1) is not None
    assert merge.wanted(row(A, 101, ROW_IS_DELETE), 1) is not None
    assert merge.dropped_tombstones == 1


def test_a_tombstone_behind_the_newest_checkpoint_is_kept() -> None:
    merge = Merge(index_of(), 100, shipped_sequence=50)
    assert merge.wanted(row(A, 50, ROW_IS_DELETE), 1) is None
    assert merge.wanted(row(A, 51, ROW_IS_DELETE), 1) is not None


def test_of_the_touches_only_the_newest_behind_the_put_is_wanted() -> None:
    touches = [row(A, 3, ROW_IS_TOUCH), row(A, 7, ROW_IS_TOUCH), row(A, 6, ROW_IS_TOUCH)]
    of_others = [row(B, 8, ROW_IS_TOUCH), row(C, 4, ROW_IS_TOUCH)]
    merge = Merge(index_of(row(A, 5, 500), row(C, 5, 500)), 0)
    merge.note_touches([*touches, *of_others])
    wanted = [item for item in (*touches, *of_others) if merge.wanted(item, 1) is not None]
    assert wanted == [row(A, 7, ROW_IS_TOUCH)]


# What a merge does to a directory


async def test_live_sessions_stay_byte_for_byte_and_dead_ones_leave_the_disk(
    switch: Switch,
) -> None:
    files = MemoryFiles()
    switch.on = False
    async with opened(files, small()) as state:
        for number in range(120):
            await state.create_session(session_id=f"s{number}", data=payload(number))
        for number in range(0, 120, 2):
            await state.update_session_data(f"s{number}", "x", b"small")
        for number in range(0, 120, 3):
            await state.terminate_session(f"s{number}")
        before = await records(state)
        total = state._disk.total_bytes
        switch.on = True
        await state.compact()
        assert await records(state) == before
        assert state._disk.total_bytes < total * 0.6
        assert (await state.stats()).disk.compactions > 0
        for sid in before:
            await state.spill_session(sid)
        assert await records(state) == before, "read again from the copies"
        live = sum(frame.length for frame in all_frames(files) if frame.type == FrameType.PUT)
        stats = (await state.stats()).disk
        assert stats.live_bytes <= live
        assert stats.live_bytes == sum(
            row.length for shard in range(1024) for row in state._disk.index.rows_of_shard(shard)
        )
        await abandon(state)
    async with opened(files.after_kill(), small()) as state:
        assert await records(state) == before
        assert state._disk.damages == []


async def test_the_order_of_a_merge_is_outputs_then_manifest_then_removal(switch: Switch) -> None:
    files = MemoryFiles()
    switch.on = False
    async with opened(files, small()) as state:
        for number in range(10):
            await state.create_session(session_id=f"s{number}", data=payload(number))
        for number in range(9):
            await state.terminate_session(f"s{number}")
        await rotate(state)
        switch.on = True
        files.calls.clear()
        await state.compact()
        calls = [str(call) for call in files.calls]
        output = segment_name(3)
        temporary = f"{output}.tmp"
        assert calls[: calls.index("rename MANIFEST.tmp MANIFEST") + 2] == [
            f"create {temporary}",
            f"write_at {temporary}",
            f"write_at {temporary}",
            f"write_at {temporary}",
            f"sync {temporary}",
            f"rename {temporary} {output}",
            "sync_directory state",
            "create MANIFEST.tmp",
            "write_at MANIFEST.tmp",
            "sync MANIFEST.tmp",
            "rename MANIFEST.tmp MANIFEST",
            "sync_directory state",
        ]
        removal = calls.index(f"remove {segment_name(1)}")
        assert removal > calls.index("rename MANIFEST.tmp MANIFEST")
        assert f"remove {hint_name(1)}" in calls
        assert "sync_directory state" in calls[removal:]


async def test_a_tombstone_goes_when_everything_older_is_merged_and_stays_while_it_is_not(
    switch: Switch,
) -> None:
    files = MemoryFiles()
    switch.on = False
    async with opened(files, small()) as state:
        await state.create_session(session_id="gone", data=payload(0, 100))
        for number in range(5):
            await state.create_session(session_id=f"kept {number}", data=payload(number, 6000))
        await rotate(state)
        await state.terminate_session("gone")
        for number in range(5):
            await state.create_session(session_id=f"dead {number}", data=payload(number, 6000))
        await rotate(state)
        for number in range(5):
            await state.terminate_session(f"dead {number}")
        switch.on = True
        # Only the second segment pays; the first, which holds what "gone" was, stays.
        await state.compact()
        assert 1 in segments_in(files)
        assert 2 not in segments_in(files)
        assert "gone" in keys_with(files, FrameType.DELETE)
        # Now the first one pays too: nothing that is older is left.
        for number in range(5):
            await state.terminate_session(f"kept {number}")
        await rotate(state)
        await state.compact()
        assert keys_with(files, FrameType.DELETE) == []
        assert keys_with(files, FrameType.PUT) == []
        await abandon(state)
    async with opened(files.after_kill(), small()) as state:
        assert await everything(state) == {}


async def test_a_damaged_segment_keeps_every_tombstone_that_may_be_meant_for_it(
    switch: Switch,
) -> None:
    files = MemoryFiles()
    switch.on = False
    async with opened(files, small()) as state:
        await state.create_session(session_id="gone", data=payload(0, 100))
        await state.create_session(session_id="hurt", data=payload(1, 100))
        await rotate(state)
        await state.terminate_session("gone")
        await rotate(state)
        await abandon(state)
    files = files.after_kill()
    hurt = frames_of(files, 1)[1]
    files.flip(path_of(1), 8 * (hurt.end - 10))
    files.delete(f"{PATH}/{hint_name(1)}")
    switch.on = True
    for _ in range(3):
        async with opened(files, small()) as state:
            await state.compact()
            assert await state.get_session("gone") is None
            assert "gone" in keys_with_damage(files)
            with pytest.raises(CorruptionError):
                await state.get_session("hurt")
            await rotate(state)
            await abandon(state)
        files = files.after_kill()


def keys_with_damage(files: MemoryFiles) -> list[str]:
    """Return the keys of all tombstones in a directory with damaged segments."""
    keys = []
    for number in segments_in(files):
        data = files.data(path_of(number))
        header = decode_segment_header(data)
        assert header is not None
        for _, found in scan(data, header.salt_checksum):
            if isinstance(found, Frame) and found.type == FrameType.DELETE:
                keys.append(found.key.decode())
    return keys


async def test_damage_that_a_merge_meets_is_reported_and_left_as_it_is(switch: Switch) -> None:
    files = MemoryFiles()
    switch.on = False
    async with opened(files, small()) as state:
        for number in range(10):
            await state.create_session(session_id=f"s{number}", data=payload(number))
        await rotate(state)
        for number in range(5):
            await state.terminate_session(f"s{number}")
        for number in range(5, 10):
            await state.spill_session(f"s{number}")
        hurt = next(p for p in frames_of(files, 1) if p.frame.key == b"s7")
        files.flip(path_of(1), 8 * (hurt.end - 10))
        before = files.data(path_of(1))
        switch.on = True
        await state.compact()
        assert files.data(path_of(1)) == before
        [damage] = state._disk.damages
        assert (damage.path, damage.offset) == (path_of(1), hurt.offset)
        assert not [path for path in files.contents() if path.endswith(".tmp")]
        with pytest.raises(CorruptionError) as caught:
            await state.get_session("s7")
        assert caught.value.offset == hurt.offset
        for sid in ("s5", "s6", "s8", "s9"):
            session = await state.get_session(sid)
            assert session is not None
            assert session.data == payload(int(sid[1:]))


async def test_renewals_survive_compaction(switch: Switch) -> None:
    files = MemoryFiles()
    clock = ManualClock()
    switch.on = False
    configuration = small(ttl_seconds=1000)
    async with opened(files, configuration, clock=clock) as state:
        for number in range(8):
            await state.create_session(session_id=f"s{number}", data=payload(number))
        await rotate(state)
        for _ in range(3):
            clock.advance(300)
            for number in range(4):
                await state.get_session(f"s{number}")
            await state.flush()
        await rotate(state)
        expected = {sid: deadline_in(state, sid) for sid in ("s0", "s3", "s7")}
        assert len(keys_with(files, FrameType.TOUCH)) == 12
        switch.on = True
        await state.compact()
        assert len(keys_with(files, FrameType.TOUCH)) == 4, "the newest of each"
        await abandon(state)
    for delete_hints in (False, True):
        disk = files.after_kill()
        for path in list(disk.contents()):
            if delete_hints and path.endswith(".hint"):
                disk.delete(path)
        async with opened(disk, configuration, clock=clock) as state:
            for sid, deadline in expected.items():
                # With the eighth that is granted after a crash.
                assert deadline_in(state, sid) == pytest.approx(deadline + 125)
            await abandon(state)


def deadline_in(state: StateManager, sid: str) -> float:
    found = state._disk.index.get(state._disk.fingerprint(sid.encode()))
    assert found is not None
    return found.deadline


async def test_renewals_do_not_pile_up(switch: Switch) -> None:
    files = MemoryFiles()
    clock = ManualClock()
    async with opened(files, small(ttl_seconds=1000), clock=clock) as state:
        for number in range(100):
            await state.create_session(session_id=f"s{number}", data=payload(number, 100))
        total = []
        for _ in range(60):
            clock.advance(100)
            for number in range(100):
                await state.get_session(f"s{number}")
            await state.flush()
            await state.compact()
            total.append(state._disk.total_bytes)
        assert max(total) < 4 * SEGMENT_BYTES
        merges = (await state.stats()).disk.compactions
        await state.compact()
        await state.compact()
        assert (await state.stats()).disk.compactions <= merges + 1
        assert len(await everything(state)) == 100


async def test_hints_of_outputs_say_what_a_scan_of_them_does(switch: Switch) -> None:
    files = MemoryFiles()
    clock = ManualClock()
    switch.on = False
    async with opened(files, small(), clock=clock) as state:
        for number in range(60):
            await state.create_session(session_id=f"s{number}", data=payload(number))
        clock.advance(1000)
        for number in range(50, 60):
            await state.get_session(f"s{number}")
        await state.flush()
        for number in range(0, 60, 2):
            await state.terminate_session(f"s{number}")
        await rotate(state)
        switch.on = True
        await state.compact()
        await abandon(state)
    files = files.after_kill()
    switch.on = False
    found = []
    for with_hints in (True, False):
        disk = files.after_kill()
        for path in list(disk.contents()):
            if path.endswith(".hint") and not with_hints:
                disk.delete(path)
        async with opened(disk, small(), clock=clock) as state:
            rows = [r for shard in range(1024) for r in state._disk.index.rows_of_shard(shard)]
            found.append(sorted((r.fingerprint, r.sequence, r.segment, r.offset) for r in rows))
            assert len(await everything(state)) == 30
            await abandon(state)
    assert found[0] == found[1]


async def test_a_segment_without_a_hint_is_merged_after_the_next_opening(switch: Switch) -> None:
    files = MemoryFiles()
    switch.on = False
    async with opened(files, small()) as state:
        for number in range(10):
            await state.create_session(session_id=f"s{number}", data=payload(number))
        await rotate(state)
        for number in range(9):
            await state.terminate_session(f"s{number}")
        files.delete(f"{PATH}/{hint_name(1)}")
        switch.on = True
        await state.compact()
        assert 1 in segments_in(files)
    async with opened(files.after_kill(), small()) as state:
        await state.compact()
        assert 1 not in segments_in(state._disk._files)  # type: ignore[arg-type]
        assert await everything(state) == {"s9": payload(9)}


async def test_a_live_frame_larger_than_a_segment_is_copied(switch: Switch) -> None:
    files = MemoryFiles()
    switch.on = False
    big = payload(1, 200_000)
    async with opened(files, small()) as state:
        await state.create_session(session_id="big", data=big)
        for number in range(30):
            await state.create_session(session_id=f"s{number}", data=payload(number))
        await rotate(state)
        switch.merges_all_once = True
        await state.compact()
        for sid in ["big", *(f"s{n}" for n in range(30))]:
            await state.spill_session(sid)
        found = await everything(state)
        assert found["big"] == big
        assert len(found) == 31
        assert 1 not in segments_in(files)


# Nothing comes back


@pytest.mark.parametrize("seed", range(8))
async def test_a_random_workload_with_compaction_and_reopening_equals_a_plain_dict(
    seed: int,
) -> None:
    chance = random.Random(seed)
    workload = Workload(seed, sessions=25)
    files = MemoryFiles()
    clock = ManualClock()
    merges = 0
    for _ in range(8):
        async with opened(files, small(ttl_seconds=0), clock=clock) as state:
            await workload.check(state)
            await workload.run(state, chance.randrange(20, 120), clock)
            if chance.random() < 0.5:
                await state.compact()
                await workload.check(state)
            merges += (await state.stats()).disk.compactions
            assert state._disk.damages == []
            if chance.random() < 0.5:
                await abandon(state)
        files = files.after_kill()
    assert merges > 0


@pytest.mark.parametrize("seed", range(3))
async def test_expired_sessions_do_not_come_back(seed: int) -> None:
    chance = random.Random(seed)
    files = MemoryFiles()
    clock = ManualClock()
    ended: set[str] = set()
    alive: dict[str, float] = {}
    for round_number in range(6):
        async with opened(
            files,
            small(
                ttl_seconds=100,
            ),
            clock=clock,
        ) as state:
            for number in range(30):
                sid = f"{round_number}-{number}"
                await state.create_session(session_id=sid, data=payload(number), auto_renew=False)
                alive[sid] = clock.wall() + 100
                clock.advance(chance.random() * 8)
                if chance.random() < 0.1:
                    await state.cleanup_expired()
                if chance.random() < 0.1:
                    await state.compact()
                over = {sid for sid, deadline in alive.items() if deadline <= clock.wall()}
                ended |= over
                alive = {sid: alive[sid] for sid in alive.keys() - over}
                assert set(await state.get_active_sessions()) == alive.keys()
            for sid in chance.sample(sorted(ended), min(10, len(ended))):
                assert await state.get_session(sid) is None
            if chance.random() < 0.6:
                await abandon(state)
        files = files.after_kill()


@asynccontextmanager
async def held_at(
    files: MemoryFiles, call_text: str
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Hold the first such call in its thread until the end of the block.

    Yields what waits until it is there.
    """
    reached = asyncio.Event()
    loop = asyncio.get_running_loop()
    go_on = threading.Event()

    def gate(call: Call) -> None:
        if str(call).startswith(call_text) and not go_on.is_set():
            loop.call_soon_threadsafe(reached.set)
            assert go_on.wait(20)

    async def arrived() -> None:
        async with asyncio.timeout(20):
            await reached.wait()

    files.gates.append(gate)
    try:
        yield arrived
    finally:
        go_on.set()


HELD_CALLS = [
    "read_at 0000000001.seg",
    "create 0000000003.seg.tmp",
    "write_at 0000000003.seg.tmp",
    "sync 0000000003.seg.tmp",
    "rename 0000000003.seg.tmp",
    "create MANIFEST.tmp",
    "rename MANIFEST.tmp",
    "remove 0000000001.seg",
    "create 0000000003.hint.tmp",
]


@pytest.mark.parametrize("call_text", HELD_CALLS)
async def test_what_happens_while_a_merge_is_under_way_is_not_undone_by_it(
    call_text: str, switch: Switch
) -> None:
    files = MemoryFiles()
    clock = ManualClock()
    switch.on = False
    configuration = small(ttl_seconds=1000)
    expected = {
        "s0": {**payload(0), "x": b"updated"},
        "s2": {"again": True},
        "s3": payload(3),
        "s5": {"risen": True},
    }
    async with opened(files, configuration, clock=clock) as state:
        for number in range(10):
            await state.create_session(
                session_id=f"s{number}",
                data=payload(number),
                ttl_seconds=1000 if number in (3, 4) else 0,
                auto_renew=number != 4,
            )
        for number in range(5, 10):
            await state.terminate_session(f"s{number}")
        await rotate(state)
        switch.on = True
        async with held_at(files, call_text) as arrived:
            compacting = asyncio.create_task(state.compact())
            await arrived()
            await state.update_session_data("s0", "x", b"updated")
            await state.terminate_session("s1")
            await state.terminate_session("s2")
            await state.create_session(session_id="s2", data={"again": True}, ttl_seconds=0)
            clock.advance(600)
            assert await state.get_session("s3") is not None  # renewed
            await state.flush()
            clock.advance(500)
            assert await state.get_session("s4") is None  # expired
            await state.create_session(session_id="s5", data={"risen": True})
        await compacting
        assert (await state.stats()).disk.compactions >= 1
        for sid in expected:
            await state.spill_session(sid)
        assert await everything(state) == expected
        await abandon(state)
    for again in range(2):
        async with opened(files.after_kill(), configuration, clock=clock) as state:
            assert await everything(state) == expected
            assert state._disk.damages == []
            if again:
                await rotate(state)
                await state.compact()
                assert await everything(state) == expected


# Crashes and faults in a merge


async def directory_to_compact(switch: Switch) -> tuple[MemoryFiles, dict[str, Data]]:
    """A directory with live and dead frames, tombstones and touches in several segments."""
    files = MemoryFiles()
    clock = ManualClock()
    switch.on = False
    async with opened(files, small(), clock=clock) as state:
        for number in range(50):
            await state.create_session(session_id=f"s{number}", data=payload(number, 3000))
        clock.advance(600)
        for number in range(40, 50):
            await state.get_session(f"s{number}")
        await state.flush()
        for number in range(0, 40, 2):
            await state.terminate_session(f"s{number}")
        for number in range(1, 40, 4):
            await state.replace_session(f"s{number}", {"n": -number})
        for number in range(3, 50, 6):
            await state.replace_session(f"s{number}", payload(number, 2000))
            await state.update_session_data(f"s{number}", "n", -1)  # a patch
            await state.update_session_data(f"s{number}", "n", number)  # in its place
        await rotate(state)
        data = await everything(state)
        assert FrameType.PATCH in {frame.type for frame in all_frames(files)}
        await abandon(state)
    return files.after_kill(), data


async def compact_until_it_dies(files: MemoryFiles, nth: int, part: float, switch: Switch) -> bool:
    """Open, then compact with a kill at the nth call of that; return whether it came to that."""
    switch.on = False
    state = StateManager(config=small(), clock=ManualClock(1_700_000_700), files=files)
    await state.open()
    files.faults.append(kill_at(nth, part))
    switch.on = True
    await state.compact()
    died = files.is_dead
    await abandon(state)
    switch.on = False
    return died


async def assert_is_whole(
    files: MemoryFiles, data: dict[str, Data], switch: Switch, *, compacts: bool
) -> None:
    async with opened(files, small(), clock=ManualClock(1_700_000_700)) as state:
        assert state._disk.damages == []
        assert await everything(state) == data
        if compacts:
            switch.on = True
            await state.compact()
            switch.on = False
            assert await everything(state) == data
        await abandon(state)


async def test_a_kill_at_any_call_of_a_merge_changes_nothing(
    switch: Switch, points: Points
) -> None:
    files, data = await directory_to_compact(switch)
    for nth in points(1):
        part = random.Random(nth).choice((0.0, 0.5, 1.0))
        disk = files.after_kill()
        died = await compact_until_it_dies(disk, nth, part, switch)
        after = disk.after_kill()
        await assert_is_whole(after, data, switch, compacts=True)
        # What the next process found was not durable, and neither is all that it did.
        for left in (None, random.Random(nth)):
            await assert_is_whole(after.after_power_loss(left), data, switch, compacts=False)
        if not died:
            break
    assert nth > 30


async def test_a_power_loss_at_any_call_of_a_merge_changes_nothing(
    switch: Switch, points: Points
) -> None:
    files, data = await directory_to_compact(switch)
    for nth in points(1):
        disk = files.after_kill()
        died = await compact_until_it_dies(disk, nth, 1.0, switch)
        for left in (None, random.Random(nth), random.Random(nth + 1000)):
            await assert_is_whole(disk.after_power_loss(left), data, switch, compacts=False)
        if not died:
            break


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EMFILE])
async def test_whichever_call_of_a_merge_fails_nothing_is_lost_and_the_next_one_works(
    number: int, switch: Switch, points: Points
) -> None:
    files, data = await directory_to_compact(switch)
    for nth in itertools.takewhile(lambda nth: nth < 60, points(1)):
        disk = files.after_kill()
        switch.on = False
        async with opened(disk, small(), clock=ManualClock(1_700_000_700)) as state:
            disk.faults.append(fail(number, MUTATING | {"open_read", "read_at"}, nth=nth))
            switch.on = True
            await state.compact()
            disk.faults.clear()
            assert await everything(state) == data
            await assert_is_whole_copy(disk, data, switch)
            switch.on = True
            await state.compact()
            assert await everything(state) == data
            assert choose_inputs(state._disk.segments.values(), SEGMENT_BYTES) == []
            assert not any(item.without_rows for item in state._disk.segments.values())
            assert not [path for path in disk.contents() if path.endswith(".seg.tmp")]
            await state.create_session(session_id="new", data={"n": 1})
            await abandon(state)
        await assert_is_whole(disk.after_kill(), {**data, "new": {"n": 1}}, switch, compacts=False)


async def assert_is_whole_copy(files: MemoryFiles, data: dict[str, Data], switch: Switch) -> None:
    switch.on = False
    await assert_is_whole(files.after_kill(), data, switch, compacts=False)


async def test_what_an_abandoned_merge_had_finished_does_not_bring_anything_back(
    switch: Switch,
) -> None:
    files = MemoryFiles()
    switch.on = False
    async with opened(files, small()) as state:
        for number in range(60):
            await state.create_session(session_id=f"s{number}", data=payload(number))
        for number in range(0, 60, 3):
            await state.update_session_data(f"s{number}", "x", b"")
        await rotate(state)
        before = await everything(state)
        # The second output cannot be written; the first one has its final name already.
        files.faults.append(fail(errno.EIO, "sync", path="seg.tmp", nth=2))
        switch.merges_all_once = True
        await state.compact()
        assert await everything(state) == before
        for sid in before:
            await state.terminate_session(sid)
        await rotate(state)
        switch.on = True
        await state.compact()
        assert keys_with(files, FrameType.PUT) == []
        await abandon(state)
    async with opened(files.after_kill(), small()) as state:
        assert await everything(state) == {}


# A limit on the disk


async def fill(state: StateManager) -> dict[str, Data]:
    """Create sessions until the limit of the disk refuses one; return them."""
    data: dict[str, Data] = {}
    for number in range(1000):
        try:
            await state.create_session(session_id=f"s{number}", data=payload(number))
        except DiskFull as error:
            assert "disk.max_bytes" in str(error)  # noqa: PT017 - not the first time
            return data
        data[f"s{number}"] = payload(number)
    pytest.fail("nothing was refused")


async def test_the_limit_refuses_new_writes_only_and_they_resume_after_compaction() -> None:
    files = MemoryFiles()
    limit = 6 * SEGMENT_BYTES
    async with opened(files, small(max_bytes=limit)) as state:
        data = await fill(state)
        assert state._disk.total_bytes <= limit + SEGMENT_HEADER_BYTES + FOOTER_BYTES
        assert await everything(state) == data
        with pytest.raises(DiskFull):  # it takes more than what was left for a session
            await state.update_session_data("s0", "x", random.Random(0).randbytes(4 * 1024))
        for sid in list(data)[:100]:
            assert await state.terminate_session(sid)
            del data[sid]
        await state.compact()
        for number in range(1000, 1030):
            await state.create_session(session_id=f"s{number}", data=payload(number))
            data[f"s{number}"] = payload(number)
        assert await everything(state) == data
        await abandon(state)
    async with opened(files.after_kill(), small(max_bytes=limit)) as state:
        assert await everything(state) == data


async def test_writes_resume_also_when_all_that_is_dead_is_in_the_open_segment() -> None:
    files = MemoryFiles()
    async with opened(files, config(max_bytes=SEGMENT_BYTES, compression="none")) as state:
        for sid in await fill(state):
            assert await state.terminate_session(sid)
        async with asyncio.timeout(20):
            while True:
                try:
                    await state.create_session(session_id="new", data=payload(0))
                    break
                except DiskFull:
                    await state.compact()
        assert await everything(state) == {"new": payload(0)}


async def test_a_limit_that_is_reached_again_and_again_is_never_exceeded_by_much() -> None:
    chance = random.Random(5)
    files = MemoryFiles()
    limit = 5 * SEGMENT_BYTES
    data: dict[str, Data] = {}
    refused = 0
    async with opened(files, small(max_bytes=limit)) as state:
        for number in range(600):
            sid = f"s{chance.randrange(60)}"
            value = payload(number, chance.randrange(8000))
            try:
                if sid in data:
                    await state.replace_session(sid, value)
                else:
                    await state.create_session(session_id=sid, data=value)
                data[sid] = value
            except DiskFull:
                refused += 1
                for gone in chance.sample(sorted(data), len(data) // 3):
                    await state.terminate_session(gone)
                    del data[gone]
                await state.compact()
            assert state._disk.total_bytes < limit + SEGMENT_BYTES
        assert await everything(state) == data
        assert refused > 0
        await abandon(state)
    async with opened(files.after_kill(), small(max_bytes=limit)) as state:
        assert await everything(state) == data


# Resting


async def test_compaction_rests_unless_somebody_waits_for_it_or_space_is_wanted() -> None:
    async with opened(MemoryFiles(), config(segment_bytes=SEGMENT_BYTES)) as state:
        around, idle = state._disk.compactor._around, state._disk.compactor
        assert idle._rest_seconds() == short_rest()
        around.pressure.dead_bytes = int(around.pressure.soft_bytes)
        assert idle._rest_seconds() == 0
        around.pressure.dead_bytes = 0
        idle._urgent = True
        assert idle._rest_seconds() == 0
        idle._urgent = False
        idle._idle.clear()  # as if a merge were under way
        waits: list[Awaitable[object]] = [idle.settle(), idle.merged()]
        for wait in waits:
            waiting = asyncio.ensure_future(wait)
            await asyncio.sleep(0)
            assert idle._rest_seconds() == 0
            idle._become_idle()
            await waiting
            idle._idle.clear()
            assert idle._rest_seconds() == short_rest()
        async with idle.paused():
            assert idle._rest_seconds() == short_rest()  # there is no merge that could rest
            second = asyncio.ensure_future(_pass_through(idle.paused()))
            await asyncio.sleep(0)
            assert idle._rest_seconds() == 0
        await second
        idle._become_idle()
        idle._stopping.set()
        assert idle._rest_seconds() == 0


async def _pass_through(block: AbstractAsyncContextManager[None]) -> None:
    async with block:
        pass


async def test_a_close_is_noticed_between_two_rows(
    switch: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch.on = False
    monkeypatch.setattr(compactor, "_ROWS_PER_STEP", 1)
    steps = 0
    files = MemoryFiles()
    async with opened(files, small()) as state:
        for number in range(8):
            await state.create_session(session_id=str(number), data={"x": bytes(20_000)})
        while state._disk._background:
            await asyncio.gather(*state._disk._background)
        merging = state._disk.compactor
        note_touches = Merge.note_touches

        def stop_at_the_second(merge: Merge, rows: Iterator[Any]) -> None:
            nonlocal steps
            steps += 1
            if steps == 2:
                merging._stopping.set()
            note_touches(merge, rows)

        monkeypatch.setattr(Merge, "note_touches", stop_at_the_second)
        switch.merges_all_once = True
        merging.wake()
        await merging.settle()
        assert (steps, merging.stats.merges) == (2, 0)
    async with opened(files.after_kill(), small()) as state:
        assert len(await state.get_active_sessions()) == 8
