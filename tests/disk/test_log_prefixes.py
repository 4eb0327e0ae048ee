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
from persistence.disk.mending import mend_segment_header
from persistence.disk.segments import Damage
from tests.disk.history import (
    SEGMENT_PATH,
    Data,
    History,
    Placed,
    expected_rows,
    fold,
    recover,
    rows_by_key,
    scan,
    write_history,
)
from tests.faults.simulation import stepped
from tests.support import Sampled, abandon, config, everything, opened

OPENED_PREFIXES: Final = 150
OPENED_FLIPS: Final = 125
"""Each is opened twice by a real manager."""
RECOVERED_FLIPS: Final = 500


@pytest.fixture(scope="module")
def history() -> History:
    return write_history(64 * 1024, seed=1)


@pytest.fixture(autouse=True)
def _without_threads() -> Iterator[None]:
    """A thread costs each of many thousand calls a turn that nothing here is about."""
    with stepped():
        yield


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
    """Return every cut in the header, at each end of a frame, and in one frame of each type."""
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
        cuts.update((placed.end - 4, placed.end - 1, placed.end, placed.end + 1))
        cuts.update((placed.offset + FRAME_HEADER_BYTES, key_end))
    return sorted(cut for cut in cuts if cut <= len(history.log))


def test_a_recovered_prefix_has_the_sessions_whose_commit_lies_before_the_cut(
    history: History, sampled: Sampled
) -> None:
    keys = [sid.encode() for sid in history.session_ids]
    for cut in sampled(cuts_worth_recovering(history)):
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

    `damaged` is the session whose reads must raise, if any; every other one has its exact newest
    value, and what had ended stays ended. The damage is reported at `offset`.
    """

    bit: int
    damaged: str | None
    offset: int


def place_of(history: History, bit: int) -> int:
    """Return the index of the frame that a bit is in; -1: the segment's header."""
    byte = bit // 8
    if byte < SEGMENT_HEADER_BYTES:
        return -1
    return next(n for n, placed in enumerate(history.frames) if byte < placed.end)


def consequences(history: History, bit: int) -> Flip:
    """Say what a flipped bit must lead to, from the frames alone.

    One bit never hides whose frame it was, nor does it pass for a torn write: if it is the newest
    put of a session, reads of that session raise. Nothing else changes.
    """
    place = place_of(history, bit)
    if place < 0:
        return Flip(bit, None, 0)
    offset, frame = history.frames[place]
    newest = fold(history.frames).get(frame.key)
    is_newest = newest is not None and newest.offset == offset
    return Flip(bit, frame.key.decode() if is_newest else None, offset)


def test_no_flipped_bit_in_the_segments_header_goes_unnoticed(history: History) -> None:
    damaged = bytearray(history.log[:SEGMENT_HEADER_BYTES])
    for bit in range(8 * SEGMENT_HEADER_BYTES):
        damaged[bit // 8] ^= 1 << bit % 8
        assert decode_segment_header(bytes(damaged)) is None
        mended = mend_segment_header(bytes(damaged), 1, history.header.directory_id)
        assert mended == history.header
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
                    assert known_of(found) == known_of(frame)
                flips += 1
            log[at] = good
        assert decode_frame(log, offset, salt) == frame
    assert flips == 8 * (len(history.log) - SEGMENT_HEADER_BYTES)
    assert log == history.log


def known_of(found: Frame | Corrupt | Torn) -> tuple[object, ...]:
    length = None if isinstance(found, Torn) else found.length
    return found.key, length, found.sequence, found.type


def test_no_flipped_bit_in_a_header_or_key_hides_whose_frame_it_was(history: History) -> None:
    salt = history.header.salt_checksum
    log = bytearray(history.log)
    followed_by = [*history.frames[1:], None]
    for (offset, frame), following in zip(history.frames, followed_by, strict=True):
        end = len(log) if following is None else following.end
        for at in range(offset, offset + FRAME_HEADER_BYTES + len(frame.key)):
            good = log[at]
            for mask in (1, 2, 4, 8, 16, 32, 64, 128):
                log[at] = good ^ mask
                (place, found), *behind = scan(log, salt, start=offset, size=end)
                assert place == offset
                assert not isinstance(found, Frame)
                assert known_of(found) == known_of(frame)
                assert behind == ([] if following is None else [following])
            log[at] = good


def bits_worth_opening(history: History, count: int, seed: int) -> list[int]:
    """Return a sample of all bits, with more of where damage is told from a torn tail, and ends."""
    chance = random.Random(seed)
    end = 8 * len(history.log)
    bits = [chance.randrange(end) for _ in range(count - count // 5)]
    for _ in range(count // 25):
        bits.append(chance.randrange(8 * SEGMENT_HEADER_BYTES))
        bits.append(chance.randrange(8 * history.frames[-1].offset, end))
        bits.append(chance.randrange(8 * history.frames[-4].offset, end))
    for kind in (FrameType.DELETE, FrameType.TOUCH):
        of_kind = [placed for placed in history.frames if placed.frame.type == kind]
        bits += [
            8 * placed.offset + chance.randrange(8 * placed.frame.length)
            for placed in chance.choices(of_kind, k=count // 25)
        ]
    return bits


async def test_no_flipped_bit_gives_a_wrong_value(history: History) -> None:
    expected = history.data_of(fold(history.frames))
    seen = set()
    for bit in bits_worth_opening(history, OPENED_FLIPS, seed=4):
        flip = consequences(history, bit)
        seen.add((flip.offset == 0, flip.damaged is not None))
        damaged = bytearray(history.log)
        damaged[bit // 8] ^= 1 << bit % 8
        await check_flip(history, bytes(damaged), flip, expected)
    assert seen == {(True, False), (False, True), (False, False)}, "of each kind there were some"


def test_no_flipped_bit_leads_recovery_to_another_frame(history: History) -> None:
    keys = [sid.encode() for sid in history.session_ids]
    expected = expected_rows(fold(history.frames))
    for bit in bits_worth_opening(history, RECOVERED_FLIPS, seed=5):
        flip = consequences(history, bit)
        damaged = bytearray(history.log)
        damaged[bit // 8] ^= 1 << bit % 8
        recovered = recover(history.disk_with(bytes(damaged)))
        assert recovered.cut_bytes == 0
        assert [damage.offset for damage in recovered.damages] == [flip.offset]
        rows = rows_by_key(recovered, history.manifest, keys)
        assert rows.keys() == expected.keys()
        for key, row in rows.items():
            if key.decode() == flip.damaged:
                assert row[3:] == expected[key][3:], "the place of the damaged frame, no other"
            else:
                assert row == expected[key]


async def check_flip(history: History, log: bytes, flip: Flip, expected: dict[str, Data]) -> None:
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
                assert found == expected.get(sid), (flip.bit, sid)
            reported = [(damage.path, damage.offset) for damage in damages_of(state)]
            assert reported == [(SEGMENT_PATH, flip.offset)], flip.bit
            await abandon(state)
        files = files.after_kill()
        end = len(history.log)
        assert files.data(SEGMENT_PATH)[:end] == log, "damaged bytes stay as they are"


def damages_of(state: object) -> list[Damage]:
    damages: list[Damage] = state._disk.damages  # type: ignore[attr-defined]
    return damages
