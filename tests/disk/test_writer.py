from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import pytest

from persistence import ManualClock, StateManager
from persistence.disk.directory import write_manifest
from persistence.disk.filenames import hint_name, segment_name
from persistence.disk.files import read_all, replace_file, write_exactly
from persistence.disk.format import (
    FOOTER_BYTES,
    FOOTER_PAYLOAD,
    FRAME_OVERHEAD_BYTES,
    INDEX_ROW,
    SEGMENT_HEADER_BYTES,
    Frame,
    FrameType,
    decode_segment_header,
)
from persistence.disk.manifest import Manifest
from persistence.disk.segments import Segment
from persistence.disk.writer import LogWriter
from persistence.errors import (
    DirectoryNotUsable,
    DiskFull,
    PersistenceError,
    WriteOutcomeUnknown,
)
from tests.disk.history import Placed, recover, scan
from tests.disk.memoryfiles import MUTATING, Call, MemoryFiles, fail, kill_at, short_writes
from tests.disk.workload import Workload
from tests.support import PATH, Sampled, abandon, config, everything, opened

SEGMENT_BYTES: Final = 64 * 1024
NEVER: Final = float("inf")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


# The writer alone


@dataclass
class OneWrite:
    """A frame on its way into the log."""

    record: bytes | None
    key: bytes = b"key"
    changed: dict[str, bytes] | None = None
    kind: int = int(FrameType.PUT)
    fingerprint: bytes = bytes(16)
    ids: bytes = bytes(48)
    accessed: float = 1.0
    deadline: float = NEVER
    cap: float = NEVER
    user: int = 0
    row: bytes = b""
    segment: int = 0
    length: int = 0


def put_of(payload: bytes) -> OneWrite:
    """Return a frame with this payload: a record's two ids are in the header."""
    return OneWrite(bytes(32) + payload)


@dataclass
class Log:
    """A writer on a disk of its own, with the payloads that it has acknowledged."""

    files: MemoryFiles = field(default_factory=MemoryFiles)
    segment_bytes: int = SEGMENT_BYTES
    written: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.files.make_directory(PATH)
        self.writer = LogWriter(
            self.files,
            PATH,
            directory_id=bytes(16),
            segment_bytes=self.segment_bytes,
            compression=False,
            next_number=itertools.count(1).__next__,
            last_sequence=100,
            skew=lambda: 0.0,
        )

    def begin(self, writes: Sequence[OneWrite]) -> bytes:
        """Encode a batch for the active segment, as the commit queue does."""
        if self.writer.active is None:
            self.writer.create()
        self.writer.begin()
        return self.writer.encode(writes)

    def append(self, *payloads: bytes, sync: bool = True) -> None:
        """Append a batch; what is acknowledged is noted."""
        chunk = self.begin([put_of(payload) for payload in payloads])
        half = len(chunk) // 2
        self.writer.append([chunk[:half], chunk[half:]], len(payloads), sync=sync)
        self.written += payloads

    def frames(self, number: int = 1) -> list[Placed]:
        """Return what a scan finds in a segment; nothing in it may be anything but a frame."""
        data = self.files.data(f"{PATH}/{segment_name(number)}")
        header = decode_segment_header(data)
        assert header is not None
        found = scan(data, header.salt_checksum)
        assert all(isinstance(item, Frame) for _, item in found), found
        return [Placed(offset, item) for offset, item in found if isinstance(item, Frame)]

    def payloads(self, number: int = 1) -> list[bytes]:
        """Return the payloads of the puts in a segment."""
        frames = self.frames(number)
        return [placed.frame.payload for placed in frames if placed.frame.type == FrameType.PUT]

    def count(self, operation: str) -> int:
        """Return how many calls of a kind there were, also in vain."""
        return self.seen.count(operation)

    @property
    def seen(self) -> list[str]:
        """The names of all calls since `watch`."""
        return self._seen

    def watch(self) -> None:
        """Count all calls from now on, those that fail included."""
        self._seen: list[str] = []

        def note(_: MemoryFiles, call: Call) -> None:
            self._seen.append(call.operation)

        self.files.faults.insert(0, note)


def test_what_is_appended_is_what_a_scan_finds() -> None:
    log = Log()
    log.append(b"one", b"two" * 100)
    log.append(b"three")
    assert log.payloads() == [b"one", b"two" * 100, b"three"]
    assert [placed.frame.sequence for placed in log.frames()] == [101, 102, 103]
    assert log.writer.active is not None
    assert log.writer.active.end == log.frames()[-1].end


def test_a_row_says_where_its_frame_is() -> None:
    log = Log()
    log.append(b"before")
    writes = [put_of(b"one"), OneWrite(None, kind=int(FrameType.DELETE)), put_of(b"three")]
    log.writer.append([log.begin(writes)], 3, sync=True)
    *_, one, two, three = log.frames()
    for write, placed in zip(writes, (one, two, three), strict=True):
        *_, segment, offset, length, _ = INDEX_ROW.unpack(write.row)
        assert (segment, offset) == (1, placed.offset)
        assert write.length == placed.frame.length
        assert length == (placed.frame.length if placed.frame.type == FrameType.PUT else 0)


@pytest.mark.parametrize("most", [1, 7, 100, 5000])
def test_short_writes_are_continued(most: int) -> None:
    log = Log()
    log.files.faults.append(short_writes(most))
    for number in range(5):
        log.append(b"x" * 100 * number, b"y")
    assert log.payloads() == log.written


def test_an_interrupted_write_is_taken_up_again() -> None:
    log = Log()
    log.files.faults += [fail(errno.EINTR, "write_at", nth=nth, times=3) for nth in (1, 9)]
    log.files.faults.append(short_writes(50))
    log.append(b"x" * 300, b"y")
    log.append(b"z")
    assert log.payloads() == log.written


def test_a_disk_that_takes_nothing_without_an_error_is_full() -> None:
    log = Log()
    log.append(b"good")
    log.files.faults.append(short_writes(0))
    with pytest.raises(DiskFull):
        log.append(b"bad")


@pytest.mark.parametrize("room", [0, 1, 50, 150, 300, 600])
@pytest.mark.parametrize("most", [None, 64])
def test_a_batch_that_does_not_fit_leaves_nothing_and_writing_goes_on_when_there_is_space(
    room: int, most: int | None
) -> None:
    log = Log()
    if most is not None:
        log.files.faults.append(short_writes(most))
    log.append(b"good")
    end = log.writer.active.end if log.writer.active else 0
    log.files.free_bytes = room
    for _ in range(3):
        with pytest.raises(DiskFull, match="free some space"):
            log.append(b"x" * 300, b"y" * 300)
        assert len(log.files.data(f"{PATH}/{segment_name(1)}")) == end
        assert log.files.free_bytes == room
    log.files.free_bytes = None
    log.append(b"later")
    assert log.payloads() == [b"good", b"later"]
    assert [placed.frame.sequence for placed in log.frames()] == [101, 108], "never used twice"


def test_rows_of_a_failed_batch_do_not_get_into_the_hint() -> None:
    log = Log()
    log.append(b"good")
    log.files.faults.append(fail(errno.ENOSPC, "write_at"))
    with pytest.raises(DiskFull):
        log.append(b"bad")
    sealed = log.writer.seal()
    assert sealed is not None
    [row] = INDEX_ROW.iter_unpack(sealed.rows or b"")
    assert row[1] == 101


def test_a_write_error_other_than_a_full_disk_ends_the_writing() -> None:
    log = Log()
    log.append(b"good")
    log.files.faults.append(fail(errno.EIO, "write_at"))
    with pytest.raises(WriteOutcomeUnknown):
        log.append(b"bad")
    assert log.payloads() == [b"good"], "what could be cut back is cut back"
    assert_poisoned(log)


def test_a_full_disk_that_cannot_be_cut_back_ends_the_writing() -> None:
    log = Log()
    log.append(b"good")
    log.files.free_bytes = 50
    log.files.faults.append(fail(errno.EIO, "truncate"))
    with pytest.raises(WriteOutcomeUnknown):
        log.append(b"bad" * 100)
    assert_poisoned(log)


def assert_poisoned(log: Log) -> None:
    """No call of the writer touches the disk any more."""
    log.watch()
    assert log.writer.poisoned is not None
    for call in (
        lambda: log.writer.append([b"x"], 1, sync=True),
        log.writer.sync,
        log.writer.seal,
        log.writer.create,
        log.writer.check_usable,
    ):
        with pytest.raises(WriteOutcomeUnknown, match="open the directory again"):
            call()
    assert log.seen == []


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR, errno.EROFS]
)
def test_a_sync_that_failed_is_never_tried_again_on_that_file(number: int) -> None:
    log = Log()
    log.append(b"good")
    end = log.writer.active.end if log.writer.active else 0
    log.watch()
    log.files.faults.append(fail(number, "sync_data"))  # the next one would succeed
    with pytest.raises(WriteOutcomeUnknown, match="may or may not be durable"):
        log.append(b"bad")
    assert log.count("sync_data") == 1
    assert log.writer.active is not None
    assert log.writer.active.end == end
    assert log.writer.durable_sequence == 101
    assert_poisoned(log)
    log.writer.close()
    assert log.count("sync_data") + log.count("sync") == 0


def test_a_sync_that_failed_later_is_never_tried_again_either() -> None:
    log = Log()
    log.append(b"written", sync=False)
    log.watch()
    log.files.faults.append(fail(errno.EIO, "sync_data"))
    with pytest.raises(WriteOutcomeUnknown):
        log.writer.sync()
    assert log.count("sync_data") == 1
    assert_poisoned(log)


def test_frames_carry_what_was_durable_when_they_were_written() -> None:
    log = Log()
    log.append(b"a", b"b")
    log.append(b"c")
    log.append(b"d", sync=False)
    log.append(b"e", sync=False)
    log.writer.sync()
    log.append(b"f", sync=False)
    durable = [placed.frame.durable_sequence for placed in log.frames()]
    assert durable == [100, 100, 102, 103, 103, 105]


def beside(log: Log, operation: str, act: Callable[[], None]) -> None:
    """Let `act` happen while the next call of this kind is under way: before it does anything."""

    def gate(call: Call) -> None:
        if call.operation == operation:
            log.files.gates.remove(gate)
            act()

    log.files.gates.append(gate)


def test_a_sync_counts_only_for_what_was_appended_before_it_began() -> None:
    log = Log()
    log.append(b"before", sync=False)
    beside(log, "sync_data", lambda: log.append(b"meanwhile", sync=False))
    log.writer.sync()
    assert log.payloads() == [b"before", b"meanwhile"]
    assert log.writer.durable_sequence == 101
    assert not log.writer.is_synced
    log.append(b"behind it", sync=False)
    assert [placed.frame.durable_sequence for placed in log.frames()] == [100, 100, 101]
    log.writer.sync()
    assert log.writer.durable_sequence == 103
    assert log.writer.is_synced


def test_what_is_written_beside_a_sync_that_fails_is_not_acknowledged() -> None:
    log = Log()
    log.append(b"before", sync=False)
    assert log.writer.active is not None
    end = log.writer.active.end
    log.files.faults.append(fail(errno.EIO, "sync_data"))

    def fail_the_sync() -> None:
        with pytest.raises(WriteOutcomeUnknown):
            log.writer.sync()

    beside(log, "write_at", fail_the_sync)
    with pytest.raises(WriteOutcomeUnknown, match="open the directory again"):
        log.append(b"meanwhile", sync=False)
    assert log.writer.active.end == end
    assert log.writer.durable_sequence == 100
    log.watch()
    assert_poisoned(log)


def test_the_log_has_one_sync_at_a_time_and_is_closed_in_none() -> None:
    log = Log()
    held = []

    def note(_: MemoryFiles, call: Call) -> None:
        if call.operation in {"sync_data", "close"} and call.path.endswith(segment_name(1)):
            held.append((call.operation, log.writer._one_sync.locked()))

    log.files.faults.append(note)
    log.append(b"a")
    log.append(b"b", sync=False)
    log.writer.sync()
    log.append(b"c", sync=False)
    log.writer.seal()
    assert held == [("sync_data", True)] * 3 + [("close", True)]


class WaitsInVain:
    """In the place of the lock: while somebody waits for it, the sync that holds it fails."""

    def __init__(self, writer: LogWriter) -> None:
        self._writer = writer

    def __enter__(self) -> None:
        self._writer.poisoned = "the sync that was under way"

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("call", ["append", "sync", "seal"])
def test_whoever_waits_for_a_sync_that_fails_does_not_sync(call: str) -> None:
    """The kernel tells of a failure once: the next sync of the file would pass for a good one."""
    log = Log()
    log.append(b"in doubt", sync=False)
    log.watch()
    log.writer._one_sync = WaitsInVain(log.writer)  # type: ignore[assignment]
    calls = {"append": lambda: log.append(b"new"), "sync": log.writer.sync, "seal": log.writer.seal}
    with pytest.raises(WriteOutcomeUnknown, match="the sync that was under way"):
        calls[call]()
    assert log.count("sync_data") == 0
    assert log.writer.durable_sequence == 100
    assert log.writer.active is not None
    assert not log.writer.active.segment.sealed


def test_a_sync_that_comes_behind_the_sealing_leaves_the_file_alone() -> None:
    log = Log()
    log.append(b"a", sync=False)
    beside(log, "write_at", log.writer.sync)  # the footer's
    log.writer.seal()
    log.watch()
    log.writer.sync()
    assert log.seen == []
    log.writer.create()
    log.watch()
    log.writer.sync()
    assert log.seen == []


def test_a_sync_without_anything_new_asks_nothing_of_the_disk() -> None:
    log = Log()
    log.writer.sync()
    log.append(b"a")
    log.watch()
    log.writer.sync()
    assert log.seen == []


def test_whoever_sees_that_a_segment_is_sealed_sees_its_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = Log()
    log.append(b"a")
    seen: list[bool] = []

    def set_and_look(segment: Segment, name: str, value: object) -> None:
        object.__setattr__(segment, name, value)
        if segment.sealed:
            seen.append(segment.rows is not None)

    monkeypatch.setattr(Segment, "__setattr__", set_and_look)
    log.writer.seal()
    assert seen == [True]


def test_a_footer_counts_the_frames_and_ends_the_segment() -> None:
    log = Log()
    log.append(b"a", b"b")
    log.append(b"c", sync=False)
    sealed = log.writer.seal()
    assert sealed is not None
    assert sealed.sealed
    *_, footer = log.frames()
    assert footer.frame.type == FrameType.FOOTER
    assert FOOTER_PAYLOAD.unpack(footer.frame.payload) == (3, 101, 103)
    assert footer.frame.durable_sequence == 102, "the last one was not synced before"
    assert log.writer.durable_sequence == 103
    assert log.files.open_files == []
    assert log.writer.seal() is None
    log.append(b"d")
    assert log.payloads(2) == [b"d"]


def test_a_footer_that_does_not_fit_leaves_the_segment_open() -> None:
    log = Log()
    log.append(b"a")
    log.files.free_bytes = FOOTER_BYTES - 1
    with pytest.raises(DiskFull):
        log.writer.seal()
    assert log.writer.active is not None
    assert not log.writer.active.segment.sealed
    log.files.free_bytes = None
    log.append(b"b")
    assert log.writer.seal() is not None
    assert log.payloads() == [b"a", b"b"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("operation", ["create", "write_at", "sync", "sync_directory"])
@pytest.mark.parametrize("cleans_up", [True, False])
def test_a_segment_that_cannot_be_created_leaves_nothing_behind(
    operation: str, number: int, cleans_up: bool
) -> None:
    log = Log()
    log.append(b"a")
    log.writer.seal()
    log.files.faults.append(fail(number, operation))
    if not cleans_up:
        log.files.faults.append(fail(errno.EIO, "remove"))
    full = number in (errno.ENOSPC, errno.EDQUOT)
    kind: type[PersistenceError] = DiskFull if full else WriteOutcomeUnknown
    if operation in ("create", "sync_directory") and number == errno.EMFILE:
        kind = DirectoryNotUsable  # nothing happened, and that is certain
    with pytest.raises(kind):
        log.writer.create()
    assert log.writer.poisoned is None
    assert log.writer.active is None
    assert log.files.open_files == []
    if cleans_up or operation == "create":
        assert list(log.files.contents()) == [f"{PATH}/{segment_name(1)}"]
    segment = log.writer.create()
    assert segment.number == 3, "a number is not used twice"


def test_a_frame_larger_than_a_segment_gets_one_of_its_own() -> None:
    log = Log(segment_bytes=1000)
    log.append(b"a")
    assert not log.writer.has_room(2000)
    log.writer.seal()
    log.writer.create()
    log.writer.begin()
    assert log.writer.has_room(2000), "nothing else is in it"
    log.append(b"x" * 2000)
    log.writer.begin()
    assert not log.writer.has_room(1)


# Replacing a file


def test_a_file_is_replaced_in_the_order_that_makes_it_atomic_and_durable() -> None:
    files = MemoryFiles()
    files.set_data(f"{PATH}/name", b"old")
    files.set_data(f"{PATH}/name.tmp", b"left behind by a crash")
    files.calls.clear()
    replace_file(files, PATH, "name", "name.tmp", b"new")
    assert [str(call) for call in files.calls] == [
        "remove name.tmp",
        "create name.tmp",
        "write_at name.tmp",
        "sync name.tmp",
        "rename name.tmp name",
        "sync_directory state",
    ]
    assert files.contents() == {f"{PATH}/name": b"new"}
    assert files.after_power_loss().contents() == {f"{PATH}/name": b"new"}


def test_a_crash_while_a_file_is_replaced_leaves_the_old_or_the_new_one() -> None:
    for nth in range(1, 8):
        files = MemoryFiles()
        files.set_data(f"{PATH}/name", b"old")
        files.faults.append(kill_at(nth, 0.5))
        with pytest.raises(Exception, match=r"\w+ name|sync_directory|^$"):
            replace_file(files, PATH, "name", "name.tmp", b"new" * 100, b"new" * 400)
        for seed in range(20):
            left = files.after_power_loss(random.Random(seed))
            assert left.data(f"{PATH}/name") in (b"old", b"new" * 500)


@pytest.mark.parametrize("operation", ["create", "write_at", "sync", "rename", "sync_directory"])
def test_a_file_that_cannot_be_replaced_stays_whole(operation: str) -> None:
    files = MemoryFiles()
    files.set_data(f"{PATH}/name", b"old")
    files.faults.append(fail(errno.EIO, operation))
    with pytest.raises(OSError, match="Input/output error"):
        replace_file(files, PATH, "name", "name.tmp", b"n", bytearray(b"ew"))
    expected = b"new" if operation == "sync_directory" else b"old"
    assert files.contents() == {f"{PATH}/name": expected}
    assert files.open_files == []


def test_reading_goes_on_after_short_reads() -> None:
    files = MemoryFiles()
    files.set_data("/file", bytes(range(256)) * 40)

    def short_reads(_: MemoryFiles, call: Call) -> int | None:
        return 100 if call.operation == "read_at" else None

    files.faults.append(short_reads)
    assert read_all(files, "/file") == bytes(range(256)) * 40


def test_writing_exactly_writes_at_the_right_places() -> None:
    files = MemoryFiles()
    fd = files.create("/file")
    files.faults.append(short_writes(3))
    write_exactly(files, fd, b"0123456789", 5)
    assert files.data("/file") == bytes(5) + b"0123456789"


# Through a manager


def names(calls: Sequence[Call]) -> list[str]:
    return [str(call) for call in calls]


async def test_a_rotation_seals_syncs_creates_and_syncs_before_it_acknowledges() -> None:
    files = MemoryFiles()
    configuration = config(segment_bytes=SEGMENT_BYTES, compression="none")
    async with opened(files, configuration) as state:
        await state.create_session(session_id="a", data={"x": bytes(60_000)})
        files.calls.clear()
        acknowledged_after: list[str] = []
        await state.create_session(session_id="b", data={"x": bytes(60_000)})
        acknowledged_after = names(files.calls)
        of_rotation = [
            name
            for name in acknowledged_after
            if "hint" not in name and "MANIFEST" not in name and "INDEX" not in name
        ]
        # Hint and manifest follow in the background, and may sync the directory meanwhile.
        expected = [
            "write_at 0000000001.seg",
            "sync_data 0000000001.seg",
            "create 0000000002.seg",
            "write_at 0000000002.seg",
            "sync 0000000002.seg",
            "sync_directory state",
            "write_at 0000000002.seg",
            "sync_data 0000000002.seg",
        ]
        remaining = iter(of_rotation)
        assert all(step in remaining for step in expected), of_rotation
        sizes = [call.size for call in files.calls if str(call) == "write_at 0000000001.seg"]
        assert sizes == [FOOTER_BYTES], "nothing goes into a sealed segment"
        header = [call.size for call in files.calls if str(call) == "write_at 0000000002.seg"]
        assert header[0] == SEGMENT_HEADER_BYTES


async def test_after_a_rotation_come_the_hint_and_then_the_manifest() -> None:
    files = MemoryFiles()
    configuration = config(segment_bytes=SEGMENT_BYTES, compression="none")
    async with opened(files, configuration) as state:
        await state.create_session(session_id="a", data={"x": bytes(60_000)})
        files.calls.clear()
        await state.create_session(session_id="b", data={"x": bytes(60_000)})
        while state._disk._background:
            await asyncio.gather(*state._disk._background)
        assert [name for name in names(files.calls) if "hint" in name or "MANIFEST" in name] == [
            f"create {hint_name(1)}.tmp",
            f"write_at {hint_name(1)}.tmp",  # its header
            f"write_at {hint_name(1)}.tmp",  # its rows
            f"sync {hint_name(1)}.tmp",
            f"rename {hint_name(1)}.tmp {hint_name(1)}",
            "create MANIFEST.tmp",
            "write_at MANIFEST.tmp",
            "sync MANIFEST.tmp",
            "rename MANIFEST.tmp MANIFEST",
            "create MANIFEST.bak.tmp",
            "write_at MANIFEST.bak.tmp",
            "sync MANIFEST.bak.tmp",
            "rename MANIFEST.bak.tmp MANIFEST.bak",
        ]


async def test_a_manifest_written_while_a_segment_is_being_made_does_not_declare_it_dead() -> None:
    files = MemoryFiles()
    configuration = config(segment_bytes=SEGMENT_BYTES, compression="none")
    async with opened(files, configuration) as state:
        await state.create_session(session_id="a", data={"x": bytes(60_000)})
        so_far = len(files.calls)
        manifest_is_written = threading.Event()

        def hold(call: Call) -> None:
            # The second segment is half made until the end of the first is in the manifest.
            if str(call) == "sync 0000000002.seg":
                assert manifest_is_written.wait(20)
            elif "rename MANIFEST.tmp MANIFEST" in names(files.calls[so_far:]):
                manifest_is_written.set()

        files.gates.append(hold)
        await state.create_session(session_id="b", data={"x": bytes(60_000)})
        files.kill()
    async with opened(files.after_kill(), configuration) as state:
        assert (await everything(state)).keys() == {"a", "b"}


async def test_a_session_larger_than_a_segment_is_kept() -> None:
    files = MemoryFiles()
    configuration = config(segment_bytes=SEGMENT_BYTES, compression="none")
    data = {f"s{n}": {"x": random.Random(n).randbytes(n * 70_000)} for n in range(4)}
    async with opened(files, configuration) as state:
        for sid, value in data.items():
            await state.create_session(session_id=sid, data=value)
        assert await everything(state) == data
        await abandon(state)
    async with opened(files.after_kill(), configuration) as state:
        assert await everything(state) == data


async def test_after_a_failed_sync_nothing_is_written_and_reads_go_on() -> None:
    files = MemoryFiles()
    async with opened(files) as state:
        await state.create_session(session_id="s", data={"n": 1})
        await state.create_session(session_id="t", data={"n": 1})
        await state.spill_session("t")
        files.faults.append(fail(errno.EIO, "sync_data"))
        with pytest.raises(WriteOutcomeUnknown):
            await state.update_session_data("s", "n", 2)
        files.calls.clear()
        for again in (
            state.update_session_data("s", "n", 3),
            state.create_session(session_id="u"),
            state.terminate_session("s"),
            state.flush(),
        ):
            with pytest.raises(WriteOutcomeUnknown):
                await again
        assert await everything(state) == {"s": {"n": 1}, "t": {"n": 1}}
        disk = (await state.stats()).disk
        assert not disk.takes_writes
        assert segment_name(1) in disk.refusal
        await state.close()
        assert files.calls == [], "not even at the end"
    async with opened(files.after_kill()) as state:
        found = await everything(state)
        assert found["t"] == {"n": 1}
        assert found["s"] in ({"n": 1}, {"n": 2})
        await state.update_session_data("s", "n", 4)


async def test_every_update_of_a_batch_whose_sync_fails_fails() -> None:
    files = MemoryFiles()
    async with opened(files) as state:
        for number in range(10):
            await state.create_session(session_id=f"s{number}", data={"n": 0})
        files.faults.append(fail(errno.EIO, "sync_data"))
        outcomes = await asyncio.gather(
            *(state.update_session_data(f"s{number % 10}", "n", number) for number in range(50)),
            return_exceptions=True,
        )
        assert {type(outcome) for outcome in outcomes} == {WriteOutcomeUnknown}
        assert set(map(str, (await everything(state)).values())) == {"{'n': 0}"}


@pytest.mark.parametrize("fsync", ["interval", "never"])
async def test_a_failed_sync_fails_the_flush_in_the_other_modes(fsync: str) -> None:
    files = MemoryFiles()
    async with opened(files, config(fsync=fsync)) as state:
        await state.create_session(session_id="s", data={"n": 1})
        files.faults.append(fail(errno.EIO, "sync_data"))
        with pytest.raises(WriteOutcomeUnknown):
            await state.flush()
        with pytest.raises(WriteOutcomeUnknown):
            await state.update_session_data("s", "n", 2)
        assert await everything(state) == {"s": {"n": 1}}


async def test_a_full_disk_refuses_writes_only_and_they_go_on_when_there_is_space() -> None:
    files = MemoryFiles()
    data = {f"s{n}": {"n": n, "x": random.Random(n).randbytes(2000)} for n in range(20)}
    async with opened(files) as state:
        for sid, value in data.items():
            await state.create_session(session_id=sid, data=value)
        await state.spill_session("s1")
        files.free_bytes = 1000
        for sid in ("s0", "s1"):
            with pytest.raises(DiskFull):
                await state.update_session_data(sid, "x", random.Random(1).randbytes(2000))
        assert await everything(state) == data
        disk = (await state.stats()).disk
        assert not disk.takes_writes
        assert "no space left" in disk.refusal
        files.free_bytes = None
        await state.update_session_data("s0", "x", b"new")
        disk = (await state.stats()).disk
        assert (disk.takes_writes, disk.refusal) == (True, "")
        data["s0"]["x"] = b"new"
        assert await everything(state) == data
        await abandon(state)
    async with opened(files.after_kill()) as state:
        assert await everything(state) == data
        assert state._disk.damages == []


async def test_stats_tell_that_the_limit_is_reached_until_there_is_room_again() -> None:
    files = MemoryFiles()
    limit = 4 * SEGMENT_BYTES
    async with opened(files, config(segment_bytes=SEGMENT_BYTES, max_bytes=limit)) as state:
        created = []
        with suppress(DiskFull):
            for number in itertools.count():
                data = {"x": random.Random(number).randbytes(5000)}
                created.append(await state.create_session(data=data))
        disk = (await state.stats()).disk
        assert not disk.takes_writes
        assert f"disk.max_bytes is {limit}" in disk.refusal
        for session_id in created:
            await state.terminate_session(session_id)
        await state.compact()
        disk = (await state.stats()).disk
        assert (disk.takes_writes, disk.refusal) == (True, "")


async def test_a_failed_batch_right_before_a_close_is_in_no_hint() -> None:
    files = MemoryFiles()
    async with opened(files) as state:
        await state.create_session(session_id="s", data={"n": 1})
        files.faults.append(fail(errno.ENOSPC, "write_at", path=".seg"))
        with pytest.raises(DiskFull):
            await state.update_session_data("s", "n", 2)
    files = files.after_kill()
    files.delete(f"{PATH}/INDEX")
    async with opened(files) as state:
        assert await everything(state) == {"s": {"n": 1}}


# Crashes and faults at any call


async def run_until_it_dies(
    files: MemoryFiles, seed: int, steps: int, fsync: str = "always"
) -> Workload:
    """Run a workload on `files`; the faults that it meets are set already."""
    workload = Workload(seed)
    state = StateManager(
        config=config(segment_bytes=SEGMENT_BYTES, fsync=fsync), clock=ManualClock(), files=files
    )
    await state.open()
    await workload.run(state, steps)
    await abandon(state)
    return workload


async def assert_survived(files: MemoryFiles, workload: Workload) -> None:
    configuration = config(segment_bytes=SEGMENT_BYTES)
    async with opened(files, configuration) as state:
        assert state._disk.damages == []
        await workload.check(state)
        await abandon(state)


def again(workload: Workload) -> Workload:
    """Return a copy whose `check` changes nothing of the original."""
    copy = Workload(0)
    copy.values = dict(workload.values)
    copy.possible = {sid: list(values) for sid, values in workload.possible.items()}
    return copy


@pytest.mark.parametrize("seed", range(6))
async def test_a_kill_at_any_call_loses_nothing_that_was_acknowledged(
    seed: int, sampled: Sampled
) -> None:
    chance = random.Random(seed)
    for _ in sampled(range(12)):
        files = MemoryFiles()
        files.faults.append(kill_at(chance.randrange(30, 350), chance.choice([0.0, 0.3, 1.0])))
        workload = await run_until_it_dies(files, seed, 120)
        await assert_survived(files.after_kill(), workload)


@pytest.mark.parametrize("seed", range(6))
async def test_a_power_loss_at_any_call_loses_nothing_that_was_acknowledged(
    seed: int, sampled: Sampled
) -> None:
    chance = random.Random(seed)
    for _ in sampled(range(8)):
        files = MemoryFiles()
        files.faults.append(kill_at(chance.randrange(30, 350), chance.choice([0.0, 0.3, 1.0])))
        workload = await run_until_it_dies(files, seed, 120)
        for left in (None, *(random.Random(chance.random()) for _ in range(4))):
            await assert_survived(files.after_power_loss(left), again(workload))


@pytest.mark.parametrize("fsync", ["interval", "never"])
async def test_without_a_sync_a_kill_loses_nothing_either(fsync: str, sampled: Sampled) -> None:
    chance = random.Random(fsync)
    for seed in sampled(range(10)):
        files = MemoryFiles()
        files.faults.append(kill_at(chance.randrange(30, 200), 0.4))
        workload = await run_until_it_dies(files, seed, 120, fsync)
        await assert_survived(files.after_kill(), workload)


async def test_without_a_sync_a_power_loss_leaves_a_beginning_of_what_was_done(
    sampled: Sampled,
) -> None:
    for seed in sampled(range(25)):
        files = MemoryFiles()
        async with opened(files, config(fsync="never", segment_bytes=SEGMENT_BYTES)) as state:
            for number in range(40):
                await state.create_session(session_id=f"s{number}", data={"x": bytes(3000)})
                await state.update_session_data(f"s{number}", "n", number)
                if number == 15:
                    await state.flush()
            await abandon(state)
        left = files.after_power_loss(random.Random(seed))
        async with opened(left, config(segment_bytes=SEGMENT_BYTES)) as state:
            found = {int(sid[1:]): data for sid, data in (await everything(state)).items()}
            assert sorted(found) == list(range(len(found))), "a hole"
            assert len(found) > 15, "what was flushed is there"
            assert all(found[number].get("n") == number for number in sorted(found)[:-1])
            assert state._disk.damages == []
            await abandon(state)


ERRORS = [errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EROFS]


@pytest.mark.parametrize(
    ("number", "sticky"),
    [(number, sticky) for number in ERRORS for sticky in (False, True)] + [(errno.EINTR, False)],
    ids=lambda value: errno.errorcode[value] if value > 1 else ["once", "from then on"][value],
)
async def test_whichever_call_fails_nothing_that_was_acknowledged_is_lost(
    number: int, sticky: bool, sampled: Sampled
) -> None:
    chance = random.Random(f"{number} {sticky}")
    operations = MUTATING - {"make_directory", "open_lock"}
    for seed in sampled(range(25)):
        files = MemoryFiles()
        nth = chance.randrange(25, 250)
        files.faults.append(fail(number, operations, nth=nth, times=None if sticky else 1))
        workload = await run_until_it_dies(files, seed, 80)
        await assert_survived(files.after_kill(), workload)


def test_a_directory_written_by_a_writer_is_what_recovery_reads() -> None:
    log = Log()
    log.append(b"x" * FRAME_OVERHEAD_BYTES)
    write_manifest(log.files, PATH, Manifest(bytes(16), bytes(16)))
    recovered = recover(log.files)
    assert len(recovered.index) == 1
    assert recovered.last_sequence == 101
