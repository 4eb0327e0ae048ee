"""A whole new state for a directory: staged in segments nobody knows, then installed at once.

While it is staged the directory is in use as ever. The staged segments have temporary names, which
the next opening would remove. Their frames have sequence numbers above all that are used until the
installation, by a gap that no writer crosses meanwhile.

Installing is the replacement of the manifest: it names the staged segments and drops all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from persistence.disk.caches import write_hint, write_snapshot
from persistence.disk.compaction import (
    Output,
    abandon_output,
    create_output,
    flush_output,
    name_outputs,
    seal_output,
)
from persistence.disk.directory import write_manifest
from persistence.disk.files import Files
from persistence.disk.format import INDEX_ROW, PUT, SEALED, Frame, encode_frame
from persistence.disk.index import Index
from persistence.disk.manifest import Manifest
from persistence.disk.sealed import RecordCodec
from persistence.disk.segments import Segment
from persistence.disk.threads import Threads, undisturbed
from persistence.disk.tier import DiskTier
from persistence.errors import DiskFull
from persistence.slices import Slices

SEQUENCE_GAP: Final = 2**32
_BUFFER_BYTES: Final = 1024 * 1024


class Staging:
    """Takes the frames of a new state, each session's only one, in any order.

    Args:
        files: system calls on files.
        threads: where files are touched.
        directory: where the segments are to be.
        directory_id: its id.
        next_number: asked for the number of each segment.
        after_sequence: the frames' sequence numbers are above this.
        segment_bytes: size of a segment.
        codec: seals payloads; None: they are stored as they are.

    Attributes:
        outputs: the segments.
        index: where each session's frame is.
        sequence: the highest sequence number so far.
    """

    def __init__(
        self,
        files: Files,
        threads: Threads,
        directory: str,
        directory_id: bytes,
        *,
        next_number: Callable[[], int],
        after_sequence: int,
        segment_bytes: int,
        codec: RecordCodec | None = None,
    ) -> None:
        self._files = files
        self._threads = threads
        self.directory = directory
        self._directory_id = directory_id
        self._next_number = next_number
        self._segment_bytes = segment_bytes
        self._codec = codec
        self.outputs: list[Output] = []
        self.index = Index()
        self.sequence = after_sequence

    async def add(self, fingerprint: bytes, frame: Frame, ids: bytes, skew: float) -> None:
        """Add a session: `frame` with other ids and its own sequence number.

        Args:
            fingerprint: of the session, in this directory.
            frame: the put, not sealed; its times are wall seconds.
            ids: incarnation, commit and base, one behind the other.
            skew: wall seconds minus the seconds of the index.
        """
        output = await self._output_for(frame.length)
        self.sequence += 1
        payload, flags = frame.payload, frame.flags
        if self._codec is not None:
            payload = self._codec.seal(
                payload, frame.key, self.sequence, ids, flags, frame.raw_bytes
            )
            flags |= SEALED
        data = encode_frame(
            output.segment.salt_checksum,
            PUT,
            frame.key,
            payload,
            self.sequence,
            0,
            ids,
            frame.accessed,
            frame.deadline,
            frame.cap,
            frame.user,
            flags,
            frame.raw_bytes,
        )
        row = INDEX_ROW.pack(
            fingerprint,
            self.sequence,
            frame.accessed - skew,
            frame.deadline - skew,
            frame.cap - skew,
            output.segment.number,
            output.end,
            len(data),
            frame.user,
        )
        self.index.put([row])
        output.rows += row
        output.buffer.append(data)
        output.buffered_bytes += len(data)
        output.frames += 1
        output.highest_sequence = self.sequence
        output.segment.live_bytes += len(data)

    async def _output_for(self, nbytes: int) -> Output:
        if self.outputs:
            output = self.outputs[-1]
            if output.buffered_bytes >= _BUFFER_BYTES:
                await self._flush(output)
            if not output.frames or output.end + nbytes <= self._segment_bytes:
                return output
            await self._seal(output)
        self.outputs.append(
            await undisturbed(
                self._threads.read(
                    create_output,
                    self._files,
                    self.directory,
                    self._directory_id,
                    self._next_number(),
                    self.sequence + 1,
                )
            )
        )
        return self.outputs[-1]

    async def _flush(self, output: Output) -> None:
        chunk = b"".join(output.buffer)
        if chunk:
            await undisturbed(self._threads.read(flush_output, self._files, output, chunk))
            output.written += len(chunk)
            output.buffer.clear()
            output.buffered_bytes = 0

    async def _seal(self, output: Output) -> None:
        await self._flush(output)
        await undisturbed(self._threads.read(seal_output, self._files, output))
        output.segment.rows, output.rows = output.rows, bytearray()  # until its hint is written

    async def finish(self) -> None:
        """Seal and sync what is staged; nothing can be added any more."""
        if self.outputs:
            await self._seal(self.outputs[-1])

    async def abandon(self) -> None:
        """Remove what is staged."""
        for output in self.outputs:
            await undisturbed(
                self._threads.read(abandon_output, self._files, self.directory, output)
            )
        self.outputs.clear()

    @property
    def segments(self) -> list[Segment]:
        """What is staged, as segments."""
        return [output.segment for output in self.outputs]


def staging_for(tier: DiskTier, segment_bytes: int) -> Staging:
    """Return a staging for the directory of a tier that is in use."""
    return Staging(
        tier.files,
        tier.threads,
        tier.directory,
        tier.directory_id,
        next_number=tier.next_number,
        after_sequence=tier.writer.sequence + SEQUENCE_GAP,
        segment_bytes=segment_bytes,
        codec=tier.codec,
    )


async def install(tier: DiskTier, staging: Staging, slices: Slices) -> None:
    """Let what is staged be everything there is in `tier`.

    Nobody may read or write through the tier meanwhile, and no checkpoint may be under way.

    Raises:
        DiskFull, OSError: everything is as it was; the staging is the caller's to abandon.
        WriteOutcomeUnknown: what the next opening finds is not known; no more writes.
    """
    assert tier.writer.sequence < staging.sequence or not staging.outputs, "the gap was crossed"
    async with tier.compactor.paused():
        # From here on the manifest may name them, whatever this call ends with. Removed then,
        # there would be nothing left: neither they nor what they have replaced.
        outputs, staging.outputs = staging.outputs, []
        try:
            await undisturbed(tier.replace_segments(outputs))
        except (DiskFull, OSError):
            staging.outputs = outputs
            raise
        tier.writer.sequence = tier.writer.durable_sequence = staging.sequence
        for shard, image in enumerate(staging.index.images()):
            tier.index.load_image(shard, memoryview(image), 0)
            await slices.give_way_if_due()


def install_fresh(files: Files, directory: str, manifest: Manifest, staging: Staging) -> None:
    """Let what is staged be everything there is in a directory that has nothing. In a thread.

    A crash leaves an empty directory or the whole state. The index snapshot makes the next opening
    as short as after a clean close, and saves its grants of unrecorded renewals.
    """
    numbers = frozenset(segment.number for segment in staging.segments)
    next_number = max(numbers, default=0) + 1
    identity = (manifest.directory_id, manifest.fingerprint_key)
    fresh = Manifest(*identity, next_number=next_number, keys=manifest.keys)
    write_manifest(files, directory, fresh)
    name_outputs(files, directory, staging.outputs)
    write_manifest(files, directory, replace(fresh, sealed=numbers))
    for segment in staging.segments:
        write_hint(
            files,
            directory,
            manifest.directory_id,
            segment=segment,
            skew=0.0,
            rows=segment.rows or b"",
        )
    write_snapshot(
        files,
        directory,
        manifest.directory_id,
        index=staging.index,
        segments=staging.segments,
        last_sequence=staging.sequence,
    )
