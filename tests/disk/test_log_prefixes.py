"""Every byte-prefix of a log, and every single flipped bit in it.

The log is a real one of 64 KiB. What all prefixes and all flips mean is checked through the pure
functions that recovery is made of; real recoveries and real managers open a sample of them.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from typing import Final, NamedTuple

import pytest

from persistence import ManualClock, errors
from persistence.disk.format import (
    FRAME_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    Corrupt,
    Frame,
    FrameType,
    Torn,
    decode_frame,
    decode_segment_header,
)
from persistence.disk.segments import Damage
from tests.disk.history import (
    SEGMENT_PATH,
    History,
    Placed,
    expected_rows,
    fold,
    recover,
    rows_by_key,
    scan,
    write_history,
)
from tests.support import abandon, config, everything, opened

OPENED_PREFIXES: Final = 250
OPENED_FLIPS: Final = 300


@pytest.fixture(scope="module")
def history() -> History:
    return write_history(64 * 1024, seed=1)


@pytest.fixture(autouse=True)
def _no_log_of_thousands_of_repairs() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def clock_at_the_end(history: History) -> ManualClock:
    return ManualClock(history.clock.wall())


def frames_before(history: History, cut: int) -> list[Placed]:
    return [placed for placed in history.frames if placed.end <= cut]


# Prefixes


def test_the_log_is_one_segment_of_64_kib_without_a_gap(history: History) -> None:
    assert len(history.log) >= 64 * 1024
    end = SEGMENT_HEADER_BYTES
    for placed in history.frames:
        assert placed.offset == end
        end = placed.end
    assert end == len(history.log)


def test_every_prefix_holds_exactly_the_frames_that_end_before_the_cut(history: History) -> None:
    salt = history.header.salt_checksum
    boundary = SEGMENT_HEADER_BYTES
    whole = iter(history.frames)
    following = next(whole)
    for cut in range(SEGMENT_HEADER_BYTES, len(history.log) + 1):
        if cut == following.end:
            # The frame is there from now on; what lies before it is as it was.
            assert scan(history.log, salt, size=cut, start=boundary) == [following]
            boundary = cut
            following = next(whole, following)
        found = scan(history.log, salt, size=cut, start=boundary)
        if cut == boundary:
            assert found == []
        else:
            [(offset, torn)] = found
            assert offset == boundary
            assert isinstance(torn, Torn)
    for placed in history.frames:  # from the start, not only from the last boundary
        assert scan(history.log, salt, size=placed.end) == frames_before(history, placed.end)


def test_every_prefix_of_the_header_is_no_header(history: History) -> None:
    for cut in range(SEGMENT_HEADER_BYTES):
        assert decode_segment_header(history.log[:cut]) is None
    assert decode_segment_header(history.log[:SEGMENT_HEADER_BYTES]) == history.header


def cuts_worth_recovering(history: History) -> list[int]:
    """Return every cut in the header, around each end of a frame, and in one frame of each type."""
    cuts = set(range(SEGMENT_HEADER_BYTES + 2))
    by_type: dict[FrameType, Placed] = {}
    for placed in history.frames:
        if placed.frame.length < 400:
            by_type[placed.frame.type] = placed
    assert len(by_type) == 3
    for placed in by_type.values():
        cuts.update(range(placed.offset, placed.end))
    for placed in history.frames:
        key_end = placed.offset + FRAME_HEADER_BYTES + len(placed.frame.key)
        cuts.update(range(placed.end - 6, placed.end + 7))
        cuts.update((placed.offset + FRAME_HEADER_BYTES, key_end - 1, key_end, key_end + 1))
    return sorted(cut for cut in cuts if cut <= len(history.log))


def test_a_recovered_prefix_has_the_sessions_whose_commit_lies_before_the_cut(
    history: History,
) -> None:
    keys = [sid.encode() for sid in history.session_ids]
    for cut in cuts_worth_recovering(history):
        files = history.disk_with(history.log[:cut])
        recovered = recover(files)
        before = frames_before(history, cut)
        assert rows_by_key(recovered, history.manifest, keys) == expected_rows(fold(before)), cut
        assert recovered.damages == []
        assert not recovered.clean
        if cut < SEGMENT_HEADER_BYTES:
            assert recovered.segments == {}
            assert SEGMENT_PATH not in files.contents()
        else:
            end = before[-1].end if before else SEGMENT_HEADER_BYTES
            assert recovered.cut_bytes == cut - end
            assert files.data(SEGMENT_PATH)[:end] == history.log[:end]


async def test_an_opened_prefix_gives_every_session_its_exact_value_and_nothing_more(
    history: History,
) -> None:
    chance = random.Random(2)
    inside = [chance.randrange(len(history.log)) for _ in range(OPENED_PREFIXES - 50)]
    ends = [placed.end for placed in chance.sample(history.frames, 50)]
    for cut in sorted({0, 1, SEGMENT_HEADER_BYTES, len(history.log), *inside, *ends}):
        files = history.disk_with(history.log[:cut])
        async with opened(files, config(), clock=clock_at_the_end(history)) as state:
            expected = history.data_of(fold(frames_before(history, cut)))
            assert await everything(state) == expected, cut
            for sid in history.session_ids:
                assert await state.has_session(sid) == (sid in expected)
                if sid not in expected:
                    assert await state.get_session(sid) is None
            await abandon(state)


async def test_an_opened_prefix_is_written_on(history: History) -> None:
    chance = random.Random(3)
    for cut in [chance.randrange(len(history.log)) for _ in range(25)]:
        files = history.disk_with(history.log[:cut])
        expected = history.data_of(fold(frames_before(history, cut)))
        for again in range(3):
            async with opened(files, config(), clock=clock_at_the_end(history)) as state:
                assert await everything(state) == expected
                await state.create_session(session_id=f"new {again}", data={"n": again})
                expected[f"new {again}"] = {"n": again}
                if again == 1:
                    await abandon(state)
            files = files.after_kill()


# Flipped bits


class Flip(NamedTuple):
    """A flipped bit and what it must lead to.

    `rows` is what is left; `damaged` is the session whose reads must raise, at `offset`.
    `is_reported` is False where the log ends before the flip afterwards.
    """

    bit: int
    place: int
    rows: dict[str, object]
    damaged: str | None
    offset: int
    is_reported: bool
    is_exact: bool


def place_of(history: History, bit: int) -> int:
    """Return the index of the frame that a bit is in; -1: the segment's header."""
    byte = bit // 8
    if byte < SEGMENT_HEADER_BYTES:
        return -1
    return next(n for n, placed in enumerate(history.frames) if byte < placed.end)


def consequences(history: History, bit: int) -> Flip:
    """Say what a flipped bit must lead to, from the frames alone.

    - In the segment's header: no frame can be told from garbage any more. Reported.
    - In a frame behind which no frame says that it had been synced: it cannot be told from a torn
      tail, and the log ends before it. It belongs to the last batch, then.
    - In any other frame: reported. With header and key intact, it is known whose frame it is: reads
      of that session raise (unless a newer frame of it follows), and an end stays an end. With the
      key alone intact, reads of that session raise if it has an older version, which must not be
      shown. Else the session has the version before.
    """
    place = place_of(history, bit)
    frames = history.frames
    if place < 0:
        return Flip(bit, place, {}, None, 0, is_reported=True, is_exact=False)
    offset, frame = frames[place]
    last_good = frames[place - 1].frame.sequence if place else history.header.base_sequence
    if not any(later.frame.durable_sequence > last_good for later in frames[place + 1 :]):
        left = history.data_of(fold(frames[:place]))
        return Flip(bit, place, dict(left), None, offset, is_reported=False, is_exact=False)
    knows_whose = bit // 8 >= offset + FRAME_HEADER_BYTES + len(frame.key)
    if knows_whose and frame.type == FrameType.DELETE:
        left = history.data_of(fold(frames))
        return Flip(bit, place, dict(left), None, offset, is_reported=True, is_exact=True)
    others = fold(placed for placed in frames if placed.offset != offset)
    newest = fold(frames).get(frame.key)
    if knows_whose and newest is not None and newest.offset == offset:
        others.pop(frame.key, None)  # it may be its first frame
        damaged = frame.key.decode()
        left = history.data_of(others)
        return Flip(bit, place, dict(left), damaged, offset, is_reported=True, is_exact=True)
    if bit // 8 < offset + FRAME_HEADER_BYTES and older_version_would_show(history, frame):
        others.pop(frame.key, None)
        left = history.data_of(others)
        damaged = frame.key.decode()
        return Flip(bit, place, dict(left), damaged, offset, is_reported=True, is_exact=True)
    is_exact = knows_whose or history.data_of(others) == history.data_of(fold(frames))
    return Flip(bit, place, dict(history.data_of(others)), None, offset, True, is_exact)


def older_version_would_show(history: History, lost: Frame) -> bool:
    """Whether a session has a put in front of this frame, and neither put nor end behind it."""
    its = [placed.frame for placed in history.frames if placed.frame.key == lost.key]
    before = any(f.type == FrameType.PUT and f.sequence < lost.sequence for f in its)
    return before and not any(
        f.type in (FrameType.PUT, FrameType.DELETE) and f.sequence > lost.sequence for f in its
    )


def test_no_flipped_bit_in_the_segments_header_goes_unnoticed(history: History) -> None:
    damaged = bytearray(history.log[:SEGMENT_HEADER_BYTES])
    for bit in range(8 * SEGMENT_HEADER_BYTES):
        damaged[bit // 8] ^= 1 << bit % 8
        assert decode_segment_header(bytes(damaged)) is None
        damaged[bit // 8] ^= 1 << bit % 8


def test_no_flipped_bit_in_any_frame_goes_unnoticed(history: History) -> None:
    # A frame's decoder looks at nothing outside of the frame, so the others are not affected.
    salt = history.header.salt_checksum
    log = bytearray(history.log)
    flips = 0
    for offset, frame in history.frames:
        header_end = offset + FRAME_HEADER_BYTES + len(frame.key)
        for at in range(offset, offset + frame.length):
            good = log[at]
            for mask in (1, 2, 4, 8, 16, 32, 64, 128):
                log[at] = good ^ mask
                found = decode_frame(log, offset, salt)
                assert not isinstance(found, Frame)
                if at >= header_end:
                    assert isinstance(found, Corrupt)
                    assert (found.key, found.length) == (frame.key, frame.length)
                flips += 1
            log[at] = good
        assert decode_frame(log, offset, salt) == frame
    assert flips == 8 * (len(history.log) - SEGMENT_HEADER_BYTES)
    assert log == history.log


def test_behind_a_damaged_header_the_scan_goes_on_at_the_next_frame(history: History) -> None:
    salt = history.header.salt_checksum
    log = bytearray(history.log)
    for (offset, frame), following in zip(history.frames, history.frames[1:], strict=False):
        for at in range(offset, offset + FRAME_HEADER_BYTES + len(frame.key)):
            good = log[at]
            for mask in (1, 2, 4, 8, 16, 32, 64, 128):
                log[at] = good ^ mask
                first, second = scan(log, salt, start=offset, size=following.end)
                assert first[0] == offset
                assert not isinstance(first[1], Frame)
                assert second == following
            log[at] = good


async def test_no_flipped_bit_gives_a_wrong_value(history: History) -> None:
    chance = random.Random(4)
    last_offset = history.frames[-1].offset
    bits = [chance.randrange(8 * len(history.log)) for _ in range(OPENED_FLIPS - 60)]
    bits += [chance.randrange(8 * SEGMENT_HEADER_BYTES) for _ in range(10)]
    bits += [chance.randrange(8 * last_offset, 8 * len(history.log)) for _ in range(10)]
    for kind in (FrameType.DELETE, FrameType.TOUCH):
        of_kind = [placed for placed in history.frames if placed.frame.type == kind]
        for placed in chance.choices(of_kind, k=20):
            bits.append(8 * placed.offset + chance.randrange(8 * placed.frame.length))
    seen = set()
    for bit in bits:
        flip = consequences(history, bit)
        seen.add((flip.is_reported, flip.damaged is not None, flip.is_exact))
        damaged = bytearray(history.log)
        damaged[bit // 8] ^= 1 << bit % 8
        await check_flip(history, bytes(damaged), flip)
    # Of each kind there were some: what the test allows, it has seen.
    assert seen == {
        (True, True, True),
        (True, False, True),
        (True, False, False),
        (False, False, False),
    }


async def check_flip(history: History, log: bytes, flip: Flip) -> None:
    files = history.disk_with(log)
    for _ in range(2):  # what was found the first time is found the second time
        async with opened(files, config(), clock=clock_at_the_end(history)) as state:
            for sid in history.session_ids:
                if sid == flip.damaged:
                    with pytest.raises(errors.CorruptionError) as caught:
                        await state.get_session(sid)
                    error = caught.value
                    assert (error.path, error.offset) == (SEGMENT_PATH, flip.offset)
                    assert error.session_id == sid
                    continue
                session = await state.get_session(sid)
                found = None if session is None else session.data
                assert found == flip.rows.get(sid), (flip.bit, sid)
            reported = [(damage.path, damage.offset) for damage in damages_of(state)]
            assert reported == [(SEGMENT_PATH, flip.offset)] * flip.is_reported
            await abandon(state)
        files = files.after_kill()
        if flip.is_reported:
            end = len(history.log)
            assert files.data(SEGMENT_PATH)[:end] == log, "damaged bytes stay as they are"


def damages_of(state: object) -> list[Damage]:
    damages: list[Damage] = state._disk.damages  # type: ignore[attr-defined]
    return damages
