"""The background task that compacts. What is copied is decided in `compaction`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from persistence.disk.caches import read_hint, write_hint
from persistence.disk.compaction import (
    Merge,
    Output,
    Source,
    abandon_output,
    add_frame,
    choose_inputs,
    create_output,
    fade_touches,
    finish_output,
    flush_output,
    lowest_outside,
)
from persistence.disk.filenames import hint_name, segment_name
from persistence.disk.files import NO_SPACE, Files, read_exactly
from persistence.disk.format import (
    FRAME_OVERHEAD_BYTES,
    INDEX_ROW,
    INDEX_ROW_BYTES,
    MAX_KEY_BYTES,
    ROW_LENGTH_BITS,
    frame_length,
    restamp,
)
from persistence.disk.index import Fingerprints, Index
from persistence.disk.patches import PlainRecords, Records, as_put
from persistence.disk.pressure import Pressure
from persistence.disk.reader import FrameReader
from persistence.disk.reserve import Reserve
from persistence.disk.sealed import RecordCodec
from persistence.disk.segments import OpenSegments, Pins, Segment
from persistence.disk.threads import Threads
from persistence.slices import Slices, short_rest

_log = logging.getLogger("persistence.compaction")

_CHUNK_BYTES: Final = 256 * 1024
_MAX_GAP_BYTES: Final = 16 * 1024  # dead bytes between two frames that are read together
_MARK_BYTES: Final = FRAME_OVERHEAD_BYTES + MAX_KEY_BYTES
_ROWS_PER_STEP: Final = 256
_THREAD_SEAL_BYTES: Final = 128 * 1024
_RESTS_UP_TO: Final = 0.25  # `Pressure.of_compaction` from which on it takes what it gets


class _Stopped(Exception):
    """The tier is closing: the merge under way is abandoned."""


class _Defect(Exception):
    """An input holds a damaged frame."""

    def __init__(self, segment: Segment, offset: int) -> None:
        self.segment = segment
        self.offset = offset


class _NoRows(Exception):
    """The hint of an input is gone: what is in the segment is known again after an opening."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment


@dataclass(slots=True)
class CompactionStats:
    """What compaction has done since opening."""

    merges: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    segments_dropped: int = 0
    tombstones_dropped: int = 0


@dataclass(slots=True)
class Surroundings:
    """What the compactor works on; owned by the disk tier.

    `publish` writes the manifest for (outputs, inputs): the moment of truth. `monotonic` and
    `skew` are the clock's. `damage` reports a defect. `frames_applied` counts the frames that the
    index has taken in. `pressure` tells how much dead space there is. `reserve` is space for a
    full disk. `codec` seals anew what is sealed with an old key. `shipped_sequence` says up to
    where tombstones have been shipped; `before_merging` is awaited whenever there may be something
    to merge.
    """

    files: Files
    directory: str
    directory_id: bytes
    threads: Threads
    index: Index
    fingerprints: Fingerprints
    segments: dict[int, Segment]
    open_segments: OpenSegments
    reader: FrameReader
    pins: Pins
    next_number: Callable[[], int]
    publish: Callable[[list[Segment], list[Segment]], Awaitable[None]]
    forget: Callable[[list[Segment]], Awaitable[None]]
    damage: Callable[[Segment, int, str], None]
    frames_applied: Callable[[], int]
    pressure: Pressure
    shipped_sequence: Callable[[], int]
    before_merging: Callable[[], Awaitable[None]]
    reserve: Reserve
    codec: RecordCodec | None
    monotonic: Callable[[], float]
    skew: Callable[[], float]


class Compactor:
    """Runs merges one at a time, woken by `wake`, until `stop`.

    Args:
        around: what it works on.
        segment_bytes: size of a segment.
        bytes_per_second: rate limit for reading; 0: none. The more dead space there is, the more
            of it is passed over.
    """

    def __init__(self, around: Surroundings, segment_bytes: int, bytes_per_second: int) -> None:
        self._around = around
        self._segment_bytes = segment_bytes
        self._bytes_per_second = bytes_per_second
        self._work = asyncio.Event()
        self._stopping = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._merging = asyncio.Lock()
        self._urgent = False
        self._awaited = 0  # by how many callers of `settle` and `paused`
        self._waiting: list[asyncio.Future[None]] = []
        self._frames_seen = 0
        self._task: asyncio.Task[None] | None = None
        self.stats = CompactionStats()

    def start(self) -> None:
        """Start the background task."""
        self._task = asyncio.create_task(self._run(), name="persistence-compaction")

    def wake(self, *, urgent: bool = False) -> None:
        """Look for something to merge; `urgent`: space has run out, ignore the rate limit."""
        if self._stopping.is_set():
            return
        self._urgent = self._urgent or urgent
        self._idle.clear()
        self._work.set()

    async def settle(self) -> None:
        """Wait until there is nothing left to merge."""
        self._awaited += 1
        try:
            await self._idle.wait()
        finally:
            self._awaited -= 1

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing to do, or can do nothing."""
        return self._idle.is_set()

    async def merged(self) -> bool:
        """Wait until the next merge has ended; False: there is none to wait for."""
        if self.is_idle:
            return False
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        await waiting
        return not self.is_idle

    def _tell_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for item in waiting:
            if not item.done():
                item.set_result(None)

    async def stop(self) -> None:
        """Abandon the merge under way and end the task."""
        self._stopping.set()
        self._work.set()
        self._around.pins.wake()
        if self._task is not None:
            await self._task
            self._task = None

    async def _run(self) -> None:
        while not self._stopping.is_set():
            await self._work.wait()
            self._work.clear()
            self._fade_touches()  # once, so that traffic does not keep the merging going
            try:
                await self._around.before_merging()
                while await self._merge_one():
                    self._tell_waiting()
            except _Stopped:
                break
            except OSError as error:
                if error.errno in NO_SPACE and await self._around.threads.read(
                    self._around.reserve.release
                ):
                    self._work.set()  # once more, with what there is now
                _log.warning(
                    "%s: compaction gave up for now: %s", self._around.directory, error.strerror
                )
            except Exception:  # noqa: BLE001 - logged; the next wake tries again
                _log.exception("%s: compaction failed", self._around.directory)
            self._urgent = False
            if not self._work.is_set():
                self._become_idle()
        self._become_idle()

    def _become_idle(self) -> None:
        self._idle.set()
        self._tell_waiting()

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Wait for the end of the merge under way; inside the block there is none."""
        self._awaited += 1
        try:
            await self._merging.acquire()
        finally:
            self._awaited -= 1
        try:
            yield
        finally:
            self._merging.release()

    @property
    def is_merging(self) -> bool:
        """Whether a merge is under way, or kept from it."""
        return self._merging.locked()

    async def _merge_one(self) -> bool:
        async with self._merging:
            return await self._merge_once()

    def _fade_touches(self) -> None:
        around = self._around
        frames = around.frames_applied()
        fade_touches(around.segments.values(), frames - self._frames_seen, len(around.index))
        self._frames_seen = frames

    async def _merge_once(self) -> bool:
        around = self._around
        room_bytes = await self._room_bytes()
        inputs = choose_inputs(
            around.segments.values(), self._segment_bytes, around.pins, room_bytes
        )
        if not inputs or self._stopping.is_set():
            return False
        outputs: list[Output] = []
        try:
            merge = await self._copy(inputs, outputs)
        except _Defect as defect:
            # The damaged segment stays as it is; the next choice leaves it out.
            around.damage(defect.segment, defect.offset, "damaged, found by compaction")
            await self._abandon(outputs)
            return True
        except _NoRows as lost:
            lost.segment.without_rows = True
            await self._abandon(outputs)
            # Whatever is wrong with it: the next opening makes a new one where there is none.
            hint = f"{around.directory}/{hint_name(lost.segment.number)}"
            _log.warning("%s: lost or damaged; its segment stays until the next opening", hint)
            await around.threads.read(around.files.remove, hint)
            return True
        except BaseException:
            await self._abandon(outputs)
            raise
        for output in outputs:
            output.segment.rows = output.rows  # until its hint is written
        await around.publish([item.segment for item in outputs], inputs)
        await self._move(outputs)
        await self._until_unpinned(inputs)
        await around.forget(inputs)
        await self._write_hints(outputs)
        self.stats.merges += 1
        self.stats.segments_dropped += len(inputs)
        self.stats.tombstones_dropped += merge.dropped_tombstones
        return True

    async def _until_unpinned(self, inputs: list[Segment]) -> None:
        """Wait until no checkpoint reads the inputs any more: their files stay until then.

        When the tier closes first, the next opening removes them.
        """
        while any(item.number in self._around.pins for item in inputs):
            if self._stopping.is_set():
                raise _Stopped
            await self._around.pins.change()

    async def _room_bytes(self) -> int | None:
        """Return how much a merge may write; None: there is no need to ask."""
        around = self._around
        if not around.reserve.is_spent:
            return None
        space = await around.threads.read(around.files.space, around.directory)
        if not space.free_inodes:
            return 0  # no output can be made: only what is dead as a whole can go
        return space.free_bytes // 2  # the rest is for tombstones, which free more

    async def _abandon(self, outputs: list[Output]) -> None:
        for output in outputs:
            await self._around.threads.read(
                abandon_output, self._around.files, self._around.directory, output
            )

    # --- copying ------------------------------------------------------------------------------

    async def _copy(self, inputs: list[Segment], outputs: list[Output]) -> Merge:
        """Copy what is live in `inputs`; `outputs` grows while it goes on."""
        around = self._around
        outside = lowest_outside(around.segments.values(), inputs)
        merge = Merge(around.index, outside, around.shipped_sequence())
        lowest = min(item.lowest_sequence for item in inputs)
        slices = Slices(around.monotonic, rest_seconds=self._rest_seconds)  # asked each time
        # The rows of a full segment take 5 MiB, so they are read twice rather than kept for all.
        for source in inputs:
            _, packed = await self._rows(source)
            for some in _in_steps(packed):
                merge.note_touches(INDEX_ROW.iter_unpack(some))
                await self._give_way(slices)
        for source in inputs:
            skew, packed = await self._rows(source)
            # Not all of a segment at once: the garbage collector goes over what is wanted.
            for some in _in_steps(packed):
                found = (merge.wanted(row, source.number) for row in INDEX_ROW.iter_unpack(some))
                wanted = [item for item in found if item is not None]
                await self._give_way(slices)
                await self._copy_frames(source, wanted, skew, merge, outputs, lowest, slices)
        if outputs:
            await self._finish(outputs[-1])
        for output in outputs:
            output.segment.kept_until = outside
        return merge

    async def _rows(self, source: Segment) -> tuple[float, memoryview]:
        """Return (skew, index rows) of an input, from its hint if they are not in memory."""
        around = self._around
        if source.rows is not None:
            return around.skew(), memoryview(source.rows)
        hint = await around.threads.read(
            read_hint, around.files, around.directory, around.directory_id, source
        )
        if hint is None:
            raise _NoRows(source)
        return hint

    async def _copy_frames(
        self,
        source: Segment,
        wanted: list[Source],
        skew: float,
        merge: Merge,
        outputs: list[Output],
        lowest: int,
        slices: Slices,
    ) -> None:
        """Copy some frames of one input, reading neighbours together."""
        away = skew - self._around.skew()  # from the hint's time base to this run's
        await self._copy_patched(source, wanted, away, merge, outputs, lowest, slices)
        for start, end, group in _groups([item for item in wanted if not item.is_patch]):
            data = await self._read(source, start, end - start)
            await self._pace(len(data))
            self.stats.bytes_read += len(data)
            for item in group:
                raw = _frame_at(data, item.offset - start, item.length)
                if raw is None:
                    raise _Defect(source, item.offset)
                output = await self._output_for(outputs, lowest, len(raw))
                resealed = await self._resealed(raw, source, output) if source.stale else None
                # Only now, behind the last await: the session may have moved on.
                if not merge.is_current(item, source.number):
                    continue
                stamped = resealed
                if not source.stale:
                    stamped = restamp(raw, source.salt_checksum, output.segment.salt_checksum)
                if stamped is None:
                    raise _Defect(source, item.offset)
                if away:
                    item = _shifted(item, away)  # noqa: PLW2901 - the same frame
                add_frame(output, item, stamped, source.number)
                await slices.give_way_if_due()

    async def _copy_patched(
        self,
        source: Segment,
        wanted: list[Source],
        away: float,
        merge: Merge,
        outputs: list[Output],
        lowest: int,
        slices: Slices,
    ) -> None:
        """Write the whole records of patched sessions, one at a time."""
        around = self._around
        records: Records = around.codec or PlainRecords()
        seal = None if around.codec is None else around.codec.seal
        for item in wanted:
            if not item.is_patch:
                continue
            nbytes = item.mark & ROW_LENGTH_BITS
            await self._pace(nbytes)
            self.stats.bytes_read += nbytes
            patched = await around.reader.patched(
                source.number, item.offset, source.salt_checksum, records
            )
            if isinstance(patched, str):
                raise _Defect(source, item.offset)
            output = await self._output_for(outputs, lowest, nbytes)
            salt_checksum = output.segment.salt_checksum
            # In a thread, because it is compressed, and sealed, anew.
            stamped = await around.threads.read(as_put, patched, salt_checksum, seal)
            if merge.is_current(item, source.number):
                whole = item._replace(mark=len(stamped))
                add_frame(output, _shifted(whole, away) if away else whole, stamped, source.number)
            await slices.give_way_if_due()

    async def _resealed(self, raw: bytes, source: Segment, output: Output) -> bytes | None:
        """Return a frame sealed with the newest key; None: it is damaged."""
        around = self._around
        assert around.codec is not None, "a segment is only stale in an encrypted directory"
        salts = (source.salt_checksum, output.segment.salt_checksum)
        if len(raw) < _THREAD_SEAL_BYTES:
            return around.codec.reseal(raw, *salts)
        return await around.threads.read(around.codec.reseal, raw, *salts)

    async def _output_for(self, outputs: list[Output], lowest: int, nbytes: int) -> Output:
        """Return the output that takes a frame of `nbytes`, with its buffer flushed when full."""
        around = self._around
        if outputs and outputs[-1].buffered_bytes >= _CHUNK_BYTES:
            await self._flush(outputs[-1])
        full = outputs and outputs[-1].end + nbytes > self._segment_bytes
        if outputs and full and outputs[-1].frames:
            await self._finish(outputs[-1])
        if not outputs or (full and outputs[-1].segment.sealed):
            number = around.next_number()
            outputs.append(
                await around.threads.read(
                    create_output,
                    around.files,
                    around.directory,
                    around.directory_id,
                    number,
                    lowest,
                )
            )
        return outputs[-1]

    async def _flush(self, output: Output) -> None:
        chunk = b"".join(output.buffer)
        if chunk:
            await self._around.threads.read(flush_output, self._around.files, output, chunk)
            output.written += len(chunk)
            output.buffer.clear()
            output.buffered_bytes = 0
            self.stats.bytes_written += len(chunk)

    async def _finish(self, output: Output) -> None:
        await self._flush(output)
        await self._around.threads.read(
            finish_output, self._around.files, self._around.directory, output
        )

    async def _read(self, source: Segment, offset: int, size: int) -> bytes:
        # Never cancelled while the thread reads: `stop` waits for this task.
        with self._around.open_segments.pinned(source.number) as fd:
            return await self._around.threads.read(
                read_exactly, self._around.files, fd, size, offset
            )

    async def _pace(self, nbytes: int) -> None:
        """Keep to the rate limit, and notice that the tier is closing."""
        if self._stopping.is_set():
            raise _Stopped
        unhurried = 1 - self._around.pressure.of_compaction
        if not self._bytes_per_second or self._urgent or unhurried <= 0:
            return
        try:
            async with asyncio.timeout(unhurried * nbytes / self._bytes_per_second):
                await self._stopping.wait()
        except TimeoutError:
            return
        raise _Stopped

    async def _give_way(self, slices: Slices) -> None:
        """Let everything else run if a slice is used up, and notice that the tier is closing."""
        await slices.give_way_if_due()
        if self._stopping.is_set():
            raise _Stopped

    def _rest_seconds(self) -> float:
        """Return how long to rest: not at all while space is wanted, or somebody waits."""
        is_waited_for = self._awaited or self._waiting or self._stopping.is_set()
        if is_waited_for or self._urgent or self._around.pressure.of_compaction >= _RESTS_UP_TO:
            return 0.0
        return short_rest()

    # --- afterwards ---------------------------------------------------------------------------

    async def _move(self, outputs: list[Output]) -> None:
        """Let the index point to the copies; what has moved on meanwhile stays where it is."""
        around = self._around
        slices = Slices(around.monotonic, rest_seconds=self._rest_seconds)
        for output in outputs:
            for fingerprint, source, target, length in output.moved:
                needed = around.index.move(fingerprint, source, target, length)
                if needed is not None:
                    output.segment.live_bytes += length
                    around.segments[source[0]].live_bytes -= needed
                if slices.due():
                    await slices.give_way()
            output.moved.clear()

    async def _write_hints(self, outputs: list[Output]) -> None:
        around = self._around
        for output in outputs:
            await around.threads.read(
                write_hint,
                around.files,
                around.directory,
                around.directory_id,
                segment=output.segment,
                skew=around.skew(),
                rows=output.rows,
            )
            output.segment.rows = None


def _shifted(item: Source, seconds: float) -> Source:
    """Return `item` with its times in another time base."""
    return item._replace(
        accessed=item.accessed + seconds,
        deadline=item.deadline + seconds,
        cap=item.cap + seconds,
    )


def _in_steps(packed: memoryview) -> Iterator[memoryview]:
    step = _ROWS_PER_STEP * INDEX_ROW_BYTES
    for at in range(0, len(packed), step):
        yield packed[at : at + step]


def _groups(wanted: list[Source]) -> Iterator[tuple[int, int, list[Source]]]:
    """Group frames that are read together: (start, end, frames), in the order of the file.

    Touches and tombstones have no length in their row, but are never longer than `_MARK_BYTES`.
    """
    group: list[Source] = []
    start = end = 0
    for item in sorted(wanted, key=attrgetter("offset")):
        item_end = item.offset + (item.length or _MARK_BYTES)
        near = item.offset - end < _MAX_GAP_BYTES and item_end - start <= _CHUNK_BYTES
        if group and not near:
            yield start, end, group
            group = []
        if not group:
            start = item.offset
        group.append(item)
        end = max(end, item_end) if len(group) > 1 else item_end
    if group:
        yield start, end, group


def _frame_at(data: bytes, at: int, length: int) -> bytes | None:
    """Cut one frame out of what was read; None when it is not all there."""
    length = length or frame_length(data, at) or len(data) + 1
    raw = data[at : at + length]
    return raw if len(raw) == length else None


def remove_segments(files: Files, directory: str, numbers: list[int]) -> None:
    """Unlink segments that the manifest has dropped, and their hints."""
    for number in numbers:
        files.remove(f"{directory}/{segment_name(number)}")
        files.remove(f"{directory}/{hint_name(number)}")
    files.sync_directory(directory)
