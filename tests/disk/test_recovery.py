from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import pytest

from persistence import ManualClock, StateManager, errors
from persistence.disk.compaction import create_output, finish_output
from persistence.disk.filenames import (
    INDEX_SNAPSHOT,
    QUARANTINE,
    hint_name,
    quarantine_name,
    segment_name,
)
from persistence.disk.format import (
    FOOTER_BYTES,
    FRAME_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    Corrupt,
    Frame,
    FrameType,
    SegmentHeader,
    SegmentKind,
    Torn,
    decode_segment_header,
    encode_frame,
    encode_segment_header,
)
from persistence.disk.manifest import decode_manifest
from persistence.disk.segments import Damage
from tests.disk.history import Placed, all_rows_equal, recover, scan
from tests.disk.memoryfiles import Killed, MemoryFiles, kill_at
from tests.faults.simulation import stepped
from tests.support import PATH, Points, abandon, config, opened

SEGMENT_BYTES: Final = 64 * 1024
Data = dict[str, dict[str, Any]]


@pytest.fixture(autouse=True)
def _without_threads() -> Iterator[None]:
    """A thread costs each of many thousand calls a turn that nothing here is about."""
    with stepped():
        yield


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def _no_compaction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only recovery changes the disk here."""
    monkeypatch.setattr("persistence.disk.compactor.choose_inputs", lambda *_: [])


def path_of(number: int) -> str:
    return f"{PATH}/{segment_name(number)}"


def hint_of(number: int) -> str:
    return f"{PATH}/{hint_name(number)}"


def header_of(files: MemoryFiles, number: int) -> SegmentHeader:
    header = decode_segment_header(files.data(path_of(number)))
    assert header is not None
    return header


def frames_of(files: MemoryFiles, number: int) -> list[Placed]:
    data = files.data(path_of(number))
    found = scan(data, header_of(files, number).salt_checksum)
    return [Placed(offset, frame) for offset, frame in found if isinstance(frame, Frame)]


def last_put(files: MemoryFiles, number: int) -> Placed:
    return [placed for placed in frames_of(files, number) if placed.frame.type == FrameType.PUT][-1]


@dataclass
class Scene:
    """A directory as something left it, and what opening it must give.

    Attributes:
        files: the disk.
        data: the sessions that must be there.
        damages: (path, offset, session id) of the defects that must be reported.
        unreadable: sessions whose reads must raise, and where.
        is_exact: False: a listing passes over the unreadable ones, whose ids nobody can read.
        may_be_older: what was lost may have been newer versions, and ends, of other sessions.
        clock: the time.
    """

    files: MemoryFiles
    data: Data
    damages: list[tuple[str, int, str | None]] = field(default_factory=list)
    unreadable: dict[str, tuple[str, int]] = field(default_factory=dict)
    is_exact: bool = True
    may_be_older: bool = False
    clock: ManualClock = field(default_factory=ManualClock)

    def loses(self, session_ids: set[str]) -> None:
        """Take sessions out of what must be there."""
        self.data = {sid: data for sid, data in self.data.items() if sid not in session_ids}


async def _write_segments(*, close: bool) -> Scene:
    """Three segments: updates, ends and renewals, the last one not sealed unless closed."""
    files = MemoryFiles()
    clock = ManualClock()
    chance = random.Random(11)
    data: Data = {}
    async with opened(files, config(segment_bytes=SEGMENT_BYTES), clock=clock) as state:
        await state._disk.compactor.stop()  # the segments stay as they are written
        for number in range(70):
            sid = f"s{number % 50}"
            value = {"n": number, "x": chance.randbytes(2500)}
            if sid in data:
                await state.replace_session(sid, value)
            else:
                await state.create_session(session_id=sid, data=value, user_id="ada")
            data[sid] = value
            if number % 9 == 8:
                gone = f"s{number % 50 - 3}"
                assert await state.terminate_session(gone)
                del data[gone]
        for sid in sorted(data)[:3]:
            clock.advance(300)
            await state.get_session(sid)
        await state.flush()
        await settled(state)
        if close:
            await state.close()
        else:
            await abandon(state)
    scene = Scene(files.after_kill(), data, clock=clock)
    assert {path_of(1), path_of(2), path_of(3)} <= set(scene.files.contents())
    assert path_of(4) not in scene.files.contents()
    return scene


async def settled(state: StateManager) -> None:
    """Wait for what follows a rotation in the background."""
    while state._disk._background:
        await asyncio.gather(*state._disk._background)


SEGMENTS: dict[bool, Scene] = {}


@pytest.fixture(autouse=True, scope="module")
def _segments_are_written() -> None:
    for closed in (False, True):
        SEGMENTS[closed] = asyncio.run(_write_segments(close=closed))


def segments(*, closed: bool = False) -> Scene:
    """Return a copy of the scene that all others start from: killed, or cleanly closed."""
    made = SEGMENTS[closed]
    clock = ManualClock(made.clock.wall())
    return Scene(made.files.after_kill(), dict(made.data), clock=clock)


# Scenes: each returns a fresh one

SCENES: dict[str, Callable[[], Scene]] = {}


def scene(build: Callable[[], Scene]) -> Callable[[], Scene]:
    SCENES[build.__name__.replace("_", " ")] = build
    return build


@scene
def an_empty_directory() -> Scene:
    return Scene(MemoryFiles(), {})


@scene
def a_killed_process() -> Scene:
    return segments()


@scene
def a_clean_close() -> Scene:
    return segments(closed=True)


def with_tail(tail: bytes) -> Scene:
    made = segments()
    made.files.set_data(path_of(3), made.files.data(path_of(3)) + tail)
    return made


@scene
def a_tail_of_zeros() -> Scene:
    return with_tail(bytes(4096))


@scene
def a_tail_of_garbage() -> Scene:
    return with_tail(random.Random(5).randbytes(3000))


@scene
def half_a_frame_at_the_end() -> Scene:
    made = segments()
    placed = last_put(made.files, 2)
    frame = made.files.data(path_of(2))[placed.offset : placed.end]
    return with_tail(frame[: len(frame) // 2])


@scene
def stale_frames_of_another_segment_at_the_end() -> Scene:
    made = segments()
    placed = last_put(made.files, 2)
    return with_tail(made.files.data(path_of(2))[placed.offset : placed.end])


@scene
def stale_frames_of_this_very_segment_at_the_end() -> Scene:
    made = segments()
    data = made.files.data(path_of(3))
    first = frames_of(made.files, 3)[0]
    return with_tail(bytes(100) + data[first.offset : first.end])


@scene
def half_a_frame_whose_payload_holds_a_whole_one() -> Scene:
    made = segments()
    salt = header_of(made.files, 3).salt_checksum
    ids = bytes(48)
    stale = {
        "other salt": encode_frame(salt ^ 1, 1, b"s0", bytes(80), 10**6, 10**6, ids=ids),
        "this salt": made.files.data(path_of(3))[
            frames_of(made.files, 3)[0].offset : frames_of(made.files, 3)[0].end
        ],
    }
    payload = b"".join(stale.values()) + bytes(2000)
    outer = encode_frame(salt, 1, b"s1", payload, 10**6, 1, ids=ids)
    return with_tail(outer[:-500])


@scene
def frames_that_were_never_synced_behind_a_torn_one() -> Scene:
    """The machine died: of a batch that was being written, the first frame was torn."""
    made = segments()
    salt = header_of(made.files, 3).salt_checksum
    durable = frames_of(made.files, 3)[-1].frame.sequence
    batch = [
        encode_frame(salt, 1, b"s1", bytes(200), durable + number, durable, ids=bytes(48))
        for number in (1, 2, 3)
    ]
    torn = batch[0][:100] + bytes(50) + batch[0][150:]
    return with_tail(torn + batch[1] + batch[2])


def damaged_payload(number: int) -> Scene:
    made = segments()
    data = made.data
    candidates = frames_of(made.files, number)[:-1]
    newest = {f.frame.key: f for n in (1, 2, 3) for f in frames_of(made.files, n)}
    placed = next(
        f for f in candidates if f.frame.type == FrameType.PUT and newest[f.frame.key] == f
    )
    sid = placed.frame.key.decode()
    assert sid in data
    made.files.flip(path_of(number), 8 * (placed.end - 20))
    made.loses({sid})
    made.damages = [(path_of(number), placed.offset, sid)]
    made.unreadable = {sid: (path_of(number), placed.offset)}
    return made


@scene
def a_damaged_payload_in_the_last_segment_with_synced_frames_behind_it() -> Scene:
    return damaged_payload(3)


@scene
def a_damaged_payload_in_a_sealed_segment_without_hint() -> Scene:
    made = damaged_payload(1)
    made.files.delete(hint_of(1))
    return made


@scene
def a_damaged_payload_in_a_sealed_segment_with_its_hint() -> Scene:
    """Nobody looks at the payload before it is read, so nothing is reported yet."""
    made = damaged_payload(1)
    made.damages = []
    return made


@scene
def a_damaged_tombstone() -> Scene:
    made = segments()
    placed = next(f for f in frames_of(made.files, 2) if f.frame.type == FrameType.DELETE)
    made.files.flip(path_of(2), 8 * placed.end - 1)
    made.files.delete(hint_of(2))
    made.damages = [(path_of(2), placed.offset, placed.frame.key.decode())]
    return made


def lead_to(made: Scene, number: int, start: int = 0) -> None:
    """Let reads of the sessions whose newest put is in that segment from `start` on raise."""
    newest = {
        f.frame.key: (n, f)
        for n in (1, 2, 3)
        for f in frames_of(segments().files, n)
        if f.frame.type != FrameType.TOUCH
    }
    for key, (n, placed) in newest.items():
        if (n, placed.frame.type) == (number, FrameType.PUT) and placed.offset >= start:
            made.unreadable[key.decode()] = (path_of(number), placed.offset)
    made.loses(set(made.unreadable))
    made.is_exact = False
    assert made.unreadable


@scene
def a_sealed_segment_without_its_end() -> Scene:
    made = segments()
    made.files.delete(hint_of(2))
    made.may_be_older = True
    *_, before, last, footer = frames_of(made.files, 2)
    assert footer.frame.type == FrameType.FOOTER
    end = last.offset + 40
    made.files.set_data(path_of(2), made.files.data(path_of(2))[:end])
    assert last.frame.type == FrameType.PUT
    made.loses({last.frame.key.decode()} & not_written_again(made, last))
    # The frame that is cut off, and the missing footer.
    made.damages = [(path_of(2), before.end, None), (path_of(2), end, None)]
    return made


@scene
def a_sealed_segment_that_was_cut_in_a_payload() -> Scene:
    made = segments()
    made.files.delete(hint_of(2))
    *_, last, _ = frames_of(made.files, 2)
    sid = last.frame.key.decode()
    end = last.end - 40
    made.files.set_data(path_of(2), made.files.data(path_of(2))[:end])
    made.unreadable = {sid: (path_of(2), last.offset)}
    made.loses({sid})
    made.damages = [(path_of(2), last.offset, sid), (path_of(2), end, None)]
    return made


@scene
def half_of_a_sealed_segment_with_its_hint() -> Scene:
    made = segments()
    middle = frames_of(made.files, 2)[8]
    made.files.set_data(path_of(2), made.files.data(path_of(2))[: middle.offset])
    lead_to(made, 2, middle.offset)
    made.damages = [(path_of(2), middle.offset, None)]
    return made


@scene
def an_emptied_sealed_segment_with_its_hint() -> Scene:
    made = segments()
    made.files.set_data(path_of(2), b"")
    lead_to(made, 2)
    made.damages = [(path_of(2), 0, None)]
    return made


def not_written_again(made: Scene, placed: Placed) -> set[str]:
    later = [f for n in (1, 2, 3) for f in frames_of(made.files, n)]
    again = {f.frame.key for f in later if f.frame.sequence > placed.frame.sequence}
    return {placed.frame.key.decode()} - {key.decode() for key in again}


@scene
def a_missing_sealed_segment_with_its_hint() -> Scene:
    made = segments()
    lead_to(made, 1)
    made.files.delete(path_of(1))
    made.damages = [(path_of(1), 0, None)]
    return made


@scene
def a_missing_sealed_segment_without_hint() -> Scene:
    made = segments()
    made.is_exact = False
    made.may_be_older = True
    gone = {placed.frame.key.decode() for placed in frames_of(made.files, 1)}
    kept = {f.frame.key.decode() for n in (2, 3) for f in frames_of(made.files, n)}
    made.files.delete(path_of(1))
    made.files.delete(hint_of(1))
    made.loses(gone - kept)
    made.damages = [(path_of(1), 0, None)]
    return made


@scene
def a_missing_segment_that_no_manifest_named_yet() -> Scene:
    made = segments()
    recover(made.files)  # seals the last one
    made.files.delete(path_of(3))
    lead_to(made, 3)
    made.damages = [(path_of(3), 0, None)]
    return made


@scene
def a_sealed_segment_with_a_flipped_bit_in_its_header() -> Scene:
    made = segments()
    made.files.flip(path_of(1), 400)
    made.damages = [(path_of(1), 0, None)]
    return made


@scene
def a_sealed_segment_with_a_destroyed_header_and_its_hint() -> Scene:
    made = segments()
    destroy(made.files, 1, 0, SEGMENT_HEADER_BYTES)
    made.damages = [(path_of(1), 0, None)]
    return made


@scene
def a_sealed_segment_with_a_destroyed_header_without_hint() -> Scene:
    made = a_sealed_segment_with_a_destroyed_header_and_its_hint()
    made.files.delete(hint_of(1))
    return made


@scene
def a_sealed_segment_with_a_destroyed_beginning_and_its_hint() -> Scene:
    made = segments()
    first = next(
        f for f in frames_of(made.files, 2) if {f.frame.key.decode()} & not_written_again(made, f)
    )
    destroy(made.files, 2, 0, first.end - 1)
    sid = first.frame.key.decode()
    before = [f for f in frames_of(segments().files, 2) if f.offset < first.offset]
    assert all(not not_written_again(segments(), f) for f in before)
    made.unreadable = {sid: (path_of(2), first.offset)}
    made.loses({sid})
    made.is_exact = False
    made.damages = [(path_of(2), 0, None)]
    return made


@scene
def a_last_segment_with_a_flipped_bit_in_its_header() -> Scene:
    made = segments()
    made.files.flip(path_of(3), 200)
    made.damages = [(path_of(3), 0, None)]
    return made


@scene
def a_last_segment_with_a_destroyed_header() -> Scene:
    made = segments()
    destroy(made.files, 3, 0, SEGMENT_HEADER_BYTES)
    made.damages = [(path_of(3), 0, None)]
    return made


@scene
def a_damaged_footer() -> Scene:
    made = segments()
    footer = frames_of(made.files, 1)[-1]
    made.files.flip(path_of(1), 8 * footer.end - 9)
    made.files.delete(hint_of(1))
    made.damages = [(path_of(1), footer.offset, None)]
    return made


@scene
def a_sealed_last_segment_that_was_cut() -> Scene:
    """The manifest says that it is sealed, so a missing end is damage and no torn tail."""
    made = segments(closed=True)
    made.files.delete(hint_of(3))
    *_, last, footer = frames_of(made.files, 3)
    assert footer.end == len(made.files.data(path_of(3)))
    made.files.set_data(path_of(3), made.files.data(path_of(3))[: footer.offset])
    assert last.end == footer.offset
    made.damages = [(path_of(3), footer.offset, None)]
    return made


def half_made_segment(header_bytes: int) -> Scene:
    made = segments()
    files = made.files
    # Sealed, as it is before the next segment is made.
    recover(files)
    header = header_of(files, 3)
    next_header = header._replace(number=4, salt=b"another salt")
    files.set_data(path_of(4), encode_segment_header(next_header)[:header_bytes])
    return made


@scene
def a_segment_that_was_being_made_empty() -> Scene:
    return half_made_segment(0)


@scene
def a_segment_that_was_being_made_half() -> Scene:
    return half_made_segment(30)


@scene
def a_segment_that_was_being_made_whole() -> Scene:
    return half_made_segment(SEGMENT_HEADER_BYTES)


@scene
def a_segment_that_was_being_made_while_a_merge_had_finished() -> Scene:
    made = half_made_segment(30)
    add_merged(made.files, 5)
    return made


def add_merged(files: MemoryFiles, number: int) -> None:
    manifest = decode_manifest(files.data(f"{PATH}/MANIFEST"))
    output = create_output(files, PATH, manifest.directory_id, number, 1)
    finish_output(files, PATH, output)


@scene
def an_output_of_a_merge_that_no_manifest_names() -> Scene:
    made = segments()
    add_merged(made.files, 4)
    return made


@scene
def leftovers_of_a_crash() -> Scene:
    made = segments()
    for name in ("MANIFEST.tmp", "0000000009.seg.tmp", "0000000002.hint.tmp", "INDEX.tmp"):
        made.files.set_data(f"{PATH}/{name}", b"half of something")
    made.files.set_data(hint_of(8), b"the hint of nothing")
    return made


ALL_SCENES = pytest.mark.parametrize("build", SCENES.values(), ids=SCENES.keys())


def found_damages(damages: list[Damage]) -> list[tuple[str, int, str | None]]:
    return sorted(((damage.path, damage.offset, damage.session_id) for damage in damages), key=repr)


async def check(made: Scene, files: MemoryFiles) -> MemoryFiles:
    """Open the directory, compare with what must be there; return what a kill then leaves."""
    configuration = config(segment_bytes=SEGMENT_BYTES)
    async with opened(files, configuration, clock=ManualClock(made.clock.wall())) as state:
        assert found_damages(state._disk.damages) == sorted(made.damages, key=repr)
        for sid, (path, offset) in made.unreadable.items():
            assert await state.has_session(sid)
            for read in (state.get_session, state.restore_session):
                with pytest.raises(errors.CorruptionError) as caught:
                    await read(sid)
                error = caught.value
                assert (error.path, error.offset, error.session_id) == (path, offset, sid)
                assert path in str(error)
                assert str(offset) in str(error)
        known = set(await state.get_active_sessions())
        assert known - set(made.unreadable) >= set(made.data)
        for sid, data in made.data.items():
            session = await state.get_session(sid, renew=False)
            assert session is not None
            assert session.data == data
        if not made.may_be_older:
            for sid in {f"s{number}" for number in range(50)} - set(made.unreadable):
                session = await state.get_session(sid, renew=False)
                assert (session is not None) == (sid in made.data), "what has ended stays ended"
        if made.is_exact:
            assert known == made.data.keys() | made.unreadable.keys()
        await abandon(state)
    return files.after_kill()


@ALL_SCENES
async def test_opening_gives_what_must_be_there_and_reports_the_rest(
    build: Callable[[], Scene],
) -> None:
    made = build()
    await check(made, made.files)


@ALL_SCENES
async def test_recovering_twice_equals_recovering_once(build: Callable[[], Scene]) -> None:
    made = build()
    files = await check(made, made.files)
    before = files.contents()
    files = await check(made, files)
    files = await check(made, files)
    assert files.contents() == before, "a second recovery has nothing left to do"


@ALL_SCENES
async def test_a_kill_at_any_point_of_recovery_changes_nothing(
    build: Callable[[], Scene], points: Points
) -> None:
    made = build()
    for twice_nth in points(2):
        files = made.files.after_kill()
        files.faults.append(kill_at(twice_nth // 2, 0.5 * (twice_nth % 2)))
        state = StateManager(config=config(segment_bytes=SEGMENT_BYTES), files=files)
        try:
            await state.open()
        except Killed:
            await check(made, files.after_kill())
            continue
        await abandon(state)
        break  # it came to its end without reaching the nth call


@ALL_SCENES
async def test_a_power_loss_at_any_point_of_recovery_changes_nothing(
    build: Callable[[], Scene], points: Points
) -> None:
    made = build()
    for nth in points(1):
        files = made.files.after_kill()
        files.faults.append(kill_at(nth, 1.0))
        state = StateManager(config=config(segment_bytes=SEGMENT_BYTES), files=files)
        try:
            await state.open()
        except Killed:
            for chance in (None, random.Random(nth)):
                await check(made, files.after_power_loss(chance))
            continue
        for chance in (None, random.Random(nth), random.Random(nth + 1000)):
            await check(made, files.after_power_loss(chance))
        await abandon(state)
        break


@ALL_SCENES
async def test_after_recovery_the_directory_is_written_on(build: Callable[[], Scene]) -> None:
    made = build()
    configuration = config(segment_bytes=SEGMENT_BYTES)
    async with opened(made.files, configuration, clock=ManualClock(made.clock.wall())) as state:
        numbers = [
            placed.frame.sequence
            for number in (1, 2, 3)
            for placed in frames_of(segments().files, number)
            if made.data and placed.frame.type != FrameType.FOOTER
        ]
        await state.create_session(session_id="new", data={"n": 1})
        row = state._disk.index.get(state._disk.fingerprint(b"new"))
        assert row is not None
        assert row.sequence > max(numbers, default=0)
        await abandon(state)
    made.data["new"] = {"n": 1}
    await check(made, made.files.after_kill())


# What else must hold in single scenes


@pytest.mark.parametrize("header_bytes", range(SEGMENT_HEADER_BYTES + 1))
async def test_every_prefix_of_a_header_is_a_torn_creation(header_bytes: int) -> None:
    made = half_made_segment(header_bytes)
    recovered = recover(made.files)
    assert recovered.damages == []
    assert (path_of(4) in made.files.contents()) == (header_bytes == SEGMENT_HEADER_BYTES)
    assert recovered.last_number == 4, "its number is not used again"


@pytest.mark.parametrize("seed", range(20))
def test_any_part_of_a_header_is_a_torn_creation_also_where_it_tells_the_rest(seed: int) -> None:
    chance = random.Random(seed)
    made = half_made_segment(SEGMENT_HEADER_BYTES)
    whole = made.files.data(path_of(4))
    # What can be told from the rest: the magic, the version, the number, the directory's id.
    lost = {at for at in range(8) if chance.random() < 0.7} or {0}
    made.files.set_data(path_of(4), bytes(0 if n in lost else byte for n, byte in enumerate(whole)))
    recovered = recover(made.files)
    assert recovered.damages == []
    assert path_of(4) not in made.files.contents()
    assert recovered.last_number == 4, "its number is not used again"


def test_a_segment_without_header_that_holds_more_than_a_header_stays() -> None:
    made = half_made_segment(30)
    data = bytes(SEGMENT_HEADER_BYTES) + b"something"
    made.files.set_data(path_of(4), data)
    recovered = recover(made.files)
    assert found_damages(recovered.damages) == [(path_of(4), 0, None)]
    assert made.files.data(path_of(4)) == data


@pytest.mark.parametrize(
    "build",
    [a_tail_of_garbage, half_a_frame_at_the_end, half_a_frame_whose_payload_holds_a_whole_one],
)
def test_what_is_cut_is_kept_in_quarantine(build: Callable[[], Scene]) -> None:
    before = segments().files.data(path_of(3))
    made = build()
    tail = made.files.data(path_of(3))[len(before) :]
    recovered = recover(made.files)
    assert recovered.cut_bytes == len(tail)
    name = quarantine_name(3, len(before), len(tail))
    kept = made.files.contents(f"{PATH}/{QUARANTINE}")
    assert kept == {f"{PATH}/{QUARANTINE}/{name}": tail}
    data = made.files.data(path_of(3))
    assert data[: len(before)] == before
    assert len(data) == len(before) + FOOTER_BYTES


def test_a_tail_of_zeros_is_not_worth_keeping() -> None:
    made = a_tail_of_zeros()
    assert recover(made.files).cut_bytes == 4096
    assert made.files.contents(f"{PATH}/{QUARANTINE}") == {}


def test_a_full_disk_does_not_stop_the_cut() -> None:
    made = a_tail_of_garbage()
    made.files.free_bytes = 0
    recovered = recover(made.files)
    assert recovered.damages == []
    assert recovered.cut_bytes == 3000
    assert made.files.contents(f"{PATH}/{QUARANTINE}") == {}, "there was no room for it"
    assert frames_of(made.files, 3)[-1].frame.type == FrameType.FOOTER


def test_the_last_segment_is_cut_written_again_sealed_and_only_then_hinted() -> None:
    made = a_tail_of_garbage()
    recover(made.files)
    name = segment_name(3)
    calls = [str(call) for call in made.files.calls]
    start = calls.index(f"truncate {name}")
    assert calls[start : start + 5] == [
        f"truncate {name}",
        f"sync {name}",
        f"write_at {name}",  # what nothing proves to have been synced
        f"write_at {name}",  # the footer
        f"sync {name}",
    ]
    assert calls[start + 5] == f"create {hint_name(3)}.tmp"
    *_, footer = frames_of(made.files, 3)
    assert footer.frame.type == FrameType.FOOTER
    assert footer.end == len(made.files.data(path_of(3)))


def test_nothing_damaged_is_changed() -> None:
    for build in (
        a_damaged_payload_in_a_sealed_segment_without_hint,
        a_sealed_segment_without_its_end,
        a_sealed_segment_with_a_flipped_bit_in_its_header,
        a_sealed_segment_with_a_destroyed_header_without_hint,
        a_sealed_segment_with_a_destroyed_beginning_and_its_hint,
        a_sealed_last_segment_that_was_cut,
    ):
        made = build()
        before = {path: data for path, data in made.files.contents().items() if "seg" in path}
        damaged = made.damages[0][0]
        recover(made.files)
        assert made.files.data(damaged) == before[damaged]


def test_damage_in_front_of_a_torn_tail_is_reported_and_the_tail_is_cut() -> None:
    made = damaged_payload(3)
    before = made.files.data(path_of(3))
    made.files.set_data(path_of(3), before + b"torn")
    recovered = recover(made.files)
    assert found_damages(recovered.damages) == made.damages
    assert recovered.cut_bytes == 4
    assert made.files.data(path_of(3))[: len(before)] == before


def test_a_destroyed_header_of_a_frame_costs_that_frame_only() -> None:
    made = segments()
    # The only frame of its session, so nobody can tell whose it was.
    placed = next(f for f in frames_of(made.files, 3) if len(frames_for(made.files, f)) == 1)
    whole = recover(made.files.after_kill())
    destroy(made.files, 3, placed.offset, FRAME_HEADER_BYTES)
    recovered = recover(made.files)
    assert found_damages(recovered.damages) == [(path_of(3), placed.offset, None)]
    rows = [
        {row for s in range(1024) for row in r.index.rows_of_shard(s)} for r in (whole, recovered)
    ]
    gone = rows[0] - rows[1]
    assert {row.offset for row in gone if row.segment == 3} <= {placed.offset}


def frames_for(files: MemoryFiles, one: Placed) -> list[tuple[int, Placed]]:
    """Return the frames of one session in all segments, with their segments."""
    return [
        (number, placed)
        for number in (1, 2, 3)
        for placed in frames_of(files, number)
        if placed.frame.key == one.frame.key
    ]


def destroy(files: MemoryFiles, number: int, offset: int, size: int) -> None:
    data = bytearray(files.data(path_of(number)))
    data[offset : offset + size] = random.Random(7).randbytes(size)
    files.set_data(path_of(number), bytes(data))


def newest(made: Scene, kind: FrameType) -> tuple[int, Placed]:
    """Return the newest frame of a session in front of which it has another one."""
    for number in (1, 2, 3):
        for placed in frames_of(made.files, number):
            every = frames_for(made.files, placed)
            if len(every) > 1 and every[-1] == (number, placed) and placed.frame.type == kind:
                return number, placed
    raise AssertionError("there is none")


@pytest.mark.parametrize("kind", [FrameType.PUT, FrameType.DELETE])
@pytest.mark.parametrize(("start", "size"), [(9, 1), (0, FRAME_HEADER_BYTES)], ids=["bit", "all"])
async def test_a_destroyed_header_does_not_bring_an_older_version_back(
    kind: FrameType, start: int, size: int
) -> None:
    made = segments()
    number, placed = newest(made, kind)
    sid = placed.frame.key.decode()
    destroy(made.files, number, placed.offset + start, size)
    if number < 3:
        made.files.delete(hint_of(number))
    made.loses({sid})
    made.damages = [(path_of(number), placed.offset, sid)]
    made.unreadable = {sid: (path_of(number), placed.offset)}
    made.is_exact = size == 1  # a listing reads the ids, and passes over what it cannot read
    files = await check(made, made.files)
    await check(made, files)


async def test_a_session_with_a_version_behind_a_destroyed_header_is_as_it_was() -> None:
    made = segments()
    number, placed = next(
        (number, placed)
        for number in (1, 2)
        for placed in frames_of(made.files, number)
        if placed.frame.type == FrameType.PUT
        and len({f.frame.sequence for _, f in frames_for(made.files, placed)}) > 1
        and frames_for(made.files, placed)[0] == (number, placed)
    )
    destroy(made.files, number, placed.offset, FRAME_HEADER_BYTES)
    made.files.delete(hint_of(number))
    made.damages = [(path_of(number), placed.offset, None)]
    await check(made, made.files)


# Hints


def without_hints(files: MemoryFiles) -> MemoryFiles:
    files = files.after_kill()
    for path in files.contents():
        if path.endswith(".hint"):
            files.delete(path)
    return files


@pytest.mark.parametrize("closed", [False, True])
def test_hints_that_are_there_damaged_stale_or_absent_give_the_same_index(closed: bool) -> None:
    made = segments(closed=closed)
    if closed:
        made.files.delete(f"{PATH}/{INDEX_SNAPSHOT}")
    expected = recover(without_hints(made.files))
    assert all_rows_equal(recover(made.files.after_kill()), expected)
    for bit in (5, 8 * 50, 8 * 100, 8 * 300 + 3):
        damaged = made.files.after_kill()
        damaged.flip(hint_of(1), bit)
        assert all_rows_equal(recover(damaged), expected)
    for size in (0, 10, 200):
        cut = made.files.after_kill()
        cut.set_data(hint_of(2), cut.data(hint_of(2))[:size])
        assert all_rows_equal(recover(cut), expected)
    swapped = made.files.after_kill()
    swapped.set_data(hint_of(1), made.files.data(hint_of(2)))
    assert all_rows_equal(recover(swapped), expected)


def test_a_hint_is_used_instead_of_reading_the_segment() -> None:
    made = segments()
    read: list[str] = []

    def watch(_: MemoryFiles, call: Any) -> None:
        if call.operation == "read_at" and call.size > SEGMENT_HEADER_BYTES:
            read.append(call.path)

    made.files.faults.append(watch)
    recover(made.files)
    assert {path for path in read if path.endswith(".seg")} == {path_of(3)}


def test_a_hint_of_a_segment_with_another_salt_is_only_believed_to_say_what_was_there() -> None:
    made = segments()
    data = made.files.data(path_of(1))
    header = header_of(made.files, 1)
    stale = made.files.data(hint_of(1))
    # Another segment: same number, same length, another salt, nothing in it.
    empty = (
        encode_segment_header(header._replace(salt=b"another salt")) + data[SEGMENT_HEADER_BYTES:]
    )
    made.files.set_data(path_of(1), empty)
    recovered = recover(made.files)
    assert made.files.data(hint_of(1)) == stale
    assert {damage.path for damage in recovered.damages} == {path_of(1)}
    assert recovered.segments[1].damaged, "so reads of what the hint names raise"


def test_absent_hints_are_written_again() -> None:
    made = segments()
    hints = [hint_of(number) for number in (1, 2)]
    files = without_hints(made.files)
    recover(files)
    for hint in (*hints, hint_of(3)):
        assert hint in files.contents()
    read_again = recover(files)
    assert all_rows_equal(read_again, recover(made.files))


# Snapshots


def test_the_snapshot_of_a_clean_close_is_used_once() -> None:
    made = segments(closed=True)
    scanned = made.files.after_kill()
    scanned.delete(f"{PATH}/{INDEX_SNAPSHOT}")
    first = recover(made.files)
    assert first.clean
    assert f"{PATH}/{INDEX_SNAPSHOT}" not in made.files.contents()
    second = recover(made.files)
    assert not second.clean
    assert second.last_sequence == first.last_sequence == recover(scanned).last_sequence
    assert second.segments.keys() == first.segments.keys()
    for number, segment in first.segments.items():
        assert segment.live_bytes == second.segments[number].live_bytes


def replaced_by_a_longer_one(files: MemoryFiles) -> None:
    files.set_data(path_of(2), files.data(path_of(2)) + b"\0")


def replaced_by_another(files: MemoryFiles) -> None:
    header = header_of(files, 2)._replace(salt=b"another salt")
    rest = files.data(path_of(2))[SEGMENT_HEADER_BYTES:]
    files.set_data(path_of(2), encode_segment_header(header) + rest)


def removed(files: MemoryFiles) -> None:
    files.delete(path_of(2))


def added(files: MemoryFiles) -> None:
    add_merged(files, 4)


def snapshot_damaged(files: MemoryFiles) -> None:
    files.flip(f"{PATH}/{INDEX_SNAPSHOT}", 8 * 2000)


def snapshot_cut(files: MemoryFiles) -> None:
    path = f"{PATH}/{INDEX_SNAPSHOT}"
    files.set_data(path, files.data(path)[:-1])


@pytest.mark.parametrize(
    "change",
    [
        replaced_by_a_longer_one,
        replaced_by_another,
        removed,
        added,
        snapshot_damaged,
        snapshot_cut,
    ],
)
def test_a_snapshot_is_ignored_when_anything_is_not_as_it_was(
    change: Callable[[MemoryFiles], None],
) -> None:
    made = segments(closed=True)
    change(made.files)
    assert not recover(made.files).clean


# The renewals that nobody recorded


async def deadline_after(*, close: bool, renew: bool = True, ttl_seconds: float = 800.0) -> float:
    """Return how long a session lives on after an opening, at the moment of its creation."""
    files = MemoryFiles()
    clock = ManualClock()
    async with opened(files, clock=clock) as state:
        await state.create_session(session_id="s", ttl_seconds=ttl_seconds, auto_renew=renew)
        if not close:
            await abandon(state)
    async with opened(files.after_kill(), clock=clock) as state:
        row = state._disk.index.get(state._disk.fingerprint(b"s"))
        assert row is not None
        await abandon(state)
        return row.deadline - clock.wall()


def test_a_snapshot_that_was_not_used_does_not_turn_a_later_crash_into_a_clean_close() -> None:
    made = segments(closed=True)
    made.files.delete(hint_of(1))
    assert not recover(made.files).clean
    assert hint_of(1) in made.files.contents(), "everything is as the snapshot says again"
    assert not recover(made.files.after_kill()).clean


async def test_after_a_crash_a_renewing_session_is_granted_an_eighth_of_its_ttl() -> None:
    assert await deadline_after(close=False) == pytest.approx(900.0)


async def test_after_a_clean_close_nothing_is_granted() -> None:
    assert await deadline_after(close=True) == pytest.approx(800.0)


async def test_a_session_that_accesses_do_not_renew_is_granted_nothing() -> None:
    assert await deadline_after(close=False, renew=False) == pytest.approx(800.0)


async def test_a_session_that_never_expires_still_never_does() -> None:
    assert await deadline_after(close=False, ttl_seconds=0) == float("inf")


async def test_a_crash_right_after_a_clean_opening_is_a_crash() -> None:
    files = MemoryFiles()
    clock = ManualClock()
    async with opened(files, clock=clock) as state:
        await state.create_session(session_id="s", ttl_seconds=800)
    files = files.after_kill()
    async with opened(files, clock=clock) as state:
        clock.advance(49)
        assert await state.get_session("s") is not None  # renewed, and too little to be recorded
        await abandon(state)
    clock.advance(799)
    async with opened(files.after_kill(), clock=clock) as state:
        assert await state.get_session("s") is not None


async def test_an_unrecorded_renewal_is_covered_by_what_a_crash_grants() -> None:
    chance = random.Random(8)
    for _ in range(20):
        files = MemoryFiles()
        clock = ManualClock()
        async with opened(files, clock=clock) as state:
            await state.create_session(session_id="s", ttl_seconds=1600)
            for _ in range(chance.randrange(1, 12)):
                clock.advance(chance.random() * 150)
                assert await state.get_session("s") is not None
                await state._residency.record_renewals()
            await state.flush()
            await abandon(state)
        clock.advance(1599)
        async with opened(files.after_kill(), clock=clock) as state:
            assert await state.has_session("s")
            await abandon(state)


def test_a_cut_frame_and_a_damaged_one_are_told_apart_by_the_scan() -> None:
    files = segments().files
    data = files.data(path_of(3))
    salt = header_of(files, 3).salt_checksum
    last = frames_of(files, 3)[-1]
    cut = scan(data[: last.offset + FRAME_HEADER_BYTES // 2], salt)
    assert isinstance(cut[-1][1], Torn)
    damaged = bytearray(data)
    damaged[last.end - 1] ^= 1
    assert isinstance(scan(damaged, salt)[-1][1], Corrupt)


def test_log_and_merged_segments_are_told_apart_by_their_kind() -> None:
    files = segments().files
    add_merged(files, 4)
    kinds = [header_of(files, number).kind for number in (1, 2, 3, 4)]
    assert kinds == [SegmentKind.LOG] * 3 + [SegmentKind.MERGED]
