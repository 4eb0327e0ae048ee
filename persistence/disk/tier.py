"""The disk tier: what the rest of the engine sees of the log."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import islice
from threading import Lock
from typing import Any, Final

from persistence.clock import EngineTime
from persistence.config import DiskConfig
from persistence.disk.caches import write_hint, write_snapshot
from persistence.disk.compaction import MIN_DEAD_FRACTION, Output, name_outputs
from persistence.disk.compactor import Compactor, Surroundings, remove_segments
from persistence.disk.directory import (
    DirectoryLock,
    check_ours,
    make_directory,
    not_usable,
    open_manifest,
    write_manifest,
)
from persistence.disk.filenames import MANIFEST, MANIFEST_COPY, segment_name
from persistence.disk.files import NO_SPACE, Files
from persistence.disk.format import (
    DELETE,
    PUT,
)
from persistence.disk.index import SHARDS, Fingerprints, Index
from persistence.disk.journal import Journal
from persistence.disk.lastlog import Tail, seal_if_room
from persistence.disk.manifest import Manifest
from persistence.disk.patches import PlainRecords, Records
from persistence.disk.pressure import Pressure
from persistence.disk.reader import FrameReader
from persistence.disk.reading import Reading
from persistence.disk.recovery import Recovery
from persistence.disk.reserve import RESERVE_BYTES, Reserve
from persistence.disk.sealed import RecordCodec
from persistence.disk.segments import Damage, OpenSegments, Pins, Segment, bytes_behind
from persistence.disk.shipped import ShippedRecord
from persistence.disk.threads import Threads
from persistence.disk.wholes import Wholes
from persistence.disk.writer import LogWriter, Write
from persistence.errors import DiskFull
from persistence.sealer import Sealer

_log = logging.getLogger("persistence.disk")

_STEPS_PER_HOP: Final = 4
_NEGLIGIBLE_SKEW_SECONDS: Final = 1.0
_MAX_KEPT_FRACTION: Final = 1 / 4  # of the log: tombstones kept for the next checkpoint
_COMPACTION_CHECK_FRACTION: Final = 1 / 4  # of a segment: dead bytes after which to look again


@dataclass(frozen=True, slots=True)
class DiskStats:
    """What is on disk; sizes in bytes.

    Attributes:
        takes_writes: False: the last one was refused, and nothing has changed since.
        refusal: why not; empty if it does.
    """

    takes_writes: bool
    refusal: str

    sessions: int
    segments: int
    total_bytes: int
    live_bytes: int
    tombstone_bytes: int
    bytes_written: int
    syncs: int
    compactions: int
    compaction_bytes_written: int
    cached_reads: int
    thread_reads: int
    damages: int


class DiskTier:
    """The log of one directory: open it with `open`, end it with `close`.

    Every method runs on the event loop. What would block runs in the tier's own threads.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what `_open` has put together
        self,
        config: DiskConfig,
        time: EngineTime,
        files: Files,
        lock: DirectoryLock,
        manifest: Manifest,
        threads: Threads,
        fingerprints: Fingerprints,
        recovery: Recovery,
        sealer: Sealer | None = None,
    ) -> None:
        recovered, reserve = recovery.result, recovery.reserve
        self.directory = lock.directory
        self._config = config
        self._time = time
        self._files = files
        self._lock = lock
        self._manifest = manifest
        self._manifest_lock = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self.threads = threads
        self.fingerprints = fingerprints
        self.fingerprint = fingerprints.of
        self.index: Index = recovered.index
        self.segments: dict[int, Segment] = recovered.segments
        self.damages: list[Damage] = recovered.damages
        self._number_lock = Lock()
        self._last_number = recovered.last_number
        self._unsealed = recovered.unsealed
        self._next_log_number = recovered.last_number + 1  # at least
        if recovered.unsealed is not None:
            self._next_log_number = recovered.unsealed[0].number
        self._reserve = reserve
        self._pressure = Pressure(config.segment_bytes)
        self._batch_started = time.now()
        self._refused_bytes = 0  # of the last batch that disk.max_bytes had no room for
        self._dead_since_check = 0
        self._frames_applied = 0
        self._compaction_check_bytes = _COMPACTION_CHECK_FRACTION * config.segment_bytes
        self.pins, self.wholes = Pins(), Wholes()
        self.shipped = ShippedRecord(files, self.directory, threads)
        self._open_segments = OpenSegments(files, self.directory)
        self.reader = FrameReader(files, self._open_segments, threads)
        self._use_keys(sealer, recovered.last_number)
        self.reading = Reading(
            files,
            self.directory,
            index=self.index,
            segments=self.segments,
            open_segments=self._open_segments,
            reader=self.reader,
            damages=self.damages,
            fingerprint=fingerprints.of,
            codec=self.codec,
        )
        self.writer = LogWriter(
            files,
            self.directory,
            directory_id=manifest.directory_id,
            segment_bytes=config.segment_bytes,
            compression=config.compression == "lz4",
            next_number=self.next_number,
            last_sequence=recovered.last_sequence,
            skew=time.skew,
            reserve=reserve,
            codec=self.codec,
        )
        if recovered.unsealed is not None:
            self.writer.full = f"{self.directory}: no space left for new writes"
        self._has_patches = self.writer.may_patch = manifest.has_patches
        self.compactor = Compactor(
            Surroundings(
                files=files,
                directory=self.directory,
                directory_id=manifest.directory_id,
                threads=threads,
                index=self.index,
                fingerprints=fingerprints,
                segments=self.segments,
                open_segments=self._open_segments,
                reader=self.reader,
                pins=self.pins,
                next_number=self.next_number,
                publish=self._publish,
                forget=self._forget,
                damage=self.reading.note_damage,
                frames_applied=lambda: self._frames_applied,
                pressure=self._pressure,
                shipped_sequence=lambda: self.shipped.sequence,
                before_merging=self._stop_keeping_tombstones,
                reserve=reserve,
                codec=self.codec,
                monotonic=time.now,
                skew=time.skew,
            ),
            config.segment_bytes,
            config.compaction_bytes_per_second,
        )

    def _use_keys(self, sealer: Sealer | None, last_number: int) -> None:
        """Seal with the newest key from the next segment on; mark those with an older one."""
        self._keys = self._manifest.keys
        self.codec: RecordCodec | None = None
        self.records: Records = PlainRecords()
        if sealer is None:
            return
        self.codec = RecordCodec(sealer, self._manifest.directory_id)
        self.records = self.codec
        if self._keys[-1][1] != sealer.newest:
            self._keys = (*self._keys, (last_number + 1, sealer.newest))
        for number, segment in self.segments.items():
            segment.stale = self._manifest.key_of(number) != sealer.newest

    # --- opening and closing ------------------------------------------------------------------

    @classmethod
    async def open(
        cls,
        config: DiskConfig,
        time: EngineTime,
        files: Files | None = None,
        sealer: Sealer | None = None,
    ) -> DiskTier:
        """Lock the directory, recover it, and start compacting.

        Args:
            config: ``path`` and more.
            time: the engine's time base.
            files: system calls on files; None: the system's.
            sealer: seals and opens what is stored; None: it is stored as it is.

        Raises:
            DirectoryLocked: another process or manager holds it.
            DirectoryNotUsable: other format, foreign, read-only, not a directory.
            DiskFull: there is no space to create or repair it.
        """
        # In a task of its own: a caller that is cancelled must not leave a thread behind that
        # goes on recovering a directory whose lock has been given back.
        cancelled = asyncio.Event()
        opening = asyncio.create_task(
            cls._open(config, time, files or Files(), cancelled, sealer), name="persistence-open"
        )
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            cancelled.set()
            while not opening.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([opening])
            if not opening.cancelled() and opening.exception() is None:
                await opening.result().close()
            raise

    @classmethod
    async def _open(
        cls,
        config: DiskConfig,
        time: EngineTime,
        files: Files,
        cancelled: asyncio.Event,
        sealer: Sealer | None,
    ) -> DiskTier:
        threads = Threads()
        # Absolute from here on, once and for all: files are opened all the time, and the process
        # may go to another directory meanwhile, where a relative path means another log.
        directory = _absolute(config.path)
        held: DirectoryLock | None = None
        try:
            lock, manifest, defect = await threads.write(_lock_and_read, files, directory, sealer)
            held = lock
            fingerprints = Fingerprints(manifest.fingerprint_key)
            reserve = Reserve(files, directory, min(RESERVE_BYTES, config.segment_bytes))
            recovery = Recovery(files, directory, manifest, fingerprints, reserve)
            if defect is not None:
                path = f"{directory}/{MANIFEST}"
                recovery.result.damages.append(Damage(path, 0, None, defect))
            steps = recovery.steps()
            while await threads.write(_some_steps, steps):
                if cancelled.is_set():
                    raise asyncio.CancelledError  # noqa: TRY301 - cleaned up like any failure
            tier = cls(config, time, files, lock, manifest, threads, fingerprints, recovery, sealer)
            # The manifest knows all that recovery sealed; dropped segments are gone.
            await tier._write_first_manifest(manifest)
            await tier.shipped.load()
        except BaseException as error:
            if held is not None:
                held.release()
            threads.close()
            if isinstance(error, OSError):
                raise not_usable(directory, error) from error
            raise
        tier._pressure.measure(tier.segments.values())
        tier.compactor.start()
        tier.compactor.wake()
        return tier

    async def close(self) -> None:
        """Seal the log, write the index snapshot, release the directory.

        The snapshot is only a cache: when it cannot be written, the next opening takes longer.
        """
        await self.compactor.stop()
        try:
            await self._seal_at_close()
        finally:
            while self._background:
                await asyncio.gather(*self._background, return_exceptions=True)
            await self.threads.write(self.writer.close)
            self._open_segments.close()
            self._lock.release()
            self.threads.close()

    async def _seal_at_close(self) -> None:
        if self.writer.poisoned is not None:
            return
        try:
            self.writer.may_use_reserve = True
            await self._seal_unsealed()
            sealed = await self.threads.write(self.writer.seal)
            self._next_log_number = self._last_number + 1
            if sealed is not None:
                await self._sealed(sealed)
            await self._write_manifest()
            await self._turn_into_wall_time()
            await self.threads.write(
                write_snapshot,
                self._files,
                self.directory,
                self._manifest.directory_id,
                index=self.index,
                segments=list(self.segments.values()),
                last_sequence=self.writer.sequence,
            )
        except (OSError, DiskFull) as error:
            _log.warning("%s: no index snapshot at close: %s", self.directory, error)

    async def _turn_into_wall_time(self) -> None:
        """Convert the index' times for the snapshot; nothing to do unless the clock was set."""
        skew = self._time.skew()
        if abs(skew) < _NEGLIGIBLE_SKEW_SECONDS:
            return
        for shard in range(SHARDS):
            self.index.shift_times(shard, skew)
            await asyncio.sleep(0)

    def abandon(self) -> None:
        """Let go of everything without a word to the disk: after a fork, in the child."""
        self._lock.abandon()

    def journal(self, name: str) -> Journal:
        """Return a journal of this directory, for use in the writer thread."""
        return Journal(self._files, self.directory, name, self._manifest.directory_id)

    # --- writing ------------------------------------------------------------------------------

    async def make_room(self, nbytes: int, *, grows: bool) -> None:
        """Make the active segment ready for about `nbytes` of frames.

        Args:
            nbytes: how much is to be written.
            grows: False for tombstones and touches, which may exceed ``disk.max_bytes``: they are
                how space is freed.

        Raises:
            DiskFull: ``disk.max_bytes`` is reached, or there is no room for a new segment.
            WriteOutcomeUnknown: an earlier sync failed.
        """
        if grows and self._is_over_limit(nbytes):
            self._refused_bytes = nbytes
            await self._give_up_active()
            self.compactor.wake(urgent=True)
            raise DiskFull(self._limit_reached())
        self.writer.check_usable()
        self.writer.may_use_reserve = not grows
        if grows and (self.writer.full is not None or self._reserve.is_spent):
            await self._look_for_space(nbytes)
        if self.writer.would_patch and not self.writer.may_patch:
            await self._allow_patches()
        if self.holds_back:
            await self._wait_for_compaction()
        if not self._begin(nbytes):
            await self._rotate()

    def begin_now(self, nbytes: int, *, grows: bool) -> bool:
        """Do what `make_room` does where nothing stands in the way; False: it is needed."""
        writer = self.writer
        if (
            (grows and (self._is_over_limit(nbytes) or self._reserve.is_spent))
            or writer.poisoned is not None
            or writer.full is not None
            or (writer.would_patch and not writer.may_patch)
            or self.holds_back
        ):
            return False
        writer.may_use_reserve = not grows
        return self._begin(nbytes)

    def _begin(self, nbytes: int) -> bool:
        """Start a batch in the active segment, if it fits into it."""
        self._batch_started = self._time.now()
        if self.writer.active is None:
            return False
        self.writer.begin()
        return self.writer.has_room(nbytes)

    async def _look_for_space(self, nbytes: int) -> None:
        """Refuse updates while the disk is still full, so that they keep no tombstone back.

        Raises:
            DiskFull: there is no room, or none for the reserve.
        """
        refusal = self.writer.full or f"{self.directory}: no space left for new writes"
        space = await self.threads.write(self._files.space, self.directory)
        try:
            if space.free_bytes < nbytes:
                raise DiskFull(refusal)  # noqa: TRY301 - handled as below
            await self.threads.write(self.writer.regain_reserve)
        except DiskFull:
            self.writer.may_use_reserve = True
            await self._give_up_active()
            self.compactor.wake(urgent=True)
            raise

    async def _allow_patches(self) -> None:
        """Let the manifest say that there may be patches, before the first one is written.

        Whoever does not know them refuses the directory from then on. Where the manifest cannot be
        replaced, records are written whole.
        """
        self.writer.would_patch = False
        self._has_patches = True
        try:
            await self._write_manifest()
        except OSError as error:
            self._has_patches = False
            _log.warning("%s: no patches for now: %s", self.directory, error.strerror)
        else:
            self.writer.may_patch = True

    def _is_over_limit(self, nbytes: int) -> bool:
        limit = self._config.max_bytes
        return bool(limit) and self.total_bytes + nbytes > limit

    def _limit_reached(self) -> str:
        return (
            f"{self.directory} holds {self.total_bytes} bytes and disk.max_bytes is "
            f"{self._config.max_bytes}: no new writes; reads and memory go on; terminate sessions "
            "or raise the limit, writes then resume by themselves"
        )

    def _refusal(self) -> str | None:
        """Return why the disk takes no writes, as far as the last one tells."""
        if self.writer.poisoned is not None:
            return self.writer.poisoned
        if self._refused_bytes and self._is_over_limit(self._refused_bytes):
            return self._limit_reached()
        return self.writer.full

    async def merge_has_ended(self) -> bool:
        """Wait for a merge that is under way; False: there is none, so nothing has changed."""
        if self.compactor.is_idle:
            return False
        await self.compactor.merged()
        return True

    @property
    def holds_back(self) -> bool:
        """Whether a batch has to wait before it is written, for compaction to keep up."""
        return self._pressure.dead_bytes > self._pressure.soft_bytes

    async def _wait_for_compaction(self) -> None:
        """Leave the loop and the disk to compaction for a while; see `pressure`."""
        pressure = self._pressure
        while pressure.of_commits >= 1 and await self.compactor.merged():
            pass
        pause_seconds = pressure.pause_seconds(self._time.now() - self._batch_started)
        if pause_seconds and not self.compactor.is_idle:
            await asyncio.sleep(pause_seconds)

    async def _give_up_active(self) -> None:
        """Seal the active segment if it is mostly dead, so that compaction can free its space.

        Without that, a log with less than a segment of live data would be full for good.
        """
        active = self.writer.active
        if active is None or active.segment.unapplied:
            return
        if active.segment.dead_bytes > MIN_DEAD_FRACTION * active.segment.length:
            with suppress(DiskFull):
                await self._seal_active()

    async def _seal_active(self) -> None:
        sealed = await self.threads.write(self.writer.seal)
        # Taken before the thread takes the number itself: a manifest that is written in between
        # must not know of the new segment, or it would pass for a dead one.
        self._next_log_number = self._last_number + 1
        if sealed is not None:
            self._run_in_background(self._sealed(sealed))

    async def _seal_unsealed(self) -> None:
        """Seal what the opening had no room to seal: before the next segment is made.

        Raises:
            DiskFull: there still is none.
        """
        if self._unsealed is None:
            return
        segment, tail = self._unsealed
        path = f"{self.directory}/{segment_name(segment.number)}"
        if not await self.threads.write(_seal_later, self._files, path, segment, tail):
            self.writer.full = f"{path}: no space left for new writes; free some space"
            raise DiskFull(self.writer.full)
        self._unsealed = None

    async def _rotate(self) -> None:
        try:
            await self._seal_unsealed()
            await self._seal_active()
            segment = await self.threads.write(self.writer.create)
        except DiskFull:
            self.compactor.wake(urgent=True)
            raise
        self.segments[segment.number] = segment
        self.writer.begin()

    def _run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="persistence-rotation")
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _sealed(self, segment: Segment) -> None:
        """After a rotation: the hint, and the manifest. Both may fail; recovery copes."""
        try:
            await self._write_hint(segment)
            await self._write_manifest()
        except OSError as error:
            _log.warning("%s: after sealing a segment: %s", self.directory, error.strerror)
        self.compactor.wake()

    async def _write_hint(self, segment: Segment) -> None:
        assert segment.rows is not None, segment.number
        await self.threads.read(
            write_hint,
            self._files,
            self.directory,
            self._manifest.directory_id,
            segment=segment,
            skew=self._time.skew(),
            rows=segment.rows,
        )
        segment.rows = None

    def apply(self, writes: Sequence[Write]) -> None:
        """Let the index know frames of one segment that have been written, in order.

        Looks for something to compact when enough has died.
        """
        segment = self.segments[writes[0].segment]
        segment.unapplied -= len(writes)
        self._frames_applied += len(writes)
        start = 0
        for at, write in enumerate(writes):
            if write.kind != PUT:
                self._apply_puts(segment, writes[start:at])
                self._apply_other(segment, write)
                start = at + 1
        self._apply_puts(segment, writes[start:] if start else writes)
        if self._dead_since_check > self._compaction_check_bytes:
            # Behind all of them: halfway, what is still to be counted as dead would pass for live,
            # and the limits, which go by what is live, would be too high.
            self._dead_since_check = 0
            self._pressure.measure(self.segments.values())
            self.compactor.wake()

    def _apply_puts(self, segment: Segment, writes: Sequence[Write]) -> None:
        segment.live_bytes += sum([write.length for write in writes])
        for number, length in self.index.put([write.row for write in writes]).items():
            self._died(number, length)

    def _apply_other(self, segment: Segment, write: Write) -> None:
        if write.kind == DELETE:
            segment.tombstone_bytes += write.length
            row = self.index.remove(write.fingerprint)
            if row is not None:
                self._died(row.segment, row.live_bytes)

    def _died(self, number: int, length: int) -> None:
        """Count dead bytes."""
        segment = self.segments.get(number)
        if segment is None:
            return
        segment.live_bytes -= length
        assert segment.live_bytes >= 0, (number, segment.live_bytes)
        self._pressure.dead_bytes += length
        self._dead_since_check += length

    # --- the manifest and compaction ----------------------------------------------------------

    def next_number(self) -> int:
        """Return a segment number that nobody else gets."""
        with self._number_lock:  # asked from the writer thread and from the loop
            self._last_number += 1
            return self._last_number

    async def _write_manifest(
        self, *, add: frozenset[int] = frozenset(), remove: frozenset[int] = frozenset()
    ) -> None:
        """Bring the manifest up to date. `add` and `remove` change which segments are dropped.

        What it will say is only worked out under the lock: a rotation that waits here behind a
        merge must not write what was true before it.
        """
        async with self._manifest_lock:
            dropped = (self._manifest.dropped | add) - remove
            active = self.writer.active
            sealed = {item.number for item in self.segments.values() if item.sealed}
            manifest = Manifest(
                self._manifest.directory_id,
                self._manifest.fingerprint_key,
                frozenset(sealed) - dropped,
                dropped,
                active.segment.number if active is not None else self._next_log_number,
                self._needed_keys(),
                self._has_patches,
            )
            if manifest == self._manifest:
                return
            await self.threads.read(
                _write_with_reserve, self._files, self.directory, manifest, self._reserve
            )
            self._manifest = manifest

    @property
    def keys_in_use(self) -> list[bytes]:
        """The ids of the keys that segments are sealed with, or were a moment ago."""
        return [key_id for _, key_id in self._keys]

    def _needed_keys(self) -> tuple[tuple[int, bytes], ...]:
        """Return the keys without those that no segment is sealed with any more."""
        if len(self._keys) > 1:
            ends = [first for first, _ in self._keys[1:]]
            self._keys = (
                *(
                    (first, key_id)
                    for (first, key_id), end in zip(self._keys[:-1], ends, strict=True)
                    if any(first <= number < end for number in self.segments)
                ),
                self._keys[-1],
            )
        return self._keys

    async def _write_first_manifest(self, found: Manifest) -> None:
        """What recovery sealed, and nothing that it removed. The old one does on a full disk."""
        try:
            await self._write_manifest(remove=found.dropped)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            self.writer.full = f"{self.directory}: no space left for new writes"
            _log.warning("%s: no space for the manifest", self.directory)

    async def _publish(self, outputs: list[Segment], inputs: list[Segment]) -> None:
        """The moment of truth of a merge: the manifest names the outputs and drops the inputs."""
        for segment in outputs:
            self.segments[segment.number] = segment
        numbers = frozenset(item.number for item in inputs)
        # If this fails, inputs and outputs both stay; they say the same, and the outputs, to
        # which nothing points, are merged away later.
        await self._write_manifest(add=numbers)

    async def _forget(self, inputs: list[Segment]) -> None:
        """Drop merged segments: from the table, from the open files, from the directory."""
        numbers = [item.number for item in inputs]
        for item in inputs:
            assert item.live_bytes == 0, item
            del self.segments[item.number]
            self._open_segments.forget(item.number)
        self._pressure.measure(self.segments.values())
        await self.threads.read(remove_segments, self._files, self.directory, numbers)
        await self._write_manifest(remove=frozenset(numbers))

    async def replace_segments(self, outputs: list[Output]) -> None:
        """Let sealed outputs be the whole log: the moment of truth of a restore.

        Nobody may be writing, or wait for a write, and the index must be set afterwards. A crash
        leaves either everything as it was, or the outputs and nothing else: before the manifest
        names them, their numbers are below its next one, so they pass for dead.

        Raises:
            DiskFull, OSError: everything is as it was; the outputs are the caller's to remove.
            WriteOutcomeUnknown: what the next opening finds is not known; no more writes.
        """
        await self._seal_active()
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)
        # What is dropped here leaves no tombstones: the next checkpoint has to be a full one.
        await self.shipped.give_up()
        await self._write_manifest()
        assert all(item.segment.number < self._manifest.next_number for item in outputs)
        await self.threads.read(name_outputs, self._files, self.directory, outputs)
        old = list(self.segments.values())
        self.segments.update({item.segment.number: item.segment for item in outputs})
        try:
            await self._write_manifest(add=frozenset(item.number for item in old))
        except OSError as error:
            for output in outputs:
                del self.segments[output.segment.number]
            self.writer.poisoned = f"{self.directory}: manifest: {error.strerror}"
            self.writer.check_usable()
        for item in old:
            item.live_bytes = 0
        try:
            await self._forget(old)
            for output in outputs:
                await self._write_hint(output.segment)
        except OSError as error:
            # They are dropped; the next opening removes them, and makes the hints.
            _log.warning("%s: after a restore: %s", self.directory, error.strerror)

    def tombstones_shipped(self) -> None:
        """Let compaction look again at the tombstones it kept for a checkpoint."""
        for segment in self.segments.values():
            segment.kept_until = 0
        self.compactor.wake()

    async def _stop_keeping_tombstones(self) -> None:
        """Do without the next incremental checkpoint when the tombstones for it take too much.

        Else somebody who has stopped making checkpoints would keep every tombstone for good.
        """
        kept = sum(item.tombstone_bytes for item in self.segments.values())
        if kept > max(self._config.segment_bytes, self.total_bytes * _MAX_KEPT_FRACTION):
            await self.shipped.give_up()

    # --- numbers ------------------------------------------------------------------------------

    @property
    def directory_id(self) -> bytes:
        """The random id of the directory, 16 bytes."""
        return self._manifest.directory_id

    @property
    def has_patches(self) -> bool:
        """Whether there may be patches in the log."""
        return self._has_patches

    @property
    def secret(self) -> bytes:
        """A secret of the directory, 16 bytes, in no checkpoint and no log."""
        return self._manifest.fingerprint_key

    @property
    def current_segments(self) -> list[Segment]:
        """The segments that make up the log, by number: those that a merge has replaced do not."""
        dropped = self._manifest.dropped
        return [item for number, item in sorted(self.segments.items()) if number not in dropped]

    @property
    def files(self) -> Files:
        """The system calls it works with."""
        return self._files

    def pinned_file(self, number: int) -> AbstractContextManager[int]:
        """Keep a segment's file open for reads in threads; gives its descriptor."""
        return self._open_segments.pinned(number)

    @property
    def total_bytes(self) -> int:
        """Bytes of all segments."""
        return sum(item.length for item in self.segments.values())

    def bytes_behind(self, sequence: int) -> int:
        """Return about how many bytes are needed of what was written behind a sequence number."""
        return bytes_behind(self.segments.values(), sequence, self.writer.sequence)

    def stats(self) -> DiskStats:
        """Return what is on disk."""
        segments = self.segments.values()
        refusal = self._refusal()
        return DiskStats(
            takes_writes=refusal is None,
            refusal=refusal or "",
            sessions=len(self.index),
            segments=len(self.segments),
            total_bytes=self.total_bytes,
            live_bytes=sum(item.live_bytes for item in segments),
            tombstone_bytes=sum(item.tombstone_bytes for item in segments),
            bytes_written=self.writer.bytes_written,
            syncs=self.writer.syncs,
            compactions=self.compactor.stats.merges,
            compaction_bytes_written=self.compactor.stats.bytes_written,
            cached_reads=self.reader.cached_reads,
            thread_reads=self.reader.thread_reads,
            damages=len(self.damages),
        )


def _absolute(path: str | os.PathLike[str]) -> str:
    return os.path.abspath(os.fspath(path))


def _lock_and_read(
    files: Files, directory: str, sealer: Sealer | None
) -> tuple[DirectoryLock, Manifest, str | None]:
    make_directory(files, directory)
    check_ours(files, directory)
    lock = DirectoryLock(files, directory)
    try:
        return lock, *open_manifest(files, directory, sealer)
    except BaseException:
        lock.release()
        raise


def _write_with_reserve(files: Files, directory: str, manifest: Manifest, reserve: Reserve) -> None:
    try:
        write_manifest(files, directory, manifest)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        if not reserve.release():
            # It may be inodes that are lacking. The copy takes one, and is written again.
            files.remove(f"{directory}/{MANIFEST_COPY}")
        write_manifest(files, directory, manifest)


def _seal_later(files: Files, path: str, segment: Segment, tail: Tail) -> bool:
    fd = files.open_write(path)
    try:
        segment.sealed = seal_if_room(files, fd, segment, tail)
    finally:
        files.close(fd)
    return segment.sealed


def _some_steps(steps: Iterator[None]) -> bool:
    """Take a few steps of a recovery; return whether there are more."""
    return sum(1 for _ in islice(steps, _STEPS_PER_HOP)) == _STEPS_PER_HOP
