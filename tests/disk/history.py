"""A real log with its truth beside it: what each frame must mean, and what is left of any part.

`write_history` lets a manager write a log of one segment and notes, for each commit, what the
caller was told. `fold` is the reference of recovery: the same rules, in the plainest way.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from persistence import ManualClock, StateManager
from persistence.disk.filenames import segment_name
from persistence.disk.files import Files
from persistence.disk.format import (
    ROW_RENEWS,
    SEGMENT_HEADER_BYTES,
    Corrupt,
    Frame,
    FrameType,
    SegmentHeader,
    Torn,
    decode_segment_header,
)
from persistence.disk.index import SHARDS, Fingerprints
from persistence.disk.manifest import Manifest, decode_manifest
from persistence.disk.reader import scan_frames
from persistence.disk.recovery import Recovered, Recovery
from persistence.record import commit_of
from tests.disk.memoryfiles import MemoryFiles
from tests.support import PATH, config, opened

TTL_SECONDS: Final = 100_000.0
_TOUCH_AFTER_SECONDS: Final = TTL_SECONDS / 16 + 1
SEGMENT_PATH: Final = f"{PATH}/{segment_name(1)}"
Data = dict[str, Any]


class Placed(NamedTuple):
    """A frame and where it is."""

    offset: int
    frame: Frame

    @property
    def end(self) -> int:
        """The offset behind the frame."""
        return self.offset + self.frame.length


@dataclass(frozen=True)
class History:
    """A log of one segment, as a killed process left it.

    Attributes:
        files: the disk; copy it (`MemoryFiles.after_kill`) before changing anything.
        log: the bytes of the segment.
        frames: in order.
        told: what the caller was told that a commit wrote: commit id -> (session id, data).
        clock: the time at the end.
    """

    files: MemoryFiles
    log: bytes
    header: SegmentHeader
    frames: list[Placed]
    told: dict[bytes, tuple[str, Data]]
    clock: ManualClock

    @property
    def session_ids(self) -> list[str]:
        """Every session id that was ever used."""
        return sorted({sid for sid, _ in self.told.values()})

    @property
    def manifest(self) -> Manifest:
        """The manifest that the log was written under."""
        return decode_manifest(self.files.data(f"{PATH}/MANIFEST"))

    def disk_with(self, log: bytes) -> MemoryFiles:
        """Return the disk with other bytes in the place of the log."""
        files = self.files.after_kill()
        files.set_data(SEGMENT_PATH, log)
        return files

    def data_of(self, rows: dict[bytes, ExpectedRow]) -> dict[str, Data]:
        """Return what the caller was told of the sessions in `rows`."""
        return {key.decode(): self.told[row.commit][1] for key, row in rows.items()}


@dataclass(frozen=True)
class ExpectedRow:
    """What the index must say of a session; `commit` says which version it is."""

    commit: bytes
    sequence: int
    accessed: float
    deadline: float
    offset: int
    length: int


def fold(frames: Iterable[Placed]) -> dict[bytes, ExpectedRow]:
    """Return what frames of one segment amount to after a crash, by key."""
    rows: dict[bytes, ExpectedRow] = {}
    renews: dict[bytes, tuple[bool, float]] = {}
    for offset, frame in sorted(frames, key=lambda placed: placed.frame.sequence):
        if frame.type == FrameType.PUT:
            rows[frame.key] = ExpectedRow(
                frame.commit,
                frame.sequence,
                frame.accessed,
                frame.deadline,
                offset,
                frame.length,
            )
            renews[frame.key] = bool(frame.user & ROW_RENEWS), frame.cap
        elif frame.type == FrameType.DELETE:
            rows.pop(frame.key, None)
        elif frame.type == FrameType.TOUCH and frame.key in rows:
            old = rows[frame.key]
            rows[frame.key] = ExpectedRow(
                old.commit, old.sequence, frame.accessed, frame.deadline, old.offset, old.length
            )
    return {key: _granted(row, *renews[key]) for key, row in rows.items()}


def _granted(row: ExpectedRow, renews: bool, cap: float) -> ExpectedRow:
    if not renews or row.deadline >= cap:
        return row
    deadline = min(cap, row.deadline + (row.deadline - row.accessed) / 8)
    return ExpectedRow(row.commit, row.sequence, row.accessed, deadline, row.offset, row.length)


class _Bytes(Files):
    """One file: these bytes."""

    def __init__(self, data: bytes | bytearray) -> None:
        self._view = memoryview(data)

    def read_at(self, fd: int, size: int, offset: int) -> bytes:
        return bytes(self._view[offset : offset + size])


def scan(
    data: bytes | bytearray,
    salt_checksum: int,
    *,
    size: int | None = None,
    start: int = SEGMENT_HEADER_BYTES,
) -> list[tuple[int, Frame | Corrupt | Torn]]:
    """Return what recovery's scan finds in the first `size` bytes of a segment."""
    end = len(data) if size is None else size
    return list(scan_frames(_Bytes(data), 0, end, salt_checksum, start))


def recover(files: MemoryFiles) -> Recovered:
    """Recover the directory, in this thread."""
    manifest = decode_manifest(files.data(f"{PATH}/MANIFEST"))
    recovery = Recovery(files, PATH, manifest, Fingerprints(manifest.fingerprint_key))
    for _ in recovery.steps():
        pass
    return recovery.result


def rows_by_key(
    recovered: Recovered, manifest: Manifest, keys: Sequence[bytes]
) -> dict[bytes, tuple[int, float, float, int, int]]:
    """Return (sequence, accessed, deadline, offset, length) of the rows in an index, by key."""
    fingerprints = Fingerprints(manifest.fingerprint_key)
    found = {}
    for key in keys:
        row = recovered.index.get(fingerprints.of(key))
        if row is not None:
            found[key] = (row.sequence, row.accessed, row.deadline, row.offset, row.length)
    assert len(found) == len(recovered.index), "there are sessions that nobody knows"
    return found


def expected_rows(
    rows: dict[bytes, ExpectedRow],
) -> dict[bytes, tuple[int, float, float, int, int]]:
    """Return `rows` as `rows_by_key` does."""
    return {
        key: (row.sequence, row.accessed, row.deadline, row.offset, row.length)
        for key, row in rows.items()
    }


def all_rows_equal(one: Recovered, other: Recovered) -> bool:
    """Whether two recoveries found the same, down to every column of every row."""
    return [one.index.rows_of_shard(shard) for shard in range(SHARDS)] == [
        other.index.rows_of_shard(shard) for shard in range(SHARDS)
    ]


# --- writing one ----------------------------------------------------------------------------------


def write_history(log_bytes: int = 64 * 1024, seed: int = 1) -> History:
    """Write a log of about `log_bytes`: creations, updates, renewals, ends and new beginnings."""
    return asyncio.run(_write_history(log_bytes, seed))


async def _write_history(log_bytes: int, seed: int) -> History:
    files = MemoryFiles()
    clock = ManualClock()
    told: dict[bytes, tuple[str, Data]] = {}
    configuration = config(ttl_seconds=TTL_SECONDS, segment_bytes=2**20)
    async with opened(files, configuration, clock=clock) as state:
        author = _Author(state, clock, random.Random(seed), told)
        while len(files.contents(PATH).get(SEGMENT_PATH, b"")) < log_bytes:
            await author.write_something()
        files.kill()
        left = files.after_kill()
    log = left.data(SEGMENT_PATH)
    header = decode_segment_header(log)
    assert header is not None
    found = scan(log, header.salt_checksum)
    frames = [Placed(offset, frame) for offset, frame in found if isinstance(frame, Frame)]
    assert len(frames) == len(found)
    # And patches, where small sessions have them.
    assert {placed.frame.type for placed in frames} - {FrameType.PATCH} == {
        FrameType.PUT,
        FrameType.DELETE,
        FrameType.TOUCH,
    }
    return History(left, log, header, frames, told, clock)


class _Author:
    def __init__(
        self,
        state: StateManager,
        clock: ManualClock,
        chance: random.Random,
        told: dict[bytes, tuple[str, Data]],
    ) -> None:
        self._state = state
        self._clock = clock
        self._chance = chance
        self._told = told
        self._alive: list[str] = []
        self._ended: list[str] = []
        self._touches_left = 12
        self._count = 0

    async def write_something(self) -> None:
        chance = self._chance
        what = chance.choices(
            [self._create, self._update, self._update_some, self._touch, self._end, self._set_ttl],
            [3 if len(self._alive) < 24 else 0.2, 6, 2, 0.7, 1, 0.5],
        )[0]
        self._clock.advance(chance.random() * 10)
        await what()

    def _value(self) -> Any:
        self._count += 1
        kind = self._chance.random()
        if kind < 0.6:
            return {"n": self._count, "items": list(range(self._chance.randrange(20)))}
        if kind < 0.8:
            return "so it goes, " * self._chance.randrange(200)  # compresses
        return self._chance.randbytes(self._chance.randrange(1500))

    def _tell(self, sid: str, record: bytes, data: Data) -> None:
        self._told[commit_of(record)] = sid, data

    async def _create(self) -> None:
        again = self._ended and self._chance.random() < 0.5
        sid = self._ended.pop() if again else f"session {len(self._told)} ü"
        data = {"value": self._value(), "born": self._count}
        await self._state.create_session(
            session_id=sid,
            user_id=f"user {self._count % 3}",
            data=data,
            ttl_seconds=self._chance.choice([None, None, 0]),
            auto_renew=self._chance.choice([None, None, None, False]),
        )
        session = await self._state.get_session(sid)
        assert session is not None
        self._tell(sid, session._record, data)
        self._alive.append(sid)

    async def _update(self) -> None:
        if self._alive:
            sid = self._chance.choice(self._alive)
            session = await self._state.update_session_data(sid, "value", self._value())
            self._tell(sid, session._record, session.data)

    async def _update_some(self) -> None:
        """Several at once: they share a batch, and one sync."""
        sids = self._chance.sample(self._alive, min(4, len(self._alive)))
        sessions = await asyncio.gather(
            *(self._state.update_session_data(sid, "value", self._value()) for sid in sids)
        )
        for sid, session in zip(sids, sessions, strict=True):
            self._tell(sid, session._record, session.data)

    async def _touch(self) -> None:
        if not self._touches_left or not self._alive:
            return
        self._touches_left -= 1
        self._clock.advance(_TOUCH_AFTER_SECONDS / 2)
        for sid in self._chance.sample(self._alive, min(3, len(self._alive))):
            await self._state.get_session(sid)
        await self._state.flush()

    async def _end(self) -> None:
        if len(self._alive) > 3:
            sid = self._alive.pop(self._chance.randrange(len(self._alive)))
            assert await self._state.terminate_session(sid)
            self._ended.append(sid)

    async def _set_ttl(self) -> None:
        if self._alive:
            sid = self._chance.choice(self._alive)
            await self._state.set_ttl(sid, TTL_SECONDS * 2)
            session = await self._state.get_session(sid)
            assert session is not None
            self._tell(sid, session._record, session.data)
