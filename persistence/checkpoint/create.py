"""Making a checkpoint: cut the log, ship what lies between the cuts, publish the manifest last.

Order: sweep up what a killed creation left; choose what to go on from; cut (see `disk.cut`); read,
pack and put the chunks, some being packed in threads while others travel; publish the manifest;
look whether everything that it lists is still there; note in the directory that this is the newest
(see `disk.shipped`); drop what `keep` no longer covers.

It can die anywhere in between. Until the manifest is published there are only chunks that nobody
lists; from then on the restore point is complete, and what is left to do is done by the next one.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Final, NamedTuple

from persistence.checkpoint.catalogue import (
    Catalogue,
    CheckpointInfo,
    info_of,
    prune,
    sweep,
    time_text,
)
from persistence.checkpoint.manifest import (
    ChunkRef,
    Manifest,
    PackedRun,
    chunk_name,
    encode_chunk,
    encode_manifest,
    make_id,
    number_after,
    ref_of,
)
from persistence.checkpoint.plan import CHUNK_BYTES, Run, runs_of
from persistence.checkpoint.stores import CheckpointStore, ChunkKey
from persistence.clock import Clock
from persistence.disk.cut import Cut, Part, take_cut
from persistence.disk.files import Files, fill
from persistence.disk.shipped import Shipped
from persistence.disk.threads import undisturbed
from persistence.disk.tier import DiskTier
from persistence.errors import CheckpointDamaged, DirectoryNotUsable
from persistence.sealer import Sealer, Seals
from persistence.slices import Slices

_log = logging.getLogger("persistence.checkpoint")

_MAX_PACKED_AT_ONCE: Final = 2
_MAX_UNDERWAY: Final = 4
_BUFFER_BYTES: Final = CHUNK_BYTES + CHUNK_BYTES // 4  # a chunk, and gaps between its runs
_MAX_GAP_BYTES: Final = 16 * 1024  # dead bytes between two runs that are read together


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a long work on a checkpoint is.

    In bytes: of the log, before compression, when one is made; as stored when one is restored. It
    begins anew when a damaged one is passed over.

    Attributes:
        done_bytes: how much is done.
        total_bytes: about how much it will be.
    """

    done_bytes: int
    total_bytes: int


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How checkpoints are made.

    Attributes:
        compress: whether chunks are compressed.
        keep: how many restore points stay.
        namespace: of this worker.
        seals: seal them; None: they are not sealed.
    """

    compress: bool = True
    keep: int = 5
    namespace: str = ""
    seals: Seals | None = None

    @property
    def sealer(self) -> Sealer | None:
        """What seals chunks and manifests, if anything does."""
        return None if self.seals is None else self.seals.checkpoints


async def create_checkpoint(
    tier: DiskTier,
    store: CheckpointStore,
    plan: Plan,
    clock: Clock,
    reason: str = "manual",
    on_progress: OnProgress | None = None,
    *,
    is_last: bool = False,
) -> CheckpointInfo:
    """Make a restore point of everything that is in the log now.

    What is only in memory (renewals that are not recorded, sessions that were not logged) must be
    brought into the log before. One creation at a time, and none while a restore is installed.

    Args:
        tier: the log.
        store: where it goes.
        plan: how it is made.
        clock: wall time.
        reason: is kept with it.
        on_progress: told how far it is.
        is_last: there may be no time for a full one. So it goes on from the newest one even if
            what was shipped on top of its base has become as much as that; the next one is full.

    Raises:
        RemoteUnavailable, DiskFull, DirectoryNotUsable: the store fails; the restore points that
            were there are as they were, and if only the publishing was unclear, this one may be.
        RemoteDamaged: a key of somebody else is where checkpoints are listed.
        CheckpointDamaged: somebody has removed what was shipped; this one is withdrawn.
        WriteOutcomeUnknown: the log takes no more writes.
    """
    worker = tier.directory_id.hex()
    catalogue = await Catalogue.load(store, plan.sealer)
    await sweep(store, catalogue, worker, clock.wall())
    parent = await _parent(tier, store, catalogue, _keys(tier, plan), is_last=is_last)
    make = partial(
        _make, tier, store, plan, clock, reason, on_progress, number_after(catalogue.ids)
    )
    with _reading_log(tier), tier.shipped.keeping(tier.writer.durable_sequence):
        while not await _is_whole(store, manifest := await make(parent)):
            await store.withdraw(manifest.id)
            if parent is None:
                raise CheckpointDamaged(
                    f"{store.name}: chunks of checkpoint {manifest.id} were removed while it was "
                    "made; it is withdrawn, those before it are as they were; look for who removes "
                    "them"
                )
            _log.warning(
                "checkpoint %s was deleted while the next one was made: that is a full one now",
                parent.id,
            )
            parent = None
        await _remember(tier, Shipped(store.name, manifest.id, manifest.sequence))
    await _tidy(store, plan, worker, clock)
    info = info_of(manifest)
    _log.info(
        "checkpoint %s (%s, %s): %d sessions, %d bytes shipped",
        info.id, info.kind, ascii(reason), info.sessions, info.bytes,
    )  # fmt: skip
    return info


async def _make(
    tier: DiskTier,
    store: CheckpointStore,
    plan: Plan,
    clock: Clock,
    reason: str,
    on_progress: OnProgress | None,
    number: int,
    parent: Manifest | None,
) -> Manifest:
    """Ship and publish a checkpoint that goes on from `parent`; None: a full one."""
    worker = tier.directory_id.hex()
    # Before the cut: what is sealed anew meanwhile may be shipped as it was.
    keys = _keys(tier, plan).union(parent.keys if parent else ())
    cut = await take_cut(tier, parent.sequence if parent else 0)
    try:
        created = clock.wall()
        made = make_id(number, time_text(created), worker, secrets.token_bytes(4))
        shipping = Shipping(tier, store, plan, clock, made, on_progress)
        chunks = await shipping.ship(cut)
    finally:
        cut.close()
    manifest = Manifest(
        id=made,
        parent=parent.id if parent else "",
        base=parent.base if parent else made,
        since=cut.since,
        sequence=cut.sequence,
        created=created,
        reason=reason,
        sessions=cut.sessions,
        namespace=plan.namespace,
        worker=worker,
        chunks=(*(parent.chunks if parent else ()), *chunks),
        keys=tuple(sorted(keys)),
    )
    await store.publish(made, encode_manifest(manifest, plan.sealer))
    return manifest


def _keys(tier: DiskTier, plan: Plan) -> set[bytes]:
    """Return the ids of the keys that a full checkpoint would need now."""
    return set() if plan.sealer is None else {plan.sealer.newest, *tier.keys_in_use}


async def _is_whole(store: CheckpointStore, manifest: Manifest) -> bool:
    """Whether a checkpoint that has just been published has all that it lists, and keeps it.

    The race: while it was made, another process deleted the checkpoint that it goes on from. Who
    deletes withdraws a manifest, looks at what the others list, and removes the rest. So if the
    parent's manifest is still there now, whoever deletes it will see this one; if not, nobody can
    tell whether they did.
    """
    if manifest.parent and manifest.parent not in await store.manifests():
        return False
    return await _has_all_chunks(store, manifest)


async def _has_all_chunks(store: CheckpointStore, manifest: Manifest) -> bool:
    keys = [ChunkKey(chunk.checkpoint, chunk.number) for chunk in manifest.chunks]
    return await store.chunk_bytes(keys) == [chunk.stored_bytes for chunk in manifest.chunks]


@contextmanager
def _reading_log(tier: DiskTier) -> Iterator[None]:
    """Let callers know in the engine's own words that the log cannot be read."""
    try:
        yield
    except OSError as error:
        what = (
            f"{tier.directory}: the log cannot be read ({error.strerror}): no checkpoint was made"
        )
        raise DirectoryNotUsable(f"{what}; those before it are as they were") from error


async def _parent(
    tier: DiskTier, store: CheckpointStore, catalogue: Catalogue, keys: set[bytes], *, is_last: bool
) -> Manifest | None:
    """Return the checkpoint to go on from; None: make a full one.

    That is the one of which the directory says that it is its newest, in this store; if it is
    still there with all its chunks, needs no other `keys` than a full one would, and what has been
    shipped on top of its base is not yet as much as the base, or that does not matter now.
    """
    newest = tier.shipped.newest
    if newest is None or newest.store != store.name:
        return None
    parent = catalogue.manifests.get(newest.id)
    if parent is None or parent.worker != tier.directory_id.hex():
        return None
    if parent.sequence != newest.sequence or newest.sequence > tier.writer.sequence:
        return None
    if not keys.issuperset(parent.keys) and not is_last:
        # A key that the log needs no more would be needed for as long as others go on from this.
        return None
    if parent.total_bytes - parent.base_bytes >= parent.base_bytes and not is_last:
        return None
    if not await _has_all_chunks(store, parent):
        _log.warning(
            "checkpoint %s has lost chunks or cannot read them: the next one is full", parent.id
        )
        return None
    return parent


async def _remember(tier: DiskTier, shipped: Shipped) -> None:
    try:
        await undisturbed(tier.shipped.advance(shipped))
    except OSError as error:
        # Published it is. The next one goes on from the one before, or is a full one.
        _log.warning("%s: checkpoint %s not noted: %s", tier.directory, shipped.id, error.strerror)
    else:
        tier.tombstones_shipped()


async def _tidy(store: CheckpointStore, plan: Plan, worker: str, clock: Clock) -> None:
    try:
        await prune(store, worker, plan.keep, clock.wall(), plan.sealer)
    except Exception as error:  # noqa: BLE001 - the checkpoint is made; the next one tidies again
        _log.warning("old checkpoints could not be dropped: %s", error)


@dataclass(slots=True)
class _Chunk:
    """What goes into a chunk; `segments` counts the runs of each."""

    number: int
    pieces: list[tuple[Part, Run]]
    segments: Counter[int]
    frames: int = 0
    nbytes: int = 0

    def add(self, part: Part, run: Run) -> None:
        self.pieces.append((part, run))
        self.segments[part.segment.number] += 1
        self.frames += run.frames
        self.nbytes += run.nbytes


class Shipping:
    """Ships the chunks of one checkpoint: some are packed, in threads, while others travel."""

    def __init__(
        self,
        tier: DiskTier,
        store: CheckpointStore,
        plan: Plan,
        clock: Clock,
        checkpoint_id: str,
        on_progress: OnProgress | None,
    ) -> None:
        self._tier = tier
        self._store = store
        self._plan = plan
        self._id = checkpoint_id
        self._on_progress = on_progress
        self._slices = Slices(clock.monotonic)
        self._packing = asyncio.Semaphore(_MAX_PACKED_AT_ONCE)
        self._buffers: list[bytearray] = []
        self._underway: set[asyncio.Task[ChunkRef]] = set()
        self._refs: list[ChunkRef] = []
        self._unread: Counter[int] = Counter()  # segment -> chunks that have still to read it
        self._done_bytes = 0
        self._total_bytes = 0

    async def ship(self, cut: Cut) -> list[ChunkRef]:
        """Ship everything in the cut; its parts are released as soon as they have been read."""
        self._total_bytes = sum(part.end for part in cut.parts)
        try:
            async with aclosing(self._chunks(cut)) as chunks:
                async for chunk in chunks:
                    while len(self._underway) >= _MAX_UNDERWAY:
                        await self._some_shipped()
                    task = asyncio.create_task(
                        self._ship(cut, chunk), name="persistence-ship-chunk"
                    )
                    self._underway.add(task)
            while self._underway:
                await self._some_shipped()
        finally:
            for task in self._underway:
                task.cancel()
            await asyncio.gather(*self._underway, return_exceptions=True)
        return sorted(self._refs, key=attrgetter("number"))

    async def _some_shipped(self) -> None:
        done, self._underway = await asyncio.wait(
            self._underway, return_when=asyncio.FIRST_COMPLETED
        )
        self._refs += [task.result() for task in done]

    async def _ship(self, cut: Cut, chunk: _Chunk) -> ChunkRef:
        async with self._packing:
            data = await self._packed(chunk)
        for number in chunk.segments:
            self._read(cut, number)
        await self._store.put_chunk(ChunkKey(self._id, chunk.number), data)
        self._report(chunk.nbytes)
        return ref_of(data, self._id, chunk.number)

    def _read(self, cut: Cut, number: int) -> None:
        """Note that one who had to read a segment has done so; the last one releases it."""
        self._unread[number] -= 1
        if not self._unread[number]:
            cut.release(number)

    def _report(self, nbytes: int) -> None:
        self._done_bytes += nbytes
        if self._on_progress is not None:
            total = max(self._total_bytes, self._done_bytes)
            self._on_progress(Progress(self._done_bytes, total))

    async def _chunks(self, cut: Cut) -> AsyncGenerator[_Chunk, None]:
        """Gather runs to chunks."""
        chunk = _Chunk(0, [], Counter())
        for part in cut.parts:
            number = part.segment.number
            self._unread[number] += 1  # ourselves: more of it may come
            async with aclosing(runs_of(self._tier, cut, part, self._slices)) as runs:
                async for run in runs:
                    if chunk.nbytes and chunk.nbytes + run.nbytes > CHUNK_BYTES:
                        yield chunk
                        chunk = _Chunk(chunk.number + 1, [], Counter())
                    if not chunk.segments[number]:
                        self._unread[number] += 1
                    chunk.add(part, run)
            self._read(cut, number)
        if chunk.nbytes:
            yield chunk

    async def _packed(self, chunk: _Chunk) -> bytes:
        """Read and pack a chunk, in a thread."""
        by_segment: dict[int, tuple[Part, list[Run]]] = {}
        for part, run in chunk.pieces:
            by_segment.setdefault(part.segment.number, (part, []))[1].append(run)
        # The same memory again and again: fresh pages would cost as much as the compression.
        buffer = self._buffers.pop() if self._buffers else bytearray(_BUFFER_BYTES)
        with ExitStack() as files:
            files.callback(self._buffers.append, buffer)
            sources = [
                _Source(
                    files.enter_context(self._tier.pinned_file(number)),
                    part.segment.salt_checksum,
                    runs,
                )
                for number, (part, runs) in by_segment.items()
            ]
            return await undisturbed(
                self._tier.threads.read(
                    _pack,
                    self._tier.files,
                    sources,
                    buffer,
                    partial(
                        encode_chunk,
                        frames=chunk.frames,
                        compress=self._plan.compress,
                        sealer=self._plan.sealer,
                        name=chunk_name(self._id, chunk.number),
                    ),
                )
            )


# --- in a thread ----------------------------------------------------------------------------------


class _Source(NamedTuple):
    """Runs of one segment, in the order of the file."""

    fd: int
    salt_checksum: int
    runs: list[Run]


def _pack(
    files: Files,
    sources: list[_Source],
    buffer: bytearray,
    encode: Callable[[list[PackedRun]], bytes],
) -> bytes:
    """Read and encode a chunk. What one read brings is packed where it was read to."""
    runs = []
    used = 0
    with memoryview(buffer) as whole:
        for source in sources:
            for start, end, pieces in _groups(source.runs):
                data = _taken(whole, used, end - start)
                used += end - start
                if not fill(files, source.fd, data, start):
                    raise OSError(errno.EIO, f"a segment is shorter than {end} bytes")
                runs += [
                    PackedRun(source.salt_checksum, data[first - start : last - start])
                    for first, last in pieces
                ]
            literals = b"".join([run.literal for run in source.runs])
            if literals:
                runs.append(PackedRun(source.salt_checksum, literals))
        return encode(runs)


def _taken(buffer: memoryview, used: int, nbytes: int) -> memoryview:
    """Take `nbytes` of the buffer, or fresh memory where it is too small."""
    if used + nbytes <= len(buffer):
        return buffer[used : used + nbytes]
    return memoryview(bytearray(nbytes))


def _groups(runs: list[Run]) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Group runs that are read together: (start, end, what is wanted of it), gaps left out."""
    group: list[tuple[int, int]] = []
    for run in runs:
        if run.literal:
            continue
        if group and not 0 <= run.start - group[-1][1] <= _MAX_GAP_BYTES:
            yield group[0][0], group[-1][1], group
            group = []
        if group and run.start == group[-1][1]:
            group[-1] = (group[-1][0], run.end)
        else:
            group.append((run.start, run.end))
    if group:
        yield group[0][0], group[-1][1], group
