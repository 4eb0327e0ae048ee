from __future__ import annotations

import asyncio

from persistence.disk.cut import rows_of, take_cut
from persistence.disk.format import INDEX_ROW
from tests.engine import KIB, Start, disk_of, eventually


async def test_a_cut_of_an_empty_log_is_empty(start: Start) -> None:
    cut = await take_cut(disk_of(await start()))
    assert (cut.sequence, cut.parts, cut.sessions) == (0, [], 0)
    cut.close()


async def test_a_cut_ends_where_the_log_does_and_is_durable(start: Start) -> None:
    state = await start(disk={"fsync": "never"})
    for n in range(20):
        await state.create_session(session_id=f"s{n}")
    disk = disk_of(state)
    assert disk.writer.durable_sequence < 20
    cut = await take_cut(disk)
    await state.create_session(session_id="later")
    assert cut.sequence == 20 <= disk.writer.durable_sequence
    (part,) = cut.parts
    rows = await rows_of(disk, part)
    assert rows is not None
    assert [row[1] for row in INDEX_ROW.iter_unpack(rows)] == list(range(1, 21))
    cut.close()


async def test_a_cut_since_another_one_leaves_out_segments_that_hold_nothing_new(
    start: Start,
) -> None:
    state = await start(disk={"segment_bytes": 64 * KIB})
    disk = disk_of(state)

    async def fill(first: int) -> None:
        await asyncio.gather(
            *(
                state.create_session(session_id=f"s{n}", data={"text": "x" * 900})
                for n in range(first, first + 150)
            )
        )

    await fill(0)
    first = await take_cut(disk)
    first.close()
    await fill(1000)
    second = await take_cut(disk, first.sequence)
    old = {number for number, item in disk.segments.items() if item.lowest_sequence <= 50}
    assert old
    assert old.isdisjoint(part.segment.number for part in second.parts)
    sequences = set()
    for part in second.parts:
        rows = await rows_of(disk, part)
        assert rows is not None
        sequences |= {row[1] for row in INDEX_ROW.iter_unpack(rows)}
    assert set(range(first.sequence + 1, second.sequence + 1)) <= sequences
    second.close()
    assert not any(number in disk.pins for number in disk.segments)


async def test_a_tier_closes_while_a_merge_waits_for_a_cut(start: Start) -> None:
    state = await start(disk={"segment_bytes": 64 * KIB})
    disk = disk_of(state)
    for n in range(150):
        await state.create_session(session_id=f"s{n}", data={"text": "x" * 900})
    async with disk.compactor.paused():
        for n in range(140):
            await state.terminate_session(f"s{n}")
        pinned = sorted(disk.segments)
    await disk.compactor.settle()
    cut = await take_cut(disk)
    async with asyncio.timeout(20):
        await state.close()
    assert pinned
    cut.close()
    again = await start()
    await eventually(lambda: len(disk_of(again).index) == 10)
