"""The background task that compacts. What is copied is decided in `compaction`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from persistence.disk.caches import write_hint
from persistence.disk.compaction import (
    Merge,
    Output,
    abandon_output,
    choose_inputs,
    create_output,
    finish_output,
    flush_output,
    lowest_outside,
)
from persistence.disk.filenames import hint_name, segment_name
from persistence.disk.files import Files, read_exactly
from persistence.disk.format import (
    SEGMENT_HEADER_BYTES,
    Frame,
    FrameType,
    Torn,
    decode_frame,
    restamp,
)
from persistence.disk.index import Fingerprints, Index
from persistence.disk.segments import OpenSegments, Segment
from persistence.disk.threads import Threads
from persistence.slices import Slices

_log = logging.getLogger("persistence.compaction")

_CHUNK_BYTES: Final = 256 * 1024


class _Stopped(Exception):
    """The tier is closing: the merge under way is abandoned."""


class _Defect(Exception):
    """An input holds a damaged frame."""

    def __init__(self, segment: Segment, offset: int) -> None:
        self.segment = segment
        self.offset = offset


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
    `skew` are the clock's. `damage` reports a defect.
    """

    files: Files
    directory: str
    directory_id: bytes
    threads: Threads
    index: Index
    fingerprints: Fingerprints
    segments: dict[int, Segment]
    open_segments: OpenSegments
    next_number: Callable[[], int]
    publish: Callable[[list[Segment], list[Segment]], Awaitable[None]]
    forget: Callable[[list[Segment]], Awaitable[None]]
    damage: Callable[[Segment, int, str], None]
    monotonic: Callable[[], float]
    skew: Callable[[], float]


class Compactor:
    """Runs merges one at a time, woken by `wake`, until `stop`.

    Args:
        around: what it works on.
        segment_bytes: size of a segment.
        bytes_per_second: rate limit for reading; 0: none.
    """

    def __init__(self, around: Surroundings, segment_bytes: int, bytes_per_second: int) -> None:
        self._around = around
        self._segment_bytes = segment_bytes
        self._bytes_per_second = bytes_per_second
        self._work = asyncio.Event()
        self._stopping = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._urgent = False
        self._task: asyncio.Task[None] | None = None
        self.stats = CompactionStats()

    def start(self) -> None:
        """Start the background task."""
        self._task = asyncio.create_task(self._run(), name="persistence-compaction")

    def wake(self, *, urgent: bool = False) -> None:
        """Look for something to merge; `urgent`: space has run out, ignore the rate limit."""
        self._urgent = self._urgent or urgent
        self._idle.clear()
        self._work.set()

    async def settle(self) -> None:
        """Wait until there is nothing left to merge."""
        await self._idle.wait()

    async def stop(self) -> None:
        """Abandon the merge under way and end the task."""
        self._stopping.set()
        self._work.set()
        if self._task is not None:
            await self._task
            self._task = None

    async def _run(self) -> None:
        while not self._stopping.is_set():
            await self._work.wait()
            self._work.clear()
            try:
                while await self._merge_once():
                    pass
            except _Stopped:
                break
            except OSError as error:
                _log.warning(
                    "%s: compaction gave up for now: %s", self._around.directory, error.strerror
                )
            except Exception:
                _log.exception("%s: compaction failed", self._around.directory)
            self._urgent = False
            if not self._work.is_set():
                self._idle.set()
        self._idle.set()

    async def _merge_once(self) -> bool:
        around = self._around
        inputs = choose_inputs(around.segments.values(), self._segment_bytes)
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
        except BaseException:
            await self._abandon(outputs)
            raise
        await around.publish([item.segment for item in outputs], inputs)
        await self._move(outputs)
        await around.forget(inputs)
        await self._write_hints(outputs)
        self.stats.merges += 1
        self.stats.segments_dropped += len(inputs)
        self.stats.tombstones_dropped += merge.dropped_tombstones
        return True

    async def _abandon(self, outputs: list[Output]) -> None:
        for output in outputs:
            await self._around.threads.read(abandon_output, self._around.files, output)

    # --- copying ----------------------------------------------------------------------------------

    async def _copy(self, inputs: list[Segment], outputs: list[Output]) -> Merge:
        """Copy what is live in `inputs`; `outputs` grows while it goes on."""
        around = self._around
        merge = Merge(
            around.index, around.fingerprints, lowest_outside(around.segments.values(), inputs)
        )
        lowest = min(item.lowest_sequence for item in inputs)
        slices = Slices(around.monotonic)
        for source in inputs:
            if source.live_bytes or source.tombstone_bytes or source.dead_bytes:
                await self._copy_segment(source, merge, outputs, lowest, slices)
        for fingerprint, (_, raw, salt_checksum, frame) in merge.touches.items():
            output = await self._output_for(outputs, lowest, len(raw))
            stamped = restamp(raw, salt_checksum, output.segment.salt_checksum)
            assert stamped is not None, "its checksum was right when it was read"
            merge.add(output, frame, stamped, fingerprint, inputs[0], 0)
            if slices.due():
                await slices.give_way()
        if outputs:
            await self._finish(outputs[-1])
        return merge

    async def _copy_segment(
        self, source: Segment, merge: Merge, outputs: list[Output], lowest: int, slices: Slices
    ) -> None:
        at = SEGMENT_HEADER_BYTES
        wanted = _CHUNK_BYTES
        while at < source.length:
            await self._pace(at)
            data = await self._read(source, at, min(wanted, source.length - at))
            used = await self._copy_chunk(source, at, data, merge, outputs, lowest, slices)
            wanted = _CHUNK_BYTES
            if not used:
                needed = decode_frame(data, 0, source.salt_checksum)
                if not isinstance(needed, Torn) or at + len(data) >= source.length:
                    raise _Defect(source, at)
                wanted = needed.needed_bytes
            at += used

    async def _copy_chunk(
        self,
        source: Segment,
        base: int,
        data: bytes,
        merge: Merge,
        outputs: list[Output],
        lowest: int,
        slices: Slices,
    ) -> int:
        """Copy the live ones of the whole frames in `data`; return the bytes used."""
        used = 0
        while used < len(data):
            frame = decode_frame(data, used, source.salt_checksum)
            if isinstance(frame, Torn):
                break
            if not isinstance(frame, Frame):
                raise _Defect(source, base + used)
            raw = data[used : used + frame.length]
            if frame.type == FrameType.TOUCH:
                merge.keep_touch(frame, raw, source.salt_checksum)
            elif merge.wanted(frame, source.number, base + used):
                await self._copy_frame(source, base + used, frame, raw, merge, outputs, lowest)
            used += frame.length
            if slices.due():
                await slices.give_way()
        self.stats.bytes_read += used
        return used

    async def _copy_frame(
        self,
        source: Segment,
        offset: int,
        frame: Frame,
        raw: bytes,
        merge: Merge,
        outputs: list[Output],
        lowest: int,
    ) -> None:
        output = await self._output_for(outputs, lowest, len(raw))
        # Asked again: getting the output may have awaited, and the session may have moved on.
        fingerprint = merge.wanted(frame, source.number, offset)
        if fingerprint is None:
            return
        stamped = restamp(raw, source.salt_checksum, output.segment.salt_checksum)
        if stamped is None:
            raise _Defect(source, offset)
        merge.add(output, frame, stamped, fingerprint, source, offset)

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

    async def _pace(self, at: int) -> None:
        """Keep to the rate limit, and notice that the tier is closing."""
        if self._stopping.is_set():
            raise _Stopped
        if not self._bytes_per_second or self._urgent or at == SEGMENT_HEADER_BYTES:
            return
        try:
            async with asyncio.timeout(_CHUNK_BYTES / self._bytes_per_second):
                await self._stopping.wait()
        except TimeoutError:
            return
        raise _Stopped

    # --- afterwards -------------------------------------------------------------------------------

    async def _move(self, outputs: list[Output]) -> None:
        """Let the index point to the copies; what has moved on meanwhile stays where it is."""
        around = self._around
        slices = Slices(around.monotonic)
        for output in outputs:
            for fingerprint, source, target, length in output.moved:
                if around.index.move(fingerprint, source, target):
                    output.segment.live_bytes += length
                    around.segments[source[0]].live_bytes -= length
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
                rows=bytes(output.rows),
            )


def remove_segments(files: Files, directory: str, numbers: list[int]) -> None:
    """Unlink segments that the manifest has dropped, and their hints."""
    for number in numbers:
        files.remove(f"{directory}/{segment_name(number)}")
        files.remove(f"{directory}/{hint_name(number)}")
    files.sync_directory(directory)
