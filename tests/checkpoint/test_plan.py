from __future__ import annotations

import asyncio

from persistence import ManualClock, StateManager
from persistence.checkpoint.plan import CHUNK_BYTES, Run, runs_of
from persistence.disk.cut import Cut, take_cut
from persistence.disk.files import read_exactly
from persistence.disk.format import Frame, FrameType, decode_frame
from persistence.disk.segments import Damage
from persistence.slices import Slices
from tests.engine import KIB, Start, disk_of


async def make(state: StateManager, count: int) -> None:
    await asyncio.gather(
        *(
            state.create_session(session_id=f"s{n}", data={"n": 0, "text": "x" * 800})
            for n in range(count)
        )
    )


async def frames_of(state: StateManager, cut: Cut) -> tuple[list[Frame], list[Run]]:
    """Return the frames that would be shipped, and in which runs."""
    disk = disk_of(state)
    frames, runs = [], []
    for part in cut.parts:
        async for run in runs_of(disk, cut, part, Slices(ManualClock().monotonic)):
            runs.append(run)
            data = run.literal
            if not data:
                with disk.pinned_file(part.segment.number) as fd:
                    data = read_exactly(disk.files, fd, run.nbytes, run.start)
            at = count = 0
            while at < len(data):
                frame = decode_frame(data, at, part.segment.salt_checksum)
                assert isinstance(frame, Frame)
                frames.append(frame)
                at += frame.length
                count += 1
            assert count == run.frames
    return frames, runs


async def test_a_log_without_dead_frames_is_one_run_a_segment(start: Start) -> None:
    state = await start(disk={"segment_bytes": 64 * KIB})
    await make(state, 200)
    cut = await take_cut(disk_of(state))
    frames, runs = await frames_of(state, cut)
    assert (len(frames), len(runs)) == (200, len(cut.parts))
    assert all(run.nbytes <= CHUNK_BYTES for run in runs)
    cut.close()


async def test_a_large_segment_is_cut_into_runs_of_whole_frames(start: Start) -> None:
    state = await start(disk={"compression": "none"})
    for n in range(6):
        await state.create_session(session_id=f"s{n}", data={"text": "x" * 2**20})
    await state.create_session(session_id="huge", data={"text": "x" * 5 * 2**20})
    cut = await take_cut(disk_of(state))
    frames, runs = await frames_of(state, cut)
    assert len(frames) == 7
    assert [run.frames for run in runs] == [1] * 7
    cut.close()


async def test_what_is_superseded_before_the_cut_is_left_out_where_much_is_dead(
    start: Start,
) -> None:
    state = await start()
    await make(state, 50)
    for value in (1, 2, 3):
        for n in range(50):
            await state.update_session_data(f"s{n}", "n", value)
    for n in range(10):
        await state.terminate_session(f"s{n}")
    cut = await take_cut(disk_of(state))
    frames, _ = await frames_of(state, cut)
    assert sum(frame.type == FrameType.PUT for frame in frames) == 40
    assert sum(frame.type == FrameType.DELETE for frame in frames) == 10
    cut.close()


async def test_what_is_superseded_behind_the_cut_goes_along(start: Start) -> None:
    state = await start(disk={"segment_bytes": 64 * KIB})
    disk = disk_of(state)
    await make(state, 100)
    first = await take_cut(disk)
    first.close()
    for n in range(100):
        await state.update_session_data(f"s{n}", "n", 1)
    cut = await take_cut(disk, first.sequence)
    for n in range(50):
        await state.update_session_data(f"s{n}", "n", 2)
    for n in range(50, 60):
        await state.terminate_session(f"s{n}")
    frames, _ = await frames_of(state, cut)
    assert {frame.key for frame in frames} == {b"s%d" % n for n in range(100)}
    assert all(first.sequence < frame.sequence <= cut.sequence for frame in frames)
    cut.close()


async def test_a_merged_segment_gives_what_came_between_the_cuts(start: Start) -> None:
    state = await start(disk={"segment_bytes": 64 * KIB})
    disk = disk_of(state)
    await make(state, 150)
    first = await take_cut(disk)
    first.close()
    for n in range(0, 150, 2):
        await state.update_session_data(f"s{n}", "n", 1)
    for n in range(1, 120, 2):
        await state.terminate_session(f"s{n}")
    await make_others(state, 80)
    await disk.compactor.settle()
    assert disk.compactor.stats.merges
    cut = await take_cut(disk, first.sequence)
    frames, _ = await frames_of(state, cut)
    assert all(first.sequence < frame.sequence <= cut.sequence for frame in frames)
    puts = {frame.key for frame in frames if frame.type == FrameType.PUT}
    changed = {b"s%d" % n for n in range(0, 150, 2)} | {b"other%d" % n for n in range(80)}
    assert changed <= puts
    cut.close()


async def make_others(state: StateManager, count: int) -> None:
    await asyncio.gather(
        *(
            state.create_session(session_id=f"other{n}", data={"text": "y" * 800})
            for n in range(count)
        )
    )


async def test_a_segment_whose_hint_is_gone_is_read_frame_by_frame(start: Start) -> None:
    state = await start(disk={"segment_bytes": 64 * KIB})
    disk = disk_of(state)
    await make(state, 200)
    await state.flush()
    cut = await take_cut(disk)
    for part in cut.parts:
        if part.rows is None:
            part.segment.damaged = True
            disk.damages.append(Damage("as if", 0, None, "as if"))
    frames, _ = await frames_of(state, cut)
    assert sorted(frame.key for frame in frames) == sorted(b"s%d" % n for n in range(200))
    cut.close()
