"""The in-memory index of the log: where the newest frame of each session is.

It keeps no session ids. Each session is a row of 64 bytes (`format.INDEX_ROW`) under a keyed
128-bit BLAKE2b fingerprint (Aumasson, Neves, Wilcox-O'Hearn, Winnerlein 2013) of its id. The key
is random per directory, so nobody can choose ids that collide, and by chance two of ten million
sessions collide with probability 2^-82. The id in the frame is compared on every read all the same.

Rows lie in small bytearrays, the *buckets*, found by the fingerprint's low bits; inside a bucket
the C search of `bytearray.find` does the probing. A bucket holds up to about 8 rows: nearly all of
them then lie in the pools of Python's small objects, where the room that a growing bucket leaves
is used again; the heap that holds the larger ones kept holes of 25 bytes per session. 1,024 shards
double their buckets independently, so that no growth step moves more than one shard.
The garbage collector tracks one list per shard and nothing per session; a session costs about
90 bytes of memory.

Invariants: a fingerprint is in at most one row; a row lies in the bucket of its fingerprint.
Times are engine seconds (see `clock.EngineTime`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from struct import Struct, pack, unpack_from
from typing import Final, NamedTuple

from persistence.disk.format import (
    INDEX_ROW,
    INDEX_ROW_BYTES,
    ROW_LENGTH_BITS,
    ROW_RENEWS,
    USER_BITS,
)

SHARDS: Final = 1024
_SHARD_BITS: Final = 10
_SHARD_MASK: Final = SHARDS - 1
_ROWS_PER_BUCKET: Final = 8
_FINGERPRINT_BYTES: Final = 16

_from_bytes = int.from_bytes
_unpack = INDEX_ROW.unpack_from
TIMES: Final = Struct("<dd")
_SEQUENCE: Final = Struct("<Q")
_unpack_sequence = _SEQUENCE.unpack_from
_SEQUENCE_AT: Final = 16
TIMES_AT: Final = 24
_PLACE: Final = Struct("<III")
_SEGMENT_OFFSET: Final = Struct("<II")
_unpack_place = _PLACE.unpack_from
_PLACE_AT: Final = 48
_THREE_TIMES: Final = Struct("<ddd")
_BEHIND_SEQUENCE: Final = Struct("<dddIIII")
_unpack_behind_sequence = _BEHIND_SEQUENCE.unpack_from

assert INDEX_ROW_BYTES == 64
assert 1 << _SHARD_BITS == SHARDS


_new_row = tuple.__new__  # Row._make checks the length first, in Python


_EMPTY: Final = bytearray()
"""The one empty bucket, in as many places as there are. A bucket with rows is changed in place,
this one never: what is put into it takes its place."""
_IMAGE_START: Final = Struct("<II")
_EMPTY_START: Final = (1, 0)  # one bucket, and nothing in it: most shards of a small directory
_EMPTY_IMAGE: Final = _IMAGE_START.pack(*_EMPTY_START)


class Row(NamedTuple):
    """One session's entry. Times are engine seconds."""

    fingerprint: bytes
    sequence: int
    accessed: float
    deadline: float
    cap: float
    segment: int
    offset: int
    length: int
    user: int

    @property
    def live_bytes(self) -> int:
        """Bytes in the segment that this session needs: its frame, and what that is built on."""
        return self.length & ROW_LENGTH_BITS


class Fingerprints:
    """Turns session ids into fingerprints, with the directory's secret key."""

    def __init__(self, key: bytes) -> None:
        self._copy = hashlib.blake2b(digest_size=_FINGERPRINT_BYTES, key=key).copy

    def of(self, key: bytes) -> bytes:
        """Return the fingerprint of a session id, given as UTF-8."""
        state = self._copy()
        state.update(key)
        return state.digest()


class Index:
    """Fingerprint -> `Row`. Synchronous, never blocks, never moves more than one shard at once."""

    def __init__(self) -> None:
        self._shards: list[list[bytearray]] = [[_EMPTY] for _ in range(SHARDS)]
        self._counts = [0] * SHARDS
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def _bucket(self, fingerprint: bytes) -> bytearray:
        bits = _from_bytes(fingerprint[:6], "little")
        shard = self._shards[bits & _SHARD_MASK]
        return shard[(bits >> _SHARD_BITS) & (len(shard) - 1)]

    def get(self, fingerprint: bytes) -> Row | None:
        """Return the row of `fingerprint`, or None."""
        bucket = self._bucket(fingerprint)
        at = bucket.find(fingerprint)
        if at > 0 and at % INDEX_ROW_BYTES:
            at = _find(bucket, fingerprint)
        return None if at < 0 else _new_row(Row, _unpack(bucket, at))

    def find(
        self, fingerprint: bytes
    ) -> tuple[bytearray, int, tuple[float, float, float, int, int, int, int]] | None:
        """Return where the row of `fingerprint` is, and all of it behind the sequence number.

        (bucket, place in it, (accessed, deadline, cap, segment, offset, length, user)). Valid
        until the index changes; until then new times can be packed there (`TIMES` at `TIMES_AT`
        behind the place) without searching again.
        """
        bits = _from_bytes(fingerprint[:6], "little")
        shard = self._shards[bits & _SHARD_MASK]
        bucket = shard[(bits >> _SHARD_BITS) & (len(shard) - 1)]
        at = bucket.find(fingerprint)
        if at > 0 and at % INDEX_ROW_BYTES:
            at = _find(bucket, fingerprint)
        if at < 0:
            return None
        return bucket, at, _unpack_behind_sequence(bucket, at + TIMES_AT)

    def place(self, fingerprint: bytes) -> tuple[int, int] | None:
        """Return (segment, offset) of a session's newest frame."""
        bucket = self._bucket(fingerprint)
        at = _find(bucket, fingerprint)
        return None if at < 0 else _SEGMENT_OFFSET.unpack_from(bucket, at + _PLACE_AT)

    def sequence(self, fingerprint: bytes) -> int | None:
        """Return the sequence number of a session's newest put."""
        bucket = self._bucket(fingerprint)
        at = _find(bucket, fingerprint)
        if at < 0:
            return None
        sequence: int = _SEQUENCE.unpack_from(bucket, at + _SEQUENCE_AT)[0]
        return sequence

    def put(self, rows: Iterable[bytes]) -> dict[int, int]:
        """Set rows, each given as `INDEX_ROW` packs it, whatever was there.

        Returns:
            How many bytes of frames they replaced, by segment.
        """
        replaced: dict[int, int] = {}
        shards = self._shards
        from_bytes = int.from_bytes
        for row in rows:
            fingerprint = row[:_FINGERPRINT_BYTES]
            bits = from_bytes(row[:6], "little")
            shard = shards[bits & _SHARD_MASK]
            place = (bits >> _SHARD_BITS) & (len(shard) - 1)
            bucket = shard[place]
            at = bucket.find(fingerprint)
            if at > 0 and at % INDEX_ROW_BYTES:
                at = _find(bucket, fingerprint)
            if at < 0:
                shard[place] = bucket + row  # not +=, which allocates an eighth more
                self._grew(bits & _SHARD_MASK)
            else:
                segment, _, length = _unpack_place(bucket, at + _PLACE_AT)
                bucket[at : at + INDEX_ROW_BYTES] = row
                replaced[segment] = replaced.get(segment, 0) + (length & ROW_LENGTH_BITS)
        return replaced

    def reserve(self, count: int) -> None:
        """Prepare an empty index for about `count` rows, so that loading them moves none."""
        assert not self._count, "only an empty index"
        buckets = 1
        while buckets * _ROWS_PER_BUCKET * SHARDS < count:
            buckets *= 2
        if buckets > 1:
            self._shards = [[_EMPTY] * buckets for _ in range(SHARDS)]

    def load_newer(self, rows: bytes) -> None:
        """Take packed rows, except where a row with a higher sequence is there.

        For recovery: rows are counted, and full shards doubled, by `settle` only.
        """
        shards = self._shards
        from_bytes = int.from_bytes
        for start in range(0, len(rows), INDEX_ROW_BYTES):
            row = rows[start : start + INDEX_ROW_BYTES]
            fingerprint = row[:_FINGERPRINT_BYTES]
            bits = from_bytes(row[:6], "little")
            shard = shards[bits & _SHARD_MASK]
            place = (bits >> _SHARD_BITS) & (len(shard) - 1)
            bucket = shard[place]
            at = bucket.find(fingerprint)
            if at > 0 and at % INDEX_ROW_BYTES:
                at = _find(bucket, fingerprint)
            if at < 0:
                shard[place] = bucket + row  # not +=, which allocates an eighth more
            elif _unpack_sequence(bucket, at + _SEQUENCE_AT) < _unpack_sequence(row, _SEQUENCE_AT):
                bucket[at : at + INDEX_ROW_BYTES] = row

    def _grew(self, number: int) -> None:
        """Count a new row of a shard; double its buckets when they are full."""
        self._count += 1
        self._counts[number] += 1
        shard = self._shards[number]
        if self._counts[number] > _ROWS_PER_BUCKET * len(shard):
            self._shards[number] = _doubled(shard)

    def touch(self, fingerprint: bytes, accessed: float, deadline: float) -> float | None:
        """Set the times of a row; return its last access before, None when there is no row."""
        bucket = self._bucket(fingerprint)
        at = bucket.find(fingerprint)
        if at > 0 and at % INDEX_ROW_BYTES:
            at = _find(bucket, fingerprint)
        if at < 0:
            return None
        before: float = TIMES.unpack_from(bucket, at + TIMES_AT)[0]
        TIMES.pack_into(bucket, at + TIMES_AT, accessed, deadline)
        return before

    def move(
        self, fingerprint: bytes, source: tuple[int, int], target: tuple[int, int], length: int
    ) -> int | None:
        """Let a row that points to `source` (segment, offset) point to a frame at `target`.

        Returns:
            How many bytes were needed at `source`; None: the row points elsewhere, and stays.
        """
        bucket = self._bucket(fingerprint)
        at = _find(bucket, fingerprint)
        if at < 0:
            return None
        segment, offset, needed = _unpack_place(bucket, at + _PLACE_AT)
        if (segment, offset) != source:
            return None
        _PLACE.pack_into(bucket, at + _PLACE_AT, *target, length)
        return int(needed) & ROW_LENGTH_BITS

    def remove(self, fingerprint: bytes) -> Row | None:
        """Remove the row of `fingerprint` and return it."""
        bits = int.from_bytes(fingerprint[:6], "little")
        number = bits & _SHARD_MASK
        shard = self._shards[number]
        bucket = shard[(bits >> _SHARD_BITS) & (len(shard) - 1)]
        at = _find(bucket, fingerprint)
        if at < 0:
            return None
        row = Row._make(_unpack(bucket, at))
        del bucket[at : at + INDEX_ROW_BYTES]
        self._count -= 1
        self._counts[number] -= 1
        return row

    def filled_shards(self) -> Iterator[int]:
        """Yield the numbers of the shards that have rows when it is their turn.

        A session never changes its shard. Going through them therefore meets each session that
        exists all the while exactly once, whatever is written in between.
        """
        return (number for number in range(SHARDS) if self._counts[number])

    def rows_of_shard(self, number: int) -> list[Row]:
        """Return all rows of one shard."""
        return [
            Row._make(values)
            for bucket in self._shards[number]
            for values in INDEX_ROW.iter_unpack(bucket)
        ]

    def bucket_count(self, number: int) -> int:
        """Return how many buckets one shard has."""
        return len(self._shards[number])

    def rows_of_bucket(self, number: int, bucket: int) -> list[Row]:
        """Return all rows of one bucket of a shard: about 8 on the average at most."""
        return [Row._make(values) for values in INDEX_ROW.iter_unpack(self._shards[number][bucket])]

    def expired_in_shard(self, number: int, now: float, idle_since: float) -> list[Row]:
        """Return the rows of one shard that are past their deadline or long not accessed.

        Args:
            number: the shard.
            now: rows whose deadline is not after this.
            idle_since: rows that were last accessed before this; -infinity: none.
        """
        times = TIMES.unpack_from
        found = []
        for bucket in self._shards[number]:
            for at in range(0, len(bucket), INDEX_ROW_BYTES):
                accessed, deadline = times(bucket, at + TIMES_AT)
                if deadline <= now or accessed < idle_since:
                    found.append(Row._make(_unpack(bucket, at)))
        return found

    def user_in_shard(self, number: int, user: int) -> list[Row]:
        """Return the rows of one shard that carry this user tag (31 bits: verify the user)."""
        return [row for row in self.rows_of_shard(number) if row.user & USER_BITS == user]

    def settle(self, number: int, divisor: int, live_bytes: dict[int, int]) -> None:
        """End the loading of one shard: count its rows, double its buckets where they are full.

        Args:
            number: the shard.
            divisor: deadlines that accesses renew move by this fraction of their distance.
            live_bytes: gets the lengths of the frames that the rows point to, by segment.
        """
        shard = self._shards[number]
        count = sum(map(len, shard)) // INDEX_ROW_BYTES
        self._count += count - self._counts[number]
        self._counts[number] = count
        if not count:
            return
        while count > _ROWS_PER_BUCKET * len(shard):
            shard = self._shards[number] = _doubled(shard)
        unpack = _BEHIND_SEQUENCE.unpack_from
        for bucket in shard:
            for at in range(TIMES_AT, len(bucket), INDEX_ROW_BYTES):
                accessed, deadline, cap, segment, _, length, user = unpack(bucket, at)
                live_bytes[segment] = live_bytes.get(segment, 0) + (length & ROW_LENGTH_BITS)
                if user >= ROW_RENEWS and deadline < cap:
                    granted = deadline + (deadline - accessed) / divisor
                    TIMES.pack_into(bucket, at, accessed, min(cap, granted))

    def shift_times(self, number: int, seconds: float) -> None:
        """Add `seconds` to all times of one shard: from engine to wall time, after a clock jump."""
        for bucket in self._shards[number]:
            for at in range(TIMES_AT, len(bucket), INDEX_ROW_BYTES):
                accessed, deadline, cap = _THREE_TIMES.unpack_from(bucket, at)
                _THREE_TIMES.pack_into(
                    bucket, at, accessed + seconds, deadline + seconds, cap + seconds
                )

    # --- snapshots ----------------------------------------------------------------------------

    def images(self) -> Iterator[bytes]:
        """Yield one image per shard: bucket count, the buckets' lengths, the buckets."""
        for shard in self._shards:
            if len(shard) == 1 and not shard[0]:
                yield _EMPTY_IMAGE
                continue
            lengths = [len(shard), *map(len, shard)]
            yield b"".join((pack(f"<{len(lengths)}I", *lengths), *shard))

    def load_image(self, number: int, image: memoryview, at: int) -> int:
        """Take shard `number` from `image` at `at`; return the offset behind it.

        Raises:
            ValueError: the image is not one (its checksum was right, so this is a defect of ours).
        """
        if _IMAGE_START.unpack_from(image, at) == _EMPTY_START:
            self._count -= self._counts[number]
            self._counts[number] = 0
            self._shards[number] = [_EMPTY]
            return at + len(_EMPTY_IMAGE)
        (count,) = unpack_from("<I", image, at)
        lengths = unpack_from(f"<{count}I", image, at + 4)
        at += 4 + 4 * count
        buckets = []
        for length in lengths:
            buckets.append(bytearray(image[at : at + length]) if length else _EMPTY)
            at += length
        total = sum(lengths)
        if not count or count & (count - 1) or total % INDEX_ROW_BYTES or at > len(image):
            raise ValueError(f"the image of shard {number} is not one")
        self._count += total // INDEX_ROW_BYTES - self._counts[number]
        self._counts[number] = total // INDEX_ROW_BYTES
        self._shards[number] = buckets
        return at


def _find(bucket: bytearray, fingerprint: bytes) -> int:
    """Return the offset of the row of `fingerprint` in `bucket`, or -1.

    The bytes of a fingerprint may by chance also lie across two columns, so a hit that is not at
    the start of a row is passed over.
    """
    at = bucket.find(fingerprint)
    while at >= 0 and at % INDEX_ROW_BYTES:
        at = bucket.find(fingerprint, at + 1)
    return at


def _doubled(shard: list[bytearray]) -> list[bytearray]:
    """Return the rows of `shard` in twice as many buckets."""
    count = 2 * len(shard)
    buckets = [bytearray() for _ in range(count)]
    mask = count - 1
    for bucket in shard:
        for at in range(0, len(bucket), INDEX_ROW_BYTES):
            row = bucket[at : at + INDEX_ROW_BYTES]
            bits = int.from_bytes(row[:6], "little")
            buckets[(bits >> _SHARD_BITS) & mask] += row
    return buckets
