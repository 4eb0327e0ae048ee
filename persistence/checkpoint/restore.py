"""Going back to a checkpoint: into a fresh directory, or into one that is in use.

Everything is fetched and verified first: each chunk by its checksum, its count of frames, each
frame by its own checksums. What was fetched lies in a temporary file of the directory, what was
verified in staged segments (`disk.install`). Only then, and at once, is it installed.

A checkpoint with a damaged manifest or chunk is not restored in part: the one before is, and that
is said in the log and in `RestoredInfo.skipped`. One of a newer format is refused, without falling
back: nothing is wrong with it.

A checkpoint may be withdrawn while it is fetched: its worker has made newer ones, and keeps so many
only. That is no damage. What there is then is looked at again, and "latest" means a newer one.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from typing import Final

from persistence.checkpoint.catalogue import LATEST, Catalogue, info_of
from persistence.checkpoint.create import OnProgress, Progress
from persistence.checkpoint.manifest import (
    ChunkRef,
    MalformedCheckpoint,
    Manifest,
    PackedRun,
    decode_chunk,
    total_frames,
)
from persistence.checkpoint.state import State, Walked, walk
from persistence.checkpoint.stores import (
    CheckpointStore,
    ChunkKey,
    ChunkMissing,
    ChunkUnreadable,
)
from persistence.clock import Clock
from persistence.disk.directory import (
    DirectoryLock,
    check_ours,
    make_directory,
    not_usable,
    open_manifest,
)
from persistence.disk.filenames import parse_segment
from persistence.disk.files import NO_SPACE, Files
from persistence.disk.format import Frame, OtherFormat
from persistence.disk.index import Fingerprints
from persistence.disk.install import Staging, install, install_fresh, staging_for
from persistence.disk.manifest import Manifest as DirectoryManifest
from persistence.disk.sealed import RecordCodec
from persistence.disk.spool import Spool
from persistence.disk.threads import Threads, undisturbed
from persistence.disk.tier import DiskTier
from persistence.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    DirectoryNotUsable,
    DiskFull,
)
from persistence.sealer import Sealer, Seals
from persistence.slices import Slices

_log = logging.getLogger("persistence.checkpoint")

_SEGMENT_BYTES: Final = 64 * 2**20
_LOOK_EVERY: Final = 16  # frames between two looks at the clock
_MAX_WITHDRAWN: Final = 10  # a restore that is slower than all these checkpoints is given up

NewIds = Callable[[Frame], bytes]
"""Returns the ids (incarnation, commit, base, one behind the other) a restored session gets."""


@dataclass(frozen=True, slots=True)
class RestoredInfo:
    """What was restored.

    Attributes:
        id: the checkpoint.
        created_at: when it was cut.
        sessions: how many sessions there are now; expired ones among them.
        bytes: how much was fetched, as stored.
        skipped: (id, reason) of each newer checkpoint that was passed over because it is damaged.
        damaged: sessions that were damaged before they were shipped, and are left out.
        unnamed: how many more such frames there are, whose sessions are not known.
    """

    id: str
    created_at: datetime
    sessions: int
    bytes: int
    skipped: tuple[tuple[str, str], ...] = ()
    damaged: tuple[str, ...] = ()
    unnamed: int = 0


@dataclass(frozen=True, slots=True)
class Candidates:
    """Which checkpoints may be restored.

    Attributes:
        catalogue: what there is.
        wanted: an id, or "latest".
        ids: the one that is wanted, and those that are taken if it is damaged, in this order.
        fall_back: whether there may be any of those.
        must_be_sealed: whether plain ones count as damaged.
    """

    catalogue: Catalogue
    wanted: str
    ids: list[str]
    fall_back: bool
    must_be_sealed: bool

    @staticmethod
    async def find(
        store: CheckpointStore, wanted: str, *, fall_back: bool, seals: Seals | None = None
    ) -> Candidates:
        """Look for `wanted`.

        Raises:
            CheckpointNotFound: there is none of that id.
        """
        sealer = None if seals is None else seals.checkpoints
        catalogue = await Catalogue.load(store, sealer)
        ids = catalogue.newest_first(wanted)
        return Candidates(
            catalogue, wanted, ids if fall_back else ids[:1], fall_back, seals is not None
        )

    def require_any(self) -> None:
        """Make sure that the manifest of one of them is intact.

        Raises:
            CheckpointDamaged: none is, or the next one is of a newer format or other keys.
        """
        problems = []
        for candidate in self.ids:
            problem = self.problem_of(candidate)
            if problem is None:
                return
            problems.append((candidate, problem))
        raise self.none_intact(problems)

    def problem_of(self, candidate: str) -> str | None:
        """Return what is wrong with the manifest of one of them; None: nothing.

        Raises:
            CheckpointDamaged: it is of a newer format or other keys, so that nobody can tell.
        """
        newer = self.catalogue.newer.get(candidate)
        if newer is not None:
            raise CheckpointDamaged(
                f"checkpoint {candidate} cannot be read: {newer}; nothing was changed"
            )
        problem = self.catalogue.damaged.get(candidate)
        if problem is not None or not self.must_be_sealed:
            return problem
        is_sealed = self.catalogue.manifests[candidate].is_sealed
        return None if is_sealed else "it is not encrypted, and security.encrypt is on"

    def none_intact(self, problems: list[tuple[str, str]]) -> CheckpointDamaged:
        """Return the error for when each of them has one of `problems`."""
        newest, problem = problems[0]
        return CheckpointDamaged(
            f"checkpoint {newest} is damaged ({problem}), and so "
            f"{'are all before it' if self.fall_back else 'it is not restored'}; "
            "nothing was changed"
        )


class _Withdrawn(Exception):
    """A checkpoint was withdrawn while it was fetched."""


class Restorer:
    """Fetches, verifies and stages one checkpoint of a store."""

    def __init__(
        self,
        store: CheckpointStore,
        threads: Threads,
        spool: Spool,
        fingerprints: Fingerprints,
        clock: Clock,
        on_progress: OnProgress | None = None,
        seals: Seals | None = None,
    ) -> None:
        self._seals = seals
        self._store = store
        self._threads = threads
        self._spool = spool
        self._fingerprints = fingerprints
        self._slices = Slices(clock.monotonic)
        self._on_progress = on_progress

    async def stage(
        self, candidates: Candidates, staging: Staging, new_ids: NewIds, skew: float
    ) -> RestoredInfo:
        """Stage the first of the candidates that is intact.

        Raises:
            CheckpointDamaged: none is.
            CheckpointNotFound: it was deleted meanwhile.
        """
        try:
            manifest, state, places, skipped = await self._verified(candidates)
            codec = self._codec_of(manifest)
            for ref, place in zip(manifest.chunks, places, strict=True):
                await self._stage_chunk(ref, place, state, staging, new_ids, skew, codec)
            await staging.finish()
        finally:
            await undisturbed(self._threads.read(self._spool.close))
        info = info_of(manifest)
        restored = RestoredInfo(
            id=manifest.id,
            created_at=info.created_at,
            sessions=len(staging.index),
            bytes=info.total_bytes,
            skipped=tuple(skipped),
            damaged=tuple(state.damaged),
            unnamed=state.unnamed,
        )
        for name in restored.damaged:
            _log.error("checkpoint %s: session %s was damaged, and is left out", info.id, name)
        if restored.unnamed:
            _log.error("checkpoint %s: %d frames were damaged", info.id, restored.unnamed)
        return restored

    # --- fetching and verifying ---------------------------------------------------------------

    async def _verified(
        self, candidates: Candidates
    ) -> tuple[Manifest, State, list[int], list[tuple[str, str]]]:
        """Return the first of the candidates that is intact, fetched into the spool.

        When one is withdrawn meanwhile, those that are there then are the candidates.
        """
        for _ in range(_MAX_WITHDRAWN):
            try:
                return await self._first_intact(candidates)
            except _Withdrawn as gone:
                _log.info("checkpoint %s was withdrawn while it was fetched", gone)
            candidates = await Candidates.find(
                self._store, candidates.wanted, fall_back=candidates.fall_back, seals=self._seals
            )
        raise CheckpointNotFound(
            f"{_MAX_WITHDRAWN} checkpoints were deleted while they were restored, one after "
            "another; nothing was changed; restore again while fewer are made, or raise "
            "checkpoint.keep where they are made"
        )

    async def _first_intact(
        self, candidates: Candidates
    ) -> tuple[Manifest, State, list[int], list[tuple[str, str]]]:
        skipped: list[tuple[str, str]] = []
        for candidate in candidates.ids:
            reason = candidates.problem_of(candidate)
            if reason is None:
                manifest = candidates.catalogue.manifests[candidate]
                try:
                    state, places = await self._fetch(manifest)
                except MalformedCheckpoint as error:
                    reason = str(error)
                else:
                    return manifest, state, places, skipped
            skipped.append((candidate, reason))
            _log.error("checkpoint %s is damaged, trying the one before: %s", candidate, reason)
        raise candidates.none_intact(skipped)

    def _codec_of(self, manifest: Manifest) -> RecordCodec | None:
        """Return what opens the frames of a checkpoint; None: they are not sealed."""
        if self._seals is None:
            return None
        return RecordCodec(self._seals.records, bytes.fromhex(manifest.worker))

    async def _fetch(self, manifest: Manifest) -> tuple[State, list[int]]:
        """Fetch and verify all chunks; return what state they make up, and where they are."""
        self._spool.clear()
        state = State(self._fingerprints, total_frames(manifest.chunks))
        places = []
        done_bytes = 0
        codec = self._codec_of(manifest)
        for ref in manifest.chunks:
            data = await self._get(ref, manifest.id)
            runs = await self._decoded(data, ref)
            walked = Walked()
            for number, found in enumerate(walk(runs, walked, codec)):
                state.note(found)
                if number % _LOOK_EVERY == 0:
                    await self._slices.give_way_if_due()
            if walked.frames != ref.frames and not walked.defects:
                raise MalformedCheckpoint(
                    f"chunk {ref.number} of {ref.checkpoint} has {walked.frames} frames instead "
                    f"of {ref.frames}"
                )
            places.append(await undisturbed(self._threads.read(self._spool.append, data)))
            done_bytes += ref.stored_bytes
            if self._on_progress is not None:
                self._on_progress(Progress(done_bytes, manifest.total_bytes))
        return state, places

    async def _get(self, ref: ChunkRef, checkpoint_id: str) -> bytes:
        """Return a chunk that a checkpoint needs."""
        try:
            return await self._store.get_chunk(ChunkKey(ref.checkpoint, ref.number))
        except ChunkMissing as error:
            # Whoever deletes one withdraws its manifest first, and removes its chunks behind that.
            if checkpoint_id not in await self._store.manifests():
                raise _Withdrawn(checkpoint_id) from error
            raise MalformedCheckpoint(f"chunk {error} is missing") from error
        except ChunkUnreadable as error:
            raise MalformedCheckpoint(f"chunk {ref.number} of {ref.checkpoint}: {error}") from error

    async def _decoded(self, data: bytes, ref: ChunkRef) -> list[PackedRun]:
        try:
            sealer = None if self._seals is None else self._seals.checkpoints
            return await undisturbed(self._threads.read(decode_chunk, data, ref, sealer))
        except (MalformedCheckpoint, OtherFormat) as error:
            raise MalformedCheckpoint(f"chunk {ref.number} of {ref.checkpoint}: {error}") from error

    # --- staging ------------------------------------------------------------------------------

    async def _stage_chunk(
        self,
        ref: ChunkRef,
        place: int,
        state: State,
        staging: Staging,
        new_ids: NewIds,
        skew: float,
        codec: RecordCodec | None,
    ) -> None:
        data = await undisturbed(self._threads.read(self._spool.read, place, ref.stored_bytes))
        runs = await self._decoded(data, ref)
        for number, found in enumerate(walk(runs, Walked(), codec)):
            winner = state.winner(found) if isinstance(found, Frame) else None
            # The same frame may have been shipped twice, when a merge did not get to its end.
            if winner is not None and staging.index.place(winner[0]) is None:
                fingerprint, frame = winner
                await staging.add(fingerprint, frame, new_ids(frame), skew)
            if number % _LOOK_EVERY == 0:
                await self._slices.give_way_if_due()


def same_ids(frame: Frame) -> bytes:
    """Keep a session's ids: the restored state is the one that was shipped."""
    return frame.ids


# --- into a fresh directory -----------------------------------------------------------------------


async def restore_into(  # noqa: PLR0913 - each a thing of its own
    store: CheckpointStore,
    directory: str,
    clock: Clock,
    wanted: str = LATEST,
    *,
    files: Files | None = None,
    segment_bytes: int = _SEGMENT_BYTES,
    fall_back: bool = True,
    on_progress: OnProgress | None = None,
    seals: Seals | None = None,
) -> RestoredInfo:
    """Restore into a directory that is new, or holds no sessions: every byte as it was shipped.

    Args:
        store: where the checkpoint is.
        directory: where to; nothing may have it open.
        clock: time, for slices only.
        wanted: an id, or "latest".
        files: system calls on files.
        segment_bytes: size of a segment.
        fall_back: whether the one before is taken when one is damaged.
        on_progress: told how far it is.
        seals: open what was sealed, and seal what is restored; None: nothing is sealed.

    Raises:
        CheckpointNotFound: there is none of that id, or it was deleted meanwhile.
        CheckpointDamaged: it is damaged, and so are all before it.
        DirectoryNotUsable: the directory has sessions already, or cannot be used.
        DirectoryLocked: it is open elsewhere.
        DiskFull: there is no space.
        RemoteUnavailable: the store does not answer.
    """
    # First of all: without a checkpoint no directory is made. One that is made is encrypted or
    # plain for good, so keys that are missing should not make it either.
    candidates = await Candidates.find(store, wanted, fall_back=fall_back, seals=seals)
    candidates.require_any()
    records = None if seals is None else seals.records
    files = files or Files()
    directory = _absolute(directory)
    threads = Threads()
    try:
        lock, manifest = await undisturbed(threads.read(_lock_fresh, files, directory, records))
        try:
            return await _restore_fresh(
                Restorer(
                    store,
                    threads,
                    Spool(files, directory),
                    Fingerprints(manifest.fingerprint_key),
                    clock,
                    on_progress,
                    seals,
                ),
                Staging(
                    files,
                    threads,
                    directory,
                    manifest.directory_id,
                    next_number=count(manifest.next_number).__next__,
                    after_sequence=0,
                    segment_bytes=segment_bytes,
                    codec=None if records is None else RecordCodec(records, manifest.directory_id),
                ),
                lambda staging: install_fresh(files, directory, manifest, staging),
                threads,
                candidates,
            )
        finally:
            lock.release()
    except OSError as error:
        raise not_usable(directory, error) from error
    finally:
        await asyncio.to_thread(threads.close)


async def _restore_fresh(
    restorer: Restorer,
    staging: Staging,
    put_in_place: Callable[[Staging], None],
    threads: Threads,
    candidates: Candidates,
) -> RestoredInfo:
    try:
        restored = await restorer.stage(candidates, staging, same_ids, 0.0)
        await undisturbed(threads.read(put_in_place, staging))
    except BaseException:
        with suppress(OSError):  # the first error is the one to report; the next opening tidies
            await staging.abandon()
        raise
    return restored


def _absolute(path: str) -> str:
    return os.path.abspath(path)


def _lock_fresh(
    files: Files, directory: str, sealer: Sealer | None
) -> tuple[DirectoryLock, DirectoryManifest]:
    make_directory(files, directory)
    check_ours(files, directory)
    lock = DirectoryLock(files, directory)
    try:
        manifest, _ = open_manifest(files, directory, sealer)
        numbers = map(parse_segment, files.list_directory(directory))
        # Of a restore that was killed there may be segments that no manifest knows as live.
        if manifest.sealed or any(
            number is not None and number >= manifest.next_number for number in numbers
        ):
            raise DirectoryNotUsable(  # noqa: TRY301 - the lock is given back like for any failure
                f"{directory} holds a log already; nothing was changed; restore into a new "
                "directory, or into this one with restore_checkpoint() of the worker that uses it "
                "or 'persistence checkpoints restore --live'"
            )
    except BaseException:
        lock.release()
        raise
    return lock, manifest


# --- into a directory that is in use --------------------------------------------------------------


class StagedRestore:
    """A checkpoint that is fetched, verified, and ready to replace what is there.

    Use it once: `install`, with the gate closed, or `discard`.
    """

    def __init__(self, tier: DiskTier, staging: Staging, info: RestoredInfo, clock: Clock) -> None:
        self._tier = tier
        self._staging = staging
        self._clock = clock
        self.info = info

    async def install(self) -> None:
        """Replace everything in the log and the index.

        The caller has closed the gate: no commit is in flight and none is submitted, nobody reads,
        no checkpoint is being made. Afterwards the memory tier, and whatever else holds sessions
        or unlogged renewals, must forget everything.

        Raises:
            DiskFull: everything is as it was.
            WriteOutcomeUnknown: what the next opening finds is not known; no more writes.
        """
        try:
            await install(self._tier, self._staging, Slices(self._clock.monotonic))
        except OSError as error:
            await self.discard()
            raise _unwritable(self._tier.directory, error) from error
        except BaseException:
            await self.discard()
            raise

    async def discard(self) -> None:
        """Remove what is staged; nothing has changed."""
        with suppress(OSError):  # the next opening removes it
            await self._staging.abandon()


async def stage_restore(  # noqa: PLR0913 - each a thing of its own
    tier: DiskTier,
    store: CheckpointStore,
    clock: Clock,
    wanted: str = LATEST,
    *,
    new_ids: NewIds,
    skew: float,
    segment_bytes: int = _SEGMENT_BYTES,
    fall_back: bool = True,
    on_progress: OnProgress | None = None,
    seals: Seals | None = None,
) -> StagedRestore:
    """Fetch and verify a checkpoint for a directory that is in use; nothing changes yet.

    Args:
        tier: the directory.
        store: where the checkpoint is.
        clock: time, for slices.
        wanted: an id, or "latest".
        new_ids: gives each session its ids: a new commit id, so that nothing that was built on the
            state before is accepted on top of the restored one.
        skew: wall seconds minus engine seconds, now.
        segment_bytes: size of a segment.
        fall_back: whether the one before is taken when one is damaged.
        on_progress: told how far it is.
        seals: open what was sealed; None: nothing is sealed.

    Raises:
        CheckpointNotFound, CheckpointDamaged, DiskFull, RemoteUnavailable: as `restore_into`.
    """
    candidates = await Candidates.find(store, wanted, fall_back=fall_back, seals=seals)
    staging = staging_for(tier, segment_bytes)
    restorer = Restorer(
        store,
        tier.threads,
        Spool(tier.files, tier.directory),
        tier.fingerprints,
        clock,
        on_progress,
        seals,
    )
    try:
        info = await restorer.stage(candidates, staging, new_ids, skew)
    except BaseException as error:
        with suppress(OSError):
            await staging.abandon()
        if isinstance(error, OSError):
            raise _unwritable(tier.directory, error) from error
        raise
    return StagedRestore(tier, staging, info, clock)


def _unwritable(directory: str, error: OSError) -> DiskFull | DirectoryNotUsable:
    if error.errno in NO_SPACE:
        return DiskFull(f"{directory}: no space to restore into; nothing was changed")
    return DirectoryNotUsable(f"{directory}: {error.strerror}; nothing was changed")
